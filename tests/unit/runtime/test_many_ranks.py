"""What 64 and 1,024 ranks ask of the store, in keys; and the descriptors and connections that so many ranks need."""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_tiedlora.runtime import machine, process_group
from megatron_tiedlora.runtime.heartbeat import Heartbeat, PeerFailure
from megatron_tiedlora.runtime.launch_env import prepare_environment

BEAT = 0.05
HOST = socket.gethostname()


class Shared:
    """A store. Ranks of which there is no object have a host, eight a host, and a heartbeat that always changes."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.dead: set[int] = set()
        self._reads = 0

    def read(self, key: str) -> bytes:
        if key in self.values:
            return self.values[key]
        kind, _, rank = key.partition("/")
        assert rank, f"{key} is not there yet"
        self._reads += 1
        if kind == "host":
            return f"host{int(rank) // 8} 10.0.0.{int(rank) // 8}".encode()
        return b"5" if int(rank) in self.dead else str(self._reads).encode()


class Client:
    """A rank's connection to the store, which counts the keys that it names in each kind of call."""

    def __init__(self, shared: Shared) -> None:
        self.shared, self.keys = shared, Counter[str]()

    def set(self, key: str, value: str) -> None:
        self.keys["set"] += 1
        self.shared.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.multi_get([key])[0]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        self.keys["get"] += len(keys)
        return [self.shared.read(key) for key in keys]

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        self.keys["compare"] += 1
        if self.shared.values[key] == expected.encode():
            self.shared.values[key] = value.encode()
        return self.shared.values[key]


Make = Callable[[int], Heartbeat]


@pytest.fixture
def shared() -> Shared:
    return Shared()


@pytest.fixture(params=[64, 1024])
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def make(shared: Shared, size: int) -> Iterator[Make]:
    made: list[Heartbeat] = []

    def one(rank: int) -> Heartbeat:
        client: Any = Client(shared)
        line = Heartbeat(
            client,
            rank,
            size,
            step=lambda: 7,
            on_failure=lambda failure: None,
            reports_for_host=lambda: True,
            silence_seconds=30 * BEAT,
            beat_seconds=BEAT,
        )
        made.append(line)
        return line

    yield one
    for line in made:
        line._over.set()
        for thread in line._threads:
            thread.join(10)


def keys(line: Heartbeat) -> Counter[str]:
    store: Any = line.store
    return Counter(store.keys)


def test_only_rank_0_reads_every_ranks_host(make: Make, shared: Shared, size: int) -> None:
    """Each of the others reads one key, and knows all of them."""
    main, *others = (make(rank).start() for rank in (0, 1, size - 1))
    for line in (main, *others):
        line._over.set()
        for thread in line._threads:
            thread.join(10)
    assert keys(main)["get"] >= size
    for line in others:
        assert keys(line)["get"] <= 1 + 3 and keys(line)["set"] <= 2 + 1, "and one heartbeat at most"
        assert line.with_names("closed by [10.0.0.3]:1") == (
            "closed by [one of ranks 24, 25, 26, 27, 28, 29, 30, 31 on host3]:1"
        )
        assert line._host(9) == "host1" and line._host(0) == HOST


