"""End a run: write run_status.json, print the last line, and exit with status 0 only if the run finished.

The first rank that knows why a run fails reports the reason once. The other ranks use the same reason, and every rank
that can access the run folder may write the reason there. Each rank has a log file in the run folder. Rank 0 also
prints to the terminal. The other ranks print only a failure that they must report.
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

import torch
from torch.distributed import DistError, DistNetworkError

from megatron_tiedlora.base.files import Guard, make_way_for_log, new_file, unguarded
from megatron_tiedlora.base.installation import missing_module
from megatron_tiedlora.base.messages import UserError, show
from megatron_tiedlora.base.ownership import Owner
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.runtime import heartbeat
from megatron_tiedlora.runtime.heartbeat import Heartbeat, PeerFailure
from megatron_tiedlora.runtime.launch_env import first_to_fail, rank_and_world_size
from megatron_tiedlora.runtime.process_group import gpu_name, leave_process_group
from megatron_tiedlora.runtime.run_folder import LOGS_FOLDER, RunFolder, State
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests


class _Tee:
    """A text stream that also writes complete lines to a log, where only the last state of a progress bar appears.

    All other methods, such as `isatty`, are delegated to the terminal's stream.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen, self._log, self._line = screen, log, ""

    def write(self, text: str) -> int:
        """Write text to the terminal, and write complete lines to the log. Return the length of the text."""
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
        """Flush the terminal. The log needs no flush, because it is written line by line."""
        try:
            self._screen.flush()
        except OSError:
            self._leave_screen()

    def _leave_screen(self) -> None:
        """Write only to the log from now on, because the terminal is closed (for example its ssh connection)."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._screen.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)


class RankLog:
    """The output of a rank, which goes to the terminal, and inside `opened` to the rank's log file."""

    def __init__(self) -> None:
        self._log: TextIO | None = None
        self._screen: TextIO | None = None  # the terminal, for a rank whose output goes only to its log

    @contextmanager
    def opened(self, folder: Path, rank: int, *, guard: Guard = unguarded) -> Iterator[None]:
        """Append the output of the block to RUN/logs/rank_N.log. The output of rank 0 also goes to the terminal.

        The lines of an earlier launch are copied into a new file, so that a process of that launch cannot write to this
        log. On rank 0 the output of C libraries goes only to the terminal. If the file cannot be written, for example
        on a host without the run folder, the output goes only to the terminal.
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
        """Show `text` on the terminal and write it to the log."""
        with suppress(OSError):  # the terminal may be closed
            show(*text.split("\n"), file=sys.stderr)
        if self._screen is not None:
            with suppress(OSError):
                show(*text.split("\n"), file=self._screen)

    def note(self, text: str) -> None:
        """Write `text` only to the log. Without a log, the text is discarded."""
        if self._log is not None:
            with suppress(OSError, ValueError):  # the log is already closed
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
    """The state of a run that is needed to end it. Fields are set as soon as their values are known.

    Attributes:
        folder: the run folder if this rank can access it and this run has written its settings there, else None. The
            run folder is not changed as long as this is None.
        finished_step: a function that returns the number of the last finished step.
        first_step: the last step of earlier launches.
        unsaved: the end of the last printed line if a signal stops the run and nothing was saved.
        reason: why the run ended, if it did not fail.
        state, status: the state and the exit status of a run that did not raise.
        saved: as `unsaved`, if a signal stops the run after a step; by default, it says that the step was saved.
        owners: the owners of the folders that rank 0 writes to, in the order in which the folders were taken.
        held: the exit stack that releases these folders at the end of the run, in reverse order.
        gpu: the name of this rank's GPU in messages.
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
        """Return the number of the last finished step."""
        return self.finished_step()

    def watch_peers(self, timeout_minutes: float) -> None:
        """Start the heartbeat. From now on, a lost rank ends the run on every host. All ranks must call this."""
        if torch.cuda.is_initialized():  # the name is read now, because a failed GPU does not respond
            device = torch.device("cuda", torch.cuda.current_device())
            self.gpu = f"{device} ({gpu_name(device)})"
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
        """Start to write logs and the status into the run folder, which this run now owns. All ranks must call this.

        On another host, the path may be a different folder. The hash of run.yaml shows whether the folder is the same.
        """

        def digest(guard: Guard = unguarded) -> str:
            guard()
            return hashlib.sha256(folder.settings.read_bytes()).hexdigest() if folder.is_run else ""

        if decided_by_rank_0(partial(digest, folder.guard), kind=str) == digest():
            self.folder = folder
            with suppress(OSError):  # reserve disk space, which `record` frees to write the status on a full disk
                space = tempfile.TemporaryFile(dir=folder.path, buffering=0)  # noqa: SIM115  # closed by _reserve
                self._reserve.enter_context(space)
                space.write(bytes(_RESERVED_BYTES))
        guard = folder.guard if self.rank == 0 else unguarded  # on another host, the path may be a different folder
        self._open.enter_context(self.log.opened(folder.path, self.rank, guard=guard))

    def record(self, state: State, reason: str) -> None:
        """Write run_status.json if `folder` is set, so that a launch that fails early does not change the folder."""
        if self.folder is not None:
            self._reserve.close()
            self.folder.write_status(state, step=self.step, reason=reason)

    def stopped(self, stop: RunStopped) -> None:
        """End a run after all ranks agreed to stop, or after this rank got a signal before they could agree."""
        self.status, reason = stop.status, str(stop)
        if stop.signal_number == signal.SIGUSR1 and self.step <= self.first_step:
            # A job that is queued again without having made a step would be queued forever. Batch scripts detect this
            # by the status, or by the reason if torchrun's own status hides it.
            self.status, reason = FAILED_STATUS, f"{stop} before a step of this start"
        if self.rank == 0:
            self.record("stopped", reason)
            saved = f"{self.saved or f'saved at step {self.step}'}; continue with --resume auto"
            # `deepspeed` stops all ranks of a host when one fails, and the reason of that rank must be the last line.
            show = self.log.say if self.step or first_to_fail() else self.log.note
            show(f"stopped by {stop}, {saved if self.step else self.unsaved}")
        if self.heartbeat is not None:
            self.heartbeat.failed(f"stopped by {stop}")  # peers wait for this rank if only it got a signal
        self.leave()

    def leave(self) -> None:
        """Stop the heartbeat after a run that did not fail. Rank 0 writes all files and stops its heartbeat first."""
        if self.heartbeat is None:
            return
        if self.status and self.state == "finished":  # a signal: a launcher may end all ranks as soon as one has ended
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
        """Report why the run failed, unless another rank reports it. Return the exit status."""
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
        if lost or not failure.reports:  # this rank's traceback does not explain a peer's failure
            self.log.note(details)
            details = ""
        show = self.log.say if failure.reports else self.log.note
        show(f"{details}error: {text if isinstance(error, UserError) else failure.reason}")
        if self.heartbeat is not None:
            self.heartbeat.leave_failed()
        self._leave_folder()
        return REJECTED_STATUS if isinstance(error, UserError) else FAILED_STATUS

    def _lost(self, failure: PeerFailure) -> None:
        """Report a peer failure and end the process. The heartbeat's thread calls this while the main thread waits."""
        self._record_failure(failure.reason, again=self.rank == 0)
        show = self.log.say if failure.reports else self.log.note
        show(f"error: {failure.reason}")
        self._leave_folder()
        sys.stdout.flush()
        os._exit(FAILED_STATUS)

    def _leave_folder(self) -> None:
        """Release this rank's folders. If rank 0 is lost, give its folders up, because its process may still run."""
        self.held.close()
        if self.rank and self.heartbeat is not None and self.heartbeat.main_lost:
            for owner in self.owners:
                owner.give_up()

    def _record_failure(self, reason: str, *, again: bool = False) -> bool:
        """Write run_status.json. Return False if `folder` is None, or if the file exists and `again` is false."""
        if self.folder is None or (self.folder.status.exists() and not again):
            return False
        with suppress(UserError):  # the disk may be what failed; the first error is the one to report
            self.record("failed", reason)
        return True


@contextmanager
def reported_end() -> Iterator[End]:
    """Handle signals on this rank, and report how the block ended: it finished, was stopped by a signal, or failed.

    After a stop, no exception is raised (see `End.status`). A failure ends the process.

    Raises:
        SystemExit: the run failed, and this is its only rank.
        UserError: see `rank_and_world_size`.
    """
    rank, world_size = rank_and_world_size()
    stop = StopRequests()
    stop.install()
    end = End(rank, world_size, stop)
    with end.held, end._open, end._reserve:
        try:
            yield end
            if rank == 0:
                end.record(end.state, end.reason)
            end.leave()
            stop.ignore()  # a launcher that ends must not change the result now
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
