"""Defines the grid of a study, and reads and writes the settings and results in the folder of the study.

A point of the grid is a method and a rank. It has one run per learning rate and seed. `sweep.yaml` has the settings,
and can be passed to --config. A later launch resumes the study if its settings are the same. `base.json` describes the
base model and the task, so that tables can be made without them, and has the hashes of the data files.
`sweep_status.json` records how the last launch ended. The results are how each run ended, the best learning rate, and
the test scores in per cent. They are read from the files of tiedlora train and tiedlora evaluate.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np

from megatron_tiedlora.base import files, ownership
from megatron_tiedlora.base.messages import UserError, as_given
from megatron_tiedlora.base.output_folder import PathIn, reject_links
from megatron_tiedlora.checkpoint.resume import PROGRESS_FILE, named_checkpoint
from megatron_tiedlora.config import job_settings
from megatron_tiedlora.config.cli import HALVING_REASON, naming_file, read_yaml
from megatron_tiedlora.config.fields import declared, flag_value, marked
from megatron_tiedlora.config.job_settings import GRID, SWEEP_FILE, SweepCommand, SweepSettings, make_command
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.evaluation.results import RESULTS_FILE, Score
from megatron_tiedlora.runtime.run_folder import RunFolder, State
from megatron_tiedlora.study.estimates import AllScored, BySeed, Estimate, estimated, read_scored

SINGLE_LAYER_METHOD, SINGLE_LAYER_TIED = "lora", "tl5"
PAPER_LAYER_STEP = 4


@dataclass(frozen=True)
class Point:
    """A method and a rank in the grid of a study, for all layers or for a single layer (1-based)."""

    method: str
    rank: int
    layer: int | None = None

    @property
    def name(self) -> str:
        """The name of this method and rank: METHOD-rRANK[-layerN]."""
        return f"{self.method}-r{self.rank}{self.layer_part}"

    @property
    def layer_part(self) -> str:
        """The suffix -layerN of names; '' if all layers are adapted."""
        return "" if self.layer is None else f"-layer{self.layer}"


@dataclass(frozen=True)
class Run:
    """One training run of a study: a method and a rank with one learning rate and one seed.

    Attributes:
        learning_rate: a number, or `auto`, for which tiedlora train chooses the number.
        seed: None for the seed of the study, --seed.
    """

    point: Point
    learning_rate: float | str
    seed: int | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder: METHOD-rRANK-lrRATE[-layerN][-seedN]."""
        point = self.point
        return f"{point.method}-r{point.rank}-lr{rate_text(self.learning_rate)}{point.layer_part}{self.seed_part}"

    @property
    def seed_part(self) -> str:
        """The suffix -seedN of names; '' for the study's own seed."""
        return "" if self.seed is None else f"-seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """The training settings of this run that the grid determines."""
        own = {"method": self.point.method, "rank": self.point.rank, "learning_rate": self.learning_rate}
        own |= {"layers": self.point.layer, "seed": self.seed}
        return {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class SweepGrid:
    """The methods, ranks and learning rates of a study.

    Attributes:
        table: methods and ranks for Table 2 and the figures.
        table3: methods and ranks for Table 3: LoRA on single layers, then the tied method.
        seeds: the seeds of each of them, with None for --seed.
    """

    table: tuple[Point, ...]
    table3: tuple[Point, ...]
    learning_rates: tuple[float | str, ...]
    seeds: tuple[int | None, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """All methods and ranks of both tables without duplicates, in training order."""
        return tuple(dict.fromkeys((*self.table, *self.table3)))

    def runs(self, point: Point) -> tuple[Run, ...]:
        """Return the runs of a method and rank, one per seed and learning rate. The runs of a seed are consecutive."""
        return tuple(Run(point, rate, seed) for seed in self.seeds for rate in self.learning_rates)

    @property
    def all_runs(self) -> tuple[Run, ...]:
        """All runs of the study, in training order."""
        return tuple(run for point in self.points for run in self.runs(point))


def make_grid(command: SweepCommand, num_layers: int) -> SweepGrid:
    """Return the grid of a sweep for a model with `num_layers` layers.

    Raises:
        UserError: one of the given layers does not exist in the model.
    """
    settings = command.settings
    rank, layers = settings.single_layer_rank, single_layers(settings.single_layers, num_layers)
    single = tuple(Point(SINGLE_LAYER_METHOD, rank, layer) for layer in layers)
    return SweepGrid(
        table=tuple(Point(method, r) for method in settings.methods for r in settings.ranks),
        table3=(*single, Point(SINGLE_LAYER_TIED, rank)) if layers else (),
        learning_rates=settings.learning_rates,
        seeds=(None, *(command.train.seed + number for number in range(1, settings.seeds))),
    )


def single_layers(wanted: Sequence[int] | str | None, num_layers: int) -> tuple[int, ...]:
    """Return the layers to adapt one at a time: none, the given layers, or for `paper` 1, 4, 8, ... and the last."""
    if wanted is None:
        return ()
    if isinstance(wanted, str):
        return tuple(sorted({1, num_layers, *range(PAPER_LAYER_STEP, num_layers + 1, PAPER_LAYER_STEP)}))
    if max(wanted) > num_layers:
        raise UserError(f"--single_layers {max(wanted)}: the model has layers 1 to {num_layers}; give one of these")
    return tuple(wanted)


def rate_text(rate: float | str) -> str:
    """Return a learning rate as text for names, such as 1e-4, 2.5e-5 or auto. Different rates have different texts."""
    if isinstance(rate, str):
        return rate
    return np.format_float_scientific(rate, trim="-", exp_digits=1).replace("e+", "e")


SCORES = "scores"  # a folder, and the part of a study that scores the best runs


@dataclass(frozen=True)
class StudyFolder:
    """The paths of the files and folders of a study.

    Attributes:
        owner: the sweep that may write to the folder; None if the folder is only read.
        part: the part that this launch runs beside others, `base` or the name of a group; '' for the whole study.
    """

    path: Path
    owner: ownership.Owner | None = field(default=None, compare=False)
    part: str = ""

    settings = PathIn(SWEEP_FILE)
    base = PathIn(job_settings.SWEEP_BASE)
    runs = PathIn("runs")  # the folder of each run, by its name
    groups = PathIn("groups")  # the folder of each group of runs that are trained together, by its first run
    scores = PathIn(SCORES)  # the folder of each score, by the name of the run, or `base` for the base model
    logs = PathIn("logs")
    jobs = PathIn("jobs")

    @property
    def status(self) -> Path:
        """The file that tells how the last launch ended, in the folder that it locks; it is missing while one runs."""
        return (self.jobs / self.part if self.part else self.path) / job_settings.SWEEP_STATUS

    @property
    def guard(self) -> files.Guard:
        """A function that raises UserError if this sweep may no longer write to the folder."""
        return files.unguarded if self.owner is None else self.owner.check

    def log(self, name: str) -> Path:
        """Return the log file of the command called `name`."""
        return self.logs / f"{name}.log"


@dataclass(frozen=True)
class BaseRecord:
    """The base model and the task of a study.

    Attributes:
        trained: number of trained parameters by the name of a method and rank, such as `tl6-r8`.
        file_sha256: SHA-256 of each local data file, by the name of the file.
    """

    model: files.Text
    base_hash: files.Text
    num_layers: files.Size
    trained: dict[files.Text, files.Size]
    paper_model: files.Text | None  # the paper's model whose published scores are shown with the study's
    task: files.Text
    metric: files.Text
    file_sha256: dict[files.Text, files.Text]


def check_folder(folder: StudyFolder) -> None:
    """Raise UserError if the path is a file, or a folder that has links or files of other programs.

    The folder of a launch that was killed before it wrote its settings is accepted."""
    path = folder.path
    folders = (folder.runs, folder.groups, folder.scores, folder.logs, folder.jobs)
    # The folder also has YAML lists of adapters, and temporary files of them if a sweep was killed.
    found = (item for item in folder.groups.glob("*") if not item.name.startswith(files.TEMPORARY_PREFIX))
    groups = (item for item in found if item.suffix != ".yaml")
    reject_links(*folders, *folder.runs.glob("*"), *folder.jobs.glob("*"), *groups)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path} is a file; give a folder")
    if not path.is_dir() or folder.settings.is_file():
        return
    if not all(ownership.is_of_owner(item.name) for item in path.iterdir()):
        raise UserError(f"--output_dir {path} holds other files but no sweep; give a new folder")


def check_resumable(folder: StudyFolder, now: SweepCommand, base: BaseRecord) -> None:
    """Raise UserError if the settings `now` do not match the study in the folder. The message names the setting."""
    if not folder.settings.is_file():
        return
    before, where = read_command(folder), f"{folder.settings}: the sweep was started with"
    _check_extended(before.settings, now.settings, base.num_layers, where)
    # Both are resolved for the same rank, so that alpha, which depends on the rank, differs only if it was given.
    theirs, ours = job_settings.resolve_train(now.settings, before.given), now.train
    for name, own in declared(Settings).items():
        # A resumed run may name its files differently, but a resumed study may not.
        same = (own.compared or own.by_content) and "sweep" not in own.decided_by
        if same and getattr(theirs, name) != getattr(ours, name):
            old, new = (flag_value(getattr(settings, name)) for settings in (theirs, ours))
            fix = "give the original value, or a new --output_dir"
            raise UserError(f"{where} --{name} {old}, but the value is now {new}; {fix}")
    if not folder.base.is_file():
        return
    found = read_base(folder)
    if found.base_hash != base.base_hash:
        raise UserError(f"--model {base.model}: its config.json changed since {folder.base} was written; restore it")
    for name in [*found.file_sha256, *base.file_sha256]:
        if found.file_sha256.get(name) != base.file_sha256.get(name):
            fix = "restore the original data, or give a new --output_dir"
            seen = f"since the sweep was started (see the hashes in {folder.base})"
            raise UserError(f"{name}: changed, added or removed {seen}; {fix}")


def _check_extended(before: SweepSettings, now: SweepSettings, num_layers: int, where: str) -> None:
    pairs: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {n: (getattr(before, n), getattr(now, n)) for n in GRID}
    layers = (single_layers(settings.single_layers, num_layers) for settings in (before, now))
    pairs["single_layers"] = (next(layers), next(layers))
    for name, (old, new) in pairs.items():
        missing = [value for value in old if value not in new]
        if missing:
            why = f"but the value {missing[0]} is now missing; add it, or give a new --output_dir"
            raise UserError(f"{where} --{name} {flag_value(old)}, {why}")
    if now.seeds < before.seeds:
        raise UserError(f"{where} --seeds {before.seeds}, now it is {now.seeds}; give {before.seeds} or more")
    for name in ("test_limit",) if before.single_layers is None else ("single_layer_rank", "test_limit"):
        same, other = ("no limit" if value is None else value for value in (getattr(before, name), getattr(now, name)))
        if same != other:
            raise UserError(f"{where} --{name} {same}, now it is {other}; give the original, or a new --output_dir")


def write_record(folder: StudyFolder, command: SweepCommand, base: BaseRecord) -> None:
    """Write sweep.yaml and base.json before the first launch. Raises UserError if a file cannot be written."""
    for path in (folder.path, folder.groups):
        files.remove_leftovers(path, guard=folder.guard)
    own, train = command.settings.model_dump(mode="json"), command.train.model_dump(mode="json")
    found = {**{name: own[name] for name in marked(SweepSettings, lasts="")}, **{n: train[n] for n in command.given}}
    content = {name: value for name, value in found.items() if value is not None}
    files.write_json(folder.base, asdict(base), guard=folder.guard)  # first, so that it lacks no point of sweep.yaml
    files.write_yaml(folder.settings, content, guard=folder.guard)


def read_command(folder: StudyFolder) -> SweepCommand:
    """Return the settings of the study in the folder. Raises UserError if they are not valid."""
    values = read_yaml(str(folder.settings), Settings, SweepSettings)
    with naming_file(folder.settings, values):
        return make_command({**values, "output_dir": str(folder.path)})


def read_base(folder: StudyFolder) -> BaseRecord:
    """Read and return base.json. Raises UserError if it is not valid; the message names the problem."""
    content = files.read_json_object(folder.base, kind="a sweep's folder")
    if "num_layers" not in content:
        raise UserError(f"{folder.base}: this file is from a different version; give a new --output_dir")
    return files.read_fields(folder.base, content, BaseRecord)


BASE_NAME = "base"


@dataclass(frozen=True)
class RunEnd:
    """The state of a run: `finished`, `failed`, `stopped`, `cut off` (killed, or still running) or `to do`.

    A run without a finite validation result counts as failed, because it cannot be compared with other runs.
    """

    state: str
    reason: str = ""
    step: int = 0
    best: float | None = None

    @property
    def halved(self) -> str:
        """The reason why --halving stopped the run; '' if it did not."""
        return self.reason if self.state == "finished" and self.reason.startswith(HALVING_REASON) else ""

    def in_words(self, metric: str) -> str:
        """Return a description of how a finished run ended. `metric` is the value of --eval_metric."""
        why = f" ({self.halved})" if self.halved else ""
        return f"best validation {metric} {self.best:.4f}, ended at step {self.step}{why}"


@dataclass(frozen=True)
class Result:
    """The result of one method and rank of a study.

    Attributes:
        runs: the finished runs with the learning rate that is best on the validation data, one per seed.
        learning_rate: that learning rate; a number also for `auto`.
        validation: the mean of their best validation results.
        missing: if there are such runs, those without a result, with the reason or ''. They may have a better result.
        scores: the test scores of `runs` by seed, and `score`: their mean with its interval.
        stopped: the runs that --halving stopped before their last step, each with the reason.
    """

    point: Point
    num_trained: int
    runs: tuple[Run, ...] = ()
    learning_rate: float | str | None = None
    validation: float | None = None
    missing: tuple[tuple[Run, str], ...] = ()
    scores: BySeed = field(default_factory=dict)
    stopped: tuple[tuple[Run, str], ...] = ()

    @cached_property
    def score(self) -> Estimate | None:
        """The mean test score over the seeds with its interval; None if no run has a score."""
        return estimated(self.scores)


@dataclass(frozen=True)
class Study:
    """A study and its results, in the order of the grid.

    Attributes:
        base_score: the score of the base model without an adapter.
        own_rows: names of given settings that can make rows or prompts differ from those in the paper.
    """

    folder: Path
    base: BaseRecord
    grid: SweepGrid
    base_score: Estimate | None
    results: Mapping[Point, Result]
    own_rows: tuple[str, ...] = ()

    @property
    def table_results(self) -> tuple[Result, ...]:
        """The results that have a score, for Table 2 and the figures."""
        return tuple(r for point in self.grid.table if (r := self.results[point]).score is not None)


def read_run(folder: Path) -> RunEnd:
    """Return the state of the run in a folder."""
    run = RunFolder(folder)
    if not run.is_run:
        return RunEnd("to do")
    status = files.read_json_or_none(run.status)
    if status is None:
        return RunEnd("cut off")
    state, reason, best = status.get("state"), status.get("reason", ""), None
    with suppress(UserError):  # there is no checkpoint, or it is broken
        last = named_checkpoint(run.checkpoints)
        progress = {} if last is None else files.read_json_object(last / PROGRESS_FILE, kind="a checkpoint")
        value: Any = progress.get("best_metric")
        best = float(value) if type(value) in (int, float) and abs(value) < 1e300 else None  # only a finite number
    if state == "finished" and best is None:
        state, reason = "failed", "it ended without a finite value on validation"
    if state not in get_args(State):
        return RunEnd("cut off")
    step = status.get("step")
    return RunEnd(str(state), as_given(reason), step if type(step) is int and 0 <= step < 2**53 else 0, best)


def best_runs(folder: StudyFolder, runs: Sequence[Run], *, metric: str) -> tuple[Run, ...]:
    """Return the finished runs, one per seed, with the learning rate that has the best mean validation result.

    Only the learning rates with the most finished seeds are compared, because a mean of fewer seeds, such as those that
    did not diverge, may be better by chance.

    Args:
        metric: the value of --eval_metric: `loss`, for which lower is better, or a score.
    """
    by_rate, sign = dict[float | str, dict[Run, float]](), 1.0 if metric == "loss" else -1.0
    for run in runs:
        end = read_run(folder.runs / run.name)
        if end.state == "finished" and end.best is not None:
            by_rate.setdefault(run.learning_rate, {})[run] = sign * end.best
    best = min(by_rate.values(), key=lambda of_rate: (-len(of_rate), fmean(of_rate.values())), default={})
    return tuple(best)


def read_score(folder: Path) -> Score | None:
    """Return the score that tiedlora evaluate wrote to `folder`, or None if there is no score yet.

    Raises:
        UserError: results.json does not have the expected content.
    """
    file = folder / RESULTS_FILE
    if not file.is_file():
        return None
    try:
        content = files.read_json_object(file, kind="results")
        (low, high), value, count = (content[name] for name in ("confidence_interval", "score", "n"))
        numbers = {"value": value, "low": low, "high": high, "num_samples": count}
        texts = {name: content.get(name, "") for name in ("metric", "signature")}
        return files.read_fields(file, {**texts, **numbers}, Score)
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: is not a result of tiedlora evaluate; remove the folder and start again") from None


def read_study(path: Path) -> Study:
    """Return the study in a folder with the results that exist so far.

    Raises:
        UserError: the folder has no study, or a file is broken.
    """
    folder = StudyFolder(path)
    if not folder.settings.is_file():
        raise UserError(f"{path}: there is no sweep in this folder; give the --output_dir of a sweep")
    command, base = read_command(folder), read_base(folder)
    grid = make_grid(command, base.num_layers)
    if missing := [point.name for point in grid.points if point.name not in base.trained]:
        raise UserError(f"{folder.base}: the parameter count of {missing[0]} is missing; start the sweep again")
    metric = command.train.eval_metric
    best = {point: best_runs(folder, grid.runs(point), metric=metric) for point in grid.points}
    names = [BASE_NAME, *(run.name for runs in best.values() for run in runs)]
    found = {name: read_score(folder.scores / name) for name in names}
    scores = read_scored({folder.scores / name: score for name, score in found.items() if score}, base.metric)
    results = {point: _read_result(folder, grid.runs(point), best[point], base, scores) for point in grid.points}
    of_rows = marked(Settings, group="data", by_content=True)
    given = {"test_limit": command.settings.test_limit, **{name: command.given.get(name) for name in of_rows}}
    own_rows = tuple(name for name, value in given.items() if value is not None)
    of_base = scores.get(folder.scores / BASE_NAME)
    return Study(path, base, grid, estimated({None: of_base} if of_base else {}), results, own_rows)


def _read_result(
    folder: StudyFolder, runs: Sequence[Run], best: tuple[Run, ...], base: BaseRecord, scored: AllScored
) -> Result:
    point, trained = runs[0].point, base.trained[runs[0].point.name]
    ends = {run: read_run(folder.runs / run.name) for run in runs}
    scores = {run.seed: one for run in best if (one := scored.get(folder.scores / run.name)) is not None}
    missing = {run: end.reason for run, end in ends.items() if best and end.state != "finished"}
    missing |= {run: "no score" for run in best if scores and run.seed not in scores}
    stopped = tuple((run, end.halved.removeprefix(HALVING_REASON)) for run, end in ends.items() if end.halved)
    if not best:
        return Result(point, trained, stopped=stopped)
    rate: Any = best[0].learning_rate
    if rate == "auto":  # the run has recorded the number
        rate = read_yaml(str(RunFolder(folder.runs / best[0].name).settings), Settings)["learning_rate"]
    validation = fmean(value for run in best if (value := ends[run].best) is not None)
    return Result(point, trained, best, rate, validation, tuple(missing.items()), scores, stopped)
