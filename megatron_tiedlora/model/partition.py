"""How a model is cut over ranks: which layers a pipeline stage has, and what tensor parallelism must divide."""

import math
from collections.abc import Callable, Sequence
from functools import cache

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.parallel.shard_spec import weight_spec

Stages = tuple[range, ...]


def layer_costs(shape: ModelShape, *, length: int, first_adapted: int | None) -> tuple[float, ...]:
    """The multiplications per token of every layer of the flat list (embedding, blocks, head), both passes together.

    A block has P = the numbers in its matrices, for matmuls, and A = s h for causal attention over s tokens (h: width
    of the queries). Its forward pass costs P + A, its backward pass P + 2A from the first adapted layer on. The head
    costs V d each way, as if every position were supervised. The embedding costs nothing.

    Args:
        first_adapted: 1-based; None: nothing is trained, and no layer has a backward pass.
    """
    matmuls = shape.block.num_weights
    attention = length * shape.heads.rows[0]
    costs = [0.0]
    for index in range(1, shape.num_layers + 1):
        backward = matmuls + 2 * attention if first_adapted is not None and index >= first_adapted else 0.0
        costs.append(float(matmuls + attention + backward))
    return *costs, float((1 if first_adapted is None else 2) * shape.head.num_weights)


@cache
def partition(costs: tuple[float, ...], num_stages: int) -> Stages:
    """Partition layers 0 to len(costs) - 1 into `num_stages` ranges, each with a block (no stage is the head alone).

    It minimises the largest cost of a stage and, among the partitions that do, the sum of squares.

    Raises:
        ValueError: fewer blocks than stages.
    """
    num_blocks = len(costs) - 2
    if num_stages > num_blocks:
        raise ValueError(f"{num_blocks} layers cannot be partitioned into {num_stages} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # Two passes: the smallest largest cost, then the smallest sum of squares that does not exceed it.
    least, _ = _best_cuts(total, num_stages, lambda before, cost: max(before, cost))
    _, cuts = _best_cuts(total, num_stages, lambda before, cost: before + cost * cost, largest=least)
    return tuple(range(start, stop) for start, stop in zip((0, *cuts), cuts, strict=False))


def _best_cuts(
    total: Sequence[float], num_stages: int, add: Callable[[float, float], float], *, largest: float = math.inf
) -> tuple[float, tuple[int, ...]]:
    """The cuts with the least value, and the value: `add` takes a stage's cost into the value of those before it.

    Args:
        total: cost of the layers before each.
        largest: no stage may cost more.
    """
    num_layers = len(total) - 1
    # best[stop]: (value, cuts) of layers 0 to stop - 1 in the stages so far; a cut lies after a block.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        left = num_stages - stage - 1
        stops = [num_layers] if left == 0 else range(stage + 2, num_layers - left)
        following = {}
        for stop in stops:
            choices = []
            for start, (value, cuts) in best.items():
                cost = total[stop] - total[start]
                if stop - start >= (2 if start == 0 or stop == num_layers else 1) and cost <= largest:
                    choices.append((add(value, cost), (*cuts, stop)))
            if choices:
                following[stop] = min(choices)
        best = following
    return best[num_layers]


def check_layout(shape: ModelShape, grid: Grid, *, zero_stage: int = 0, ds_config: str = "") -> None:
    """Check that the model can be cut over the grid and that the ZeRO stage of `ds_config` goes with it.

    Raises:
        UserError: the first thing that does not fit, with the numbers that do.
    """
    tp, pp = grid.tp_size, grid.pp_size
    # What tensor parallelism must divide: whole heads, and what linears are sharded along. A linear that can be adapted
    # also has its A, which is sharded along the linear's input.
    names = {shape.hidden_size: "hidden size", shape.intermediate_size: "feed-forward width"}
    sizes = [("attention heads", shape.heads.num), ("key-value heads", shape.heads.num_kv)]
    for linear in shape.block.linears:
        inputs = (linear.in_size,) if linear in shape.block.adaptable.values() else ()
        sizes += [(names.get(size, linear.name), size) for size in (*inputs, *weight_spec(linear).blocks)]
    for name, size in sizes:
        if size % tp:
            possible = [n for n in range(1, shape.heads.num_kv + 1) if all(s % n == 0 for _, s in sizes)]
            raise UserError(
                f"--tensor_parallel {tp} does not divide the model's {size} ({name}); possible are"
                f" {', '.join(map(str, possible))}"
            )
    if (tp - 1) * -(-shape.vocab_size // tp) >= shape.vocab_size:
        raise UserError(
            f"--tensor_parallel {tp}: a vocabulary of {shape.vocab_size} leaves a rank without a row; give fewer"
        )
    if pp > shape.num_layers:
        raise UserError(
            f"--pipeline_parallel {pp}: the model has {shape.num_layers} layers and every stage needs one; give at"
            f" most {shape.num_layers}"
        )
    if pp > 1 and zero_stage > 1:
        raise UserError(
            f"--ds_config {ds_config}: ZeRO-{zero_stage} does not go with --pipeline_parallel {pp} (stages"
            " sum their gradients once a step, not per micro-batch); use zero1.json, which costs a rank no more than"
            " whole gradients of its part of the adapter"
        )
