"""One rank of a test of what several adapters send: real steps of all of them, and the messages of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_ranks import join_as_launched, run_on_ranks
from torch import distributed

from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.parallel.groups import DATA, Traffic, TrafficCounter, named_handles
from megatron_tiedlora.planning.adapter_plans import RunData, prepare_data
from megatron_tiedlora.planning.passes import engine_traffic, step_traffic
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.planning.step_plan import StepPlan, micro_batch_capacity
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.build import build_model
from megatron_tiedlora.training.step import StepChecks, TrainStep


@dataclass(frozen=True)
class BankCase:
    """A run of several adapters whose second step is counted.

    Attributes:
        adapters: the settings of each, by name.
        shares: whether they share micro-batches.
        ends: adapters that take only the first step.
        checked: whether the run's checks of replicas and gradients are on, in both steps.
    """

    adapters: Mapping[str, dict[str, Any]]
    shares: bool = True
    ends: tuple[str, ...] = ()
    checked: bool = False


@dataclass(frozen=True)
class BankCounted:
    """What a rank counted in the second step.

    Attributes:
        first: the messages of the first step.
        shapes: (tokens, adapters) of the step's micro-batches.
    """

    traffic: Traffic
    first: Traffic
    shapes: list[tuple[int, int]] = field(default_factory=list)


def count_bank_steps(cases: list[BankCase], folder: str) -> list[BankCounted]:
    """Every case on this rank."""
    device = join_as_launched(folder)
    return [_count(case, device) for case in cases]


def plans_of(case: BankCase, *, rank: int, ranks: int) -> dict[str, RunPlan]:
    """The plan of each adapter."""
    return {
        name: plan_run(make_settings(settings), rank=rank, world_size=ranks) for name, settings in case.adapters.items()
    }


def _count(case: BankCase, device: torch.device) -> BankCounted:
    plans = plans_of(case, rank=distributed.get_rank(), ranks=distributed.get_world_size())
    data = {name: prepare_data(plan) for name, plan in plans.items()}
    runner = build_model(plans, device).runner
    capacity = micro_batch_capacity(plans, shares=case.shares)
    step = TrainStep(plans, runner, StopRequests(), capacity=capacity, long_seconds=math.inf)
    if not case.checked:
        for name in plans:
            step.checks[name] = StepChecks(runner, name, check_steps=0, guarded_steps=0)
    loaders = {
        name: plan.training_loader(data[name].train, pad_id=padding_id(data[name].tokenizer))
        for name, plan in plans.items()
    }
    shapes = list[tuple[int, int]]()
    accumulate = runner.accumulate

    def seen(batches: Any, *arguments: Any) -> dict[str, float]:
        shapes[:] = [(batch.tokens.numel(), len(batch.shares)) for batch in batches]
        return accumulate(batches, *arguments)

    runner.accumulate = seen  # type: ignore[method-assign]
    counted = []
    for names in (list(plans), [name for name in plans if name not in case.ends]):
        steps = {name: next(loaders[name]) for name in names}
        with TrafficCounter(named_handles(runner.groups)) as counter:
            report = step.run(steps)
        assert all(own.failure is None for own in report.adapters.values()), report
        counted.append(counter.traffic)
    runner.engine.destroy()
    return BankCounted(counted[1], counted[0], shapes)


@dataclass(frozen=True)
class BankRan:
    """A case and what its ranks counted."""

    case: BankCase
    counted: list[BankCounted]

    def plan(self, rank: int) -> StepPlan:
        """The plan of the second step on a rank, from settings and data alone."""
        plans = plans_of(self.case, rank=rank, ranks=len(self.counted))
        batches = {}
        for name, plan in plans.items():
            if name not in self.case.ends:
                data: RunData = prepare_data(plan)
                first = plan.batches.global_batch_size
                batches[name] = data.train, plan.global_batch(data.train, consumed_samples=first)
        return StepPlan(plans, self.case.shares, batches)

    def predicted(self, rank: int) -> tuple[Traffic, int]:
        """What the second step sends, and the most bytes that DeepSpeed sends beside it."""
        plan = self.plan(rank)
        stage = plan.stages[plan.shared.grid.pp_rank]
        _, most = engine_traffic(stage, num_micro_batches=len(plan.batches)).of_group(DATA)
        return step_traffic(stage, plan.batches), most


def run_bank_cases(cases: Mapping[str, BankCase], folder: Path, *, ranks: int) -> dict[str, BankRan]:
    """Every case, by name, four in one start of `ranks` ranks."""
    found: dict[str, BankRan] = {}
    names = list(cases)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_TIEDLORA_CACHE", str(folder / "cache"))
        for start in range(0, len(names), 4):
            some = names[start : start + 4]
            by_rank = run_on_ranks(
                count_bank_steps,
                [cases[name] for name in some],
                str(folder),
                ranks=ranks,
                folder=folder / f"ranks{ranks}-{start}",
            )
            by_case = zip(some, zip(*by_rank, strict=True), strict=True)
            found |= {name: BankRan(cases[name], list(counted)) for name, counted in by_case}
    return found
