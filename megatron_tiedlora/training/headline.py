"""The first lines of a run, shown before its progress bar."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.checkpoint.load_model import describe_dtype
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.training.adapter_plans import shared_plan
from megatron_tiedlora.training.build import BuiltModel
from megatron_tiedlora.training.compiling import ChosenKernels
from megatron_tiedlora.training.length import steps_in_words
from megatron_tiedlora.training.loop import Trainer
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.profiling import steps_over
from megatron_tiedlora.training.start import Start


def headline(
    start: Start, trainer: Trainer, built: BuiltModel, chosen: ChosenKernels, device: torch.device
) -> list[str]:
    """A summary of the run: some lines on what all adapters share, and on each."""
    plan = shared_plan(start.plans)
    several = start.several
    lines = [
        *_model(plan),
        *(_adapters(start) if several else _only_adapter(start)),
        *_layout(plan),
        *_read(plan, built),
        f"kernels    {chosen.description}",
        f"attention  {built.runner.stage.attention.route(device, plan.dtype)}",
    ]
    return [*lines, *(_each(start, trainer, built) if several else _start_of_only(start, built))]


def _model(plan: RunPlan) -> list[str]:
    settings = plan.settings
    line = f"model      {settings.model}, {num_base_parameters(plan.source.shape) / 1e6:,.1f} M parameters in"
    line += f" {describe_dtype(settings.dtype, plan.dtype_name)}, frozen"
    line += "" if settings.base is None else f"; the linears of its blocks in {settings.base}"
    return [line + ("" if settings.products is None else f", products in {settings.products}")]


def _layout(plan: RunPlan) -> list[str]:
    grid = plan.grid
    if grid.tp_size * grid.pp_size == 1:
        return []
    sharded = " with sequence parallelism" if plan.layout.sequence_parallel else ""
    stages = ", ".join(f"{len(stage.layers)}" for stage in plan.stages)
    return [
        f"layout     tensor {grid.tp_size}{sharded} x pipeline {grid.pp_size} ({stages} layers with embedding and"
        f" head) x data {grid.dp_size}"
    ]


def _read(plan: RunPlan, built: BuiltModel) -> list[str]:
    read, kept = map(_range, (built.bytes_read, built.bytes_kept))
    stored = "" if plan.settings.base is None else f", stored as {kept}"
    return [f"read       {read} of base weights per rank{stored}"]


def _range(sizes: Sequence[int]) -> str:
    return " to ".join(dict.fromkeys(map(bytes_in_words, (min(sizes), max(sizes)))))


# Of the only adapter ------------------------------------------------------------------------------------------------


def _only_adapter(start: Start) -> list[str]:
    (plan,), (data,) = start.plans.values(), start.data.values()
    settings, trained = plan.settings, sum(plan.adapter.num_trained().values())
    layers = f"{len(plan.adapter.layers)} of {plan.source.shape.num_layers} layers"
    if (targets := [target.name for target in plan.adapter.targets]) != [QKV]:
        layers += f" ({', '.join(targets)})"
    return [
        f"adapter    {settings.method}, rank {settings.rank}, {layers}: {trained:,} trained parameters"
        + (f", dropout {settings.dropout:g}" if settings.dropout else ""),
        f"data       {settings.task}: {len(data.train):,} train, {len(data.validation):,} validation samples;"
        f" {count_text(data.train.truncated_prompts, 'prompt')} truncated to {settings.max_length} tokens",
        *(f"           {note}" for note in data.notes),
        f"batches    {count_text(plan.batches.global_batch_size, 'sample')} per step, {plan.batches_in_words},"
        f" ZeRO-{plan.engine.zero_stage}",
        f"length     {steps_in_words(settings, len(data.train))}, schedule {settings.schedule}",
    ]


def _start_of_only(start: Start, built: BuiltModel) -> list[str]:
    (plan,), (data,), (checkpoint,) = start.plans.values(), start.data.values(), start.checkpoints.values()
    lines, settings = [], plan.settings
    if settings.init_from is not None and checkpoint is None:
        lines.append(f"start      values of {settings.init_from}")
    (of_build,) = built.notes.values()
    notes = [*(() if checkpoint is None else checkpoint.notes), *of_build]
    if checkpoint is not None and (over := steps_over(settings.profile, checkpoint.progress.step)):
        notes.append(over)
    lines.append(f"run folder {start.folder.path}{_resumed(plan, checkpoint)}")
    lines += [f"note       {note}" for note in notes]
    return [*lines, *(f"warning    {warning}" for warning in data.warnings(plan))]


def _resumed(plan: RunPlan, checkpoint: Checkpoint | None) -> str:
    """The step from which the run continues, and whether --packing was different before it."""
    if checkpoint is None:
        return ""
    packing, before = plan.settings.packing, checkpoint.settings.get("packing", False)
    changed = f" (until there --packing {str(before).lower()}, from here {str(packing).lower()})"
    return f", resumed from step {checkpoint.progress.step}{changed if before != packing else ''}"


# Of several ---------------------------------------------------------------------------------------------------------


def _adapters(start: Start) -> list[str]:
    plan = shared_plan(start.plans)
    trained = sum(sum(own.adapter.num_trained().values()) for own in start.plans.values())
    ranks = count_text(plan.grid.dp_size, "data-parallel rank")
    return [f"adapters   {len(start.plans)}, {trained:,} trained parameters, ZeRO-{plan.engine.zero_stage}, {ranks}"]


def _each(start: Start, trainer: Trainer, built: BuiltModel) -> list[str]:
    """The run's folder, and a line on each adapter with its notes."""
    lines = [f"run folder {start.folder.path}"]
    if over := steps_over(trainer.profile, trainer.last_step):
        lines.append(f"note       {over}")
    lines += [f"{name:<10} finished before" for name in start.finished]
    for name, run in trainer.adapters.items():
        own, checkpoint = run.plan.settings, start.checkpoints[name]
        lines.append(
            f"{name:<10} {own.method}, rank {own.rank}, {count_text(len(run.data.train), 'sample')},"
            f" {own.global_batch_size} per step, {count_text(own.max_steps, 'step')}{_resumed(run.plan, checkpoint)}"
        )
        notes = (*run.data.notes, *(() if checkpoint is None else checkpoint.notes), *built.notes[name])
        lines += [f"note       {name}: {note}" for note in notes]
        lines += [f"warning    {name}: {warning}" for warning in run.data.warnings(run.plan)]
        if trainer.rivals.get(name) and run.num_evaluation_batches < 2:
            lines.append(f"warning    {name}: --halving cannot tell noise, as the validation set is one batch")
    return lines
