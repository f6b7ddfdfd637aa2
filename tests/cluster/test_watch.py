"""What launch/run.py does about what it sees of its launchers and hosts; test_launcher_watch.py has whole starts."""

from __future__ import annotations

from dataclasses import replace
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1
from typing import Any

import pytest

from megatron_tiedlora.cluster.decide import AT_ONCE, NEVER, Actions, Observation, Phase, State, Times, decide
from megatron_tiedlora.cluster.job_hosts import Answers
from megatron_tiedlora.cluster.job_processes import HostProcesses, JobProcess, Kind

TIMES = Times(look=30, grace=120, soon=2, linger=15, unreached=300, others=45, helper=10)
RUNNING, ENDED, TERMINATING, KILLING, OVER = Phase
NOW = 1000.0


def answers(kind: Kind, hosts: str = "a", *, unreached: str = "") -> Answers:
    """One process of a kind on each host."""
    reports = {host: HostProcesses(host, (JobProcess(7, kind, "python"),)) for host in hosts}
    return Answers(reports, dict.fromkeys(unreached, "slow"))


NOTHING = Answers({"a": HostProcesses("a", ())})
NO_ANSWER = Answers({"a": HostProcesses("a", ())}, {"b": "slow"})
SLOW = {"b": "slow"}
PASSED_ON = "SIGTERM is passed on; the job saves and ends (Ctrl-C again: kill)"
NO_RANK = "no rank is left on any host that can be reached, but mpirun does not end: killed"
NOT_THE_JOB = "the launcher has ended, but the job has not; the job is told to save and to stop:"
OTHERS = "torchrun on a has ended with 5; the others wait for it and are stopped"


def known(phase: Phase = RUNNING, **values: Any) -> State:
    """A state one second after a look was begun."""
    return State(**{"phase": phase, "looked_at": NOW - 1.0, **values})


def answered(phase: Phase = RUNNING, **values: Any) -> State:
    """A state whose look, begun in its phase one second ago, is now answered."""
    return known(phase, **{"asked": phase, **values})


def seen(now: float = NOW, **values: Any) -> Observation:
    """What is seen at a moment when nothing has happened."""
    return Observation(**{"now": now, "running": ["mpirun"], **values})


def ended(now: float = NOW, **values: Any) -> Observation:
    """The same when every launcher has ended."""
    return seen(now, running=[], **values)


def failed(now: float = NOW, **values: Any) -> Observation:
    """The same when one launcher of two has ended badly."""
    return seen(now, running=["torchrun on b"], failed=("torchrun on a", 5), **values)


def asks(phase: Phase, now: float = NOW) -> dict[str, Any]:
    """What a state knows of a look that is begun now."""
    return {"asked": phase, "looked_at": now}


def told(*lines: str, **values: Any) -> Actions:
    return Actions(say=list(lines), **values)


LOOK, STOP = {"ask": (0, False)}, {"ask": (SIGTERM, False)}
END, KILL, LAST_LOOK = {"ask": (SIGTERM, True)}, {"ask": (SIGKILL, True)}, {"ask": (0, True)}