def test_a_second_costs_a_rank_the_same_at_any_number(make: Make, size: int) -> None:
    lines = [make(rank).start() for rank in (0, size // 2, size - 1)]
    begin = [keys(line) for line in lines]
    time.sleep(10 * BEAT)
    for line in lines:
        line._over.set()
        for thread in line._threads:
            thread.join(10)
    for line, before in zip(lines, begin, strict=True):
        spent = keys(line) - before
        beats = spent["set"] // (2 if line.rank == 0 else 1)
        assert beats >= 4 and spent["get"] == beats * (3 + size * (line.rank == 0)), (line.rank, spent)


def test_who_looks_for_a_reason_reads_the_same_at_any_number(make: Make, shared: Shared, size: int) -> None:
    """Rank 0 too: its thread has looked at all heartbeats anyway."""
    main, *others = (make(rank).start() for rank in (0, size // 2, size - 1))
    dead = size // 2 - 3
    time.sleep(3 * BEAT)
    shared.dead |= {dead, dead + 1}
    begin, found = [keys(line) for line in others], list[PeerFailure]()
    looking = [threading.Thread(target=lambda each=line: found.append(each.explain("closed"))) for line in others]
    for thread in looking:
        thread.start()
    for thread in looking:
        thread.join(20)
    named = ", ".join(f"rank {rank} on host{rank // 8}" for rank in (dead, dead + 1))
    reasons = {failure.reason for failure in found}
    assert (
        len(found) == 2 and len(reasons) == 1 and reasons.pop().startswith(f"{named} stopped responding after step 7")
    )
    assert sorted(failure.reports for failure in found) == [False, True]
    for line, before in zip(others, begin, strict=True):
        assert (keys(line) - before)["get"] < 3 * (48 + 15), "three keys a look, and three a heartbeat"
    before = keys(main)
    assert main.explain("closed").reason == found[0].reason
    assert (keys(main) - before)["get"] < 3 + 2 * (size + 3)


def test_rank_0_waits_only_for_those_that_still_beat(make: Make, shared: Shared, size: int) -> None:
    main = make(0)
    shared.values.update({f"beat/{rank}": b"left" for rank in range(size)} | {"beat/9": b"3"})
    timer = threading.Timer(3 * BEAT, shared.values.update, [{"beat/9": b"failed"}])
    timer.start()
    main.wait_for_others(beats=100)
    assert size <= keys(main)["get"] < size + 60 and not timer.is_alive()


# What rank 0's checks tell ------------------------------------------------------------------------------------------

HERE = "rank 5 on host0, after step 7: closed"
ONCE = pytest.mark.parametrize("size", [64], indirect=True)


@ONCE
@pytest.mark.parametrize(
    ("checks", "said"),
    [
        (["7", "8 2:2", "9 2:3", "10 2:4", "11 2:5", "12 2:6"], "rank 2 on host0 stopped"),
        (["7 2:3", "8 2:4", "9 2:5", "10 2:6", "11 2:7", "12 2:8"], "rank 2 on host0 stopped"),
        # each of these ranks has sent a heartbeat after the first check
        (["7 2:5", "8 2:6", "9"], HERE),
        (["7", "8 2:2", "9 3:2", "10 2:2"], HERE),
        (["7", "8", "9"], HERE),
        # a check is missed, as a rank reads four times in a heartbeat
        (["7", "11 2:4", "12 2:5 3:2"], "rank 2 on host0 stopped"),
        # rank 5 itself, and a rank that is not there
        (["7", "8 5:2", "9 5:3 64:3"], HERE),
        # a stranger's values between them
        (["", "7 2:2", "8 2:3", "9 2:4", "10 2:5", "11 2:6", "12 2:7"], "rank 2 on host0 stopped"),
        (["7", "", "8 2:2", "[1]", "9 2:3", "9 2", "10 2:4", "x:1", "12 2:6"], "rank 2 on host0 stopped"),
    ],
)
def test_the_reason_by_the_checks_of_rank_0(
    make: Make, shared: Shared, size: int, checks: list[str], said: str
) -> None:
    shared.values |= {
        "lost": b"",
        "reason": b"",
        "hosts": "\n".join(f"host{rank // 8} a" for rank in range(64)).encode(),
    }
    line, left = make(5), [check.encode() for check in checks]
    line.start()
    line._over.set()
    read = shared.read
    shared.read = lambda key: left.pop(0) if key == "lost" and left else read(key)  # type: ignore[method-assign]
    found = line.explain("closed").reason
    assert found.startswith(said), found
    assert not left, "it reads on until it knows"


@ONCE
@pytest.mark.parametrize(
    ("main", "lost", "said"),
    [
        (b"9", b"7", f"rank 0 on {HOST} stopped"),
        (b"9", b"no check", f"rank 0 on {HOST} stopped"),
        (None, b"no check", "rank 1 on "),  # rank 0 sends heartbeats, and a stranger hides its checks
        (b"left", b"7", "rank 1 on "),
    ],
)
def test_rank_0_that_no_longer_checks(
    make: Make, shared: Shared, size: int, main: bytes | None, lost: bytes, said: str
) -> None:
    make(0).start()._over.set()
    line = make(1).start()
    time.sleep(3 * BEAT)
    shared.values |= {"lost": lost} | ({"beat/0": main} if main else {})
    if main is None:
        del shared.values["beat/0"]  # changes with every look
    assert line.explain("closed").reason.startswith(said)
    assert line.main_lost == (main == b"9")


@pytest.mark.parametrize("value", [b"", b"\xff\xfe", b"\n" * 5000, b"a", b"x" * 2**20, b"a\x1b[2J 1.2.3.4\nb"])
def test_foreign_hosts_are_padded_and_shown_as_one_line(make: Make, shared: Shared, size: int, value: bytes) -> None:
    shared.values |= {"hosts": value, "lost": b"0", "reason": b""}
    line = make(3).start()
    said = line._gone_line(range(size))
    assert said.isprintable() and said.count(" on ") == 8 and len(said) < 20_000
    assert line.with_names("[10.0.0.1]") == "[10.0.0.1]"


# Descriptors --------------------------------------------------------------------------------------------------------


def test_a_rank_may_open_as_many_files_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[1]), before[1]))
        shown = machine.machine_record().nofile
        prepare_environment()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
        assert shown == (None if before[1] == resource.RLIM_INFINITY else before[1]), "what the doctor sees before"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("ranks", "given", "then"), [("512", None, None), ("513", None, "1"), ("1024", "0", "0"), (None, None, None)]
)
def test_above_512_ranks_gloo_connects_when_needed(
    monkeypatch: pytest.MonkeyPatch, ranks: str | None, given: str | None, then: str | None
) -> None:
    for name, value in (("WORLD_SIZE", ranks), ("TORCH_GLOO_LAZY_INIT", given)):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
        if value is not None:
            monkeypatch.setenv(name, value)
    seen: list[str | None] = []
    monkeypatch.setattr(
        distributed, "init_process_group", lambda *_, **__: seen.append(os.environ.get("TORCH_GLOO_LAZY_INIT"))
    )
    process_group.meet(torch.device("cpu"), timedelta(minutes=1))
    assert seen == [then]
