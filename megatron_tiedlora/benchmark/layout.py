"""Measures a step at a layout, with the plan, build, engine and steps of a training run on every rank.

The steps are those of `training/step.py`, on samples that are handed in. The first ones check gradients and are not
counted. Timed steps follow, then a step that counts messages, one that counts saved bytes, and on a GPU one under
torch's profiler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.benchmark.plan import base_matmul_rate, plan_benchmark, read_samples, saved_formula
from megatron_tiedlora.benchmark.report import compare_traffic
from megatron_tiedlora.benchmark.timing import (
    CLASSES,
    about,
    kernel_seconds,
    peak_bytes,
    restart_peak,
    saved_by_autograd,
    storage_bytes,
    take_turns,
)
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import gather_on_rank_0, max_over_ranks
from megatron_tiedlora.parallel.traffic import TrafficCounter, named_handles
from megatron_tiedlora.planning.machines import Machine, read_machine
from megatron_tiedlora.planning.passes import engine_bytes, step_traffic, training_flops
from megatron_tiedlora.planning.planned import Planned
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.planning.step_plan import StepPlan
from megatron_tiedlora.planning.step_time import Seconds
from megatron_tiedlora.runtime.process_group import join_process_group, ranks_here
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.build import build_model, build_random_model
from megatron_tiedlora.training.compiling import choose_kernels
from megatron_tiedlora.training.step import GUARDED_STEPS, AdapterStep, TrainStep
from megatron_tiedlora.training.throughput import find_peak, timed


@dataclass(frozen=True)
class Started:
    """One rank of a run, whose caller chooses the steps.

    Attributes:
        dataset: the samples of `loader`.
        kernels: how they were made, in a few words.
    """

    plan: RunPlan
    dataset: TokenDataset
    runner: Runner
    train_step: TrainStep
    loader: Iterator[TrainingStep]
    kernels: str

    def take(self, step: TrainingStep) -> AdapterStep:
        """Take a step; all ranks call it together. Raises RunFailed if it cannot be taken."""
        return self.train_step.run({ONLY: step}).only

    @property
    def finished(self) -> int:
        """The number of the last step."""
        return self.train_step.finished[ONLY]

    def seconds_of(self, step: TrainingStep) -> float:
        """Take a step that all ranks start together; returns the seconds of the slowest rank."""
        self.train_step.stop.agree(True)
        (longest,) = max_over_ranks([timed(lambda: self.take(step), self.runner.device)])
        return longest

    def step_plan(self, step: TrainingStep) -> StepPlan:
        """The plan of a step, from its samples."""
        batch = self.plan.global_batch(self.dataset, consumed_samples=step.consumed_samples)
        return StepPlan({ONLY: self.plan}, samples={ONLY: (self.dataset, batch)})

    def planned(self, step: TrainingStep, machine: Machine) -> Planned:
        """What the planner says of a step on a machine of this one's hosts. All ranks call it together."""
        return Planned.alone(self.step_plan(step), machine, per_node=ranks_here())


def measure_layout(settings: BenchSettings, *, rank: int = 0, world_size: int = 1) -> dict[str, Any] | None:
    """Measure the layout on all ranks, which call this together; returns the report on rank 0.

    Raises:
        UserError: names the first thing that does not fit, before anything starts; on every rank.
        RunStopped: the launcher has died.
    """
    machine = None
    if settings.constants is not None:
        machine = read_machine(user_path(settings.constants, flag="--constants"))
    run = start(plan_benchmark(settings, rank=rank, world_size=world_size), settings)
    device = run.runner.device
    steps = [next(run.loader) for _ in range(GUARDED_STEPS + settings.repeats)]
    given = iter(steps)
    held = restart_peak(device)
    timers = {"step": lambda: run.seconds_of(next(given))}
    seconds = take_turns(timers, repeats=settings.repeats, uncounted=GUARDED_STEPS, shows=rank == 0)["step"]
    peak = None if held is None else peak_bytes(device)
    mine = {"held": held, "peak": peak, **_rank_figures(run, steps[-1])}
    planned = {} if machine is None else _planned(run, steps[-1], machine)
    mine["planned_peak"] = planned.pop("peak", None)
    ranks = gather_on_rank_0(mine, kind=dict[str, Any])
    if ranks is None:
        return None
    return {**_report(run, settings, steps[-1], seconds, ranks), "planned": planned or None}


def _planned(run: Started, step: TrainingStep, machine: Machine) -> dict[str, Any]:
    """What the planner says of the step with a machine's constants: the peak of this rank, and seconds by purpose.

    On a CPU the peak has the reserve for an idle process, but none for what an allocator keeps.
    """
    planned = run.planned(step, machine)
    memory = planned.memory(run.plan.grid.pp_rank)
    reserve = 0.0 if run.plan.on_gpu else memory.libraries
    return {"peak": memory.allocated + reserve, "machine": machine.title, "seconds": planned.seconds._asdict()}


def start(plan: RunPlan, settings: BenchSettings) -> Started:
    """Meet the other ranks and build what the plan's steps need. All ranks call it together.

    Raises:
        UserError: data or ranks are missing, or kernels cannot be compiled.
    """
    dataset, pad_id = read_samples(plan, settings)
    device = join_process_group(plan.settings.timeout_minutes, expected_ranks=plan.grid.world_size)
    chosen = choose_kernels(plan, device)
    if plan.source.folder is None:
        built = build_random_model({ONLY: plan}, device, kernels=chosen.kernels)
    else:
        built = build_model({ONLY: plan}, device, kernels=chosen.kernels)
    train_step = TrainStep({ONLY: plan}, built.runner, StopRequests())
    loader = plan.training_loader(dataset, pad_id=pad_id)
    return Started(plan, dataset, built.runner, train_step, loader, chosen.description)


