"""The plan of a study: checked settings, its steps in order, the command of each, and how it ended.

Owns the flags of tiedlora train and tiedlora evaluate. Leaves starting commands to starts.py.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.atomic import discard
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import aligned_lines
from megatron_tiedlora.base.yaml_files import read_yaml_mapping, write_yaml
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.sweep_settings import SweepCommand, SweepSettings
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.splits import load_split, local_names
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.planning.run_plan import plan_run, with_models_length
from megatron_tiedlora.runtime.run_folder import RunFolder, metrics_row
from megatron_tiedlora.study.grid import Point, Run, SweepGrid, make_grid
from megatron_tiedlora.study.record import (
    BaseRecord,
    Failure,
    StudyFolder,
    check_folder,
    check_resumable,
    describe_base,
)
from megatron_tiedlora.study.scores import BASE_NAME, best_run, read_run, read_score
from megatron_tiedlora.study.starts import ScriptStart, last_lines, with_port
from megatron_tiedlora.study.together import (
    SCORES_END,
    check_groups,
    group_settings,
    grouped,
    most_together,
    take_scores,
)


@dataclass(frozen=True)
class PointScore:
    """The test score of the best run of a point, or of the base model, without which nothing can be compared."""

    point: Point | None

    @property
    def label(self) -> str:
        """METHOD-rRANK[-layerN], or base."""
        point = self.point
        if point is None:
            return BASE_NAME
        return f"{point.method}-r{point.rank}" + ("" if point.layer is None else f"-layer{point.layer}")

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"score {self.label}"


@dataclass(frozen=True)
class Step:
    """One start: of runs that train together, or of scores that are made together. One of a kind starts alone."""

    runs: tuple[Run, ...] = ()
    scores: tuple[PointScore, ...] = ()

    @property
    def items(self) -> tuple[Run | PointScore, ...]:
        """The runs or the scores."""
        return self.runs or self.scores

    @property
    def name(self) -> str:
        """The name of its log."""
        if len(self.items) == 1:
            return self.items[0].name
        return f"group {self.runs[0].name}" if self.runs else f"scores {self.scores[0].label}"


@dataclass(frozen=True)
class SweepPlan:
    """A checked study.

    Attributes:
        test_limit: how many test rows are scored, from the first on; None: all.
    """

    command: SweepCommand
    folder: StudyFolder
    source: ModelSource
    base: BaseRecord
    grid: SweepGrid
    test_limit: int | None

    @property
    def settings(self) -> SweepSettings:
        """The sweep's own settings."""
        return self.command.settings

    def steps(self) -> list[Step]:
        """The unfinished steps in order: the base model's score, then each group of runs and the scores of its points.

        Raises:
            UserError: scores that a killed sweep left cannot be moved.
        """
        take_scores(self.folder)
        base, left, groups = PointScore(None), list(self.grid.points), self.groups()
        steps = [] if self._is_scored(base) else [Step(scores=(base,))]
        later = {run for runs in groups for run in runs}
        for runs in ((), *groups):
            steps += [Step(runs)] if runs else []
            later -= set(runs)
            ready = []
            while left and not later & set(self.grid.runs(left[0])):
                point = left.pop(0)
                # The run to score is known only when all have ended.
                if self._unfinished(point) or not self._is_scored(PointScore(point)):
                    ready.append(PointScore(point))
            together = [tuple(ready)] if ready and self.settings.together != 1 else [(score,) for score in ready]
            steps += [Step(scores=scores) for scores in together]
        return steps

    def groups(self) -> list[tuple[Run, ...]]:
        """The unfinished runs, those that train together in one group. Raises UserError."""
        runs, most = [self._to_train(point) for point in self.grid.points], self.settings.together
        if most == "auto" and any(runs):
            widest = max(self.grid.points, key=lambda point: point.num_trained(self.base.shape))
            settings = group_settings(self.command, self.grid.runs(widest)[0])
            ranks = settings.tensor_parallel * settings.pipeline_parallel
            plan = plan_run(settings, rank=0, world_size=ranks, weights=False, source=self.source)
            most = most_together(plan)
            if self.settings.halving:  # the learning rates of a point are compared
                most = max(most, len(self.grid.learning_rates))
        return grouped(runs, 1 if most == "auto" else most)

    @property
    def num_items(self) -> int:
        """The number of runs and scores of the whole study."""
        return 1 + len(self.grid.points) * (len(self.grid.learning_rates) + 1)

    def _unfinished(self, point: Point) -> list[Run]:
        return [run for run in self.grid.runs(point) if read_run(self.folder.run(run.name)).state != "finished"]

    def _to_train(self, point: Point) -> list[Run]:
        """The unfinished runs of a point. With --halving also the others, so that a group leaves what was stopped."""
        left = self._unfinished(point)
        return list(self.grid.runs(point)) if left and self.settings.halving else left

    def _scored_name(self, score: PointScore) -> str | None:
        """The name of what is scored: a point's best run, or the base model; None if no run has finished."""
        if score.point is None:
            return BASE_NAME
        best = best_run(self.folder, self.grid.runs(score.point), metric=self.command.train.eval_metric)
        return None if best is None else best.name

    def _is_scored(self, score: PointScore) -> bool:
        name = self._scored_name(score)
        return name is not None and read_score(self.folder.score(name)) is not None

    def start(self, step: Step, lock: int) -> ScriptStart | None:
        """What a step starts, once those before it have ended; None if there is nothing to score.

        Args:
            lock: descriptor that the launcher keeps open.

        Raises:
            UserError: a file cannot be written.
        """
        self.folder.guard()
        launcher, log = with_port(shlex.split(self.settings.launcher_args or "")), self.folder.log(step.name)
        if step.runs:
            return ScriptStart("train", self._train(step.runs), launcher, log, lock)
        left = [name for score in step.scores if not self._is_scored(score) and (name := self._scored_name(score))]
        if not left:
            return None
        settings: dict[str, Any] = {
            **{setting: getattr(self.command.train, setting) for setting in marked(EvaluateSettings, shared=True)},
            "max_length": with_models_length(self.command.train, self.source).max_length,
            "batch_size": self.settings.test_batch_size,
            "limit": self.test_limit,
            **self._take_over,
        }
        adapters, words = {name: self.folder.run(name) / "adapter" for name in left if name != BASE_NAME}, list[str]()
        if len(step.scores) == 1:
            settings |= {"adapter": adapters.get(left[0]), "output_dir": self.folder.score(left[0])}
        else:
            settings["output_dir"] = self.folder.group(f"{step.scores[0].label}{SCORES_END}")
            words = ["--adapters", *(f"{name}={path}" for name, path in adapters.items())]
        discard(settings["output_dir"], guard=self.folder.guard)  # it has no result
        return ScriptStart("evaluate", settings, launcher, log, lock, tuple(words))

    def _train(self, runs: tuple[Run, ...]) -> dict[str, Any]:
        """The settings of tiedlora train for one run, or for several, each in the folder that it has alone."""
        folder, first = self.folder, runs[0]
        given = {name: value for name, value in self.command.given.items() if name != "test_file"}
        given |= {"resume": "auto", **self._take_over}
        if len(runs) == 1:
            return {**given, **first.settings, "output_dir": folder.run(first.name)}
        for path in (folder.run(run.name) for run in runs):
            if read_run(path).state != "finished":  # if the start fails, how an earlier one ended is not why
                discard(RunFolder(path).status, guard=folder.guard)
        file = folder.group(f"{first.name}.yaml")
        with suppress(OSError):  # the next lines say what is wrong
            file.parent.mkdir(exist_ok=True)
        entries = [{"name": run.name, **run.settings, "output_dir": str(folder.run(run.name))} for run in runs]
        write_yaml(file, entries, guard=folder.guard)
        halving = {"halving": True} if self.settings.halving and len({run.point for run in runs}) < len(runs) else {}
        return {**given, "adapters": file, "output_dir": folder.group(first.name), **halving}

    @property
    def _take_over(self) -> dict[str, bool]:
        return {"take_over": True} if self.settings.take_over else {}

    def failure(self, item: Run | PointScore, step: Step) -> Failure | None:
        """Why a run or score is not finished now that its step has ended; None if it is. Raises UserError."""
        log, recorded = self.folder.log(step.name), ""
        if isinstance(item, Run):
            end = read_run(self.folder.run(item.name))
            finished, recorded = end.state == "finished", end.reason
        else:
            take_scores(self.folder)
            # If no run of a point has finished, the runs have failed, and the score has not.
            finished = self._scored_name(item) is None or self._is_scored(item)
        if finished:
            return None
        # The log of several has the errors of all.
        errors = [line for line in last_lines(log, 40) if line.startswith("error: ")]
        said = errors[-1].removeprefix("error: ") if errors else ""
        both = (recorded, said) if len(step.items) > 1 else (said, recorded)
        return Failure(next(filter(None, both), "it ended without a result"), log)

    def done(self, item: Run | PointScore) -> tuple[float, str]:
        """The part of a run or score that is done, 0 to 1, and a few words about its state."""
        if isinstance(item, PointScore):
            name = self._scored_name(item)
            score = None if name is None else read_score(self.folder.score(name))
            words = "decoding" if score is None else f"{self.base.metric} {score.value:.2f} % ({name})"
            return 0.0, "" if name is None else words
        path, train = self.folder.run(item.name), self.command.train
        end = read_run(path)
        if end.state == "finished" and end.best is not None:
            why = f" ({end.halved})" if end.halved else ""
            return 1.0, f"best validation {train.eval_metric} {end.best:.4f}, ended at step {end.step}{why}"
        row = last_row(RunFolder(path).metrics)
        if row is None:
            return 0.0, "starting"
        # With --epochs a run that has started has counted its steps itself.
        found = None if train.epochs is None else read_yaml_mapping(RunFolder(path).settings).get("max_steps")
        step, max_steps = int(row["step"]), found if isinstance(found, int) else train.max_steps
        return min(step / max_steps, 1.0), f"step {step} of {max_steps}, {row['split']} loss {row['loss']:.4f}"

    def progress(self, step: Step) -> tuple[float, str]:
        """How many runs of a step are done, and a few words about its state."""
        done = [self.done(item) for item in step.items]
        parts, count = sum(part for part, _ in done), len(done)
        several = f"{count} runs, {parts / count:.0%}" if step.runs else f"decoding {count}"
        return parts, done[0][1] if count == 1 else several

    def dry_run_lines(self) -> list[str]:
        """A table of all runs with their states and trained parameters."""
        points, base = self.grid.points, self.base
        runs = self.grid.all_runs
        lines = [
            f"sweep      {len(runs)} runs and {len(points) + 1} scores of {base.model} on {base.task} ({base.metric})",
            f"folder     {self.folder.path}",
            "",
        ]
        rows = [("run", "trained parameters", "state")]
        counts: dict[str, int] = {}
        for run in runs:
            end = read_run(self.folder.run(run.name))
            counts[end.state] = counts.get(end.state, 0) + 1
            best = "" if end.best is None else f", best validation {self.command.train.eval_metric} {end.best:.4f}"
            state = end.state + (f", step {end.step}{best}" if end.state == "finished" else "")
            state += f" ({end.halved})" if end.halved else ""
            rows.append((run.name, f"{run.point.num_trained(base.shape):,}", state))
        lines += aligned_lines(rows, align="<><", indent="  ")
        if self.settings.together != 1 and (groups := self.groups()):
            lines += ["", "  groups to train together"]
            lines += [f"  {number:>3}  {', '.join(run.name for run in g)}" for number, g in enumerate(groups, 1)]
        return [*lines, "", "  " + ", ".join(f"{count} {state}" for state, count in counts.items())]


