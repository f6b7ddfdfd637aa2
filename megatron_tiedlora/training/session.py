"""The start of a run: the run folder, the checkpoint to resume from, and the first lines for the user."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.ownership import Owner
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.base.version import installed_versions
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.checkpoint.load_model import describe_dtype
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import (
    Checkpoint,
    Progress,
    copy_checkpoint,
    find_newest_checkpoint,
    load_checkpoint,
    move_latest,
    remove_superseded,
)
from megatron_tiedlora.config.data_fields import HUB_NAMES, TEMPLATE_HASH
from megatron_tiedlora.data.chat import chat_template_sha256
from megatron_tiedlora.data.sources import hub_ids
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, num_differing, raise_on_every_rank
from megatron_tiedlora.runtime.run_folder import (
    MetricsLog,
    RunFolder,
    read_metrics,
    take_run_folder,
    write_metrics,
)
from megatron_tiedlora.training.build import BuiltModel, check_resumed_base
from megatron_tiedlora.training.compiling import ChosenKernels
from megatron_tiedlora.training.length import steps_in_words
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.profiling import steps_over
from megatron_tiedlora.training.resumed import check_resumed_settings
from megatron_tiedlora.training.run_data import RunData


def open_run_folder(plan: RunPlan, data: RunData, *, keep: Callable[[Callable[[], None]], None]) -> RunFolder:
    """Choose the run folder on rank 0, which becomes its owner, and tell every rank.

    A start that cannot continue the run in a folder does not take the folder over.

    Args:
        keep: called on rank 0 with the function that releases the folder at the end.

    Raises:
        UserError: the folder is in use, or holds a run that this start cannot continue; on every rank.
    """
    settings = plan.settings

    def take() -> tuple[str, str]:
        folder, lock = take_run_folder(
            settings.output_dir,
            name=plan.name,
            resume=settings.resume,
            take_over=settings.take_over,
            before=partial(reject_another_run, plan, data),
        )
        keep(lock.release)
        return str(folder.path), lock.owner.start

    path, start = decided_by_rank_0(take, kind=tuple[str, str])
    return RunFolder(Path(path), Owner(Path(path), start, is_main=plan.grid.rank == 0))


def reject_another_run(plan: RunPlan, data: RunData, folder: RunFolder) -> None:
    """Raise UserError if the run that --resume means cannot be continued with these settings, data or base."""
    try:
        checkpoint = _find_checkpoint(plan.settings.resume, folder)
    except UserError:  # raised again once this start owns the folder and has renamed back what was moved aside
        return
    if checkpoint is not None:
        _check_settings(plan, data, checkpoint)
        check_resumed_base(plan, checkpoint)


def _check_settings(plan: RunPlan, data: RunData, checkpoint: Checkpoint) -> None:
    """Raise UserError if a checkpoint was trained with settings or data that contradict the plan's."""
    check_resumed_settings(
        plan,
        checkpoint.settings,
        step=checkpoint.progress.step,
        data_sha256=data.sha256,
        source=str(checkpoint.folder),
    )


def occupy_run_folder(plan: RunPlan, folder: RunFolder, checkpoint: Checkpoint | None) -> MetricsLog | None:
    """Write the resumed checkpoint, run.yaml and the logs to the folder. Returns rank 0's log, None on the others.

    Raises:
        UserError: the folder cannot be written; on every rank.
    """
    log, failure = None, None
    if plan.grid.rank == 0:
        try:
            if checkpoint is not None:
                adopt_checkpoint(folder, checkpoint)
                keep = plan.settings.keep_checkpoints
                remove_superseded(folder.checkpoints, checkpoint.progress, keep=keep, guard=folder.guard)
            write_run_settings(plan, folder)
            start = checkpoint.progress if checkpoint is not None else Progress()
            log = MetricsLog(
                folder,
                resumed_step=start.step,
                evaluated_step=start.evaluated_step,
                report_to=plan.settings.report_to,
                settings=plan.resolved_settings(),
            )
        except UserError as error:
            failure = error
    raise_on_every_rank(failure)
    return log


