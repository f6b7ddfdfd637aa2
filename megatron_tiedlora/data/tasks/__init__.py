"""Collects the tasks. Every module in this folder defines one task as `TASK`. The module has the name of the task."""

from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.settings import TASK_NAMES
from megatron_tiedlora.data.task import Task

TASKS: Mapping[str, Task] = MappingProxyType({name: import_module(f"{__name__}.{name}").TASK for name in TASK_NAMES})
assert all(task.name == name for name, task in TASKS.items()), "a task has the name of its file"


def get_task(name: str) -> Task:
    """Return the task with the name `name`. Raises UserError, which lists the tasks, if there is no such task."""
    if name not in TASKS:
        raise UserError(f"--task {name!r} is unknown; use one of {', '.join(sorted(TASKS))}")
    return TASKS[name]
