"""Plans a benchmark as a training run, and measures its steps with the model and the engine of training.

`compare` uses the same plan, model and samples without an engine. All ranks start the run together. Its steps are the
training steps of `training/step.py`. The first steps check gradients and are not timed. After the timed steps, one step
counts messages, one step counts saved bytes, and on a GPU one step runs under torch's profiler.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base import presets
from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.fields import marked, validate_settings
from megatron_tiedlora.config.settings import DEFAULT_TASK, make_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.data.encode import encode_dataset
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.data.tokenizer import load_tokenizer, padding_id
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.model import families, hf_config, weights
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel import agreement, frozen_weight, groups
from megatron_tiedlora.planning import machines, planned, step_time
from megatron_tiedlora.planning.layout import MicroBatchShape
from megatron_tiedlora.planning.passes import engine_traffic, saved_bytes, step_flops
from megatron_tiedlora.planning.planned import Planned
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.runtime import process_group, stopping
from megatron_tiedlora.selfcheck import timing
from megatron_tiedlora.training.build import build_model, build_random_model
from megatron_tiedlora.training.step import GUARDED_STEPS, AdapterStep, TrainStep
from megatron_tiedlora.training.throughput import choose_kernels, find_peak, matmul_rate, timed

LEARNING_RATE = 1e-4
# So many steps that the learning rate stays near its peak, and that --compile auto assumes a long run.
MAX_STEPS = 1_000_000
LEAST_LENGTH = 8  # the least that the settings of a run accept


def plan_benchmark(
    settings: BenchSettings, *, rank: int = 0, world_size: int = 1, source: ModelSource | None = None, **changes: Any
) -> RunPlan:
    """Return the plan of a training run whose steps match the benchmark settings.

    Args:
        source: a model with random weights to use instead of --model.
        changes: values of training settings that a benchmark does not have.

    Raises:
        UserError: a setting is not valid. The message names the first such setting.
    """
    grid = groups.Grid(rank, world_size, tp_size=settings.tensor_parallel, pp_size=settings.pipeline_parallel)
    unit = settings.rows * grid.dp_size
    if settings.task is not None and settings.samples % unit:
        raise UserError(
            f"--samples {settings.samples} is not a multiple of --rows {settings.rows} x {grid.dp_size} data-parallel"
            f" ranks; give a multiple of {unit}"
        )
    if source is None:
        config = random_config(settings)
        shape = None if config is None else families.shape_from_hf(config, source=settings.model)
        source = find_model(settings.model) if shape is None else ModelSource(settings.model, None, shape)
    source.check_length("--length", settings.length)
    if settings.length < LEAST_LENGTH and settings.measured_on(world_size) == "layout":
        raise UserError(f"--length {settings.length}: rows need at least {LEAST_LENGTH} tokens; give a larger value")
    made_up = unit * settings.step_micro_batches * (settings.documents or 1)
    values = {
        **{name: getattr(settings, name) for name in marked(BenchSettings, shared=True)},
        "packing": settings.packs,
        "task": settings.task or DEFAULT_TASK,  # random tokens have no task; the default one needs no file
        "max_length": max(settings.length, LEAST_LENGTH),
        "micro_batch_size": settings.rows,
        "global_batch_size": made_up if settings.task is None else settings.samples,
        "learning_rate": LEARNING_RATE,
        "max_steps": MAX_STEPS,
        "warmup_steps": 0,
        "replica_check_steps": 0,
        "seed": 0,
    }
    train = make_settings({**values, **changes})
    return plan_run(train, rank=rank, world_size=world_size, weights=False, source=source)


def random_config(settings: BenchSettings) -> dict[str, Any] | None:
    """Return the config.json of a model with random weights, or None if the weights are read from a folder.

    Raises:
        UserError: --num_layers is given without random weights, or --task is given with random weights.
    """
    if presets.is_preset(settings.model):
        values = dict(presets.PRESETS[settings.model])
    elif settings.random_weights:
        folder = find_model(settings.model, weights=False).folder
        assert folder is not None, "no preset"
        values = hf_config.read_hf_config(folder)
    elif settings.num_layers is None:
        return None
    else:
        raise UserError(
            f"--num_layers {settings.num_layers} needs random weights; add --random_weights, or give a preset"
            f" as --model: {', '.join(presets.PRESETS)}"
        )
    if settings.task is not None:
        raise UserError(f"--task {settings.task}: --model {settings.model} has random weights; remove --task")
    return values if settings.num_layers is None else {**values, "num_hidden_layers": settings.num_layers}


def read_samples(plan: RunPlan, settings: BenchSettings) -> tuple[TokenDataset, int]:
    """Return the samples of a step on all ranks, and the padding token id. Without a task, samples are random.

    Raises:
        UserError: the data cannot be read, or has too few samples.
    """
    if settings.task is None:
        lengths = np.full(plan.batches.global_batch_size, settings.length // (settings.documents or 1))
        return made_up(plan.source.shape.vocab_size, lengths, num_labels=settings.labels), 0
    tokenizer = load_tokenizer(plan.source.weights_folder())
    files = {"train": settings.train_file}
    examples = load_split(settings.task, "train", files=files, seed=0, tokenizer=tokenizer, limit=settings.samples)
    if len(examples) < settings.samples:
        raise UserError(f"--samples {settings.samples}: the training data has {len(examples)} rows; give fewer samples")
    return encode_dataset(examples, tokenizer, max_length=settings.length), padding_id(tokenizer)


def made_up(vocab_size: int, lengths: NDArray[np.int64], *, num_labels: int | None = None) -> TokenDataset:
    """Return samples of random tokens. In each, the last `num_labels` tokens (None: all but the first) have labels."""
    labels = lengths - 1 if num_labels is None else num_labels
    return TokenDataset.after_prompts(
        tokens=np.random.default_rng(0).integers(3, vocab_size, int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        prompt_lengths=(lengths - labels).astype(np.int32),
    )


def planned_saved_bytes(plan: RunPlan, batches: Sequence[MicroBatch]) -> float:
    """Return the planned bytes that a rank saves for the backward pass of all its micro-batches."""
    parts = plan.layout.sequence_parts
    sizes = ((batch.labels.numel(), len(batch.supervised(parts).rows)) for batch in batches)
    return sum(saved_bytes(plan.stage, MicroBatchShape((0,), (tokens,), (after,), after)) for tokens, after in sizes)


def base_matmul_rate(plan: RunPlan, stage: Stage, batches: Sequence[MicroBatch], device: torch.device) -> float:
    """Return the best FLOP/s of a plain matmul of a micro-batch's tokens with the largest base matrix of this rank.

    The matrix has its tensor-parallel shape, before ZeRO-3 partitions it over data-parallel ranks.
    """
    held = frozen_weight.frozen_weights(stage)
    rules = weights.stage_weight_rules(plan.source.shape, has_embedding=stage.embedding is not None)
    shapes = [rule.spec.local_shape(rule.shape, plan.grid.tp_size) for rule in rules if rule.name in held]
    columns, inner = max((shape for shape in shapes if len(shape) == 2), key=lambda shape: shape[0] * shape[1])
    rows = max(1024, sum(batch.tokens.numel() for batch in batches) // len(batches))
    return matmul_rate(rows, inner, columns, dtype=plan.dtype, device=device, repeats=10)


# The run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """A training run that is ready on one rank. The caller decides which steps it runs.

    Attributes:
        dataset: the samples from which `loader` makes the steps.
        kernels: a short description of the kernels.
    """

    plan: RunPlan
    dataset: TokenDataset
    runner: Runner
    train_step: TrainStep
    loader: Iterator[TrainingStep]
    kernels: str

    def take(self, step: TrainingStep) -> AdapterStep:
        """Run a training step, and return its result. All ranks call this together. Raises RunFailed on failure."""
        return self.train_step.run({ONLY: step}).only

    def seconds_of(self, step: TrainingStep) -> float:
        """Run a step that all ranks start together, and return the seconds of the slowest rank."""
        self.train_step.stop.agree(True)
        (longest,) = agreement.max_over_ranks([timed(lambda: self.take(step), self.runner.device)])
        return longest

    def planned(self, step: TrainingStep, machine: machines.Machine) -> Planned:
        """Return the plan of `step` for `machine`, with the hosts of this run. All ranks call this together."""
        batch = self.plan.global_batch(self.dataset, consumed_samples=step.consumed_samples)
        plan = planned.StepPlan({ONLY: self.plan}, samples={ONLY: (self.dataset, batch)})
        here = next(ranks for ranks in process_group.ranks_by_host() if self.plan.grid.rank in ranks)
        return Planned(step=plan, layout=plan.layout, machine=machine, per_node=len(here))


def measure_layout(
    settings: BenchSettings, *, rank: int = 0, world_size: int = 1, **changes: Any
) -> tuple[dict[str, Any] | None, Planned]:
    """Return the measured report on rank 0 (else None), and the plan of the step. All ranks call this together.

    `changes` is passed to `plan_benchmark`.

    Raises:
        UserError: a setting is not valid. Every rank raises this error before anything starts.
        RunStopped: the launcher process has ended.
    """
    plan = plan_benchmark(settings, rank=rank, world_size=world_size, **changes)
    machine, run = machine_of(plan, settings), start(plan, settings)
    device = run.runner.device
    steps = [next(run.loader) for _ in range(GUARDED_STEPS + settings.repeats)]
    given = iter(steps)
    held = timing.restart_peak(device)
    timers = {"step": lambda: run.seconds_of(next(given))}
    seconds = timing.take_turns(timers, repeats=settings.repeats, uncounted=GUARDED_STEPS, shows=rank == 0)["step"]
    peak = None if held is None else timing.peak_bytes(device)
    planned = run.planned(steps[-1], machine)
    mine = {"held": held, "peak": peak, **_rank_figures(run, steps[-1], planned), "planned_peak": None}
    record = None
    if settings.constants is not None:
        memory = planned.memory(run.plan.grid.pp_rank)
        # On a CPU, the estimate for an idle process is added, but not the estimate for the allocator's free memory.
        mine["planned_peak"] = memory.allocated + (0.0 if run.plan.on_gpu else memory.libraries)
        record = {"machine": machine.title, "seconds": planned.seconds._asdict()}
    ranks = agreement.gather_on_rank_0(mine, kind=dict[str, Any])
    report = None if ranks is None else {**_report(run, settings, steps[-1], seconds, ranks), "planned": record}
    run.runner.engine.destroy()  # or it would keep the memory of the run
    return report, planned


def machine_of(plan: RunPlan, settings: BenchSettings) -> machines.Machine:
    """Return the machine of --constants, or else the machine of the plan with the attention kernel of these rows."""
    if settings.constants is not None:
        return machines.read_machine(user_path(settings.constants, flag="--constants"))
    return plan.machine_for(packed=plan.reads_data or (settings.documents or 1) > 1)


def start(plan: RunPlan, settings: BenchSettings) -> Started:
    """Join the process group, and build the model, engine and loader of the plan. All ranks call this together.

    Raises:
        UserError: the data cannot be read, ranks are missing, or the kernels cannot be compiled.
    """
    dataset, pad_id = read_samples(plan, settings)
    device = process_group.join_process_group(plan.settings.timeout_minutes, expected_ranks=plan.grid.world_size)
    chosen = choose_kernels(plan, device)
    build = build_random_model if plan.source.folder is None else build_model
    built = build({ONLY: plan}, device, kernels=chosen.kernels)
    train_step = TrainStep({ONLY: plan}, built.runner, stopping.StopRequests())
    loader = plan.training_loader(dataset, pad_id=pad_id)
    return Started(plan, dataset, built.runner, train_step, loader, chosen.description)


def _rank_figures(run: Started, step: TrainingStep, planned: Planned) -> dict[str, Any]:
    """Run further steps after `step`, the last timed step, and return what this rank measures.

    The messages of the next step are counted and compared with `planned`.
    """
    plan, runner, device = run.plan, run.runner, run.runner.device
    run.train_step.stop.agree(True)  # makes ranks start the matmul together, so that they compete for their processor
    rate = base_matmul_rate(plan, runner.stage, step.micro_batches, device)
    run.train_step.long_seconds = math.inf  # the prediction does not include messages that only long steps send
    with groups.TrafficCounter(groups.named_handles(runner.groups)) as counter:
        run.take(next(run.loader))
    _, data_bytes = engine_traffic(plan.stage, num_micro_batches=len(planned.step.batches)).of_group(groups.DATA)
    traffic = compare_traffic(counter.traffic, planned.traffic(plan.grid.pp_rank, of_engine=False), data_bytes)
    watched = next(run.loader)
    # Parameters must not be counted, but under ZeRO-3 they are different tensors in each pass.
    saved = None if plan.engine.zero_stage == 3 else _saved_bytes(run, watched)
    planned_saved = planned_saved_bytes(plan, watched.micro_batches)
    on_gpu = device.type == "cuda"
    return {
        "number": plan.grid.rank,
        "stage": plan.grid.pp_rank,
        "tensor_rank": plan.grid.tp_rank,
        "data_rank": plan.grid.dp_rank,
        "matmul_flops_per_second": rate,
        "saved": saved,
        "saved_formula": planned_saved,
        "saved_ratio": None if saved is None else saved / planned_saved,
        "traffic": traffic,
        "as_predicted": all(found["as_predicted"] for found in traffic.values()),
        "peak_flops_per_second": find_peak(device, plan.dtype).flops_per_second if on_gpu else None,
        "kernel_seconds": timing.kernel_seconds(lambda: run.take(next(run.loader))) if on_gpu else None,
    }


def compare_traffic(counted: groups.Traffic, predicted: groups.Traffic, data_bytes: int) -> dict[str, dict[str, Any]]:
    """Return the counted and predicted messages of each process group that has messages, and whether they agree.

    They agree only if the numbers of messages and bytes of every kind are equal.

    Args:
        counted, predicted: the messages of one rank in one step.
        data_bytes: the most bytes that DeepSpeed may send in the data-parallel group, in any number of messages; 0 if
            it sends nothing.
    """
    compared = {}
    for group in groups.GROUPS:
        (messages, size), (expected, expected_size) = counted.of_group(group), predicted.of_group(group)
        if not messages and not expected:
            continue
        kinds = {key for part in (counted, predicted) for key in part.messages if key[0] == group}
        equal = all(
            counted.messages[key] == predicted.messages[key] and counted.bytes[key] == predicted.bytes[key]
            for key in kinds
        )
        difference = f"{messages - expected:+,} messages, {size - expected_size:+,} B"
        by_engine = group == groups.DATA and data_bytes > 0
        if by_engine:
            expected_size, equal, difference = data_bytes, size <= data_bytes, f"{size - data_bytes:+,} B"
        compared[group] = {
            "messages": messages,
            "bytes": size,
            "predicted_messages": None if by_engine else expected,
            "predicted_bytes": expected_size,
            "as_predicted": equal,
            "verdict": "as predicted" if equal else f"differs: {difference}",
        }
    return compared


def _saved_bytes(run: Started, step: TrainingStep) -> int:
    """Run one more step, and return the total bytes that autograd saves for this rank's micro-batches."""
    total = 0

    @contextmanager
    def watched() -> Iterator[None]:
        nonlocal total
        with timing.saved_by_autograd(run.runner.stage) as saved:
            yield
        total += timing.storage_bytes(saved)

    run.runner.each_forward = watched
    run.take(step)
    run.runner.each_forward = nullcontext
    return total


