"""The order of a study's commands: what waits for what, what runs at once, and what happens when one fails or all stop.

Knows nothing of training: a job says what it waits for, what to start, and how it ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.cluster.signals import StopSignals
from megatron_tiedlora.study.processes import Child, Command, Start

POLL_SECONDS = 0.1
SHOW_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """A run or a score.

    Attributes:
        needs: names of jobs that must have ended, well or not.
        command: what to start, given the launcher's arguments; None where there is nothing left to do it on.
        failure: after the end: None, or why it is not finished.
        done: which part of it is done, 0 to 1, and a few words on where it stands.
        vital: where it fails, nothing else is started.
    """

    name: str
    needs: tuple[str, ...]
    command: Callable[[tuple[str, ...]], Command | None]
    failure: Callable[[], str | None]
    done: Callable[[], tuple[float, str]]
    vital: bool = False


@dataclass
class Outcome:
    """How the jobs ended: reasons by name of those that failed, the signal that stopped the rest (0: none), and
    whether they were given up because a vital one failed."""

    failures: dict[str, str] = field(default_factory=dict)
    stopped_by: int = 0
    given_up: bool = False


@dataclass
class _Running:
    job: Job
    child: Child
    slot: int
    started: float


def run_jobs(
    jobs: Sequence[Job],
    *,
    slots: Sequence[tuple[str, ...]],
    start: Start,
    stop: StopSignals,
    finished: int,
) -> Outcome:
    """Run all jobs, each in a free slot as soon as what it needs has ended; the first of the list that can goes first.

    A signal is passed on to what runs, nothing more is started, and its end is waited for; a second Ctrl-C kills.
    An error of the sweep's own (a full disk) does the same as SIGTERM, and is raised when all have ended.

    Args:
        slots: launcher arguments of each place.
        finished: jobs that an earlier start has finished, for the progress bar.
    """
    outcome, pending = Outcome(), list(jobs)
    running: list[_Running] = []
    waited_for = {job.name for job in jobs}
    heard = 0
    with _bar(finished, len(jobs)) as bar, _none_left_running(running, stop, bar):
        while pending or running:
            if len(stop.received) > heard:
                _pass_on(stop.received[heard:], running, bar, first=not outcome.stopped_by)
                outcome.stopped_by, heard, pending = stop.received[0], len(stop.received), []
            for place in [place for place in running if place.child.ended()]:
                running.remove(place)
                waited_for.discard(place.job.name)
                if outcome.stopped_by or outcome.given_up:
                    continue
                _note_end(place, outcome, bar)
                if place.job.vital and place.job.name in outcome.failures:
                    outcome.given_up, pending = True, []
                    for other in running:
                        other.child.interrupt(signal.SIGTERM)
            free = sorted(set(range(len(slots))) - {place.slot for place in running})
            for job in [job for job in pending if not waited_for & set(job.needs)]:
                if not free:
                    break
                pending.remove(job)
                command = job.command(slots[free[0]])
                if command is None:
                    waited_for.discard(job.name)
                    continue
                running.append(_Running(job, start(command), free.pop(0), time.monotonic()))
            _show(bar, running, total=finished + len(jobs), left=len(pending) + len(running))
            if running:
                time.sleep(POLL_SECONDS)
    return outcome


@contextmanager
def _none_left_running(running: Sequence[_Running], stop: StopSignals, bar: Any) -> Iterator[None]:
    """Where the block raises, tell what runs to stop and wait for its end; Ctrl-C kills."""
    try:
        yield
    except BaseException as error:
        heard, left = len(stop.received), list(running)
        for place in left:
            with suppress(Exception):  # whatever is wrong with one, the others are told too
                place.child.interrupt(signal.SIGTERM)
        if left:
            with suppress(Exception):
                bar.write(printable(f"stopping: {', '.join(place.job.name for place in left)} save first ({error})"))
        while left:
            left = [place for place in left if not _is_gone(place.child)]
            if signal.SIGINT in stop.received[heard:]:
                heard = len(stop.received)
                for place in left:
                    with suppress(Exception):
                        place.child.kill()
            time.sleep(POLL_SECONDS)
        raise


def _is_gone(child: Child) -> bool:
    with suppress(Exception):
        return child.ended()
    return True  # nothing can be learnt of it


def _pass_on(signals: Sequence[int], running: Sequence[_Running], bar: Any, *, first: bool) -> None:
    """The first signal to every command, once; after it only a Ctrl-C counts: schedulers send SIGTERM twice."""
    for place in running:
        if first:
            place.child.interrupt(signals[0])
        if signal.SIGINT in signals[1 if first else 0 :]:
            place.child.kill()
    if first and running:
        names = ", ".join(place.job.name for place in running)
        bar.write(printable(f"stopping: {names} save first (Ctrl-C once more: kill)"))


def _note_end(place: _Running, outcome: Outcome, bar: Any) -> None:
    reason = place.job.failure()
    words = f"FAILED: {reason}" if reason is not None else place.job.done()[1]
    if reason is not None:
        outcome.failures[place.job.name] = reason
    bar.write(printable(f"{place.job.name:<28} {words}  [{_duration(time.monotonic() - place.started)}]"))


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _bar(finished: int, to_do: int) -> Any:
    return tqdm(
        total=finished + to_do,
        initial=finished,
        desc="sweep",
        mininterval=SHOW_SECONDS,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.1f} of {total} [{elapsed}, {remaining} left]{postfix}",
    )


def _show(bar: Any, running: Sequence[_Running], *, total: int, left: int) -> None:
    if time.monotonic() - getattr(bar, "shown_at", 0.0) < SHOW_SECONDS and left:
        return
    bar.shown_at = time.monotonic()
    states = [(place.job.name, *place.job.done()) for place in running]
    bar.set_postfix_str(printable("; ".join(f"{name} {words}" for name, _, words in states)), refresh=False)
    bar.update(total - left + sum(part for _, part, _ in states) - bar.n)
