"""Resumable checkpoints: a native adapter plus the optimizer's moments and where the run stood, full and layout-free.

`checkpoints/step_N` folders appear whole or not at all; `checkpoints/latest`, a text file, moves last.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.checkpoint.atomic import (
    new_folder,
    remove_leftovers,
    restore_interrupted,
    write_json,
    write_text,
)
from megatron_tiedlora.checkpoint.native_adapter import (
    BaseIdentity,
    NativeAdapter,
    load_adapter,
    read_safetensors,
    write_adapter_files,
)
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.config.json_files import read_json_object

STATE_FILE = "trainer_state.safetensors"
PROGRESS_FILE = "trainer_state.json"
LATEST_FILE = "latest"


def moment_name(moment: str, factor: str) -> str:
    """What a factor's moment (`exp_avg`, `exp_avg_sq`) is called in the file."""
    return f"{moment}.adapter.{factor}"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` optimizer steps.

    The order of samples and the learning rate are functions of the settings, the seed and these numbers; nothing in
    training draws from a random stream, so there is no other random state to keep.
    """

    step: int = 0
    consumed_samples: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    evaluated_step: int | None = None


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
            shutil.rmtree(other, ignore_errors=True)
    return folder


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The folder that `latest` names, or None where there is none. Raises UserError where it names nothing."""
    restore_interrupted(checkpoints)
    pointer = checkpoints / LATEST_FILE
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step_\d+", name) or not (checkpoints / name).is_dir():
        raise UserError(f"{pointer}: names {name!r}, which is no checkpoint in {checkpoints}")
    return checkpoints / name


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint folder. Raises UserError naming what is missing or broken."""
    content = read_json_object(folder / PROGRESS_FILE, kind="a checkpoint of a run (checkpoints/step_N)")
    try:
        progress = Progress(**{field.name: content[field.name] for field in fields(Progress)})
        settings = content["settings"]
    except KeyError as error:
        raise UserError(f"{folder / PROGRESS_FILE}: {error.args[0]} is missing") from None
    return Checkpoint(folder, progress, load_adapter(folder), read_safetensors(folder / STATE_FILE), settings)
