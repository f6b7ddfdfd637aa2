"""One process writes a folder of the token cache: what killed ones leave, and how others wait for it."""

from __future__ import annotations

import json
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
from ownership_files import grow_old, names
from task_files import refusal, write_rows
from token_rows import check_same, encoding, rows

from megatron_tiedlora.base.ownership import OWNER_FILE
from megatron_tiedlora.data import cache
from megatron_tiedlora.data.cache import TrainingData, tokenised_once

# What killed processes leave ----------------------------------------------------------------------------------------


def _start(tokenizer: Any, file: str, cache_dir: Path, **keywords: Any) -> TrainingData:
    return tokenised_once(encoding(tokenizer), files={"train": file}, seed=0, cache_dir=cache_dir, **keywords)


class _Writer:
    """A process that tokenises `file`, and stands still when the first rows are in its files."""

    def __init__(self, tokenizer: Any, file: str, cache_dir: Path) -> None:
        self._cache_dir = cache_dir
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._tokenise, args=(tokenizer, file), daemon=True)
        self.process.start()
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)
        (self.partial,) = (cache_dir / "tokens").glob(".*.partial")

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def _tokenise(self, tokenizer: Any, file: str) -> None:
        original = cache.encoded_rows

        def stopping(*arguments: Any) -> Iterator[Any]:
            for part in original(*arguments):
                yield part
                os.kill(os.getpid(), signal.SIGSTOP)

        cache.encoded_rows = stopping
        _start(tokenizer, file, self._cache_dir)

    def end(self, number: int) -> int | None:
        os.kill(self.pid, number)
        self.process.join(30)
        return self.process.exitcode


@pytest.fixture
def writing(tokenizer: Any, tmp_path: Path) -> Iterator[Callable[[str], _Writer]]:
    """Starts a `_Writer` for a file. It does not outlive the test."""
    started: list[_Writer] = []

    def start(file: str) -> _Writer:
        started.append(_Writer(tokenizer, file, tmp_path))
        return started[-1]

    yield start
    for writer in started:
        if writer.process.is_alive():
            writer.end(signal.SIGKILL)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    return write_rows(tmp_path / "a.jsonl", rows(9)), write_rows(tmp_path / "b.jsonl", rows(7))


def test_a_start_removes_what_killed_ones_have_left_of_any_data(
    tokenizer: Any, tmp_path: Path, files: tuple[str, str], writing: Callable[[str], _Writer]
) -> None:
    writer = writing(files[0])
    assert list(writer.partial.glob(".writing-*/tokens"))
    _start(tokenizer, files[1], tmp_path)
    grow_old(writer.partial, 600)  # its lock says that it lives
    _start(tokenizer, files[1], tmp_path)
    assert list(writer.partial.glob(".writing-*/tokens"))
    assert writer.end(signal.SIGKILL) == -signal.SIGKILL
    _start(tokenizer, files[1], tmp_path)
    assert {len(name) for name in names(tmp_path / "tokens")} == {64}, names(tmp_path / "tokens")


def test_where_locks_are_not_seen_age_decides(
    tokenizer: Any,
    tmp_path: Path,
    files: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    writing: Callable[[str], _Writer],
) -> None:
    from megatron_tiedlora.base import ownership

    writer = writing(files[0])
    writer.end(signal.SIGKILL)
    monkeypatch.setattr(ownership, "_is_unlocked", lambda _: None)
    for age, left in ((50, True), (70, False)):
        grow_old(writer.partial, age)
        _start(tokenizer, files[1], tmp_path)
        assert writer.partial.exists() == left


# Waiting ------------------------------------------------------------------------------------------------------------


def test_a_writer_that_is_suspended_is_replaced(
    tokenizer: Any, tmp_path: Path, files: tuple[str, str], writing: Callable[[str], _Writer]
) -> None:
    """It changes nothing when it wakes up, and takes what the other has written."""
    writer = writing(files[0])
    grow_old(writer.partial, 65)
    found = _start(tokenizer, files[0], tmp_path)
    inodes = {path: path.stat().st_ino for path in (tmp_path / "tokens").rglob("*")}
    assert writer.end(signal.SIGCONT) == 0
    check_same(_start(tokenizer, files[0], tmp_path).train, found.train)
    assert {path: path.stat().st_ino for path in (tmp_path / "tokens").rglob("*")} == inodes
    assert not list((tmp_path / "tokens").glob(".*"))


