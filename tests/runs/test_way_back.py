"""Damage to the newest checkpoint: a resume says which one it passes over and why, and continues from the one before.

It ends with the bytes that a run ends with that was resumed at that one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.native_files import reseal, save_step, with_adapter
from support.run_files import assert_same_run, checkpoint_names, edit_json, edit_tensors, files_of, status, truncate
from support.run_helpers import Base, begin, run
from support.run_preludes import kill_at_step, scripted_validation
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.resume import CHECKPOINT_FILES, Checkpoint, find_newest_checkpoint, load_checkpoint

ADAPTER, CONFIG, STATE, PROGRESS = (
    *("adapter_model.safetensors", "adapter_config.json"),
    *("trainer_state.safetensors", "trainer_state.json"),
)


def flip(file: Path, place: int, bit: int = 0) -> None:
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1 << bit
    file.write_bytes(raw)


def edit_plainly(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def stopped(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6, killed in step 7."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(base, folder, prelude=partial(kill_at_step, 7, 9), expect=-9)
    assert checkpoint_names(folder) == {"step_2", "step_4", "step_6"}
    return folder


def copy(checkpoints: Path, *names: str) -> None:
    """Files of step 4, which are whole in themselves, in the place of those of step 6."""
    for name in names:
        shutil.copy(checkpoints / "step_4" / name, checkpoints / "step_6" / name)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {  # to the checkpoints, and what is said of it
    "cut": (lambda c: truncate(c / "step_6" / STATE), "not a complete safetensors file"),
    "zeroed": (lambda c: (c / "step_6" / ADAPTER).write_bytes(bytes(1000)), "not a complete safetensors file"),
    "a flip in a factor": (lambda c: flip(c / "step_6" / ADAPTER, -5), "does not match its checksum"),
    "a flip in a moment": (lambda c: flip(c / "step_6" / STATE, -1, bit=6), "does not match its checksum"),
    "the progress": (lambda c: edit_plainly(c / "step_6" / PROGRESS, best_metric=0.25), "not match its own checksum"),
    "the config": (lambda c: edit_plainly(c / "step_6" / CONFIG, alpha=4.0), "does not match its own checksum"),
    "another adapter": (lambda c: copy(c, ADAPTER, CONFIG), "does not match its checksum"),
    "other moments": (lambda c: copy(c, STATE), "does not match its checksum"),
    "gone": (lambda c: shutil.rmtree(c / "step_6"), "names 'step_6', which is not a checkpoint"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", DAMAGE)
def test_the_one_before_is_found(stopped: Path, tmp_path: Path, kind: str) -> None:
    folder, (damage, said) = Path(shutil.copytree(stopped, tmp_path / "run")), DAMAGE[kind]
    damage(folder / "checkpoints")
    found = find_newest_checkpoint(folder / "checkpoints")
    assert found is not None and found.folder.name == "step_4"
    assert said in found.notes[0] and "step_6" in found.notes[0]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["another adapter", "gone"])
def test_a_resume_continues_from_the_one_before(base: Base, stopped: Path, tmp_path: Path, kind: str) -> None:
    """It says so, and ends as a run that was told to resume there."""
    folder, expected = (Path(shutil.copytree(stopped, tmp_path / name)) for name in ("run", "from_four"))
    run(base, expected, resume=expected / "checkpoints" / "step_4")
    damage, said = DAMAGE[kind]
    damage(folder / "checkpoints")
    ended = run(base, folder, resume="auto")
    note = next(line for line in ended.outputs[0].splitlines() if line.startswith("note "))
    assert said in note and "step_6" in note and "resumed from step 4" in ended.outputs[0]
    assert_same_run(folder, expected)
    assert checkpoint_names(folder) == {"step_6", "step_8", "step_10"}, "step 6 was made anew"
    load_checkpoint(folder / "checkpoints" / "step_6")


@pytest.mark.distributed
def test_nothing_whole_is_left(base: Base, stopped: Path, folder: Path, own_cache: None) -> None:
    """One line that names each, and nothing is changed."""
    shutil.copytree(stopped, folder)
    for step in (2, 4, 6):
        flip(folder / "checkpoints" / f"step_{step}" / ADAPTER, -5)
    before = files_of(folder / "checkpoints")
    line = refusal(lambda: begin(base.arguments(output_dir=folder, resume="auto")))
    assert all(f"skipped step_{step}" in line for step in (4, 6)) and "no checkpoint is intact" in line, line
    assert files_of(folder / "checkpoints") == before
    for step in (2, 4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    line = refusal(lambda: begin(base.arguments(output_dir=folder, resume="auto")))
    assert "names 'step_6', which is not a checkpoint" in line and "remove it to start from the beginning" in line


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["gone", "folder", "pipe", "link", "nothing", "zeros"])
def test_a_latest_that_is_gone_is_rebuilt(base: Base, stopped: Path, tmp_path: Path, what: str) -> None:
    """And never a start at step 0 beside the checkpoints that are there."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    latest = folder / "checkpoints" / "latest"
    latest.unlink()
    if what == "folder":
        latest.mkdir()
    elif what == "pipe":
        os.mkfifo(latest)
    elif what == "link":
        latest.symlink_to(folder / "run.yaml")
    elif what != "gone":
        latest.write_bytes(b"" if what == "nothing" else bytes(7))
    if what != "gone":
        found = find_newest_checkpoint(folder / "checkpoints")
        assert found is not None and found.folder.name == "step_6" and str(latest) in found.notes[0]
        save_step(folder / "checkpoints", with_adapter(base.model, "tl6", rank=3)[1], 12, best=12, keep=3)
        assert latest.read_text() == "step_12\n" and "step_12" not in (folder / "run.yaml").read_text()
        return
    ended = run(base, folder, resume="auto")
    said = ended.outputs[0]
    assert f"{latest}: is missing or not a regular file" in said and "resumed from step 6" in said
    whole = Path(shutil.copytree(stopped, tmp_path / "whole"))
    run(base, whole, resume="auto")
    assert_same_run(folder, whole)


