"""A launcher that has been started: stop its ranks, end it, and end what it leaves on this machine.

What a launcher started on other hosts is left to that launcher, and to the ranks, which notice its end and save.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from megatron_tiedlora.base.errors import UserError, one_line, show
from megatron_tiedlora.base.ownership import OWNER_FILE, Token, owner_in_words, read_token
from megatron_tiedlora.base.text_files import read_json_or_none, seen_late
from megatron_tiedlora.cluster.launchers import Job, StartPlan
from megatron_tiedlora.config.hosts import started_program
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.runtime.stopping import alive

POLL_SECONDS, _LOOK_SECONDS = 0.2, 5.0
_FORWARDS = ("srun", "mpirun", "prterun")  # SIGUSR1 to their ranks; on SIGTERM they give them no time to save


@dataclass(frozen=True)
class Times:
    """Time limits for the end of a job, in seconds."""

    grace: float = 120.0  # for ranks to save after their launcher has ended
    linger: float = 30.0  # for a launcher to end after the run has
    notice: float = 0.5  # for what it started here to end by itself then
    helper: float = 10.0  # for the processes on this machine after the run has ended, and after SIGTERM


def say(line: str) -> None:
    """Print a line of this command's own on stderr."""
    with suppress(OSError):
        show(f"tiedlora run: {line}", file=sys.stderr)


