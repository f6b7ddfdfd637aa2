"""Native adapters and checkpoints, broken: one clear line, or what a run, a merge or an evaluation can go on with; and
those, and model folders, that are made to harm."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
from damage import break_one, fresh, odd_place, reseal
from fuzzing import MAPPED, Draw, bounded, cases, explore, outcome, printable, refused, tree
from safetensors.torch import load_file
from support.run_files import edit_tensors
from valid import check_adapter, check_checkpoint, write_run

from megatron_tiedlora.base.files import remove_leftovers
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import (
    CHECKPOINT_FILES,
    STATE_FILE,
    Checkpoint,
    Progress,
    find_newest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.open_adapter import read_peft
from megatron_tiedlora.runtime.ending import RankLog
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder
from megatron_tiedlora.training.start import adopt_checkpoint


@cases("adapter")
def test_a_broken_adapter(
    natives: dict[str, NativeAdapter], tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int
) -> None:
    whole, folder = tmp_path_factory.mktemp("whole"), area / "adapter"
    for method, native in natives.items():
        save_adapter(whole / method, native)

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


# Made to harm -------------------------------------------------------------------------------------------------------


CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"


@pytest.mark.parametrize("value", ["../../x", "2/../../x", 2.0, True, -1, 5, 10**30, [2]])
def test_a_best_step_that_is_none_names_no_folder(native: NativeAdapter, area: Path, value: object) -> None:
    folder = write_run(area / "run", native).checkpoints / "step_4"
    content = json.loads((folder / "trainer_state.json").read_text())
    (folder / "trainer_state.json").write_text(json.dumps({**content, "best_step": value}))
    refused(area, lambda: load_checkpoint(folder), str(folder / "trainer_state.json"), said="best_step")


@pytest.mark.parametrize("text", ["../x", "step_4/../../x", "/etc", "step_4\nstep_2", "step_٤", "step_" + "4" * 5000,
                                  "step_9", "\0", "x" * 10**6, b"\xff\xfe", b"\xef\xbb\xbfstep_4"])  # fmt: skip
def test_latest_names_a_checkpoint_beside_it_and_nothing_else(
    native: NativeAdapter, area: Path, text: str | bytes
) -> None:
    checkpoints = write_run(area / "run", native).checkpoints
    (checkpoints / "latest").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = outcome(lambda: find_newest_checkpoint(checkpoints), unchanged=area, names=(str(checkpoints / "latest"),))
    assert isinstance(found, Checkpoint) and found.folder == checkpoints / "step_4"  # and never a start at step 0
    (note,) = found.notes
    assert note.startswith(str(checkpoints / "latest")) and note.isprintable()
    for step in (2, 4):
        shutil.rmtree(checkpoints / f"step_{step}")
    refused(area, lambda: find_newest_checkpoint(checkpoints), str(checkpoints / "latest"))


def test_a_checkpoint_is_of_the_step_that_its_folder_says(native: NativeAdapter, area: Path) -> None:
    """Else `latest` would come to name a folder that is not there."""
    checkpoints = write_run(area / "run", native).checkpoints
    (checkpoints / "step_4").rename(checkpoints / "step_7")
    refused(area, lambda: load_checkpoint(checkpoints / "step_7"), "step_7", said="its step is 4")


def _link(path: Path, target: Path | str) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize("step", [2, 4])  # the best and the last
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_links_in_a_checkpoint_are_not_copied(native: NativeAdapter, area: Path, step: int, name: str) -> None:
    theirs = write_run(area / "theirs", native)
    real = area / f"real-{name}"
    shutil.copy(theirs.checkpoints / f"step_{step}" / name, real)
    _link(theirs.checkpoints / f"step_{step}" / name, real)
    loaded = load_checkpoint(theirs.checkpoints / "step_4")
    with pytest.raises(UserError, match=f"step_{step}/{name}: is not a regular file"):
        adopt_checkpoint(RunFolder(area / "mine"), loaded)
    assert not list((area / "mine").rglob(f"step_{step}/*"))


def test_only_the_files_of_a_checkpoint_are_copied(native: NativeAdapter, area: Path) -> None:
    theirs = write_run(area / "theirs", native)
    for step in (2, 4):
        folder = theirs.checkpoints / f"step_{step}"
        (folder / "more.py").write_text("import os")
        (folder / "out").symlink_to(area / "x")
        (folder / "loop").symlink_to(folder)
        os.mkfifo(folder / "pipe")  # copying it would wait for ever
    adopt_checkpoint(RunFolder(area / "mine"), load_checkpoint(theirs.checkpoints / "step_4"))
    for step in (2, 4):
        copied = area / "mine" / "checkpoints" / f"step_{step}"
        assert {item.name for item in copied.iterdir()} == set(CHECKPOINT_FILES)
        assert all(item.is_file() and not item.is_symlink() for item in copied.iterdir())


def test_links_of_a_run_folder_are_replaced_or_removed_and_never_followed(native: NativeAdapter, area: Path) -> None:
    run = write_run(area / "run", native)
    away = area / "away"
    shutil.copytree(run.checkpoints / "step_2", away / "step_2")
    (away / "notes").write_text("not ours")
    (away / "adapter").mkdir()
    for name in ("latest", "step_2"):
        _link(run.checkpoints / name, away / ("notes" if name == "latest" else "step_2"))
    _link(run.adapter, away / "adapter")
    _link(run.path / ".writing-x", away)
    _link(run.metrics, away / "notes")
    run.logs.mkdir()
    for rank in (0, 1):
        _link(run.logs / f"rank_{rank}.log", away / ("notes" if rank else "nothing"))
    before = tree(away)
    assert choose_run_folder(make_settings({"output_dir": str(run.path), "resume": "auto"})) == run
    remove_leftovers(run.path)  # as a run does first when the folder is its own
    adopt_checkpoint(run, load_checkpoint(run.checkpoints / "step_4"))
    moments = load_file(run.checkpoints / "step_4" / "trainer_state.safetensors")
    progress = Progress(6, 9, 0.1, 6, 0, 6)
    save_checkpoint(run.checkpoints, progress=progress, adapter=native, moments=moments, settings={})
    for rank in (0, 1):
        log = RankLog()
        with log.opened(run.path, rank):
            log.note("noted")
        assert not (run.logs / f"rank_{rank}.log").is_symlink()
        assert (run.logs / f"rank_{rank}.log").read_text().endswith("noted\n")
    assert tree(away) == before
    assert {item.name for item in run.checkpoints.iterdir()} == {"latest", "step_6"}
    assert not run.adapter.is_symlink() and not (run.path / ".writing-x").is_symlink()
    check_adapter(load_native_adapter(run.adapter))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("name", ["checkpoints", "logs", "tensorboard"])
def test_a_run_with_links_for_folders_is_refused(native: NativeAdapter, area: Path, name: str, there: bool) -> None:
    """Before anything is changed: what a run writes into them would lie where they lead to."""
    run = write_run(area / "run", native)
    if there:
        shutil.copytree(run.checkpoints, area / "away")
        (area / "away" / ".writing-old-step_6-1").mkdir()  # which a look for the last checkpoint would rename
    _link(run.path / name, area / "away")
    for output_dir, resume in ((str(run.path), "auto"), (None, str(run.checkpoints / "step_4"))):
        settings = make_settings({"output_dir": output_dir, "resume": resume})
        refused(area, partial(choose_run_folder, settings), f"{run.path / name} is a link")


def test_a_run_folder_may_itself_be_a_link(native: NativeAdapter, area: Path) -> None:
    write_run(area / "scratch" / "run", native)
    (area / "run").symlink_to(area / "scratch" / "run")
    (area / "here").symlink_to(area / "scratch")
    for given in (area / "run", area / "here" / "run"):
        assert choose_run_folder(make_settings({"output_dir": str(given), "resume": "auto"})) == RunFolder(given)


def test_an_adapter_that_is_a_link_to_nothing_is_replaced(native: NativeAdapter, area: Path) -> None:
    _link(area / "adapter", area / "nothing")
    save_adapter(area / "adapter", native)
    assert not (area / "adapter").is_symlink() and not (area / "nothing").exists()
    check_adapter(load_native_adapter(area / "adapter"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.timeout(30, method="thread")  # a wait inside of a library is ended by no signal
def test_a_pipe_in_place_of_a_file_is_not_waited_for(native: NativeAdapter, area: Path, name: str) -> None:
    save_adapter(area / "adapter", native)
    (area / "adapter" / name).unlink()
    os.mkfifo(area / "adapter" / name)
    refused(area, lambda: load_native_adapter(area / "adapter"), name)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    "pattern",
    [
        r"(a|b|.|..|...)+\d", r"(.|..|...|....)*(?<!j)", "a{99999999}", "(?:model){e<=30}", "a?" * 5_000_000,
        "(" * 5_000_000, ".*" * 5_000_000, ".*[qv]_proj", r"(?i).*Q_PROJ", r"\w+", "q_proj)(", "[0-9", "q**", "", "\\",
    ],
    ids=range(15),
)  # fmt: skip
def test_a_pattern_of_other_pieces_is_not_compiled(
    base: Path, native: NativeAdapter, area: Path, name: str, pattern: str
) -> None:
    """Bombs of time and memory, syntax that PEFT's `re` reads otherwise, and what is well-formed but not needed."""
    source, folder = find_model(str(base)), area / "peft"
    export_peft(source, native, folder)
    content = json.loads((folder / CONFIG).read_text())
    value = {pattern: 4} if name.endswith("_pattern") else pattern
    (folder / CONFIG).write_text(json.dumps({**content, name: value}))
    with bounded():
        if name == "exclude_modules" and not pattern:  # PEFT too takes it for none
            found = outcome(lambda: read_peft(folder, source).adapter, unchanged=area, names=())
            assert isinstance(found, NativeAdapter)
        else:
            instead = "Write endings of names" if name.endswith("_pattern") else "Write a list of names"
            refused(area, lambda: read_peft(folder, source).adapter, str(folder), said=instead)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_sizes_beyond_any_model_are_refused_before_anything_is_made_of_them(base: Path, area: Path, name: str) -> None:
    folder = Path(shutil.copytree(base, area / "model"))
    content = json.loads((folder / "config.json").read_text())
    for value in (10**10, 10**30, True, 2.0, "4"):
        (folder / "config.json").write_text(json.dumps({**content, name: value}))
        refused(area, lambda: find_model(str(folder)), str(folder / "config.json"), said=f"{name} = ")


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "..", ".", "", "a/../../x", "sub/x.safetensors", "a\0b"])
def test_an_index_that_leads_out_of_its_folder(base: Path, area: Path, file: str) -> None:
    folder = Path(shutil.copytree(base, area / "model"))
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = file
    (folder / INDEX).write_text(json.dumps(content))
    source = find_model(str(folder))
    refused(area, lambda: BaseWeights(folder, source.shape), str(folder))
