"""What to do next about a started job: a pure function of its known state and of a new observation.

| phase | it ends when | next phase |
|---|---|---|
| RUNNING | every launcher has ended | ENDED |
| ENDED | no host has a process of the job | OVER |
| | the time for the remaining processes has passed | TERMINATING: SIGTERM to every process |
| TERMINATING | no process is left, or the time has passed | KILLING: SIGKILL to every process |
| KILLING | no process is left, or `LAST_LOOKS` looks have sent SIGKILL | OVER |

A second Ctrl-C leads from RUNNING or ENDED to KILLING.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from megatron_tiedlora.cluster.job_hosts import Answers, describe

PAUSE_SECONDS = 0.5  # between looks while every process is being ended
UNREACHED_LOOKS = 2  # at unreachable hosts, after the launchers have ended
LAST_LOOKS = 3
NEVER, AT_ONCE = float("inf"), float("-inf")

Phase = Enum("Phase", ["RUNNING", "ENDED", "TERMINATING", "KILLING", "OVER"])
_LAST = (Phase.TERMINATING, Phase.KILLING)  # in these phases every process of the job gets the signals


@dataclass(frozen=True)
class Times:
    """Time limits for watching a job, in seconds."""

    look: float = 30.0  # between looks at all hosts
    grace: float = 120.0  # for ranks to save after their launcher has died
    soon: float = 2.0  # between looks when something is about to end
    linger: float = 15.0  # for a launcher to notice that no rank is left
    unreached: float = 300.0  # the same, while a host that may have ranks gives no answer
    others: float = 45.0  # for ranks to notice that another launcher's ranks are gone, and to end
    helper: float = 10.0  # for processes that are not ranks, and for all of them after SIGTERM, before SIGKILL


@dataclass(frozen=True)
class State:
    """What is known of a job; times are those of the monotonic clock."""

    phase: Phase = Phase.RUNNING
    asked: Phase | None = None  # the phase in which the look in progress began
    looked_at: float = AT_ONCE  # when the last look began; AT_ONCE: the next one is due
    passed_on: int = 0  # the first signal that this command received
    stop: int = 0  # the signal that each look sends, 0 for none; before TERMINATING only to ranks that have not had it
    worked: bool = False  # whether any rank has been seen
    idle_since: float = NEVER  # since when no host has had a rank, after one had been seen
    failed_at: float = NEVER  # when one of several launchers failed, or when its host was last seen with ranks
    deadline: float = NEVER  # when the time of the remaining processes is over
    looks: int = 0  # how many more looks may miss a host (ENDED) or find a process (KILLING)
    unreached: Mapping[str, str] = field(default_factory=dict)  # why hosts gave no answer to the last look


@dataclass(frozen=True)
class Observation:
    """What is seen at one moment."""

    now: float
    running: Sequence[str]  # names of the launchers that still run
    failed: tuple[str, int] | None = None  # name and exit status of the first launcher that failed
    signals: Sequence[int] = ()  # all signals that this command has received, in order
    reported: bool = False  # whether the run folder says that the run has ended
    answers: Answers | None = None  # the result of a look that has just ended


@dataclass
class Actions:
    """What to do now."""

    say: list[str] = field(default_factory=list)  # lines for the user
    kill_launchers: bool = False  # send SIGKILL to those that still run
    ask: tuple[int, bool] | None = None  # begin a look: (signal, whether every process gets it); see `JobHosts.ask`


def decide(state: State, seen: Observation, times: Times) -> tuple[State, Actions]:
    """Return the next state and what to do now."""
    before, do = state, Actions()
    if seen.now >= state.deadline:
        has_had_time = state.phase is Phase.ENDED and state.deadline > AT_ONCE
        state = _end_all(state, do, by_force=not has_had_time)
    elif state.phase in (Phase.RUNNING, Phase.ENDED):
        state = _launchers(_signals(state, seen, do), seen, times, do)
    if seen.answers is not None:
        is_fresh, state = state.asked is state.phase, replace(state, asked=None, unreached=seen.answers.unreached)
        if is_fresh:
            state = _CONCLUSIONS[state.phase](state, seen, seen.answers, times, do)
        else:  # it began in an earlier phase and says nothing about this one
            state = replace(state, looked_at=AT_ONCE)
    news = (state.phase, state.stop, state.passed_on) != (before.phase, before.stop, before.passed_on)
    is_due = news or seen.now - state.looked_at > _interval(state, seen, times)
    if is_due and state.asked is None and state.phase is not Phase.OVER:
        state, do.ask = replace(state, asked=state.phase, looked_at=seen.now), (state.stop, state.phase in _LAST)
    return state, do


def _interval(state: State, seen: Observation, times: Times) -> float:
    if state.phase in _LAST:
        return PAUSE_SECONDS
    soon = state.phase is Phase.ENDED or state.stop or state.idle_since < NEVER or seen.reported
    return times.soon if soon else times.look


def _end_all(state: State, do: Actions, *, by_force: bool) -> State:
    state = replace(state, deadline=NEVER)
    if not by_force:
        return replace(state, phase=Phase.TERMINATING, stop=signal.SIGTERM)
    do.kill_launchers = True
    return replace(state, phase=Phase.KILLING, stop=signal.SIGKILL, looks=LAST_LOOKS)


def _signals(state: State, seen: Observation, do: Actions) -> State:
    """Pass on the first signal; after a second Ctrl-C kill everything at once."""
    if seen.signals and not state.passed_on:
        first = seen.signals[0]
        do.say += [f"{signal.Signals(first).name} is passed on; the job saves and ends (Ctrl-C again: kill)"]
        state = replace(state, passed_on=first, stop=state.stop or first)
    if signal.SIGINT in seen.signals[1:]:  # schedulers send SIGTERM twice
        do.say += ["killing all"]
        state = replace(state, deadline=AT_ONCE)
    return state


def _launchers(state: State, seen: Observation, times: Times, do: Actions) -> State:
    """Note that the launchers have ended; stop the ranks some time after one of several launchers has failed.

    torchrun's other agents do not end by themselves in that case: they restart their ranks and wait for the lost agent.
    """
    if state.phase is Phase.RUNNING and not seen.running:
        return replace(state, phase=Phase.ENDED, looks=UNREACHED_LOOKS)
    if state.phase is Phase.ENDED or state.stop or seen.failed is None:
        return state
    state = replace(state, failed_at=min(state.failed_at, seen.now))
    if seen.now - state.failed_at < times.others:
        return state
    name, status = seen.failed
    do.say += [f"{name} has ended with {status}; the others wait for it and are stopped"]
    return replace(state, stop=signal.SIGTERM)


def _conclude_running(state: State, seen: Observation, answers: Answers, times: Times, do: Actions) -> State:
    """Kill launchers that do not notice that no rank is left."""
    if state.looked_at >= state.failed_at and len(answers.working) > len(seen.running):
        state = replace(state, failed_at=seen.now)  # agents and ranks may outlive their ssh
    worked = state.worked or bool(answers.working) or seen.reported  # it may have worked only between two looks
    idle_since = min(state.idle_since, seen.now) if worked and not answers.working else NEVER
    if seen.now - idle_since > (times.unreached if answers.unreached else times.linger):
        names = ", ".join(seen.running)
        do.say += [f"no rank is left on any host that can be reached, but {names} does not end: killed"]
        do.kill_launchers = True
    return replace(state, worked=worked, idle_since=idle_since)


def _conclude_ended(state: State, seen: Observation, answers: Answers, times: Times, do: Actions) -> State:
    """Give the remaining processes time to end: ranks are told to stop and may save."""
    if not answers.found:
        over = not answers.unreached or state.looks == 1
        return replace(state, looks=state.looks - 1, phase=Phase.OVER if over else state.phase)
    if not answers.working:
        return replace(state, deadline=min(state.deadline, seen.now + times.helper))
    if state.deadline == NEVER:
        state = replace(state, deadline=seen.now + times.grace)
        if not state.stop:
            do.say += ["the launcher has ended, but the job has not; the job is told to save and to stop:"]
            do.say += [f"  {line}" for line in describe(answers)]
            state = replace(state, stop=signal.SIGTERM)
    return state


def _conclude_terminating(state: State, seen: Observation, answers: Answers, times: Times, do: Actions) -> State:
    """Wait until no process is left; the time limit starts when every process has had the signal."""
    if state.stop:
        return replace(state, stop=0, deadline=seen.now + times.helper)
    return state if answers.found else _end_all(state, do, by_force=True)


def _conclude_killing(state: State, seen: Observation, answers: Answers, times: Times, do: Actions) -> State:
    """Report what was killed, and in the end what could not be killed."""
    do.say += [f"{'killed' if state.looks else 'still there'} on {line}" for line in describe(answers)]
    over = not answers.found or not state.looks
    return replace(state, looks=state.looks - 1, phase=Phase.OVER if over else state.phase)


_CONCLUSIONS = {
    Phase.RUNNING: _conclude_running,
    Phase.ENDED: _conclude_ended,
    Phase.TERMINATING: _conclude_terminating,
    Phase.KILLING: _conclude_killing,
}
