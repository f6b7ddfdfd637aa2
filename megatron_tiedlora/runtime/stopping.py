"""Stop all ranks together, on a signal or when a launcher has died.

A rank that should stop must not exit while other ranks wait for it in a collective. So a stop request is only recorded
here, and the ranks stop after they have agreed in a reduction.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

import psutil

from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.runtime.launch_env import deepspeed_runner, is_torchrun

# Slurm sends SIGUSR1 some time before a job's limit (`#SBATCH --signal=USR1@120`).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# After a longer step the ranks agree on stopping after every micro-batch, to react within a signal's grace time.
LONG_STEP_SECONDS = 10.0
# The parent processes of ranks under mpirun and srun.
_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "slurmstepd")


class RunStopped(BaseException):
    """The exception that stops a run after a signal. `status` is the exit status: 130 for SIGINT, 143 for SIGTERM.

    Like KeyboardInterrupt, it is not an Exception, so that code that handles errors does not catch it.
    """

    def __init__(self, signal_number: int, reason: str) -> None:
        super().__init__(reason)
        self.signal_number, self.status = signal_number, 128 + signal_number


def launcher_processes() -> list[psutil.Process]:
    """Return the launcher processes of this rank. If one of them dies, the run must stop.

    A local `deepspeed` process dies on a signal, but its per-node launcher and the ranks continue. So both processes
    are returned. If ssh started the launcher, its sshd session is returned, because it ends with the connection. The
    agent of torchrun and the daemons of mpirun and srun are returned too. Other parents, such as a shell, are not.
    """
    with suppress(psutil.Error):  # a process has just died
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent else []
        if parent and "deepspeed.launcher.launch" in " ".join(words):
            runner = deepspeed_runner()
            return [parent, *([runner] if runner else _ssh_sessions(parent))]
        if parent and (is_torchrun(words) or parent.name().startswith(_LAUNCHERS)):
            return [parent]
    return []


def _ssh_sessions(process: psutil.Process) -> list[psutil.Process]:
    """Return the sshd session whose command started `process`, or [] if a user started it in a login shell.

    sshd runs a command as `SHELL -c COMMAND`. A login shell has no `-c`.
    """
    for ancestor in process.parents():
        if ancestor.name().startswith("sshd"):
            return [ancestor] if ancestor.pid > 1 else []
        if "-c" not in ancestor.cmdline()[1:2]:
            break
    return []


class StopVotes(NamedTuple):
    """The values that `StopRequests.agree` sums over all ranks, in fp64."""

    missing: float  # number of ranks on which the condition is false
    stopping: float  # number of ranks that should stop
    signals: float  # sum of these ranks' signal numbers


class StepVotes(NamedTuple):
    """The values that a training step sums over all ranks in fp64 before the update, besides two values per adapter."""

    seconds: float  # time of the forward and backward passes
    save_due: float  # whether rank 0 wants a checkpoint after this step
    failed: float  # whether rank 0 has a failure to raise
    stopping: float  # as in StopVotes
    signals: float


@dataclass
class StopRequests:
    """The stop requests of this rank. A signal raises RunStopped immediately, except inside `deferred()`.

    Only the first signal counts, because an interrupted launcher sends a second signal while its ranks end.
    """

    launchers: list[psutil.Process] = field(default_factory=launcher_processes)
    _signal: int = 0
    _deferred: bool = False
    _stopping: bool = False

    def install(self) -> None:
        """Install the handlers for SIGINT, SIGTERM and SIGUSR1 in this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block, and then restore the previous handlers, unless the run was stopped."""
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.install()
        try:
            yield
        finally:
            if not self._stopping:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if not self._deferred and not self._stopping:
            self.raise_if_requested()

    def stopped(self, number: int, reason: str) -> RunStopped:
        """Return the exception that stops the run, and ignore further signals so that the run can end."""
        self.ignore()
        return RunStopped(number, reason)

    def ignore(self) -> None:
        """Ignore signals from now on, because the run is already ending.

        The kernel must ignore them, because Python removes its handlers before the process ends. When a rank fails,
        `srun --kill-on-bad-exit` sends a signal to the other ranks, and would return the status of a killed rank.
        """
        self._stopping = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_if_requested(self) -> None:
        """Raise RunStopped if this rank should stop. Call this only where no other rank waits for this rank."""
        if number := self.requested_signal():
            raise self.stopped(number, signal.Signals(number).name)

    def stop_if_any(self, count: float, total: float) -> None:
        """Raise RunStopped if `count`, the number of ranks that should stop, is not 0. `total` is the sum of their
        signal numbers. All ranks must call this with the same values.

        If the ranks got different signals, SIGTERM is used. At least one signal was then not SIGUSR1, the signal for
        the time limit, so the job must not be queued again.
        """
        if count:
            shared = next((number for number in STOP_SIGNALS if total == count * number), None)
            if shared is None:
                raise self.stopped(signal.SIGTERM, "signals")
            raise self.stopped(shared, "SIGTERM or the launcher's end" if shared == signal.SIGTERM else shared.name)

    def agree(self, mine: bool) -> bool:
        """Return whether `mine` is true on every rank. All ranks must call this.

        Raises:
            RunStopped: at least one rank should stop. All ranks raise this exception.
        """
        requested = self.requested_signal()
        votes = StopVotes(*sum_over_ranks(StopVotes(float(not mine), float(requested > 0), float(requested))))
        self.stop_if_any(votes.stopping, votes.signals)
        return votes.missing == 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals inside the block. The ranks must then agree on `requested_signal()`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def requested_signal(self) -> int:
        """Return the signal that requested a stop (SIGTERM if the rank's launcher died), or 0 if there is none."""
        if not self._signal and any(not alive(process) for process in self.launchers):
            self._signal = signal.SIGTERM
        return int(self._signal)


def alive(process: psutil.Process) -> bool:
    """Return whether the process still runs. A zombie process does not run."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class StopSignals(ExitStack):
    """A context in which SIGINT, SIGTERM and SIGUSR1 are only recorded, in the order of their arrival.

    SIGHUP, which is sent when the terminal is closed, is recorded as SIGTERM. Under nohup, SIGHUP is ignored.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: list[int] = []

    def __enter__(self) -> "StopSignals":
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

        def note(number: int, _frame: FrameType | None) -> None:
            if number == signal.SIGHUP:  # printing to a closed terminal would be an error
                nowhere = os.open(os.devnull, os.O_WRONLY)
                for descriptor in terminals:
                    os.dup2(nowhere, descriptor)
                os.close(nowhere)
            self.received.append(int(signal.SIGTERM) if number == signal.SIGHUP else number)

        for number in (*STOP_SIGNALS, *(() if ignored else (signal.SIGHUP,))):
            before = signal.signal(number, note)
            self.callback(signal.signal, number, before)
        return self
