"""Dropout of the adapter's input, exact at every layout: each gradient in fp64 against the dense oracle, which draws
for samples on their own, neither padded nor packed; no message more than without; and runs through the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cases import part_of
from support.engine_runs import SHORT, Layout, five_layers, prepare, relative_distance, run_and_check
from support.forked_ranks import run_on_ranks
from support.gradient_worker import Case, run_gradients
from support.oracle_adapter import ALL_TARGETS
from support.tiny_models import write_tiny_model
from test_parallel_gradients import Answers, check_numbers

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

P = 0.3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No size of one is a size of another; columns of o_proj and down_proj divide by four."""
    folder = tmp_path_factory.mktemp("model")
    shape = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "vocab_size": 321}
    return write_tiny_model(folder / "model", tokenizer=False, **shape)


def cases_of(model: Path, ranks: int, whole: bool) -> list[Case]:
    """Every way of sharding with both kinds of rows and of recompute, frozen factors, and one target alone.

    In part, each way meets both kinds of rows, each layout every kind of rows and recompute, and each method whole and
    sharded sequences.
    """
    cases = []
    for layout in {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1)], 4: [(2, 2, 1), (4, 1, 1), (2, 1, 2)]}[ranks]:
        for sharded in (True, False) if layout[0] > 1 else (False,):
            more: dict[str, Any] = {"layout": layout, "sequence_parallel": sharded, "targets": ALL_TARGETS}
            some = [
                {"packed": True},
                {"recompute": "full"},
                {"recompute": "selective", "packed": True, "method": "lora"},
                {"method": "vera"},  # A is frozen
                {"method": "tl1", "layers": (1, 3)},  # F is frozen
                {"targets": ("down_proj",), "layers": (3,)},
            ]
            cases += [Case(model, dropout=P, **{**more, **case}) for case in some]
    if whole:
        return cases
    return part_of(
        cases,
        lambda case: (case.way, case.packed),
        lambda case: (case.layout, case.recompute, case.packed),
        lambda case: (case.method, case.sequence_parallel),
    )


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@pytest.mark.cpu_seconds(15, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_equal_the_oracle_and_no_message_is_added(
    model: Path, answers: Answers, tmp_path: Path, ranks: int, whole: bool
) -> None:
    cases = cases_of(model, ranks, whole)
    plain = [replace(case, dropout=0.0) for case in cases[:: 1 if whole else 2]]
    by_rank = run_on_ranks(run_gradients, [*cases, *plain], ranks=ranks, folder=tmp_path)
    outcomes = [list(found) for found in zip(*by_rank, strict=True)]
    for case, found in zip(cases, outcomes, strict=False):
        check_numbers(case, found, answers)
    for case, without in zip(plain, outcomes[len(cases) :], strict=True):
        for one, other in zip(outcomes[cases.index(replace(case, dropout=P))], without, strict=True):
            assert one.traffic.messages == other.traffic.messages and one.traffic.bytes == other.traffic.bytes, case


def test_the_oracle_s_gradients_depend_on_dropout(model: Path, answers: Answers) -> None:
    case = Case(model, (1, 1, 1), targets=ALL_TARGETS)
    dropped, plain = (answers.gradients(replace(case, dropout=p))[1] for p in (P, 0.0))
    assert all(relative_distance(dropped[name], plain[name]) > 1e-2 for name in plain)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Settings, and a folder of starts whose oracle's runs all layouts share."""
    folder = tmp_path_factory.mktemp("starts")
    return {**five_layers(folder), **SHORT, "dropout": P, "targets": list(ALL_TARGETS)}, folder


@pytest.mark.parametrize(
    "layout",
    [pytest.param(Layout(1, 1, 1), marks=pytest.mark.slow), Layout(1, 2, 1), Layout(2, 1, 2), Layout(2, 2, 1)],
    ids=str,
)
def test_runs_equal_the_oracle_s(starts: tuple[dict[str, Any], Path], tmp_path: Path, layout: Layout) -> None:
    """Steps through loader, engine and optimizer, packed and not; the oracle draws for the samples of each step."""
    run_and_check([prepare(*starts, layout, packing=packing) for packing in (True, False)], tmp_path)
