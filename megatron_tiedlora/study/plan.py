"""The plan of a study: checked settings, its jobs, and the command of each run and score.

Owns the flags of tiedlora train and tiedlora evaluate. Leaves the order of the jobs to jobs.py, and starting
commands to processes.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.atomic import discard
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.yaml_files import read_yaml_mapping, write_yaml
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.sweep_settings import SweepCommand, SweepSettings
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.splits import load_split, local_names
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.run_folder import RunFolder, metrics_row
from megatron_tiedlora.study.grid import Point, Run, SweepGrid, make_grid
from megatron_tiedlora.study.jobs import StudyJob
from megatron_tiedlora.study.processes import ScriptStart, launcher_slots, with_port
from megatron_tiedlora.study.record import (
    BaseRecord,
    StudyFolder,
    check_folder,
    check_resumable,
    describe_base,
    last_lines,
)
from megatron_tiedlora.study.scores import BASE_NAME, best_run, read_run, read_score
from megatron_tiedlora.study.together import (
    SCORES_END,
    check_groups,
    group_settings,
    grouped,
    most_together,
    take_scores,
)
from megatron_tiedlora.training.halving import REASON
from megatron_tiedlora.training.length import with_models_length
from megatron_tiedlora.training.plan import plan_run


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

    def slots(self) -> tuple[tuple[str, ...], ...]:
        """Launcher arguments of each slot in which a command can run."""
        gpus = () if self.settings.gpus_per_run is None else visible_gpus()
        return launcher_slots(
            launcher_args=self.settings.launcher_args,
            gpus_per_run=self.settings.gpus_per_run,
            runs_at_once=self.settings.runs_at_once,
            gpus=gpus,
        )

    def jobs(self, lock: int) -> list[StudyJob]:
        """The unfinished jobs in order: the base model's score, then the runs and the score of each point."""
        take_scores(self.folder)
        jobs = [] if self._scored(BASE_NAME) else [self._score(None, (), lock)]
        left, started = list(self.grid.points), dict[str, str]()  # by name of a run its job's
        for runs in ((), *self.groups()):
            if runs:
                jobs.append(self._train(runs[0], lock) if len(runs) == 1 else self._train_together(runs, lock))
                started |= {run.name: jobs[-1].name for run in runs}
            ready: dict[Point, tuple[str, ...]] = {}  # what each needs
            while left and all(run.name in started for run in self._unfinished(left[0])):
                point = left.pop(0)
                needs = tuple(dict.fromkeys(started[run.name] for run in self._unfinished(point)))
                # The run to score is known only when all have ended, so a point with unfinished runs has a score job.
                if needs or not self._scored(self._scored_name(point)):
                    ready[point] = needs
            if len(ready) > 1 and self.settings.together != 1:
                jobs.append(self._score_together(ready, lock))
            else:
                jobs += [self._score(point, needs, lock) for point, needs in ready.items()]
        return jobs

    def groups(self) -> list[tuple[Run, ...]]:
        """The unfinished runs, those that train together in one group. Raises UserError."""
        runs, most = [self._to_train(point) for point in self.grid.points], self.settings.together
        if most == "auto" and (num_runs := sum(map(len, runs))):
            widest = max(self.grid.points, key=lambda point: point.num_trained(self.base.shape))
            settings = group_settings(self.command, self.grid.runs(widest)[0])
            ranks = settings.tensor_parallel * settings.pipeline_parallel
            plan = plan_run(settings, rank=0, world_size=ranks, weights=False, source=self.source)
            most = most_together(plan, num_runs=num_runs, num_slots=len(self.slots()))
            if self.settings.halving:  # the learning rates of a point are compared
                most = max(most, len(self.grid.learning_rates))
        return grouped(runs, 1 if most == "auto" else most)

    @property
    def num_jobs(self) -> int:
        """The number of jobs of the whole study."""
        return 1 + len(self.grid.points) * (len(self.grid.learning_rates) + 1)

    @property
    def _take_over(self) -> dict[str, bool]:
        return {"take_over": True} if self.settings.take_over else {}

    def _unfinished(self, point: Point) -> list[Run]:
        return [run for run in self.grid.runs(point) if read_run(self.folder.run(run.name)).state != "finished"]

    def _to_train(self, point: Point) -> list[Run]:
        """The unfinished runs of a point. With --halving also the others, so that a group leaves what was stopped."""
        left = self._unfinished(point)
        return list(self.grid.runs(point)) if left and self.settings.halving else left

    def _scored(self, name: str | None) -> bool:
        return name is not None and read_score(self.folder.score(name)) is not None

    def _scored_name(self, point: Point | None) -> str | None:
        """The name of the score of a point's best run, or of the base model; None if no run has finished."""
        if point is None:
            return BASE_NAME
        best = best_run(self.folder, self.grid.runs(point), metric=self.command.train.eval_metric)
        return None if best is None else best.name

    def _max_steps(self, run: Path) -> int:
        """The number of steps of a run that has started; with --epochs it has counted them itself."""
        train, recorded = self.command.train, RunFolder(run).settings
        found = None if train.epochs is None else read_yaml_mapping(recorded).get("max_steps")
        return found if isinstance(found, int) else train.max_steps

    @property
    def _given(self) -> dict[str, Any]:
        """The given settings of every start of train.py."""
        given = {name: value for name, value in self.command.given.items() if name != "test_file"}
        return {**given, "resume": "auto", **self._take_over}

    def _train(self, run: Run, lock: int, *, group: str | None = None) -> StudyJob:
        """The job that trains a run, or that reads how it went on in the job `group`."""
        path, log = self.folder.run(run.name), self.folder.log(group or run.name)
        guard = self.folder.guard

        def command(slot: tuple[str, ...]) -> ScriptStart:
            guard()
            settings = {**self._given, **run.settings, "output_dir": path}
            return ScriptStart("train", settings, with_port(slot), log, lock)

        def failure() -> str | None:
            end = read_run(path)
            if end.state == "finished":
                return None
            return end.reason if group is not None and end.reason else _reason(log, end.reason)

        def done() -> tuple[float, str]:
            end = read_run(path)
            if end.state == "finished" and end.best is not None:
                why = f" ({end.reason})" if end.reason.startswith(REASON) else ""
                best = f"best validation {self.command.train.eval_metric} {end.best:.4f}"
                return 1.0, f"{best}, ended at step {end.step}{why}"
            row = last_row(RunFolder(path).metrics)
            if row is None:
                return 0.0, "starting"
            step, max_steps = int(row["step"]), self._max_steps(path)
            return min(step / max_steps, 1.0), f"step {step} of {max_steps}, {row['split']} loss {row['loss']:.4f}"

        return StudyJob(run.name, (), command, failure, done)

    def _train_together(self, runs: tuple[Run, ...], lock: int) -> StudyJob:
        """The job that trains several runs in one start; each has the folder that it has alone."""
        first, rates = runs[0].name, [run.point for run in runs]
        name, folder, file = f"group {first}", self.folder.group(first), self.folder.group(f"{first}.yaml")
        jobs = tuple(self._train(run, lock, group=name) for run in runs)
        halving = self.settings.halving and len(set(rates)) < len(rates)

        def command(slot: tuple[str, ...]) -> ScriptStart:
            entries = [{"name": run.name, **run.settings, "output_dir": str(self.folder.run(run.name))} for run in runs]
            for path in (self.folder.run(run.name) for run in runs):
                if read_run(path).state != "finished":  # if the start fails, how an earlier one ended is not why
                    discard(RunFolder(path).status, guard=self.folder.guard)
            with suppress(OSError):  # the next line says what is wrong
                file.parent.mkdir(exist_ok=True)
            write_yaml(file, entries, guard=self.folder.guard)
            settings = {**self._given, "adapters": file, "output_dir": folder, **({"halving": True} if halving else {})}
            return ScriptStart("train", settings, with_port(slot), self.folder.log(name), lock)

        def done() -> tuple[float, str]:
            parts = [job.done()[0] for job in jobs]
            return sum(parts), f"{len(jobs)} runs, {sum(parts) / len(parts):.0%}"

        return StudyJob(name, (), command, lambda: None, done, runs=jobs)

    def _score(self, point: Point | None, needs: tuple[str, ...], lock: int, *, group: str | None = None) -> StudyJob:
        """The job that scores the best run of a point, or the base model, without which nothing can be compared; or
        that reads what the job `group` has found."""
        job = f"score {BASE_NAME}" if point is None else _score_job(point)
        log = self.folder.log(group or job)

        def command(slot: tuple[str, ...]) -> ScriptStart | None:
            name = self._scored_name(point)
            if name is None or self._scored(name):
                return None
            folder = self.folder.score(name)
            discard(folder, guard=self.folder.guard)  # it has no result
            adapter = None if point is None else self.folder.run(name) / "adapter"
            settings = {**self._of_scores, "adapter": adapter, "output_dir": folder}
            return ScriptStart("evaluate", settings, with_port(slot), log, lock)

        def failure() -> str | None:
            if group is not None:
                take_scores(self.folder)
            name = self._scored_name(point)  # None: no run has finished, so others alone were scored
            return None if name is None or self._scored(name) else _reason(log)

        def done() -> tuple[float, str]:
            name = self._scored_name(point)
            if name is None:
                return 0.0, ""
            score = read_score(self.folder.score(name))
            return 0.0, "decoding" if score is None else f"{self.base.metric} {score.value:.2f} % ({name})"

        return StudyJob(job, needs, command, failure, done, vital=point is None)

    @property
    def _of_scores(self) -> dict[str, Any]:
        """The settings of every start of evaluate.py."""
        return {
            **{setting: getattr(self.command.train, setting) for setting in marked(EvaluateSettings, shared=True)},
            "max_length": with_models_length(self.command.train, self.source).max_length,
            "batch_size": self.settings.test_batch_size,
            "limit": self.test_limit,
            **self._take_over,
        }

    def _score_together(self, points: Mapping[Point, tuple[str, ...]], lock: int) -> StudyJob:
        """The job that scores the best runs of several points in one start; `points` has what each needs."""
        first = _score_job(next(iter(points))).removeprefix("score ")
        name, folder = f"scores {first}", self.folder.group(f"{first}{SCORES_END}")
        jobs = tuple(self._score(point, (), lock, group=name) for point in points)

        def command(slot: tuple[str, ...]) -> ScriptStart | None:
            best = [found for point in points if (found := self._scored_name(point)) is not None]
            left = [run for run in best if not self._scored(run)]
            if not left:
                return None
            discard(folder, guard=self.folder.guard)  # it has no results
            words = ("--adapters", *(f"{run}={self.folder.run(run) / 'adapter'}" for run in left))
            settings = {**self._of_scores, "output_dir": folder}
            return ScriptStart("evaluate", settings, with_port(slot), self.folder.log(name), lock, words)

        needs = tuple(dict.fromkeys(need for of_point in points.values() for need in of_point))
        return StudyJob(name, needs, command, lambda: None, lambda: (0.0, f"decoding {len(jobs)}"), runs=jobs)

    def dry_run_lines(self) -> list[str]:
        """A table of all runs with their states and trained parameters."""
        points, base = self.grid.points, self.base
        runs = [run for point in points for run in self.grid.runs(point)]
        lines = [
            f"sweep      {len(runs)} runs and {len(points) + 1} scores of {base.model} on {base.task} ({base.metric})",
            f"folder     {self.folder.path}",
            "",
            f"  {'run':<28}{'trained parameters':>20}   state",
        ]
        counts: dict[str, int] = {}
        for run in runs:
            end = read_run(self.folder.run(run.name))
            counts[end.state] = counts.get(end.state, 0) + 1
            best = "" if end.best is None else f", best validation {self.command.train.eval_metric} {end.best:.4f}"
            state = end.state + (f", step {end.step}{best}" if end.state == "finished" else "")
            state += f" ({end.reason})" if end.reason.startswith(REASON) else ""
            lines.append(f"  {run.name:<28}{run.point.num_trained(base.shape):>20,}   {state}")
        if self.settings.together != 1:
            lines += ["", "  groups to train together"]
            lines += [f"  {number:>3}  {', '.join(run.name for run in g)}" for number, g in enumerate(self.groups(), 1)]
        return [*lines, "", "  " + ", ".join(f"{count} {state}" for state, count in counts.items())]


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
    with _no_accelerator_needed():
        source = plan_run(train, rank=0, world_size=ranks, weights=False).source
    files = {name: getattr(train, name) for name in marked(Settings, holds="rows")}
    base = describe_base(source, targets=train.targets, task=task.name, metric=task.metrics[0], files=files.values())
    check_resumable(folder, command, base)
    if settings.together != 1:
        with _no_accelerator_needed():
            check_groups(command, ranks=ranks, source=source)
    grid = make_grid(settings, source.shape.num_layers)
    for run in _each_run(grid):
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


def _each_run(grid: SweepGrid) -> Iterator[Run]:
    return (run for point in grid.points for run in grid.runs(point))


def _score_job(point: Point) -> str:
    layer = "" if point.layer is None else f"-layer{point.layer}"
    return f"score {point.method}-r{point.rank}{layer}"


def _reason(log: Path, recorded: str = "") -> str:
    """Why a command failed: the error line of its log, else its recorded reason, else that there is neither."""
    lines = [line for line in last_lines(log, 40) if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else recorded or "it ended without a result"


def last_row(metrics: Path) -> dict[str, Any] | None:
    """The last complete row of a metrics.jsonl that is still being written."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, metrics.stat().st_size - 4096))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    return metrics_row(lines[-1]) if lines else None
