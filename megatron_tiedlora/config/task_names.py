"""The task names for `--task`: the names of the files in data/tasks. config cannot import data."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent.parent / "data" / "tasks"

TASK_NAMES: tuple[str, ...] = tuple(sorted(file.stem for file in _FOLDER.glob("[!_]*.py")))
