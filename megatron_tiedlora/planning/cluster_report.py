"""Report the layouts of a run on a cluster as text and as JSON. The text ends with the command for one layout."""

import shlex
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import psutil

from megatron_tiedlora.base.messages import UserError, aligned_lines, count_text, range_text, user_path
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.fields import flag_value, marked
from megatron_tiedlora.config.job_settings import PLAN_DEFAULTS, PlanCommand, PlanSettings
from megatron_tiedlora.config.settings import HOW_LONG, Settings
from megatron_tiedlora.parallel.groups import GROUPS
from megatron_tiedlora.planning import machines, report, run_plan
from megatron_tiedlora.planning.layout import PLAIN_STORAGE, Storage
from megatron_tiedlora.planning.planned import Planned
from megatron_tiedlora.planning.search import Candidate, ClusterPlan, search

_MISSED = 5  # the maximum number of lines about layouts that do not fit
_REASONS = 4  # the maximum number of lines about rejected layouts
# The settings that can make a layout fit, in the order in which a user would change them. `base` changes the loss.
_CHANGES = ("recompute", "micro_batch_size", "ds_config", "sequence_parallel", "base")
_SMALLEST = Storage("nf4")  # a layout that does not fit in this format fits in no format


def find_machine(settings: PlanSettings) -> machines.Machine:
    """Return the machine in the --constants file, the GPU of --gpu, or the CPU of this computer."""
    if settings.constants is not None:
        machine = machines.read_machine(user_path(settings.constants, flag="--constants"))
        if machine.on_gpu == (settings.ranks_on_cpu is not None):
            kind, fix = ("GPUs", "Omit") if machine.on_gpu else ("CPUs", "Give")
            raise UserError(f"--constants {settings.constants}: the constants are for {kind}. {fix} --ranks_on_cpu")
        return machine
    if settings.ranks_on_cpu is None:
        return machines.GPUS[settings.gpu or machines.DEFAULT_GPU]
    return machines.CPU.changed({"memory": machines.Constant(float(psutil.virtual_memory().total), "of this machine")})


def plan_cluster(command: PlanCommand) -> ClusterPlan:
    """Return the plans of all layouts of a run on a cluster.

    Raises:
        UserError: no layout is accepted, or the model or data cannot be read. The messages are the same as in a run.
    """
    settings, train = command.settings, command.train
    per_node = settings.ranks_on_cpu or settings.gpus_per_node
    world_size = settings.ranks_on_cpu or settings.nodes * per_node
    machine, source = find_machine(settings), find_model(train.model, weights=False)
    plan = ClusterPlan(run_plan.with_models_length(train, source), source, world_size, per_node, machine)
    return search(plan, settings.formats)


def chosen_layout(plan: ClusterPlan, shown: PlanSettings) -> Candidate | None:
    """Return the layout that --layout names, else the fastest one or None. Raises UserError if the name is unknown."""
    if shown.layout is not None:
        return plan.row(shown.layout, flag="layout")
    return plan.rows[0] if plan.rows else None


def report_lines(plan: ClusterPlan, shown: PlanSettings) -> list[str]:
    """Return all lines of the report."""
    rows = plan.rows if shown.every_layout else plan.best_of_each()
    first, chosen = rows[: shown.top or None], chosen_layout(plan, shown)
    lines = [*_head(plan, shown), ""]
    if first:
        more = f", the first {len(first)} of {len(rows)}" if len(first) < len(rows) else ""
        kind = "" if shown.every_layout else ", the fastest of each tensor x pipeline x data and storage"
        lines.append(f"layouts that fit in {first[0].capacity / 1e9:.1f} GB{kind}{more}")
        lines += _table(first)
        several = plan.settings.adapters is not None
        hours = "of the tokens of all steps at the speed of step 1, which all take" if several else "of the run"
        lines.append(f"  (tokens/s of each rank; matmuls to sums: shares of a step; hours {hours}; all planned)")
        if several and chosen is not None and chosen.fits:
            together, apart = chosen.hours, chosen.hours_in_turn
            lines.append(
                f"{chosen.name}: {count_text(len(chosen.step.plans), 'adapter')} together take {hours_text(together)}"
                f" hours; one after another, each alone in this layout, {hours_text(apart)}"
                f" ({apart / together:.2f} x as long)"
            )
    if missed := _missed_lines(plan):
        lines += ["", "does not fit", *(f"  {line}" for line in missed)]
    if hints := hint_lines(plan):
        lines += ["", *(f"hint: {line}" for line in hints)]
    if shown.why is not None:
        lines += ["", *_why_lines(plan.row(shown.why, flag="why"), plan)]
    if chosen is not None:
        values = chosen_settings(plan, chosen)
        lines += ["", f"start {chosen.name}", *command_lines(values, plan, yaml=shown.yaml)]
    return lines


