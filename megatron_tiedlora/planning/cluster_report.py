"""Makes a plan from the command's settings, and words it: the report, its JSON, and the command for a layout."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import psutil

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import count_text, nearest_name
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.fields import flag_value, marked
from megatron_tiedlora.config.plan_settings import PLAN_DEFAULTS, PlanCommand
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.parallel.traffic import GROUPS
from megatron_tiedlora.planning.cluster_table import (
    Plan,
    counts_line,
    hint_lines,
    hours_text,
    missed_lines,
    missing_line,
    refused_lines,
    table_lines,
    why_lines,
)
from megatron_tiedlora.planning.length import with_models_length
from megatron_tiedlora.planning.machines import CPU, DEFAULT_GPU, GPUS, Constant, Machine, read_machine
from megatron_tiedlora.planning.passes import engine_traffic, step_traffic
from megatron_tiedlora.planning.price import Priced, Pricer, capacity, hours_in_turn
from megatron_tiedlora.planning.search import Candidate, Cluster, search


@dataclass(frozen=True)
class Made:
    """A plan, with what it was made from."""

    command: PlanCommand
    cluster: Cluster
    plan: Plan
    pricer: Pricer

    def row(self, name: str, *, flag: str) -> Priced:
        """The layout of a name. Raises UserError, with the nearest one."""
        rows = {row.name: row for row in self.plan.all_rows}
        if name not in rows:
            raise UserError(f"--{flag} {name}: no such layout{nearest_name(name, rows)}; names are those of the table")
        return rows[name]

    @property
    def is_group(self) -> bool:
        """Whether it is of --adapters."""
        return self.command.train.adapters is not None

    @cached_property
    def hours_in_turn(self) -> float | None:
        """Of several adapters: the hours of one after another, each alone in the chosen layout, if that fits."""
        row = self.chosen
        return hours_in_turn(row, self.plan.search.run) if self.is_group and row is not None and row.fits else None

    @property
    def chosen(self) -> Priced | None:
        """The layout of --layout, or the fastest one; None if nothing fits."""
        named = self.command.settings.layout
        if named is not None:
            return self.row(named, flag="layout")
        return self.plan.rows[0] if self.plan.rows else None


def find_machine(command: PlanCommand) -> Machine:
    """The machine of --constants, of --gpu, or this one."""
    settings = command.settings
    if settings.constants is not None:
        machine = read_machine(user_path(settings.constants, flag="--constants"))
        if machine.on_gpu == (settings.ranks_on_cpu is not None):
            kind = "GPUs" if machine.on_gpu else "CPUs"
            raise UserError(
                f"--constants {settings.constants} are those of {kind}; {'remove' if machine.on_gpu else 'give'}"
                " --ranks_on_cpu"
            )
        return machine
    if settings.ranks_on_cpu is None:
        return GPUS[settings.gpu or DEFAULT_GPU]
    return CPU.changed({"memory": Constant(float(psutil.virtual_memory().total), "of this machine")})


def make_plan(command: PlanCommand) -> Made:
    """Enumerate and price all layouts.

    Raises:
        UserError: no layout is accepted, or the model or data cannot be read; in the words of a run.
    """
    settings, train = command.settings, command.train
    cluster = Cluster(settings.world_size, settings.ranks_per_node, find_machine(command))
    source = find_model(train.model, weights=False)
    train = with_models_length(train, source)
    found = search(train, cluster, source=source, formats=settings.formats)
    pricer = Pricer(cluster)
    plan = Plan.of(found, pricer.price(found.candidates), steps=found.candidates[0].step.steps)
    return Made(replace(command, train=train), cluster, plan, pricer)


def report_lines(made: Made) -> list[str]:
    """The whole report."""
    settings, plan = made.command.settings, made.plan
    rows = list(plan.rows) if settings.every_layout else plan.best_of_each()
    shown = rows[: settings.top or None]
    lines = [counts_line(plan), *_head(made), *refused_lines(plan), ""]
    if shown:
        more = f", the first {len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""
        kind = "" if settings.every_layout else ", the fastest of each tensor x pipeline x data and storage"
        lines.append(f"layouts that fit in {capacity(made.cluster) / 1e9:.1f} GB{kind}{more}")
        lines += table_lines(shown, plan)
        hours = "of the tokens of all steps at the speed of step 1, which all take" if made.is_group else "of the run"
        lines.append(f"  (tokens/s of each rank; matmuls to sums: shares of a step; hours {hours}; all planned)")
        lines += _in_turn_lines(made)
    if missed := missed_lines(plan):
        lines += ["", "does not fit", *(f"  {line}" for line in missed)]
    if hints := hint_lines(plan):
        lines += ["", *(f"hint: {line}" for line in hints)]
    if settings.why is not None:
        lines += ["", *why_lines(made.row(settings.why, flag="why"), made.pricer, plan)]
    if made.chosen is not None:
        values = chosen_settings(made.command.train, made.chosen.candidate)
        lines += ["", f"start {made.chosen.name}", *command_lines(values, made.cluster, yaml=settings.yaml)]
    return lines


def warning_lines(made: Made) -> list[str]:
    """What a user may have taken for granted: that the layout of --layout fits, and that a file was written."""
    row, yaml = made.chosen, made.command.settings.yaml
    if row is not None:
        return [] if row.fits else [f"warning: --layout does not fit: {missing_line(row, made.plan)}"]
    return [] if yaml is None else [f"warning: --yaml {yaml} is not written, as no layout fits"]


def _in_turn_lines(made: Made) -> list[str]:
    """How the chosen layout of several adapters compares with a run of each."""
    row, apart = made.chosen, made.hours_in_turn
    if row is None or apart is None:
        return []
    together = made.plan.hours(row)
    number = count_text(len(row.candidate.step.plans), "adapter")
    return [
        f"{row.name}: {number} together take {hours_text(together)} hours; one after another, each alone in this"
        f" layout, {hours_text(apart)} ({apart / together:.2f} x as long)"
    ]


def _head(made: Made) -> list[str]:
    """What was planned, and which values were left out."""
    command, cluster, run = made.command, made.cluster, made.plan.search.run
    settings, train = command.settings, command.train
    nodes = count_text(-(-cluster.world_size // cluster.per_node), "node")
    where = f"{nodes} of {cluster.per_node} x {cluster.machine.title}"
    plans = run.plans_of_step
    who = f"{count_text(len(plans), 'adapter')} of {train.adapters}: " if made.is_group else ""
    steps = [plan.settings.max_steps for plan in plans.values()]
    sizes = [plan.settings.global_batch_size for plan in plans.values()]
    samples = {name: number * size for name, number, size in zip(plans, steps, sizes, strict=True)}
    means = {name: own.train.num_tokens / len(own.train) for name, own in run.data.items()}
    length = sum(number * means.get(name, train.max_length) for name, number in samples.items()) / sum(samples.values())
    lines = [
        f"{train.model} on {where}; {who}{_range(steps)} steps of {_range(sizes)} samples ="
        f" {sum(samples.values()):,} samples of {length:,.0f} tokens {'on average' if means else 'each'}"
    ]
    assumed = [f"--{name} {getattr(train, name)}" for name in PLAN_DEFAULTS if run.assumes(name)]
    if settings.gpu is None and settings.constants is None and settings.ranks_on_cpu is None:
        assumed.insert(0, f"--gpu {DEFAULT_GPU}")
    given = {"max_steps", "epochs"}
    if left := [own.max_steps for own in run.adapters.values() if given.isdisjoint(own.model_fields_set)]:
        assumed.append(f"--max_steps {_range(left)}".replace(",", ""))
    lines += [f"left out, so assumed: {', '.join(assumed)}"] if assumed else []
    if not run.data and any(own.epochs is not None for own in run.adapters.values()):
        lines.append("the steps of --epochs are counted from data, and none is read")
    if not run.data:
        needs = "one" if run.source.folder is not None else "one, and --model with weights: a folder or hub id"
        lines.append(f"no data is read: every sample has the full length. To train, the command below needs {needs}")
    return lines


def chosen_settings(settings: Settings, candidate: Candidate) -> dict[str, Any]:
    """The settings of a run with this layout: those that were given to the plan, its defaults, and the layout's."""
    common = {"max_length": settings.max_length, "global_batch_size": settings.global_batch_size}
    values = {**settings.model_dump(mode="json", exclude_unset=True), **common, **candidate.flags}
    return {name: value for name, value in values.items() if name not in marked(Settings, of_dry_run=True)}


