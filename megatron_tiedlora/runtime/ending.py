"""How a run ends: run_status.json, the last line on the screen, and the exit status, which is 0 only if it finished.

The first rank to know why a run fails reports it, once. Its peers give the same reason, and any remaining rank that
sees the run folder writes it down. Each rank has a log file in the run folder; rank 0 also prints to the screen, and
the others only what they must report.
"""

import hashlib
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

from torch.distributed import DistError, DistNetworkError

from megatron_tiedlora.base.files import Guard, make_way_for_log, new_file, unguarded
from megatron_tiedlora.base.messages import UserError, missing_module, show
from megatron_tiedlora.base.ownership import Owner
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.runtime import heartbeat
from megatron_tiedlora.runtime.heartbeat import Heartbeat, PeerFailure
from megatron_tiedlora.runtime.launch_env import first_to_fail
from megatron_tiedlora.runtime.process_group import leave_process_group, own_gpu
from megatron_tiedlora.runtime.run_folder import LOGS_FOLDER, RunFolder, State
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests, exit_status


class _Tee:
    """A text stream that also writes whole lines to a log; of a progress bar, only the last state of its line.

    Everything else that a stream can do, such as `isatty`, is delegated to the screen.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen, self._log, self._line = screen, log, ""

    def write(self, text: str) -> int:
        """Write to the screen, and write complete lines to the log."""
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line.rpartition("\r")[2] if len(self._line) > 1 << 16 else self._line
        with suppress(OSError, ValueError):  # a full disk must not end the run because of a log line
            self._log.writelines(f"{line.rstrip(chr(13)).rpartition(chr(13))[2]}\n" for line in lines)
        try:
            self._screen.write(text)
        except OSError:
            self._leave_screen()
        return len(text)

    def flush(self) -> None:
        """Flush the screen; the log is written line by line."""
        try:
            self._screen.flush()
        except OSError:
            self._leave_screen()

    def _leave_screen(self) -> None:
        """The screen is gone, for example its ssh connection: do not fail, and continue the log."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._screen.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)


class RankLog:
    """Sends a rank's output to the screen, and inside `opened` to the rank's file."""

    def __init__(self) -> None:
        self._log: TextIO | None = None
        self._screen: TextIO | None = None  # the screen of a rank whose output goes only to its log

    @contextmanager
    def opened(self, folder: Path, rank: int, *, guard: Guard = unguarded) -> Iterator[None]:
        """Inside, append the output to RUN/logs/rank_N.log; rank 0's output also goes to the screen.

        An earlier start's lines are copied into a new file, so that an earlier process that still runs cannot add to
        this start's log. Output of C libraries appears only on rank 0's screen. If the file cannot be written (a run
        folder that only rank 0 sees may be read-only elsewhere), nothing changes.
        """
        file = folder / LOGS_FOLDER / f"rank_{rank}.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            make_way_for_log(file)
            if file.is_file():
                with new_file(file, guard=guard) as copy:
                    shutil.copyfile(file, copy)
            log = file.open("a", encoding="utf-8", errors="replace", buffering=1)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"--- {now} rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
        except (OSError, UserError):
            yield
            return
        self._log = log
        with log, self._teed(log) if rank == 0 else self._moved(log):
            yield

    def say(self, text: str) -> None:
        """Show `text` on the screen and write it to the log."""
        with suppress(OSError):  # the screen may be gone
            show(*text.split("\n"), file=sys.stderr)
        if self._screen is not None:
            with suppress(OSError):
                show(*text.split("\n"), file=self._screen)

    def note(self, text: str) -> None:
        """Write `text` to the log only; without a log it is lost."""
        if self._log is not None:
            with suppress(OSError, ValueError):  # closed already
                self._log.write(f"{text}\n")

    @contextmanager
    def _teed(self, log: TextIO) -> Iterator[None]:
        out, err = (cast("TextIO", _Tee(screen, log)) for screen in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            yield

    @contextmanager
    def _moved(self, log: TextIO) -> Iterator[None]:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        try:
            with os.fdopen(os.dup(kept[1]), "w", encoding="utf-8", errors="replace") as self._screen:
                yield
        finally:
            self._screen = None
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)


FAILED_STATUS, REJECTED_STATUS = 1, 2
_RESERVED_BYTES = 1 << 16


