"""One training step without a run: what it asks whom and in which order, when it raises, what is said of zeros; and
schedules beside transformers' own, bit for bit what runs have used."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.task_files import refusal
from transformers import get_scheduler

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup
from megatron_tiedlora.adapters.tied_adapter import AdapterShard, Target, TiedAdapter, make_adapter_config
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.settings import Schedule, make_settings
from megatron_tiedlora.engine.optimizers import EngineOptimizer, Optimizers, OwnOptimizer
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.training import step as module
from megatron_tiedlora.training.build import SCHEDULES, learning_rate_factor, make_training, resume_scheduler
from megatron_tiedlora.training.step import RunFailed, StepChecks, TrainStep, before_steps

SUPERVISED, MICRO_BATCHES = {"": 40, "a": 40, "b": 10}, 3
PLAN: Any = SimpleNamespace(
    batches=SimpleNamespace(accumulation_steps=5),
    grid=SimpleNamespace(dp_size=1, world_size=1),
    settings=SimpleNamespace(replica_check_steps=1),
)
ALL = ["passes", "sums", "save due?", "norms", "gradients of 1", "step", "copies of 1"]


class Rank:
    """In place of the runner, its optimizers, the checks and the watch over signals.

    Attributes:
        calls: what they were asked for.
        engine_steps: whether a norm is only known after the step.
        missing: the tensors without a gradient, by adapter.
        failing: the adapters that a check ends, by its name.
    """

    def __init__(
        self,
        *,
        loss: float = 60.0,
        norm: float = 0.5,
        wish: int = 0,
        engine_steps: bool = False,
        names: Sequence[str] = (ONLY,),
    ) -> None:
        self.calls: list[str] = []
        self.missing: dict[str, list[str]] = {}
        self.failing: dict[str, str] = {}
        self.engine_steps = engine_steps
        self.losses, self.found_norms, self.number = dict.fromkeys(names, loss), dict.fromkeys(names, norm), wish
        self.optimizers = self

    def divisors(self, num_supervised: int, num_passes: int) -> tuple[float, ...]:
        assert num_passes == 5
        return (float(num_supervised),)

    def accumulate(self, inputs: list[Any], divisors: Mapping[str, Any], between: Any) -> dict[str, float]:
        assert [batch for some in inputs for batch in some] == [
            (name, number) for number in range(MICRO_BATCHES) for name in divisors
        ]
        assert divisors == {name: (float(SUPERVISED[name]),) for name in divisors}
        for _ in inputs[:-1]:
            between()
        self.calls.append("passes")
        return {name: self.losses[name] for name in divisors}

    def sum_gradients(self, taking: Collection[str]) -> dict[str, list[str]]:
        self.calls.append("sums")
        return self.missing

    def norms(self, taking: Sequence[str]) -> dict[str, float]:
        self.calls.append("norms")
        return {} if self.engine_steps else {name: self.found_norms[name] for name in taking}

    def take(self, name: str, norm: float | None) -> float:
        assert norm == (None if self.engine_steps else self.found_norms[name])
        self.calls.append("step" if name == ONLY else f"step of {name}")
        return self.found_norms[name]

    def learning_rate(self, name: str) -> float:
        return 0.5 if "step" in self.calls[-3:] else 0.25  # it is read before the schedule moves on

    def clear(self, _names: Any) -> None:
        self.missing = {}

    def requested_signal(self) -> int:
        return self.number

    def agree(self, mine: bool) -> bool:
        self.calls.append("stop?")
        return mine

    def before_steps(
        self, checks: Mapping[str, Any], *, missing: Mapping[str, Any], ranks_missing: Mapping[str, float]
    ) -> dict[str, RunFailed]:
        assert {name for name, ranks in ranks_missing.items() if ranks} == {n for n, own in missing.items() if own}
        self._note("gradients", checks, "".join(f", {name or 'one'} misses" for name in missing))
        return {name: RunFailed("no gradient") for name in checks if self.failing.get(name) == "gradients"}

    def after_steps(self, checks: Mapping[str, Any]) -> dict[str, RunFailed]:
        self._note("copies", checks, "")
        return {name: RunFailed("another copy") for name in checks if self.failing.get(name) == "copies"}

    def _note(self, what: str, checks: Mapping[str, Any], more: str) -> None:
        if checks:
            numbers = " ".join(f"{name}{number}" for name, (_, number) in checks.items())
            self.calls.append(f"{what} of {numbers}{more}")

    def save_due(self) -> bool:
        self.calls.append("save due?")
        return True


def step_of(*names: str) -> dict[str, Any]:
    return {name: SimpleNamespace(num_supervised=SUPERVISED[name]) for name in names}


STEP = step_of(ONLY)


def made(rank: Any, monkeypatch: pytest.MonkeyPatch, names: Sequence[str] = (ONLY,), **options: Any) -> TrainStep:
    monkeypatch.setattr(module, "StepChecks", lambda *_, **__: rank)
    monkeypatch.setattr(module, "before_steps", rank.before_steps)
    monkeypatch.setattr(module, "after_steps", rank.after_steps)
    monkeypatch.setattr(module, "shared_micro_batch", lambda some: some)
    monkeypatch.setattr(
        module,
        "shared_rounds",
        lambda steps, capacity: [
            [(name, number) for name in some]
            for number in range(MICRO_BATCHES)
            for some in ([list(steps)] if capacity else [[name] for name in steps])
        ],
    )
    return TrainStep(dict.fromkeys(names, PLAN), rank, rank, **options)


def test_an_engine_s_optimizer_does_all_that_changes_values_in_its_own_way() -> None:
    """One that it forgot would be done as without an engine, and ZeRO would sum or clip twice."""
    inherited = {name for name in vars(Optimizers) if name not in vars(EngineOptimizer) and not name.startswith("_")}
    assert inherited == {"learning_rate", "set_numbers"}  # a service, which sets them, has no such optimizer


@pytest.mark.parametrize("engine_steps", [False, True])
def test_a_step_and_its_report(monkeypatch: pytest.MonkeyPatch, engine_steps: bool) -> None:
    rank = Rank(engine_steps=engine_steps)
    train_step = made(rank, monkeypatch, long_seconds=math.inf)
    report = train_step.run(STEP, save_due=rank.save_due)
    own = report.only
    assert rank.calls == ALL
    assert (own.number, own.loss, own.learning_rate, own.grad_norm) == (1, 1.5, 0.25, 0.5)
    assert report.votes.save_due == 1 and report.votes.stopping == report.votes.failed == 0
    rank.missing = {ONLY: ["A"]}
    assert train_step.run(STEP).only.number == train_step.finished[ONLY] == 2
    assert rank.calls[len(ALL) :] == ["passes", "sums", "norms", "gradients of 2, one misses", "step", "copies of 2"]


def test_a_wish_to_stop_comes_with_a_step_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(wish=15)
    report = made(rank, monkeypatch, finished={ONLY: 6}, long_seconds=math.inf).run(STEP)
    assert report.only.number == 7 and "step" in rank.calls
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
    assert refusal(train_step.run, STEP, failure=UserError("the disk is full")) == "the disk is full"
    assert rank.calls == ["passes", "sums"] and train_step.finished[ONLY] == 0


@pytest.mark.parametrize("capacity", [0, 100])
def test_an_adapter_fails_alone(monkeypatch: pytest.MonkeyPatch, capacity: int) -> None:
    """Its loss, its norm, its gradients or its copies: the other takes its step, and the failed one has the reason."""
    for kind, message, taken in (
        ("loss", "the loss is nan", ["step of a"]),
        ("norm", "the gradient norm is inf", ["step of a"]),
        ("gradients", "no gradient", ["step of a"]),
        ("copies", "another copy", ["step of a", "step of b"]),
    ):
        rank = Rank(names=("a", "b"))
        if kind == "loss":
            rank.losses["b"] = math.nan
        elif kind == "norm":
            rank.found_norms["b"] = math.inf
        else:
            rank.failing["b"] = kind
        step = made(rank, monkeypatch, ("a", "b"), finished={"a": 2}, capacity=capacity, long_seconds=math.inf)
        report = step.run(step_of("a", "b"))
        a, b = report.adapters["a"], report.adapters["b"]
        assert (a.number, a.loss, a.grad_norm, a.failure) == (3, 1.5, 0.5, None), kind
        assert b.number == 1 and str(b.failure).startswith(message), kind
        assert [call for call in rank.calls if call.startswith("step")] == taken, kind
        assert step.finished == {"a": 3, "b": 0} and (kind != "loss" or "gradients of a3" in rank.calls), kind
        step.run(step_of("a"))  # an adapter that has failed is left out by the caller
        assert step.finished == {"a": 4, "b": 0}, kind


# What is said of gradients --------------------------------------------------------------------------------------------


def checks(largest: list[float], *, of_values: float) -> StepChecks:
    """Checks that have seen step 1, whose gradients by tensor were `largest`, before step 2 with none but zeros."""
    own: Any = object.__new__(StepChecks)
    guard = SimpleNamespace(
        missing=list,
        sizes=lambda: (0.0, of_values),
        largest=lambda: dict(zip(("A", "B", "v of layer 1"), largest, strict=True)),
        remove=lambda: None,
    )
    own._adapter = SimpleNamespace(part=SimpleNamespace(layers=(1,)))
    own._check_steps, own._steps, own._guard = 0, 1, guard
    return own


@pytest.mark.parametrize(
    ("largest", "of_values", "said"),
    [
        ([0.0, 0.0, 2.0], 100.0, "every gradient is exactly zero, because adapter values have grown to 100; this"),
        ([0.0, 0.0, 2.0], 0.0, "every gradient is exactly zero, because adapter values have grown; this step"),
        ([0.0, 0.0, 0.0], 100.0, "the gradient of A, B, v of layer 1 has been exactly zero since the run's start"),
    ],
)
def test_what_is_said_of_zeros(largest: list[float], of_values: float, said: str) -> None:
    both = {"a": (checks([1.0, 1.0, 1.0], of_values=1.0), 7), "b": (checks(largest, of_values=of_values), 2)}
    failed = before_steps(both, missing={}, ranks_missing={"a": 0.0, "b": 0.0})
    assert failed.keys() == {"b"} and str(failed["b"]).startswith(f"step 2: {said}")
    assert all(own._guard is None and own._steps == 2 for own, _ in both.values())


def test_a_missing_gradient_is_said_of_its_adapter_alone() -> None:
    """Even after the guarded steps, as the sums over ranks find it too."""
    both = {"a": (checks([1.0, 1.0, 1.0], of_values=1.0), 7), "b": (checks([1.0, 1.0, 1.0], of_values=1.0), 2)}
    for own, _ in both.values():
        own._guard = None
    failed = before_steps(both, missing={"b": ["v", "B"]}, ranks_missing={"a": 0.0, "b": 1.0})
    text = "step 2: no gradient reaches v, B from the stage with adapted layers 1; this step changed no weights."
    text += " Please report this error"
    assert {name: str(failure) for name, failure in failed.items()} == {"b": text}


# Schedules and the optimizer ------------------------------------------------------------------------------------------


def rates_of_transformers(schedule: str, warmup: int, total: int) -> list[float]:
    """Its factors of the steps after warm-up."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    factor = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total).lr_lambdas[0]
    return [factor(step) for step in range(warmup, total + 3)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(50, 2000), (0, 7), (3, 3)])
