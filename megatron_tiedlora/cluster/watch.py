"""A job from its start to its last process: signals passed on, a launcher's death noticed, nothing left behind.

Signals go to the ranks themselves, on every host, and never to a launcher: DeepSpeed's and mpirun's give their ranks
seconds to save, srun's ends them at once, and a local `deepspeed` dies alone. The job is over when its launchers have
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.cluster.reach import Answers, JobHosts, describe
from megatron_tiedlora.cluster.routes import StartPlan
from megatron_tiedlora.cluster.signals import StopSignals

POLL_SECONDS = 0.1
LINGER_SECONDS = 15.0  # for a launcher to notice that no rank is left
UNREACHED_SECONDS = 300.0  # the same, while a host that may have ranks gives no answer
OTHERS_SECONDS = 45.0  # for ranks to notice that those of another launcher are gone, and to end
HELPER_SECONDS = 10.0  # for what is no rank, and on SIGTERM for all, before SIGKILL
LAST_LOOKS = 3  # after SIGKILL

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Times:
    """Limits of a watch, in seconds.

    Attributes:
        look: between looks at all hosts.
        grace: for ranks whose launcher has died, to save.
        soon: between looks when something is about to end.
    """

    look: float
    grace: float
    soon: float


@dataclass
class Ended:
    """How the launchers ended.

    Attributes:
        name: of the first that failed, else of the first.
        status: its exit status, minus the signal that killed it.
        passed_on: the first signal that was passed on, 0 for none.
    """

    name: str
    status: int
    passed_on: int


def say(line: str) -> None:
    """A line of this command's own, on stderr."""
    with suppress(OSError):
        show(f"run.py: {line}", file=sys.stderr)


@dataclass
class Launcher:
    """A command that was started here, in a session of its own."""

    name: str
    process: subprocess.Popen[bytes]

    def signal(self, number: int) -> None:
        """Signal it and all that stayed in its group; nothing once it has ended, since its number may be another's."""
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


