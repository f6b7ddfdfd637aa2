"""Steps of several adapters on an engine, and the same steps of each adapter in a run of its own, on some ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from forked_ranks import join_as_launched
from torch import distributed

from megatron_tiedlora.adapters.gathering import AdapterLayout, gather_state
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.engine.runner import StepInput
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training import build
from megatron_tiedlora.training.adapter_plans import shared_plan
from megatron_tiedlora.training.build_bank import build_bank
from megatron_tiedlora.training.compiling import compiled_kernels
from megatron_tiedlora.training.group_step import GroupStep, OwnReport
from megatron_tiedlora.training.loop import full_adapter_state
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.run_data import RunData, prepare_data
from megatron_tiedlora.training.step import TrainStep

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


def run_bank_steps(cases: list[dict[str, Any]], folder: str) -> list[BankRun]:
    """Each case on this rank, one after another.

    A case: {"settings": {name: settings}, "shares": whether micro-batches are shared, "alone": whether each adapter is
    also trained in a run of its own, "compiled": whether kernels are}. A case with the settings of the one before it
    has its single runs.
    """
    device = join_as_launched(folder)
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
    built = build.build_model(plan, device, None, kernels=kernels)
    runner = build.start_engine(plan, built, device, None)
    step, loader = TrainStep(plan, runner, StopRequests()), _loader(plan, data)
    accumulate, gradients = runner.accumulate, {}

    def noted(*arguments: Any) -> float:
        loss = accumulate(*arguments)
        gradients.update(gradients or _gradients(runner.adapter))
        return loss

    runner.accumulate = noted  # type: ignore[method-assign]
    reports = [step.run(next(loader)) for _ in range(plan.settings.max_steps)]
    state = full_adapter_state(plan, runner)
    runner.engine.destroy()
    return Trained([report.loss for report in reports], [report.grad_norm for report in reports], state, gradients)


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
    built = build_bank(plans, device, kernels=kernels)
    runner, bank = built.runner, built.step.bank
    group = GroupStep(plans, built, StopRequests(), shares_micro_batches=shares)
    loaders = {name: _loader(plan, data[name]) for name, plan in plans.items()}
    reports: dict[str, list[OwnReport]] = {name: [] for name in plans}
    failures: dict[str, str] = {}
    micro_batches: list[int] = []
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    accumulate = runner.accumulate_shares

    def counted(batches: Sequence[StepInput], *arguments: Any) -> dict[str, float]:
        micro_batches.append(max(len(batch.shares) for batch in batches))
        sums = accumulate(batches, *arguments)
        gradients.update(gradients or {name: _gradients(adapter) for name, adapter in bank.adapters.items()})
        return sums

    runner.accumulate_shares = counted  # type: ignore[method-assign]
    for number in range(1, 1 + max(plan.settings.max_steps for plan in plans.values())):
        running = [name for name, plan in plans.items() if number <= plan.settings.max_steps and name not in failures]
        found = group.run({name: next(loaders[name]) for name in running})
        for name, report in found.adapters.items():
            reports[name].append(report)
            if report.failure is not None:
                failures[name] = report.failure
    stages = tuple(tuple(stage.layers) for stage in shared_plan(plans).stages)
    together = {}
    for name, plan in plans.items():
        layers = tuple(tuple(layer for layer in plan.adapter.layers if layer in stage) for stage in stages)
        state = gather_state(
            dict(bank.adapters[name].named_parameters()), AdapterLayout(plan.adapter, plan.grid, layers)
        )
        losses, norms = ([getattr(report, kind) for report in reports[name]] for kind in ("loss", "grad_norm"))
        together[name] = Trained(losses, norms, state, gradients[name])
    runner.engine.destroy()
    return BankRun(alone, together, failures, max(micro_batches))
