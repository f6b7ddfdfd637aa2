"""One writer per folder: who gets it, who is told what, and that a former owner changes nothing any more."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.run_files import HINT, grow_old, leave_dead, names, take
from support.task_files import refusal

from megatron_tiedlora.base import ownership
from megatron_tiedlora.base.files import remove_leftovers
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import OWNER_FILE, STALE_SECONDS, FolderLock, FolderTaken

# Who gets it --------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner_and_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    lock = take(folder)
    for keywords in ({}, {"resumes": True}):
        said = refusal(take, folder, **keywords)
        assert said.startswith(f"{folder}: a launch on {socket.gethostname()} (process {os.getpid()}) since ")
        assert said.endswith(f"is using this folder (last seen 0 s ago); {HINT}")
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", said)
    lock.owner.check()
    assert names(folder) == {OWNER_FILE}
    lock.release()
    lock.release()
    assert names(tmp_path) == set(), "what was made for nothing is gone"
    with take(folder):
        (folder / "file").touch()
    assert names(folder) == {"file"}, "what was written stays"


def test_a_new_folder_must_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            take(tmp_path / name, new=True)
    for name in ("link", "link/run"):
        assert f"{name}: cannot be " in refusal(take, tmp_path / name)
    assert names(tmp_path / "there") == set()


def test_the_dead_of_this_machine_are_replaced_at_once(tmp_path: Path) -> None:
    """Also a process that nobody has waited for."""
    token = leave_dead(tmp_path)
    with take(tmp_path) as lock:
        assert (tmp_path / OWNER_FILE).read_text() != token
        lock.owner.check()
    assert names(tmp_path) == set()
    process = multiprocessing.get_context("fork").Process(target=take, args=(tmp_path,))
    process.start()
    os.waitid(os.P_PID, process.pid or 0, os.WEXITED | os.WNOWAIT)
    take(tmp_path).release()
    process.join()


def test_the_owner_of_another_machine_is_told_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_dead(tmp_path)  # no process holds the lock: it may live where locks are not seen from here
    monkeypatch.setattr(ownership, "_machine", lambda: "another")
    for age in (0.0, STALE_SECONDS - 5):
        grow_old(tmp_path, age)
        for keywords in ({}, {"resumes": True}):
            assert f"last seen {age:.0f} s ago" in refusal(take, tmp_path, **keywords)
    grow_old(tmp_path, STALE_SECONDS + 5)
    take(tmp_path).release()


@pytest.mark.parametrize("process", ["lives", "is of another container", "is not named"])
def test_a_lock_that_two_machines_do_not_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: str) -> None:
    """Clones of a machine have one id. A free lock is believed once the token is old as well."""
    if process == "lives":
        first = take(tmp_path)
        monkeypatch.setattr(ownership, "_is_unlocked", lambda _: True)
    else:
        content = json.loads(leave_dead(tmp_path)) | {"processes": "pid:[1]"}
        if process == "is not named":  # as in tokens without that field
            content.pop("processes", None)
        (tmp_path / OWNER_FILE).write_text(json.dumps(content))
    grow_old(tmp_path, 15)
    assert "last seen 15 s ago" in refusal(take, tmp_path, resumes=True)
    grow_old(tmp_path, 25)
    take(tmp_path).release()
    if process == "lives":
        first.release()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("way", ["old", "given up"])
def test_an_owner_that_is_silent_is_replaced_by_a_start_that_resumes(tmp_path: Path, way: str) -> None:
    first = take(tmp_path)
    if way == "old":
        grow_old(tmp_path, STALE_SECONDS + 5)
    else:
        peer = ownership.Owner(tmp_path, first.owner.start, is_main=False)
        peer.give_up()
        peer.check()  # its peers may still write down why
        said = refusal(first.owner.check)
        assert "no longer received this rank's heartbeat, so this launch made no further changes" in said
    assert "is using this folder" in refusal(take, tmp_path)
    second = take(tmp_path, resumes=True)
    second.owner.check()
    by = f"a launch on {socket.gethostname()} (process {os.getpid()})"
    assert refusal(first.owner.check).startswith(f"{tmp_path}: {by} took it over at ")
    first.owner.give_up()  # too late: the folder is another's
    first.release()
    second.owner.check()
    second.release()
    assert names(tmp_path) == set()


def test_a_folder_that_is_gone_or_emptied(tmp_path: Path) -> None:
    lock = take(tmp_path / "run")
    (tmp_path / "run" / OWNER_FILE).unlink()
    assert f"its file {OWNER_FILE} is missing" in refusal(lock.owner.check)
    (tmp_path / "run").rmdir()
    assert "the folder was removed, moved or replaced" in refusal(lock.owner.check)
    lock.release()
    assert names(tmp_path) == set()


def test_an_owner_renews_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_RENEW_SECONDS", 0.05)
    with take(tmp_path):
        grow_old(tmp_path, 100)
        deadline = time.monotonic() + 10
        while (tmp_path / OWNER_FILE).stat().st_mtime < time.time() - 50:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_child_that_has_the_lock_keeps_the_folder(tmp_path: Path) -> None:
    with take(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.descriptor,))
    assert "is using this folder" in refusal(take, tmp_path, resumes=True)
    child.communicate(b"\n")
    grow_old(tmp_path, 25)  # the process that took the folder lives
    take(tmp_path).release()
    assert names(tmp_path) == set()


def _refuse(*_: Any) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("lacking", ["links", "locks"])
def test_file_systems_that_lack_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(*((os, "link") if lacking == "links" else (fcntl, "flock")), _refuse)
    first = take(tmp_path)
    assert "is using this folder" in refusal(take, tmp_path, resumes=True)
    grow_old(tmp_path, STALE_SECONDS + 5)
    second = take(tmp_path, resumes=True)
    second.owner.check()
    first.release()
    second.release()
    assert names(tmp_path) == set()


def test_a_start_that_looks_in_vain_is_no_leftover_of_the_owner(tmp_path: Path) -> None:
    """The owner's clean-up takes no other start's token away, which would then not know what to say."""
    with take(tmp_path) as lock:
        (tmp_path / ".owner-new-x").write_text("{}")
        remove_leftovers(tmp_path, guard=lock.owner.check)
        assert (tmp_path / ".owner-new-x").is_file() and ownership.is_of_owner(".owner-new-x")
    old = time.time() - 2 * STALE_SECONDS
    os.utime(tmp_path / ".owner-new-x", (old, old))
    take(tmp_path).release()
    assert names(tmp_path) == set()


def test_tokens_of_starts_that_were_killed_while_they_took_the_folder(tmp_path: Path) -> None:
    """Those of this machine go at once; that of a start which lives, or which may live on another machine, stays."""
    token = leave_dead(tmp_path)
    of_another = token.replace(ownership._machine(), "another")
    for name, text in {"dead": token, "lives": token, "elsewhere": of_another}.items():
        (tmp_path / f".owner-new-{name}").write_text(text)
    with (tmp_path / ".owner-new-lives").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        take(tmp_path).release()
        assert names(tmp_path) == {".owner-new-lives", ".owner-new-elsewhere"}


@pytest.mark.parametrize("skew", [-1000.0, 1000.0])
def test_clocks_of_hosts_differ_from_the_file_server_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """Another host's start that is about to take the folder keeps its token; that of a killed one goes."""
    ours = time.time
    monkeypatch.setattr(time, "time", lambda: ours() + skew)
    for name, age in (("young", 0.0), ("old", 2 * STALE_SECONDS)):
        file = tmp_path / f".owner-new-{name}"
        file.write_text("{}")
        os.utime(file, (ours() - age,) * 2)
    take(tmp_path).release()
    assert names(tmp_path) == {".owner-new-young"}


