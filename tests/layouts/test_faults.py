"""The comparison with the oracle can fail: every fault of tensor and pipeline parallelism that we know turns it red.

Healthy and broken runs start from the same settings, in the same processes, and are measured alike: losses, norms,
adapters and copies, with the tolerances of the tests at layouts. All use SGD, since AdamW hides errors of scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support.cases import Starts, grouped
from support.engine_runs import (
    EngineRun,
    Layout,
    Prepared,
    check,
    engine_json,
    five_layers,
    prepare,
    red_measures,
    run_engine,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(40, reason="the first test makes the starts that all share"),
]

ALL = "losses norms A B u v"


@dataclass(frozen=True)
class Case:
    """A run, healthy or with a fault in it.

    Attributes:
        fault: a function of fault_patches.py, or "".
        sizes: (tp, pp, dp).
        seen_by: measures that must see the fault; others may.
        own_start: from the package's own start values, and not from a given adapter.
        stops: what the run's own checks must say; they are switched off where this is "".
        steps: no test at layouts takes fewer than two.
    """

    fault: str
    sizes: tuple[int, int, int]
    seen_by: str = ""
    zero: int = 1
    sequence_parallel: bool = True
    own_start: bool = False
    stops: str = ""
    steps: int = 2

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)

    @property
    def healthy(self) -> Case:
        """The same run without its fault."""
        return replace(self, fault="", seen_by="", stops="")

    @property
    def name(self) -> str:
        """What pytest calls it."""
        parallel = "" if self.sequence_parallel else "-whole_sequences"
        start = "-own_start" if self.own_start else ""
        return f"{self.fault or 'healthy'}-{'x'.join(map(str, self.sizes))}-zero{self.zero}{parallel}{start}"


FAULTS = [
    Case("tied_sum_left_out", (1, 2, 1), "losses norms A B copies_of_A copies_of_B"),
    Case("tied_sum_left_out", (1, 2, 1), "losses norms A B copies_of_A copies_of_B", zero=0),
    Case("tied_sum_counted_twice", (1, 2, 1), "norms A B"),
    Case("tied_sum_counted_twice", (1, 2, 1), "norms A B", zero=0),
    Case("tied_sum_divided_twice", (1, 2, 2), "losses norms A B"),
    Case("a_sum_left_out", (2, 1, 1), "losses norms A"),
    Case("a_sum_left_out", (2, 1, 1), "losses norms A", sequence_parallel=False),
    Case("u_sum_left_out", (2, 1, 1), "norms u"),
    Case("u_sum_left_out", (2, 1, 1), "norms u", zero=0),
    Case("adapter_input_gradient_left_out", (2, 1, 1), ALL),
    Case("adapter_input_gradient_left_out", (2, 1, 1), ALL, sequence_parallel=False),
    Case("replica_mark_forgotten", (1, 2, 1), ALL),
    Case("tied_counted_per_stage", (1, 2, 1), ALL, zero=0),
    Case("shard_mark_forgotten", (2, 1, 1), ALL),
    Case("shards_counted_on_rank_0", (2, 1, 1), ALL, zero=0),
    Case("replicas_counted_per_rank", (2, 1, 1), "norms A", zero=0),
    Case("start_from_local_shape", (2, 1, 1), "losses norms A B", own_start=True),
    Case("loss_per_micro_batch", (1, 1, 2), ALL, steps=4),  # v sees it last
    Case("loss_per_micro_batch", (1, 2, 1), ALL),
]
HEALTHY = list(dict.fromkeys(case.healthy for case in FAULTS))
STOPPED = [
    Case("tied_sum_left_out", (1, 2, 1), stops="after step 1 A differs between stages and data-parallel ranks"),
    Case("u_sum_left_out", (2, 1, 1), stops="after step 1 u differs between tensor-parallel ranks"),
]

Answers = Mapping[Case, tuple[Prepared, EngineRun]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return five_layers(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def answers(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What each case is and what it gave; all cases of as many ranks run in one start."""
    folder = tmp_path_factory.mktemp("faults")

    def run(cases: Sequence[Case]) -> Iterator[tuple[Prepared, EngineRun]]:
        prepared = [prepare_case(base, folder, case) for case in cases]
        runs = run_engine([one.case for one in prepared], tmp_path_factory.mktemp("runs"), ranks=cases[0].ranks)
        return zip(prepared, runs, strict=True)

    return Starts(grouped((*HEALTHY, *FAULTS, *STOPPED), lambda case: case.ranks), run)


def prepare_case(base: dict[str, Any], folder: Path, case: Case) -> Prepared:
    """For the workers, with what a run without the fault must give."""
    prepared = prepare(
        {**base, "max_steps": case.steps},
        folder,
        Layout(*case.sizes),
        own_start=case.own_start,
        ds_config=str(engine_json(folder, case.zero)),
        sequence_parallel=case.sequence_parallel,
        replica_check_steps=2 if case.stops else 0,
    )
    names = [case.fault] if case.stops else ["no_gradient_guard", case.fault]
    prepared.case["faults"] = [{"name": name} for name in names if name]
    prepared.case["may_fail"] = bool(case.stops)
    return prepared


@pytest.mark.parametrize("case", HEALTHY, ids=lambda case: case.name)
def test_a_healthy_run_passes(answers: Answers, case: Case) -> None:
    prepared, run = answers[case]
    check(run, prepared)


@pytest.mark.parametrize("case", FAULTS, ids=lambda case: case.name)
def test_a_fault_is_seen(answers: Answers, case: Case) -> None:
    """By the measures that stand beside it, at least; and the check that the layouts' tests use turns red."""
    prepared, run = answers[case]
    assert set(case.seen_by.split()) <= red_measures(run, prepared).keys()
    with pytest.raises(AssertionError):
        check(run, prepared)


@pytest.mark.parametrize("case", STOPPED, ids=lambda case: case.name)
def test_the_run_stops_itself(answers: Answers, case: Case) -> None:
    """With its own checks on, a run whose copies drift apart stops on every rank with the same message."""
    _, run = answers[case]
    assert len(run.failures) == case.ranks and len(set(run.failures)) == 1
    assert run.failures[0].startswith(case.stops), run.failures[0]
    assert run.losses == [] and run.saved == []