def test_a_checkpoint_that_is_a_link_is_passed_over(native: NativeAdapter, tmp_path: Path) -> None:
    for step in (2, 4):
        save_step(tmp_path, native, step, best=step, keep=3)
    (tmp_path / "step_4").rename(tmp_path / "elsewhere")
    (tmp_path / "step_4").symlink_to(tmp_path / "elsewhere")
    found = find_newest_checkpoint(tmp_path)
    assert found is not None and found.folder.name == "step_2" and "skipped step_4: is a link" in found.notes


def test_what_cannot_be_read_now_is_not_passed_over(
    native: NativeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk in trouble: the newest may be whole, and would be removed at a later save."""
    for step in (2, 4):
        save_step(tmp_path, native, step, best=step, keep=3)
    real = Path.open

    def trouble(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == STATE and path.parent.name == "step_4":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", trouble)
    with pytest.raises(UserError, match=r"step_4/trainer_state\.safetensors: .*Input/output error"):
        find_newest_checkpoint(tmp_path)


@pytest.mark.distributed
def test_a_broken_best_one_is_said_and_made_anew(base: Base, folder: Path) -> None:
    script = partial(scripted_validation, {2: 1.0, 4: 2.0, 6: 3.0, 8: 0.5})
    run(base, folder, max_steps=6, prelude=script)
    flip(folder / "checkpoints" / "step_2" / ADAPTER, -5)
    progress = folder / "checkpoints" / "step_6" / PROGRESS
    edit_json(progress, settings={**json.loads(progress.read_text())["settings"], "max_steps": 10})
    ended = run(base, folder, max_steps=10, resume="auto", prelude=script)
    assert "the best checkpoint is broken, so the next evaluation writes a new one" in ended.outputs[0]
    assert status(folder)["state"] == "finished"


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            STATE,
            lambda t: t["exp_avg_sq.adapter.v"].view(-1)[7].fill_(-1e-12),
            r"exp_avg_sq\.adapter\.v, a mean of squares, has negative numbers",
        ),
        (STATE, lambda t: t["exp_avg.adapter.A"].view(-1)[0].fill_(torch.inf), "exp_avg.adapter.A holds numbers that"),
        (STATE, lambda t: t.pop("exp_avg.adapter.A"), r"tensor exp_avg\.adapter\.A is missing"),
        (STATE, lambda t: t.update(more=torch.ones(1)), "holds a tensor 'more' that does not belong there"),
        (PROGRESS, {"consumed_samples": 15}, r"consumed_samples = 15 does not fit 4 steps of 4 samples"),
        (PROGRESS, {"consumed_samples": 0}, r"consumed_samples = 0 does not fit 4 steps"),
        (PROGRESS, {"settings": {}, "consumed_samples": 9}, "consumed_samples = 9 does not fit 4 steps of 2 samples"),
        (PROGRESS, {"best_step": 5}, "best_step = 5 is later than the checkpoint's step, 4"),
        (PROGRESS, {"best_metric": None}, "it has one of best_step and best_metric, not both"),
        (PROGRESS, {"evaluations_since_best": 1}, "evaluations_since_best = 1 is more than the number of steps"),
    ],
)
def test_values_that_cannot_be_are_refused_whatever_the_checksums_say(
    native: NativeAdapter, tmp_path: Path, file: str, change: object, message: str
) -> None:
    folder = save_step(tmp_path, native, 4, best=4)
    if callable(change):
        edit_tensors(folder / file, change)
    else:
        assert isinstance(change, dict)
        edit_json(folder / file, **change)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


def test_every_file_counts(native: NativeAdapter, tmp_path: Path) -> None:
    """One bit of any of them, at the start, in the middle and at the end."""
    folder = save_step(tmp_path, native, 4, best=4)
    for name in CHECKPOINT_FILES:
        whole = (folder / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 3):
            flip(folder / name, place)
            with pytest.raises(UserError, match=name):
                load_checkpoint(folder)
            (folder / name).write_bytes(whole)
    assert isinstance(load_checkpoint(folder), Checkpoint)


def test_checkpoints_of_versions_without_checksums_are_read(native: NativeAdapter, tmp_path: Path) -> None:
    folder = save_step(tmp_path, native, 4, best=4)
    for name in (PROGRESS, CONFIG):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if not k.endswith("sha256")}))
    assert load_checkpoint(folder).progress.step == 4
    reseal(folder)  # does nothing to those
    assert "sha256" not in (folder / PROGRESS).read_text()
