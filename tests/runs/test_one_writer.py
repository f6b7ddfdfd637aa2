"""Two starts on one folder: one writes, the other ends with a line that names it; who wakes up later changes nothing.

Whoever writes leaves the folder of a run that was alone, byte for byte.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.folders import ROOT
from support.ranks import wait_for
from support.run_files import assert_same_run, edit_tensors, files_of, grow_old, has_step, run_settings, status
from support.run_helpers import EVALUATE, Base, World, begin, run, run_ranks, start_ranks, start_run, write_rows
from support.run_preludes import all_of, before_call, kill_at_call, kill_at_step, short_silence, slow_steps
from support.task_files import refusal

from megatron_tiedlora.base.ownership import STALE_SECONDS
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter

RESUME = "megatron_tiedlora.checkpoint.resume"
HELD = "is using this folder (last seen"

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("own_cache")]


def refused(base: Base, folder: Path, **changes: Any) -> str:
    """The line with which a start in this process is refused."""
    return refusal(lambda: begin(base.arguments(**{"output_dir": folder, **changes})))


def is_free(folder: Path) -> bool:
    """Whether nothing tells of an owner, and nothing unfinished is left."""
    return not list(folder.rglob(".*"))


# Two starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "resume"),
    [
        (0.0, "none"),
        (1.0, "auto"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.0, "auto"), (1.0, "none"))),
        *(pytest.param(5.0, resume, marks=pytest.mark.slow) for resume in ("none", "auto")),
    ],
)
def test_two_starts_with_one_folder(
    base: Base, whole: Path, tmp_path: Path, folder: Path, gap: float, resume: str
) -> None:
    worlds: list[World] = []
    for rate in (2e-2, 1e-3):  # whoever comes first: the settings beside a result are its own
        prelude = partial(all_of, *[slow_steps] * (1 + round(gap))) if not worlds else None
        worlds.append(start_run(base, folder, learning_rate=rate, resume=resume, prelude=prelude))
        time.sleep(gap if len(worlds) == 1 else 0)
    ends = [world.wait() for world in worlds]
    statuses = [ended.status for ended in ends]
    assert sorted(statuses) == [0, 2], [ended.tail() for ended in ends]
    winner = statuses.index(0)
    line = ends[1 - winner].error_line()
    assert f"(process {worlds[winner].processes[0].pid}) since " in line and str(folder) in line
    assert HELD in line or (resume == "none" and "holds the run of a launch on " in line)
    assert ("with --resume auto --take_over" if resume == "none" else "with --take_over") in line or HELD not in line
    assert run_settings(folder)["learning_rate"] == (2e-2, 1e-3)[winner] and is_free(folder)
    if winner == 0:
        assert_same_run(folder, whole)
    else:
        run(base, tmp_path / "alone", learning_rate=1e-3)
        assert_same_run(folder, tmp_path / "alone")


@pytest.mark.parametrize("resume", ["none", "auto"])
def test_two_starts_without_a_folder(base: Base, whole: Path, tmp_path: Path, resume: str) -> None:
    """Two new runs get a folder each; of two that resume the same one, one gets it."""
    arguments = base.arguments(resume=resume)
    start = partial(start_ranks, arguments, folder=tmp_path, cache=base.cache)
    worlds = [start(prelude=prelude) for prelude in (slow_steps, None)]
    statuses = sorted(world.wait().status for world in worlds)
    folders = sorted((tmp_path / "runs").iterdir())
    assert (statuses, len(folders)) == (([0, 0], 2) if resume == "none" else ([0, 2], 1))
    for folder in folders:
        assert_same_run(folder, whole)
        assert is_free(folder)


def test_a_resume_beside_a_live_run(base: Base, whole: Path, folder: Path) -> None:
    """On its host, and on another one that sees the same folder."""
    world = start_run(base, folder, prelude=slow_steps)
    wait_for(lambda: has_step(folder, 3), "step 3")
    owner = f"(process {world.processes[0].pid})"
    elsewhere = [
        run(base, folder, prelude=another_machine, expect=2, resume=how).error_line() for how in ("auto", "none")
    ]
    for resumed, new in (elsewhere, [refused(base, folder, resume=how) for how in ("auto", "none")]):
        assert owner in resumed and "--take_over" in resumed
        assert f"holds the run of a launch on {socket.gethostname()} {owner} since" in new
    assert world.wait().status == 0
    assert_same_run(folder, whole)


def another_machine() -> None:
    """This process runs under another kernel, whose locks are not seen where others run."""
    import fcntl

    from megatron_tiedlora.base import ownership

    ownership._machine = lambda: "another"  # type: ignore[assignment]
    fcntl.flock = lambda *_: None  # type: ignore[assignment]


def test_a_run_that_was_killed_elsewhere_is_taken_after_a_while(base: Base, whole: Path, folder: Path) -> None:
    run(base, folder, prelude=partial(kill_at_step, 6, signal.SIGKILL), expect=-signal.SIGKILL)
    line = run(base, folder, resume="auto", prelude=another_machine, expect=2).error_line()
    assert HELD in line
    grow_old(folder, STALE_SECONDS + 5)
    run(base, folder, resume="auto", prelude=another_machine)
    assert_same_run(folder, whole)
    assert is_free(folder)


def test_a_start_that_fails_before_it_writes_leaves_nothing(base: Base, tmp_path: Path) -> None:
    """The folder was taken when it was chosen; a run that cannot be built gives it back, with those above it."""
    folder = tmp_path / "a" / "b" / "run"
    prelude = partial(before_call, "megatron_tiedlora.training.build", "build_model", _fail)
    ended = run_ranks(base.arguments(output_dir=folder), folder=tmp_path, cache=base.cache, prelude=prelude)
    assert "no such luck" in ended.expect(2).error_line() and not (tmp_path / "a").exists()


def _fail(*_: Any) -> None:
    from megatron_tiedlora.base.messages import UserError

    raise UserError("no such luck")


# One that stood still and wakes up -----------------------------------------------------------------------------------


def stop_at_call(module: str, name: str, *, call: int = 1) -> None:
    """Rank 0 stands still, until it is woken, as `module.name` is called."""
    if os.environ.get("RANK", "0") == "0":
        kill_at_call(module, name, call=call, number=signal.SIGSTOP)


def is_stopped(world: World) -> bool:
    """Whether rank 0 stands still; it does not if it has ended."""
    try:
        return psutil.Process(world.processes[0].pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def stopped_at(base: Base, folder: Path, place: tuple[str, str, int], **changes: Any) -> World:
    """A start whose rank 0 stands still at a call (module, name, number); of two, rank 1 has ended for that reason."""
    module, name, call = place
    stop = partial(stop_at_call, module, name, call=call)
    is_watched = changes.get("ranks") == 2
    watched = partial(all_of, partial(short_silence, 3.0), stop)
    world = start_run(base, folder, prelude=watched if is_watched else stop, **changes)
    wait_for(lambda: is_stopped(world), "the stop")
    if is_watched:
        world.processes[1].join(60)
        assert world.processes[1].exitcode == 1
    return world


def wake(world: World, folder: Path) -> str:
    """Wake rank 0 of `world` and wait for its end, which changes nothing in `folder`; returns its last line."""
    before = files_of(folder)
    world.signal(signal.SIGCONT, rank=0)
    ended = world.wait()
    assert ended.statuses[0] not in (0, -signal.SIGKILL), ended.tail()
    assert files_of(folder) == before, ended.tail()
    lines = [line for line in (ended.outputs[0] + ended.errors[0]).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in ended.errors[0], ended.tail()
    return lines[0]


def test_a_start_that_cannot_continue_a_run_takes_it_from_nobody(
    base: Base, whole: Path, tmp_path: Path, folder: Path
) -> None:
    """Other settings, another base: refused before the folder is taken over, so the live run ends as if alone."""
    world = start_run(base, folder, prelude=slow_steps)
    wait_for(lambda: has_step(folder, 3), "step 3")
    other = Path(shutil.copytree(base.model, tmp_path / "other"))
    edit_tensors(other / "model.safetensors", lambda tensors: tensors["lm_head.weight"].mul_(2))
    for changes, words in (({"rank": 4}, "with --rank 3, but now it is 4"), ({"model": other}, "whose weights differ")):
        assert words in refused(base, folder, resume="auto", take_over=True, **changes)
    assert world.wait().status == 0
    assert_same_run(folder, whole)


def test_a_rank_0_that_dies_before_the_first_step_is_given_up(base: Base, folder: Path) -> None:
    """So that a start on another host need not wait until its time is over."""
    ended = run(base, folder, ranks=2, prelude=die_as_rank_0_in_build, expect=None)
    assert ended.statuses[0] == -signal.SIGKILL and ended.statuses[1] == 1, ended.tail()
    run(base, folder, ranks=2, resume="auto", prelude=another_machine)
    assert status(folder)["state"] == "finished"


def die_as_rank_0_in_build() -> None:
    if os.environ["RANK"] == "0":
        kill_at_call("megatron_tiedlora.training.build", "build_model")


# Where rank 0 stands still: as it begins, in a save between the rename and `latest`, before it, as old checkpoints are
# removed, as the best adapter is replaced, between two steps, in the export, and as the status is written.
MOMENTS = {
    "before its settings": ("megatron_tiedlora.training.start", "write_run_settings", 1),
    "before its log": ("megatron_tiedlora.runtime.ending", "RankLog.opened", 1),
    "before latest": (RESUME, "write_text", 2),
    "in a save": (RESUME, "save_file", 3),
    "before a removal": (RESUME, "discard", 1),
    "before the adapter": ("megatron_tiedlora.training.adapter_run", "save_adapter", 3),
    "between steps": ("megatron_tiedlora.training.loop", "Trainer._train_step", 6),
    "in the export": ("megatron_tiedlora.convert.export_peft", "save_file", 1),
    "before the status": ("megatron_tiedlora.runtime.ending", "End.record", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_replaced_changes_nothing(base: Base, whole: Path, folder: Path, moment: str) -> None:
    world = stopped_at(base, folder, MOMENTS[moment])
    assert HELD in refused(base, folder, resume="auto")
    run(base, folder, resume="auto", take_over=True)
    assert_same_run(folder, whole)
    line = wake(world, folder)
    assert_same_run(folder, whole)
    assert str(folder) in line, line


def test_one_that_wakes_up_beside_the_next_start(base: Base, whole: Path, folder: Path) -> None:
    """Neither `latest` nor the status of the run that goes on is touched."""
    old = stopped_at(base, folder, MOMENTS["before latest"])
    new = start_run(base, folder, resume="auto", take_over=True, prelude=slow_steps)
    wait_for(lambda: has_step(folder, 7), "step 7")
    old.signal(signal.SIGCONT)
    assert old.wait().status == 2 and not (folder / "run_status.json").exists()
    assert new.wait().status == 0
    assert_same_run(folder, whole)


@pytest.fixture(scope="module")
def undisturbed(base: Base, whole_of_two: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two ranks that were alone: of one adapter, and of several."""
    several = tmp_path_factory.mktemp("several") / "run"
    run(base, several, ranks=2, adapters=SEVERAL)
    return {"one": whole_of_two, "several": several}


