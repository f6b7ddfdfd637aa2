"""How a run ends, told truthfully: run_status.json, the last line on the screen, and the exit status.

Whichever rank knows first why a run fails says so, once; its peers give the same reason, and whoever of them is left
and sees the run folder writes it down.
"""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, DistNetworkError

from megatron_tiedlora.base.atomic import unguarded
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import Owner
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.runtime.heartbeat import (
    SILENCE_SECONDS,
    Heartbeat,
    PeerFailure,
    connect,
    gpu_failure_line,
    is_lost_exchange,
    lost_exchange_line,
    place_line,
)
from megatron_tiedlora.runtime.launch_env import first_to_fail
from megatron_tiedlora.runtime.process_group import leave_process_group, own_gpu
from megatron_tiedlora.runtime.rank_log import RankLog
from megatron_tiedlora.runtime.run_folder import RunFolder, State
from megatron_tiedlora.runtime.stopping import RunStopped, StopWatch, exit_status

FAILED_STATUS, REFUSED_STATUS = 1, 2
_RESERVED_BYTES = 1 << 16


@dataclass
class End:
    """What is known of a run while it goes on; filled in as it becomes known.

    Attributes:
        folder: the run folder, once this run has written its settings there and if this rank sees it; until then it is
            left as it is.
        finished_step: gives the number of the last finished step.
        first_step: the last step of earlier starts.
        unsaved: what to say where a signal came and nothing was saved.
        reason: of a good end.
        status: the exit status of a run that did not raise.
        owner: of the folder that rank 0 writes to, once it is chosen.
        release: gives back the folder that rank 0 writes to.
        gpu: of this rank, in words.
    """

    rank: int
    world_size: int
    stop: StopWatch
    folder: RunFolder | None = None
    finished_step: Callable[[], int] = lambda: 0
    first_step: int = 0
    unsaved: str = "before the first step"
    reason: str = ""
    status: int = 0
    heartbeat: Heartbeat | None = None
    owner: Owner | None = None
    release: Callable[[], None] | None = None
    gpu: str = ""
    log: RankLog = field(default_factory=RankLog)
    _open: ExitStack = field(default_factory=ExitStack)
    _reserve: ExitStack = field(default_factory=ExitStack)

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.finished_step()

    def watch_peers(self, timeout_minutes: float) -> None:
        """From here on a rank that falls silent ends the run on every host; all ranks take part."""
        self.gpu = own_gpu()  # now: a GPU that has failed answers nothing
        if self.world_size > 1:
            limit = timedelta(minutes=timeout_minutes)
            silence = min(SILENCE_SECONDS, limit.total_seconds())
            self.heartbeat = Heartbeat(
                connect(limit=limit),
                self.rank,
                self.world_size,
                step=lambda: self.step,
                on_failure=self._lost,
                reports_for_host=first_to_fail,
                silence_seconds=silence,
            ).start()

    def hold(self, release: Callable[[], None]) -> None:
        """Rank 0 owns the folder that it writes to until its end, when it calls `release`."""
        self.release = release

    def give_back(self) -> None:
        """The folder is free for another start."""
        if self.release is not None:
            self.release()

    def enter(self, folder: RunFolder) -> None:
        """The run folder is this run's now: keep a log there, and the end. All ranks take part.

        On other hosts it may be another folder of the same name: theirs is told by what run.yaml holds.
        """

        def digest() -> str:
            return hashlib.sha256(folder.settings.read_bytes()).hexdigest() if folder.is_run else ""

        def digest_of_owner() -> str:
            folder.guard()
            return digest()

        if decided_by_rank_0(digest_of_owner, kind=str) == digest():
            self.folder = folder
            with suppress(OSError):  # given back before the status is written: a full disk may be what ends the run
                self._reserve.enter_context(_space(folder.path))
        guard = folder.guard if self.rank == 0 else unguarded  # others may not see the folder, and have one of its name
        self._open.enter_context(self.log.kept(folder.path, self.rank, guard=guard))

    def record(self, state: State, reason: str) -> None:
        """Write run_status.json, once the folder is this run's (a start that failed before that changes nothing)."""
        if self.folder is not None:
            self._reserve.close()
            self.folder.write_status(state, step=self.step, reason=reason)

    def stopped(self, stop: RunStopped) -> None:
        """All ranks have agreed to stop, or this one was told to before there was anything to agree on."""
        self.status, reason = exit_status(stop.signal_number), str(stop)
        if stop.signal_number == signal.SIGUSR1 and self.step <= self.first_step:
            # A job that is put back into the queue without a step would come back for ever. Batch scripts are told by
            # the status, or by the reason where torchrun's own status hides it.
            self.status, reason = FAILED_STATUS, f"{stop} before a step of this start"
        if self.rank == 0:
            self.record("stopped", reason)
            saved = f"saved at step {self.step}; go on with --resume auto" if self.step else self.unsaved
            self.log.say(f"stopped by {stop}, {saved}")
        if self.heartbeat is not None:
            self.heartbeat.failed(f"stopped by {stop}")  # for peers that wait for this one, where it was told alone
        self.leave()
        self.stop.end_agent()

    def leave(self) -> None:
        """A good end, or one that all agreed on; rank 0 leaves first, since it has written what there is to write."""
        if self.heartbeat is None:
            return
        if self.status:  # a launcher may end all as soon as one has
            self.heartbeat.await_main()
            self.heartbeat.leave()
            self.heartbeat.await_others()
            return
        with self.stop.deferred():  # whether the run is stopped now is for rank 0 to say
            try:
                self.heartbeat.leave_after_main()
            except DistNetworkError:  # rank 0 was killed
                raise
            except DistError:
                self.stop.raise_if_wished()
                raise

    def failed(self, error: BaseException) -> int:
        """Say why, or leave it to the rank that knows; returns the exit status."""
        self.stop.ignore()  # a launcher tells the others to stop as soon as one has ended
        text = str(error) or type(error).__name__
        own = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        lost = self.heartbeat is not None and is_lost_exchange(error)
        if self.heartbeat is not None and lost:
            own = self.heartbeat.with_names(lost_exchange_line(error))
        if said := gpu_failure_line(error):
            own = f"{self.gpu}: {said}" if self.gpu else said
        here = place_line(self.rank, socket.gethostname(), self.step, own)
        writes = self._record_failure(here)  # at once: a launcher may give this rank a second only
        if self.heartbeat is None:
            failure = PeerFailure(here, first_to_fail())
        else:
            tells = not lost and not (isinstance(error, UserError) and error.of_peer)
            failure = self.heartbeat.failed(own) if tells else self.heartbeat.explain(own)
        if writes:
            self._record_failure(failure.reason, again=True)
        details = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        if lost or not failure.reports:  # a peer's end, of which this rank's traceback says nothing
            self.log.note(details)
            details = ""
        self._show(failure, f"{details}error: {text if isinstance(error, UserError) else failure.reason}")
        if self.heartbeat is not None:
            self.heartbeat.part()
        self._leave_folder()
        return REFUSED_STATUS if isinstance(error, UserError) else FAILED_STATUS

    def _lost(self, failure: PeerFailure) -> None:
        """In the heartbeat's thread: the main one waits for a peer that is gone, and cannot be woken."""
        self._record_failure(failure.reason, again=self.rank == 0)
        self._show(failure, f"error: {failure.reason}")
        self._leave_folder()
        sys.stdout.flush()
        os._exit(FAILED_STATUS)

    def _leave_folder(self) -> None:
        """Rank 0 gives the folder back; where it is gone the others give it up, in case that it is only silent."""
        self.give_back()
        if self.rank and self.owner is not None and self.heartbeat is not None and self.heartbeat.main_lost:
            self.owner.give_up()

    def _show(self, failure: PeerFailure, text: str) -> None:
        """On the screen where this rank reports for all, else in its log alone."""
        if failure.reports:
            self.log.say(text)
        else:
            self.log.note(text)

    def _record_failure(self, reason: str, *, again: bool = False) -> bool:
        """Write it down unless a peer has, or again with a better reason; whether this rank did."""
        if self.folder is None or (self.folder.status.exists() and not again):
            return False
        with suppress(UserError):  # the disk may be what failed; the first error is the one to tell
            self.record("failed", reason)
        return True


@contextmanager
def _space(folder: Path) -> Iterator[None]:
    """Hold a little of the disk, in a file without a name."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(bytes(_RESERVED_BYTES))
        yield


@contextmanager
def reported_end(rank: int, world_size: int, stop: StopWatch) -> Iterator[End]:
    """Report what ends the block: finished, or stopped by a signal (swallowed; see `End.status`), or failed.

    Where it failed, that is said, and the process ends.

    Raises:
        SystemExit: failed, as the only rank.
    """
    end = End(rank, world_size, stop)
    with ExitStack() as last, end._open, end._reserve:
        last.callback(end.give_back)
        try:
            yield end
            if rank == 0:
                end.record("finished", end.reason)
            end.leave()
            stop.ignore()  # what is decided is not to be changed by a launcher that ends
            leave_process_group()
        except RunStopped as stopped:
            end.stopped(stopped)
        except BaseException as error:
            status = end.failed(error)
            if world_size > 1:  # not through the libraries' own ends, which may wait for peers that are gone
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            raise SystemExit(status) from None
