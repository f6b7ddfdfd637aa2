"""One process writes a folder of the token cache: what killed ones leave, and how others wait for it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.run_files import grow_old, names
from support.task_files import refusal, write_rows
from support.token_rows import TokenStore, check_same, rows

from megatron_tiedlora.base import ownership
from megatron_tiedlora.base.ownership import OWNER_FILE
from megatron_tiedlora.data import cache

# What killed processes leave ----------------------------------------------------------------------------------------


class _Writer:
    """A process that tokenises `file`, and stands still when the first rows are in its files."""

    def __init__(self, store: TokenStore, file: str) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._tokenise, args=(store, file), daemon=True)
        self.process.start()
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        (self.partial,) = store.tokens.glob(".*.partial")

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def _tokenise(self, store: TokenStore, file: str) -> None:
        original = cache.encoded_rows

        def stopping(*arguments: Any) -> Iterator[Any]:
            for part in original(*arguments):
                yield part
                os.kill(os.getpid(), signal.SIGSTOP)

        cache.encoded_rows = stopping
        store.start(file)

    def end(self, number: int) -> int | None:
        os.kill(self.pid, number)
        self.process.join(30)
        return self.process.exitcode


Start = Callable[[str], _Writer]
Pair = tuple[str, str]


@pytest.fixture
def writing(store: TokenStore) -> Iterator[Start]:
    """Starts a `_Writer` for a file. It does not outlive the test."""
    started: list[_Writer] = []

    def start(file: str) -> _Writer:
        started.append(_Writer(store, file))
        return started[-1]

    yield start
    for writer in started:
        if writer.process.is_alive():
            writer.end(signal.SIGKILL)


@pytest.fixture
def files(tmp_path: Path) -> Pair:
    return write_rows(tmp_path / "a.jsonl", rows(9)), write_rows(tmp_path / "b.jsonl", rows(7))


def test_a_start_removes_what_killed_ones_have_left_of_any_data(store: TokenStore, files: Pair, writing: Start) -> None:
    writer = writing(files[0])
    assert list(writer.partial.glob(".writing-*/tokens"))
    store.start(files[1])
    grow_old(writer.partial, 600)  # its lock says that it lives
    store.start(files[1])
    assert list(writer.partial.glob(".writing-*/tokens"))
    assert writer.end(signal.SIGKILL) == -signal.SIGKILL
    store.start(files[1])
    assert {len(name) for name in names(store.tokens)} == {64}, names(store.tokens)


def test_where_locks_are_not_seen_age_decides(
    store: TokenStore, files: Pair, monkeypatch: pytest.MonkeyPatch, writing: Start
) -> None:
    writer = writing(files[0])
    writer.end(signal.SIGKILL)
    monkeypatch.setattr(ownership, "_is_unlocked", lambda _: None)
    for age, left in ((50, True), (70, False)):
        grow_old(writer.partial, age)
        store.start(files[1])
        assert writer.partial.exists() == left


# Waiting ------------------------------------------------------------------------------------------------------------


def test_a_writer_that_is_suspended_is_replaced(store: TokenStore, files: Pair, writing: Start) -> None:
    """It changes nothing when it wakes up, and takes what the other has written."""
    writer = writing(files[0])
    grow_old(writer.partial, 65)
    found = store.start(files[0])
    inodes = {path: path.stat().st_ino for path in store.tokens.rglob("*")}
    assert writer.end(signal.SIGCONT) == 0
    check_same(store.start(files[0]).train, found.train)
    assert {path: path.stat().st_ino for path in store.tokens.rglob("*")} == inodes
    assert not list(store.tokens.glob(".*"))


def _clock(monkeypatch: pytest.MonkeyPatch, each_second: Callable[[float], None]) -> None:
    """Let the cache's time pass without waiting."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        assert seconds <= 1.0
        now[0] += seconds
        each_second(now[0])

    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, time=time.time))


def test_a_start_that_waits_says_for_what_and_gives_up(
    store: TokenStore,
    files: Pair,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    writing: Start,
) -> None:
    writer = writing(files[0])
    (tokens,) = writer.partial.glob(".writing-*/tokens")
    size = tokens.stat().st_size

    def write(now: float) -> None:
        os.utime(writer.partial / OWNER_FILE)  # it lives
        if now < 400:  # and is slow
            os.truncate(tokens, int(size + now))

    _clock(monkeypatch, write)
    caplog.set_level(logging.INFO)
    message = refusal(lambda: store.start(files[0], timeout_minutes=3.0))
    who = rf"a launch on {socket.gethostname()} \(process {writer.pid}\) since \S+ \S+"
    way_out = "end that process, raise --timeout_minutes, or set MEGATRON_TIEDLORA_CACHE to another folder"
    assert re.fullmatch(
        rf"{files[0]}: {who} is tokenising it, but has written nothing for 3 minutes; {way_out}", message
    ), message
    lines = [record.getMessage() for record in caplog.records]
    pattern = rf"waiting for {who}, which tokenises {files[0]}: [0-9.]+ k?B so far, (\d+) s waited"
    waited = [int(found[1]) for line in lines if (found := re.fullmatch(pattern, line))]
    assert len(waited) == len(lines) and 10 <= waited[0] <= 12 and waited[-1] > 300, lines
    assert all(10 <= later - earlier <= 302 for earlier, later in pairwise(waited))
    caplog.clear()
    monkeypatch.setenv("SLURM_LOCALID", "1")  # srun's name: another rank of this host, which waits without a word
    assert refusal(lambda: store.start(files[0], timeout_minutes=3.0)) == message
    assert not caplog.records
    writer.end(signal.SIGKILL)


def test_a_start_that_waits_goes_on_when_the_writer_has_ended(store: TokenStore, files: Pair, writing: Start) -> None:
    """It takes what the writer has written, or writes it itself if the writer was killed."""
    for number, file in ((signal.SIGCONT, files[0]), (signal.SIGKILL, files[1])):
        writer = writing(file)
        threading.Timer(0.5, os.kill, (writer.pid, number)).start()
        assert len(store.start(file).train) > 0
        writer.process.join(30)  # a writer that goes on puts the files there before it has given its folder back
        assert not list(store.tokens.glob(".*"))


def test_one_of_several_processes_tokenises(store: TokenStore, tmp_path: Path, files: Pair) -> None:
    context = multiprocessing.get_context("fork")
    results, original = context.Queue(), cache.encoded_rows

    def slow(*arguments: Any) -> Iterator[Any]:
        (tmp_path / f"made-{time.monotonic_ns()}").touch()
        time.sleep(1.0)  # long enough for the others to arrive
        return original(*arguments)

    def tokenise() -> None:
        cache.encoded_rows = slow
        results.put(store.start(files[0]).train.sample(0).tolist())

    processes = [context.Process(target=tokenise) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert outcomes[0] == outcomes[1] and len(list(tmp_path.glob("made-*"))) == 1
