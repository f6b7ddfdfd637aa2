"""Every cut of a list of layers into stages, and what is to be least: for searching all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations


def all_cuts(num_layers: int, num_stages: int) -> Iterator[list[range]]:
    """Every contiguous cut of layers 0 to num_layers - 1 whose stages each have a block."""
    blocks = set(range(1, num_layers - 1))
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        stages = [range(a, b) for a, b in zip((0, *cuts), (*cuts, num_layers), strict=True)]
        if all(blocks & set(stage) for stage in stages):
            yield stages


def cost_key(costs: Sequence[float], stages: Sequence[range]) -> tuple[float, float]:
    """(largest cost of a stage, sum of squares): what is to be least, in this order."""
    sums = [sum(costs[index] for index in stage) for stage in stages]
    return max(sums), sum(value * value for value in sums)
