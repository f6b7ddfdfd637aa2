"""Start a job and watch it to its last process: pass signals on, notice when a launcher dies, leave nothing behind.

Signals go to the ranks themselves, on every host, and never to a launcher. DeepSpeed and mpirun give their ranks only
seconds to save, srun ends them at once, and a local `deepspeed` dies alone. The job is over when its launchers have
ended and no host has a process of it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.cluster.decide import Observation, Phase, State, Times, decide
from megatron_tiedlora.cluster.job_hosts import Answers, JobHosts
from megatron_tiedlora.cluster.routes import StartPlan
from megatron_tiedlora.cluster.signals import StopSignals

POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass
class Ended:
    """How the launchers ended."""

    name: str  # of the first launcher that failed, or else of the first launcher
    status: int  # its exit status; -N if signal N killed it
    passed_on: int  # the first signal that was passed on, 0 for none


def say(line: str) -> None:
    """Print a line of this command's own on stderr."""
    with suppress(OSError):
        show(f"tiedlora run: {line}", file=sys.stderr)


@dataclass
class Launcher:
    """A command that was started here, in its own session."""

    name: str
    process: subprocess.Popen[bytes]

    def signal(self, number: int) -> None:
        """Signal it and its process group; do nothing once it has ended, because its pid may be reused."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def start_all(plan: StartPlan, folder: Path) -> list[Launcher]:
    """Start the commands of a plan.

    Raises:
        UserError: a command cannot be started; the ones before it are killed.
    """
    launchers: list[Launcher] = []
    libc = ctypes.CDLL(None)

    def signal_when_we_die(number: int) -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)

    for command in plan.commands:
        try:
            process = subprocess.Popen(
                command.words,
                cwd=folder,
                env=dict(plan.environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the ranks only through us, once
                # If we are killed, the job must stop instead of running on unwatched.
                preexec_fn=partial(signal_when_we_die, command.orphan_signal),
            )
        except OSError as error:
            for launcher in launchers:
                launcher.signal(signal.SIGKILL)
            raise UserError(f"{command.words[0]}: cannot be started ({error.strerror or error})") from None
        launchers.append(Launcher(command.name, process))
    return launchers


def watch(
    launchers: Sequence[Launcher], hosts: JobHosts, signals: StopSignals, times: Times, reported: Callable[[], bool]
) -> Ended:
    """Observe a job and do what `decide` says until nothing is left of it or nothing more can be done.

    Args:
        reported: whether the run folder says that the run has ended; a launcher that stays is then noticed sooner.
    """
    state = State(looked_at=time.monotonic())
    look: Future[Answers] | None = None
    with ThreadPoolExecutor(1) as pool:
        while state.phase is not Phase.OVER:
            answers = look.result() if look is not None and look.done() else None
            ends = [(launcher.name, launcher.process.poll()) for launcher in launchers]
            seen = Observation(
                now=time.monotonic(),
                running=[name for name, status in ends if status is None],
                failed=next(((name, status) for name, status in ends if status), None),
                signals=tuple(signals.received),
                reported=reported(),
                answers=answers,
            )
            state, do = decide(state, seen, times)
            for line in do.say:
                say(line)
            for launcher in launchers if do.kill_launchers else ():
                launcher.signal(signal.SIGKILL)
            if do.ask is not None:
                number, everything = do.ask
                look = pool.submit(hosts.ask, number, everything=everything)
            elif answers is not None:
                look = None
            time.sleep(POLL_SECONDS)
    for launcher in launchers:
        with suppress(subprocess.TimeoutExpired):
            launcher.process.wait(times.helper)
    for name, reason in state.unreached.items():
        say(f"{name} cannot be reached ({reason}); what ran there may still run")
    ended = [(launcher.name, launcher.process.returncode or 0) for launcher in launchers]
    name, status = next((end for end in ended if end[1]), ended[0])
    return Ended(name, status, state.passed_on)