SEVERAL: dict[str, dict[str, Any]] = {"a": {}, "b": {"method": "lora"}}


@pytest.mark.parametrize(
    ("moment", "kind"),
    [
        ("before latest", "one"),
        ("between steps", "several"),
        pytest.param("before latest", "several", marks=pytest.mark.slow),
        pytest.param("between steps", "one", marks=pytest.mark.slow),
    ],
)
def test_a_rank_0_that_its_peers_gave_up(
    base: Base, undisturbed: dict[str, Path], folder: Path, moment: str, kind: str
) -> None:
    """They mark it so; the next start takes the folders by itself, although the old rank 0 may wake up, and does."""
    alone, given = undisturbed[kind], {"adapters": SEVERAL if kind == "several" else None}
    folders = [folder / name for name in SEVERAL] if kind == "several" else [folder]
    old = stopped_at(base, folder, MOMENTS[moment], ranks=2, **given)
    assert "rank 0 on " in status(folder)["reason"] and "stopped responding" in status(folder)["reason"]
    assert all(len(list(own.glob(".owner-given-up-*"))) == 1 for own in {folder, *folders})
    run(base, folder, ranks=2, resume="auto", **given)
    assert is_free(folder)
    for own in folders:
        assert_same_run(own, alone / own.relative_to(folder))
    wake(old, folder)
    for own in folders:
        assert_same_run(own, alone / own.relative_to(folder))


