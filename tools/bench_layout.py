"""A layout for tools/bench_step.py: plan, build, engine and steps of a training run on every rank, and their figures.

Steps are those of `training/step.py`, on samples that are handed in. The first ones, in which gradients are checked,
are not counted. Then come the timed ones, one in which messages are counted, one in which saved bytes are, and on a GPU
one under torch's profiler.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from bench_contestants import (
    LEARNING_RATE,
    check_positions,
    find_source,
    matmul_peak,
    read_samples,
    restart_peak,
    saved_by_autograd,
    storage_bytes,
)
from bench_kernels import CLASSES, kernel_seconds
from bench_report import compare_traffic, describe_setup
from tqdm import tqdm

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.loader import MicroBatch, TrainingLoader, TrainingStep
from megatron_tiedlora.engine.runner import PipelineRunner, PlainRunner, Runner
from megatron_tiedlora.model.supervised import find_supervised
from megatron_tiedlora.model.weights import stage_weight_rules
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, gather_on_rank_0, max_over_ranks
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.parallel.traffic import TrafficCounter, named_handles
from megatron_tiedlora.planning.flops import sample_flops
from megatron_tiedlora.planning.memory import saved_bytes
from megatron_tiedlora.planning.traffic import engine_bytes, step_traffic
from megatron_tiedlora.runtime.process_group import join_process_group
from megatron_tiedlora.runtime.stopping import StopWatch
from megatron_tiedlora.training.build import build_model, build_random_model, start_engine
from megatron_tiedlora.training.checks import GUARDED_STEPS
from megatron_tiedlora.training.compiling import choose_kernels
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.step import TrainStep
from megatron_tiedlora.training.throughput import find_peak, peak_memory_bytes, timed

# So many that the schedule stays near its peak, and that --compile auto takes the run for a long one.
MAX_STEPS = 1_000_000
LEAST_LENGTH = 8  # that settings take


@dataclass(frozen=True)
class Started:
    """One rank of a run whose steps are handed in.

    Attributes:
        dataset: what `loader` takes its samples from.
        kernels: how they came to be, in a few words.
    """

    plan: RunPlan
    dataset: TokenDataset
    runner: Runner
    train_step: TrainStep
    loader: TrainingLoader
    kernels: str


def make_plan(options: Namespace, *, rank: int, world_size: int, **changes: Any) -> RunPlan:
    """The plan of a training run that would take the step which the options describe.

    Args:
        changes: of settings that the options do not have.

    Raises:
        UserError: the first thing that does not fit.
    """
    grid = Grid(rank, world_size, tp_size=options.tensor_parallel, pp_size=options.pipeline_parallel)
    unit = options.rows * grid.dp_size
    if options.task is not None and options.samples % unit:
        raise UserError(
            f"--samples {options.samples} does not divide by --rows {options.rows} x {grid.dp_size} data-parallel ranks"
        )
    source = find_source(options)
    check_positions(options.length, source.shape.max_positions, model=options.model)
    if options.layout and options.length < LEAST_LENGTH:
        raise UserError(f"--length {options.length}: a training run's rows have at least {LEAST_LENGTH} tokens")
    same = ("model", "method", "rank", "dtype", "compile", "tensor_parallel", "pipeline_parallel", "sequence_parallel")
    settings = make_settings(
        {
            **{name: getattr(options, name) for name in (*same, "ds_config", "recompute", "packing", "train_file")},
            "task": options.task or "demo",  # a made-up step has none; the demo asks for no file
            # Of one process without an engine only the kept bytes are asked for, which no limit to a run concerns.
            "max_length": max(options.length, LEAST_LENGTH),
            "micro_batch_size": options.rows,
            "global_batch_size": made_up_samples(options, grid) if options.task is None else options.samples,
            "learning_rate": LEARNING_RATE,
            "max_steps": MAX_STEPS,
            "warmup_steps": 0,
            "replica_check_steps": 0,
            "seed": 0,
            **changes,
        }
    )
    return plan_run(settings, rank=rank, world_size=world_size, source=source)


def saved_formula(plan: RunPlan, batches: Sequence[MicroBatch]) -> float:
    """Bytes that a rank's micro-batches keep for the backward pass together, from shapes alone."""
    parts = plan.layout.sequence_parts
    return sum(
        saved_bytes(plan.stage, tokens=batch.labels.numel(), after=len(find_supervised(batch.labels, parts).rows))
        for batch in batches
    )


