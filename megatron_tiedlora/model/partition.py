"""The partition of the flat list into contiguous pipeline stages whose largest cost is minimal.

Costs are multiplications per token, forward and backward. A frozen base has no weight gradients, so a layer's backward
pass costs as much as its forward pass (attention's twice that). Layers before the first adapted one have no backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from megatron_tiedlora.base.shapes import ModelShape

Stages = tuple[range, ...]


def layer_costs(shape: ModelShape, *, length: int, first_adapted: int | None) -> list[float]:
    """Multiplications per token of every layer of the flat list (embedding, blocks, head), forward and backward.

    Block: P, the number of its weights, for matmuls, and A = s h for causal attention over s tokens (h: width of the
    queries). Forward costs P + A, backward P + 2A. Head: V d for each pass, as if every position were supervised. The
    embedding costs nothing.

    Args:
        first_adapted: the first layer (1-based) with a backward pass; None: nothing is trained, no layer has one.
    """
    matmuls = shape.block.num_weights
    attention = length * shape.heads.rows[0]
    costs = [0.0]
    for index in range(1, shape.num_layers + 1):
        backward = matmuls + 2 * attention if first_adapted is not None and index >= first_adapted else 0.0
        costs.append(float(matmuls + attention + backward))
    costs.append(float((1 if first_adapted is None else 2) * shape.head.num_weights))
    return costs


def partition(costs: Sequence[float], num_stages: int) -> Stages:
    """Split layers 0 to len(costs) - 1 into `num_stages` stages with at least one block each.

    The largest cost of a stage is minimal. Among such partitions the sum of squares is minimal, which evens out the
    other stages.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    num_blocks = len(costs) - 2
    if num_stages > num_blocks:
        raise ValueError(f"{num_blocks} layers cannot be split into {num_stages} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # Two searches: for the smallest largest cost, then for the smallest sum of squares with that largest cost.
    least, _ = _best_cuts(total, num_stages, lambda before, cost: max(before, cost))
    _, cuts = _best_cuts(total, num_stages, lambda before, cost: before + cost * cost, largest=least)
    return tuple(range(start, stop) for start, stop in zip((0, *cuts), cuts, strict=False))


def _best_cuts(
    total: Sequence[float],
    num_stages: int,
    add: Callable[[float, float], float],
    *,
    largest: float = math.inf,
) -> tuple[float, tuple[int, ...]]:
    """The smallest value and the cuts that have it.

    Args:
        total: the summed cost of the layers before each layer.
        add: from the value of the stages before a stage, and its cost, to the value including it.
        largest: no stage may cost more.
    """
    num_layers = len(total) - 1
    # best[stop]: (value, cuts) of layers 0 to stop - 1 in the stages so far; a cut is always after a block.
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
