"""Stopping and resuming: what is saved, that going on is exact, and that nobody is left behind."""

from __future__ import annotations

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.ranks import free_port, wait_for
from support.run_files import (
    assert_close_run,
    assert_same_run,
    checkpoint_names,
    edit_json,
    files_of,
    has_step,
    losses,
    metrics,
    run_settings,
    status,
)
from support.run_helpers import Base, deepspeed_command, run, start_command, torchrun_command
from support.run_preludes import all_of, kill_at_call, kill_at_step, scripted_validation, whole_run

LOOP = "megatron_tiedlora.training.loop"

pytestmark = pytest.mark.distributed


# Exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ds_config", "ranks"),
    [
        ("zero0.json", None),
        ("zero2_offload.json", None),
        ("zero3.json", 2),
        pytest.param("zero3.json", None, marks=pytest.mark.slow),
        pytest.param("zero0.json", 2, marks=pytest.mark.slow),
        ("zero1.json", 2),
    ],
)
def test_resume_is_exact(base: Base, tmp_path: Path, ds_config: str, ranks: int | None) -> None:
    """Six steps in one go; and three, SIGTERM between two evaluations, then the rest: equal bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings: dict[str, Any] = {"ranks": ranks, "ds_config": ds_config, "max_steps": 6, "keep_checkpoints": 2}
    run(base, whole, **settings)
    run(base, parts, **settings, prelude=partial(kill_at_step, 3), expect=143)
    stopped = status(parts)
    assert (stopped["state"], stopped["step"]) == ("stopped", 3)
    assert (parts / "checkpoints" / "latest").read_text() == "step_3\n"
    run(base, parts, **settings, resume="auto", prelude=whole_run)
    assert_same_run(parts, whole)


@pytest.fixture(scope="module")
def stopped(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ZeRO-2 run over two ranks that was stopped by one rank's signal at step 5."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(base, folder, ranks=2, prelude=partial(kill_at_step, 5, rank=1), expect=143)
    return folder


def test_a_signal_at_one_rank_stops_all_and_resume_is_exact(
    base: Base, folder: Path, stopped: Path, whole_of_two: Path
) -> None:
    """The later start's lines are added to each rank's log."""
    assert (status(stopped)["state"], status(stopped)["step"]) == ("stopped", 5)
    shutil.copytree(stopped, folder)
    run(base, folder, ranks=2, resume="auto")
    assert_same_run(folder, whole_of_two)
    logs = [(folder / "logs" / f"rank_{rank}.log").read_text() for rank in (0, 1)]
    assert [log.count(f"rank {rank} on ") for rank, log in enumerate(logs)] == [2, 2]
    assert "stopped by SIGTERM" in logs[0] and "run folder" in logs[0]


@pytest.mark.parametrize(
    ("ds_config", "ranks"),
    [
        pytest.param("zero3.json", None, marks=pytest.mark.slow),
        ("zero0.json", 2),
        ("zero2_offload.json", None),
        pytest.param("zero1.json", 2, marks=pytest.mark.slow),
        ("zero3.json", 2),
    ],
)
def test_resume_under_another_layout(
    base: Base, folder: Path, stopped: Path, whole_of_two: Path, ds_config: str, ranks: int | None
) -> None:
    shutil.copytree(stopped, folder)
    run(base, folder, ranks=ranks, ds_config=ds_config, resume="auto", micro_batch_size=1)
    assert_close_run(folder, whole_of_two)


def test_resume_of_a_run_with_one_sample_a_row(base: Base, folder: Path, whole_of_two: Path) -> None:
    """Rows are packed from there on, which is said, and the curve is that of a run that packed all along."""
    run(base, folder, ranks=2, packing=False, prelude=partial(kill_at_step, 5), expect=143)
    ended = run(base, folder, ranks=2, resume="auto")
    assert f"{folder}, resumed from step 5 (--packing was false before, and is true now)\n" in ended.outputs[0]
    assert "samples per step, packed into rows of up to 96 tokens" in ended.outputs[0]
    assert_close_run(folder, whole_of_two)
    ended = run(base, folder, ranks=2, resume="auto")
    assert f"{folder}, resumed from step 10\n" in ended.outputs[0]


LATER_SETTINGS = {"plan_for", "deterministic"}
LIKE_A_LATER_SETTING = {"init_std_a"}  # one that a resumed run must not change


@pytest.mark.parametrize("deterministic", [False, True])
def test_resume_of_an_earlier_version_s_checkpoint(
    base: Base, tmp_path: Path, folder: Path, stopped: Path, whole_of_two: Path, deterministic: bool
) -> None:
    """Neither the checkpoint nor run.yaml names a setting that came later: this start's value holds, and is saved."""
    shutil.copytree(stopped, folder)
    later = LATER_SETTINGS | LIKE_A_LATER_SETTING
    for file in folder.glob("checkpoints/step_*/trainer_state.json"):
        settings = json.loads(file.read_text())["settings"]
        assert later <= set(settings)
        edit_json(file, settings={name: value for name, value in settings.items() if name not in later})
    settings = run_settings(folder)
    assert later <= set(settings)
    earlier = tmp_path / "run.yaml"
    earlier.write_text(yaml.safe_dump({name: value for name, value in settings.items() if name not in later}))
    shutil.copyfile(earlier, folder / "run.yaml")
    run(base, folder, ranks=2, resume="auto", config=earlier, deterministic=deterministic or None)
    assert_same_run(folder, whole_of_two)
    saved = json.loads((folder / "checkpoints" / "step_10" / "trainer_state.json").read_text())["settings"]
    expected = {**run_settings(whole_of_two), "deterministic": deterministic}
    assert {name: saved[name] for name in later} == {name: expected[name] for name in later}