def _rank_figures(run: Started, step: TrainingStep) -> dict[str, Any]:
    """The figures of this rank alone, from more steps after the timed ones. `step` is the last timed one."""
    plan, runner, device = run.plan, run.runner, run.runner.device
    run.train_step.stop.agree(True)  # start together, so that ranks that share a processor measure their share of it
    rate = base_matmul_rate(plan, runner.stage, step.micro_batches, device)
    shapes = run.step_plan(step).batches.shapes
    run.train_step.long_seconds = math.inf  # the prediction leaves out what ranks send only in long steps
    with TrafficCounter(named_handles(runner.groups)) as counter:
        run.take(next(run.loader))
    data_bytes = engine_bytes(plan.stage, num_micro_batches=len(shapes))
    traffic = compare_traffic(counter.traffic, step_traffic(plan.stage, shapes), data_bytes)
    watched = next(run.loader)
    # Parameters are left out, and under ZeRO-3 they are other tensors in each pass.
    saved = None if plan.engine.zero_stage == 3 else _saved_bytes(run, watched)
    formula = saved_formula(plan, watched.micro_batches)
    on_gpu = device.type == "cuda"
    return {
        "number": plan.grid.rank,
        "stage": plan.grid.pp_rank,
        "tensor_rank": plan.grid.tp_rank,
        "data_rank": plan.grid.dp_rank,
        "matmul_flops_per_second": rate,
        "saved": saved,
        "saved_formula": formula,
        "saved_ratio": None if saved is None else saved / formula,
        "traffic": traffic,
        "as_predicted": all(found["as_predicted"] for found in traffic.values()),
        "peak_flops_per_second": find_peak(device, plan.dtype).flops_per_second if on_gpu else None,
        "kernel_seconds": kernel_seconds(lambda: run.take(next(run.loader))) if on_gpu else None,
    }


def _saved_bytes(run: Started, step: TrainingStep) -> int:
    """The total bytes that autograd saves for this rank's micro-batches, in one more step."""
    total = 0

    @contextmanager
    def watched() -> Iterator[None]:
        nonlocal total
        with saved_by_autograd(run.runner.stage) as saved:
            yield
        total += storage_bytes(saved)

    run.runner.each_forward = watched
    run.take(step)
    run.runner.each_forward = nullcontext
    return total


def _report(
    run: Started, bench: BenchSettings, step: TrainingStep, seconds: Sequence[float], ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """The layout, and the figures of the step on all ranks together."""
    plan, settings, grid, device = run.plan, run.plan.settings, run.plan.grid, run.runner.device
    flops, middle = training_flops(plan.source.shape, plan.adapter, step), median(seconds)
    matmul, on_gpu = sum(member["matmul_flops_per_second"] for member in ranks), device.type == "cuda"
    return {
        "model": settings.model,
        "weights": "random" if plan.source.folder is None else "read",
        **about(bench, settings.base, device, "method", "targets", "rank"),
        "layout": {
            "ranks": grid.world_size,
            "tensor_parallel": grid.tp_size,
            "pipeline_parallel": grid.pp_size,
            "data_parallel": grid.dp_size,
            "sequence_parallel": plan.layout.sequence_parallel,
            "zero_stage": plan.engine.zero_stage,
            "recompute": settings.recompute,
            "packing": settings.packing,
            "rows": settings.micro_batch_size,
            "length": settings.max_length,
        },
        "kernels": run.kernels,
        "micro_batches": len(step.micro_batches),
        "seconds": list(seconds),
        "tokens": step.num_tokens,
        "supervised": step.num_supervised,
        "positions": step.num_positions,
        "model_flops": flops,
        "matmul_flops_per_second": matmul,
        "tokens_per_second": step.num_tokens / middle,
        "share_of_matmul": flops / middle / matmul,
        "mfu": flops / middle / sum(member["peak_flops_per_second"] for member in ranks) if on_gpu else None,
        "kernel_seconds": {kind: sum(member["kernel_seconds"][kind] for member in ranks) for kind in CLASSES}
        if on_gpu
        else None,
        "as_predicted": all(member["as_predicted"] for member in ranks),
        "ranks": ranks,
    }


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was measured: its seconds, and what is planned for them without what is unknown."""

    seconds: float
    planned: Seconds

    @property
    def left(self) -> float:
        """The seconds that no known constant explains."""
        return max(0.0, self.seconds - self.planned.total)


def measured_step(
    machine: Machine, values: dict[str, Any], *, repeats: int, source: ModelSource | None = None
) -> MeasuredStep:
    """Measure a step of one row a micro-batch, without ZeRO, planned for a machine. All ranks call it together.

    Args:
        values: more settings of the benchmark.
        repeats: timed steps, of which the median counts.
        source: a model with random weights in place of --model.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    settings = validate_settings({"what": "layout", "rows": 1, "ds_config": "zero0.json", **values}, BenchSettings)
    plan = plan_benchmark(settings, rank=rank, world_size=world_size, source=source)
    run = start(plan, settings)
    steps = [next(run.loader) for _ in range(GUARDED_STEPS + repeats)]
    seconds = [run.seconds_of(step) for step in steps][GUARDED_STEPS:]
    return MeasuredStep(median(seconds), run.planned(steps[-1], machine).seconds)
