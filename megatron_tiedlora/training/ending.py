"""How a run ends, told truthfully: run_status.json, the last line on the screen, and the exit status."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.training.run_folder import RunFolder, State
from megatron_tiedlora.training.stopping import RunStopped, exit_status

if TYPE_CHECKING:  # imports DeepSpeed, for which signals need not wait
    from megatron_tiedlora.training.loop import Trainer


@dataclass
class End:
    """What is known of a run while it goes on; filled in as it becomes known.

    Attributes:
        folder: the run folder, once this run has written its settings there; until then it is left as it is.
        trainer: once there is one; knows the step.
        reason: of a good end.
        status: the exit status of a run that did not raise.
    """

    rank: int
    folder: RunFolder | None = None
    trainer: Trainer | None = None
    reason: str = ""
    status: int = 0

    def record(self, state: State, reason: str) -> None:
        """Write run_status.json, once the folder is this run's (a start that failed before that changes nothing)."""
        if self.folder is not None:
            step = self.trainer.progress.step if self.trainer is not None else 0
            self.folder.write_status(state, step=step, reason=reason)


@contextmanager
def reported_end(rank: int) -> Iterator[End]:
    """Report what ends the block: finished, stopped by a signal (swallowed; see `End.status`) or failed (raised)."""
    end = End(rank)
    try:
        yield end
        if rank == 0:
            end.record("finished", end.reason)
    except RunStopped as stop:
        end.status = exit_status(stop.signal_number)
        if rank == 0:
            end.record("stopped", str(stop))
            step = end.trainer.progress.step if end.trainer is not None else 0
            saved = f"saved at step {step}; go on with --resume auto" if step else "before the first step"
            print(f"stopped by {stop}, {saved}", file=sys.stderr)
    except BaseException as error:
        # Whichever rank fails first says why; a peer that then loses its connection only repeats that it failed.
        if end.folder is not None and not end.folder.status.exists():
            reason = f"rank {rank}: {type(error).__name__}: {error}" if str(error) else type(error).__name__
            with suppress(UserError):  # the disk may be what failed; the first error is the one to tell
                end.record("failed", reason)
        raise
