"""When the passes of a pipeline run: orders of forward and backward passes, and a simulation of what they wait for.

A pass starts as early as its rank's order and its input let it. With 1F1B and p equal stages each stage is idle for
(p - 1) / (m + p - 1) of a step of m micro-batches; the simulation also knows stages that differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

FORWARD, BACKWARD = "F", "B"


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one part of the model; parts count from the embedding."""

    kind: str
    micro_batch: int
    part: int


Order = Sequence[Sequence[Pass]]
"""By rank, its passes one after another."""


def one_f_one_b(num_stages: int, num_micro_batches: int) -> list[list[Pass]]:
    """Forward passes until as many are in flight as stages follow, the own one included; then one back, one forward.

    It is the order of DeepSpeed's pipeline (0.19.8), which the trace of real steps shows.
    """
    orders = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage, num_micro_batches)
        order = [Pass(FORWARD, index, stage) for index in range(ahead)]
        for index in range(num_micro_batches):
            order.append(Pass(BACKWARD, index, stage))
            if ahead + index < num_micro_batches:
                order.append(Pass(FORWARD, ahead + index, stage))
        orders.append(order)
    return orders


def simulate(order: Order, cost: Callable[[int, Pass], Any]) -> Any:
    """The time from the start to the end of the last pass of all ranks, if each pass runs as early as it can.

    A forward pass takes the result of the same micro-batch on the part before, a backward pass that of the part behind.

    Args:
        cost: of a pass on a rank, what it sends included: a number, or an array of one number for each of several
            layouts that have this order.

    Raises:
        ValueError: the passes wait for each other in a circle.
    """
    num_parts = 1 + max(one.part for passes in order for one in passes)
    ends: dict[Pass, Any] = {}
    clocks: list[Any] = [0] * len(order)
    following = [0] * len(order)
    left = sum(map(len, order))
    while left:
        before = left
        for rank, passes in enumerate(order):
            while following[rank] < len(passes):
                one = passes[following[rank]]
                source = Pass(one.kind, one.micro_batch, one.part + (-1 if one.kind == FORWARD else 1))
                start = clocks[rank]
                if 0 <= source.part < num_parts:
                    if source not in ends:
                        break
                    start = np.maximum(start, ends[source])
                clocks[rank] = ends[one] = start + cost(rank, one)
                following[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("the passes of this order wait for each other")
    return functools.reduce(np.maximum, clocks)