# Signals ----------------------------------------------------------------------------------------------------------


def test_the_first_signal_counts(base: Base, folder: Path) -> None:
    """A launcher that was interrupted sends its ranks SIGTERM while they end: still 130, and all is written."""
    terminate = partial(kill_at_call, number=signal.SIGTERM)
    interrupt_then_terminate = partial(
        all_of,
        partial(kill_at_step, 3, signal.SIGINT),
        partial(terminate, "megatron_tiedlora.training.adapter_run", "save_checkpoint", call=2),
        *(partial(terminate, "megatron_tiedlora.runtime.ending", name) for name in ("End.stopped", "End.record")),
    )
    ended = run(base, folder, prelude=interrupt_then_terminate, expect=130)
    assert status(folder) == {"state": "stopped", "step": 3, "reason": "SIGINT"}
    assert checkpoint_names(folder) == {"step_2", "step_3"}
    assert "saved at step 3; continue with --resume auto" in ended.errors[0]
    assert "Traceback" not in ended.errors[0]


def test_a_signal_before_the_first_step(base: Base, folder: Path) -> None:
    """While the base is validated: stopped, without a checkpoint; resuming starts from the beginning."""
    start = partial(kill_at_call, LOOP, "Trainer._begin", number=signal.SIGTERM)
    ended = run(base, folder, ranks=2, prelude=start, expect=143)
    assert status(folder)["state"] == "stopped" and status(folder)["step"] == 0
    assert not (folder / "checkpoints").exists() and not (folder / "adapter").exists()
    assert "Traceback" not in "".join(ended.errors)
    run(base, folder, ranks=2, resume="auto", max_steps=2, eval_interval=2)
    assert [step for step, _ in losses(folder)] == [1, 2]


def test_a_signal_while_weights_are_read_leaves_nothing(base: Base, folder: Path) -> None:
    read = partial(kill_at_call, "megatron_tiedlora.training.build", "load_base_weights", number=signal.SIGTERM)
    ended = run(base, folder, prelude=read, expect=143)
    assert not folder.exists()
    assert "stopped by SIGTERM, before the first step" in ended.errors[0] and "Traceback" not in ended.errors[0]


