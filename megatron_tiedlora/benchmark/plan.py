"""Plans the training run whose step is measured, with its model and the samples of the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.presets import PRESETS, is_preset
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.config.train_fields import DEFAULT_TASK
from megatron_tiedlora.data.encode import encode_dataset
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.data.tokenizer import load_tokenizer, padding_id
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import read_hf_config
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import stage_weight_rules
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.planning.layout import ShareShape
from megatron_tiedlora.planning.passes import saved_bytes
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.training.throughput import matmul_rate

LEARNING_RATE = 1e-4
# So many that the schedule stays near its peak, and that --compile auto takes the run for a long one.
MAX_STEPS = 1_000_000
LEAST_LENGTH = 8  # that the settings of a run accept


def plan_benchmark(
    settings: BenchSettings,
    *,
    rank: int = 0,
    world_size: int = 1,
    source: ModelSource | None = None,
    **changes: Any,
) -> RunPlan:
    """The plan of a training run that takes the step described by the settings.

    Args:
        source: a model with random weights in place of --model.
        changes: values of the run's settings that a benchmark does not have.

    Raises:
        UserError: names the first thing that does not fit.
    """
    grid = Grid(rank, world_size, tp_size=settings.tensor_parallel, pp_size=settings.pipeline_parallel)
    unit = settings.rows * grid.dp_size
    if settings.task is not None and settings.samples % unit:
        raise UserError(
            f"--samples {settings.samples} is not a multiple of --rows {settings.rows} x {grid.dp_size} data-parallel"
            " ranks"
        )
    source = source or _source(settings)
    source.check_length("--length", settings.length)
    if settings.length < LEAST_LENGTH and settings.measured_on(world_size) == "layout":
        raise UserError(f"--length {settings.length}: a training run's rows have at least {LEAST_LENGTH} tokens")
    made_up = unit * settings.step_micro_batches * (settings.documents or 1)
    values = {
        **{name: getattr(settings, name) for name in marked(BenchSettings, shared=True)},
        "packing": settings.packs,
        "task": settings.task or DEFAULT_TASK,  # made-up tokens have none; the demo asks for no file
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


def _source(settings: BenchSettings) -> ModelSource:
    config = random_config(settings)
    if config is None:
        return find_model(settings.model)
    return ModelSource(settings.model, None, shape_from_hf(config, source=settings.model))


def random_config(settings: BenchSettings) -> dict[str, Any] | None:
    """The config.json of a model whose weights are random; None if its weights are read.

    Raises:
        UserError: a setting does not go with random weights, or only with them.
    """
    if is_preset(settings.model):
        values = dict(PRESETS[settings.model])
    elif settings.random_weights:
        folder = find_model(settings.model, weights=False).folder
        assert folder is not None, "no preset"
        values = read_hf_config(folder)
    elif settings.num_layers is None:
        return None
    else:
        raise UserError(
            f"--num_layers {settings.num_layers} goes with a preset or --random_weights: {', '.join(PRESETS)}"
        )
    if settings.task is not None:
        raise UserError(f"--task {settings.task} needs a model that reads: --model {settings.model} has random weights")
    return values if settings.num_layers is None else {**values, "num_hidden_layers": settings.num_layers}


def read_samples(plan: RunPlan, settings: BenchSettings) -> tuple[TokenDataset, int]:
    """The samples of a step on all ranks and the token that pads them. They are the task's first, or made up.

    Raises:
        UserError: the data cannot be read, or there is too little of it.
    """
    if settings.task is None:
        lengths = np.full(plan.batches.global_batch_size, settings.length // (settings.documents or 1))
        return made_up(plan.source.shape.vocab_size, lengths, num_labels=settings.labels), 0
    tokenizer = load_tokenizer(plan.source.weights_folder())
    files = {"train": settings.train_file}
    examples = load_split(settings.task, "train", files=files, seed=0, tokenizer=tokenizer, limit=settings.samples)
    if len(examples) < settings.samples:
        raise UserError(f"--samples {settings.samples}: the training part has {len(examples)} rows")
    return encode_dataset(examples, tokenizer, max_length=settings.length), padding_id(tokenizer)


def made_up(vocab_size: int, lengths: NDArray[np.int64], *, num_labels: int | None = None) -> TokenDataset:
    """Samples of random tokens. The last `num_labels` of each have a label; None: all but the first."""
    labels = lengths - 1 if num_labels is None else num_labels
    return TokenDataset.after_prompts(
        tokens=np.random.default_rng(0).integers(3, vocab_size, int(lengths.sum())).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))).astype(np.int64),
        prompt_lengths=(lengths - labels).astype(np.int32),
    )


def saved_formula(plan: RunPlan, batches: Sequence[MicroBatch]) -> float:
    """The bytes that a rank saves for the backward pass of all its micro-batches, computed from shapes alone."""
    parts = plan.layout.sequence_parts
    sizes = ((batch.labels.numel(), len(batch.supervised(parts).rows)) for batch in batches)
    return sum(saved_bytes(plan.stage, [ShareShape(0, tokens, after)]) for tokens, after in sizes)


def base_matmul_rate(plan: RunPlan, stage: Stage, batches: Sequence[MicroBatch], device: torch.device) -> float:
    """The FLOP/s of a bare matmul of a micro-batch's tokens with this rank's largest base matrix, the best of several.

    The matrix has the size that it has before ZeRO-3 partitions it over data-parallel ranks.
    """
    held = frozen_weights(stage)
    rules = stage_weight_rules(plan.source.shape, has_embedding=stage.embedding is not None)
    shapes = [rule.spec.local_shape(rule.shape, plan.grid.tp_size) for rule in rules if rule.name in held]
    columns, inner = max((shape for shape in shapes if len(shape) == 2), key=lambda shape: shape[0] * shape[1])
    rows = max(1024, sum(batch.tokens.numel() for batch in batches) // len(batches))
    return matmul_rate(rows, inner, columns, dtype=plan.dtype, device=device, repeats=10)
