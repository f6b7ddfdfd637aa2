"""Schedules the commands of a study: what waits for what, what runs at once, and what a failure or signal does.

It knows nothing about training. A job says what it waits for, what to start, and how it ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.cluster.signals import StopSignals
from megatron_tiedlora.study.processes import LaunchedChild, ScriptStart, Start

POLL_SECONDS = 0.1
SHOW_SECONDS = 1.0


@dataclass(frozen=True)
class StudyJob:
    """A run or a score, or several runs that train together.

    Attributes:
        needs: names of jobs that must have ended, successfully or not.
        command: what to start, given the launcher's arguments; None if there is nothing to do.
        failure: called after its end: None, or why it is not finished.
        done: the part that is done, 0 to 1, and a few words about its state.
        vital: if it fails, nothing else is started.
        runs: the jobs of runs that train together, which are not started themselves; `done` is then the sum of theirs.
    """

    name: str
    needs: tuple[str, ...]
    command: Callable[[tuple[str, ...]], ScriptStart | None]
    failure: Callable[[], str | None]
    done: Callable[[], tuple[float, str]]
    vital: bool = False
    runs: tuple[StudyJob, ...] = ()

    @property
    def size(self) -> int:
        """How many runs or scores it is."""
        return len(self.runs) or 1


@dataclass
class Outcome:
    """How the jobs ended: the reasons of failed runs and scores by name, and the names of their logs if they are
    others; the signal that stopped the others (0: none), and whether they were given up as a vital job failed."""

    failures: dict[str, str] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0
    given_up: bool = False


@dataclass
class _Running:
    job: StudyJob
    child: LaunchedChild
    slot: int
    started: float


def run_jobs(
    jobs: Sequence[StudyJob],
    *,
    slots: Sequence[tuple[str, ...]],
    start: Start,
    stop: StopSignals,
    finished: int,
) -> Outcome:
    """Run all jobs. Each starts in a free slot once the jobs it needs have ended; earlier ones in the list go first.

    A signal is passed on to the running commands, no more are started, and their ends are awaited; a second Ctrl-C
    kills them. An error of the sweep itself (a full disk) acts like SIGTERM, and is raised when all have ended.

    Args:
        slots: launcher arguments of each slot.
        finished: number of runs and scores that an earlier start has finished, for the progress bar.
    """
    to_do = _size(jobs)
    outcome, pending = Outcome(), list(jobs)
    running: list[_Running] = []
    waited_for = {job.name for job in jobs}
    heard = 0
    with _bar(finished, to_do) as bar, _none_left_running(running, stop, bar):
        while pending or running:
            if len(stop.received) > heard:
                _pass_on(stop.received[heard:], running, bar, first=not outcome.stopped_by)
                outcome.stopped_by, heard, pending = stop.received[0], len(stop.received), []
            for active in [active for active in running if active.child.ended()]:
                running.remove(active)
                waited_for.discard(active.job.name)
                if outcome.stopped_by or outcome.given_up:
                    continue
                _note_end(active, outcome, bar)
                if active.job.vital and active.job.name in outcome.failures:
                    outcome.given_up, pending = True, []
                    for other in running:
                        other.child.interrupt(signal.SIGTERM)
            free = sorted(set(range(len(slots))) - {active.slot for active in running})
            for job in [job for job in pending if not waited_for & set(job.needs)]:
                if not free:
                    break
                pending.remove(job)
                command = job.command(slots[free[0]])
                if command is None:
                    waited_for.discard(job.name)
                    continue
                running.append(_Running(job, start(command), free.pop(0), time.monotonic()))
            left = _size(pending) + _size([active.job for active in running])
            _show(bar, running, total=finished + to_do, left=left)
            if running:
                time.sleep(POLL_SECONDS)
    return outcome


@contextmanager
def _none_left_running(running: Sequence[_Running], stop: StopSignals, bar: Any) -> Iterator[None]:
    """If the block raises, interrupt the running commands and wait for their ends; Ctrl-C kills them."""
    try:
        yield
    except BaseException as error:
        heard, left = len(stop.received), list(running)
        for active in left:
            with suppress(Exception):  # an error with one must not keep the signal from the others
                active.child.interrupt(signal.SIGTERM)
        if left:
            with suppress(Exception):
                bar.write(printable(f"stopping: {', '.join(active.job.name for active in left)} save first ({error})"))
        while left:
            left = [active for active in left if not _is_gone(active.child)]
            if signal.SIGINT in stop.received[heard:]:
                heard = len(stop.received)
                for active in left:
                    with suppress(Exception):
                        active.child.kill()
            time.sleep(POLL_SECONDS)
        raise


def _is_gone(child: LaunchedChild) -> bool:
    with suppress(Exception):
        return child.ended()
    return True  # its state cannot be read any more


def _pass_on(signals: Sequence[int], running: Sequence[_Running], bar: Any, *, first: bool) -> None:
    """Send the first signal to every command, once. After that only Ctrl-C counts: schedulers send SIGTERM twice."""
    for active in running:
        if first:
            active.child.interrupt(signals[0])
        if signal.SIGINT in signals[1 if first else 0 :]:
            active.child.kill()
    if first and running:
        names = ", ".join(active.job.name for active in running)
        bar.write(printable(f"stopping: {names} save first (Ctrl-C once more: kill)"))


def _note_end(active: _Running, outcome: Outcome, bar: Any) -> None:
    for job in active.job.runs or (active.job,):
        reason = job.failure()
        words = f"FAILED: {reason}" if reason is not None else job.done()[1]
        if reason is not None:
            outcome.failures[job.name] = reason
            outcome.logs |= {} if job is active.job else {job.name: active.job.name}
        bar.write(printable(f"{job.name:<28} {words}  [{_duration(time.monotonic() - active.started)}]"))


def _size(jobs: Sequence[StudyJob]) -> int:
    return sum(job.size for job in jobs)


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _bar(finished: int, to_do: int) -> Any:
    return progress_bar(
        "sweep",
        "run",
        total=finished + to_do,
        leave=True,
        initial=finished,
        mininterval=SHOW_SECONDS,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.1f} of {total} [{elapsed}, {remaining} left]{postfix}",
    )


def _show(bar: Any, running: Sequence[_Running], *, total: int, left: int) -> None:
    if time.monotonic() - getattr(bar, "shown_at", 0.0) < SHOW_SECONDS and left:
        return
    bar.shown_at = time.monotonic()
    states = [(active.job.name, *active.job.done()) for active in running]
    bar.set_postfix_str(printable("; ".join(f"{name} {words}" for name, _, words in states)), refresh=False)
    bar.update(total - left + sum(part for _, part, _ in states) - bar.n)