def command_lines(values: Mapping[str, Any], cluster: Cluster, *, yaml: str | None = None) -> list[str]:
    """The command that starts the run: here, or on the hosts of a hostfile.

    Args:
        yaml: the file that holds the settings, if there is one.
    """
    nodes = -(-cluster.world_size // cluster.per_node)
    hosts = f"--num_gpus {cluster.per_node}" if nodes == 1 else "--hostfile hostfile"
    words = [word for name, value in values.items() for word in (f"--{name}", flag_value(value))]
    words = ["--config", yaml] if yaml else words
    file = f"  (hostfile: {nodes} lines NAME slots={cluster.per_node}; in a Slurm allocation leave --hostfile out)"
    return [f"tiedlora run {hosts} {shlex.join(words)}", *([] if nodes == 1 else [file])]


def _range(values: Collection[int]) -> str:
    """`7`, `1 to 7`."""
    least, most = min(values), max(values)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def report_record(made: Made) -> dict[str, Any]:
    """The report as JSON: all layouts, the fastest first, and the chosen one with its command and messages."""
    plan, train = made.plan, made.command.train
    return {
        "model": train.model,
        "ranks": made.cluster.world_size,
        "ranks_per_node": made.cluster.per_node,
        "machine": made.cluster.machine.record(),
        "max_length": train.max_length,
        **(_of_adapters(made) if made.is_group else {"global_batch_size": train.global_batch_size}),
        "steps": plan.steps,
        "enumerated": plan.search.enumerated,
        "refused": dict(plan.search.refused.most_common()),
        "hints": hint_lines(plan),
        "chosen": None if made.chosen is None else _chosen_record(made, made.chosen),
        "layouts": [_record_of(row, plan) for row in plan.all_rows],
    }


def _of_adapters(made: Made) -> dict[str, Any]:
    """What only a plan of several adapters has."""
    row = made.chosen
    return {
        "adapters": {
            name: {"steps": plan.settings.max_steps, "global_batch_size": plan.settings.global_batch_size}
            for name, plan in made.plan.search.run.plans_of_step.items()
        },
        "in_turn": None if row is None else {"layout": row.name, "hours": made.hours_in_turn},
    }


def _chosen_record(made: Made, row: Priced) -> dict[str, Any]:
    """How to start a layout, and by stage and group the messages of a rank in a step; of DeepSpeed's at most these."""
    values, yaml = chosen_settings(made.command.train, row.candidate), made.command.settings.yaml
    command, messages = command_lines(values, made.cluster, yaml=yaml)[0], []
    batches = row.candidate.step.batches
    shapes = [batches.kinds[index].shape for index in batches.order]
    for index in range(row.candidate.layout.pp_size):
        stage = made.pricer.stage(row.candidate, index)
        sent = step_traffic(stage, shapes)
        sent.include(engine_traffic(stage, num_micro_batches=len(batches)))
        of_groups = {group: sent.of_group(group) for group in GROUPS}
        messages.append({group: {"messages": count, "bytes": size} for group, (count, size) in of_groups.items()})
    return {"layout": row.name, "command": command, "settings": values, "messages": messages}


def _record_of(row: Priced, plan: Plan) -> dict[str, Any]:
    """A layout as JSON."""
    record: dict[str, Any] = {
        "layout": row.name,
        "settings": row.candidate.flags,
        "data_parallel": row.candidate.layout.dp_size,
        "fits": row.fits,
        "bytes": {"needed": row.needed, "of": capacity(row.cluster), "stage": row.stage},
    }
    if row.memory is not None:
        record["bytes"] |= row.memory._asdict()
    if row.seconds is not None:
        hours = plan.hours(row)
        record |= {
            "tokens_per_second_per_rank": row.tokens_per_second,
            "mfu": row.mfu,
            "seconds": {**row.seconds._asdict(), "step": row.seconds.total},
            "hours": hours,
            "rank_hours": hours * row.cluster.world_size,
        }
    return record
