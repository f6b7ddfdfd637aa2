"""A run that is killed at any point loses no more than the steps since its last checkpoint."""

from __future__ import annotations

import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from ranks import fork_server
from run_files import assert_same_run, checkpoint_names, files_of, losses
from run_helpers import Base, run, write_base
from run_preludes import die_at_event, kill_at_call, kill_at_step, scripted_validation

ADAPTER_RUN = "megatron_tiedlora.training.adapter_run"

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


def test_a_crash_that_lost_steps_leaves_each_row_once(base: Base, tmp_path: Path) -> None:
    """SIGKILL at step 7, the last checkpoint at step 4; a last line cut short is overlooked."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(base, whole, eval_interval=4)
    killed = partial(kill_at_step, 7, signal.SIGKILL)
    run(base, folder, eval_interval=4, prelude=killed, expect=-signal.SIGKILL)
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4, 5, 6] and checkpoint_names(folder) == {"step_4"}
    assert not (folder / "run_status.json").exists()
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "split": "tr')
    run(base, folder, eval_interval=4, resume="auto")
    assert_same_run(folder, whole)


def test_an_evaluation_done_again_is_logged_once(base: Base, tmp_path: Path) -> None:
    """Stopped while step 4 is evaluated; evaluated after the resume, no improvement; then killed before a save."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    script = partial(scripted_validation, WORSE_AFTER_TWO)
    few = {"save_interval": 100, "keep_checkpoints": 1}
    run(base, whole, **few, prelude=script)
    run(base, folder, **few, prelude=_stop_in_second_evaluation, expect=143)
    assert losses(folder, "validation") == [(0, 10.0), (2, 3.0)] and checkpoint_names(folder) == {"step_2", "step_4"}
    run(base, folder, **few, resume="auto", prelude=_killed_at_six, expect=-signal.SIGKILL)
    assert [step for step, _ in losses(folder, "validation")] == [0, 2, 4]
    run(base, folder, **few, resume="auto", prelude=script)
    assert_same_run(folder, whole)


WORSE_AFTER_TWO = {2: 3.0, 4: 4.0, 6: 5.0, 8: 6.0, 10: 7.0}


def _stop_in_second_evaluation() -> None:
    from megatron_tiedlora.training import loop

    def losses(self: loop.Evaluation, runs: loop.Runs) -> dict[str, float]:
        if any(run.progress.step == 4 for run in runs):
            os.kill(os.getpid(), signal.SIGTERM)
            self.stop.agree(True)
        return {run.name: WORSE_AFTER_TWO.get(run.progress.step, 10.0) for run in runs}

    loop.Evaluation.losses = losses  # type: ignore[method-assign]


def _killed_at_six() -> None:
    scripted_validation(WORSE_AFTER_TWO)
    kill_at_step(6, signal.SIGKILL)


SAVE_POINTS = {
    "before the checkpoint": (ADAPTER_RUN, "save_checkpoint", 2),
    "before its state": ("megatron_tiedlora.checkpoint.resume", "save_file", 2),
    "before `latest`": ("megatron_tiedlora.checkpoint.resume", "write_text", 2),
    "before the adapter": (ADAPTER_RUN, "save_adapter", 2),
}


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_in_a_save(base: Base, tmp_path: Path, point: str) -> None:
    """SIGKILL within the save of step 4, the best: that of step 2 or 4 stands, and the rest equals the whole run."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    script = partial(scripted_validation, BEST_AT_FOUR)
    run(base, whole, max_steps=6, prelude=script)
    run(base, folder, max_steps=6, prelude=partial(_killed_at_point, point), expect=-signal.SIGKILL)
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    assert latest == ("step_4" if point == "before the adapter" else "step_2")
    run(base, folder, max_steps=6, resume="auto", prelude=script)
    assert_same_run(folder, whole)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")
    assert not list(folder.rglob(".writing*"))


BEST_AT_FOUR = {2: 5.0, 4: 3.0, 6: 4.0}


def _killed_at_point(point: str) -> None:
    scripted_validation(BEST_AT_FOUR)
    module, name, call = SAVE_POINTS[point]
    kill_at_call(module, name, call=call)


def test_a_save_killed_anywhere_leaves_the_last_one_whole(tmp_path: Path) -> None:
    """SIGKILL before every single look at a file within a save: `latest` names a whole checkpoint each time."""
    from megatron_tiedlora.base.atomic import remove_leftovers
    from megatron_tiedlora.checkpoint.resume import find_newest_checkpoint, named_checkpoint

    save_a_checkpoint(tmp_path / "first", 2)
    save_a_checkpoint(tmp_path / "both", 2)
    save_a_checkpoint(tmp_path / "both", 4)
    expected = {2: files_of(tmp_path / "first" / "step_2"), 4: files_of(tmp_path / "both" / "step_4")}
    found = []
    for event in range(1, 200):
        folder = Path(shutil.copytree(tmp_path / "first", tmp_path / "killed"))
        process = fork_server().Process(target=_save_and_die, args=(folder, event), daemon=True)
        process.start()
        process.join(30)
        latest = find_newest_checkpoint(folder)
        assert latest is not None and latest.folder == named_checkpoint(folder)
        step = latest.progress.step
        assert files_of(latest.folder) == expected[step]
        found.append(step)
        remove_leftovers(folder)  # as the next start does
        save_a_checkpoint(folder, 6)
        assert {item.name for item in folder.iterdir()} == {"latest", "step_2", "step_6"}
        shutil.rmtree(folder)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert event > 15 and found == sorted(found) and set(found) == {2, 4}


def _save_and_die(folder: Path, event: int) -> None:
    die_at_event(event, folder)
    save_a_checkpoint(folder, 4)


def save_a_checkpoint(folder: Path, step: int) -> None:
    """Save small values that depend on `step`; the best is that of step 2."""
    from megatron_tiedlora.adapters.tied_adapter import Target, initial_values, make_adapter_config
    from megatron_tiedlora.checkpoint.base_identity import BaseIdentity
    from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint

    target = Target("qkv", 8, (8, 4, 4), "column")
    config = make_adapter_config("tl6", rank=2, layers=(1, 2), targets=(target,), seed=step)
    shape = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
    shape["intermediate_size"] = 16
    state = initial_values(config)
    save_checkpoint(
        folder,
        progress=Progress(step=step, consumed_samples=step, best_metric=1.0, best_step=2),
        config=config,
        base_identity=BaseIdentity(**shape, base_model="tiny", base_hash="0", base_weights_hash="0", dtype="fp32"),
        state=state,
        moments={f"{moment}.adapter.{n}": t.abs() for moment in ("exp_avg", "exp_avg_sq") for n, t in state.items()},
        settings={},
    )