@contextmanager
def _no_accelerator_needed() -> Iterator[None]:
    """Tell DeepSpeed, whose schema checks the engine's JSON, that there is no GPU; otherwise it prints a warning.

    This holds for this process alone, since a command may start on another host.
    """
    told = "DS_ACCELERATOR" in os.environ or torch.cuda.is_available()
    if not told:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        yield
    finally:
        if not told:
            del os.environ["DS_ACCELERATOR"]


@_no_accelerator_needed()
def plan_sweep(command: SweepCommand) -> SweepPlan:
    """Check everything that can be checked before a start: folder, model, grid, task and the settings of every run.

    Raises:
        UserError: names the first thing that does not fit.
    """
    settings, train = command.settings, command.train
    folder = StudyFolder(user_path(settings.output_dir))
    check_folder(folder)
    task = get_task(train.task)
    # Only the launcher knows how many ranks it will start, so the check uses the fewest that the layout allows.
    ranks = train.tensor_parallel * train.pipeline_parallel
    source = plan_run(train, rank=0, world_size=ranks, weights=False).source
    files = {name: getattr(train, name) for name in marked(Settings, holds="rows")}
    base = describe_base(source, targets=train.targets, task=task.name, metric=task.metrics[0], files=files.values())
    check_resumable(folder, command, base)
    if settings.together != 1:
        check_groups(command, ranks=ranks, source=source)
    grid = make_grid(settings, source.shape.num_layers)
    for run in grid.all_runs:
        make_settings({**command.given, **run.settings})
    if task.hub is None and task.generate is None and files["test_file"] is None:
        raise UserError(f"--task {task.name} has no test set of its own; give one with --test_file")
    for name in local_names(train):
        read_rows(name, limit=1)
    return SweepPlan(command, folder, source, base, grid, _test_limit(command))


def _test_limit(command: SweepCommand) -> int | None:
    """--test_limit. By default tiedlora evaluate scores only some rows of some tasks; a sweep scores all of them.

    Raises:
        UserError: the rows of such a task cannot be read.
    """
    train, limit = command.train, command.settings.test_limit
    if limit is None and get_task(train.task).scored_rows is not None:
        return len(load_split(train.task, "test", files={"test": train.test_file}, seed=train.seed))
    return limit


def last_row(metrics: Path) -> dict[str, Any] | None:
    """The last complete row of a metrics.jsonl that is still being written."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, metrics.stat().st_size - 4096))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    return metrics_row(lines[-1]) if lines else None
