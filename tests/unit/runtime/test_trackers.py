"""--report_to: what each tracker gets, on rank 0 alone, and what a tracker that fails does to a run: nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.train_fields import TENSORBOARD, TRACKER_NAMES
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder, check_trackers

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


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    CALLS.clear()
    return CALLS


def log_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **kinds: type) -> MetricsLog:
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
    rows = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [1, 2]
    assert [call for call in CALLS if call == (2, {"train/loss": 0.5})] == [(2, {"train/loss": 0.5})]  # trackio's alone
    assert CALLS.count("finished") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: --report_to wandb failed at step 1 (no route to host)") and "metrics.jsonl" in line


def test_a_tracker_that_cannot_start_ends_the_run_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"--report_to wandb: cannot start \(api key not given\)"):
        log_of(tmp_path, monkeypatch, trackio=Recording, wandb=Refusing)
    assert CALLS.count("finished") == 1


def test_no_tensorboard_if_it_is_not_asked_for(tmp_path: Path) -> None:
    log = MetricsLog(RunFolder(tmp_path), resumed_step=0, report_to=())
    log.write(ROW)
    log.close()
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    monkeypatch.setitem(sys.modules, "accelerate", None)
    check_trackers((TENSORBOARD,))
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="tensorboard is not installed; pip install tensorboard, or give"):
        check_trackers((TENSORBOARD,))
    (tmp_path / "dvclive").mkdir()  # what a client leaves behind is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="--report_to dvclive: the package dvclive is not installed; pip install"):
        check_trackers(("dvclive",))


def test_every_name_is_one_of_accelerate() -> None:
    """Later versions have all; the oldest that the package allows has no trackio and swanlab."""
    assert set(TRACKER_NAMES) - set(LOGGER_TYPE_TO_CLASS) <= {"trackio", "swanlab"}
