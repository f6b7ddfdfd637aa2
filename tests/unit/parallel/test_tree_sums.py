"""Sums over more ranks than a ring is good for: hops counted on fake groups, and values over gloo."""

from __future__ import annotations

import math
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import run_on_ranks
from torch import Tensor, distributed

from megatron_tiedlora.parallel import agreement
from megatron_tiedlora.parallel.groups import WORLD, TrafficCounter


class FakeWorld:
    """Stands for torch.distributed on one rank after the other, from the last to the first: a rank sends before the
    rank with a lower number, to which it sends, receives.

    Attributes:
        hops: of each rank, how many messages had to follow each other until it had its part of the result.
        sent: (from, to) of each message.
        rings: how many all-reduces the ranks have called.
    """

    ReduceOp = distributed.ReduceOp

    def __init__(self, size: int) -> None:
        self.size, self.rank, self.hops, self.rings = size, 0, [0] * size, 0
        self.sent: dict[tuple[int, int], tuple[Tensor, int]] = {}
        self.result: Tensor | None = None

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return self.rank

    def send(self, tensor: Tensor, dst: int, *, tag: int) -> None:
        assert tag and dst < self.rank and (self.rank, dst) not in self.sent
        self.sent[self.rank, dst] = tensor.clone(), self.hops[self.rank] + 1

    def recv(self, tensor: Tensor, src: int, *, tag: int) -> None:
        found, hops = self.sent[src, self.rank]
        assert tag
        tensor.copy_(found)
        self.hops[self.rank] = max(self.hops[self.rank], hops)

    def broadcast(self, tensor: Tensor, src: int) -> None:
        assert src == 0
        if self.rank == 0:
            self.result = tensor.clone()

    def all_reduce(self, tensor: Tensor, op: Any = None) -> None:
        self.rings += 1

    def reduced(self, monkeypatch: pytest.MonkeyPatch, name: str, values: list[Any]) -> list[Any]:
        """What rank 0 has after all ranks have called a function of `agreement`, each with its value."""
        monkeypatch.setattr(agreement, "distributed", self)
        found: list[Any] = []
        for rank in reversed(range(self.size)):
            self.rank = rank
            found = getattr(agreement, name)(values[rank])
        return found


def draws(size: int) -> list[list[float]]:
    draw = random.Random(size)
    return [[draw.gauss(0, 1) * 10 ** draw.randint(-9, 9), float(draw.randint(-5, 5))] for _ in range(size)]


def tree_sum(values: list[float]) -> float:
    """By definition: neighbours first, then neighbouring pairs, and so on."""
    while len(values) > 1:
        values = [sum(values[index + 1 : index + 2], values[index]) for index in range(0, len(values), 2)]
    return values[0]


@pytest.mark.parametrize("size", [17, 64, 100, 1024])
def test_hops_grow_with_the_logarithm(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    world, values = FakeWorld(size), draws(size)
    found = world.reduced(monkeypatch, "sum_over_ranks", values)
    levels = math.ceil(math.log2(size))
    assert max(world.hops) <= levels and world.rings == 0, "and gloo's broadcast takes as many hops again"
    assert len(world.sent) == size - 1 and len({source for source, _ in world.sent}) == size - 1
    received = [sum(to == rank for _, to in world.sent) for rank in range(size)]
    assert max(received) == received[0] == levels
    within = sum(source // 8 == to // 8 for source, to in world.sent)
    assert within >= 7 * (size // 8), "of eight ranks of a host, one sends to another host"
    assert found == [tree_sum([value for value, _ in values]), sum(number for _, number in values)]
    assert found[0] == pytest.approx(math.fsum(value for value, _ in values), rel=1e-12, abs=1e-6)


@pytest.mark.parametrize("size", [64, 1024])
def test_largest_values_and_lists_of_numbers(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    values = draws(size)
    found = FakeWorld(size).reduced(monkeypatch, "max_over_ranks", values)
    assert found == [max(column) for column in zip(*values, strict=True)]
    numbers = [2**62 + rank for rank in range(size)]
    assert FakeWorld(size).reduced(monkeypatch, "gather_numbers", numbers) == numbers
    values[size // 3][0] = math.nan
    assert math.isnan(FakeWorld(size).reduced(monkeypatch, "max_over_ranks", values)[0])


def test_a_host_sums_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (2, 8, 16):
        world = FakeWorld(size)
        world.reduced(monkeypatch, "sum_over_ranks", draws(size))
        assert (world.rings, world.sent, world.result) == (size, {}, None)


# Over gloo --------------------------------------------------------------------------------------------------------


def _sums(ring: int) -> dict[str, Any]:
    agreement._RING_RANKS = ring
    rank, size = distributed.get_rank(), distributed.get_world_size()
    between = torch.tensor([float(rank)])
    # A message between pipeline stages, which is received after a sum.
    waiting = distributed.isend(between, 0) if rank == size - 1 else None
    value = draws(size)[rank]
    with TrafficCounter({}) as counter:
        summed = agreement.sum_over_ranks(value)
    if rank == 0:
        distributed.recv(between, size - 1)
    if waiting is not None:
        waiting.wait()
    return {
        "sum": [number.hex() for number in summed],
        "max": agreement.max_over_ranks([*value, -math.inf, float(rank)]),
        "numbers": agreement.gather_numbers(2**62 + rank),
        "none": agreement.sum_over_ranks([]),
        "first": agreement.first_messages([f"of {rank}" if rank >= 2 else None]),
        "between": between.item(),
        "traffic": dict(counter.traffic.messages),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 5])
def test_a_tree_over_gloo_gives_what_the_ring_gives(tmp_path: Path, ranks: int) -> None:
    tree = run_on_ranks(_sums, 1, ranks=ranks, folder=tmp_path / "tree")
    ring = run_on_ranks(_sums, 16, ranks=ranks, folder=tmp_path / "ring")
    for rank, (here, before) in enumerate(zip(tree, ring, strict=True)):
        assert here["sum"] == tree[0]["sum"], "the same bits on every rank"
        assert float.fromhex(here["sum"][0]) == tree_sum([value for value, _ in draws(ranks)])
        assert here["sum"][1] == before["sum"][1], "a sum that is exact"
        for name in ("max", "numbers", "none", "first"):
            assert here[name] == before[name], name
        assert here["between"] == (rank or ranks - 1)
        sent = {(WORLD, "send"): 1} if rank else {}
        assert here["traffic"] == {(WORLD, "broadcast"): 1, **sent}, "not counted as a message between stages"
        assert before["traffic"] == {(WORLD, "all-reduce"): 1}


def _missing(folder: str) -> tuple[str, float]:
    """In a group with a time limit of 4 seconds, rank 3 does not come. On a busy machine a group needs two to meet."""
    agreement._RING_RANKS = 1
    rank = distributed.get_rank()
    distributed.destroy_process_group()
    limit = timedelta(seconds=4)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=4, timeout=limit)
    started, said = time.monotonic(), ""
    if rank == 3:
        time.sleep(9)
    else:
        try:
            agreement.sum_over_ranks([1.0])
        except RuntimeError as error:
            said = str(error)
    return said, time.monotonic() - started


@pytest.mark.distributed
def test_a_rank_that_does_not_come_is_waited_for_until_the_time_limit(tmp_path: Path) -> None:
    *others, _ = run_on_ranks(_missing, str(tmp_path), ranks=4, folder=tmp_path)
    assert all(said and 3 < seconds < 6 for said, seconds in others), others
