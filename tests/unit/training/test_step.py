"""One training step without a run: what it asks whom and in which order, and when it raises."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.training import step as module
from megatron_tiedlora.training.checks import RunFailed
from megatron_tiedlora.training.step import TrainStep

SUPERVISED, MICRO_BATCHES = 40, 3
PLAN: Any = SimpleNamespace(
    batches=SimpleNamespace(accumulation_steps=5),
    grid=SimpleNamespace(dp_size=1, world_size=1),
    settings=SimpleNamespace(replica_check_steps=1),
)
STEP: Any = SimpleNamespace(
    num_supervised=SUPERVISED, micro_batches=list(range(MICRO_BATCHES))
)
ALL = ["passes", "save due?", "gradients of 1", "step", "copies of 1"]


class Rank:
    """In place of the runner, the checks and the watch over signals; `calls` is what they were asked for."""

    def __init__(self, *, loss: float = 60.0, norm: float = 0.5, wish: int = 0) -> None:
        self.calls: list[str] = []
        self.missing_gradients: list[str] = []
        self.engine = SimpleNamespace(get_lr=lambda: [0.25])
        self.loss, self.norm, self.number = loss, norm, wish

    def accumulate(self, inputs: list[int], denominator: float, between: Any) -> float:
        assert inputs == [0, 1, 2] and denominator == SUPERVISED / 5
        for _ in inputs[:-1]:
            between()
        self.calls.append("passes")
        return self.loss

    def take_step(self) -> float:
        self.calls.append("step")
        return self.norm

    def requested_signal(self) -> int:
        return self.number

    def agree(self, mine: bool) -> bool:
        self.calls.append("stop?")
        return mine

    def before_step(self, step: int, *, ranks_missing: float) -> None:
        self.calls.append(f"gradients of {step}" + (", missing" if ranks_missing else ""))

    def after_step(self, step: int) -> None:
        self.calls.append(f"copies of {step}")

    def save_due(self) -> bool:
        self.calls.append("save due?")
        return True


def made(rank: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> TrainStep:
    monkeypatch.setattr(module, "StepChecks", lambda *_, **__: rank)
    return TrainStep(PLAN, rank, rank, **options)


def test_a_step_and_its_report(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank()
    train_step = made(rank, monkeypatch, long_seconds=math.inf)
    report = train_step.run(STEP, save_due=rank.save_due)
    assert rank.calls == ALL
    assert (report.number, report.loss, report.learning_rate, report.grad_norm) == (1, 1.5, 0.25, 0.5)
    assert report.votes.save_due == 1 and report.votes.stopping == report.votes.failed == 0
    rank.missing_gradients = ["A"]
    assert train_step.run(STEP).number == train_step.finished == 2
    assert rank.calls[len(ALL) :] == ["passes", "gradients of 2, missing", "step", "copies of 2"]


def test_a_wish_to_stop_comes_with_a_step_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(wish=15)
    report = made(rank, monkeypatch, finished=6, long_seconds=math.inf).run(STEP)
    assert report.number == 7 and "step" in rank.calls
    assert (report.votes.stopping, report.votes.signals) == (1, 15)


@pytest.mark.parametrize(("long_seconds", "asks"), [(0.0, True), (60.0, False)])
def test_ranks_ask_between_micro_batches_after_a_long_step(
    monkeypatch: pytest.MonkeyPatch, long_seconds: float, asks: bool
) -> None:
    """And in the first step, before which nothing is known."""
    rank = Rank()
    train_step = made(rank, monkeypatch, long_seconds=long_seconds)
    for expected in (True, asks):
        rank.calls.clear()
        train_step.run(STEP)
        assert rank.calls.count("stop?") == (MICRO_BATCHES - 1) * expected


def test_a_failure_ends_the_run_before_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(loss=math.nan)
    train_step = made(rank, monkeypatch, long_seconds=math.inf)
    with pytest.raises(UserError, match="the disk is full"):
        train_step.run(STEP, failure=UserError("the disk is full"))
    assert rank.calls == ["passes"] and train_step.finished == 0


@pytest.mark.parametrize(
    ("values", "saved_step", "message", "calls"),
    [
        ({"loss": math.nan}, None, "the loss is nan at step 5; no checkpoint was written yet. Lower", 1),
        ({"norm": math.inf}, 4, "the gradient norm is inf at step 5; the last checkpoint is of step 4. Lower", 3),
    ],
)
def test_what_is_not_finite(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, float], saved_step: int | None, message: str, calls: int
) -> None:
    """A loss is seen before weights move, a norm at once after that."""
    rank = Rank(**values)  # type: ignore[arg-type]
    train_step = made(rank, monkeypatch, finished=4, long_seconds=math.inf)
    with pytest.raises(RunFailed, match=re.escape(message)):
        train_step.run(STEP, saved_step=saved_step)
    assert rank.calls == ["passes", "gradients of 5", "step"][:calls] and train_step.finished == 4
