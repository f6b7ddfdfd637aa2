"""Which runs of a study train together (--together), and how many of them memory allows.

All runs of a study have one base, layout and data, so any of them may. One more adapter needs memory for its values,
gradients and moments; what a step keeps besides is that of one run, since a micro-batch has as many tokens at most.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import psutil

from megatron_tiedlora.base.atomic import discard
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapters_file import check_together
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.sweep_settings import MOST_TOGETHER, SweepCommand
from megatron_tiedlora.evaluation.results import RESULTS_FILE
from megatron_tiedlora.planning.adapter_plans import DS_CONFIG, check_clipping
from megatron_tiedlora.planning.memory import stage_memory
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.study.grid import Point, Run
from megatron_tiedlora.study.record import GROUPS, StudyFolder

SCORES_END = ".scores"  # of the name of a folder in GROUPS, where several adapters were scored
# Of the memory that is free; the rest is for what the planner does not know.
_SHARE = 0.8
_PROCESS_BYTES = 1.5e9  # of a rank's libraries and buffers in a machine's memory


def group_settings(command: SweepCommand, run: Run) -> Settings:
    """The settings of a run in a group."""
    return make_settings({"ds_config": DS_CONFIG, **command.given, **run.settings})


def check_groups(command: SweepCommand, *, ranks: int, source: ModelSource) -> None:
    """Raise UserError if the runs of a sweep cannot train together."""
    settings = command.settings
    first = Run(Point(settings.methods[0], settings.ranks[0]), settings.learning_rates[0])
    try:
        train = group_settings(command, first)
        check_together(train)
        if settings.halving and train.eval_metric != "loss":
            raise UserError(f"--halving compares validation losses; remove --eval_metric {train.eval_metric}")
        check_clipping(plan_run(train, rank=0, world_size=ranks, weights=False, source=source))
    except UserError as error:
        raise UserError(f"--together {settings.together}: {error}") from None


def grouped(points: Sequence[Sequence[Run]], most: int) -> list[tuple[Run, ...]]:
    """Groups of at most `most` runs, in order.

    Args:
        points: the runs of each point. They are compared and scored together, so they stay together if they fit.
    """
    groups: list[list[Run]] = [[]]
    for runs in points:
        for start in range(0, len(runs), most):
            part = runs[start : start + most]
            if len(groups[-1]) + len(part) > most:
                groups.append([])
            groups[-1] += part
    return [tuple(group) for group in groups if group]


def take_scores(folder: StudyFolder) -> None:
    """Move each score that was made beside others to its place. A sweep that was killed may have left some.

    Raises:
        UserError: one cannot be moved.
    """
    for made in (folder.path / GROUPS).glob(f"*{SCORES_END}"):
        for found in sorted(made.glob(f"*/{RESULTS_FILE}")):
            target = folder.score(found.parent.name)
            discard(target, guard=folder.guard)  # it has no result, or this one
            try:
                found.parent.replace(target)
            except OSError as error:
                raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
        discard(made, guard=folder.guard)


def most_together(plan: RunPlan) -> int:
    """For --together auto: how many adapters a group may have.

    Args:
        plan: of the adapter with most parameters.

    Raises:
        UserError: the memory of the GPUs cannot be read.
    """
    # The ranks of this machine share its memory.
    free = _free_gpu_bytes() if plan.on_gpu else psutil.virtual_memory().available / plan.grid.world_size
    return max(1, min(MOST_TOGETHER, num_that_fit(plan, _SHARE * free)))


def num_that_fit(plan: RunPlan, rank_bytes: float) -> int:
    """How many adapters fit into so many bytes for each rank; 0 if not even one does."""
    layout, found = plan.layout, []
    for stage in plan.stages:
        memory = stage_memory(stage, tokens=layout.rows * layout.length)
        own = memory.adapter + memory.gradients + memory.optimizer
        of_all = memory.total - own + (0.0 if plan.on_gpu else _PROCESS_BYTES)
        found.append(max(0, int((rank_bytes - of_all) // own)) if own else MOST_TOGETHER)
    return min(found)


def _free_gpu_bytes() -> float:
    """The free bytes of the GPU with least. Another process asks, as its context would stay in this one's memory."""
    free = "min(cuda.mem_get_info(index)[0] for index in range(cuda.device_count()))"
    code = f"import sys; from torch import cuda; sys.stdout.write(str({free}))"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    if asked.returncode or not asked.stdout.strip().isdecimal():
        reason = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
        raise UserError(f"--together auto: the free memory of the GPUs is not known ({reason}); give a number")
    return float(asked.stdout)
