"""Plans a study: checks its settings, decides which runs are trained together, and makes the text of the dry run.

All runs of a study have the same base model, layout and data, so any of them can be trained together. Free memory
limits how many.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import psutil
from torch import cuda

from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.messages import UserError, aligned_lines, bytes_in_words, naming, user_path
from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.cluster import launchers, start
from megatron_tiedlora.config import cli, fields, job_settings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data import readers, splits, tasks
from megatron_tiedlora.data.sources import local_files
from megatron_tiedlora.planning import adapter_plans, machines, planned, run_plan
from megatron_tiedlora.planning.memory import StageMemory, held_memory, step_memory, with_reserves
from megatron_tiedlora.runtime.launch_env import uses_gpu
from megatron_tiedlora.study import record, slurm, tables

_SHARE = 0.8  # usable fraction of the free memory; the rest is for needs that the planner does not know

Group = tuple[record.Run, ...]  # runs that are trained together in one launch


@dataclass(frozen=True)
class SweepPlan:
    """A study whose settings have been checked.

    Attributes:
        runs: the plan of each run, in training order.
        job: the launcher, hosts and ranks of each launch. The program is added at the launch.
        test_limit: number of test rows that are scored, starting with the first row; None for all rows.
        machine: the machine of --constants or --gpu, with --slurm else this machine's card; None if it is unknown.
        options: the options of sbatch with --slurm, else None.
    """

    command: job_settings.SweepCommand
    folder: record.StudyFolder
    base: record.BaseRecord
    grid: record.SweepGrid
    runs: Mapping[record.Run, run_plan.RunPlan]
    job: launchers.Job
    test_limit: int | None
    machine: machines.Machine | None = None
    options: slurm.JobOptions | None = None

    @property
    def source(self) -> ModelSource:
        """The base model."""
        return next(iter(self.runs.values())).source

    def is_finished(self, run: record.Run) -> bool:
        """Return whether the run has finished, in this launch of the sweep or in an earlier launch."""
        return record.read_run(self.folder.runs / run.name).state == "finished"

    def groups(self) -> list[Group]:
        """Return the runs to train as groups. The runs of a group are trained together in one launch.

        The runs of one method and rank are compared with each other, so they are in one group if they fit. Otherwise
        those of one seed are. Finished runs are not trained again, but --halving compares the other runs with them.
        With --part, these are the groups that --slurm has planned: the group of the part, or all for `scores`.

        Raises:
            UserError: the free memory of the GPUs cannot be read or is unknown, or the part does not exist.
        """

        def is_left(runs: Group) -> bool:
            return not all(map(self.is_finished, runs))

        if (part := self.command.settings.part) is not None:
            submitted, runs = slurm.read_submitted(self.folder).groups, {run.name: run for run in self.runs}
            if part not in (known := [record.BASE_NAME, *submitted, record.SCORES]):
                raise UserError(f"--part {part}: --slurm has planned no such part. Give one of {', '.join(known)}")
            if unknown := [name for names in submitted.values() for name in names if name not in runs]:
                why = f"{unknown[0]} is not a run of this study; submit the study again with --slurm"
                raise UserError(f"{self.folder.path / slurm.JOBS_FILE}: {why}")
            chosen = [names for first, names in submitted.items() if part in (first, record.SCORES)]
            return list(filter(is_left, (tuple(runs[name] for name in names) for names in chosen)))

        points = (sum(filter(is_left, _by_seed(self.grid.runs(point))), ()) for point in self.grid.points)
        return list(filter(is_left, _packed(list(filter(None, points)), self._may_share)))

    def _may_share(self, runs: Group) -> bool:
        """Return whether the runs may be trained together, by --together and the free memory."""
        most = self.command.settings.together
        if most != "auto":
            return len(runs) <= most
        if self.command.settings.halving and len({(run.point, run.seed) for run in runs}) == 1:
            return True  # runs of one point and seed are compared step by step, even if they need more than the memory
        return len(runs) <= job_settings.MOST_TOGETHER and self.needed_bytes(runs) <= self.free_bytes

    def needed_bytes(self, runs: Group) -> float:
        """Return the largest memory that a rank needs to train the runs together, in bytes.

        It includes the tensors of all runs, and the memory of a step of the run with the largest adapter."""
        step = planned.StepPlan({run.name: self.runs[run] for run in runs})
        machine = step.shared.machine
        parts = zip(step.stages, self._passes, strict=True)
        return max(with_reserves(stage, held_memory(stage).plus(passes), machine).total for stage, passes in parts)

    @cached_property
    def _passes(self) -> list[StageMemory]:
        """The memory of each stage that depends on micro-batches, for the run with the largest adapter."""
        run = max(self.runs, key=lambda run: self.runs[run].adapter.rank * len(self.runs[run].adapter.targets))
        step = planned.StepPlan({run.name: self.runs[run]})
        return [step_memory(stage, step.largest) for stage in step.stages]

    @cached_property
    def free_bytes(self) -> float:
        """The bytes that each rank may use with --together auto. Ranks on CPUs share the memory of their machine."""
        on_gpu, slots = next(iter(self.runs.values())).on_gpu, self.job.hosts[0].slots
        if self.machine is not None:
            return _SHARE * self.machine["memory"] / (1 if on_gpu else slots)
        if on_gpu:
            return _SHARE * _free_gpu_bytes()
        if "gpu" in (self.command.settings.slurm or ""):
            why = "this machine has no GPU that shows the memory of the jobs' GPUs"
            raise UserError(f"--together auto: {why}; give their kind to --gpu, or give a number")
        return _SHARE * psutil.virtual_memory().available / slots

    def gpu_hours(self, groups: Sequence[Group]) -> list[float] | None:
        """Return the predicted hours of all ranks for the steps of each group, without runs that are finished.

        Return None if the machine is unknown."""
        if (machine := self.machine) is None:
            return None
        left = [{run.name: self.runs[run] for run in runs if not self.is_finished(run)} for runs in groups]
        data: adapter_plans.Data = {}
        if self.source.folder is not None:
            data = adapter_plans.prepare_all_data({name: plan for plans in left for name, plan in plans.items()})
            left = [adapter_plans.counted(plans, data) for plans in left]
        hours = []
        for plans in left:
            step = planned.StepPlan.first(plans, data, shares=True)
            card = step.shared.with_attention(machine, packed=bool(data))
            layout = planned.Planned(step=step, layout=step.layout, machine=card, per_node=self.job.hosts[0].slots)
            hours.append(layout.hours * self.job.size)
        return hours

    def dry_run_lines(self) -> list[str]:
        """Return the lines of the dry run: a table of all runs, and a table of the joint launches and their memory."""
        base, metric, states = self.base, self.command.train.eval_metric, list[str]()
        rows = [("run", "trained parameters", "state")]
        for run in self.runs:
            end = record.read_run(self.folder.runs / run.name)
            states.append(end.state)
            best = "" if end.best is None else f", best validation {metric} {end.best:.4f}"
            state = end.state + (f", step {end.step}{best}" if end.state == "finished" else "")
            state += f" ({end.halved})" if end.halved else ""
            rows.append((run.name, f"{base.trained[run.point.name]:,}", state))
        runs, scores, seeds = len(rows) - 1, len(self.grid.points) * len(self.grid.seeds) + 1, self.grid.seeds
        of_all = f"{runs} runs and {scores} scores of {base.model} on {base.task} ({base.metric})"
        own = self.command.train.seed
        of_seeds = ", ".join(str(own if seed is None else seed) for seed in seeds)
        of_seeds += f"; validation rows that are split off are those of seed {self.command.train.split_seed}"
        lines = [
            *aligned_lines([("sweep", of_all), ("seeds", of_seeds), ("folder", str(self.folder.path))], align="<"),
            "",
            *aligned_lines(rows, align="<><", indent="  "),
        ]
        if groups := self.groups():
            is_auto = self.command.settings.together == "auto"
            free = f"; up to {bytes_in_words(self.free_bytes)} are used" if is_auto else ""
            lines += ["", f"  groups to train together, and the memory of a rank{free}"]
            needed, hours = [self.needed_bytes(runs) for runs in groups], self.gpu_hours(groups)
            shown = [""] * len(groups) if hours is None else [f"{each:,.2f} h" for each in hours]
            cells = [
                (str(number), bytes_in_words(size), each, ", ".join(run.name for run in runs))
                for number, (size, each, runs) in enumerate(zip(needed, shown, groups, strict=True), start=1)
            ]
            lines += aligned_lines(cells, align=">>><", indent="  ")
            unit = f"{'GPU' if next(iter(self.runs.values())).on_gpu else 'rank'} hours"
            if hours is not None:
                length = "" if self.source.folder else " with all samples of --max_length"
                lines.append(f"  {sum(hours):,.2f} {unit} of training steps{length}, without validation and scores")
            elif self.options is not None:
                lines.append(f"  {unit} are unknown; give --gpu, or --constants of `tiedlora plan --measure`")
            if is_auto and max(needed) > self.free_bytes:
                less = "give a --base of fewer bits or a shorter --max_length"
                lines += ["", f"  warning: a group needs more memory than this; {less}"]
        counts = (f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return [*lines, "", f"  {', '.join(counts)}"]


def _packed(parts: Sequence[Group], may_share: Callable[[Group], bool]) -> list[Group]:
    """Join consecutive groups if `may_share` allows it, divide groups that are too large, and return the groups."""
    groups: list[Group] = []
    for part in parts:
        if groups and may_share((*groups[-1], *part)):
            groups[-1] += part
        elif len(part) == 1 or may_share(part):
            groups.append(part)
        else:
            seeds = _by_seed(part)
            groups += _packed(seeds if len(seeds) > 1 else [(run,) for run in part], may_share)
    return groups


def _by_seed(runs: Group) -> list[Group]:
    return [tuple(run for run in runs if run.seed == seed) for seed in dict.fromkeys(run.seed for run in runs)]


def _free_gpu_bytes() -> float:
    """Return the free memory, in bytes, of the GPU with the least free memory.

    A separate process asks CUDA, because this process would keep its CUDA context until it ends."""
    free = "min(cuda.mem_get_info(index)[0] for index in range(cuda.device_count()))"
    code = f"import sys; from torch import cuda; sys.stdout.write(str({free}))"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if asked.returncode or not asked.stdout.strip().isdecimal():
        reason = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"--together auto: the free GPU memory cannot be read ({reason}); give a number")
    return float(asked.stdout)


def plan_sweep(command: job_settings.SweepCommand) -> SweepPlan:
    """Check the folder, model, grid, task and every run before anything is launched, and return the plan.

    Raises:
        UserError: a check fails. The message names the first problem.
    """
    settings, train = command.settings, command.train
    folder = record.StudyFolder(user_path(settings.output_dir))
    record.check_folder(folder)
    options, environment = None, dict(os.environ)
    if settings.slurm is not None:
        options = slurm.job_options(settings.slurm, num_gpus=command.launcher.num_gpus)
        environment = {**slurm.outside(environment), **options.allocation}
    task, job = tasks.get_task(train.task), start.make_job(command.launcher, environment)
    if options is not None and job.route != "srun":
        raise UserError("--slurm: srun or mpirun starts the ranks in the allocation; remove other launchers and hosts")
    machine, ranks = None, job.size
    if settings.constants is not None:
        machine = machines.read_machine(user_path(settings.constants, flag="--constants"))
    elif settings.gpu is not None:
        machine = machines.GPUS[settings.gpu]
    elif settings.slurm is not None and uses_gpu():
        machine = machines.GPUS.get(machines.known_gpu(cuda.get_device_name()) or "")
    kind = "gpu" if machine is not None and machine.on_gpu else "cpu"
    where = {} if machine is None else {"dry_run": True, "plan_for": kind, "gpu": settings.gpu}
    with naming("--launcher_args"):
        start.check_num_ranks(train, ranks)
    cli.check_together(train)
    source, counts = find_model(train.model, weights=False), dict[str, int]()
    grid, runs = record.make_grid(command, source.shape.num_layers), dict[record.Run, run_plan.RunPlan]()
    for run in grid.all_runs:
        own = make_settings({"ds_config": adapter_plans.DS_CONFIG, **command.shared, **run.settings, **where})
        runs[run] = run_plan.plan_run(own, rank=0, world_size=ranks, weights=False, source=source)
        adapter_plans.check_clipping(runs[run])
        counts[run.point.name] = sum(runs[run].adapter.num_trained().values())
    files = {name: getattr(train, name) for name in fields.marked(Settings, holds="rows")}
    local = (item for given in filter(None, files.values()) for item in local_files(given).items())  # not hub ids
    base = record.BaseRecord(
        model=source.name,
        base_hash=source.base_hash,
        num_layers=source.shape.num_layers,
        trained=counts,
        # the paper adapts only QKV
        paper_model=tables.paper_model(source.name, source.shape) if train.targets == (QKV,) else None,
        task=task.name,
        metric=task.metrics[0],
        file_sha256={name: file_sha256(path) for name, path in local},
    )
    record.check_resumable(folder, command, base)
    if settings.halving:
        cli.check_halving({run.name: plan.settings for run, plan in runs.items()})
    if task.hub is None and task.generate is None and files["test_file"] is None:
        raise UserError(f"--task {task.name} has no test set of its own; give one with --test_file")
    for name in splits.local_names(train):
        readers.read_rows(name, limit=1)
    limit = settings.test_limit
    if limit is None and task.scored_rows is not None:  # tiedlora evaluate scores some rows, a sweep all
        limit = len(splits.load_split(train.task, "test", files={"test": train.test_file}, seed=train.seed))
    return SweepPlan(command, folder, base, grid, runs, job, limit, machine, options)