# state, observation, what becomes different in the state, what is done
Row = tuple[State, Observation, dict[str, Any], Actions]
LOOKS: dict[str, Row] = {
    "no look is due": (known(), seen(NOW + 29), {}, told()),
    "a look is due": (known(), seen(NOW + 29.1), asks(RUNNING, NOW + 29.1), told(**LOOK)),
    "one look at a time": (known(asked=RUNNING), seen(NOW + 99), {}, told()),
    "the run has ended, not yet": (known(), seen(NOW + 1, reported=True), {}, told()),
    "the run has ended": (known(), seen(NOW + 1.1, reported=True), asks(RUNNING, NOW + 1.1), told(**LOOK)),
    "no rank works": (known(idle_since=NOW), seen(NOW + 1.1), asks(RUNNING, NOW + 1.1), told(**LOOK)),
    "ranks are told again": (known(stop=SIGTERM), seen(NOW + 1.1), asks(RUNNING, NOW + 1.1), told(**STOP)),
    "launchers have ended, not yet": (known(ENDED), ended(NOW + 1), {}, told()),
    "launchers have ended": (known(ENDED), ended(NOW + 1.1), asks(ENDED, NOW + 1.1), told(**LOOK)),
    "a pause while all are ended": (known(KILLING, looks=1), seen(NOW - 0.5), {}, told()),
    "after the pause": (known(KILLING, stop=SIGKILL), seen(NOW - 0.45), asks(KILLING, NOW - 0.45), told(**KILL)),
}
SIGNALS: dict[str, Row] = {
    "the first is passed on at once": (
        known(),
        seen(signals=[SIGTERM]),
        {"passed_on": SIGTERM, "stop": SIGTERM, **asks(RUNNING)},
        told(PASSED_ON, **STOP),
    ),
    "the first of two": (
        known(asked=RUNNING),
        seen(signals=[SIGUSR1, SIGTERM]),
        {"passed_on": SIGUSR1, "stop": SIGUSR1},
        told(PASSED_ON.replace("SIGTERM", "SIGUSR1")),
    ),
    "it waits for the look that is under way": (
        known(asked=RUNNING),
        seen(signals=[SIGTERM]),
        {"passed_on": SIGTERM, "stop": SIGTERM},
        told(PASSED_ON),
    ),
    "ranks that are being stopped hear of it at once": (
        known(stop=SIGUSR1),
        seen(signals=[SIGTERM]),
        {"passed_on": SIGTERM, **asks(RUNNING)},
        told(PASSED_ON, ask=(SIGUSR1, False)),
    ),
    "a second SIGTERM": (known(passed_on=SIGTERM, stop=SIGTERM), seen(signals=[SIGTERM, SIGTERM]), {}, told()),
    "one Ctrl-C": (known(passed_on=SIGINT, stop=SIGINT), seen(signals=[SIGINT]), {}, told()),
    "Ctrl-C after another signal": (
        known(passed_on=SIGTERM, stop=SIGTERM),
        seen(signals=[SIGTERM, SIGINT]),
        {"deadline": AT_ONCE},
        told("killing all"),
    ),
    "also after the launchers' end": (
        known(ENDED, passed_on=SIGINT, stop=SIGINT, deadline=NOW + 50),
        ended(signals=[SIGINT, SIGINT]),
        {"deadline": AT_ONCE},
        told("killing all"),
    ),
    "no time is left": (
        known(stop=SIGINT, deadline=AT_ONCE),
        seen(signals=[SIGINT, SIGINT]),
        {"phase": KILLING, "stop": SIGKILL, "deadline": NEVER, "looks": 3, **asks(KILLING)},
        told(kill_launchers=True, **KILL),
    ),
    "no time is left after the launchers' end": (
        known(ENDED, stop=SIGINT, deadline=AT_ONCE, asked=ENDED),
        ended(signals=[SIGINT, SIGINT]),
        {"phase": KILLING, "stop": SIGKILL, "deadline": NEVER, "looks": 3},
        told(kill_launchers=True),
    ),
    "not heard while all are ended": (known(TERMINATING, asked=TERMINATING), ended(signals=[SIGINT]), {}, told()),
}
LAUNCHERS: dict[str, Row] = {
    "all have ended": (known(), ended(), {"phase": ENDED, "looks": 2, **asks(ENDED)}, told(**LOOK)),
    "all have ended, ranks are being stopped": (
        known(stop=SIGTERM),
        ended(failed=("mpirun", 1)),
        {"phase": ENDED, "looks": 2, **asks(ENDED)},
        told(**STOP),
    ),
    "nothing is stopped after the end": (known(ENDED), ended(failed=("mpirun", 1)), {}, told()),
    "one has failed": (known(), failed(), {"failed_at": NOW}, told()),
    "others have time": (known(failed_at=NOW - 44.9), failed(), {}, told()),
    "others are stopped": (
        known(failed_at=NOW - 45),
        failed(),
        {"stop": SIGTERM, **asks(RUNNING)},
        told(OTHERS, **STOP),
    ),
    "a good end is not a failure": (known(), seen(NOW + 1, running=["torchrun on b"]), {}, told()),
    "ranks are being stopped anyway": (known(stop=SIGUSR1), failed(), {}, told()),
    "its host works all the same": (
        answered(failed_at=NOW - 20),
        failed(answers=answers("agent", "ab")),
        {"failed_at": NOW, "worked": True, "asked": None},
        told(),
    ),
    "its host worked before": (
        answered(failed_at=NOW - 0.5),
        failed(answers=answers("agent", "ab")),
        {"worked": True, "asked": None},
        told(),
    ),
    "its host works no more": (
        answered(failed_at=NOW - 20),
        failed(answers=answers("agent", "b")),
        {"worked": True, "asked": None},
        told(),
    ),
}
IDLE: dict[str, Row] = {
    "a rank works": (answered(), seen(answers=answers("rank")), {"worked": True, "asked": None}, told()),
    "none has worked yet": (answered(), seen(answers=answers("launcher")), {"asked": None}, told()),
    "none works any more": (
        answered(worked=True),
        seen(answers=answers("launcher")),
        {"idle_since": NOW, "asked": None},
        told(),
    ),
    "the run folder says that one has worked": (
        answered(),
        seen(answers=NOTHING, reported=True),
        {"worked": True, "idle_since": NOW, "asked": None},
        told(),
    ),
    "one works again": (
        answered(worked=True, idle_since=NOW - 14),
        seen(answers=answers("agent")),
        {"idle_since": NEVER, "asked": None},
        told(),
    ),
    "launchers have time": (answered(worked=True, idle_since=NOW - 15), seen(answers=NOTHING), {"asked": None}, told()),
    "launchers are killed": (
        answered(worked=True, idle_since=NOW - 15.1),
        seen(answers=NOTHING),
        {"asked": None},
        told(NO_RANK, kill_launchers=True),
    ),
    "more time while a host gives no answer": (
        answered(worked=True, idle_since=NOW - 300),
        seen(answers=NO_ANSWER),
        {"asked": None, "unreached": SLOW},
        told(),
    ),
    "but not for ever": (
        answered(worked=True, idle_since=NOW - 300.1),
        seen(answers=NO_ANSWER),
        {"asked": None, "unreached": SLOW},
        told(NO_RANK, kill_launchers=True),
    ),
}
AFTER: dict[str, Row] = {
    "nothing is left": (
        answered(ENDED, looks=2),
        ended(answers=NOTHING),
        {"phase": OVER, "looks": 1, "asked": None},
        told(),
    ),
    "a look from before the end does not count": (
        known(ENDED, asked=RUNNING, looks=2),
        ended(answers=NOTHING),
        asks(ENDED),
        told(**LOOK),
    ),
    "a host gives no answer": (
        answered(ENDED, looks=2),
        ended(answers=NO_ANSWER),
        {"looks": 1, "asked": None, "unreached": SLOW},
        told(),
    ),
    "nor the next time": (
        answered(ENDED, looks=1),
        ended(answers=NO_ANSWER),
        {"phase": OVER, "looks": 0, "asked": None, "unreached": SLOW},
        told(),
    ),
    "ranks are told to save": (
        answered(ENDED, looks=2),
        ended(answers=answers("rank")),
        {"stop": SIGTERM, "deadline": NOW + 120, **asks(ENDED)},
        told(NOT_THE_JOB, "  a: 7 (rank, python)", **STOP),
    ),
    "ranks that are being stopped": (
        answered(ENDED, looks=2, stop=SIGINT),
        ended(answers=answers("rank")),
        {"deadline": NOW + 120, "asked": None},
        told(),
    ),
    "ranks get no more time": (
        answered(ENDED, looks=2, stop=SIGTERM, deadline=NOW + 7),
        ended(answers=answers("rank")),
        {"asked": None},
        told(),
    ),
    "a helper": (
        answered(ENDED, looks=2),
        ended(answers=answers("launcher")),
        {"deadline": NOW + 10, "asked": None},
        told(),
    ),
    "a helper gets no more time": (
        answered(ENDED, looks=2, deadline=NOW + 7),
        ended(answers=answers("launcher")),
        {"asked": None},
        told(),
    ),
    "they have time": (known(ENDED, deadline=NOW + 0.1), ended(), {}, told()),
}
LAST: dict[str, Row] = {
    "the time has passed": (
        known(ENDED, deadline=NOW, looks=2),
        ended(),
        {"phase": TERMINATING, "stop": SIGTERM, "deadline": NEVER, **asks(TERMINATING)},
        told(**END),
    ),
    "a look from before SIGTERM does not count": (
        known(TERMINATING, asked=ENDED, stop=SIGTERM),
        ended(answers=NOTHING),
        asks(TERMINATING),
        told(**END),
    ),
    "all have been told": (
        answered(TERMINATING, stop=SIGTERM),
        ended(answers=NOTHING),
        {"stop": 0, "deadline": NOW + 10, **asks(TERMINATING)},
        told(**LAST_LOOK),
    ),
    "some are left": (
        answered(TERMINATING, deadline=NOW + 0.1, looked_at=NOW - 0.1),
        ended(answers=answers("rank")),
        {"asked": None},
        told(),
    ),
    "none is left, hosts without an answer apart": (
        answered(TERMINATING, deadline=NOW + 5),
        ended(answers=NO_ANSWER),
        {"phase": KILLING, "stop": SIGKILL, "deadline": NEVER, "looks": 3, "unreached": SLOW, **asks(KILLING)},
        told(kill_launchers=True, **KILL),
    ),
    "some are left when their time has passed": (
        known(TERMINATING, deadline=NOW),
        ended(),
        {"phase": KILLING, "stop": SIGKILL, "deadline": NEVER, "looks": 3, **asks(KILLING)},
        told(kill_launchers=True, **KILL),
    ),
    "a look from before SIGKILL does not count": (
        known(KILLING, asked=TERMINATING, looks=3, stop=SIGKILL),
        ended(answers=NOTHING),
        asks(KILLING),
        told(**KILL),
    ),
    "killed": (
        answered(KILLING, looks=3, stop=SIGKILL, looked_at=NOW),
        ended(answers=answers("rank", "ab")),
        {"looks": 2, "asked": None},
        told("killed on a: 7 (rank, python)", "killed on b: 7 (rank, python)"),
    ),
    "none is left": (
        answered(KILLING, looks=2, stop=SIGKILL),
        ended(answers=NO_ANSWER),
        {"phase": OVER, "looks": 1, "asked": None, "unreached": SLOW},
        told(),
    ),
    "killed for the last time": (
        answered(KILLING, looks=1, stop=SIGKILL, looked_at=NOW),
        ended(answers=answers("rank")),
        {"looks": 0, "asked": None},
        told("killed on a: 7 (rank, python)"),
    ),
    "some cannot be killed": (
        answered(KILLING, looks=0, stop=SIGKILL),
        ended(answers=answers("rank")),
        {"phase": OVER, "looks": -1, "asked": None},
        told("still there on a: 7 (rank, python)"),
    ),
}
TABLE = {**LOOKS, **SIGNALS, **LAUNCHERS, **IDLE, **AFTER, **LAST}


@pytest.mark.parametrize(("state", "observation", "changes", "actions"), TABLE.values(), ids=TABLE)
def test_what_is_done(state: State, observation: Observation, changes: dict[str, Any], actions: Actions) -> None:
    assert decide(state, observation, TIMES) == (replace(state, **changes), actions)


def test_no_name_stands_twice() -> None:
    assert len(TABLE) == sum(map(len, (LOOKS, SIGNALS, LAUNCHERS, IDLE, AFTER, LAST)))