def warning_lines(plan: ClusterPlan, shown: PlanSettings) -> list[str]:
    """Return warnings that the layout of --layout does not fit, or that the file of --yaml was not written."""
    row = chosen_layout(plan, shown)
    if row is not None:
        return [] if row.fits else [f"warning: --layout does not fit: {_missing_line(row, plan)}"]
    return [] if shown.yaml is None else [f"warning: --yaml {shown.yaml} is not written, as no layout fits"]


# What was planned -----------------------------------------------------------------------------------------------------


def _head(plan: ClusterPlan, shown: PlanSettings) -> list[str]:
    """Return the first lines: the number of layouts, the planned run, its defaults, and why layouts are rejected."""
    train = plan.settings
    dropped, fitting = sum(not one.has_room_for_weights for one in plan.others), len(plan.rows) + len(plan.elsewhere)
    plans = plan.candidates[0].step.plans  # the lines below are the same for all layouts
    nodes = count_text(-(-plan.world_size // plan.per_node), "node")
    where = f"{nodes} of {plan.per_node} x {plan.machine.title}"
    who = "" if train.adapters is None else f"{count_text(len(plans), 'adapter')} of {train.adapters}: "
    steps = [plan.settings.max_steps for plan in plans.values()]
    sizes = [plan.settings.global_batch_size for plan in plans.values()]
    samples = {name: number * size for name, number, size in zip(plans, steps, sizes, strict=True)}
    means = {name: own.train.num_tokens / len(own.train) for name, own in plan.data.items()}
    length = sum(number * means.get(name, train.max_length) for name, number in samples.items()) / sum(samples.values())
    lines = [
        f"{plan.enumerated:,} layouts enumerated: {plan.refused.total():,} rejected, {dropped:,}"
        f" dropped as their weights alone do not fit, {fitting + len(plan.others) - dropped:,} priced; {fitting:,} fit",
        f"{train.model} on {where}; {who}{range_text(steps)} steps of {range_text(sizes)} samples ="
        f" {sum(samples.values()):,} samples of {length:,.0f} tokens {'on average' if means else 'each'}",
    ]
    assumed = [f"--{name} {getattr(train, name)}" for name in PLAN_DEFAULTS if plan.assumes(name)]
    if shown.gpu is None and shown.constants is None and shown.ranks_on_cpu is None:
        assumed.insert(0, f"--gpu {machines.DEFAULT_GPU}")
    if left := [s.max_steps for s in plan.adapters.values() if s.model_fields_set.isdisjoint(HOW_LONG)]:
        assumed.append(f"--max_steps {range_text(left)}".replace(",", ""))
    lines += [f"left out, so assumed: {', '.join(assumed)}"] if assumed else []
    if not plan.data and any(own.epochs is not None for own in plan.adapters.values()):
        lines.append("the steps of --epochs are counted from data, and none is read")
    if not plan.data:
        needs = "one" if plan.source.folder is not None else "one, and --model with weights: a folder or hub id"
        lines.append(f"no data is read: every sample has the full length. To train, the command below needs {needs}")
    counts = plan.refused.most_common()
    lines += [f"  {number:,} x {reason}" for reason, number in counts[:_REASONS]]
    if rest := sum(number for _, number in counts[_REASONS:]):
        lines.append(f"  {rest:,} x {count_text(len(counts) - _REASONS, 'more reason')}")
    return lines


# The layouts ----------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Candidate]) -> list[str]:
    header = ["layout", "GB", "tokens/s", "MFU", "matmuls", "attention", "elementwise", "tensor", "gathers"]
    lines = [[*header, "bubble", "sums", "hours", "rank hours"]]
    for row in rows:
        spent = row.seconds
        elementwise = spent.elementwise + spent.dequantised + spent.launches
        shares = [spent.matmuls, spent.attention, elementwise, spent.tensor, spent.gathers]
        shares += [spent.bubble + spent.pipeline, spent.sums + spent.outside]
        speed = f"{row.tokens_per_second:,.{0 if row.tokens_per_second >= 100 else 1}f}", f"{row.mfu:.1%}"
        hours = hours_text(row.hours), hours_text(row.hours * row.layout.world_size)
        parts = (f"{share / spent.total:.1%}" for share in shares)
        lines.append([row.name, f"{row.needed / 1e9:.1f}", *speed, *parts, *hours])
    return aligned_lines(lines, indent="  ")


def hours_text(value: float) -> str:
    """Return a number of hours as text. Small numbers have more decimal places."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _missed_lines(plan: ClusterPlan) -> list[str]:
    """Return lines about the smallest layouts that do not fit, one for each parallel configuration and format."""
    plain: dict[Hashable, Candidate] = {}

    def unlike(row: Candidate) -> tuple[bool, bool, float]:
        return not row.is_default, row.engine_file != plan.settings.ds_config, row.needed

    for row in (*plan.rows, *plan.others):
        if row.storage in plan.ranked and (row.alike not in plain or unlike(row) < unlike(plain[row.alike])):
            plain[row.alike] = row
    missed = sorted((row for row in plain.values() if not row.fits), key=lambda row: row.needed)
    return [_missing_line(row, plan) for row in missed[:_MISSED]]


def _missing_line(row: Candidate, plan: ClusterPlan) -> str:
    """Return a line about a layout that does not fit: the memory that it needs, and a change that makes it fit."""
    sizes = f"{row.name}: {row.needed / 1e9:.1f} of {row.capacity / 1e9:.1f} GB"
    if not row.has_room_for_weights:
        return f"{sizes} for the weights alone; {_what_fits(row, plan)}"
    parts = {name: size for name, size in row.fullest[1]._asdict().items() if name != "slack"}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:2]
    return f"{sizes}, {', '.join(f'{name} {size / 1e9:.1f}' for name, size in largest)}; {_what_fits(row, plan)}"


def _what_fits(row: Candidate, plan: ClusterPlan) -> str:
    """Return a text with the smallest change of flags that makes a layout fit. The storage format is changed last."""
    groups = [row.alike, *([(*row.alike[:-1], _SMALLEST)] if row.storage == PLAIN_STORAGE else [])]
    best: tuple[tuple[int, int, int, float], str] | None = None
    for other in (*plan.rows, *plan.elsewhere):
        if other.alike not in groups:
            continue
        mine, theirs = row.flags, other.flags
        changed = [name for name in _CHANGES if mine.get(name) != theirs.get(name)]
        order = sum(1 << _CHANGES.index(name) for name in changed)
        rank = (groups.index(other.alike), len(changed), order, other.seconds.total)
        if best is None or rank < best[0]:
            best = rank, " ".join(f"--{name} {str(theirs[name]).lower()}" for name in changed)
    return "nothing fits with these parallel sizes" if best is None else f"{best[1]} fits"


def _why_lines(row: Candidate, plan: ClusterPlan) -> list[str]:
    """Return lines with all details of a layout. Its time is predicted even if the layout does not fit in memory."""
    layout, step = row.layout, row.step
    most = f"{layout.rows} x {layout.length:,} tokens"
    if layout.named:
        most = f"{step.largest.tokens:,} tokens of {count_text(max(map(len, step.largest.adapters)), 'adapter')}"
    lines = [
        f"{row.name}: {count_text(len(step.batches), 'micro-batch')} of up to {most} per rank and step, recompute"
        f" {layout.recompute}",
        *([] if row.fits else [f"  {_missing_line(row, plan)}"]),
    ]
    for section in report.layout_sections(row):
        lines += ["", *section]
    return lines


# The chosen layout ----------------------------------------------------------------------------------------------------


def chosen_settings(plan: ClusterPlan, candidate: Candidate) -> dict[str, Any]:
    """Return the settings of a run with this layout, including the user's settings and the defaults of a plan."""
    values = {**plan.values, **candidate.flags}
    return {name: value for name, value in values.items() if name not in marked(Settings, of_dry_run=True)}


def command_lines(values: Mapping[str, Any], plan: ClusterPlan, *, yaml: str | None = None) -> list[str]:
    """Return the command that launches the run on this host, or on the hosts of a hostfile.

    Args:
        yaml: the YAML file that contains the settings; None to write the settings into the command.
    """
    nodes = -(-plan.world_size // plan.per_node)
    hosts = f"--num_gpus {plan.per_node}" if nodes == 1 else "--hostfile hostfile"
    words = [word for name, value in values.items() for word in (f"--{name}", flag_value(value))]
    words = ["--config", yaml] if yaml else words
    file = f"  (hostfile: {nodes} lines NAME slots={plan.per_node}; in a Slurm allocation leave --hostfile out)"
    return [f"tiedlora run {hosts} {shlex.join(words)}", *([] if nodes == 1 else [file])]


def report_record(plan: ClusterPlan, shown: PlanSettings) -> dict[str, Any]:
    """Return a dictionary for JSON with all layouts, the fastest first, and details of the chosen layout."""
    train, chosen, start = plan.settings, chosen_layout(plan, shown), None
    if chosen is not None:  # the byte counts of DeepSpeed's messages are upper bounds
        values, messages = chosen_settings(plan, chosen), []
        for index in range(chosen.layout.pp_size):
            of_groups = {group: chosen.traffic(index).of_group(group) for group in GROUPS}
            messages.append({group: {"messages": count, "bytes": size} for group, (count, size) in of_groups.items()})
        command = command_lines(values, plan, yaml=shown.yaml)[0]
        start = {"layout": chosen.name, "command": command, "settings": values, "messages": messages}
    about: dict[str, Any] = {"global_batch_size": train.global_batch_size}
    if train.adapters is not None:
        hours = None if chosen is None or not chosen.fits else chosen.hours_in_turn
        about = {
            "adapters": {
                name: {"steps": own.settings.max_steps, "global_batch_size": own.settings.global_batch_size}
                for name, own in plan.candidates[0].step.plans.items()
            },
            "in_turn": None if chosen is None else {"layout": chosen.name, "hours": hours},
        }
    return {
        "model": train.model,
        "ranks": plan.world_size,
        "ranks_per_node": plan.per_node,
        "machine": plan.machine.record(),
        "max_length": train.max_length,
        **about,
        "steps": plan.candidates[0].step.steps,
        "enumerated": plan.enumerated,
        "refused": dict(plan.refused.most_common()),
        "hints": hint_lines(plan),
        "chosen": start,
        "layouts": [_record_of(row) for row in plan.all_rows],
    }


def _record_of(row: Candidate) -> dict[str, Any]:
    """Return a dictionary for JSON that describes a layout."""
    stage, memory = row.fullest if row.has_room_for_weights else (0, None)
    record: dict[str, Any] = {
        "layout": row.name,
        "settings": row.flags,
        "data_parallel": row.layout.dp_size,
        "fits": row.fits,
        "bytes": {"needed": row.needed, "of": row.capacity, "stage": stage},
    }
    if memory is not None:
        record["bytes"] |= memory._asdict()
    if row.fits:
        record |= {
            "tokens_per_second_per_rank": row.tokens_per_second,
            "mfu": row.mfu,
            "seconds": {**row.seconds._asdict(), "step": row.seconds.total},
            "hours": row.hours,
            "rank_hours": row.hours * row.layout.world_size,
        }
    return record


# Hints on the fastest layout and its alternatives ---------------------------------------------------------------------


_LARGE = 0.15  # the fraction of a step above which a cost is worth a hint
_FASTER = 1.05  # the speed ratio above which a hint names a different layout
_GAIN = 0.01  # the speed-up above which a hint names a different storage format
# The storage format of the base also changes the loss; see docs/quantised.md.
_CHANGES_NUMBERS = "changes the base that is trained on (docs/quantised.md shows the effect on the loss)"


def hint_lines(plan: ClusterPlan) -> list[str]:
    """Return hints about the fastest layout and about alternatives to it."""
    if not plan.rows:
        return [*_formats(plan)]
    best = plan.rows[0]
    of_attention = report.attention_lines(best, best.name)
    return [*_formats(plan), *_waits(best, plan.best_of_each()), *_recompute(best, plan), *of_attention]


def _ratio(faster: Planned, slower: Planned) -> float:
    return faster.tokens_per_second / slower.tokens_per_second


def _formats(plan: ClusterPlan) -> Iterator[str]:
    """Yield hints about the storage format of the fastest layout, and about formats that would be faster."""
    best = plan.rows[0] if plan.rows else None
    if best is not None and best.storage != PLAIN_STORAGE and plan.source.stored is None:
        plain = next((row for row in plan.rows if row.storage == PLAIN_STORAGE), None)
        words = f"{best.name}: {best.storage.name} {_CHANGES_NUMBERS}"
        if plain is not None:
            words += f"; the fastest in {plain.dtype} is {plain.name}, at {1 / _ratio(best, plain):.0%} of its speed"
        elif any(row.storage == PLAIN_STORAGE for row in plan.others):
            words += "; in 16 bits nothing fits"
        yield words
    fastest: dict[str, Candidate] = {}
    for row in plan.elsewhere:
        fastest.setdefault(row.storage.name, row)
    for name, row in fastest.items():
        gain = None if best is None else _ratio(row, best) - 1
        if gain is None or gain >= _GAIN:
            words = "would fit" if gain is None else f"would gain {gain:.0%}"
            words = f"{name} {words} ({row.name}, {row.tokens_per_second:,.0f} tokens/s)"
            yield f"{words}, but {_CHANGES_NUMBERS}; --formats {name} takes it"


def _waits(best: Candidate, shown: Sequence[Candidate]) -> Iterator[str]:
    """Yield hints about time lost to tensor-parallel messages, idle pipeline stages, and ZeRO-3 gathers."""
    wide = max(shown, key=lambda row: (row.layout.tp_size, row.tokens_per_second))
    alike = (row for row in shown if row.storage == wide.storage)
    fastest = max(alike, key=lambda row: row.tokens_per_second)
    share, layout = wide.seconds.tensor / wide.seconds.total, fastest.layout
    if share >= _LARGE and _ratio(fastest, wide) >= _FASTER:
        sizes = f"{layout.tp_size} x {layout.pp_size} x {layout.dp_size}"
        yield (
            f"{wide.name}: tensor messages take {share:.0%}; {sizes} is {_ratio(fastest, wide):.1f} x as fast"
            f" ({fastest.name})"
        )
    number, share = best.layout.micro_batches, best.seconds.bubble / best.seconds.total
    if share >= _LARGE:
        yield (
            f"{best.name}: stages wait {share:.0%} of the time; a larger --global_batch_size gives more than"
            f" {count_text(number, 'micro-batch')} per rank"
        )
    row = max(shown, key=lambda row: row.seconds.gathers / row.seconds.total)
    share, file = row.seconds.gathers / row.seconds.total, row.engine_file
    if share >= _LARGE:
        hides = row.layout.overlaps_gathers
        why = f"beyond what {file} hides behind computation" if hides else f"because {file} overlaps none"
        yield f"{row.name}: ZeRO-3 gathers weights for {share:.0%} of the time, {why}"


def _recompute(best: Candidate, plan: ClusterPlan) -> Iterator[str]:
    if best.layout.recompute == "none":
        return
    other = next((row for row in plan.rows if row.layout.recompute == "none"), None)
    if other is None:
        yield f"{best.name}: every layout that fits recomputes; more cards or a smaller storage format would not"
    elif (speed := f"{1 / _ratio(best, other):.0%}") != "100%":
        yield f"{best.name} recomputes; {other.name} does not, at {speed} of its speed"