def _report(
    run: Started, bench: BenchSettings, step: TrainingStep, seconds: Sequence[float], ranks: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the report of a layout: its parallel sizes, and the measurements of the step on all ranks."""
    plan, settings, grid, device = run.plan, run.plan.settings, run.plan.grid, run.runner.device
    flops = step_flops(plan.source.shape, plan.adapter, step.lengths, step.num_supervised).total()
    middle = median(seconds)
    matmul, on_gpu = sum(member["matmul_flops_per_second"] for member in ranks), device.type == "cuda"
    return {
        "model": settings.model,
        "weights": "random" if plan.source.folder is None else "read",
        **timing.about(bench, settings.base, device, "method", "targets", "rank"),
        "layout": {
            "ranks": grid.world_size,
            "tensor_parallel": grid.tp_size,
            "pipeline_parallel": grid.pp_size,
            "data_parallel": grid.dp_size,
            "sequence_parallel": plan.layout.sequence_parallel,
            "overlap": settings.overlap,
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
        "kernel_seconds": {kind: sum(member["kernel_seconds"][kind] for member in ranks) for kind in timing.CLASSES}
        if on_gpu
        else None,
        "as_predicted": all(member["as_predicted"] for member in ranks),
        "ranks": ranks,
    }


@dataclass(frozen=True)
class MeasuredStep:
    """The measured seconds of a step, and the seconds that the plan predicts from the known machine constants."""

    seconds: float
    planned: step_time.Seconds

    @property
    def left(self) -> float:
        """The measured seconds minus the planned seconds, but at least 0."""
        return max(0.0, self.seconds - self.planned.total)


def measured_step(
    machine: machines.Machine, values: dict[str, Any], *, repeats: int, source: ModelSource | None = None
) -> MeasuredStep:
    """Measure and plan a step with one row per micro-batch and without ZeRO. All ranks call this together.

    Args:
        values: further settings of the benchmark.
        repeats: number of timed steps; the median is used.
        source: a model with random weights to use instead of --model.
    """
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    settings = validate_settings({"what": "layout", "rows": 1, "ds_config": "zero0.json", **values}, BenchSettings)
    plan = plan_benchmark(settings, rank=rank, world_size=world_size, source=source)
    run = start(plan, settings)
    steps = [next(run.loader) for _ in range(GUARDED_STEPS + repeats)]
    seconds = [run.seconds_of(step) for step in steps][GUARDED_STEPS:]
    return MeasuredStep(median(seconds), run.planned(steps[-1], machine).seconds)
