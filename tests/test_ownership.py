"""One writer per folder: who gets it, who is told what, and that a former owner changes nothing any more."""

from __future__ import annotations

import fcntl
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

from megatron_tiedlora.checkpoint import ownership
from megatron_tiedlora.checkpoint.atomic import discard, new_folder, remove_leftovers, write_text
from megatron_tiedlora.checkpoint.output_folder import new_output, take_output, take_output_folder
from megatron_tiedlora.checkpoint.ownership import (
    OWNER_FILE,
    STALE_SECONDS,
    FolderLock,
    FolderTaken,
    OwnerLost,
    take_folder,
)
from megatron_tiedlora.config.errors import UserError

HINT = "wait for its end"


def take(folder: Path, **keywords: Any) -> FolderLock:
    return take_folder(folder, hint=HINT, **keywords)


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def leave_dead(folder: Path) -> str:
    """A process takes the folder and is killed; returns its token."""
    code = (
        "import os, sys, pathlib; from megatron_tiedlora.checkpoint.ownership import take_folder;"
        "take_folder(pathlib.Path(sys.argv[1]), hint=''); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False)
    assert result.returncode == -9
    return (folder / OWNER_FILE).read_text()


def grow_old(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / OWNER_FILE, (then, then))


# Who gets it --------------------------------------------------------------------------------------------------------


def test_a_folder_has_one_owner_and_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    lock = take(folder)
    for keywords in ({}, {"resumes": True}):
        with pytest.raises(FolderTaken) as error:
            take(folder, **keywords)
        line = f"{folder}: a start on {socket.gethostname()} (process {os.getpid()}) since "
        assert str(error.value).startswith(line)
        assert str(error.value).endswith(f"is at work here (last seen 0 s ago); {HINT}")
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", str(error.value))
    lock.owner.check()
    assert names(folder) == {OWNER_FILE}
    lock.release()
    lock.release()
    assert names(tmp_path) == set(), "what was made for nothing is gone"


def test_what_was_written_stays(tmp_path: Path) -> None:
    lock = take(tmp_path / "run")
    (tmp_path / "run" / "file").touch()
    lock.release()
    assert names(tmp_path / "run") == {"file"}


def test_a_new_folder_must_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("nothing")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            take(tmp_path / name, new=True)
    assert names(tmp_path / "there") == set()


def test_the_dead_of_this_machine_are_replaced_at_once(tmp_path: Path) -> None:
    token = leave_dead(tmp_path)
    with take(tmp_path) as lock:
        assert (tmp_path / OWNER_FILE).read_text() != token
        lock.owner.check()
    assert names(tmp_path) == set()


def test_the_owner_of_another_machine_is_told_by_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_dead(tmp_path)  # no process holds the lock: it may live where locks are not seen from here
    monkeypatch.setattr(ownership, "_machine", lambda: "another")
    for age in (0.0, STALE_SECONDS - 5):
        grow_old(tmp_path, age)
        for keywords in ({}, {"resumes": True}):
            with pytest.raises(FolderTaken, match=f"last seen {age:.0f} s ago"):
                take(tmp_path, **keywords)
    grow_old(tmp_path, STALE_SECONDS + 5)
    take(tmp_path).release()


@pytest.mark.parametrize("way", ["old", "given up"])
def test_an_owner_that_is_silent_is_replaced_by_a_start_that_resumes(tmp_path: Path, way: str) -> None:
    first = take(tmp_path)
    if way == "old":
        grow_old(tmp_path, STALE_SECONDS + 5)
    else:
        peer = ownership.Owner(tmp_path, first.owner.start, is_main=False)
        peer.give_up()
        peer.check()  # its peers may still write down why
        with pytest.raises(OwnerLost, match="gave this one up because it was silent; this start changed nothing more"):
            first.owner.check()
    with pytest.raises(FolderTaken):
        take(tmp_path)
    second = take(tmp_path, resumes=True)
    second.owner.check()
    with pytest.raises(OwnerLost, match=rf"{tmp_path}: a start on .* \(process {os.getpid()}\) took it over at "):
        first.owner.check()
    first.owner.give_up()  # too late: the folder is another's
    first.release()
    second.owner.check()
    second.release()
    assert names(tmp_path) == set()


def test_taking_over_by_force(tmp_path: Path) -> None:
    first = take(tmp_path)
    with take(tmp_path, take_over=True) as second:
        second.owner.check()
        with pytest.raises(OwnerLost):
            first.owner.check()
    first.release()


def test_a_folder_that_is_gone_or_emptied(tmp_path: Path) -> None:
    lock = take(tmp_path / "run")
    (tmp_path / "run" / OWNER_FILE).unlink()
    with pytest.raises(OwnerLost, match=f"its file {OWNER_FILE} is gone"):
        lock.owner.check()
    (tmp_path / "run").rmdir()
    with pytest.raises(OwnerLost, match="the folder was removed, moved or replaced"):
        lock.owner.check()
    lock.release()
    assert names(tmp_path) == set()


def test_an_owner_renews_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "RENEW_SECONDS", 0.05)
    with take(tmp_path):
        grow_old(tmp_path, 100)
        deadline = time.monotonic() + 10
        while (tmp_path / OWNER_FILE).stat().st_mtime < time.time() - 50:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_child_that_has_the_lock_keeps_the_folder(tmp_path: Path) -> None:
    with take(tmp_path) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.descriptor,))
    with pytest.raises(FolderTaken):
        take(tmp_path, resumes=True)
    child.communicate(b"\n")
    take(tmp_path).release()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("lacking", ["links", "locks"])
