"""Save and load resumable checkpoints: a native adapter, the optimizer's moments and the progress of the run.

A checkpoint does not depend on the parallel layout. The folder `checkpoints/step_N` is written atomically, and then the
text file `checkpoints/latest` is updated. A JSON file in the folder has the checksums of the other files. If a checksum
does not match, the previous checkpoint is used.
"""

import errno
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tiedlora.adapters.tying import MOMENTS
from megatron_tiedlora.base import files
from megatron_tiedlora.base.files import Guard, discard, new_folder, unguarded, write_json, write_text
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.checkpoint import native_adapter
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, StateDict
from megatron_tiedlora.checkpoint.tensor_files import read_tensors
from megatron_tiedlora.parallel.agreement import SentTensor

STATE_FILE = "trainer_state.safetensors"
PROGRESS_FILE = "trainer_state.json"
LATEST_FILE = "latest"
CHECKPOINT_FILES = (native_adapter.CONFIG_FILE, native_adapter.WEIGHTS_FILE, PROGRESS_FILE, STATE_FILE)
_STEP_NAME = re.compile(r"step_([0-9]{1,15})")
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def moment_name(moment: str, name: str) -> str:
    """Return the name under which a moment (`exp_avg` or `exp_avg_sq`) of the tensor `name` is stored."""
    return f"{moment}.adapter.{name}"