def gpu_figures(step: Callable[[], object], *, flops: int | None, seconds: float, peak: float) -> dict[str, Any]:
    """MFU of a step that takes `flops` operations in `seconds`, and time by class of kernels in one more.

    Args:
        peak: FLOP/s of the devices together, by their data sheets where those are known.
    """
    mfu = None if flops is None else flops / seconds / peak
    return {"mfu": mfu, "kernel_seconds": kernel_seconds(step)}


def measure(options: Namespace, *, rank: int, world_size: int, publish: Callable[[dict[str, Any]], None]) -> None:
    """Measure the layout on all ranks, which call this together, and `publish` the report on rank 0.

    Raises:
        UserError: the first thing that does not fit, before anything starts; or `publish`'s. On every rank.
        RunStopped: the launcher has died.
    """
    started = start(make_plan(options, rank=rank, world_size=world_size), options)
    plan, device = started.plan, started.runner.device
    held = restart_peak(device)
    seconds, step = _time_steps(started, options.repeats)
    peak = None if held is None else peak_memory_bytes(device)
    mine = {"held": held, "peak": peak, **_rank_figures(started, step)}
    ranks = gather_on_rank_0(mine, kind=dict[str, Any]) or []  # on rank 0, which alone makes a report of them
    described = {**_describe(plan, device), "kernels": started.kernels}
    decided_by_rank_0(lambda: publish({**described, **_step_figures(plan, step, seconds, ranks)}))


def made_up_samples(options: Namespace, grid: Grid) -> int:
    """Of a step, on all ranks together."""
    rows: int = options.rows * options.micro_batches * grid.dp_size
    return rows * int(options.documents)


def start(plan: RunPlan, options: Namespace) -> Started:
    """Meet the other ranks and build what takes the plan's steps; all ranks call it together.

    Raises:
        UserError: data or ranks that are not there, or kernels that cannot be compiled.
    """
    dataset, pad_id = read_samples(
        options, plan.source.shape.vocab_size, num_rows=plan.batches.global_batch_size // options.documents
    )
    device = join_process_group(plan.settings.timeout_minutes, expected_ranks=plan.grid.world_size)
    chosen = choose_kernels(plan, device)
    if plan.source.folder is None:
        built = build_random_model(plan, device, kernels=chosen.kernels)
    else:
        built = build_model(plan, device, None, kernels=chosen.kernels)
    runner = start_engine(plan, built, device, None)
    loader = plan.training_loader(dataset, pad_id=pad_id)
    return Started(plan, dataset, runner, TrainStep(plan, runner, StopWatch()), loader, chosen.description)


def _rank_figures(run: Started, timed_step: TrainingStep) -> dict[str, Any]:
    """Of this rank alone, after the timed steps; takes more of them."""
    plan, runner, device = run.plan, run.runner, run.runner.device
    run.train_step.stop.agree(True)  # start together: ranks that share a processor find their share of it
    rate = matmul_peak(_largest_frozen(plan, runner), timed_step.micro_batches, plan.dtype, device)
    batch = plan.global_batch(run.dataset, consumed_samples=run.loader.consumed_samples)
    shapes = plan.micro_batches(run.dataset, batch)
    run.train_step.long_seconds = math.inf  # what ranks send in long steps alone is not in the prediction
    with TrafficCounter(named_handles(runner.groups)) as counter:
        run.train_step.run(next(run.loader))
    most = engine_bytes(plan.stage, num_micro_batches=len(shapes))
    traffic = compare_traffic(counter.traffic, step_traffic(plan.stage, shapes), most)
    watched = next(run.loader)
    # Under ZeRO-3 parameters, which are left out, are other tensors in each pass.
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
        "kernel_seconds": kernel_seconds(lambda: run.train_step.run(next(run.loader))) if on_gpu else None,
    }


