"""Reads a study's results from its folder: how each run ended, the best learning rate, and the test scores.

It reads the files that tiedlora train and tiedlora evaluate wrote. Scores are in per cent.
"""

import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.messages import UserError, as_given
from megatron_tiedlora.base.text_files import read_fields, read_json_object, read_json_or_none
from megatron_tiedlora.checkpoint.resume import PROGRESS_FILE, named_checkpoint
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.evaluation.results import RESULTS_FILE, Score
from megatron_tiedlora.runtime.run_folder import RunFolder, State
from megatron_tiedlora.study.grid import Point, Run, SweepGrid, make_grid
from megatron_tiedlora.study.record import BaseRecord, StudyFolder, read_base, read_command
from megatron_tiedlora.training.halving import REASON

BASE_NAME = "base"


@dataclass(frozen=True)
class RunEnd:
    """The state of a run: `finished`, `failed`, `stopped`, `cut off` (killed, or still running) or `to do`.

    A run that ended without a finite value on validation has failed, since it cannot be compared.
    """

    state: str
    reason: str = ""
    step: int = 0
    best: float | None = None

    @property
    def halved(self) -> str:
        """Why --halving stopped it; '' if it did not."""
        return self.reason if self.state == "finished" and self.reason.startswith(REASON) else ""

    def in_words(self, metric: str) -> str:
        """How a finished run ended, by the value of --eval_metric."""
        why = f" ({self.halved})" if self.halved else ""
        return f"best validation {metric} {self.best:.4f}, ended at step {self.step}{why}"


@dataclass(frozen=True)
class Result:
    """The result of a point of a study.

    Attributes:
        run: the run whose learning rate is best on validation; None if no run of the point is finished.
        missing: unfinished runs of other learning rates, which may still be better.
        stopped: the runs that --halving stopped before their last step, and why.
    """

    point: Point
    num_trained: int
    run: Run | None = None
    missing: tuple[Run, ...] = ()
    score: Score | None = None
    stopped: tuple[tuple[Run, str], ...] = ()


@dataclass(frozen=True)
class Study:
    """A study with its results, in the order of its grid.

    Attributes:
        base_score: the score of the model without an adapter.
        own_rows: settings that were given and may make rows or prompts differ from the paper's.
    """

    folder: Path
    base: BaseRecord
    grid: SweepGrid
    base_score: Score | None
    results: tuple[Result, ...]
    own_rows: tuple[str, ...] = ()

    def result(self, point: Point) -> Result:
        """The result of a point of the grid."""
        return next(result for result in self.results if result.point == point)

    @property
    def table_results(self) -> tuple[Result, ...]:
        """The results for Table 2 and the figures that have a score."""
        return tuple(r for r in map(self.result, self.grid.table) if r.score is not None)


def read_run(folder: Path) -> RunEnd:
    """The state of the run in a folder."""
    run = RunFolder(folder)
    if not run.is_run:
        return RunEnd("to do")
    status = read_json_or_none(run.status)
    if status is None:
        return RunEnd("cut off")
    state, reason, best = status.get("state"), status.get("reason", ""), None
    with suppress(UserError):  # there is no checkpoint, or it is broken
        last = named_checkpoint(run.checkpoints)
        progress = {} if last is None else read_json_object(last / PROGRESS_FILE, kind="a checkpoint")
        best = _number(progress.get("best_metric"))
    if state == "finished" and best is None:
        state, reason = "failed", "it ended without a finite value on validation"
    if state not in typing.get_args(State):
        return RunEnd("cut off")
    step = status.get("step")
    return RunEnd(str(state), as_given(reason), step if type(step) is int and 0 <= step < 2**53 else 0, best)


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else None


def best_run(folder: StudyFolder, runs: Sequence[Run], *, metric: str) -> Run | None:
    """The finished run that is best on validation, the first of equals. None if no run is finished.

    Args:
        metric: the value of --eval_metric: `loss`, where less is better, or a score.
    """
    ends = {run: read_run(folder.run(run.name)) for run in runs}
    sign = 1.0 if metric == "loss" else -1.0
    finished = {run: sign * end.best for run, end in ends.items() if end.state == "finished" and end.best is not None}
    return min(finished, key=lambda run: finished[run]) if finished else None


def read_score(folder: Path) -> Score | None:
    """The score that tiedlora evaluate wrote to `folder`, or None if there is none yet.

    Raises:
        UserError: results.json has other content.
    """
    file = folder / RESULTS_FILE
    if not file.is_file():
        return None
    try:
        content = read_json_object(file, kind="results")
        (low, high), value, count = (content[name] for name in ("confidence_interval", "score", "n"))
        numbers = {"value": value, "low": low, "high": high, "num_samples": count}
        texts = {name: content.get(name, "") for name in ("metric", "signature")}
        return read_fields(file, {**texts, **numbers}, Score)
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: was not written by tiedlora evaluate; remove the folder and start again") from None


def read_study(path: Path) -> Study:
    """A study with its results so far, from its folder.

    Raises:
        UserError: there is no study, or a file is broken.
    """
    folder = StudyFolder(path)
    if not folder.settings.is_file():
        raise UserError(f"{path}: holds no sweep; give the --output_dir of a sweep")
    command, base = read_command(folder), read_base(folder)
    grid = make_grid(command.settings, base.num_layers)
    if missing := [point.name for point in grid.points if point.name not in base.trained]:
        raise UserError(f"{folder.base}: does not say how much {missing[0]} trains; start the sweep again")
    metric = command.train.eval_metric
    results = tuple(_read_result(folder, grid, point, base, metric) for point in grid.points)
    of_rows = marked(Settings, group="data", by_content=True)
    given = {"test_limit": command.settings.test_limit, **{name: command.given.get(name) for name in of_rows}}
    own_rows = tuple(name for name, value in given.items() if value is not None)
    return Study(path, base, grid, read_score(folder.score(BASE_NAME)), results, own_rows)


def _read_result(folder: StudyFolder, grid: SweepGrid, point: Point, base: BaseRecord, metric: str) -> Result:
    chosen = best_run(folder, grid.runs(point), metric=metric)
    ends = {run: read_run(folder.run(run.name)) for run in grid.runs(point)}
    return Result(
        point,
        base.trained[point.name],
        chosen,
        tuple(run for run, end in ends.items() if chosen is not None and end.state != "finished"),
        None if chosen is None else read_score(folder.score(chosen.name)),
        tuple((run, end.halved.removeprefix(REASON)) for run, end in ends.items() if end.halved),
    )