def test_a_rank_0_that_is_lost_while_it_reads_checkpoints(base: Base, folder: Path) -> None:
    """Its peers give the folder up, whose owner they know by then: the next start need not wait for an old token."""
    run(base, folder, ranks=2, prelude=partial(kill_at_step, 4, signal.SIGTERM), expect=143)
    reads = ("megatron_tiedlora.training.start", "_read_checkpoint", 1)
    old = stopped_at(base, folder, reads, ranks=2, resume="auto")
    assert len(list(folder.glob(".owner-given-up-*"))) == 1
    run(base, folder, ranks=2, resume="auto")
    assert status(folder)["state"] == "finished"
    wake(old, folder)
    assert status(folder)["state"] == "finished"


def test_a_rank_0_that_was_given_up_and_not_replaced(base: Base, folder: Path) -> None:
    """It changes nothing, not even what its peers said of it."""
    old = stopped_at(base, folder, MOMENTS["before latest"], ranks=2)
    before = files_of(folder / "checkpoints"), status(folder)
    old.signal(signal.SIGCONT, rank=0)
    ended = old.wait()
    assert ended.statuses[0] not in (0, -9), ended.tail()
    assert (files_of(folder / "checkpoints"), status(folder)) == before, ended.tail()
    run(base, folder, ranks=2, resume="auto")
    assert status(folder)["state"] == "finished"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_random_moments(base: Base, whole: Path, tmp_path: Path) -> None:
    import random

    draw = random.Random(14)
    for number in range(20):
        folder = tmp_path / f"run{number}"
        old = start_run(base, folder, prelude=slow_steps)
        wait_for(lambda: (folder / "run.yaml").is_file(), "the run's settings")  # noqa: B023
        time.sleep(draw.uniform(0, 4.5))
        if old.processes[0].exitcode is None:
            old.signal(signal.SIGSTOP)
            wait_for(lambda: is_stopped(old) or old.processes[0].exitcode is not None, "the stop")  # noqa: B023
        if old.processes[0].exitcode is None:
            run(base, folder, resume="auto", take_over=True)
            assert_same_run(folder, whole)
            wake(old, folder)
        else:
            old.wait()
        assert_same_run(folder, whole)


