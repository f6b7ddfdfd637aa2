"""A run that fails half-way: nan, a full disk, a dead rank. The last good checkpoint stands, one line says why."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_files import checkpoint_names, edit_tensors, files_of, losses, metrics, status
from run_helpers import Base, Ended, run, run_ranks, write_base
from run_preludes import before_call, kill_at_call, kill_at_step, limit_files, poison

pytestmark = pytest.mark.distributed
LOOP = "megatron_tiedlora.training.loop"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


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
def test_nan(base: Base, tmp_path: Path, ds_config: str, what: str, ranks: int | None) -> None:
    """At step 5: the run fails, the checkpoint of step 4 stands, no row of step 5 is logged."""
    folder = tmp_path / "run"
    changes = {"ds_config": ds_config, "save_interval": 1}
    ended = run(base, folder, ranks=ranks, prelude=partial(poison, 5, what), expect=2, **changes)
    _failed_at_five(ended, folder, "the loss is nan" if what == "loss" else "the gradient norm is")
    # It can be gone on with, here without what made it fail.
    run(base, folder, ranks=ranks, resume="auto", **changes)
    assert status(folder)["state"] == "finished"
    assert [step for step, _ in losses(folder)] == list(range(1, 11))


def _failed_at_five(ended: Ended, folder: Path, message: str) -> None:
    line, end = ended.error_line(), status(folder)
    assert message in line and "at step 5; the last checkpoint is of step 4" in line
    assert (end["state"], end["step"]) == ("failed", 4) and message in end["reason"]
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    assert checkpoint_names(folder) == {"step_2", "step_3", "step_4"}
    assert (folder / "checkpoints" / "latest").read_text() == "step_4\n"


def test_nan_in_the_base(tmp_path: Path) -> None:
    broken, folder = write_base(tmp_path / "base"), tmp_path / "run"
    edit_tensors(broken.model / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    line = run(broken, folder, expect=2).error_line()
    assert "the validation loss is nan at step 0; no checkpoint was written yet" in line
    assert status(folder)["state"] == "failed" and metrics(folder, "validation") == []
    assert not (folder / "checkpoints").exists() and not (folder / "adapter").exists()


def test_a_learning_rate_that_blows_up(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    line = run(base, folder, learning_rate=1e15, gradient_clipping=0, save_interval=100, expect=2).error_line()
    assert "not finite" in line or "is nan" in line or "is inf" in line
    assert status(folder)["state"] == "failed" and not (folder / "adapter").exists()


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_step_so_large_that_no_gradient_is_left(base: Base, tmp_path: Path, ranks: int | None) -> None:
    """v starts at zero, so the gradients of A, B and u are zero at step 1 by the method. They are not what is wrong."""
    huge = {"method": "tl6", "learning_rate": 100.0, "gradient_clipping": 0, "warmup_steps": 0}
    line = run(base, tmp_path / "run", ranks=ranks, expect=2, **huge).error_line()
    assert "step 2: every gradient is exactly zero, as values of the adapter have grown to 100;" in line
    assert line.endswith("Lower --learning_rate")


@pytest.mark.parametrize("ranks", [None, 2])
def test_disk_full_at_a_save(base: Base, tmp_path: Path, ranks: int | None) -> None:
    """The save of step 4: that of step 2 stays whole, and the run can go on from it."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run(base, whole, max_steps=4, rank=16, ranks=ranks)
    prelude = partial(limit_files, "megatron_tiedlora.training.adapter_run", "save_checkpoint", 6000, call=2)
    ended = run(base, folder, max_steps=4, rank=16, ranks=ranks, prelude=prelude, expect=2)
    line = ended.error_line()
    assert "step_4: cannot be written" in line and "nothing was changed" in line
    assert checkpoint_names(folder) == {"step_2"} and (folder / "checkpoints" / "latest").read_text() == "step_2\n"
    assert status(folder)["state"] == "failed" and "step_4" in status(folder)["reason"]
    if ranks:
        assert status(folder)["reason"].startswith("rank 0 on "), "whose disk it is"
    assert not list(folder.rglob(".writing*"))
    run(base, folder, max_steps=4, rank=16, ranks=ranks, resume="auto")
    assert losses(folder) == losses(whole)
    assert files_of(folder / "adapter") == files_of(whole / "adapter")


def test_files_that_cannot_be_written(base: Base, tmp_path: Path) -> None:
    """Where it is the first file nothing is left; where it is a log the run fails in one line."""
    folder = tmp_path / "run"
    full = partial(limit_files, "megatron_tiedlora.training.start", "write_run_settings", 600)
    assert "run.yaml: cannot be written" in run(base, folder, prelude=full, expect=2).error_line()
    assert not folder.exists()
    assert "logs cannot be written" in run(base, folder, prelude=_lose_the_log, expect=2).error_line()
    assert status(folder)["state"] == "failed"


def _lose_the_log() -> None:
    def lose(trainer: Any, *_: Any) -> None:
        if trainer.last_step == 1:
            trainer.folder.metrics.unlink()
            trainer.folder.metrics.mkdir()

    before_call(LOOP, "Trainer._train_step", lose)


def test_a_failure_of_one_rank_ends_all(base: Base, tmp_path: Path) -> None:
    """Rank 1 dies: rank 0 does not hang, and says that the run failed."""
    folder = tmp_path / "run"
    arguments = base.arguments(output_dir=folder)
    prelude = partial(kill_at_step, 3, 9, rank=1)
    ended = run_ranks(arguments, folder=tmp_path / "work", cache=base.cache, ranks=2, prelude=prelude)
    assert ended.statuses[1] == -9 and ended.statuses[0] not in (0, -9)
    assert status(folder)["state"] == "failed" and checkpoint_names(folder) == {"step_2"}


def test_a_signal_while_a_rank_says_why_it_fails(base: Base, tmp_path: Path) -> None:
    """A launcher tells the others to stop as soon as one rank has ended: they still say all, and end as failed."""
    folder = tmp_path / "run"
    ended = run(base, folder, prelude=_fail_and_be_stopped, expect=2)
    assert "the loss is nan" in ended.error_line() and "the loss is nan" in status(folder)["reason"]
    assert status(folder)["state"] == "failed"


def _fail_and_be_stopped() -> None:
    poison(3, "loss")
    kill_at_call("megatron_tiedlora.runtime.ending", "End._record_failure", number=signal.SIGTERM)
