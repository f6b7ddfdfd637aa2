"""Checkpoints without files, for what is decided before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from megatron_tiedlora.checkpoint.resume import Checkpoint, Progress


def checkpoint_of(settings: Mapping[str, Any], step: int) -> Checkpoint:
    """A checkpoint of a run with these settings after `step`, in step_4."""
    return cast(Checkpoint, SimpleNamespace(settings=settings, progress=Progress(step=step), folder=Path("step_4")))