def check_same_data(data: RunData) -> None:
    """Raise UserError if the data that a rank has read differs from rank 0's."""
    if differing := num_differing(data.shared_sha256):
        raise UserError(
            f"{count_text(differing, 'rank')} read other training, validation or test data than rank 0."
            " Give every host the same files"
        )


def find_checkpoint(plan: RunPlan, data: RunData, folder: RunFolder) -> Checkpoint | None:
    """The checkpoint that --resume asks for, or None to start from the beginning.

    Rank 0 reads it and sends it to the others, so only its host needs the run folder. With `auto`, a folder without a
    checkpoint means a start from the beginning, so that one command serves the first and every later start of a job.

    Raises:
        UserError: the checkpoint does not exist, is broken, or contradicts the plan's settings or base.
    """
    return decided_by_rank_0(lambda: _read_checkpoint(plan, data, folder), kind=Checkpoint | None)


def _read_checkpoint(plan: RunPlan, data: RunData, folder: RunFolder) -> Checkpoint | None:
    checkpoint = _find_checkpoint(plan.settings.resume, folder)
    if checkpoint is None:
        return None
    step_folder = checkpoint.folder
    _check_settings(plan, data, checkpoint)
    best = checkpoint.progress.best_step
    if best in (None, checkpoint.progress.step):
        return checkpoint
    notes = checkpoint.notes
    if (step_folder.parent / f"step_{best}").is_dir():
        try:
            load_native_adapter(step_folder.parent / f"step_{best}")
            return checkpoint
        except UserError as error:
            notes = (*notes, f"the best checkpoint is broken, so the next evaluation writes a new one: {error}")
    # The checkpoint was moved out of its run, without the best one. The next evaluation writes a new best one.
    forgotten = replace(
        checkpoint.progress, best_metric=None, best_step=None, evaluations_since_best=0, evaluated_step=None
    )
    return replace(checkpoint, progress=forgotten, notes=notes)


def _find_checkpoint(resume: str, folder: RunFolder) -> Checkpoint | None:
    if resume == "none":
        return None
    if resume == "auto":
        return find_newest_checkpoint(folder.checkpoints)
    path = user_path(resume)
    if not path.is_dir():
        raise UserError(f"--resume {resume}: no such checkpoint folder. Give auto, or a checkpoints/step_N folder")
    if folder.is_run and path.resolve().parent != folder.checkpoints.resolve():
        raise UserError(f"--resume {resume}: {folder.path} holds another run. Give a new --output_dir")
    return load_checkpoint(path)


