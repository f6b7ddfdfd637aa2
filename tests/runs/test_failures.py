"""A run that fails half-way: nan, a full disk, other data on one host. One line says why, the last checkpoint stands.
A run that is killed loses nothing but the steps since its last checkpoint.

What one rank finds or suffers is every rank's. test_lost_ranks.py has ranks that die.
"""

from __future__ import annotations

import importlib
import os
import re
import resource
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.kill_series import Layout, kill_series
from support.run_files import assert_same_run, checkpoint_names, edit_tensors, files_of, losses, metrics, status
from support.run_helpers import Base, run, write_base
from support.run_preludes import all_of, kill_at_call, kill_at_step, limit_files, poison, scripted_validation

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    ("ds_config", "what", "ranks"),
    [
        ("zero2.json", "loss", 2),
        ("zero0.json", "gradient", None),
        ("zero2.json", "gradient", None),
        ("zero3.json", "gradient", None),
        ("zero1.json", "gradient", 2),
        ("zero2_offload.json", "gradient", None),
    ],
)
def test_nan(base: Base, folder: Path, ds_config: str, what: str, ranks: int | None) -> None:
    """At step 5: the run fails, the checkpoint of step 4 stands, no row of step 5 is logged."""
    changes = {"ds_config": ds_config, "save_interval": 1}
    line = run(base, folder, ranks=ranks, prelude=partial(poison, 5, what), expect=2, **changes).error_line()
    message, end = "the loss is nan" if what == "loss" else "the gradient norm is", status(folder)
    assert message in line and "at step 5; the last checkpoint is from step 4" in line
    assert (end["state"], end["step"]) == ("failed", 4) and message in end["reason"]
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    assert checkpoint_names(folder) == {"step_2", "step_3", "step_4"}
    assert (folder / "checkpoints" / "latest").read_text() == "step_4\n"


