"""Adapters and checkpoints are there whole or not at all: errors, kills, full disks, and which checkpoints stay."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.native_files import moments_of, save_step
from support.run_files import names
from support.run_helpers import run_code

from megatron_tiedlora.base import files
from megatron_tiedlora.base.files import new_folder, remove_leftovers, write_text
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint import resume
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, find_newest_checkpoint, load_checkpoint, named_checkpoint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with a file, old."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "old").write_text("old")
    return tmp_path / "kept"


def write(folder: Path, native: NativeAdapter) -> None:
    save_adapter(folder, native)


# --------------------------------------------------------------------------------------------- whole or not at all


@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_folder_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
    if not swaps:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for content in ("one", "two"):
        with new_folder(tmp_path / "kept") as folder:
            (folder / content).write_text(content)
            os.chmod(folder / content, 0o600)
        assert names(tmp_path) == {"kept"} and names(tmp_path / "kept") == {content}
        folder_mode = (tmp_path / "kept").stat().st_mode  # as the user's umask has it
        assert (tmp_path / "kept" / content).stat().st_mode & 0o666 == folder_mode & 0o666


@pytest.mark.parametrize("failure", [RuntimeError("mine"), KeyboardInterrupt(), UserError("mine")])
def test_an_error_inside_leaves_what_was_there(kept: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), new_folder(kept) as folder:
        (folder / "new").write_text("new")
        raise failure
    assert names(kept.parent) == {"kept"} and names(kept) == {"old"}


@pytest.mark.parametrize("step", ["sync_path", "rename"])
def test_a_failing_disk_is_one_line_and_leaves_what_was_there(
    kept: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if ".writing-kept" in str(source) and Path(target).name == "kept":
            raise OSError(5, "Input/output error")
        real_rename(source, target)

    def sync(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    if step == "rename":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
        monkeypatch.setattr(os, "rename", rename)
    else:
        monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(UserError) as error, new_folder(kept) as folder:
        (folder / "new").write_text("new")
    fix = "nothing was changed; check the disk space and the permissions"
    assert str(error.value) == f"{kept}: cannot be written (Input/output error); {fix}"
    assert names(kept.parent) == {"kept"} and names(kept) == {"old"}


def test_a_place_that_cannot_be_written_is_one_line(native: NativeAdapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"adapter: cannot be written \(Not a directory\); nothing was changed"):
        write(tmp_path / "file" / "adapter", native)


def test_leftovers_of_killed_writers_are_removed_or_given_back(tmp_path: Path) -> None:
    for name in (".writing-adapter-0123abcd", ".writing-old-step_2-0123abcd", ".writing-old-step_4-0123abcd", "step_4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    (tmp_path / ".writing-latest-0123abcd").write_text("step_2")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == {"step_2", "step_4"}
    assert (tmp_path / "step_2" / "from").read_text() == ".writing-old-step_2-0123abcd"  # nothing had replaced it
    assert (tmp_path / "step_4" / "from").read_text() == "step_4"


# For each line of the package that a save executes, what is there if it is killed at that line: value 1.0 before the
# save, 2.0 after it, anything else raises. Lines between which no file changes leave the same, so of each such stretch
# the first line alone is one at which a forked child is killed.
KILLER = """
import itertools, os, shutil, sys
from dataclasses import replace
from pathlib import Path
import torch
from megatron_tiedlora.base import files
from megatron_tiedlora.checkpoint import native_adapter, resume
from support.native_files import moments_of, save_step

torch.set_num_threads(1)
os.fsync = lambda descriptor: None  # a kill is not a power cut: what was written is there
sources = {files.__file__, native_adapter.__file__, resume.__file__}
root, swap = Path(sys.argv[2]), files._exchange
old = native_adapter.load_native_adapter(Path(sys.argv[1]))

def write_adapter(value):
    native_adapter.save_adapter(root / "adapter", replace(old, state=full(value)))

def write_checkpoint(step, value):
    files.remove_leftovers(root)  # as a start does; only there, since a later owner's would look the same
    resume.save_checkpoint(
        root, progress=resume.Progress(step=step, consumed_samples=step, best_metric=1.0, best_step=2),
        adapter=replace(old, state=full(value)), moments=moments_of(old, value), settings={"value": value})

