"""Steps of several adapters on an engine, and the same steps of each adapter in a run of its own, on some ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from forked_ranks import join_as_launched
from shared_tensors import share_tensors
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.adapter_plans import RunData, prepare_data, shared_plan
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.planning.step_plan import micro_batch_capacity
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.build import build_model
from megatron_tiedlora.training.compiling import compiled_kernels
from megatron_tiedlora.training.step import AdapterStep, TrainStep


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
    place = {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
    for before, case in zip([None, *cases], cases, strict=False):
        plans = {name: plan_run(make_settings(settings), **place) for name, settings in case["settings"].items()}
        data = {name: prepare_data(plan) for name, plan in plans.items()}
        kernels, plan = EAGER, next(iter(plans.values()))
        if case.get("compiled"):
            if plan.dtype not in by_dtype:
                by_dtype[plan.dtype] = compiled_kernels(plan.source.shape, dtype=plan.dtype, device=device)
            kernels = by_dtype[plan.dtype]
        alone: dict[str, Trained] = {}
        if before is not None and {**before, "shares": None} == {**case, "shares": None}:
            alone = found[-1].alone
        elif case["alone"]:
            for name, plan in plans.items():
                run = _train({ONLY: plan}, {ONLY: data[name]}, device, kernels, shares=False)
                assert not run.failures
                alone[name] = run.together[ONLY]
        found.append(replace(_train(plans, data, device, kernels, shares=case["shares"]), alone=alone))
    return found


def _train(
    plans: Mapping[str, RunPlan],
    data: Mapping[str, RunData],
    device: torch.device,
    kernels: Kernels,
    *,
    shares: bool,
) -> BankRun:
    """The steps of all adapters in one run."""
    runner = build_model(plans, device, kernels=kernels).runner
    step = TrainStep(plans, runner, StopRequests(), capacity=micro_batch_capacity(plans, shares=shares))
    loaders = {
        name: plan.training_loader(data[name].train, pad_id=padding_id(data[name].tokenizer))
        for name, plan in plans.items()
    }
    reports: dict[str, list[AdapterStep]] = {name: [] for name in plans}
    failures: dict[str, str] = {}
    micro_batches: list[int] = []
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    accumulate = runner.accumulate

    def counted(batches: Sequence[MicroBatch], *arguments: Any) -> dict[str, float]:
        micro_batches.append(max(len(batch.shares) for batch in batches))
        sums = accumulate(batches, *arguments)
        for name, adapter in runner.adapters.items() if not gradients else ():
            gradients[name] = {tensor: p.grad.clone() for tensor, p in adapter.named_parameters() if p.grad is not None}
        return sums

    runner.accumulate = counted  # type: ignore[method-assign]
    for number in range(1, 1 + max(plan.settings.max_steps for plan in plans.values())):
        running = [name for name, plan in plans.items() if number <= plan.settings.max_steps and name not in failures]
        found = step.run({name: next(loaders[name]) for name in running})
        for name, report in found.adapters.items():
            reports[name].append(report)
            if report.failure is not None:
                failures[name] = str(report.failure)
    shared, trained = shared_plan(plans), {}
    for name, plan in plans.items():
        losses, norms = ([getattr(report, of) for report in reports[name]] for of in ("loss", "grad_norm"))
        state = runner.full_state(name, shared.layout_of(plan.adapter))
        trained[name] = Trained(losses, norms, state, gradients[name])
    runner.engine.destroy()
    return BankRun({}, trained, failures, max(micro_batches))