def test_nan_in_the_base(tmp_path: Path, folder: Path) -> None:
    broken = write_base(tmp_path / "base")
    edit_tensors(broken.model / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    line = run(broken, folder, expect=2).error_line()
    assert "the validation loss is nan at step 0; no checkpoint was written yet" in line
    assert status(folder)["state"] == "failed" and metrics(folder, "validation") == []
    assert not (folder / "checkpoints").exists() and not (folder / "adapter").exists()


def test_a_learning_rate_that_blows_up(base: Base, folder: Path) -> None:
    line = run(base, folder, learning_rate=1e15, gradient_clipping=0, save_interval=100, expect=2).error_line()
    assert "not finite" in line or "is nan" in line or "is inf" in line
    assert status(folder)["state"] == "failed" and not (folder / "adapter").exists()


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_step_so_large_that_no_gradient_is_left(base: Base, tmp_path: Path, ranks: int | None) -> None:
    """v starts at zero, so the gradients of A, B and u are zero at step 1 by the method. They are not what is wrong."""
    huge = {"method": "tl6", "learning_rate": 100.0, "gradient_clipping": 0, "warmup_steps": 0}
    line = run(base, tmp_path / "run", ranks=ranks, expect=2, **huge).error_line()
    assert "step 2: every gradient is exactly zero, because adapter values have grown to 100;" in line
    assert line.endswith("Lower --learning_rate")


def test_disk_full_at_a_save(base: Base, tmp_path: Path) -> None:
    """The save of step 4: that of step 2 stays whole, the run can go on from it, the reason says whose disk it is."""
    whole, folder, settings = tmp_path / "whole", tmp_path / "run", {"max_steps": 4, "rank": 16, "ranks": 2}
    run(base, whole, **settings)
    prelude = partial(limit_files, "megatron_tiedlora.training.adapter_run", "save_checkpoint", 6000, call=2)
    line = run(base, folder, **settings, prelude=prelude, expect=2).error_line()
    assert "step_4: cannot be written" in line and "nothing was changed" in line
    assert checkpoint_names(folder) == {"step_2"} and (folder / "checkpoints" / "latest").read_text() == "step_2\n"
    assert status(folder)["state"] == "failed" and "step_4" in status(folder)["reason"]
    assert status(folder)["reason"].startswith("rank 0 on ")
    assert not list(folder.rglob(".writing*"))
    run(base, folder, **settings, resume="auto")
    assert losses(folder) == losses(whole)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")


def test_a_first_file_that_cannot_be_written_leaves_nothing(base: Base, tmp_path: Path) -> None:
    full = partial(limit_files, "megatron_tiedlora.training.start", "write_run_settings", 600)
    assert "run.yaml: cannot be written" in run(base, tmp_path / "run", prelude=full, expect=2).error_line()
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_rank_says_why_it_fails(base: Base, folder: Path) -> None:
    """A launcher tells the others to stop as soon as one rank has ended: they still say all, and end as failed."""
    stop = partial(kill_at_call, "megatron_tiedlora.runtime.ending", "End._record_failure", number=signal.SIGTERM)
    ended = run(base, folder, prelude=partial(all_of, partial(poison, 3, "loss"), stop), expect=2)
    assert "the loss is nan" in ended.error_line() and "the loss is nan" in status(folder)["reason"]
    assert status(folder)["state"] == "failed"


def other_data_on_rank_1(part: str) -> None:
    """Rank 1 reads one row less than its peer."""
    if os.environ["RANK"] == "1":
        place, name = ("data.cache", "tokenised_once") if part == "train" else ("planning.adapter_plans", "read_split")
        module: Any = importlib.import_module(f"megatron_tiedlora.{place}")
        original = getattr(module, name)

        def other_file(encoding: Any, *, files: Any, **keywords: Any) -> Any:
            shorter = Path("shorter.jsonl")
            shorter.write_text("".join(Path(files["train"]).read_text().splitlines(keepends=True)[1:]))
            return original(encoding, files={**files, "train": shorter}, **keywords)

        def one_less(settings: Any, split: str, **keywords: Any) -> Any:
            return original(settings, split, **keywords)[1:]

        setattr(module, name, other_file if part == "train" else one_less)


@pytest.mark.parametrize("part", ["train", "test"])
def test_ranks_that_read_other_data_are_refused(base: Base, folder: Path, part: str) -> None:
    prelude = partial(other_data_on_rank_1, part)
    ended = run(base, folder, ranks=2, test_file=base.validation, prelude=prelude, expect=2)
    assert "1 rank read training, validation or test data that differs from rank 0's" in ended.error_line()
    assert not folder.exists()


def full_disk_at(file: Path, split: str, step: int) -> None:
    """There is room for a part of one row of metrics.jsonl; for what is said of it there is room again."""
    module: Any = importlib.import_module("megatron_tiedlora.runtime.run_folder")
    write = module.MetricsLog.write

    def limited(log: Any, row: dict[str, Any]) -> None:
        here = (row["split"], row["step"]) == (split, step)
        limit = file.stat().st_size + 40 if here else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(log, row)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    module.MetricsLog.write = limited


@pytest.mark.parametrize(
    ("split", "step", "saved"),
    [("train", 4, "step_2"), ("validation", 4, "step_2"), ("train", 10, "step_8")],
)
def test_no_checkpoint_is_saved_without_its_rows(
    base: Base, whole_of_two: Path, folder: Path, split: str, step: int, saved: str
) -> None:
    """Also where a checkpoint is due at that step: the reason names rank 0, and the resumed run writes the row."""
    prelude = partial(full_disk_at, folder / "metrics.jsonl", split, step)
    line = run(base, folder, ranks=2, prelude=prelude, expect=2).error_line()
    assert "logs cannot be written (File too large)" in line
    end = status(folder)
    assert end["state"] == "failed" and re.match(r"rank 0 on \S+, after step \d+: .*File too large", end["reason"]), end
    assert (folder / "checkpoints" / "latest").read_text() == f"{saved}\n"
    assert f"step_{step}" not in checkpoint_names(folder)
    run(base, folder, ranks=2, resume="auto")
    assert [number for number, _ in losses(folder)] == list(range(1, 11))
    assert_same_run(folder, whole_of_two)


# Killed: nothing is lost but the steps since the last checkpoint ------------------------------------------------------


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


WORSE_AFTER_TWO = {2: 3.0, 4: 4.0, 6: 5.0, 8: 6.0, 10: 7.0}
KILLED_AT_SIX = partial(all_of, partial(scripted_validation, WORSE_AFTER_TWO), partial(kill_at_step, 6, signal.SIGKILL))


def test_an_evaluation_done_again_is_logged_once(base: Base, tmp_path: Path) -> None:
    """Stopped while step 4 is evaluated; evaluated after the resume, no improvement; then killed before a save."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    script = partial(scripted_validation, WORSE_AFTER_TWO)
    few = {"save_interval": 100, "keep_checkpoints": 1}
    run(base, whole, **few, prelude=script)
    run(base, folder, **few, prelude=_stop_in_second_evaluation, expect=143)
    assert losses(folder, "validation") == [(0, 10.0), (2, 3.0)] and checkpoint_names(folder) == {"step_2", "step_4"}
    run(base, folder, **few, resume="auto", prelude=KILLED_AT_SIX, expect=-signal.SIGKILL)
    assert [step for step, _ in losses(folder, "validation")] == [0, 2, 4]
    run(base, folder, **few, resume="auto", prelude=script)
    assert_same_run(folder, whole)


def _stop_in_second_evaluation() -> None:
    from megatron_tiedlora.training import loop

    def losses(self: loop.Evaluation, runs: loop.Runs) -> dict[str, float]:
        if any(run.progress.step == 4 for run in runs):
            os.kill(os.getpid(), signal.SIGTERM)
            self.step.stop.agree(True)
        return {run.name: WORSE_AFTER_TWO.get(run.progress.step, 10.0) for run in runs}

    loop.Evaluation.losses = losses  # type: ignore[method-assign]


SAVE_POINTS = {
    "before `latest`": ("megatron_tiedlora.checkpoint.resume", "write_text"),
    "before the adapter": ("megatron_tiedlora.training.adapter_run", "save_adapter"),
}
BEST_AT_FOUR = partial(scripted_validation, {2: 5.0, 4: 3.0, 6: 4.0})


@pytest.fixture(scope="module")
def best_at_four(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six undisturbed steps, of which the fourth is the best."""
    folder = tmp_path_factory.mktemp("best_at_four") / "run"
    run(base, folder, max_steps=6, prelude=BEST_AT_FOUR)
    return folder


@pytest.mark.parametrize("point", SAVE_POINTS)
def test_killed_in_a_save(base: Base, best_at_four: Path, folder: Path, point: str) -> None:
    """SIGKILL within the save of step 4, the best: that of step 2 or 4 stands, and the rest equals the whole run.

    test_atomic_saves.py kills at every line of a save.
    """
    module, name = SAVE_POINTS[point]
    killed = partial(all_of, BEST_AT_FOUR, partial(kill_at_call, module, name, call=2))
    run(base, folder, max_steps=6, prelude=killed, expect=-signal.SIGKILL)
    latest = (folder / "checkpoints" / "latest").read_text().strip()
    assert latest == ("step_4" if point == "before the adapter" else "step_2")
    run(base, folder, max_steps=6, resume="auto", prelude=BEST_AT_FOUR)
    assert_same_run(folder, best_at_four)
    assert files_of(folder / "adapter") == files_of(best_at_four / "adapter")
    assert not list(folder.rglob(".writing*"))


def test_a_run_that_is_killed_twice_ends_like_an_undisturbed_one(base: Base, tmp_path: Path) -> None:
    """Once within a save and once after the last step, two tensor-parallel ranks; test_slow_kills.py has 72 kills."""
    layout = Layout(2, {"tensor_parallel": 2, "ds_config": "zero1.json"})
    figures = kill_series(base, tmp_path, layout, kinds=["save", "end"], seed=7)
    assert figures.kills.total() == 2
