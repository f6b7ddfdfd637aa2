"""How a model is partitioned over ranks, and the name table: every parameter and its Hugging Face rows.

The partition says which layers a pipeline stage has, and what tensor parallelism must divide. The name table is derived
from a `ModelShape`. Loading, merging, exporting and comparing all read it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import LinearShape, ModelShape, NormShape
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.parallel.shard_spec import ShardSpec, bias_spec, weight_spec

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
    """The least value of a partition, and its cuts. `add` adds a stage's cost to the value of the stages before it.

    Args:
        total: for each layer, the cost of the layers before it.
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
    """Check that the grid can partition the model, and that the ZeRO stage of `ds_config` can be used with it.

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


@dataclass(frozen=True)
class StoredPart:
    """Rows `start` to `start + size - 1` of the Hugging Face tensor `name`, whose shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class WeightRule:
    """One parameter of the base.

    Attributes:
        name: the name of the parameter, "layers.INDEX.REST".
        layer: its entry of the flat list: 0 the embedding, 1 to L the blocks, L + 1 the head.
        linear: the name of the linear whose matrix it is; None for a norm's weight or a bias.
        shape: the shape of the full tensor.
        spec: how it is sharded over tensor-parallel ranks.
        parts: stacked along dimension 0, one for each of `spec.blocks` if these run along it.
        divides: whether the backward pass divides by it, so that it must have no zero.
    """

    name: str
    layer: int
    linear: str | None
    shape: tuple[int, ...]
    spec: ShardSpec
    parts: tuple[StoredPart, ...]
    divides: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names of the Hugging Face tensors that store it, one for each part."""
        return tuple(part.name for part in self.parts)

    def is_quantised(self, shape: ModelShape) -> bool:
        """Whether it is quantised in a base of fewer bits: the matrix of a block's linear is."""
        return self.linear is not None and 1 <= self.layer <= shape.num_layers

    def by_stored_tensor(self, rows: Tensor) -> dict[str, Tensor]:
        """Split rows (out_size, ...), stacked as in this weight, by the stored tensor that they belong to.

        In a fused stored tensor they have its order; rows that belong to another weight are zeros.
        """
        found: dict[str, Tensor] = {}
        for part, values in zip(self.parts, rows.split([part.size for part in self.parts]), strict=True):
            if part.size == part.shape[0]:
                found[part.name] = values
                continue
            whole = found.setdefault(part.name, rows.new_zeros(part.shape[0], *rows.shape[1:]))
            whole[part.start : part.start + part.size] = values
        return found


def weight_rules(shape: ModelShape) -> tuple[WeightRule, ...]:
    """The name table, in the order of the flat list of layers. With tied embeddings the head has no entry."""
    found = list(_linear(shape.embedding, layer=0, stored=""))
    for index in range(shape.num_layers):
        stored = shape.block.source.format(index=index) + "."
        for part in shape.block.parts:
            where: dict[str, Any] = {"layer": index + 1, "stored": stored}
            rules = _linear(part, **where) if isinstance(part, LinearShape) else _norm(part, **where)
            found += (replace(rule, divides=part in shape.heads.norms) for rule in rules)
    last = shape.num_layers + 1
    found += _norm(shape.final_norm, layer=last, stored="")
    if not shape.tied_embeddings:
        found += _linear(shape.head, layer=last, stored="")
    return tuple(found)


def stored_shapes(rules: Iterable[WeightRule]) -> dict[str, tuple[int, ...]]:
    """The shapes of the Hugging Face tensors that store some weights, by name."""
    return {part.name: part.shape for rule in rules for part in rule.parts}


def quantised_rules(shape: ModelShape) -> Iterator[WeightRule]:
    """The weights that are quantised in a base of fewer bits: the linears of all blocks."""
    return (rule for rule in weight_rules(shape) if rule.is_quantised(shape))


def stage_weight_rules(shape: ModelShape, *, has_embedding: bool) -> tuple[WeightRule, ...]:
    """The name table for a pipeline stage: with tied embeddings, a head without the embedding has its own copy."""
    found = weight_rules(shape)
    if shape.tied_embeddings and not has_embedding:
        last = shape.num_layers + 1
        found += (replace(found[0], name=f"layers.{last}.weight", layer=last),)
    return found


def num_base_parameters(shape: ModelShape) -> int:
    """The number of parameters of the base model; a tied embedding counts once."""
    return sum(math.prod(weight.shape) for weight in weight_rules(shape))


def _norm(norm: NormShape, *, layer: int, stored: str) -> Iterator[WeightRule]:
    for kind, name in (("weight", norm.name), ("bias", norm.bias_name)):
        if name is not None:
            part = StoredPart(f"{stored}{norm.source}.{kind}", (norm.size,), 0, norm.size)
            spec = ShardSpec(0 if norm.sharded else None, (norm.size,))
            yield WeightRule(f"layers.{layer}.{name}", layer, None, (norm.size,), spec, (part,))


def _linear(linear: LinearShape, *, layer: int, stored: str) -> Iterator[WeightRule]:
    prefix = ".".join(filter(None, (f"layers.{layer}", linear.name)))

    def parts(kind: str, *width: int) -> tuple[StoredPart, ...]:
        return tuple(
            StoredPart(f"{stored}{source.module}.{kind}", (source.of or size, *width), source.start, size)
            for source, size in zip(linear.sources, linear.blocks, strict=True)
        )

    shape = (linear.out_size, linear.in_size)
    stored_matrix = parts("weight", linear.in_size)
    yield WeightRule(f"{prefix}.weight", layer, linear.name, shape, weight_spec(linear), stored_matrix)
    if linear.bias:
        yield WeightRule(f"{prefix}.bias", layer, None, (linear.out_size,), bias_spec(linear), parts("bias"))
