"""Stop all ranks together, on a signal or when a launcher has died.

A rank that should stop must not leave while its peers wait for it in a collective. So a stop request is only noted
here, and the ranks act on it after they have agreed in a reduction.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

import psutil

from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.runtime.launch_env import deepspeed_runner, is_torchrun

# Slurm sends SIGUSR1 some time before a job's limit (`#SBATCH --signal=USR1@120`).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# After a longer step the ranks agree on stopping after every micro-batch: a signal is answered within its grace time.
LONG_STEP_SECONDS = 10.0
# Parents of the ranks on each host under mpirun and srun.
_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "slurmstepd")


class RunStopped(BaseException):
    """All ranks have agreed to stop; the exit status is 128 + `signal_number`.

    Like KeyboardInterrupt it is not an Exception: it can be raised anywhere and must not look like a library's failure.
    """

    def __init__(self, signal_number: int, reason: str) -> None:
        super().__init__(reason)
        self.signal_number = signal_number


def launcher_processes() -> list[psutil.Process]:
    """The launchers above this rank whose death means that the run must stop.

    A local `deepspeed` dies at once on a signal and leaves its per-node launcher and the ranks running, so both are
    watched. If ssh started that launcher, its sshd session is watched, which ends with the connection. The agent of
    torchrun and the daemons of mpirun and srun are watched too. Other parents (a shell) may end without effect.
    """
    watched = []
    try:
        parent = psutil.Process().parent()
        command = " ".join(parent.cmdline()) if parent else ""
        if parent and "deepspeed.launcher.launch" in command:
            runner = deepspeed_runner()
            watched = [parent, *([runner] if runner else _ssh_sessions(parent))]
        elif parent and (is_torchrun(parent.cmdline()) or parent.name().startswith(_LAUNCHERS)):
            watched = [parent]
    except psutil.Error:  # it died in between; is_running() shows that for the processes found so far
        pass
    return watched


def _ssh_sessions(process: psutil.Process) -> list[psutil.Process]:
    """The sshd session whose command started `process`, but not an interactive session in which a user started it.

    sshd runs a command through the user's shell as `SHELL -c COMMAND`; a login shell has no `-c`.
    """
    for ancestor in process.parents():
        if ancestor.name().startswith("sshd"):
            return [ancestor] if ancestor.pid > 1 else []
        if "-c" not in ancestor.cmdline()[1:2]:
            break
    return []


class StopVotes(NamedTuple):
    """The numbers that `StopRequests.agree` sums over all ranks, in fp64."""

    missing: float  # ranks on which the condition does not hold
    stopping: float  # ranks that should stop
    signals: float  # sum of their signal numbers


class StepVotes(NamedTuple):
    """The numbers that a training step sums over all ranks before weights move, in fp64; two of each adapter follow."""

    seconds: float  # of the forward and backward passes
    save_due: float  # whether rank 0 wants a checkpoint after this step
    failed: float  # whether rank 0 has a failure to raise
    stopping: float  # as in StopVotes
    signals: float


@dataclass
class StopRequests:
    """Notes requests to stop. Outside `deferred()` a signal raises RunStopped at once.

    Only the first signal counts: an interrupted launcher sends its ranks another one while they end.
    """

    launchers: list[psutil.Process] = field(default_factory=launcher_processes)
    _signal: int = 0
    _deferred: bool = False
    _stopping: bool = False

    def install(self) -> None:
        """Take over SIGINT, SIGTERM and SIGUSR1 of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """`install` within the block. After a stop, signals stay ignored."""
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
        """Return the exception to raise, and ignore signals from now on so that they do not interrupt the end."""
        self.ignore()
        return RunStopped(number, reason)

    def ignore(self) -> None:
        """Ignore signals from now on: the run is ending already.

        The kernel ignores them, because Python removes its handlers before the process has ended. `srun
        --kill-on-bad-exit` signals the other ranks when one ends, and would return the status of a rank that it killed.
        """
        self._stopping = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_if_requested(self) -> None:
        """Raise RunStopped if this rank should stop. Call it only where no other rank waits for this one."""
        if number := self.requested_signal():
            raise self.stopped(number, signal.Signals(number).name)

    def stop_if_any(self, count: float, total: float) -> None:
        """Raise RunStopped on every rank if `count` ranks should stop, by signals whose numbers sum to `total`.

        If the ranks have different signals, SIGTERM counts: then one of them is not SIGUSR1, the time limit's signal,
        so the job must not return to the queue.
        """
        if count:
            shared = next((number for number in STOP_SIGNALS if total == count * number), None)
            if shared is None:
                raise self.stopped(signal.SIGTERM, "signals")
            raise self.stopped(shared, "SIGTERM or the launcher's end" if shared == signal.SIGTERM else shared.name)

    def agree(self, mine: bool) -> bool:
        """Whether `mine` is true on every rank; all ranks call it together and stop together if any of them should.

        Raises:
            RunStopped: a rank should stop; on every rank.
        """
        requested = self.requested_signal()
        votes = StopVotes(*sum_over_ranks(StopVotes(float(not mine), float(requested > 0), float(requested))))
        self.stop_if_any(votes.stopping, votes.signals)
        return votes.missing == 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, only note signals; the caller checks `requested_signal()` where all ranks can do so together."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def requested_signal(self) -> int:
        """The signal that told this rank to stop (SIGTERM if its launcher died), or 0."""
        if not self._signal and any(not alive(process) for process in self.launchers):
            self._signal = signal.SIGTERM
        return int(self._signal)


def alive(process: psutil.Process) -> bool:
    """Whether the process still runs (a zombie does not)."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def exit_status(signal_number: int) -> int:
    """The shell's exit status of a process stopped by a signal: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + signal_number


class StopSignals(ExitStack):
    """Inside `with`, record SIGINT, SIGTERM and SIGUSR1 in the order of their arrival, and do nothing else with them.

    SIGHUP (the terminal has closed) counts as SIGTERM, unless it is ignored, as under nohup.
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
