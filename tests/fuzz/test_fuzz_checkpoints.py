"""Native adapters, checkpoints and what points to them, broken: each is one clear line, or can be gone on with."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from damage import break_one, fresh, odd_place, reseal
from fuzzing import MAPPED, Draw, cases, explore, outcome, printable, tree
from support.run_files import edit_tensors
from valid import check_adapter, check_checkpoint, write_run

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import (
    CHECKPOINT_FILES,
    STATE_FILE,
    Checkpoint,
    find_newest_checkpoint,
    load_checkpoint,
)
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.training.start import adopt_checkpoint


@cases("adapter")
def test_a_broken_adapter(
    natives: dict[str, NativeAdapter], tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int
) -> None:
    whole, folder = tmp_path_factory.mktemp("whole"), area / "adapter"
    for method, native in natives.items():
        save_adapter(whole / method, native.config, native.base_identity, native.state)

    def body(draw: Draw) -> object:
        method = draw.say(draw.choice(sorted(natives)))
        fresh(whole / method, folder)
        break_one(draw, folder, sorted(item.name for item in folder.iterdir()))
        reseal(draw, folder)
        loaded = outcome(lambda: load_native_adapter(folder), unchanged=area, names=(str(folder),))
        if isinstance(loaded, NativeAdapter):
            check_adapter(loaded)
        return loaded

    explore("adapter", examples, body, addresses=MAPPED)


@cases("checkpoint")
def test_a_broken_checkpoint_and_what_is_taken_over_from_it(
    native: NativeAdapter, tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int
) -> None:
    written = write_run(tmp_path_factory.mktemp("whole") / "run", native)
    theirs, mine = area / "theirs", area / "mine"

    def body(draw: Draw) -> object:
        shutil.rmtree(mine, ignore_errors=True)
        fresh(written.path, theirs)
        folder = theirs / "checkpoints" / "step_4"
        match draw.say(draw.choice(["broken"] * 8 + ["swapped", "sign"])):
            case "swapped":
                name = draw.say(draw.choice(CHECKPOINT_FILES))
                shutil.copyfile(theirs / "checkpoints" / "step_2" / name, folder / name)
            case "sign":
                edit_tensors(
                    folder / STATE_FILE, lambda moments: moments[draw.say(draw.choice(sorted(moments)))].neg_()
                )
            case _:
                break_one(draw, folder, [*CHECKPOINT_FILES, "trainer_state.json"])
        reseal(draw, folder)
        loaded = outcome(lambda: load_checkpoint(folder), unchanged=area, names=(str(folder),))
        if not isinstance(loaded, Checkpoint):
            return loaded
        check_checkpoint(loaded)
        assert loaded.progress.step == 4
        before = tree(area)
        try:
            adopt_checkpoint(RunFolder(mine), loaded)
        except UserError as error:
            assert str(error).isprintable()
        else:
            again = find_newest_checkpoint(mine / "checkpoints")
            assert again is not None and again.progress == loaded.progress
        assert {name: found for name, found in tree(area).items() if name.split("/")[0] != "mine"} == before
        return loaded

    explore("checkpoint", examples, body, addresses=MAPPED)


NAMES = ["step_2", "step_4\n", "step_2\n\n", "step_3", "step_04", "../checkpoints/step_4", "step_4/../step_2",
         "step_٤", "/etc", "", "\n", "\0" * 7, "step_4\0", "x" * 10**6, "step_" + "4" * 5000, "\x1b[2J"]  # fmt: skip


@cases("latest")
def test_a_broken_latest_and_the_folders_beside_it(
    native: NativeAdapter, tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int
) -> None:
    """What is gone on with is one of the checkpoints that are there, whole; never a start at 0 beside them."""
    written = write_run(tmp_path_factory.mktemp("whole") / "run", native)
    run = area / "run"

    def body(draw: Draw) -> object:
        fresh(written.path, run)
        checkpoints = run / "checkpoints"
        latest = checkpoints / "latest"
        match draw.say(draw.choice(["name", "name", "odd", "odd", "no folder", "moved aside"])):
            case "name":
                latest.write_text(draw.choice(NAMES))
                draw.say(ascii(latest.read_text())[:40])
            case "odd":
                odd_place(draw, latest)
            case "no folder":
                step = draw.choice(["step_2", "step_4"])
                shutil.rmtree(checkpoints / step)
                if draw.chance():
                    (checkpoints / step).write_text("no folder")
            case "moved aside":  # by a writer that was killed
                os.rename(checkpoints / "step_4", checkpoints / ".writing-old-step_4-1")
        there = {path.name for path in checkpoints.glob("step_*") if path.is_dir()}

        try:
            loaded: object = find_newest_checkpoint(checkpoints)  # which may give what was moved aside its name again
        except UserError as error:
            loaded = error
            assert str(error).isprintable() and str(run) in str(error), error
        if isinstance(loaded, Checkpoint):
            check_checkpoint(loaded)
            assert loaded.folder.parent == checkpoints
            printable(*loaded.notes)
        assert loaded is not None or not there, f"read as no checkpoint beside {sorted(there)}"
        left = {path.name for path in checkpoints.glob("step_*") if path.is_dir()}
        assert there <= left, "a checkpoint is gone"
        return loaded

    explore("latest", examples, body)