def full(value):
    return {name: torch.full_like(tensor, value) for name, tensor in old.state.items()}

def value_of(adapter):
    (value,) = {float(x) for tensor in adapter.state.values() for x in tensor.unique()}
    return value

def read_adapter():
    files.restore_interrupted(root)  # does nothing where folders were swapped
    return value_of(native_adapter.load_native_adapter(root / "adapter"))

def read_checkpoint():
    files.restore_interrupted(root)
    found = resume.find_newest_checkpoint(root)
    assert found.folder == resume.named_checkpoint(root)
    assert value_of(resume.load_checkpoint(root / "step_2").adapter) == 1.0  # the best one
    value = value_of(found.adapter)
    assert found.settings == {"value": value} and found.moments["exp_avg.adapter.B"].unique().tolist() == [value]
    return value

def prepare():
    write_adapter(1.0)
    write_checkpoint(2, 1.0)
    write_checkpoint(4, 1.0)

def trace_lines(action, look):
    # Save, and call look(n) before the n-th line.
    numbers = itertools.count(1)
    def trace(frame, event, argument):
        if frame.f_code.co_filename not in sources:
            return None
        if event == "line":
            look(next(numbers))
        return trace
    sys.settrace(trace)
    action(2.0)
    sys.settrace(None)

def files_there():
    return {path: (path.lstat().st_ino, path.is_file() and path.read_bytes()) for path in root.rglob("*")}

def stretches(action):
    # The first line of each stretch of lines between which no file changes, and the number after the last line.
    restore()
    firsts, there, last = [], None, 0
    def look(number):
        nonlocal there, last
        last = number
        if (now := files_there()) != there:
            firsts.append(number)
        there = now
    trace_lines(action, look)
    return [*firsts, last + 1]

def end_of_child(action, number):
    # The exit status of one that is killed at the number-th line: 9, or 0 if it comes to its end.
    child = os.fork()
    if child == 0:
        try:
            trace_lines(action, lambda at: os._exit(9) if at == number else None)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def restore():
    shutil.rmtree(root)
    shutil.copytree(prepared, root)

def kill_everywhere(action, read):
    firsts, states = stretches(action), []
    for first, after in itertools.pairwise([*firsts, firsts[-1] + 1]):
        restore()
        assert end_of_child(action, first) == (0 if first == firsts[-1] else 9)
        states += [read()] * (after - first)
        if files._exchange is swap:
            assert not list(root.glob(".writing-old-*"))
        action(2.0)  # what was left is not in the way of the next save
        assert read() == 2.0
    assert states == sorted(states), states
    print(len(firsts), len(states), states.count(1.0), states.count(2.0))

root.mkdir()
prepare()
prepared = shutil.copytree(root, root.with_name("prepared"))
kill_everywhere(write_adapter, read_adapter)
kill_everywhere(lambda value: write_checkpoint(6, value), read_checkpoint)
files._exchange = lambda one, other: False  # as on a file system that cannot swap
kill_everywhere(write_adapter, read_adapter)
kill_everywhere(lambda value: write_checkpoint(4, value), read_checkpoint)  # the one that `latest` names, anew
"""


def test_a_save_that_is_killed_at_any_line_leaves_a_whole_one(native: NativeAdapter, tmp_path: Path) -> None:
    write(tmp_path / "adapter", native)
    printed = run_code(KILLER, tmp_path, tmp_path / "adapter", tmp_path / "root").expect(0).outputs[0]
    rows = [[int(word) for word in line.split()] for line in printed.splitlines()]
    assert len(rows) == 4
    for kills, points, before, after in rows:
        assert kills > 6 and points > 60 and before > 40 and after >= 2 and before + after == points


# In a process of its own, because the limit holds for everything that it writes.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from megatron_tiedlora.base.files import write_text
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.config.cli import run_command

adapter, root = load_native_adapter(Path(sys.argv[1])), Path(sys.argv[2])

def main(arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(arguments[0]), resource.RLIM_INFINITY))
    if arguments[1] == "adapter":
        save_adapter(root / "adapter", adapter)
    elif arguments[1] == "text":
        write_text(root / "latest", "new" * 1000)
    else:
        save_checkpoint(
            root, progress=Progress(step=2), adapter=adapter, settings={},
            moments={"exp_avg.B": torch.ones(100_000)})
    return 0

run_command(main, sys.argv[3:])
"""


