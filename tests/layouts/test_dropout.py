"""Dropout of the adapter's input, exact at every layout: each gradient in fp64 against the dense oracle, which draws
for samples on their own, neither padded nor packed; no message more than without; and runs through the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import relative_distance
from forked_ranks import run_on_ranks
from gradient_worker import DTYPE, SEED, Case, Outcome, joined_gradients, run_cases
from layout_runs import Layout, five_layers, prepare, run_and_check
from oracle import OracleConfig, cast_weights, load_weights
from oracle_adapter import ALL_TARGETS
from oracle_dropout import dropout
from oracle_training import oracle_gradients
from tiny_models import write_tiny_model

from megatron_tiedlora.parallel.groups import Grid

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TOLERANCE = 1e-10
P = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No size of one is a size of another; columns of o_proj and down_proj divide by four."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "vocab_size": 321}
    return write_tiny_model(folder / "model", tokenizer=False, **shape)


def cases_of(model: Path, ranks: int, whole: bool) -> list[Case]:
    """Every way of sharding; each with both kinds of rows and of recompute that its targets can tell apart.

    In part, each layout meets every case, with sharded sequences or without.
    """
    layouts = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1)], 4: [(2, 2, 1), (4, 1, 1), (2, 1, 2)]}[ranks]
    cases = []
    for number, layout in enumerate(layouts):
        ways = (True, False) if layout[0] > 1 else (False,)
        for turn, sharded in enumerate(ways):
            more: dict[str, Any] = {"layout": layout, "sequence_parallel": sharded, "targets": ALL_TARGETS}
            some = [
                {"packed": True},
                {"recompute": "full"},
                {"recompute": "selective", "packed": True, "method": "lora"},
                {"method": "vera"},  # A is frozen
                {"method": "tl1", "layers": (1, 3)},  # F is frozen
                {"targets": ("down_proj",), "layers": (3,)},
            ]
            chosen = some if whole else some[(number + turn) % len(ways) : 4 : len(ways)]
            cases += [Case(model, dropout=P, **{**more, **case}) for case in chosen]
    return cases


def test_every_case_occurs_in_part(model: Path) -> None:
    found = [case for ranks in (2, 4) for case in cases_of(model, ranks, whole=False)]
    for layout in {case.layout for case in found}:
        kinds = {(case.packed, case.recompute, case.method) for case in found if case.layout == layout}
        assert kinds == {(case.packed, case.recompute, case.method) for case in cases_of(model, 1, whole=False)}
        cut = {case.sequence_parallel for case in found if case.layout == layout}
        assert cut == ({True, False} if layout[0] > 1 else {False})
    assert len({(case.packed, case.recompute, case.method, case.sequence_parallel) for case in found}) == 8


class Answers:
    """The oracle's loss and gradients, worked out once for each adapter."""

    def __init__(self, model: Path) -> None:
        self._weights = cast_weights(load_weights(model), DTYPE), OracleConfig.from_folder(model)
        self._known: dict[Any, Any] = {}

    def __call__(self, case: Case) -> tuple[float, dict[str, torch.Tensor]]:
        key = case.method, case.layers, case.targets, case.dropout
        if key not in self._known:
            samples = case.samples
            if case.dropout:
                draws = [dropout(numbers, seed=SEED, probability=case.dropout) for numbers in case.numbers]
                samples = [replace(sample, drops=[draw]) for sample, draw in zip(samples, draws, strict=True)]
            self._known[key] = oracle_gradients(*self._weights, case.adapter, samples)
        return self._known[key]


@pytest.fixture(scope="module")
def answers(model: Path) -> Answers:
    return Answers(model)


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_equal_the_oracle_and_no_message_is_added(
    model: Path, answers: Answers, tmp_path: Path, ranks: int, whole: bool
) -> None:
    cases = cases_of(model, ranks, whole)
    plain = [replace(case, dropout=0.0) for case in cases]
    by_rank = run_on_ranks(run_cases, [*cases, *plain], ranks=ranks, folder=tmp_path)
    outcomes = [list(found) for found in zip(*by_rank, strict=True)]
    for case, found, without in zip(cases, outcomes, outcomes[len(cases) :], strict=False):
        check(case, found, answers)
        for one, other in zip(found, without, strict=True):
            assert one.traffic.messages == other.traffic.messages and one.traffic.bytes == other.traffic.bytes, case


def check(case: Case, outcomes: list[Outcome], answers: Answers) -> None:
    loss, expected = answers(case)
    world = [Grid(rank, len(outcomes), tp_size=case.layout[0], pp_size=case.layout[1]) for rank in range(len(outcomes))]
    last = [o for grid, o in zip(world, outcomes, strict=True) if grid.pp_rank == grid.pp_size - 1 and not grid.tp_rank]
    found = sum(outcome.loss for outcome in last)
    assert abs(found - loss) <= TOLERANCE * abs(loss), (found, loss, case)
    gradients = joined_gradients(case, outcomes)
    for name, reference in expected.items():
        assert reference.abs().max() > 0, (name, case)
        distance = relative_distance(gradients[name], reference)
        assert distance <= TOLERANCE, (name, distance, case)


def test_the_oracle_s_gradients_depend_on_dropout(model: Path, answers: Answers) -> None:
    case = Case(model, (1, 1, 1), targets=ALL_TARGETS, dropout=P)
    dropped, plain = answers(case)[1], answers(replace(case, dropout=0.0))[1]
    assert all(relative_distance(dropped[name], plain[name]) > 1e-2 for name in plain)


@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(1, 2, 1), Layout(2, 1, 2), Layout(2, 2, 1)], ids=str)
def test_runs_equal_the_oracle_s(tmp_path: Path, layout: Layout) -> None:
    """Steps through loader, engine and optimizer, packed and not; the oracle draws for the samples of each step."""
    base = {**five_layers(tmp_path), "max_steps": 3, "dropout": P, "targets": list(ALL_TARGETS)}
    oracles: dict[Any, Any] = {}
    run_and_check(
        [prepare(base, tmp_path, layout, oracles=oracles, packing=packing) for packing in (True, False)], tmp_path
    )
