"""Training from Python, in this process."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.hosts import RANK_VARIABLES
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.launch_env import prepare_environment
from megatron_tiedlora.runtime.process_group import leave_process_group
from megatron_tiedlora.runtime.stopping import STOP_SIGNALS
from megatron_tiedlora.training.run import train_rank


@dataclass(frozen=True)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: the run folder.
        adapter: the folder of its best adapter, for `load_adapter`.
        step: the last step.
        reason: why it ended: max_steps or early_stopping.
    """

    folder: Path
    adapter: Path
    step: int
    reason: str


def train(settings: Settings) -> TrainedRun:
    """Train in this process: the run of `tiedlora train`, with the same output and the same files.

    Without a launcher it is one rank; under one, every rank calls it. Variables that start a rank and the handlers of
    signals are as before when it returns.

    Raises:
        UserError: a setting does not fit, or the run was rejected.
        KeyboardInterrupt: the run was stopped by Ctrl-C; it can be resumed.
        RuntimeError: it was stopped by another signal.
        Exception: whatever else ended it.
    """
    require_extra("train")
    if settings.dry_run:
        raise UserError("dry_run trains nothing; use the command: tiedlora train --dry_run")
    if settings.adapters is not None:
        raise UserError("adapters trains several together; use the command: tiedlora train --adapters FILE")
    with _restored_process():
        prepare_environment()
        try:
            end = train_rank(settings)
        except SystemExit as failed:
            if failed.__context__ is None:
                raise
            raise failed.__context__ from None  # it was reported, and the command would end with its status
    if end.status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if end.status or end.folder is None:
        raise RuntimeError(f"the run was stopped (status {end.status})")
    return TrainedRun(end.folder.path, end.folder.adapter, end.step, end.reason)


@contextmanager
def _restored_process() -> Iterator[None]:
    """Undo what a run changes in its process: the variables of a rank, the handlers of signals, the process group."""
    variables = {name: os.environ.get(name) for name in RANK_VARIABLES}
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        leave_process_group()
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
        for number, handler in handlers.items():
            signal.signal(number, handler)