def start_all(plan: StartPlan, folder: Path) -> list[Launcher]:
    """Start the commands of a plan.

    Raises:
        UserError: one cannot be started; those before it are killed.
    """
    launchers: list[Launcher] = []
    libc = ctypes.CDLL(None)

    def hear_of_our_death(number: int) -> None:
        libc.prctl(_PR_SET_PDEATHSIG, number)

    for command in plan.commands:
        try:
            process = subprocess.Popen(
                command.words,
                cwd=folder,
                env=dict(plan.environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the ranks through us, once
                # Killed ourselves, the job is to stop and not to go on unseen.
                preexec_fn=partial(hear_of_our_death, command.orphaned),
            )
        except OSError as error:
            for launcher in launchers:
                launcher.signal(signal.SIGKILL)
            raise UserError(f"{command.words[0]}: cannot be started ({error.strerror or error})") from None
        launchers.append(Launcher(command.name, process))
    return launchers


@dataclass
class Watch:
    """Waits for the end of a job.

    Attributes:
        over: whether the run folder says that the run has ended; then a launcher that stays is looked after sooner.
    """

    launchers: Sequence[Launcher]
    hosts: JobHosts
    signals: StopSignals
    times: Times
    over: Callable[[], bool]
    _heard: int = 0
    _stop: int = 0  # the signal that the ranks are told to stop by, 0 while they work
    _passed_on: int = 0
    _worked: bool = False
    _idle_since: float | None = None  # since when no host has had a rank
    _first_failed_at: float | None = None  # when a launcher of several ended badly, or its host was seen at work since
    _ended_at: float | None = None
    _deadline: float = float("inf")  # until when what is left has time
    _in_a_hurry: bool = False
    _retries: int = 1  # of a look at hosts that cannot be reached, after the end
    _unreached: dict[str, str] = field(default_factory=dict)

    def run(self) -> Ended:
        """Watch until nothing is left, or nothing more can be done about it."""
        with ThreadPoolExecutor(1) as pool:
            asked: Future[Answers] | None = None
            begun = time.monotonic()
            while time.monotonic() < self._deadline:
                now = time.monotonic()
                urgent = self._hear()
                if self._ended_at is None and all(launcher.process.poll() is not None for launcher in self.launchers):
                    self._ended_at, urgent = now, True
                urgent = self._end_the_rest(now) or urgent
                if asked is not None and asked.done():
                    answers, asked, told = asked.result(), None, self._stop
                    self._see(answers, begun=begun)
                    if self._take(answers, fresh=self._ended_at is not None and begun >= self._ended_at):
                        return self._end()
                    urgent = urgent or self._stop != told
                soon = self._stop or self._ended_at or self._idle_since or self.over()
                if asked is None and (urgent or now - begun > (self.times.soon if soon else self.times.look)):
                    begun, asked = now, pool.submit(self._ask)
                time.sleep(POLL_SECONDS)
            if self._in_a_hurry:
                self._kill_launchers()
            if asked is not None:
                asked.result()
        self._kill()
        return self._end()

    def _ask(self) -> Answers:
        return self.hosts.stop(self._stop) if self._stop else self.hosts.look()

    def _hear(self) -> bool:
        """Note new signals; whether the ranks are to be told now."""
        new, self._heard = self.signals.received[self._heard :], len(self.signals.received)
        if not new:
            return False
        first = not self._passed_on
        if first:
            self._passed_on = new[0]
            self._stop = self._stop or new[0]
            say(f"{signal.Signals(new[0]).name} is passed on; the job saves and ends (Ctrl-C once more: kill)")
        if signal.SIGINT in new[1 if first else 0 :]:  # schedulers send SIGTERM twice
            say("killing all")
            self._in_a_hurry, self._deadline = True, 0.0
        return first

    @property
    def _failed(self) -> list[Launcher]:
        """Launchers that have ended badly."""
        return [launcher for launcher in self.launchers if launcher.process.poll()]

    def _end_the_rest(self, now: float) -> bool:
        """Whether the ranks are to be told to stop now, since a launcher of several has ended badly some time ago.

        torchrun's other agents have no end of their own then: they start their ranks anew, and wait for the one that is
        gone from its host.
        """
        failed = self._failed
        if not failed or self._ended_at or self._stop:
            return False
        self._first_failed_at = self._first_failed_at or now
        if now - self._first_failed_at < OTHERS_SECONDS:
            return False
        code = failed[0].process.returncode
        say(f"{failed[0].name} has ended with {code}; the others, which wait for it, are stopped")
        self._stop = signal.SIGTERM
        return True

    def _see(self, answers: Answers, *, begun: float) -> None:
        """Count anew where more hosts work than launchers live: agents and ranks may outlive their ssh."""
        alive = [launcher for launcher in self.launchers if launcher.process.poll() is None]
        if self._first_failed_at and begun >= self._first_failed_at and len(answers.working) > len(alive):
            self._first_failed_at = time.monotonic()

    def _take(self, answers: Answers, *, fresh: bool) -> bool:
        """Draw the conclusions of a look; whether all is over.

        Args:
            fresh: whether it was begun after the launchers' end.
        """
        now = time.monotonic()
        self._unreached = dict(answers.unreached)
        self._worked = self._worked or bool(answers.working) or self.over()  # nobody may have looked while it worked
        if not self._ended_at:
            self._idle_since = (self._idle_since or now) if self._worked and not answers.working else None
            limit = max(LINGER_SECONDS, UNREACHED_SECONDS) if answers.unreached else LINGER_SECONDS
            if self._idle_since and now - self._idle_since > limit:
                names = ", ".join(launcher.name for launcher in self.launchers if launcher.process.poll() is None)
                say(f"no rank is left on any host that can be reached, and {names} does not end: killed")
                self._kill_launchers()
            return False
        if not fresh:
            return False
        if not answers.found:
            self._retries -= 1
            return not answers.unreached or self._retries < 0
        if not answers.working:
            self._deadline = min(self._deadline, now + HELPER_SECONDS)
        elif self._deadline == float("inf"):
            self._deadline = now + self.times.grace
            if not self._stop:
                self._stop = signal.SIGTERM
                say("the launcher has ended, but not the job; it is told to save and to stop:")
                for line in describe(answers):
                    say(f"  {line}")
        return False

    def _kill(self) -> None:
        """SIGTERM to all there is (unless in a hurry), then SIGKILL, until nothing answers any more."""
        if not self._in_a_hurry:
            self._unreached = dict(self.hosts.end(signal.SIGTERM).unreached)
            limit = time.monotonic() + HELPER_SECONDS
            while time.monotonic() < limit:
                if not self.hosts.look().found:
                    break
                time.sleep(POLL_SECONDS * 5)
        for _ in range(LAST_LOOKS):
            answers = self.hosts.end(signal.SIGKILL)
            self._kill_launchers()
            self._unreached = dict(answers.unreached)
            for line in describe(answers):
                say(f"killed on {line}")
            if not answers.found:
                return
            time.sleep(POLL_SECONDS * 5)
        for line in describe(self.hosts.look()):
            say(f"still there on {line}")

    def _kill_launchers(self) -> None:
        for launcher in self.launchers:
            launcher.signal(signal.SIGKILL)

    def _end(self) -> Ended:
        for launcher in self.launchers:
            with suppress(subprocess.TimeoutExpired):
                launcher.process.wait(HELPER_SECONDS)
        for name, reason in self._unreached.items():
            say(f"{name} cannot be reached ({reason}); what ran there may still run")
        first = (self._failed or list(self.launchers))[0]
        return Ended(first.name, first.process.returncode or 0, self._passed_on)