@dataclass
class End:
    """The facts about a running run that its end needs; filled in as they become known.

    Attributes:
        folder: the run folder, once this run has written its settings there and if this rank sees it; before that the
            folder is not touched.
        finished_step: returns the number of the last finished step.
        first_step: the last step of earlier starts.
        unsaved: what to report if a signal arrives and nothing was saved.
        reason: the reason of a good end.
        state, status: the state and the exit status of a run that did not raise.
        saved: what to report if a signal arrives after a step and the step alone does not say it.
        owners: of the folders that rank 0 writes to, as they are taken.
        held: gives these folders back when the run ends, the one that was taken first last.
        gpu: this rank's GPU as text.
    """

    rank: int
    world_size: int
    stop: StopRequests
    folder: RunFolder | None = None
    finished_step: Callable[[], int] = lambda: 0
    first_step: int = 0
    unsaved: str = "before the first step"
    reason: str = ""
    state: State = "finished"
    status: int = 0
    saved: str = ""
    heartbeat: Heartbeat | None = None
    owners: list[Owner] = field(default_factory=list)
    held: ExitStack = field(default_factory=ExitStack)
    gpu: str = ""
    log: RankLog = field(default_factory=RankLog)
    _open: ExitStack = field(default_factory=ExitStack)
    _reserve: ExitStack = field(default_factory=ExitStack)

    @property
    def step(self) -> int:
        """The last finished step."""
        return self.finished_step()

    def watch_peers(self, timeout_minutes: float) -> None:
        """Start the heartbeat: from now on a lost rank ends the run on every host; all ranks take part."""
        self.gpu = own_gpu()  # read now, because a failed GPU does not answer
        if self.world_size > 1:
            limit = timedelta(minutes=timeout_minutes)
            self.heartbeat = Heartbeat(
                heartbeat.connect(limit=limit),
                self.rank,
                self.world_size,
                step=lambda: self.step,
                on_failure=self._lost,
                reports_for_host=first_to_fail,
                silence_seconds=min(heartbeat.SILENCE_SECONDS, limit.total_seconds()),
            ).start()

    def enter(self, folder: RunFolder) -> None:
        """The run folder belongs to this run now: write logs and the status there. All ranks take part.

        On another host it may be a different folder of the same name; the content of run.yaml tells them apart.
        """

        def digest(guard: Guard = unguarded) -> str:
            guard()
            return hashlib.sha256(folder.settings.read_bytes()).hexdigest() if folder.is_run else ""

        if decided_by_rank_0(partial(digest, folder.guard), kind=str) == digest():
            self.folder = folder
            with suppress(OSError):  # freed before the status is written, because a full disk may be what ends the run
                space = tempfile.TemporaryFile(dir=folder.path, buffering=0)  # noqa: SIM115  # closed by _reserve
                self._reserve.enter_context(space)
                space.write(bytes(_RESERVED_BYTES))
        guard = folder.guard if self.rank == 0 else unguarded  # others may have another folder of this name
        self._open.enter_context(self.log.opened(folder.path, self.rank, guard=guard))

    def record(self, state: State, reason: str) -> None:
        """Write run_status.json if the folder belongs to this run; a start that fails earlier changes nothing."""
        if self.folder is not None:
            self._reserve.close()
            self.folder.write_status(state, step=self.step, reason=reason)

    def stopped(self, stop: RunStopped) -> None:
        """All ranks have agreed to stop, or this one got a signal before the ranks could agree."""
        self.status, reason = exit_status(stop.signal_number), str(stop)
        if stop.signal_number == signal.SIGUSR1 and self.step <= self.first_step:
            # A job that returns to the queue without having made a step would return forever. Batch scripts see that in
            # the status, or in the reason if torchrun's own status hides it.
            self.status, reason = FAILED_STATUS, f"{stop} before a step of this start"
        if self.rank == 0:
            self.record("stopped", reason)
            saved = f"{self.saved or f'saved at step {self.step}'}; continue with --resume auto"
            # `deepspeed` stops all ranks of a host as one fails, and that one's reason is the last thing to read.
            show = self.log.say if self.step or first_to_fail() else self.log.note
            show(f"stopped by {stop}, {saved if self.step else self.unsaved}")
        if self.heartbeat is not None:
            self.heartbeat.failed(f"stopped by {stop}")  # if only this rank got a signal, its peers wait for it
        self.leave()

    def leave(self) -> None:
        """Leave after a good end or an agreed stop; rank 0 leaves first, when it has written all files."""
        if self.heartbeat is None:
            return
        if self.status and self.state == "finished":  # stopped: a launcher may end all ranks as soon as one has ended
            self.heartbeat.wait_for_main()
            self.heartbeat.leave()
            self.heartbeat.wait_for_others()
            return
        with self.stop.deferred():  # rank 0 decides whether the run is stopped now
            try:
                self.heartbeat.leave_with_main()
            except DistNetworkError:  # rank 0 was killed
                raise
            except DistError:
                self.stop.raise_if_requested()
                raise

    def failed(self, error: BaseException) -> int:
        """Report why the run failed, or leave that to the rank that knows; returns the exit status."""
        self.stop.ignore()  # a launcher signals the other ranks as soon as one has ended
        if isinstance(error, ModuleNotFoundError):
            error = missing_module(error) or error
        text = str(error) or type(error).__name__
        own = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        lost = self.heartbeat is not None and heartbeat.is_lost_exchange(error)
        if self.heartbeat is not None and lost:
            own = self.heartbeat.with_names(heartbeat.lost_exchange_line(error))
        if said := heartbeat.gpu_failure_line(error):
            own = f"{self.gpu}: {said}" if self.gpu else said
        here = heartbeat.rank_line(self.rank, socket.gethostname(), self.step, own)
        writes = self._record_failure(here)  # at once, because a launcher may give this rank only a second
        if self.heartbeat is None:
            failure = PeerFailure(here, first_to_fail())
        else:
            is_own = not lost and not (isinstance(error, UserError) and error.of_peer)
            failure = self.heartbeat.failed(own) if is_own else self.heartbeat.explain(own)
        if writes:
            self._record_failure(failure.reason, again=True)
        details = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        if lost or not failure.reports:  # this rank's traceback says nothing about a peer's failure
            self.log.note(details)
            details = ""
        self._show(failure, f"{details}error: {text if isinstance(error, UserError) else failure.reason}")
        if self.heartbeat is not None:
            self.heartbeat.leave_failed()
        self._leave_folder()
        return REJECTED_STATUS if isinstance(error, UserError) else FAILED_STATUS

    def _lost(self, failure: PeerFailure) -> None:
        """Runs in the heartbeat's thread: the main thread waits for a lost peer and cannot be woken."""
        self._record_failure(failure.reason, again=self.rank == 0)
        self._show(failure, f"error: {failure.reason}")
        self._leave_folder()
        sys.stdout.flush()
        os._exit(FAILED_STATUS)

    def _leave_folder(self) -> None:
        """Rank 0 gives its folders back; if rank 0 is lost, the others revoke them, in case rank 0 still runs."""
        self.held.close()
        if self.rank and self.heartbeat is not None and self.heartbeat.main_lost:
            for owner in self.owners:
                owner.give_up()

    def _show(self, failure: PeerFailure, text: str) -> None:
        """Show `text` on the screen if this rank reports for all; otherwise write it to its log only."""
        tell = self.log.say if failure.reports else self.log.note
        tell(text)

    def _record_failure(self, reason: str, *, again: bool = False) -> bool:
        """Write the status unless a peer has (or `again`, with a better reason); returns whether this rank did."""
        if self.folder is None or (self.folder.status.exists() and not again):
            return False
        with suppress(UserError):  # the disk may be what failed; the first error is the one to report
            self.record("failed", reason)
        return True


@contextmanager
def reported_end(rank: int, world_size: int, stop: StopRequests) -> Iterator[End]:
    """Report what ends the block: finished, or stopped by a signal (swallowed; see `End.status`), or failed.

    A failure is reported and ends the process.

    Raises:
        SystemExit: the run failed and this is its only rank.
    """
    end = End(rank, world_size, stop)
    with end.held, end._open, end._reserve:
        try:
            yield end
            if rank == 0:
                end.record(end.state, end.reason)
            end.leave()
            stop.ignore()  # a launcher that ends must not change the result any more
            leave_process_group()
        except RunStopped as stopped:
            end.stopped(stopped)
        except BaseException as error:
            status = end.failed(error)
            if world_size > 1:  # skip the libraries' exit handlers, which may wait for lost peers
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            raise SystemExit(status) from None