@pytest.mark.parametrize(("kind", "limit"), [("adapter", 1000), ("checkpoint", 100_000), ("text", 1000)])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(
    native: NativeAdapter, tmp_path: Path, kind: str, limit: int
) -> None:
    write(tmp_path / "adapter", native)
    root = tmp_path / "root"
    root.mkdir()
    (root / "latest").write_text("step_1\n")
    for name in ("adapter", "step_1"):
        shutil.copytree(tmp_path / "adapter", root / name)
    ended = run_code(FULL_DISK, tmp_path, tmp_path / "adapter", root, limit, kind).expect(2)
    target = {"adapter": "adapter", "checkpoint": "step_2", "text": "latest"}[kind]
    (said,) = ended.errors
    assert said.count("\n") == 1 and said.startswith(f"error: {root / target}: cannot be written (")
    assert "File too large" in said and "nothing was changed" in said
    assert names(root) == {"latest", "adapter", "step_1"}
    assert (root / "latest").read_text() == "step_1\n"
    for file in (CONFIG, WEIGHTS):
        assert (root / "adapter" / file).read_bytes() == (tmp_path / "adapter" / file).read_bytes()


# --------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_and_is_an_adapter(native: NativeAdapter, tmp_path: Path) -> None:
    folder = save_step(tmp_path, native, 4, 4)
    assert folder == tmp_path / "step_4" == named_checkpoint(tmp_path)
    assert names(folder) == {CONFIG, WEIGHTS, "trainer_state.safetensors", "trainer_state.json"}
    found = load_checkpoint(folder)
    assert found.progress == Progress(4, 16, 0.5, 4, 0, 4)
    assert found.settings == {"global_batch_size": 4, "method": native.config.method, "layers": [1, 3]}
    assert all(torch.equal(found.moments[name], tensor) for name, tensor in moments_of(native, 4.0).items())
    for loaded in (found.adapter, load_native_adapter(folder)):
        assert loaded.config == native.config
        assert all(torch.equal(loaded.state[name], native.state[name]) for name in "ABuv")


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ({}, [(2, None, {2}), (4, 4, {4}), (6, 4, {4, 6}), (8, 4, {4, 8}), (10, 10, {10}), (100, 10, {10, 100})]),
        (
            {"keep": 3},  # the run that goes back to before step 8 leaves none of the later ones
            [(2, 2, {2}), (4, 2, {2, 4}), (6, 2, {2, 4, 6}), (8, 2, {2, 4, 6, 8}), (10, 10, {6, 8, 10})]
            + [(12, 10, {8, 10, 12}), (8, 8, {8}), (9, 8, {8, 9})],
        ),
    ],
)
def test_the_best_and_the_newest_checkpoints_are_kept(
    native: NativeAdapter, tmp_path: Path, keep: Any, expected: Any
) -> None:
    for step, best, kept in expected:
        save_step(tmp_path, native, step, best, **keep)
        assert names(tmp_path) == {f"step_{number}" for number in kept} | {"latest"}
        assert (tmp_path / "latest").read_text() == f"step_{step}\n"


def test_latest_moves_after_the_new_one_is_whole_and_before_the_old_one_goes(
    native: NativeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, native, 2, 2)
    seen = []

    def watched(path: Path, text: str, **keywords: Any) -> None:
        seen.append((path.name, load_checkpoint(tmp_path / "step_4").progress.step, (tmp_path / "step_2").is_dir()))
        write_text(path, text, **keywords)

    monkeypatch.setattr(resume, "write_text", watched)
    save_step(tmp_path, native, 4, 4)
    assert seen == [("latest", 4, True)]
    assert names(tmp_path) == {"step_4", "latest"}


def test_a_latest_that_names_nothing_is_one_line(tmp_path: Path) -> None:
    assert find_newest_checkpoint(tmp_path) is None
    for text in ("step_9\n", "../elsewhere", ""):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(UserError, match="which is not a checkpoint in") as error:
            find_newest_checkpoint(tmp_path)
        assert "\n" not in str(error.value)
