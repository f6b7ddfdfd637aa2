"""Checkpoints after given steps: in files; and without them, for what is decided before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from native_files import moments_of

from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.resume import Checkpoint, Progress, save_checkpoint


def save_step(root: Path, native: NativeAdapter, step: int, best: int | None, **keywords: Any) -> Path:
    """Save `native` as it is after `step` steps of four samples, of which `best` was the best; every moment is `step`.

    Args:
        keywords: of save_checkpoint.
    """
    return save_checkpoint(
        root,
        progress=Progress(step=step, consumed_samples=4 * step, best_metric=0.5, best_step=best, evaluated_step=step),
        config=native.config,
        base_identity=native.base_identity,
        state=native.state,
        moments=moments_of(native, float(step)),
        settings={"global_batch_size": 4},
        **keywords,
    )


def checkpoint_of(settings: Mapping[str, Any], step: int) -> Checkpoint:
    """A checkpoint of a run with these settings after `step`, in step_4."""
    return cast(Checkpoint, SimpleNamespace(settings=settings, progress=Progress(step=step), folder=Path("step_4")))
