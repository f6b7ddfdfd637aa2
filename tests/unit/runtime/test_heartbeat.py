"""Who is still there: silent ranks are found and named, one reason holds for all, and one rank says it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from megatron_tiedlora.runtime.heartbeat import Heartbeat, PeerFailure, connect, is_lost_exchange, lost_exchange_line

BEAT, SILENCE = 0.1, 2.0
HOST = socket.gethostname()


class Ranks:
    """Heartbeats of some ranks in one process, each with a connection of its own, and what they were told."""

    def __init__(self, size: int, *, steps: int = 7) -> None:
        self.master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.failures: list[list[PeerFailure]] = [[] for _ in range(size)]
        self.lines = [
            Heartbeat(
                PrefixStore("t", self._client()),
                rank,
                size,
                step=lambda: steps,
                on_failure=self.failures[rank].append,
                reports_for_host=lambda: True,
                silence_seconds=SILENCE,
                beat_seconds=BEAT,
            )
            for rank in range(size)
        ]
        together([line.start for line in self.lines])

    def _client(self) -> TCPStore:
        limit = timedelta(seconds=20)
        return TCPStore("127.0.0.1", self.master.port, is_master=False, timeout=limit, wait_for_workers=False)

    def kill(self, rank: int) -> None:
        """The rank's threads end without a word."""
        self.lines[rank]._over.set()


def together(calls: list[Callable[[], object]]) -> list[object]:
    """What some calls return that wait for each other."""
    pool = ThreadPoolExecutor(len(calls))  # not left by a `with`, which would wait for one that hangs
    return [found.result(timeout=20) for found in [pool.submit(call) for call in calls]]


@pytest.fixture
def three() -> Iterator[Ranks]:
    ranks = Ranks(3)
    yield ranks
    for line in ranks.lines:
        line._over.set()


def wait_until(condition: Callable[[], bool], limit: float = 10.0) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < limit, "waited too long"
        time.sleep(0.01)
    return time.monotonic() - started


def test_nobody_is_lost_while_all_beat_or_leave(three: Ranks) -> None:
    three.lines[2].leave()
    time.sleep(1.5 * SILENCE)
    three.lines[0].leave()
    time.sleep(1.5 * SILENCE)
    assert three.failures == [[], [], []]


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_silent_rank_is_named_to_all_and_one_says_so(three: Ranks, dead: int) -> None:
    """Rank 0 too while the store lives, as under torchrun, whose agent serves the store."""
    three.kill(dead)
    left = [rank for rank in range(3) if rank != dead]
    seconds = wait_until(lambda: all(three.failures[rank] for rank in left))
    assert SILENCE - 3 * BEAT < seconds < 4 * SILENCE
    for rank in left:
        (failure,) = three.failures[rank]
        assert failure.reason.startswith(f"rank {dead} on {HOST} stopped responding after step 7")
        assert failure.reports == (rank == left[0])
    assert not three.failures[dead]


def test_the_store_gone(three: Ranks) -> None:
    """Rank 0's process has died, and the store with it: every other host says so for itself."""
    three.kill(0)
    del three.master
    for line in three.lines[1:]:
        line.store = Instead(refuse)  # type: ignore[assignment]
    wait_until(lambda: bool(three.failures[1] and three.failures[2]))
    assert all(f"as seen by rank {rank} on" in three.failures[rank][0].reason for rank in (1, 2))
    for symptom in ("closed by peer", "closed by [rank 2 on c]"):  # rank 2 may have ended since rank 0 is gone
        failure = three.lines[1].explain(symptom)
        assert failure.reason.startswith(f"rank 0 on {HOST} stopped responding") and failure.reports


@pytest.mark.parametrize(
    ("peer", "begins"),
    [
        ("one of ranks 2, 3 on b", f"rank 1 on {HOST}, after step 7: an exchange with a peer failed"),
        ("rank 0 on a", f"rank 0 on {HOST} stopped responding"),
    ],
)
def test_a_launcher_that_ends_all_ranks_after_one(three: Ranks, peer: str, begins: str) -> None:
    """The store goes with rank 0 while another rank looks why its exchange failed: the peer at whose end was first."""
    three.kill(0)
    symptom = f"an exchange with a peer failed (closed by [{peer}])"
    looking = threading.Thread(target=lambda: found.append(three.lines[1].explain(symptom)))
    found: list[PeerFailure] = []
    looking.start()
    time.sleep(BEAT)
    three.lines[1].store = Instead(refuse)  # type: ignore[assignment]
    looking.join(20)
    (failure,) = found
    assert failure.reports and failure.reason.startswith(begins)


class Instead:
    """A store each of whose calls is `answer`, which gets the name of the method first."""

    def __init__(self, answer: Callable[..., object]) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Callable[..., object]:
        return partial(self._answer, name)


def refuse(*_: object) -> object:
    raise RuntimeError("Connection refused")


def test_the_first_failure_is_everybodys_reason(three: Ranks) -> None:
    first = three.lines[2].failed("ValueError: bad")
    assert first == PeerFailure(f"rank 2 on {HOST}, after step 7: ValueError: bad", True)
    assert three.lines[1].failed("KeyError: other") == PeerFailure(first.reason, False)
    assert three.lines[0].explain("closed by peer") == PeerFailure(first.reason, False)