def _time_steps(run: Started, repeats: int) -> tuple[list[float], TrainingStep]:
    """Seconds of each step that counts, of the rank that takes longest, and the last of these steps."""
    seconds = []
    for turn in tqdm(range(GUARDED_STEPS + repeats), desc="steps", leave=False, disable=run.plan.grid.rank > 0):
        step = next(run.loader)
        run.train_step.stop.agree(True)  # start together
        taken = timed(lambda step=step: run.train_step.run(step), run.runner.device)  # type: ignore[misc]
        (longest,) = max_over_ranks([taken])
        if turn >= GUARDED_STEPS:
            seconds.append(longest)
    return seconds, step


def _largest_frozen(plan: RunPlan, runner: Runner) -> tuple[int, int]:
    """The shape of the largest base matrix of this rank, before ZeRO-3 cuts it over data-parallel ranks."""
    stage = runner.stage
    held = {name for name, _ in stage.named_parameters()}
    rules = stage_weight_rules(plan.source.shape, has_embedding=stage.embedding is not None)
    shapes = [rule.spec.local_shape(rule.shape, plan.grid.tp_size) for rule in rules if rule.name in held]
    rows, columns = max((shape for shape in shapes if len(shape) == 2), key=lambda shape: shape[0] * shape[1])
    return rows, columns


def _saved_bytes(run: Started, step: TrainingStep) -> int:
    """What autograd keeps of this rank's micro-batches together, in one more step."""
    total = 0

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal total
            with saved_by_autograd(run.runner.stage) as saved:
                result = forward(*arguments, **keywords)
            total += storage_bytes(saved)
            return result

        return call

    with _forward_passes(run.runner, counted):
        run.train_step.run(step)
    return total


def _forward_passes(runner: Runner, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """Let the forward pass of each micro-batch go through `wrap(pass)` inside the block."""
    if isinstance(runner, PipelineRunner):
        from deepspeed.runtime.pipe.schedule import ForwardPass

        instructions = runner.engine._INSTRUCTION_MAP
        wrapped = {**instructions, ForwardPass: wrap(instructions[ForwardPass])}
        return patch.object(runner.engine, "_INSTRUCTION_MAP", wrapped)
    assert isinstance(runner, PlainRunner)
    return patch.object(runner, "forward", wrap(runner.forward))


def _describe(plan: RunPlan, device: torch.device) -> dict[str, Any]:
    settings, grid = plan.settings, plan.grid
    return {
        "model": settings.model,
        "weights": "random" if plan.source.folder is None else "read",
        "method": settings.method,
        "rank": settings.rank,
        "dtype": settings.dtype,
        **describe_setup(device),
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
    }


def _step_figures(
    plan: RunPlan, step: TrainingStep, seconds: Sequence[float], ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Of the step on all ranks together."""
    flops = sample_flops(
        plan.source.shape,
        plan.adapter,
        num_tokens=step.num_tokens,
        squared_lengths=step.squared_lengths,
        num_supervised=step.num_supervised,
    )
    matmul = sum(member["matmul_flops_per_second"] for member in ranks)
    figures: dict[str, Any] = {
        "micro_batches": len(step.micro_batches),
        "seconds": list(seconds),
        "tokens": step.num_tokens,
        "supervised": step.num_supervised,
        "positions": step.num_positions,
        "model_flops": flops,
        "matmul_flops_per_second": matmul,
        "tokens_per_second": step.num_tokens / median(seconds),
        "share_of_matmul": flops / median(seconds) / matmul,
        "mfu": None,
        "kernel_seconds": None,
        "as_predicted": all(member["as_predicted"] for member in ranks),
        "ranks": ranks,
    }
    if ranks[0]["kernel_seconds"] is not None:
        figures["mfu"] = flops / median(seconds) / sum(member["peak_flops_per_second"] for member in ranks)
        figures["kernel_seconds"] = {kind: sum(member["kernel_seconds"][kind] for member in ranks) for kind in CLASSES}
    return figures