# Evaluations, merges, exports -----------------------------------------------------------------------------------------


OUTPUTS = {  # of each command that makes a folder: script, flag, and where it writes JSON in the middle of its work
    "evaluate": (EVALUATE, "output_dir", "megatron_tiedlora.evaluation.results"),
    "merge": (ROOT / "tools" / "merge_adapter.py", "output", "megatron_tiedlora.convert.merge"),
    "export": (ROOT / "tools" / "export_peft.py", "output", "megatron_tiedlora.convert.export_peft"),
}


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_has_one_maker(base: Base, native: NativeAdapter, tmp_path: Path, command: str) -> None:
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    save_adapter(adapter, native)
    script, flag, module = OUTPUTS[command]
    words = [f"--adapter={adapter}", f"--model={base.model}", f"--{flag}={output}"]
    if command == "evaluate":
        words += [f"--test_file={write_rows(tmp_path / 'rows.jsonl', 2)}", "--max_new_tokens=2"]
    run_ranks(words, folder=tmp_path / "work", script=script).expect(0)
    output.rename(tmp_path / "alone")
    old = start_ranks(
        words, folder=tmp_path / "old", script=script, prelude=partial(stop_at_call, module, "write_json")
    )
    wait_for(lambda: is_stopped(old), "the stop")
    assert not output.exists()
    line = run_ranks(words, folder=tmp_path / "new", script=script).expect(2).error_line()
    assert f"(process {old.processes[0].pid}) since" in line and HELD in line and "--take_over" in line
    run_ranks([*words, "--take_over"], folder=tmp_path / "new", script=script).expect(0)
    wake(old, output)
    found, alone = files_of(output), files_of(tmp_path / "alone")
    if command == "evaluate":  # its results hold its settings
        found["results.json"] = found["results.json"].replace(b'"take_over": true', b'"take_over": false')
    assert found == alone and not list(tmp_path.glob(".*"))