def adopt_checkpoint(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Make `checkpoint` the last one of the run folder, before training continues from it; on rank 0.

    If it is in another folder, it is copied first, with the best checkpoint and the logs. Then `latest` names it, so
    that a later start resumes this run, and adapter/ is written from the best one, since a kill between two saves may
    have left an older one.

    Raises:
        UserError: the folder cannot be written, or a copied file is broken.
    """
    progress, source = checkpoint.progress, checkpoint.folder.resolve()
    if source != folder.checkpoints.resolve() / f"step_{progress.step}":
        copies = {source: folder.checkpoints / f"step_{progress.step}"}
        if progress.best_step not in (None, progress.step):
            copies[source.parent / f"step_{progress.best_step}"] = folder.checkpoints / f"step_{progress.best_step}"
        for original, copy in copies.items():
            if original != copy.parent.resolve() / copy.name:
                copy_checkpoint(original, copy, guard=folder.guard)
        run = RunFolder(source.parent.parent)
        if run.is_run and run.path != folder.path.resolve():
            write_metrics(folder.metrics, read_metrics(run.metrics), guard=folder.guard)
            if run.scores.is_file():
                scores = read_json_object(run.scores, kind="a run's scores")
                write_json(folder.scores, scores, guard=folder.guard)
    move_latest(folder.checkpoints, progress.step, guard=folder.guard)
    if progress.best_step is not None:
        best = load_native_adapter(folder.checkpoints / f"step_{progress.best_step}")
        save_adapter(folder.adapter, best.config, best.base, best.state, guard=folder.guard)


def write_run_settings(plan: RunPlan, folder: RunFolder) -> None:
    """Write run.yaml: every resolved setting, what comes from the hub, the content of --chat_template as a hash, and
    versions of libraries."""
    versions = installed_versions("torch", "deepspeed", "transformers")
    settings = plan.resolved_settings()
    settings["output_dir"] = str(folder.path)
    settings[HUB_NAMES] = hub_ids(*(settings[name] for name in ("train_file", "validation_file", "tokenizer")))
    if plan.settings.chat_template is not None:
        settings[TEMPLATE_HASH] = chat_template_sha256(plan.settings.chat_template)
    folder.write_settings({**settings, "ranks": plan.grid.world_size, "versions": versions})


def _start(plan: RunPlan, checkpoint: Checkpoint | None) -> str:
    """The step from which the run continues, and whether --packing was different before it."""
    if checkpoint is None:
        return ""
    packing, before = plan.settings.packing, checkpoint.settings.get("packing", False)
    changed = f" (until there --packing {str(before).lower()}, from here {str(packing).lower()})"
    return f", resumed from step {checkpoint.progress.step}{changed if before != packing else ''}"


def headline(
    plan: RunPlan,
    data: RunData,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    built: BuiltModel,
    chosen: ChosenKernels,
    device: torch.device,
) -> list[str]:
    """A summary of the run in a few lines, shown before its progress bar."""
    settings, grid = plan.settings, plan.grid
    trained, total = sum(plan.adapter.num_trained().values()), num_base_parameters(plan.source.shape)
    dtype = describe_dtype(settings.dtype, plan.dtype_name)
    layers = f"{len(plan.adapter.layers)} of {plan.source.shape.num_layers} layers"
    if (targets := [target.name for target in plan.adapter.targets]) != [QKV]:
        layers += f" ({', '.join(targets)})"
    lines = [
        f"model      {settings.model}, {total / 1e6:,.1f} M parameters in {dtype}, frozen"
        + ("" if settings.base is None else f"; the linears of its blocks in {settings.base}")
        + ("" if settings.products is None else f", products in {settings.products}"),
        f"adapter    {settings.method}, rank {settings.rank}, {layers}: {trained:,} trained parameters"
        + (f", dropout {settings.dropout:g}" if settings.dropout else ""),
        f"data       {settings.task}: {len(data.train):,} train, {len(data.validation):,} validation samples;"
        f" {count_text(data.train.truncated_prompts, 'prompt')} truncated to {settings.max_length} tokens",
        f"batches    {count_text(plan.batches.global_batch_size, 'sample')} per step, {plan.batches_in_words},"
        f" ZeRO-{plan.engine.zero_stage}",
        f"length     {steps_in_words(settings, len(data.train))}, schedule {settings.schedule}",
    ]
    lines[3:3] = [f"           {note}" for note in data.notes]
    if grid.tp_size * grid.pp_size > 1:
        sharded = " with sequence parallelism" if plan.layout.sequence_parallel else ""
        stages = ", ".join(f"{len(stage.layers)}" for stage in plan.stages)
        lines.append(
            f"layout     tensor {grid.tp_size}{sharded} x pipeline {grid.pp_size} ({stages} layers with embedding and"
            f" head) x data {grid.dp_size}"
        )
    read, kept = (
        " to ".join(dict.fromkeys(map(bytes_in_words, (min(sizes), max(sizes)))))
        for sizes in (built.bytes_read, built.bytes_kept)
    )
    lines.append(f"read       {read} of base weights per rank{'' if settings.base is None else f', stored as {kept}'}")
    lines.append(f"kernels    {chosen.description}")
    lines.append(f"attention  {built.stage.attention.route(device, plan.dtype)}")
    if settings.init_from is not None and checkpoint is None:
        lines.append(f"start      values of {settings.init_from}")
    notes = [*(() if checkpoint is None else checkpoint.notes), *built.notes]
    if checkpoint is not None and (over := steps_over(settings.profile, checkpoint.progress.step)):
        notes.append(over)
    lines.append(f"run folder {folder.path}{_start(plan, checkpoint)}")
    warnings = data.warnings(plan)
    return [*lines, *(f"note       {note}" for note in notes), *(f"warning    {warning}" for warning in warnings)]
