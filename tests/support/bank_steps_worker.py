"""Steps of several adapters on an engine, and the same steps of each adapter in a run of its own, on some ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from forked_ranks import join_as_launched
from torch import distributed

from megatron_tiedlora.adapters.gathering import AdapterLayout, gather_state
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.shared import shared_input, shared_rounds
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.engine.bank_runner import Weight
from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.parallel.traffic import Traffic, TrafficCounter, named_handles
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training import build
from megatron_tiedlora.training.build_bank import build_bank, shared_plan
from megatron_tiedlora.training.loop import full_adapter_state
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.run_data import RunData, prepare_data
from megatron_tiedlora.training.step import TrainStep

Settings = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What one adapter's steps were: losses and norms before clipping, by step, and the full tensors on rank 0."""

    losses: list[float]
    norms: list[float]
    state: dict[str, torch.Tensor]


@dataclass(frozen=True)
class BankRun:
    """What a rank found.

    Attributes:
        alone, together: by adapter.
        traffic: of the last step of all adapters together.
        rounds: how many adapters each of its micro-batches had in the first step.
    """

    alone: dict[str, Trained]
    together: dict[str, Trained]
    traffic: Traffic
    rounds: list[int]


def run_bank_steps(cases: list[dict[str, Any]], folder: str) -> list[BankRun]:
    """Each case: {"settings": {name: settings}, "capacity": tokens, "alone": whether to run each alone as well}."""
    device = join_as_launched(folder)
    found = []
    for case in cases:
        plans = {name: _plan(settings) for name, settings in case["settings"].items()}
        data = {name: prepare_data(plan) for name, plan in plans.items()}
        alone = {name: _alone(plans[name], data[name], device) for name in plans} if case["alone"] else {}
        found.append(_together(plans, data, device, alone, capacity=case["capacity"]))
    return found


def _plan(settings: Settings) -> RunPlan:
    return plan_run(make_settings(settings), rank=distributed.get_rank(), world_size=distributed.get_world_size())


def _alone(plan: RunPlan, data: RunData, device: torch.device) -> Trained:
    built = build.build_model(plan, device, None)
    runner = build.start_engine(plan, built, device, None)
    step, loader = TrainStep(plan, runner, StopRequests()), _loader(plan, data)
    reports = [step.run(next(loader)) for _ in range(plan.settings.max_steps)]
    state = full_adapter_state(plan, runner)
    runner.engine.destroy()
    return Trained([report.loss for report in reports], [report.grad_norm for report in reports], state)


def _loader(plan: RunPlan, data: RunData) -> Any:
    return plan.training_loader(data.train, pad_id=padding_id(data.tokenizer))


def _together(
    plans: Mapping[str, RunPlan],
    data: Mapping[str, RunData],
    device: torch.device,
    alone: dict[str, Trained],
    *,
    capacity: int,
) -> BankRun:
    built = build_bank(plans, device)
    runner, bank_step = built.runner, built.step
    loaders = {name: _loader(plan, data[name]) for name, plan in plans.items()}
    losses: dict[str, list[float]] = {name: [] for name in plans}
    norms: dict[str, list[float]] = {name: [] for name in plans}
    rounds: list[int] = []
    for number in range(1, 1 + max(plan.settings.max_steps for plan in plans.values())):
        running = [name for name, plan in plans.items() if number <= plan.settings.max_steps]
        steps = {name: next(loaders[name]) for name in running}
        weights = {}
        for name, step in steps.items():
            share = plans[name].batches.accumulation_steps * plans[name].grid.dp_size
            weights[name] = Weight(step.num_supervised / share, share)
        shared = shared_rounds(steps, capacity=capacity)
        rounds = rounds or [len(parts) for parts in shared]
        counter = TrafficCounter(named_handles(runner.groups))
        with counter:
            summed = runner.accumulate_shares([shared_input(parts) for parts in shared], weights, lambda: None)
            assert not bank_step.sum_gradients(running)
            found = bank_step.norms(running)
        totals = sum_over_ranks([summed[name] for name in running])
        for name, total in zip(running, totals, strict=True):
            losses[name].append(total / steps[name].num_supervised)
            norms[name].append(found[name])
            bank_step.take(name, found[name])
        bank_step.clear()
    stages = tuple(tuple(stage.layers) for stage in shared_plan(plans).stages)
    together = {}
    for name, plan in plans.items():
        layers = tuple(tuple(layer for layer in plan.adapter.layers if layer in stage) for stage in stages)
        state = gather_state(
            dict(bank_step.bank.adapters[name].named_parameters()), AdapterLayout(plan.adapter, plan.grid, layers)
        )
        together[name] = Trained(losses[name], norms[name], state)
    runner.engine.destroy()
    return BankRun(alone, together, counter.traffic, rounds)
