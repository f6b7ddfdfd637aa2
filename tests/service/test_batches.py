"""Passes divided into micro-batches: each token's number comes back to its pass, and what shares a micro-batch."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.service import batches as module
from megatron_tiedlora.service.batches import Batches, Division
from megatron_tiedlora.service.operations import Pass


def a_pass(seed: int, *lengths: int) -> Pass:
    """Rows of random tokens."""
    drawn = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(3, 250, (2, sum(lengths)), generator=drawn)
    return Pass(lengths, tokens, targets, torch.zeros(2, sum(lengths)), "cross_entropy", {}, True)


@pytest.mark.parametrize("seed", range(8))
def test_the_number_of_each_token_comes_back_to_its_pass(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several passes of a model in one command, several micro-batches of a pass, 1 to 4 data-parallel ranks. Labels
    stand for log-probabilities."""
    draw = random.Random(seed)
    for _ in range(40):
        monkeypatch.setattr(module, "LEAST_TOKENS", draw.choice([1, 20, 512]))
        dp_size, shares = draw.randint(1, 4), draw.random() < 0.5
        division = Division(draw.choice([16, 48, 600]), dp_size, draw.choice([1, 8]), draw.choice([1, 8, 16]), shares)
        sizes = [[draw.randint(1, 14) for _ in range(draw.randint(1, 12))] for _ in range(draw.randint(1, 5))]
        passes = [(f"m{draw.randrange(3)}", a_pass(draw.randrange(10**6), *own)) for own in sizes]
        batches = Batches(division, passes)
        by_rank = [[batch for some in batches.on_rank(rank) for _, batch in some] for rank in range(dp_size)]
        labels = [torch.cat([own.labels[own.labels != IGNORED_LABEL] for own in some]) for some in by_rank]
        found = list(batches.by_pass(labels))
        assert all(torch.equal(own, one.targets) for own, (_, one) in zip(found, passes, strict=True))
        assert len({len(some) for some in by_rank}) == 1, "all ranks have the same number of micro-batches"
        for some in batches.rounds:
            assert len({model for model, _ in some}) == len(some) and (shares or len(some) == 1)
            widest = [max(batches._batch(*key, rank).tokens.numel() for rank in range(dp_size)) for key in some]
            assert len(some) == 1 or sum(widest) <= division.capacity


def test_small_passes_of_different_models_share_and_a_large_one_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    small = [("a", a_pass(1, 5, 6)), ("b", a_pass(2, 9))]
    assert [len(some) for some in Batches(Division(64), small).rounds] == [2]
    assert [len(some) for some in Batches(Division(64, shares=False), small).rounds] == [1, 1]
    # On two data-parallel ranks, the larger half counts: 24 and 16 tokens, of 32.
    halves = [("a", a_pass(1, 8, 24)), ("b", a_pass(2, 16, 16))]
    monkeypatch.setattr(module, "LEAST_TOKENS", 8)
    assert [len(some) for some in Batches(Division(32, 2), halves).rounds] == [1, 1]
    assert len(Division(600, 2, 4).slices([8] * 16)) == 8, "so many that all stages of both ranks are busy"
