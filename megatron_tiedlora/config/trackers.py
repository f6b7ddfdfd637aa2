"""The names of --report_to. What is sent to them is in `runtime/trackers.py`, which needs their packages."""

from __future__ import annotations

from typing import Any

from megatron_tiedlora.base.errors import shown
from megatron_tiedlora.base.wording import nearest_name

TENSORBOARD = "tensorboard"
# TensorBoard is written here; the others are those of accelerate.tracking, each named like its package.
TRACKER_NAMES = (TENSORBOARD, "wandb", "mlflow", "trackio", "comet_ml", "swanlab", "clearml", "aim", "dvclive")


def parse_trackers(value: Any) -> Any:
    """The names of `--report_to`, none twice. A value that is not a text or a list of texts is unchanged.

    Raises:
        ValueError: a name is unknown.
    """
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        return value
    found = tuple(dict.fromkeys(name.strip().lower() for name in names if name.strip()))
    if found == ("none",):
        return ()
    for name in found:
        if name not in TRACKER_NAMES:
            near = nearest_name(name, TRACKER_NAMES)
            raise ValueError(f"--report_to: {shown(name)} is unknown{near}; known: {', '.join(TRACKER_NAMES)}, or none")
    return found