def stored_moments(moments: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the moments of an adapter, by moment and tensor, under the names in which they are stored."""
    return {moment_name(moment, name): value for moment, own in moments.items() for name, value in own.items()}


@dataclass(frozen=True)
class Progress:
    """The progress of a run after `step` optimizer steps.

    The order of samples, the dropout and the learning rate depend only on the settings, the seed and these numbers. So
    there is no random state to save.
    """

    step: files.Count = 0
    consumed_samples: files.Count = 0
    best_metric: files.Real | None = None
    best_step: files.Count | None = None
    evaluations_since_best: files.Count = 0
    evaluated_step: files.Count | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: progress, adapter, moments by name, and the settings of the run that wrote it. `notes` are
    messages for the user about how the checkpoint was chosen."""

    folder: Path
    progress: Progress
    adapter: NativeAdapter
    moments: Mapping[str, SentTensor]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def save_checkpoint(
    checkpoints: Path,
    *,
    progress: Progress,
    adapter: NativeAdapter,
    moments: StateDict,
    settings: Mapping[str, Any],
    keep: int = 1,
    guard: Guard = unguarded,
) -> Path:
    """Write the checkpoint `step_N`, update `latest`, remove superseded checkpoints, and return the new folder.

    The newest `keep` checkpoints and the best one are kept. Checkpoints of later steps, from which the run was not
    resumed, are also removed. Raise UserError if the checkpoint cannot be written. The previous checkpoint and `latest`
    are then unchanged.
    """
    folder = checkpoints / f"step_{progress.step}"
    with new_folder(folder, guard=guard) as temporary:
        write_checkpoint_files(temporary, adapter, moments, progress, settings)
    move_latest(checkpoints, progress.step, guard=guard)
    remove_superseded(checkpoints, progress, keep=keep, later=True, guard=guard)
    return folder


def write_checkpoint_files(
    folder: Path, adapter: NativeAdapter, moments: StateDict, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Write the files of a checkpoint into an existing folder. Raise UserError if they cannot be written."""
    native_adapter.write_adapter_files(folder, adapter)
    save_file({name: tensor.contiguous() for name, tensor in moments.items()}, folder / STATE_FILE)
    names = native_adapter.CONFIG_FILE, native_adapter.WEIGHTS_FILE, STATE_FILE
    content = {**asdict(progress), "settings": dict(settings)}
    write_json(folder / PROGRESS_FILE, files.with_checksums(content, files=[folder / name for name in names]))


def remove_superseded(
    checkpoints: Path, progress: Progress, *, keep: int, later: bool = False, guard: Guard = unguarded
) -> None:
    """Remove earlier checkpoints except the newest `keep` and the best. With `later`, also remove later checkpoints.

    A process that is killed between a save and this call leaves an extra checkpoint, so a resumed run also calls this.
    """
    newest = [other for other in _checkpoints(checkpoints) if _step(other) <= progress.step][:keep]
    kept = {f"step_{progress.best_step}", *(other.name for other in newest)}
    for other in checkpoints.glob("step_*"):
        if other.name not in kept and (later or _step(other) < progress.step):
            discard(other, guard=guard)


def move_latest(checkpoints: Path, step: int, *, guard: Guard = unguarded) -> None:
    """Write the name of the checkpoint of `step` into `latest`. Raise UserError if the file cannot be written."""
    pointer = checkpoints / LATEST_FILE
    if pointer.is_dir() and not pointer.is_symlink():  # a file cannot replace a folder
        discard(pointer, guard=guard)
    write_text(pointer, f"step_{step}\n", guard=guard)


def _step(folder: Path) -> int:
    match = _STEP_NAME.fullmatch(folder.name)
    return -1 if match is None else int(match[1])


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, newest first, without symbolic links."""
    found = [item for item in folder.glob("step_*") if _step(item) >= 0 and item.is_dir() and not item.is_symlink()]
    return sorted(found, key=_step, reverse=True)


def find_newest_checkpoint(checkpoints: Path) -> Checkpoint | None:
    """Return the checkpoint that `latest` names, or the newest intact checkpoint, or None if there is no checkpoint.

    The result's notes list the newer checkpoints that were skipped, with reasons. No file is changed. Raise UserError
    if no checkpoint is intact, or if a checkpoint that may be intact cannot be read now."""
    found, pointer = _checkpoints(checkpoints), checkpoints / LATEST_FILE
    notes: list[str] = []
    try:
        named = named_checkpoint(checkpoints)
        if named is None and found:
            notes.append(f"{pointer}: is missing or not a regular file")
    except UserError as error:
        if not found:
            raise UserError(f"{error}, or remove it to start from the beginning") from None
        named = None
        notes.append(str(error))
    if named is not None:  # a resumed run may not have removed later checkpoints yet
        limit = _step(named)
        found.sort(key=lambda folder: _step(folder) > limit)
    for folder in found:
        try:
            checkpoint = load_checkpoint(folder)
        except UserError as error:
            if isinstance(error.__context__, OSError) and error.__context__.errno not in _NOT_THERE:
                raise  # the disk or network may fail temporarily, and the checkpoint may be intact
            notes.append(f"skipped {folder.name}: {error}")
        else:
            said = " ".join(notes)
            for item in sorted(checkpoints.glob("step_*"), key=_step):
                if _step(item) > checkpoint.progress.step and f"skipped {item.name}:" not in said:
                    why = "is a link" if item.is_symlink() else f"is later than the checkpoint in {LATEST_FILE}"
                    notes.append(f"skipped {item.name}: {why}")
            return replace(checkpoint, notes=tuple(notes))
    if notes:
        raise UserError(f"{checkpoints}: no checkpoint is intact ({'; '.join(notes)}); restore one or start a new run")
    return None


def named_checkpoint(checkpoints: Path) -> Path | None:
    """Return the folder that `latest` names, or None if `latest` is missing. Raise UserError if that folder does not
    exist."""
    pointer = checkpoints / LATEST_FILE
    if pointer.is_symlink() or not pointer.is_file():
        return None
    name = files.read_small_text(pointer).strip()
    if not _STEP_NAME.fullmatch(name) or not (checkpoints / name).is_dir():
        raise UserError(f"{pointer}: names {shown(name)}, which is not a checkpoint in {checkpoints}; correct it")
    return checkpoints / name


def recorded_settings(folders: Iterable[Path]) -> Mapping[str, Any] | None:
    """Return the settings in the first of these checkpoint folders whose progress file can be read, or None. No other
    file is read."""
    for folder in folders:
        content = None if folder.is_symlink() else files.read_json_or_none(folder / PROGRESS_FILE)
        if isinstance(settings := (content or {}).get("settings"), dict):
            return settings
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """Return the checkpoint in a folder. Raise UserError if a file is missing, damaged or from another checkpoint."""
    file = folder / PROGRESS_FILE
    content = files.read_json_object(file, kind="a checkpoint of a run (checkpoints/step_N)")
    sums = files.check_checksums(file, content)
    progress = files.read_fields(file, content, Progress)
    if "settings" not in content or not isinstance(content["settings"], dict):
        what = "not an object" if "settings" in content else "missing"
        raise UserError(f"{file}: settings is {what}; give another checkpoint")
    _check_steps(file, progress, content["settings"])
    adapter, state = native_adapter.load_native_adapter(folder), folder / STATE_FILE
    for name in (native_adapter.CONFIG_FILE, native_adapter.WEIGHTS_FILE):
        files.check_file(folder / name, sums)  # undamaged files may still be from a different step
    trained = adapter.config.num_trained()
    shapes = {moment_name(moment, name): adapter.config.shape(name) for moment in MOMENTS for name in trained}
    moments = read_tensors(state, shapes, sums=sums)
    for name, values in moments.items():
        if name.startswith(f"{MOMENTS[1]}.") and bool((values < 0).any()):
            raise UserError(f"{state}: {name}, a mean of squares, has negative numbers; give another checkpoint")
    return Checkpoint(folder, progress, adapter, moments, content["settings"])


def _check_steps(file: Path, progress: Progress, settings: Mapping[str, Any]) -> None:
    for name in ("best_step", "evaluated_step"):
        step = getattr(progress, name)
        if step is not None and step > progress.step:
            said = f"{name} = {step} is later than the checkpoint's step, {progress.step}"
            raise UserError(f"{file}: {said}; give another checkpoint")
    best, since_best = progress.best_step, progress.evaluations_since_best
    if (best is None) != (progress.best_metric is None):
        raise UserError(f"{file}: it has one of best_step and best_metric, not both; give another checkpoint")
    if since_best > progress.step - (best or 0):
        said = f"evaluations_since_best = {since_best} is more than the number of steps since best_step"
        raise UserError(f"{file}: {said}; give another checkpoint")
    if _STEP_NAME.fullmatch(file.parent.name) and file.parent.name != f"step_{progress.step}":
        raise UserError(f"{file}: its step is {progress.step}, but its folder is {file.parent.name}; rename the folder")
    samples, step = progress.consumed_samples, progress.step
    a_step = settings.get("global_batch_size", samples // step if step else 0)
    if samples != step * a_step or samples < step:
        said = f"consumed_samples = {samples} does not fit {step} steps of {shown(a_step)} samples"
        raise UserError(f"{file}: {said}; give another checkpoint")


def copy_checkpoint(source: Path, target: Path, *, guard: Guard = unguarded) -> None:
    """Copy the checkpoint files in the folder `source` to `target`, atomically. Raise UserError if a file is missing or
    is a symbolic link, or if `target` cannot be written."""
    for name in CHECKPOINT_FILES:
        if (source / name).is_symlink() or not (source / name).is_file():
            raise UserError(f"{source / name}: is not a regular file; give a checkpoint that has its own files")
    with new_folder(target, guard=guard) as unfinished:
        for name in CHECKPOINT_FILES:
            shutil.copyfile(source / name, unfinished / name)
