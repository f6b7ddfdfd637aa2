"""The tasks, one file each. Every module in this folder defines `TASK`, and is found under its file's name."""

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.task import Task


def _discover() -> Mapping[str, Task]:
    found: dict[str, Task] = {}
    for module in pkgutil.iter_modules(__path__, prefix=f"{__name__}."):
        task = importlib.import_module(module.name).TASK
        assert isinstance(task, Task) and module.name == f"{__name__}.{task.name}", f"{module.name}: name of its TASK"
        found[task.name] = task
    return MappingProxyType(found)


TASKS: Mapping[str, Task] = _discover()


def get_task(name: str) -> Task:
    """Return the task called `name`. Raises UserError with the known names."""
    if name not in TASKS:
        raise UserError(f"--task {name!r} is unknown; the tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]
