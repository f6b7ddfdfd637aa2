"""Damage to the newest checkpoint: a resume says which one it passes over and why, and continues from the one before.

It ends with the bytes that a run ends with that was resumed at that one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import moments_of, reseal, with_adapter
from run_files import assert_same_run, checkpoint_names, edit_json, edit_tensors, files_of, status
from run_helpers import Base, run, write_base
from run_preludes import kill_at_step, scripted_validation
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.resume import (
    CHECKPOINT_FILES,
    Checkpoint,
    Progress,
    find_newest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

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


def cut(checkpoints: Path) -> None:
    file = checkpoints / "step_6" / STATE
    file.write_bytes(file.read_bytes()[:-100])


def zeroed(checkpoints: Path) -> None:
    file = checkpoints / "step_6" / ADAPTER
    file.write_bytes(bytes(file.stat().st_size))


def a_flip_in_a_factor(checkpoints: Path) -> None:
    flip(checkpoints / "step_6" / ADAPTER, -5)


def a_flip_in_a_moment(checkpoints: Path) -> None:
    flip(checkpoints / "step_6" / STATE, -1, bit=6)


def an_edit_of_the_progress(checkpoints: Path) -> None:
    edit_plainly(checkpoints / "step_6" / PROGRESS, best_metric=0.25)


def an_edit_of_the_config(checkpoints: Path) -> None:
    edit_plainly(checkpoints / "step_6" / CONFIG, alpha=4.0)


def swapped_adapters(checkpoints: Path) -> None:
    """Both files of the adapter are those of step 4: whole in themselves."""
    for name in (ADAPTER, CONFIG):
        shutil.copy(checkpoints / "step_4" / name, checkpoints / "step_6" / name)


def swapped_moments(checkpoints: Path) -> None:
    shutil.copy(checkpoints / "step_4" / STATE, checkpoints / "step_6" / STATE)


def gone(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "step_6")


DAMAGE: dict[Callable[[Path], None], str] = {
    cut: "not a whole safetensors file",
    zeroed: "not a whole safetensors file",
    a_flip_in_a_factor: "does not match its checksum",
    a_flip_in_a_moment: "does not match its checksum",
    an_edit_of_the_progress: "does not match its own checksum",
    an_edit_of_the_config: "does not match its own checksum",
    swapped_adapters: "does not match its checksum",
    swapped_moments: "does not match its checksum",
    gone: "names 'step_6', which is not a checkpoint",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def stopped(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2, 4 and 6, killed in step 7."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(base, folder, prelude=partial(kill_at_step, 7, 9), expect=-9)
    assert checkpoint_names(folder) == {"step_2", "step_4", "step_6"}
    return folder


@pytest.fixture(scope="module")
def from_four(base: Base, stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, resumed at step 4."""
    folder = tmp_path_factory.mktemp("from_four") / "run"
    shutil.copytree(stopped, folder)
    run(base, folder, resume=folder / "checkpoints" / "step_4")
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_resume_continues_from_the_one_before(
    base: Base, stopped: Path, from_four: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    damage(folder / "checkpoints")
    ended = run(base, folder, resume="auto")
    note = next(line for line in ended.outputs[0].splitlines() if line.startswith("note "))
    assert DAMAGE[damage] in note and "step_6" in note and "resumed from step 4" in ended.outputs[0]
    assert_same_run(folder, from_four)
    assert checkpoint_names(folder) == {"step_6", "step_8", "step_10"}, "step 6 was made anew"
    load_checkpoint(folder / "checkpoints" / "step_6")


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["gone", "folder", "pipe", "link", "nothing", "zeros"])
def test_a_latest_that_is_gone_is_rebuilt(base: Base, stopped: Path, tmp_path: Path, what: str) -> None:
    """And never a start at step 0 beside the checkpoints that are there."""
    import os

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
        save(folder / "checkpoints", with_adapter(base.model, "tl6", rank=3)[1], 12)
        assert latest.read_text() == "step_12\n" and "step_12" not in (folder / "run.yaml").read_text()
        return
    ended = run(base, folder, resume="auto")
    assert f"{latest}: is missing or not a plain file" in ended.outputs[0] and "resumed from step 6" in ended.outputs[0]
    whole = Path(shutil.copytree(stopped, tmp_path / "whole"))
    run(base, whole, resume="auto")
    assert_same_run(folder, whole)


@pytest.mark.distributed
def test_nothing_whole_is_left(base: Base, stopped: Path, tmp_path: Path) -> None:
    """One line that names each, and nothing is changed."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    for step in (2, 4, 6):
        flip(folder / "checkpoints" / f"step_{step}" / ADAPTER, -5)
    before = files_of(folder / "checkpoints")
    line = run(base, folder, resume="auto", expect=2).error_line()
    assert all(f"skipped step_{step}" in line for step in (4, 6)) and "no checkpoint is intact" in line
    assert files_of(folder / "checkpoints") == before
    for step in (2, 4, 6):
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    line = run(base, folder, resume="auto", expect=2).error_line()
    assert "names 'step_6', which is not a checkpoint" in line and "remove it to start from the beginning" in line


def test_a_checkpoint_that_is_a_link_is_passed_over(native: NativeAdapter, tmp_path: Path) -> None:
    for step in (2, 4):
        save(tmp_path, native, step)
    (tmp_path / "step_4").rename(tmp_path / "elsewhere")
    (tmp_path / "step_4").symlink_to(tmp_path / "elsewhere")
    found = find_newest_checkpoint(tmp_path)
    assert found is not None and found.folder.name == "step_2" and "skipped step_4: is a link" in found.notes


def test_what_cannot_be_read_now_is_not_passed_over(
    native: NativeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk in trouble: the newest may be whole, and would be removed at a later save."""
    for step in (2, 4):
        save(tmp_path, native, step)
    real = Path.open

    def trouble(path: Path, *arguments: Any, **keywords: Any) -> Any:
        if path.name == STATE and path.parent.name == "step_4":
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", trouble)
    with pytest.raises(UserError, match=r"step_4/trainer_state\.safetensors: .*Input/output error"):
        find_newest_checkpoint(tmp_path)