def test_file_systems_that_lack_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(*((os, "link") if lacking == "links" else (fcntl, "flock")), refuse)
    first = take(tmp_path)
    with pytest.raises(FolderTaken):
        take(tmp_path, resumes=True)
    grow_old(tmp_path, STALE_SECONDS + 5)
    second = take(tmp_path, resumes=True)
    second.owner.check()
    first.release()
    second.release()
    assert names(tmp_path) == set()


@pytest.mark.parametrize("content", ["", "[]", "{}", "x" * 100_000, '{"start": 1}', "\0"])
def test_a_token_that_says_nothing(tmp_path: Path, content: str) -> None:
    """A start that was killed as it took the folder, or a stranger's file: free once it is old."""
    (tmp_path / OWNER_FILE).write_text(content)
    with pytest.raises(FolderTaken, match="another start is at work here"):
        take(tmp_path, resumes=True)
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
        token = ownership.read_token(tmp_path)
        assert token is not None and token.start == winner
        over.set()
        for process in processes:
            process.join(60)
        if before == "nothing":
            (tmp_path / OWNER_FILE).unlink()


# What a former owner can change -------------------------------------------------------------------------------------


class Stopped:
    """A guard that is passed, and behind which the process stands still until another one has taken the folder over."""

    def __init__(self, lock: FolderLock) -> None:
        self.lock = lock
        self.next: FolderLock | None = None

    def __call__(self) -> None:
        self.lock.owner.check()
        if self.next is None:
            self.next = take(self.lock.owner.folder, resumes=True, take_over=True)
            remove_leftovers(self.lock.owner.folder, guard=self.next.owner.check)

    def release(self) -> None:
        assert self.next is not None
        self.next.release()
        self.lock.release()


@pytest.mark.parametrize("what", ["file", "folder", "new folder", "removal", "leftovers"])
@pytest.mark.parametrize("swaps", [True, False])
def test_one_that_was_stopped_behind_its_check_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr("megatron_tiedlora.checkpoint.atomic._exchange", lambda one, other: False)
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("old")
    stopped = Stopped(take(tmp_path))
    try:
        if what == "removal":
            discard(tmp_path / "folder", guard=stopped)
        elif what == "leftovers":
            remove_leftovers(tmp_path, guard=stopped)
        elif what == "file":
            with pytest.raises(UserError, match="cannot be written"):
                write_text(tmp_path / "file", "new", guard=stopped)
        else:
            with (
                pytest.raises(UserError),
                new_folder(tmp_path / what.replace("new folder", "more"), guard=stopped) as folder,
            ):
                (folder / "x").write_text("new")
        assert stopped.next is not None
        stopped.next.owner.check()
    finally:
        stopped.release()
    assert names(tmp_path) == {"file", "folder"}
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "x").read_text() == "old"


def test_temporary_files_of_the_next_owner_stay(tmp_path: Path) -> None:
    """A former owner that wakes up as it looks for leftovers finds those of the next one, and removes none."""
    lock = take(tmp_path)
    other = take(tmp_path, take_over=True)
    (tmp_path / ".writing-x-1").write_text("the next one's")
    with pytest.raises(OwnerLost):
        remove_leftovers(tmp_path, guard=lock.owner.check)
    assert (tmp_path / ".writing-x-1").is_file()
    other.release()


# Outputs ------------------------------------------------------------------------------------------------------------


def test_an_output_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "out"
    with new_output(output) as folder:
        (folder / "file").write_text("x")
        assert names(tmp_path / "parent") == {".out.partial"}
        with pytest.raises(FolderTaken, match=r"\.out\.partial: a start on .* is at work here"):
            take_output(output)
    assert names(output.parent) == {"out"} and names(output) == {"file"}
    with pytest.raises(ZeroDivisionError), new_output(tmp_path / "other" / "out") as folder:
        (folder / "file").write_text("x")
        _ = 1 / 0
    assert names(tmp_path) == {"parent"}


def test_what_a_killed_one_has_left_is_removed_by_the_next(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    leave_dead(partial)
    (partial / ".writing-out-0123abcd").mkdir()
    (partial / ".writing-out-0123abcd" / "file").write_text("half")
    with new_output(tmp_path / "out") as folder:
        assert names(folder) == set()
    assert names(tmp_path) == {"out"}


def test_an_output_that_came_to_be_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="out exists; give a new folder"), new_output(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
    assert names(tmp_path) == {"out"} and names(tmp_path / "out") == {"mine"}


def test_an_output_that_was_taken_over(tmp_path: Path) -> None:
    """The former maker wakes up within its work, or behind its last check."""
    first = take_output(tmp_path / "out")
    with pytest.raises(UserError), first.written() as folder:
        (folder / "file").write_text("first")
        with new_output(tmp_path / "out", take_over=True) as second:
            (second / "file").write_text("second")
    first.release()
    assert names(tmp_path) == {"out"} and (tmp_path / "out" / "file").read_text() == "second"


def test_default_names_pass_over_one_that_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (take_output_folder(None, parent="out", name="x") for _ in range(2))
    assert (str(first.path), str(second.path)) == ("out/x", "out/x-2")
    with pytest.raises(FolderTaken):
        take_output_folder("out/x", parent="out", name="x")
    second.release()
    first.release()
    assert names(tmp_path) == set()