def test_explain_names_who_is_gone_within_a_few_beats(three: Ranks) -> None:
    three.kill(1)
    time.sleep(2 * BEAT)
    started = time.monotonic()
    failures = together([lambda: three.lines[0].explain("closed"), lambda: three.lines[2].explain("closed")])
    assert time.monotonic() - started < SILENCE, "before silence alone would tell"
    found = [failure for failure in failures if isinstance(failure, PeerFailure)]
    assert len(found) == 2 and all(f"rank 1 on {HOST} stopped responding" in failure.reason for failure in found)
    assert sorted(failure.reports for failure in found) == [False, True]


def test_explain_without_a_culprit_gives_the_symptom(three: Ranks) -> None:
    failure = three.lines[1].explain("timed out")
    assert failure == PeerFailure(f"rank 1 on {HOST}, after step 7: timed out", True)


def test_a_rank_that_does_not_end_by_itself_is_told_after_the_others_ended(three: Ranks) -> None:
    """Rank 1 hangs in an exchange that does not fail; the others have told their reason and gone."""
    three.lines[2].failed("ValueError: bad")
    three.lines[2].leave_failed()
    three.lines[0].explain("closed by peer")
    three.lines[0].leave_failed()
    wait_until(lambda: bool(three.failures[1]))
    assert three.failures[1] == [PeerFailure(f"rank 2 on {HOST}, after step 7: ValueError: bad", False)]


def test_rank_0_parts_last(three: Ranks) -> None:
    order: list[int] = []

    def end(rank: int) -> None:
        order.append(rank)
        three.lines[rank].leave_failed()

    timers = [threading.Timer(0.4 * BEAT * rank, end, [rank]) for rank in (1, 2)]
    for timer in timers:
        timer.start()
    three.lines[0].leave_failed()
    order.append(0)
    for timer in timers:
        timer.join()
    assert order == [1, 2, 0]


def test_at_a_good_end_all_leave_when_rank_0_does(three: Ranks) -> None:
    """Also where that takes longer than a silence; and rank 0, which serves the store, goes last."""
    order: list[int] = []

    def end(rank: int) -> None:
        time.sleep(1.5 * SILENCE * (rank == 0))
        order.append(-1 if rank == 0 else 0)
        three.lines[rank].leave_with_main()
        order.append(rank)

    together([partial(end, rank) for rank in range(3)])
    assert order[:3] == [0, 0, -1] and order[-1] == 0 and three.failures == [[], [], []]


def test_who_waits_for_rank_0_is_told_of_its_failure(three: Ranks) -> None:
    """Also where it has left before they look."""

    def fail() -> None:
        time.sleep(3 * BEAT)
        three.lines[0].failed("UserError: the disk is full")
        three.lines[0].leave()

    def wait(rank: int) -> None:
        with pytest.raises(DistError, match=f"^rank 0 on {HOST}, after step 7: UserError: the disk is full"):
            three.lines[rank].leave_with_main()

    together([fail, partial(wait, 1), partial(wait, 2)])


def test_threads_end_before_their_rank_has_left(three: Ranks) -> None:
    """One in a call of the store, when the interpreter ends, would abort the process."""
    line, store = three.lines[1], three.lines[1].store

    def slowly(name: str, *words: object) -> object:
        time.sleep(1.0)
        return getattr(store, name)(*words)

    line.store = Instead(slowly)  # type: ignore[assignment]
    time.sleep(2 * BEAT)
    line.leave()
    assert not any(thread.is_alive() for thread in line._threads)
    assert store.get("beat/1") == b"left"


def test_a_peers_address_gets_its_ranks_and_its_hosts_name(three: Ranks) -> None:
    line, address = three.lines[0], socket.gethostbyname(HOST)
    found = line.with_names(f"read error [{address}]:36246: reset")
    assert found == f"read error [one of ranks 0, 1, 2 on {HOST}]:36246: reset"
    assert line.with_names("read error [10.9.8.7]:1") == "read error [10.9.8.7]:1"
    line._hosts, line._addresses = ("a", "b", "c"), ("10.0.0.1", "10.9.8.7", "")
    assert line.with_names("read error [10.9.8.7]:1") == "read error [rank 1 on b]:1"


