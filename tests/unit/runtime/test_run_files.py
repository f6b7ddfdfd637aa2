"""The folder of a run: what killed starts leave, to whom an end is written, and what --report_to sends to trackers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from support.run_files import metrics, status
from support.task_files import refusal

from megatron_tiedlora.base.ownership import Owner, take_folder
from megatron_tiedlora.config.fields import TENSORBOARD, TRACKER_NAMES
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder, check_trackers, take_run_folder

ROW = {"step": 1, "split": "train", "loss": 0.5}
CALLS: list[Any] = []


class Recording(GeneralTracker):
    """A tracker of accelerate's kind that writes down what it gets."""

    name = "recording"
    requires_logging_directory = False

    def __init__(self, run_name: str, **keywords: Any) -> None:
        super().__init__()
        CALLS.append(("made", run_name, keywords))

    @property
    def tracker(self) -> Any:
        return None

    def start(self) -> None:
        CALLS.append("started")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        CALLS.append(("configured", values))

    def log(self, values: dict[str, Any], step: int | None = None, **keywords: Any) -> None:
        CALLS.append((step, values))

    def finish(self) -> None:
        CALLS.append("finished")


class Failing(Recording):
    def log(self, values: dict[str, Any], step: int | None = None, **keywords: Any) -> None:
        super().log(values, step)
        raise ConnectionError("no route to host\nmore")


class Refusing(Recording):
    def start(self) -> None:
        raise RuntimeError("api key not given")


def log_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **kinds: type) -> MetricsLog:
    CALLS.clear()
    for name, kind in kinds.items():
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, kind)
    settings = {"rank": 8, "alpha": None, "layers": [1, 2], "model": "demo"}
    return MetricsLog(RunFolder(folder), resumed_step=0, report_to=(TENSORBOARD, *kinds), settings=settings)


def test_a_tracker_gets_settings_rows_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "demo-tl6"
    folder.mkdir()
    monkeypatch.setenv("WORLD_SIZE", "4")  # of the launcher: the other ranks do not report
    monkeypatch.setenv("LOCAL_RANK", "0")
    log = log_of(folder, monkeypatch, wandb=Recording)
    log.write(ROW)
    log.write({"step": 1, "split": "validation", "loss": 0.25, "exact_match": 10.0})
    log.close()
    assert [
        ("made", "tiedlora", {"name": "demo-tl6", "dir": str(folder)}),
        "started",
        ("configured", {"rank": 8, "alpha": "None", "layers": "[1, 2]", "model": "demo"}),
        (1, {"train/loss": 0.5}),
        (1, {"validation/loss": 0.25, "validation/exact_match": 10.0}),
        "finished",
    ] == CALLS
    assert os.environ["WORLD_SIZE"] == "4" and (folder / "tensorboard").is_dir()


def test_the_tracker_s_own_variable_names_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    log_of(tmp_path, monkeypatch, wandb=Recording).close()
    assert CALLS[0][1] == "mine"


def test_a_tracker_that_fails_is_left_out_and_the_rows_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_of(tmp_path, monkeypatch, wandb=Failing, trackio=Recording)
    for step in (1, 2):
        log.write({**ROW, "step": step})
    log.close()
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2]
    assert [call for call in CALLS if call == (2, {"train/loss": 0.5})] == [(2, {"train/loss": 0.5})]  # trackio's alone
    assert CALLS.count("finished") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: --report_to wandb failed at step 1 (no route to host)") and "metrics.jsonl" in line


def test_a_tracker_that_cannot_start_ends_the_run_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(log_of, tmp_path, monkeypatch, trackio=Recording, wandb=Refusing)
    assert "--report_to wandb: cannot start (api key not given)" in said
    assert CALLS.count("finished") == 1


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    monkeypatch.setitem(sys.modules, "accelerate", None)
    check_trackers((TENSORBOARD,))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    said = refusal(check_trackers, (TENSORBOARD,))
    assert "tensorboard is not installed; pip install tensorboard, or give" in said
    (tmp_path / "dvclive").mkdir()  # what a client leaves behind is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    said = refusal(check_trackers, ("dvclive",))
    assert "--report_to dvclive: the package dvclive is not installed; pip install" in said


def test_every_name_is_one_of_accelerate() -> None:
    """Later versions have all; the oldest that the package allows has no trackio and swanlab."""
    assert set(TRACKER_NAMES) - set(LOGGER_TYPE_TO_CLASS) <= {"trackio", "swanlab"}


# The folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_main", [True, False])
def test_another_rank_leaves_what_rank_0_has_finished(tmp_path: Path, is_main: bool) -> None:
    """Rank 0 was lost between two exports: its peers, which write that down, do not know of the first one."""
    paths = [tmp_path / name for name in ("run", "run/finished", "run/ended")]
    locks = [take_folder(path, hint="") for path in paths]
    owners = [Owner(path, lock.owner.start, is_main=is_main) for path, lock in zip(paths, locks, strict=True)]
    own = [RunFolder(path, owner) for path, owner in zip(paths[1:], owners[1:], strict=True)]
    own[0].write_status("finished", step=3, reason="max_steps")
    unrecorded = own[1:] if is_main else own
    group = RunFolder(paths[0], owners[0], of_several=True, running=lambda: [(folder, 3) for folder in unrecorded])
    group.write_status("failed", step=3, reason="rank 0 was lost")
    assert [status(path)["state"] for path in paths] == ["failed", "finished", "failed"]
    for lock in locks:
        lock.release()


@pytest.mark.parametrize("of_several", [False, True])
def test_a_start_removes_what_killed_ones_have_left(tmp_path: Path, of_several: bool) -> None:
    """In every folder into which a run writes files; those of adapters are run folders of their own."""
    folder = RunFolder(tmp_path / "run", of_several=of_several)
    for path in (folder.path, folder.logs, folder.checkpoints, folder.profile):
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writing-rank_0.log-1a2b3c4d").touch()
        (path / ".writing-step_3-1a2b3c4d").mkdir()
        (path / "whole").touch()
    folder.settings.touch()
    given = {"output_dir": str(folder.path), "resume": "auto", **({"adapters": "some.yaml"} if of_several else {})}
    _, lock = take_run_folder(make_settings(given))
    lock.release()
    left = {str(path.relative_to(folder.path)) for path in folder.path.rglob("*") if path.is_file()}
    assert left == {folder.settings.name, *(f"{name}whole" for name in ("", "logs/", "checkpoints/", "profile/"))}
