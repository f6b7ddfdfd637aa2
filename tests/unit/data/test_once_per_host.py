"""The ranks of a launch on one host read each data file once, and look at locks once a second; and foreign locks."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
from support.task_files import refusal, write_rows
from support.token_rows import TokenStore, check_same, rows

from megatron_tiedlora.base import output_folder
from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.ownership import take_folder
from megatron_tiedlora.data import cache, tables
from megatron_tiedlora.data.cache import once_per_host
from megatron_tiedlora.data.tables import HubData, file_key

WORK = "0123abcd"


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This is rank 0 of 4 of a launch; the folder of what its ranks share."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    return folder


def refuse() -> str:
    raise AssertionError("another rank has read it")


# Who reads ----------------------------------------------------------------------------------------------------------


def read_by_ranks(store: TokenStore, file: str, folder: Path) -> tuple[list[str], Counter[str]]:
    """What each of four ranks that start at the same time gets, and how often the host read each file to hash it."""
    context = multiprocessing.get_context("fork")
    results, begin = context.Queue(), context.Barrier(4)

    def hashed(file: Path) -> str:
        name = f"{file.name}-{time.monotonic_ns()}-{os.getpid()}"
        (folder / name).touch()
        time.sleep(0.1)
        return file_sha256(file)

    def be_rank(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        tables.file_sha256 = cache.file_sha256 = hashed
        begin.wait(30)
        results.put(store.start(file).sha256)

    folder.mkdir()
    processes = [context.Process(target=be_rank, args=(rank,)) for rank in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    return found, Counter(path.name.partition("-")[0] for path in folder.iterdir())


def test_a_host_reads_each_file_once(store: TokenStore, tmp_path: Path, launch: Path) -> None:
    """The data before and after it is tokenised, and each file of the cache."""
    data = write_rows(tmp_path / "a.jsonl", rows(9))
    arrays = dict.fromkeys(("tokens", "offsets", "supervised", "facts", "train", "validation"), 1)
    found, read = read_by_ranks(store, data, tmp_path / "first")
    assert len(set(found)) == 1 and read == {"a.jsonl": 2, **arrays}
    found, read = read_by_ranks(store, data, tmp_path / "again")
    assert len(set(found)) == 1 and not read, "the launcher and the files are the same"
    for shared in launch.iterdir():
        os.utime(shared, (0, 0))
    os.utime(data, (1, 1))
    found, read = read_by_ranks(store, data, tmp_path / "later")
    assert len(set(found)) == 1 and read == {"a.jsonl": 1, **arrays}, "old files are gone"


def test_a_changed_file_is_read_again(tmp_path: Path, launch: Path) -> None:
    """Also where its size and times are as before."""
    file = tmp_path / "a.jsonl"
    hashes, keys = set(), set()
    for text in ("one", "two"):
        file.write_text(text)
        os.utime(file, (1, 1))
        found = once_per_host(lambda: file_sha256(file), *file_key(file))
        assert found == file_sha256(file) == once_per_host(refuse, *file_key(file))
        hashes.add(found)
        keys.add(file_key(file))
        time.sleep(0.05)  # longer than a tick of the file system's clock
    assert len(hashes) == len(keys) == 2


def test_a_hub_data_set_is_loaded_once(launch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def hashed(self: HubData) -> str:
        loaded.append(self.split)
        return WORK

    monkeypatch.setattr(tables, "rows_sha256", hashed)
    monkeypatch.setattr(HubData, "rows", lambda self: self)
    monkeypatch.setattr(HubData, "data", property(lambda self: []))
    one, other = HubData("some/data", "train"), HubData("some/data", "test")
    assert one.sha256(once_per_host) == one.sha256(once_per_host) != other.sha256(once_per_host)
    assert loaded == ["train", "test"]
    assert one.sha256(lambda work, *_: work()) == one.sha256(once_per_host) and len(loaded) == 3


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"])
def test_other_launches_share_nothing(launch: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """A single rank, another launch, and a new start of the ranks."""
    assert once_per_host(lambda: WORK, "a") == WORK == once_per_host(refuse, "a")
    monkeypatch.setenv(variable, "1")
    assert once_per_host(lambda: "other", "a") == "other"


def test_an_error_is_each_ranks_own(launch: Path, tmp_path: Path) -> None:
    """The next rank reads too, and nothing stays locked."""
    missing = tmp_path / "none"
    for _ in range(2):
        assert f"{missing}: cannot be read" in refusal(once_per_host, lambda: file_sha256(missing), "a")
    assert once_per_host(lambda: WORK, "a") == WORK == once_per_host(refuse, "a")


def test_a_process_that_no_longer_waits_gives_no_wrong_word(launch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes its number after the word, at any time. And the numbers of many processes do not hide the word."""
    original = os.pread

    def pread(number: int, size: int, offset: int) -> bytes:
        (shared,) = launch.iterdir()
        if shared.read_bytes().endswith(b"\n"):
            shared.write_bytes(shared.read_bytes() + b"4217 ")
        return original(number, size, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", pread)
        for _ in range(2):
            assert once_per_host(lambda: WORK, "a") == WORK
    (shared,) = launch.iterdir()
    shared.write_text(f"{'4217 ' * 1000}{WORK}\n")
    assert once_per_host(refuse, "a") == WORK


# Waiting ------------------------------------------------------------------------------------------------------------


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The cache's time, which passes without waiting."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        assert 0 < seconds <= 1.0
        now[0] += seconds

    monkeypatch.setattr(cache, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_rank_says_for_whom_it_waits_and_reads_in_the_end(
    launch: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, local_rank: int
) -> None:
    """The rank that reads may be suspended."""
    once_per_host(lambda: WORK, "/data/a.jsonl", 7)
    (shared,) = launch.iterdir()
    shared.write_text("41 4217 ")  # process 41 was killed, and process 4217 reads
    now = clock(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    caplog.set_level(logging.INFO)
    with shared.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert once_per_host(lambda: "own", "/data/a.jsonl", 7) == "own"
    assert 600 <= now[0] < 602
    lines = [record.getMessage() for record in caplog.records]
    pattern = r"waiting for process 4217, which reads /data/a.jsonl, (\d+) s waited"
    waited = [int(found[1]) for line in lines if (found := re.fullmatch(pattern, line))]
    assert len(lines) == len(waited) and waited == ([11, 22, 44, 88, 176, 352] if local_rank == 0 else [])


def test_what_a_killed_rank_began_is_read_by_the_next(launch: Path) -> None:
    once_per_host(lambda: WORK, "a")
    (shared,) = launch.iterdir()
    for left in ("", "4217 ", "4217 0123ab"):
        shared.write_text(left)
        assert once_per_host(lambda: WORK, "a") == WORK == once_per_host(refuse, "a")


def test_processes_that_waited_too_long_write_without_the_lock(launch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their numbers, before and after the word, are not taken for it, however many they are."""
    numbers, read = b"".join(b"%d " % number for number in range(4000000, 4000200)), os.pread

    def others_first(file: int, *where: int) -> bytes:
        os.write(file, numbers)
        return read(file, *where)

    monkeypatch.setattr(os, "pread", others_first)
    assert once_per_host(lambda: WORK, "a") == WORK == once_per_host(refuse, "a")


def test_locks_of_the_cache_are_looked_at_once_a_second(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder that the other process makes more often."""
    data, looks = write_rows(store.folder / "a.jsonl", rows(9)), Counter[str]()
    first = store.start(data)
    made = max(store.tokens.iterdir(), key=lambda path: (path / "tokens").exists())
    away = made.rename(store.folder / "away")
    take, exists, words = output_folder.take_output, Path.exists, cache.owner_in_words
    now = clock(monkeypatch)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if name != "exists" or arguments[0] == made:
                looks[name] += 1
            if now[0] > 20 and name == "exists" and exists(away):
                away.rename(made)
            return function(*arguments, **keywords)

        return call

    with take_folder(output_folder.partial_folder(made), hint=""):
        monkeypatch.setattr(output_folder, "remove_abandoned_outputs", lambda _: None)
        monkeypatch.setattr(output_folder, "take_output", counted("lock", take))
        monkeypatch.setattr(cache, "owner_in_words", counted("owner", words))
        monkeypatch.setattr(Path, "exists", counted("exists", exists))
        found = store.start(data)
    assert 20 < now[0] < 22
    assert 15 <= looks["lock"] <= 21 and looks["owner"] <= 21 and looks["exists"] > 30, looks
    check_same(found.train, first.train)


# Locks that do not work ---------------------------------------------------------------------------------------------


def no_locks(*_: Any) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_a_file_system_without_locks(
    store: TokenStore, launch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_rows(tmp_path / "a.jsonl", rows(9))
    expected = store.start(data)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setenv("MASTER_PORT", "29501")
    check_same(TokenStore(store.tokenizer, tmp_path / "other").start(data).train, expected.train)


@pytest.mark.parametrize("what", ["link", "folder", "of another user", "no folder"])
def test_a_shared_file_that_cannot_be_trusted(
    launch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    once_per_host(lambda: WORK, "a")
    (shared,) = launch.iterdir()
    kept = tmp_path / "kept"
    kept.write_text("1 forged\n")
    if what == "of another user":
        shared.write_text("1 forged\n")
        own = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    else:
        shared.unlink()
    if what == "link":
        shared.symlink_to(kept)
    elif what == "folder":
        shared.mkdir()
    elif what == "no folder":
        launch.rmdir()
    assert once_per_host(lambda: WORK, "a") == WORK
    assert kept.read_text() == "1 forged\n"


def test_other_users_cannot_write_the_shared_file(launch: Path) -> None:
    before = os.umask(0)
    try:
        once_per_host(lambda: WORK, "a")
    finally:
        os.umask(before)
    (shared,) = launch.iterdir()
    assert shared.stat().st_mode & 0o777 == 0o600


HOLD = """
import errno, fcntl, sys, time
def no_locks(*_): raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = no_locks
import filelock
lock = filelock.FileLock(sys.argv[1])
lock.acquire(timeout=5)
print("held", flush=True)
time.sleep(60)
"""


def test_the_libraries_locks_where_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `filelock>=4.1` is asked for: where the file system has no locks, a file's existence is the lock that
    `datasets` and `huggingface_hub` take, and the file of a killed process of this host does not count. 3.23 raises
    NotImplementedError, and 4.0 removes the file of a process that lives."""
    lock = tmp_path / "data.lock"
    holder = subprocess.Popen([sys.executable, "-W", "ignore", "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with warnings.catch_warnings(action="ignore"):  # that it falls back
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(lock).acquire(timeout=0.3)
        holder.kill()
        holder.communicate(timeout=10)
        with filelock.FileLock(lock).acquire(timeout=10):
            assert lock.exists()