def _clock(monkeypatch: pytest.MonkeyPatch, each_second: Callable[[float], None]) -> None:
    """Let the cache's time pass without waiting."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        assert seconds <= 1.0
        now[0] += seconds
        each_second(now[0])

    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, time=time.time))


def test_a_start_that_waits_says_for_what_and_gives_up(
    tokenizer: Any,
    tmp_path: Path,
    files: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    writing: Callable[[str], _Writer],
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
    message = refusal(lambda: _start(tokenizer, files[0], tmp_path, timeout_minutes=3.0))
    who = rf"a start on {socket.gethostname()} \(process {writer.pid}\) since \S+ \S+"
    way_out = "end that process, give a longer --timeout_minutes, or set MEGATRON_TIEDLORA_CACHE to another folder"
    assert re.fullmatch(
        rf"{files[0]}: {who} tokenises it, and has written nothing for 3 minutes; {way_out}", message
    ), message
    lines = [record.getMessage() for record in caplog.records]
    pattern = rf"waiting for {who}, which tokenises {files[0]}: [0-9.]+ k?B so far, (\d+) s waited"
    waited = [int(found[1]) for line in lines if (found := re.fullmatch(pattern, line))]
    assert len(waited) == len(lines) and 10 <= waited[0] <= 12 and waited[-1] > 300, lines
    assert all(10 <= later - earlier <= 302 for earlier, later in pairwise(waited))
    caplog.clear()
    monkeypatch.setenv("SLURM_LOCALID", "1")  # srun's name: another rank of this host, which waits without a word
    assert refusal(lambda: _start(tokenizer, files[0], tmp_path, timeout_minutes=3.0)) == message
    assert not caplog.records
    writer.end(signal.SIGKILL)


def test_a_start_that_waits_goes_on_when_the_writer_has_ended(
    tokenizer: Any, tmp_path: Path, files: tuple[str, str], writing: Callable[[str], _Writer]
) -> None:
    """It takes what the writer has written, or writes it itself if the writer was killed."""
    for number, file in ((signal.SIGCONT, files[0]), (signal.SIGKILL, files[1])):
        writer = writing(file)
        threading.Timer(0.5, os.kill, (writer.pid, number)).start()
        assert len(_start(tokenizer, file, tmp_path).train) > 0
        writer.process.join(30)  # a writer that goes on puts the files there before it has given its folder back
        assert not list((tmp_path / "tokens").glob(".*"))


# Damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["sha256", "mix", "first_row", "chats", "unended"])
@pytest.mark.parametrize("change", ["another value", "missing"])
def test_facts_have_a_checksum(tokenizer: Any, tmp_path: Path, files: tuple[str, str], field: str, change: str) -> None:
    first = _start(tokenizer, files[0], tmp_path)
    changed = 0
    for file in (tmp_path / "tokens").glob("*/content.json"):
        content = json.loads(file.read_text())
        if field in content["facts"]:
            value = content["facts"].pop(field)
            if change == "another value":
                content["facts"][field] = {"sha256": "0" * 64, "mix": ["x"], "first_row": 7}.get(field, not value)
            file.write_text(json.dumps(content))
            changed += 1
    again = _start(tokenizer, files[0], tmp_path)
    assert changed == 1
    for name in ("sha256", "mix", "first_row", "chats", "unended"):
        assert getattr(again, name) == getattr(first, name)


@pytest.mark.parametrize("name", ["tokens", "facts", "train", "content.json"])
def test_sizes_are_compared_before_anything_is_read(
    tokenizer: Any, tmp_path: Path, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = _start(tokenizer, files[0], tmp_path)
    for grown in (tmp_path / "tokens").glob(f"*/{name}"):
        os.truncate(grown, 2**40)
        hashed, original = [], cache.mapped_arrays.__globals__["file_sha256"]

        def watched(file: Path) -> str:
            assert file.stat().st_size < 2**30
            hashed.append(file.parent)  # noqa: B023
            return str(original(file))  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setitem(cache.mapped_arrays.__globals__, "file_sha256", watched)
            assert cache.mapped_arrays(grown.parent, cache._STORE if name != "train" else cache._SPLITS) is None
        assert not hashed
    check_same(_start(tokenizer, files[0], tmp_path).train, first.train)
