"""Sweeps with several seeds: which runs there are, which rows they have, how they are grouped, resumed and chosen."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.run_files import losses, run_settings
from support.sweep_runs import (
    Given,
    go_on,
    planned,
    run_study,
    starts,
    sweep_here,
    table2_markdown,
    work,
    write_run,
    write_scored,
    write_study,
)
from support.task_files import refusal

from megatron_tiedlora.config import job_settings
from megatron_tiedlora.config.cli import PER_ADAPTER
from megatron_tiedlora.config.job_settings import SweepSettings, parse_sweep
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.study.record import Point, Run, make_grid, read_study
from megatron_tiedlora.study.tables import table2

SETTINGS: dict[str, Any] = {"ranks": 2, "learning_rates": "2e-1,5e-2", "max_steps": 4, "validation_file": None}
POINTS, RATES, SUFFIXES = ("lora-r2", "tl6-r2"), ("2e-1", "5e-2"), ("", "-seed6")  # the study's own seed is 5


@pytest.fixture(scope="module")
def whole(study: Given, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with two seeds."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run_study(study, folder, **SETTINGS, seeds=2)
    return folder


def best_metric(folder: Path) -> float:
    return float(json.loads((folder / "checkpoints" / "step_4" / "trainer_state.json").read_text())["best_metric"])


def test_the_seeds_of_a_study_share_rows_but_not_values(whole: Path) -> None:
    names = [f"{point}-lr{rate}{suffix}" for point in POINTS for suffix in SUFFIXES for rate in RATES]
    assert {path.name for path in (whole / "runs").iterdir()} == set(names)
    settings = {name: run_settings(whole / "runs" / name) for name in names}
    assert {name: one["seed"] for name, one in settings.items()} == {n: 6 if "seed6" in n else 5 for n in names}
    # Before training every adapter adds 0, so the loss is the base model's on the rows that were split off.
    assert len({dict(losses(whole / "runs" / name, "validation"))[0] for name in names}) == 1
    # Initial values and the order of samples differ.
    assert len({losses(whole / "runs" / name, "train")[-1] for name in names}) == len(names)


def test_the_best_rate_by_the_mean_of_the_seeds_is_scored_for_all(whole: Path) -> None:
    rows = list(csv.DictReader((whole / "table2.csv").open()))
    row = next(row for row in rows if (row["method"], row["section"]) == ("tl6", "best_rank"))
    runs = {rate: [whole / "runs" / f"tl6-r2-lr{rate}{suffix}" for suffix in SUFFIXES] for rate in RATES}
    means = {rate: sum(map(best_metric, folders)) / 2 for rate, folders in runs.items()}
    chosen = min(means, key=lambda rate: means[rate])
    assert row["learning_rate"] == chosen and float(row["validation"]) == pytest.approx(means[chosen])
    assert row["seeds"] == "2" and "rows (resampled) and seeds" in (whole / "table2.md").read_text()


def test_more_seeds_can_be_added_and_none_left_out(study: Given, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    message = refusal(sweep_here, [f"--output_dir={folder}", "--seeds=1"])
    assert "sweep.yaml: the sweep was started with --seeds 2, now it is 1; give 2 or more" in message
    message = refusal(sweep_here, [f"--output_dir={folder}", "--split_seed=6"])
    assert "--split_seed 5, but the value is now 6" in message
    go_on(study, folder, "--seeds=3", "--together=2")
    new = [f"group {point}-lr2e-1-seed7" for point in POINTS]
    assert starts(work(folder)) == [*new, "scores"]  # nothing of the two first seeds again
    assert {run_settings(path)["split_seed"] for path in (folder / "runs").iterdir()} == {5}
    assert {row["seeds"] for row in csv.DictReader((folder / "table2.csv").open())} == {"1", "3"}  # 1: the base


def test_groups_leave_out_seeds_and_runs_that_are_finished(study: Given, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)

    def groups(*flags: str) -> list[list[str]]:
        return [[run.name for run in group] for group in planned(study, folder, *flags, **SETTINGS).groups()]

    new = [[f"{point}-lr{rate}-seed7" for rate in RATES] for point in POINTS]
    assert groups("--seeds=3", "--together=auto") == groups("--seeds=3", "--together=4") == [[*new[0], *new[1]]]
    (folder / "runs" / "tl6-r2-lr5e-2" / "run_status.json").write_text('{"state": "failed", "step": 4, "reason": ""}')
    assert groups("--seeds=2", "--together=1") == [["tl6-r2-lr5e-2"]]
    # It is trained beside the other rate of its seed, which is finished, and without the other seed.
    assert groups("--seeds=2", "--together=4") == [["tl6-r2-lr2e-1", "tl6-r2-lr5e-2"]]


def test_names_and_settings_of_runs() -> None:
    grid = make_grid(parse_sweep(["--output_dir=x", "--seeds=3", "--seed=9", "--single_layers=2"]), 4)
    assert grid.seeds == (None, 10, 11) and len(grid.all_runs) == 57 * 2 * 3
    assert len({run.name for run in grid.all_runs}) == len(grid.all_runs)
    first, *_, last = grid.runs(Point("lora", 16, 2))
    assert (first.name, last.name) == ("lora-r16-lr1e-4-layer2", "lora-r16-lr1e-5-layer2-seed11")
    settings = {"method": "lora", "rank": 16, "layers": 2}
    assert first.settings == {**settings, "learning_rate": 1e-4}
    assert last.settings == {**settings, "learning_rate": 1e-5, "seed": 11}
    # A setting in which runs that train together cannot differ would need groups of its own.
    assert {name for run in grid.all_runs for name in run.settings} <= PER_ADAPTER
    assert Run(Point("tl6", 2), "auto", 7).name == "tl6-r2-lrauto-seed7"


def test_the_split_has_the_runs_seed_unless_it_is_given() -> None:
    assert (make_settings({}).split_seed, make_settings({"seed": 3}).split_seed) == (1234, 3)
    settings = make_settings({"seed": 3, "split_seed": 4})
    assert (settings.seed, settings.split_seed, settings.of_rows.seed) == (3, 4, 4)
    command = parse_sweep(["--output_dir=x", "--seed=3", "--seeds=2"])
    assert command.shared["split_seed"] == 3 and "split_seed" not in command.given


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seeds": 0}, "--seeds 0: input should be greater than or equal to 1"),
        ({"seeds": 1001}, "--seeds 1001: input should be less than or equal to 1000"),
        ({"learning_rates": "auto,auto"}, "--learning_rates has auto twice"),
        ({"learning_rates": "automatic"}, "--learning_rates automatic: input should be"),
    ],
)
def test_bad_values(flags: dict[str, Any], message: str) -> None:
    assert refusal(SweepSettings, output_dir="x", **flags).startswith(message)


def test_auto_is_a_learning_rate_alone_or_beside_numbers() -> None:
    for given, wanted in (("auto", ("auto",)), ("auto,1e-3", ("auto", 1e-3)), (["auto"], ("auto",))):
        assert SweepSettings(output_dir="x", learning_rates=given).learning_rates == wanted


@pytest.mark.parametrize(
    ("flags", "groups"),
    [
        (["--together=12"], [12]),
        (["--together=6"], [6, 6]),  # both methods have all their seeds and rates in one group
        (["--together=4"], [4, 2, 4, 2]),  # whole seeds of a method
        (["--together=3"], [2] * 6),
        (["--together=2", "--halving=true"], [2] * 6),
        (["--together=1"], [1] * 12),
    ],
)
def test_groups_hold_whole_seeds(study: Given, tmp_path: Path, flags: list[str], groups: list[int]) -> None:
    plan = planned(study, tmp_path / "out", *flags, **SETTINGS, seeds=3)
    found = plan.groups()
    assert [len(group) for group in found] == groups
    if len(groups) < 12:
        assert all(len({run.learning_rate for run in group}) == 2 for group in found)
    lines = plan.dry_run_lines()
    assert "12 runs and 7 scores" in lines[0] and lines[1].split("  ", 1)[1].strip().startswith("5, 6, 7; validation")


def test_the_rates_with_the_most_finished_seeds_are_compared(tmp_path: Path) -> None:
    """A rate at which one seed diverged is not better because the mean leaves that seed out."""
    folder = write_study(tmp_path / "study", learning_rates=[1e-3, 1e-4], seeds=2)
    write_run(folder, "lora-r2-lr1e-3", best=0.1)
    write_run(folder, "lora-r2-lr1e-3-seed1235", state="failed", reason="the loss is nan")
    for suffix, best in (("", 0.5), ("-seed1235", 0.7)):
        write_run(folder, f"lora-r2-lr1e-4{suffix}", best=best)
    result = read_study(folder).results[Point("lora", 2)]
    assert [run.name for run in result.runs] == ["lora-r2-lr1e-4", "lora-r2-lr1e-4-seed1235"]
    assert result.validation == pytest.approx(0.6)
    write_scored(folder, "tl6-r2-lr1e-4", 40.0)
    text = table2_markdown([read_study(folder)])
    assert "no result of lora-r2-lr1e-3-seed1235 (the loss is nan)." in text and "| 40.00* |" in text
    # The mean decides, not the best seed.
    for suffix, best in (("", 0.2), ("-seed1235", 0.9)):
        write_run(folder, f"lora-r8-lr1e-3{suffix}", best=best)
        write_run(folder, f"lora-r8-lr1e-4{suffix}", best=0.5)
    assert read_study(folder).results[Point("lora", 8)].learning_rate == 1e-4


def test_a_rate_of_auto_is_shown_as_the_number_that_the_run_recorded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(job_settings, "resolve_train", lambda settings, given: make_settings({}))
    folder = write_study(tmp_path / "study", learning_rates=["auto"])
    write_scored(folder, "lora-r2-lrauto", 40.0)
    (folder / "runs" / "lora-r2-lrauto" / "run.yaml").write_text("seed: 1\nlearning_rate: 0.0025\n")
    assert table2([read_study(folder)])[0]["learning_rate"] == "2.5e-3"