def test_a_folder_that_another_gives_back_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It vanishes between the look at it and the first file in it."""
    folder, original, calls = tmp_path / "run", os.open, []

    def late(path: Any, *arguments: Any, **keywords: Any) -> int:
        if ".owner-new-" in str(path) and not calls:
            calls.append(path)
            folder.rmdir()
        return original(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", late)
    with take(folder, removed_after=True) as lock:
        lock.owner.check()
    assert calls and names(tmp_path) == set()


@pytest.mark.parametrize("links", [True, False])
def test_an_owner_that_is_suspended_while_it_gives_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """At each line of it in turn, another start takes the folder, which then stays that start's."""
    if not links:
        monkeypatch.setattr(os, "link", _refuse)
    lines = 0
    while (second := _taken_at_line(tmp_path, take(tmp_path), lines)) is not None:
        second.owner.check()
        second.release()
        assert names(tmp_path) == set(), f"line {lines}"
        lines += 1
    assert lines > 20


def _taken_at_line(folder: Path, first: FolderLock, line: int) -> FolderLock | None:
    """Another start takes the folder at this line of all that `release` runs. None: it has fewer lines."""
    found, seen = [], 0

    def suspended(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != ownership.__file__:
            return None
        if event == "line":
            if seen == line:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(ownership, "_LOCK_SECONDS", 0.0)
                    found.append(take(folder, take_over=True))
            seen += 1
        return suspended

    sys.settrace(suspended)
    try:
        first.release()
    finally:
        sys.settrace(None)
    return found[0] if found else None


def test_a_folder_that_somebody_else_has_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as `flock FOLDER rsync`, or a start that stands still: it is waited for a moment, and no longer."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    monkeypatch.setattr(ownership, "_LOCK_SECONDS", 0.2)
    started = time.monotonic()
    with take(tmp_path):
        assert "is using this folder" in refusal(take, tmp_path, resumes=True)
    assert time.monotonic() - started < 5
    os.close(descriptor)
    assert names(tmp_path) == set()


ABSURD = ("1e300", "-1e300", "1e18", "-5", "NaN", '"x"')
UNREADABLE = ("", "[]", "{}", "x" * 100_000, '{"start": 1}', "\0")


@pytest.mark.parametrize(
    "content",
    [*UNREADABLE, *(f'{{"start": "x", "host": "h", "pid": 1, "machine": "m", "since": {since}}}' for since in ABSURD)],
)
def test_a_token_that_says_nothing(tmp_path: Path, content: str) -> None:
    """A start that was killed as it took the folder, or a stranger's file: free once it is old."""
    (tmp_path / OWNER_FILE).write_text(content)
    assert "another launch is using this folder" in refusal(take, tmp_path, resumes=True)
    assert ownership.owner_in_words(tmp_path) is None
    grow_old(tmp_path, STALE_SECONDS + 5)
    take(tmp_path, resumes=True).release()


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
@pytest.mark.timeout(30, method="thread")
def test_a_token_that_is_no_file(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "other").write_text("other")
    place = folder / OWNER_FILE
    if kind == "link":
        place.symlink_to(tmp_path / "other")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    with pytest.raises(UserError):
        take(folder, resumes=True)
    if kind != "folder":
        take(folder, take_over=True).release()
        assert names(folder) == set()
    assert (tmp_path / "other").read_text() == "other"


def _take_together(folder: Path, barrier: Any, won: Any, over: Any) -> None:
    barrier.wait()
    try:
        lock = take(folder, resumes=True)
    except FolderTaken:
        return
    won.put(lock.owner.start)
    over.wait()
    os._exit(0)  # as a killed process does: nothing is given back


@pytest.mark.parametrize("before", ["nothing", "the dead"])
def test_of_many_at_once_one_gets_it(tmp_path: Path, before: str) -> None:
    if before == "the dead":
        leave_dead(tmp_path)
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        barrier, won, over = context.Barrier(6), context.Queue(), context.Event()
        processes = [context.Process(target=_take_together, args=(tmp_path, barrier, won, over)) for _ in range(6)]
        for process in processes:
            process.start()
        winner = won.get(timeout=60)
        deadline = time.monotonic() + 60
        while sum(process.is_alive() for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert won.empty()
        token = ownership.read_token(tmp_path / OWNER_FILE)
        assert token is not None and token.start == winner
        over.set()
        for process in processes:
            process.join(60)
        if before == "nothing":
            (tmp_path / OWNER_FILE).unlink()
