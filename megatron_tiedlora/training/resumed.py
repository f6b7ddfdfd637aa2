"""The checkpoint from which an adapter continues: finding it, whether this start may continue it, and adopting it.

Settings that are not `compared` may differ from the checkpoint's, as they do not change what is computed. --epochs may,
since only the number of steps that follows from it counts. --max_steps may if the schedule does not depend on it, which
is so if it is constant. A warm-up that was not given is the checkpoint's.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import (
    Checkpoint,
    copy_checkpoint,
    find_newest_checkpoint,
    load_checkpoint,
    move_latest,
)
from megatron_tiedlora.config.fields import declared, flag_value
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.planning.run_data import RunData
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.run_folder import RunFolder, read_metrics, write_metrics
from megatron_tiedlora.training.build import check_resumed_base
from megatron_tiedlora.training.profiling import steps_over


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
    check_resumed_settings(plan, checkpoint, data_sha256=data.sha256)
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


def reject_another_run(plan: RunPlan, data: RunData, folder: RunFolder) -> None:
    """Raise UserError if the run that --resume means cannot be continued with these settings, data or base."""
    try:
        checkpoint = _find_checkpoint(plan.settings.resume, folder)
    except UserError:  # raised again once this start owns the folder and has renamed back what was moved aside
        return
    if checkpoint is not None:
        check_resumed_settings(plan, checkpoint, data_sha256=data.sha256)
        check_resumed_base(plan, checkpoint)


def check_resumed_settings(plan: RunPlan, checkpoint: Checkpoint, *, data_sha256: str) -> None:
    """Raise UserError if a checkpoint was trained with settings or data that contradict the plan's.

    It names the setting and both values.
    """
    saved, step, source = checkpoint.settings, checkpoint.progress.step, str(checkpoint.folder)
    settings, marks = plan.settings, declared(Settings)
    for name, value in plan.resolved_settings().items():
        if not marks[name].compared or name == "epochs":
            continue
        field = Settings.model_fields[name]
        default = None if field.is_required() else field.default  # of a setting that came after the checkpoint
        if name not in saved and default in (None, value):
            continue
        if name == "max_new_tokens" and settings.eval_metric == "loss":  # changes nothing in such a run
            continue
        before = saved.get(name, default)
        if (list(before) if isinstance(before, (list, tuple)) else before) == value:
            continue
        if name == "max_steps" and saved.get("schedule") == settings.schedule == "constant":
            if settings.max_steps < step:
                raise UserError(f"{source}: is of step {step}, after {_steps_in_words(plan)}; give at least {step}")
            continue
        if name == "warmup_steps" and name not in settings.model_fields_set and (kept := _warmup(saved)) is not None:
            if kept > settings.max_steps:
                raise UserError(
                    f"{source}: trained with a warm-up of {kept} steps, longer than {_steps_in_words(plan)}; give at"
                    f" least {kept} steps"
                )
            continue  # see with_kept_warmup
        was, now = ("left out" if given is None else flag_value(given) for given in (before, value))
        found = f"{source}: trained with --{name} {was}, but now it is"
        if name == "max_steps":
            raise UserError(
                f"{found} {_steps_in_words(plan)}, and --schedule {saved.get('schedule')} reaches 0 at --max_steps"
                " (only --schedule constant, from the first step on, lets a run continue); resume with the same value,"
                f" or start a new run with --init_from {shlex.quote(source)}"
            )
        same = f"leave it out, or give {was}" if name == "warmup_steps" else "resume with the same value"
        raise UserError(f"{found} {now}; {same}")
    if settings.resume != "auto" and (over := steps_over(settings.profile, step)):  # the headline notes it with auto
        left = f"give steps from {step + 1} to {settings.max_steps}" if step < settings.max_steps else "leave it out"
        raise UserError(f"{over}; {left}")
    if saved.get("data_sha256") != data_sha256:
        raise UserError(
            f"{source}: trained on other data than --train_file and --validation_file now hold (or it is truncated or"
            " tokenised differently). Resume with the same data"
        )


def with_kept_warmup(plan: RunPlan, saved: Mapping[str, Any] | None) -> RunPlan:
    """The plan of a run that continues one of the settings `saved` (None: a new run), with the warm-up of that one.

    The default warm-up is shortened to the number of steps, so that of a run which was made longer would differ.
    """
    if saved is None or "warmup_steps" in plan.settings.model_fields_set or (kept := _warmup(saved)) is None:
        return plan
    return replace(plan, settings=plan.settings.completed(warmup_steps=kept))


def _warmup(saved: Mapping[str, Any]) -> int | None:
    """The warm-up in a checkpoint's settings, which are anything that JSON can hold; None if it is no number."""
    found = saved.get("warmup_steps")
    return found if type(found) is int and found >= 0 else None


def _steps_in_words(plan: RunPlan) -> str:
    """The number of steps, and what it was counted from."""
    epochs = plan.settings.epochs
    return f"{plan.settings.max_steps}" + ("" if epochs is None else f" (--epochs {epochs:g})")