def test_after_warm_up_the_rates_are_those_of_transformers(schedule: str, warmup: int, total: int) -> None:
    settings = make_settings({"warmup_steps": warmup, "max_steps": total, "schedule": schedule})
    ours = [learning_rate_factor(settings, step) for step in range(warmup, total)]
    theirs = rates_of_transformers(schedule, warmup, total)[: len(ours)]
    assert ours == pytest.approx(theirs, abs=1e-15)


def test_cosine_has_the_bits_that_runs_have_used() -> None:
    settings = make_settings({"warmup_steps": 50, "max_steps": 2000})
    for step in range(2010):
        expected = (step + 1) / 50 if step < 50 else 0.5 * (1.0 + math.cos(math.pi * min(step - 50, 1950) / 1950))
        assert learning_rate_factor(settings, step) == expected


def test_ends() -> None:
    def factor(step: int, schedule: Schedule) -> float:
        return learning_rate_factor(make_settings({"warmup_steps": 4, "max_steps": 10, "schedule": schedule}), step)

    for schedule in SCHEDULES:
        assert [factor(step, schedule) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(7, "linear") == 0.5
    assert [factor(step, "linear") for step in (10, 30)] == [0.0, 0.0]
    assert [factor(step, "cosine") for step in (10, 30)] == [0.0, 0.0]
    assert factor(10**6, "constant") == 1.0


def test_scheduler_resumes_at_any_step() -> None:
    """Also where factors have their own rates, and whether or not a tensor has the run's."""
    config = make_adapter_config("vera", rank=2, layers=(1,), targets=(Target("qkv", 4, (4, 4, 4), "column"),), seed=0)
    adapter = TiedAdapter(AdapterShard.whole(config))
    own = {"learning_rate": 0.5, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "rate_factors": "u=4,v=0.5,B=2"}
    settings = make_settings({**own, "warmup_steps": 2, "max_steps": 10, "schedule": "linear"})
    for extra in ([], [torch.nn.Parameter(torch.zeros(2))]):
        optimizer, scheduler = make_training(settings, [*extra, adapter.u, adapter.v], adapter)
        assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["weight_decay"] == 0.1
        resume_scheduler(scheduler, 6)
        groups = [(group["params"], group["lr"]) for group in optimizer.param_groups]
        assert groups == [*([(extra, 0.25)] if extra else []), ([adapter.u], 1.0), ([adapter.v], 0.125)]
        own = Optimizers(
            AdapterGroup({}), ParallelGroups(), {"": OwnOptimizer(optimizer, scheduler, 0.0)}, torch.device("cpu")
        )
        assert own.learning_rate("") == 0.25