@pytest.mark.distributed
def test_a_broken_best_one_is_said_and_made_anew(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = partial(scripted_validation, {2: 1.0, 4: 2.0, 6: 3.0, 8: 0.5})
    run(base, folder, max_steps=6, prelude=script)
    flip(folder / "checkpoints" / "step_2" / ADAPTER, -5)
    edit_json(folder / "checkpoints" / "step_6" / PROGRESS, settings={
        **json.loads((folder / "checkpoints" / "step_6" / PROGRESS).read_text())["settings"], "max_steps": 10,
    })  # fmt: skip
    ended = run(base, folder, max_steps=10, resume="auto", prelude=script)
    assert "the best checkpoint is broken, so the next evaluation writes a new one" in ended.outputs[0]
    assert status(folder)["state"] == "finished"


@pytest.mark.distributed
def test_a_run_that_went_back_continues_from_there(base: Base, stopped: Path, from_four: Path, tmp_path: Path) -> None:
    """Killed before its first save, with the later checkpoints still there: they are of the way that was left."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    four = folder / "checkpoints" / "step_4"
    run(base, folder, resume=four, prelude=partial(kill_at_step, 5, 9), expect=-9)
    assert checkpoint_names(folder) == {"step_2", "step_4", "step_6"}
    ended = run(base, folder, resume="auto")
    assert "resumed from step 4" in ended.outputs[0]
    assert "note       skipped step_6: is later than what latest names" in ended.outputs[0]
    assert_same_run(folder, from_four)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeAdapter:
    return with_adapter(write_tiny_model(tmp_path_factory.mktemp("model"), tokenizer=False), "tl6")[1]


def save(root: Path, native: NativeAdapter, step: int) -> Path:
    return save_checkpoint(
        root,
        progress=Progress(step=step, consumed_samples=4 * step, best_metric=0.5, best_step=step, evaluated_step=step),
        config=native.config,
        base_identity=native.base,
        state=native.state,
        moments=moments_of(native),
        settings={"global_batch_size": 4},
        keep=3,
    )


def a_negative_mean_of_squares(tensors: dict[str, torch.Tensor]) -> None:
    tensors["exp_avg_sq.adapter.v"].view(-1)[7] = -1e-12


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (STATE, a_negative_mean_of_squares, r"exp_avg_sq\.adapter\.v holds negative numbers"),
        (STATE, lambda t: t["exp_avg.adapter.A"].view(-1)[0].fill_(torch.inf), "exp_avg.adapter.A holds numbers that"),
        (STATE, lambda t: t.pop("exp_avg.adapter.A"), r"tensor exp_avg\.adapter\.A is missing"),
        (STATE, lambda t: t.update(more=torch.ones(1)), "holds a tensor 'more' that does not belong there"),
        (PROGRESS, {"consumed_samples": 15}, r"consumed_samples = 15 does not fit 4 steps of 4 samples"),
        (PROGRESS, {"consumed_samples": 0}, r"consumed_samples = 0 does not fit 4 steps"),
        (PROGRESS, {"settings": {}, "consumed_samples": 9}, "consumed_samples = 9 does not fit 4 steps of 2 samples"),
        (PROGRESS, {"best_step": 5}, "best_step = 5 is after its step 4"),
        (PROGRESS, {"best_metric": None}, "it has one of best_step and best_metric, not both"),
        (PROGRESS, {"evaluations_since_best": 1}, "evaluations_since_best = 1 is more than the steps since its best"),
    ],
)
def test_values_that_cannot_be_are_refused_whatever_the_checksums_say(
    native: NativeAdapter, tmp_path: Path, file: str, change: object, message: str
) -> None:
    folder = save(tmp_path, native, 4)
    if callable(change):
        edit_tensors(folder / file, change)
    else:
        assert isinstance(change, dict)
        edit_json(folder / file, **change)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder)


def test_every_file_counts(native: NativeAdapter, tmp_path: Path) -> None:
    """One bit of any of them, at the start, in the middle and at the end."""
    folder = save(tmp_path, native, 4)
    for name in CHECKPOINT_FILES:
        whole = (folder / name).read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 3):
            flip(folder / name, place)
            with pytest.raises(UserError, match=name):
                load_checkpoint(folder)
            (folder / name).write_bytes(whole)
    assert isinstance(load_checkpoint(folder), Checkpoint)


def test_checkpoints_of_versions_without_checksums_are_read(native: NativeAdapter, tmp_path: Path) -> None:
    folder = save(tmp_path, native, 4)
    for name in (PROGRESS, CONFIG):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if not k.endswith("sha256")}))
    assert load_checkpoint(folder).progress.step == 4
    reseal(folder)  # does nothing to those
    assert "sha256" not in (folder / PROGRESS).read_text()
