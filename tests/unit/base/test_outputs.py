"""What a former owner of a folder can change any more, which is nothing; and outputs, which one process makes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.run_files import leave_dead, names, take
from support.task_files import refusal

from megatron_tiedlora.base.files import discard, new_folder, remove_leftovers, write_text
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.output_folder import new_output, take_output, take_output_folder
from megatron_tiedlora.base.ownership import OWNER_FILE, FolderLock, FolderTaken, OwnerLost


@pytest.fixture(autouse=True)
def _short_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner's file that is gone is looked for three times, half a second apart."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds / 50))


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
        monkeypatch.setattr("megatron_tiedlora.base.files._exchange", lambda one, other: False)
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
            assert "cannot be written" in refusal(lambda: write_text(tmp_path / "file", "new", guard=stopped))
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


def test_a_former_owner_removes_nothing(tmp_path: Path) -> None:
    """Neither a file nor leftovers, if it wakes up as it looks for them and finds those of the next owner."""
    lock = take(tmp_path)
    for name in ("x", ".writing-x-1"):
        (tmp_path / name).write_text("the next one's")
    with take(tmp_path, take_over=True):
        with pytest.raises(OwnerLost):
            discard(tmp_path / "x", guard=lock.owner.check)
        with pytest.raises(OwnerLost):
            remove_leftovers(tmp_path, guard=lock.owner.check)
        assert names(tmp_path) == {"x", ".writing-x-1", OWNER_FILE}


def test_a_folder_that_was_removed_does_not_come_back(tmp_path: Path) -> None:
    lock = take(tmp_path / "run")
    (tmp_path / "run" / OWNER_FILE).unlink()
    (tmp_path / "run").rmdir()
    with pytest.raises(OwnerLost), new_folder(tmp_path / "run" / "checkpoints" / "step_2", guard=lock.owner.check):
        pass
    assert names(tmp_path) == set()


# Outputs ------------------------------------------------------------------------------------------------------------


def test_an_output_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "parent" / "out"
    with new_output(output) as folder:
        (folder / "file").write_text("x")
        assert names(tmp_path / "parent") == {".out.partial"}
        with pytest.raises(FolderTaken, match=r"\.out\.partial: a launch on .* is using this folder"):
            take_output(output)
    assert names(output.parent) == {"out"} and names(output) == {"file"}
    with pytest.raises(ZeroDivisionError), new_output(tmp_path / "other" / "out") as folder:
        (folder / "file").write_text("x")
        _ = 1 / 0
    assert names(tmp_path) == {"parent"}


@pytest.mark.parametrize("link", [False, True])
def test_what_a_killed_one_has_left_is_removed_by_the_next(tmp_path: Path, link: bool) -> None:
    """A link, but not what it leads to."""
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    leave_dead(partial)
    left = partial / ".writing-out-0123abcd"
    left.mkdir()
    (left / "file").write_text("half")
    if link:
        left.rename(tmp_path / "elsewhere")
        left.symlink_to(tmp_path / "elsewhere")
    with new_output(tmp_path / "out") as folder:
        assert names(folder) == set() and names(partial) == {".owner", folder.name}
    assert names(tmp_path) == {"out"} | ({"elsewhere"} if link else set())
    assert not link or names(tmp_path / "elsewhere") == {"file"}


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


@pytest.mark.parametrize("length", [246, 255])
def test_the_longest_names(tmp_path: Path, length: int) -> None:
    output = tmp_path / ("x" * length)
    with new_output(output) as folder:
        (folder / "file").touch()
        assert "is using this folder" in refusal(take_output, output)
    assert names(tmp_path) == {output.name}


def test_an_output_folder_that_is_a_link(tmp_path: Path) -> None:
    """What it leads to is replaced, and one that leads to nothing is refused before any work is done."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    output = take_output_folder(str(tmp_path / "link"), parent="", name="")
    with output.written() as folder:
        (folder / "file").touch()
    output.release()
    assert names(tmp_path / "link") == {"file"} and (tmp_path / "link").is_symlink()
    for given, why in (("nowhere", "exists"), ("link", "holds other files")):
        said = refusal(take_output_folder, str(tmp_path / given), parent="", name="")
        assert said == f"--output_dir {tmp_path / given} {why}; give a new folder"
    assert names(tmp_path) == {"real", "link", "nowhere"}


def test_default_names_pass_over_one_that_is_being_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (take_output_folder(None, parent="out", name="x") for _ in range(2))
    assert (str(first.path), str(second.path)) == ("out/x", "out/x-2")
    assert "is using this folder" in refusal(take_output_folder, "out/x", parent="out", name="x")
    second.release()
    first.release()
    assert names(tmp_path) == set()
