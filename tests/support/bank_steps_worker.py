"""Steps of several adapters on an engine, and the same steps of each adapter in a run of its own, on some ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from forked_ranks import join_as_launched
from shared_tensors import share_tensors
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import AdapterLayout
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.adapter_plans import RunData, prepare_data, shared_plan
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.planning.step_plan import micro_batch_capacity
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.build import build_model
from megatron_tiedlora.training.compiling import compiled_kernels
from megatron_tiedlora.training.step import AdapterStep, TrainStep

Settings = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """What one adapter's steps were: losses and norms before clipping, by step, and the full tensors on rank 0.

    `gradients` are this rank's of the first step, before they are summed over ranks.
    """

    losses: list[float]
    norms: list[float]
    state: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


@dataclass(frozen=True)
class BankRun:
    """What a rank found.

    Attributes:
        alone, together: by adapter.
        failures: why adapters took no more steps together, by name.
        most: the most adapters in one of its micro-batches.
    """

    alone: dict[str, Trained]
    together: dict[str, Trained]
    failures: dict[str, str]
    most: int


def run_bank_steps(cases: list[dict[str, Any]], folder: str, way: str | None = None) -> list[BankRun]:
    """Each case on this rank, one after another; layers share the tensors of tl6 in this `way` of `shared_tensors`.

    A case: {"settings": {name: settings}, "shares": whether micro-batches are shared, "alone": whether each adapter is
    also trained in a run of its own, "compiled": whether kernels are}. A case with the settings of the one before it
    has its single runs.
    """
    device = join_as_launched(folder)
    if way is not None:
        share_tensors(way)
    found: list[BankRun] = []
    by_dtype: dict[torch.dtype, Kernels] = {}
    for before, case in zip([None, *cases], cases, strict=False):
        plans = {name: _plan(settings) for name, settings in case["settings"].items()}
        data = {name: prepare_data(plan) for name, plan in plans.items()}
        kernels, plan = EAGER, next(iter(plans.values()))
        if case.get("compiled"):
            if plan.dtype not in by_dtype:
                by_dtype[plan.dtype] = compiled_kernels(plan.source.shape, dtype=plan.dtype, device=device)
            kernels = by_dtype[plan.dtype]
        if before is not None and {**before, "shares": None} == {**case, "shares": None}:
            alone = found[-1].alone
        else:
            alone = {n: _alone(plans[n], data[n], device, kernels) for n in plans} if case["alone"] else {}
        found.append(_together(plans, data, device, alone, kernels, shares=case["shares"]))
    return found


def _plan(settings: Settings) -> RunPlan:
    return plan_run(make_settings(settings), rank=distributed.get_rank(), world_size=distributed.get_world_size())


def _alone(plan: RunPlan, data: RunData, device: torch.device, kernels: Kernels) -> Trained:
    """Its steps in a run of its own."""
    found, failures, _ = _train({ONLY: plan}, {ONLY: data}, device, kernels, shares=False)
    assert not failures
    return found[ONLY]


def _gradients(adapter: TiedAdapter) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def _loader(plan: RunPlan, data: RunData) -> Any:
    return plan.training_loader(data.train, pad_id=padding_id(data.tokenizer))


def _together(
    plans: Mapping[str, RunPlan],
    data: Mapping[str, RunData],
    device: torch.device,
    alone: dict[str, Trained],
    kernels: Kernels,
    *,
    shares: bool,
) -> BankRun:
    return BankRun(alone, *_train(plans, data, device, kernels, shares=shares))


def _train(
    plans: Mapping[str, RunPlan],
    data: Mapping[str, RunData],
    device: torch.device,
    kernels: Kernels,
    *,
    shares: bool,
) -> tuple[dict[str, Trained], dict[str, str], int]:
    """The steps of all adapters in one run, the failures, and the most adapters in one micro-batch."""
    runner = build_model(plans, device, kernels=kernels).runner
    step = TrainStep(plans, runner, StopRequests(), capacity=micro_batch_capacity(plans, shares=shares))
    loaders = {name: _loader(plan, data[name]) for name, plan in plans.items()}
    reports: dict[str, list[AdapterStep]] = {name: [] for name in plans}
    failures: dict[str, str] = {}
    micro_batches: list[int] = []
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    accumulate = runner.accumulate

    def counted(batches: Sequence[MicroBatch], *arguments: Any) -> dict[str, float]:
        micro_batches.append(max(len(batch.shares) for batch in batches))
        sums = accumulate(batches, *arguments)
        gradients.update(gradients or {name: _gradients(adapter) for name, adapter in runner.adapters.items()})
        return sums

    runner.accumulate = counted  # type: ignore[method-assign]
    for number in range(1, 1 + max(plan.settings.max_steps for plan in plans.values())):
        running = [name for name, plan in plans.items() if number <= plan.settings.max_steps and name not in failures]
        found = step.run({name: next(loaders[name]) for name in running})
        for name, report in found.adapters.items():
            reports[name].append(report)
            if report.failure is not None:
                failures[name] = str(report.failure)
    shared = shared_plan(plans)
    layouts = {name: shared.layout_of(plan.adapter) for name, plan in plans.items()}
    trained = {name: _trained(runner, layouts[name], reports[name], name, gradients[name]) for name in plans}
    runner.engine.destroy()
    return trained, failures, max(micro_batches)


def _trained(
    runner: Runner,
    layout: AdapterLayout,
    reports: Sequence[AdapterStep],
    name: str,
    gradients: dict[str, torch.Tensor],
) -> Trained:
    losses, norms = [report.loss for report in reports], [report.grad_norm for report in reports]
    return Trained(losses, norms, runner.full_state(name, layout), gradients)