def test_a_signal_during_an_evaluation_and_one_during_the_export(
    base: Base, whole: Path, tmp_path: Path, folder: Path
) -> None:
    """The evaluation is done again after the resume, the export finished after the next; each row is there once."""
    # The first evaluation is of the start, so the third one follows step 4.
    evaluating = partial(kill_at_call, LOOP, "fill_rounds", call=3, number=signal.SIGTERM)
    run(base, folder, prelude=evaluating, expect=143)
    assert status(folder)["step"] == 4 and [step for step, _ in losses(folder, "validation")] == [0, 2]
    exporting = partial(kill_at_call, "megatron_tiedlora.training.finish", "export_peft", number=signal.SIGINT)
    run(base, folder, resume="auto", prelude=exporting, expect=130)
    assert status(folder) == {"state": "stopped", "step": 10, "reason": "SIGINT"}
    assert not (folder / "peft").exists()
    (folder / "peft").symlink_to(tmp_path / "elsewhere")  # makes way
    run(base, folder, resume="auto")
    assert_same_run(folder, whole)
    assert files_of(folder / "peft") == files_of(whole / "peft") and not (folder / "peft").is_symlink()


def end_by_signal(words: list[str], number: int, base: Base, folder: Path, *, limit: float) -> tuple[int, int]:
    """Send the launcher of a run a signal after two steps, which its processes do not outlive.

    Returns its exit status, after at most `limit` seconds, and how many processes it had started.
    """
    command = start_command(words, folder=folder.parent / "work", cache=base.cache)
    try:
        wait_for(lambda: has_step(folder, 2) or command.process.poll() is not None, "two steps")
        assert command.process.poll() is None, command.ended().tail()
        started = command.descendants()
        command.process.send_signal(number)
        ended = command.process.wait(limit)
        command.wait_gone(started)
    finally:
        command.kill()
    assert status(folder)["state"] == "stopped"
    return ended, len(started)


@pytest.mark.parametrize(
    ("number", "ranks"), [pytest.param(signal.SIGKILL, 1, marks=pytest.mark.slow), (signal.SIGTERM, 2)]
)
def test_a_launcher_that_ends_stops_the_ranks(base: Base, folder: Path, number: int, ranks: int) -> None:
    """A local deepspeed dies at once from SIGKILL and leaves its launcher and rank, which end by themselves."""
    arguments = base.arguments(output_dir=folder, max_steps=200, eval_interval=100)
    words = deepspeed_command(arguments, ranks=ranks, prelude="long_steps")
    ended, started = end_by_signal(words, number, base, folder, limit=20)
    assert ended in (-number, 128 + number) and started == ranks + 1
    step = status(folder)["step"]
    assert 2 <= step < 200 and checkpoint_names(folder) == {f"step_{step}"}
    assert len(metrics(folder)) == step


@pytest.mark.slow
def test_torchrun_told_to_stop(base: Base, folder: Path) -> None:
    """The agent passes SIGTERM on to its ranks."""
    arguments = base.arguments(output_dir=folder, max_steps=100_000, eval_interval=100_000)
    assert end_by_signal(torchrun_command(arguments, ranks=2), signal.SIGTERM, base, folder, limit=60)[0] != 0