def test_what_says_no_more_than_that_an_exchange_failed() -> None:
    assert is_lost_exchange(RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"))
    assert is_lost_exchange(torch.distributed.DistBackendError("NCCL error"))
    assert not is_lost_exchange(RuntimeError("The size of tensor a (3) must match"))
    assert not is_lost_exchange(ValueError("gloo"))
    gloo = "[/build/gloo/pair.cc:537] Read error [10.0.0.2]:36246: Connection reset by peer. This is typically caused"
    found = lost_exchange_line(RuntimeError(gloo))
    assert found == "an exchange with a peer failed (Read error [10.0.0.2]:36246: Connection reset by peer)"
    nccl = "NCCL error in: /torch/csrc/ProcessGroupNCCL.cpp:94, remote error\nncclRemoteError: a\nLast error:\nbroken"
    assert lost_exchange_line(RuntimeError(nccl)) == "an exchange with a peer failed (broken)"


# What a stranger writes -------------------------------------------------------------------------------------------

LONG = 7 * 2**20  # the store itself takes up to 8 MiB
NOT_UTF8 = b"\xff\xfe"
REASONS = ["x", NOT_UTF8, "99 a rank that is not there", "-1 a", "\x00", "y" * LONG, '{"a": 1}', "1", " "]
FOREIGN: dict[str, list[str | bytes]] = {
    "lost": ["not json", "", NOT_UTF8, "[1e999]", '{"a": 1}', "null", "[1]", "99", "[-1]", "[true]", "[[1]]", '["1"]',
             "[" * 10**5, "1" * 5000, "[" + "1," * (LONG // 2 - 1) + "x]"],
    "beat/1": ["not a number", NOT_UTF8, "", "z" * LONG, "Left", "-1"],
    "beat/0": [NOT_UTF8, "NaN", ""],
    "reason": REASONS,
}  # fmt: skip


@pytest.mark.parametrize("key", FOREIGN)
def test_a_foreign_value_ends_no_thread(three: Ranks, key: str) -> None:
    """Every rank beats on, and nobody is taken for lost."""
    store = three.lines[2].store
    for value in FOREIGN[key]:
        store.set(key, value)  # type: ignore[arg-type]
        for each in three.lines:
            _await_beats(store, each.rank)
        assert all(thread.is_alive() for each in three.lines for thread in each._threads), value[:20]
        assert not any(each._lost or each._reason for each in three.lines), value[:20]
    assert three.failures == [[], [], []]


def _await_beats(store: Store, rank: int) -> None:
    """Until the rank has beaten twice, whatever stood there."""
    store.set(f"beat/{rank}", "")
    wait_until(lambda: store.get(f"beat/{rank}") != b"")
    first = store.get(f"beat/{rank}").decode()
    wait_until(lambda: store.get(f"beat/{rank}").decode() != first)


@pytest.mark.parametrize("value", REASONS, ids=lambda value: repr(value[:12]))
def test_a_foreign_reason_is_none(three: Ranks, value: str | bytes) -> None:
    """Who fails gives the reason all the same, and one of them shows it."""
    three.lines[2].store.set("reason", value)  # type: ignore[arg-type]
    three.lines[2].store.get("reason")  # what is set is there only once something has come back
    failures = together([partial(each.failed, f"ValueError: of {each.rank}") for each in three.lines])
    reasons = {failure.reason for failure in failures if isinstance(failure, PeerFailure)}
    assert len(reasons) == 1 and "ValueError: of" in reasons.pop()
    assert sorted(failure.reports for failure in failures if isinstance(failure, PeerFailure)) == [False, False, True]


def test_a_foreign_value_hides_no_silent_rank(three: Ranks) -> None:
    stop = threading.Event()

    def write() -> None:
        while not stop.wait(BEAT / 2):
            for key, value in (("lost", "not json"), ("reason", b"\xff"), ("beat/1", b"\xff\xff")):
                three.lines[0].store.set(key, value)  # type: ignore[arg-type]

    writer = threading.Thread(target=write)
    writer.start()
    try:
        three.kill(1)
        wait_until(lambda: bool(three.failures[0]))
    finally:
        stop.set()
        writer.join()
    assert three.failures[0][0].reason.startswith(f"rank 1 on {HOST} stopped responding")


def test_what_a_stranger_says_is_shown_as_one_line(three: Ranks) -> None:
    """A reason that could be a rank's counts; what it holds is escaped, and cut where it is long."""
    three.lines[0].store.set("reason", b"1 \x1b[2J\nerror: \xff" + b"x" * 10**6)  # type: ignore[arg-type]
    failure = three.lines[0].failed("ValueError: bad")
    assert failure.reason.startswith("\\x1b[2J\\nerror: \ufffdxxx") and failure.reason.isprintable()
    assert not failure.reports
    assert len(failure.reason) < 1300


@pytest.mark.parametrize("value", ["alone", b"\xff\xfe", "", " ", "h" * LONG, "a\nb 1.2.3.4 5"])
def test_hosts_that_are_no_hosts(value: str | bytes) -> None:
    """Written by a stranger before ranks look, as the last of the three that they wait for."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store = PrefixStore("t", master)
    store.set("host/1", value)  # type: ignore[arg-type]
    line = Heartbeat(store, 0, 2, step=lambda: 7, on_failure=lambda failure: None, reports_for_host=lambda: True)
    line.start()
    line.leave()
    said = line._gone_line([1])
    assert said.startswith("rank 1 on ") and said.isprintable() and len(said) < 1500
    assert line.with_names("read error [1.2.3.4]") == "read error [1.2.3.4]"


def test_hosts_whose_agents_count_restarts_differently_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun's agent counts its own ranks' failures, and not the new starts that another host's cause."""
    master = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(master.port))
    stores = []
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        stores.append(connect(limit=timedelta(seconds=5)))
    stores[0].set("host/0", HOST)
    assert stores[1].get("host/0").decode() == HOST
