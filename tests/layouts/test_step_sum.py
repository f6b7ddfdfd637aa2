"""u's gradient: one message a step, and the same bits on every rank of a stage, whatever is summed after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import groups_of, run_on_ranks
from torch import distributed

from megatron_tiedlora.adapters.tying import sum_of_u
from megatron_tiedlora.parallel.groups import Grid, StepSum, TrafficCounter, named_handles

pytestmark = pytest.mark.distributed

NUM_PASSES, SIZE = 3, 1000


def part(rank: int, number: int) -> torch.Tensor:
    """Of magnitudes so different that another order of sums gives other bits."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(SIZE, generator=generator) * 10.0 ** torch.randint(-3, 4, (SIZE,), generator=generator)


def take_step(step_sum: StepSum, numbers: range) -> list[torch.Tensor]:
    """What each backward pass gives to the tensor."""
    value, rank = torch.ones(SIZE, requires_grad=True), distributed.get_rank()
    return [torch.autograd.grad(step_sum.of(value), value, part(rank, number))[0] for number in numbers]


def sum_on_rank(layout: tuple[int, int]) -> dict[str, Any]:
    grid = Grid(distributed.get_rank(), distributed.get_world_size(), tp_size=layout[0], pp_size=layout[1])
    groups = groups_of(grid)
    step_sum = sum_of_u(groups)
    with TrafficCounter(named_handles(groups)) as counter:
        step_sum.start(5)
        take_step(step_sum, range(2))  # given up: a run that stops between micro-batches
        step_sum.start(NUM_PASSES)
        given = take_step(step_sum, range(NUM_PASSES))
    (alone,) = take_step(step_sum, range(1))  # a step of its own, as nobody has said how many
    mean = given[-1].clone()
    if groups.data.size > 1:  # the engine's, in a group for each tensor-parallel rank
        distributed.all_reduce(mean, group=groups.data.handle)
    return {"given": given, "mean": mean, "alone": alone, "messages": dict(counter.traffic.messages), "grid": grid}


@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (2, 2)], ids=str)
def test_one_message_and_the_same_bits(tmp_path: Path, layout: tuple[int, int]) -> None:
    found = run_on_ranks(sum_on_rank, layout, ranks=4, folder=tmp_path)
    for stage in range(layout[1]):
        ranks = [rank for rank in range(4) if found[rank]["grid"].pp_rank == stage]
        expected = sum(part(rank, number).double() for rank in ranks for number in range(NUM_PASSES))
        for rank in ranks:
            *before, last = found[rank]["given"]
            assert not any(gradient.any() for gradient in before)
            assert bool(last.any()) == bool(found[rank]["alone"].any()) == (found[rank]["grid"].dp_rank == 0)
            assert list(found[rank]["messages"].values()) == [1]
            assert torch.equal(found[rank]["mean"], found[ranks[0]]["mean"]), rank
        scale = sum(part(rank, number).abs() for rank in ranks for number in range(NUM_PASSES))
        assert bool(((found[ranks[0]]["mean"] - expected).abs() <= 1e-6 * scale).all())