@pytest.mark.slow
def test_torchrun_restarts_go_on_by_themselves(
    base: Base, tmp_path: Path, whole_of_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank is killed at step 5: the ranks start again, from step 4, and end as an undisturbed run."""
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setenv("KILL_ONCE", str(tmp_path / "killed"))
    options = ["--max_restarts", "2", "--rdzv_backend", "c10d", "--rdzv_id", "test", "--rdzv_endpoint"]
    words = torchrun_command(
        base.arguments(output_dir=folder, resume="auto"),
        ranks=2,
        options=[*options, f"127.0.0.1:{free_port()}"],
        prelude="kill_once",
    )
    command = start_command(words, folder=tmp_path / "work", cache=base.cache)
    try:
        ended = command.wait()
    finally:
        command.kill()
    assert ended.status == 0, ended.tail()
    assert (tmp_path / "killed").exists() and ended.tail().count(", resumed from step 4") == 1
    assert_same_run(folder, whole_of_two)


# Early stopping, and runs that are over ----------------------------------------------------------------------------

WORSE = {2: 5.0, 4: 4.0, 6: 4.5, 8: 4.25, 10: 3.0}  # best at step 4; patience 2 ends at step 8


def test_early_stopping_and_patience_across_a_resume(base: Base, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    script, start = partial(scripted_validation, WORSE), partial(run, patience=2, save_interval=100, keep_checkpoints=1)
    start(base, whole, prelude=script)
    assert status(whole) == {"state": "finished", "step": 8, "reason": "early_stopping"}
    assert checkpoint_names(whole) == {"step_4", "step_8"}, "best and last"
    start(base, parts, prelude=partial(all_of, script, partial(kill_at_step, 7)), expect=143)
    assert len(metrics(parts)) == 7
    start(base, parts, resume="auto", prelude=script)
    assert_same_run(parts, whole)
    assert files_of(parts / "adapter") == {
        name: content for name, content in files_of(parts / "checkpoints" / "step_4").items() if "adapter" in name
    }
    # A run that is over stays as it is, also in another layout.
    before = files_of(parts)
    ended = start(base, parts, prelude=script, resume="auto", ds_config="zero3.json")
    assert status(parts) == {"state": "finished", "step": 8, "reason": "early_stopping"}
    after = files_of(parts)
    assert {name for name in before if before[name] != after.get(name)} <= {"run.yaml", "loss.png", "logs/rank_0.log"}
    assert "step 4" in ended.outputs[0]


# Checkpoints of another folder ------------------------------------------------------------------------------------


BEST_AT_TWO = partial(scripted_validation, {2: 3.0})


@pytest.fixture(scope="module")
def first(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best step is the second, stopped at the fifth."""
    folder = tmp_path_factory.mktemp("first") / "run"
    run(base, folder, prelude=partial(all_of, BEST_AT_TWO, partial(kill_at_step, 5)), expect=143)
    return folder


def test_branching_into_a_new_folder(base: Base, first: Path, tmp_path: Path) -> None:
    """--resume PATH with a new --output_dir takes the best checkpoint and the logs along, and leaves the first run."""
    branch, whole, before = tmp_path / "branch", tmp_path / "whole", files_of(first)
    run(base, whole, prelude=BEST_AT_TWO)
    run(base, branch, resume=first / "checkpoints" / "step_5", prelude=BEST_AT_TWO)
    assert_same_run(branch, whole)
    assert files_of(first) == before
    assert run_settings(branch)["output_dir"] == str(branch)


def test_a_checkpoint_taken_out_of_its_run(base: Base, first: Path, tmp_path: Path, folder: Path) -> None:
    """Without the best one beside it, the best is found anew."""
    alone = shutil.copytree(first / "checkpoints" / "step_5", tmp_path / "alone")
    run(base, folder, resume=alone)
    assert [step for step, _ in losses(folder)] == [6, 7, 8, 9, 10]
    assert status(folder)["state"] == "finished" and "step_10" in checkpoint_names(folder)


def test_going_back_within_a_run(base: Base, tmp_path: Path) -> None:
    """--resume PATH alone goes on in the run folder of that checkpoint, and a later `auto` goes on from there."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    script = partial(scripted_validation, {4: 3.0})
    run(base, whole, prelude=script)
    shutil.copytree(whole, folder)
    assert checkpoint_names(folder) == {"step_4", "step_6", "step_8", "step_10"}
    back = folder / "checkpoints" / "step_4"
    run(base, folder, output_dir=None, resume=back, prelude=partial(kill_at_step, 5, signal.SIGKILL), expect=-9)
    assert (folder / "checkpoints" / "latest").read_text() == "step_4\n"
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    ended = run(base, folder, resume="auto", prelude=script)
    assert "note        skipped step_6: is later than the checkpoint in latest" in ended.outputs[0]
    assert_same_run(folder, whole)