class RunningJob:
    """A job whose launcher was started on this machine in a session of its own, with all that it has started here.

    Args:
        options: of `Popen`: where output and errors go (by default to this command's own), descriptors to keep open.

    Raises:
        UserError: the launcher cannot be started.
    """

    def __init__(self, job: Job, plan: StartPlan, **options: Any) -> None:
        for path, text in plan.files.items():
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8")
        try:
            self.process = subprocess.Popen(
                plan.words,
                cwd=job.folder,
                env=dict(plan.environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the ranks only through us, once
                **options,
            )
        except OSError as error:
            raise UserError(f"{plan.words[0]}: cannot be started ({error.strerror or error})") from None
        self._job = job
        self._told: set[int] = set()
        self._seen: set[psutil.Process] = set()

    def here(self) -> list[psutil.Process]:
        """The processes that run on this machine, the launcher among them.

        pdsh gives its ssh a session of its own: that is found as its child, and after its end if it was found before.
        """
        launcher, found = self.process.pid, set[psutil.Process]()
        parents: dict[psutil.Process, int] = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # all of the session count as children of the launcher
                parents[process] = launcher if os.getsid(process.pid) == launcher else process.ppid()
        pids = {launcher}
        while new := {one for one, parent in parents.items() if parent in pids} - found:
            found |= new
            pids = {one.pid for one in new}
        self._seen = {process for process in self._seen | found if alive(process)}
        return list(self._seen)

    def ranks(self) -> list[psutil.Process]:
        """The ranks on this machine, without the processes that they have forked, to read data or to compile."""
        program = self._job.program[-1]
        found = {one.pid: one for one in self.here() if started_program(_read(one, "cmdline") or ()) == program}
        return [one for one in found.values() if _read(one, "ppid") not in found]

    def tell(self, processes: Sequence[psutil.Process], number: int) -> None:
        """Signal those of the processes that have not been told yet."""
        for process in processes:
            if process.pid not in self._told:
                with suppress(psutil.Error):
                    process.send_signal(number)
                self._told.add(process.pid)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the launcher and all that it has started on this machine."""
        for process in self.here():
            with suppress(psutil.Error):
                process.send_signal(number)

    def stop(self, number: int) -> None:
        """Tell the ranks to save and to stop. Call it until they have: some may just be starting.

        The launcher's own means are used: srun and mpirun pass SIGUSR1 on. Ranks on this machine get the signal itself.
        Those that ssh started stop when their connection ends.
        """
        forwarders = [one for one in self.here() if _read(one, "name") in _FORWARDS]
        if forwarders or self._job.route == "srun" or self._job.launcher == "mpirun":
            self.tell(forwarders, signal.SIGUSR1)
        elif self._job.route == "local":
            self.tell(self.ranks(), number)
        else:
            self.kill()


def _read(process: psutil.Process, name: str) -> Any:
    """What the method `name` says of a process; None if it is gone."""
    with suppress(psutil.Error):
        return getattr(process, name)()


@dataclass
class Watch:
    """Waits for the end of a job: of its launcher, of its run folder's owner, and of what it started on this machine.

    The first signal is passed on; a second Ctrl-C kills. Only Ctrl-C counts then: schedulers send SIGTERM twice.

    Attributes:
        status: of the run; a job that writes none ends with its launcher, and with what that has started here.
        show, say: called again and again, to show how far the job is; and with a line of this command's own.
        killed: whether the launcher, or what it had started here, was killed when its time was over.
    """

    running: RunningJob
    status: StatusFile
    signals: StopSignals
    times: Times
    show: Callable[[], None] = lambda: None
    say: Callable[[str], None] = say
    killed: bool = False

    def __post_init__(self) -> None:
        self._said: set[str] = set()
        self._run_ended = self._launcher_ended = float("inf")  # when, by the monotonic clock
        self._looked = 0.0

    def until_end(self) -> None:
        """Wait."""
        received = self.signals.received
        while not self._is_over():
            if received:
                name = signal.Signals(received[0]).name
                self._say_once(f"{name} is passed on; the job saves and ends (Ctrl-C again: kill)")
                self.running.stop(received[0])
            if signal.SIGINT in received[1:]:
                self._kill("killing all")
            self.show()
            time.sleep(POLL_SECONDS)

    def _is_over(self) -> bool:
        now, times = time.monotonic(), self.times
        if self.status.is_new():
            self._run_ended = min(self._run_ended, now)
        if self.running.process.poll() is None:
            if now - self._run_ended > times.linger:
                self._kill("the run has ended, but its launcher has not: killed")
            if now - self._looked > _LOOK_SECONDS:  # so that what it has started is known when it has ended
                self._looked = now
                self.running.here()
            return False
        self._launcher_ended = min(self._launcher_ended, now)
        is_late = now > min(self._launcher_ended + times.grace, self._run_ended + times.helper)
        is_awaited = self.status.is_awaited()  # asked each time, to see when the owner becomes silent
        if not self.running.here():
            return is_late or self.status.is_new() or not is_awaited
        if is_late:
            self._end()
        elif now - self._launcher_ended > times.notice and not self.status.is_new():
            self._say_once("the launcher has ended, but the job has not; it is told to save and to stop")
            self.running.stop(signal.SIGTERM)
        return is_late

    def _end(self) -> None:
        """End what is left on this machine."""
        left = ", ".join(f"{process.pid} ({_read(process, 'name')})" for process in self.running.here())
        self._kill(f"what is left of the job on this machine is ended: {left}", signal.SIGTERM)
        psutil.wait_procs(self.running.here(), timeout=self.times.helper)
        self.running.kill()

    def _kill(self, line: str, number: int = signal.SIGKILL) -> None:
        self._say_once(line)
        self.killed = True
        self.running.kill(number)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.say(line)


# Signals --------------------------------------------------------------------------------------------------------------


class StopSignals:
    """Inside `with`, record SIGINT, SIGTERM and `more` in the order of their arrival, and do nothing else with them.

    SIGHUP (the terminal has closed) counts as SIGTERM, unless it is ignored, as under nohup.
    """

    def __init__(self, more: Sequence[int] = ()) -> None:
        self._numbers = (signal.SIGINT, signal.SIGTERM, *more)
        self.received: list[int] = []
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in (*self._numbers, *(() if ignored else (signal.SIGHUP,))):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        self.received.append(int(signal.SIGTERM) if number == signal.SIGHUP else number)

    def _leave_terminals(self) -> None:
        """Discard what is printed from now on: printing to a closed terminal would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


# How it ended ---------------------------------------------------------------------------------------------------------


Stamp = tuple[int, int, int]
LATE_SECONDS = 3.0  # until a status that was written on another host is visible here
_SILENT_SECONDS = 25.0  # an owner that has not renewed its token for so long is dead; it does so every 10 seconds


@dataclass(frozen=True)
class Verdict:
    """The exit status of tiedlora run and the line that explains it.

    Attributes:
        state: of the run, as its status file says; '' if there is none of this start.
    """

    status: int
    line: str
    state: str = ""


class StatusFile:
    """run_status.json of this start; ranks remove an earlier one when they take the folder.

    Args:
        start: the START_ID of its ranks. What is written while the folder has another owner is not theirs.
    """

    def __init__(self, folder: RunFolder, start: str = "") -> None:
        self.folder, self._start = folder, start
        self._before, self.is_of_another = stamp(folder.status), False
        self._renewed: tuple[Stamp | None, float] = (None, 0.0)  # the owner's token, and when it was seen to change
        self._token()

    def _token(self) -> Token | None:
        """The owner's token if it is of this start."""
        token = read_token(self.folder.path / OWNER_FILE)
        if token is not None:  # of two owners the last one counts: this start takes a folder over, or loses it
            self.is_of_another = token.job != self._start
        return None if self.is_of_another else token

    def is_new(self) -> bool:
        """Whether this start has written the file."""
        self._token()
        return not self.is_of_another and stamp(self.folder.status) not in (None, self._before)

    def has_begun(self) -> bool:
        """Whether a rank of this start has taken the folder: the settings, the hosts and the model were right."""
        return self.is_new() or self._token() is not None

    def is_awaited(self) -> bool:
        """Whether a rank may still write it: it owns the folder, and is not known to be dead and not silent."""
        seen, now = stamp(self.folder.path / OWNER_FILE), time.monotonic()
        if seen != self._renewed[0]:
            self._renewed = seen, now
        is_owned = self._token() is not None and owner_in_words(self.folder.path) is not None
        return is_owned and now - self._renewed[1] < _SILENT_SECONDS

    def read(self) -> Mapping[str, Any] | None:
        """The file's content if this start has written it; None otherwise."""
        return read_json_or_none(self.folder.status) if self.is_new() else None


def stamp(file: Path) -> Stamp | None:
    """What changes when a file is written or replaced; None if it is not there."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def judge(
    file: StatusFile, *, launcher: str, launcher_status: int, passed_on: int, late_seconds: float = LATE_SECONDS
) -> Verdict:
    """Status 0 if the run finished or was stopped by the signal that was passed on; else the launcher's status, or 1.

    Args:
        launcher_status: the launcher's exit status; -N if signal N killed it.
        passed_on: the signal that this command received, 0 for none.
        late_seconds: how long a status that is missing is waited for.
    """
    path = file.folder.path
    signals = {-number: number.name for number in signal.Signals}
    ended = f"{launcher} ended with {signals.get(launcher_status, f'status {launcher_status}')}"
    failed = launcher_status if launcher_status > 0 else 128 - launcher_status if launcher_status else 1
    content = file.read() if launcher_status else seen_late(file.read, path, seconds=late_seconds)
    if content is None:
        if not path.is_dir():
            why = f"{path} is not visible on this host: it was rejected, as the ranks say above, or is elsewhere"
        elif file.is_of_another:
            why = f"{path} belongs to another start"
        else:
            why = f"{path} does not say how this start ended"
        return Verdict(failed, f"{why}; {ended}")
    state, step, reason = content.get("state"), content.get("step"), content.get("reason")
    line = one_line(f"{path}: {state} at step {step} ({reason})")
    if state == "finished" or (state == "stopped" and passed_on):
        return Verdict(0, line, str(state))
    return Verdict(failed, f"{line}; {ended}", str(state))
