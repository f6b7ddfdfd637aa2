"""The names of the tasks, and the defaults that differ by task. The tasks are in data/, which config cannot import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent.parent / "data" / "tasks"

TASK_NAMES: tuple[str, ...] = tuple(sorted(file.stem for file in _FOLDER.glob("[!_]*.py")))

# For a command that is given neither a model nor a task.
DEFAULT_MODEL, DEFAULT_TASK = "demo", "demo"

PAPER_DEFAULTS: Mapping[str, Any] = {
    "global_batch_size": 256,
    "max_steps": 2000,
    "learning_rate": 1e-4,
    "warmup_steps": 50,
    "eval_interval": 30,
    "max_length": 4096,
}
# Defaults of tasks that do not use the paper's.
TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "global_batch_size": 24,
        "max_steps": 20,
        "learning_rate": 3e-2,
        "warmup_steps": 2,
        "eval_interval": 10,
        "max_length": 512,
    },
}
