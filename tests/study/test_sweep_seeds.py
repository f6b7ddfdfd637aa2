"""Sweeps with several seeds: which runs there are, which rows they have, how they are grouped, resumed and chosen."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.run_files import losses, run_settings
from support.run_helpers import Base
from support.sweep_runs import run_sweep, starts, study_arguments, write_run, write_score, write_study, write_study_base

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.job_settings import parse_sweep
from megatron_tiedlora.study.plan import plan_sweep
from megatron_tiedlora.study.record import Point, make_grid, read_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    return write_study_base(tmp_path_factory.mktemp("study"))


SETTINGS: dict[str, Any] = {"ranks": 2, "learning_rates": "2e-1,5e-2", "max_steps": 4, "validation_file": None}
POINTS, SUFFIXES = ("lora-r2", "tl6-r2"), ("", "-seed6")  # the study's own seed is 5


@pytest.fixture(scope="module")
def whole(study: tuple[Base, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(study, folder, seeds=2)
    return folder


def run(study: tuple[Base, Path], folder: Path, *, expect: int = 0, **changes: Any) -> Any:
    arguments = study_arguments(*study, folder, **{**SETTINGS, **changes})
    return run_sweep(arguments, work=folder.parent / "work", cache=study[0].cache).expect(expect)


def test_the_seeds_of_a_study_share_rows_but_not_values(whole: Path) -> None:
    names = [f"{p}-lr{lr}{s}" for p in POINTS for s in SUFFIXES for lr in ("2e-1", "5e-2")]
    assert {path.name for path in (whole / "runs").iterdir()} == set(names)
    settings = {name: run_settings(whole / "runs" / name) for name in names}
    assert {name: one["seed"] for name, one in settings.items()} == {n: 6 if "seed6" in n else 5 for n in names}
    assert {one["split_seed"] for one in settings.values()} == {5}
    # Before training every adapter adds 0, so the loss is the base model's on the rows that were split off.
    first = {dict(losses(whole / "runs" / name, "validation"))[0] for name in names}
    assert len(first) == 1
    last = [losses(whole / "runs" / name, "train")[-1] for name in names]
    assert len(set(last)) == len(names)  # initial values and the order of samples differ


def test_the_best_rate_by_the_mean_of_the_seeds_is_scored_for_all(whole: Path) -> None:
    (row,) = (
        r for r in csv.DictReader((whole / "table2.csv").open()) if r["method"] == "tl6" and r["section"][0] == "r"
    )
    best = {}
    for rate in ("2e-1", "5e-2"):
        ends = [json.loads(next((whole / "runs" / f"tl6-r2-lr{rate}{s}/checkpoints").glob("step_4/trainer_state.json")).read_text()) for s in SUFFIXES]  # fmt: skip
        best[rate] = sum(end["best_metric"] for end in ends) / 2
    chosen = min(best, key=lambda rate: best[rate])
    assert row["learning_rate"] == chosen and float(row["validation"]) == pytest.approx(best[chosen])
    scores = [
        json.loads((whole / "scores" / f"tl6-r2-lr{chosen}{s}/results.json").read_text())["score"] for s in SUFFIXES
    ]
    assert float(row["score"]) == pytest.approx(sum(scores) / 2) and row["seeds"] == "2"
    assert float(row["spread"]) == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    text = (whole / "table2.md").read_text()
    assert (
        f"{float(row['score']):.2f} ± {float(row['spread']):.2f} |" in text
        and "test rows (resampled) and seeds" in text
    )
