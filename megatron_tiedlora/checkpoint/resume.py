"""Resumable checkpoints: a native adapter plus the optimizer's moments and where the run stood, full and layout-free.

`checkpoints/step_N` folders appear whole or not at all; `checkpoints/latest`, a text file, moves last.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.checkpoint.atomic import (
    new_folder,
    remove,
    remove_leftovers,
    restore_interrupted,
    write_json,
    write_text,
)
from megatron_tiedlora.checkpoint.native_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    BaseIdentity,
    NativeAdapter,
    fp32_values,
    load_adapter,
    read_safetensors,
    write_adapter_files,
)
from megatron_tiedlora.config.errors import UserError, shown
from megatron_tiedlora.config.json_files import Count, Real, read_fields, read_json_object
from megatron_tiedlora.config.text_files import read_small_text

STATE_FILE = "trainer_state.safetensors"
PROGRESS_FILE = "trainer_state.json"
LATEST_FILE = "latest"
CHECKPOINT_FILES = (CONFIG_FILE, WEIGHTS_FILE, PROGRESS_FILE, STATE_FILE)
_STEP_NAME = re.compile(r"step_[0-9]{1,15}")


def moment_name(moment: str, factor: str) -> str:
    """What a factor's moment (`exp_avg`, `exp_avg_sq`) is called in the file."""
    return f"{moment}.adapter.{factor}"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps.

    The order of samples and the learning rate are functions of the settings, the seed and these numbers; nothing in
    training draws from a random stream, so there is no other random state to keep.
    """

    step: Count = 0
    consumed_samples: Count = 0
    best_metric: Real | None = None
    best_step: Count | None = None
    evaluations_since_best: Count = 0
    evaluated_step: Count | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: progress, adapter, moments by name, and the settings of the run that wrote it."""

    folder: Path
    progress: Progress
    adapter: NativeAdapter
    moments: Mapping[str, torch.Tensor]
    settings: Mapping[str, Any]


def save_checkpoint(
    checkpoints: Path,
    *,
    progress: Progress,
    config: AdapterConfig,
    base: BaseIdentity,
    state: Mapping[str, torch.Tensor],
    moments: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
) -> Path:
    """Write `step_N`, then move `latest` to it, then remove every other checkpoint but the best.

    Raises:
        UserError: it cannot be written; the previous checkpoint and `latest` are as they were.
    """
    folder = checkpoints / f"step_{progress.step}"
    remove_leftovers(checkpoints)
    with new_folder(folder) as temporary:
        write_adapter_files(temporary, config, base, state)
        save_file({name: tensor.contiguous() for name, tensor in moments.items()}, temporary / STATE_FILE)
        write_json(temporary / PROGRESS_FILE, {**asdict(progress), "settings": dict(settings)})
    write_text(checkpoints / LATEST_FILE, folder.name + "\n")
    keep = {folder.name, f"step_{progress.best_step}"}
    for other in checkpoints.glob("step_*"):
        if other.name not in keep:
            remove(other)
    return folder


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """`named_checkpoint`, after what a killed writer had moved aside has its name again."""
    restore_interrupted(checkpoints)
    return named_checkpoint(checkpoints)


def named_checkpoint(checkpoints: Path) -> Path | None:
    """The folder that `latest` names, or None where there is none. Raises UserError where it names nothing."""
    pointer = checkpoints / LATEST_FILE
    if not pointer.is_file():
        return None
    name = read_small_text(pointer).strip()
    if not _STEP_NAME.fullmatch(name) or not (checkpoints / name).is_dir():
        raise UserError(f"{pointer}: names {shown(name)}, which is no checkpoint in {checkpoints}")
    return checkpoints / name


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder. Raises UserError naming what is missing or broken."""
    file = folder / PROGRESS_FILE
    content = read_json_object(file, kind="a checkpoint of a run (checkpoints/step_N)")
    progress = read_fields(file, content, Progress)
    _check_steps(file, progress)
    if "settings" not in content or not isinstance(content["settings"], dict):
        raise UserError(f"{file}: settings is {'no object' if 'settings' in content else 'missing'}")
    adapter, state = load_adapter(folder), folder / STATE_FILE
    moments = {name: fp32_values(state, name, stored) for name, stored in read_safetensors(state).items()}
    return Checkpoint(folder, progress, adapter, moments, content["settings"])


def _check_steps(file: Path, progress: Progress) -> None:
    for name in ("best_step", "evaluated_step"):
        step = getattr(progress, name)
        if step is not None and step > progress.step:
            raise UserError(f"{file}: {name} = {step} is after its step {progress.step}")
    if _STEP_NAME.fullmatch(file.parent.name) and file.parent.name != f"step_{progress.step}":
        raise UserError(f"{file}: is of step {progress.step}, which is not its folder's; give that its own name back")


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy the files of a checkpoint, and nothing else that lies in its folder, to `target`, there whole or not at all.

    Raises:
        UserError: one is missing, or no plain file of the folder itself; or `target` cannot be written.
    """
    for name in CHECKPOINT_FILES:
        if (source / name).is_symlink() or not (source / name).is_file():
            raise UserError(f"{source / name}: is no plain file; a checkpoint that is copied holds its own files")
    with new_folder(target) as unfinished:
        for name in CHECKPOINT_FILES:
            shutil.copyfile(source / name, unfinished / name)
