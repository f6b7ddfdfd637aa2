"""Stopping together: signals, a launcher that died, and the ranks' agreement on both.

A rank that wants to stop must not leave while its peers wait for it in a collective, so a wish is only noted here, and
acted on where all ranks have agreed by a reduction.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import NamedTuple

import psutil

from megatron_tiedlora.config.hosts import is_torchrun
from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.runtime.launch_env import deepspeed_runner

# Slurm sends the last one some time before a job's limit (`#SBATCH --signal=USR1@120`).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Processes that start ranks and are their parents: of mpirun, srun and torchrun, on each host.
_LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prted", "orted", "slurmstepd")


class RunStopped(BaseException):
    """All ranks have agreed to stop; the exit status is 128 + `signal_number`.

    Like KeyboardInterrupt no Exception: it can be raised anywhere, and must not be taken for a library's failure.
    """

    def __init__(self, signal_number: int, reason: str) -> None:
        super().__init__(reason)
        self.signal_number = signal_number


def launcher_processes() -> list[psutil.Process]:
    """The launchers above this rank whose death means that the run is to stop.

    A local `deepspeed` that is told to stop dies at once and leaves its per-node launcher and the ranks running, so
    both are watched; where ssh started that launcher, the session of sshd, which ends with the connection; likewise the
    agent of torchrun and the daemons of mpirun and srun. Other parents (a shell) may come and go.
    """
    watched = []
    try:
        parent = psutil.Process().parent()
        command = " ".join(parent.cmdline()) if parent else ""
        if parent and "deepspeed.launcher.launch" in command:
            runner = deepspeed_runner()
            watched = [parent, *([runner] if runner else _ssh_sessions(parent))]
        elif parent and is_torchrun(parent.cmdline()):
            watched = [parent, *_ssh_sessions(parent)]
        elif parent and parent.name().startswith(_LAUNCHERS):
            watched = [parent]
    except psutil.Error:  # it died between two looks: is_running() tells of it for those found so far
        pass
    return watched


def _ssh_sessions(process: psutil.Process) -> list[psutil.Process]:
    """The session of sshd whose command line started `process`, not one in which a user typed it in a shell.

    sshd runs a command through the user's shell as `SHELL -c COMMAND`; a login shell has no `-c`.
    """
    for ancestor in process.parents():
        if ancestor.name().startswith("sshd"):
            return [ancestor] if ancestor.pid > 1 else []
        if "-c" not in ancestor.cmdline()[1:2]:
            break
    return []


class StopVotes(NamedTuple):
    """What `StopWatch.agree` sums over all ranks, one fp64 number each."""

    missing: float  # ranks on which what is asked does not hold
    stopping: float  # ranks that wish to stop
    signals: float  # sum of the signal numbers of these wishes


@dataclass
class StopWatch:
    """Notes the wish to stop. Outside `deferred()` a signal raises RunStopped at once.

    The first signal counts: a launcher that was interrupted itself sends its ranks another one while they end.
    """

    launchers: list[psutil.Process] = field(default_factory=launcher_processes)
    _signal: int = 0
    _deferred: bool = False
    _stopping: bool = False

    def install(self) -> None:
        """Take over SIGINT, SIGTERM and SIGUSR1 of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = self._signal or number
        if not self._deferred and not self._stopping:
            self.raise_if_wished()

    def stopped(self, number: int, reason: str) -> RunStopped:
        """The exception to raise; from now on signals are ignored, so that the end is not interrupted."""
        self.ignore()
        return RunStopped(number, reason)

    def ignore(self) -> None:
        """From now on signals change nothing: the run ends already.

        The system ignores them, since Python gives handlers up before it has ended: `srun --kill-on-bad-exit` tells
        the others to stop as soon as one has, and its exit status is that of whoever dies of it.
        """
        self._stopping = True
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def raise_if_wished(self) -> None:
        """Raise RunStopped where this rank wishes to stop. Only where no other rank waits for it."""
        if number := self.wish():
            raise self.stopped(number, signal.Signals(number).name)

    def stop_if_any(self, count: float, total: float) -> None:
        """Raise RunStopped where `count` ranks wish to stop, by signals whose numbers sum up to `total`; on every rank.

        Where a terminal interrupts the ranks they have the same signal; of several kinds, SIGTERM counts: one of them
        says more than that time is nearly over, so the job is not to come back by itself.
        """
        if count:
            alike = next((number for number in STOP_SIGNALS if total == count * number), None)
            if alike is None:
                raise self.stopped(signal.SIGTERM, "signals")
            raise self.stopped(alike, "SIGTERM or the launcher's end" if alike == signal.SIGTERM else alike.name)

    def agree(self, mine: bool) -> bool:
        """Whether `mine` holds on every rank; all ranks ask together, and stop together where any of them wishes to.

        Raises:
            RunStopped: one does; on every rank.
        """
        wish = self.wish()
        votes = StopVotes(*sum_over_ranks(StopVotes(float(not mine), float(wish > 0), float(wish))))
        self.stop_if_any(votes.stopping, votes.signals)
        return votes.missing == 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals inside; the caller asks `wish()` where all ranks can answer together."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def end_agent(self) -> None:
        """The last thing of a rank that stops: torchrun is told to end, where the ssh session that started it is gone.

        It takes the ranks' end for a failure, and would start them anew with nobody there to see it.
        """
        lost = [process for process in self.launchers if not alive(process)]
        if lost and os.environ.get("LOCAL_RANK") == "0":
            for process in self.launchers:
                with suppress(psutil.Error):
                    if process not in lost and is_torchrun(process.cmdline()):
                        process.terminate()

    def wish(self) -> int:
        """The signal that this rank was told to stop by (SIGTERM where its launcher died), or 0."""
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
    """The shell's status for a process that a signal stopped: 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""
    return 128 + signal_number
