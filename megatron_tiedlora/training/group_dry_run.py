"""--dry_run with --adapters: the tables of a run, with a row for each adapter, and what one more of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_tiedlora.base.table import aligned_lines
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.planning.memory import StageMemory, bank_bytes
from megatron_tiedlora.runtime.group_folder import GroupFolder
from megatron_tiedlora.runtime.run_folder import choose_run_folder
from megatron_tiedlora.training.dry_run import sample_lines
from megatron_tiedlora.training.dry_run_tables import (
    Report,
    fits,
    memory_lines,
    message_lines,
    no_data_lines,
    partition_lines,
    ranges,
    speed_lines,
    verdict_lines,
)
from megatron_tiedlora.training.group_plan import GroupPlan, first_step_of
from megatron_tiedlora.training.group_start import check_run_folders
from megatron_tiedlora.training.length import epochs_of
from megatron_tiedlora.training.member_plans import Data, counted, group_name, plan_group, prepare_group_data
from megatron_tiedlora.training.run_data import RunData


def group_report(settings: Settings, *, launched_ranks: int = 1) -> Report:
    """The whole report, for --world_size ranks or else for as many as were launched.

    Raises:
        UserError: as the run itself would.
    """
    ranks = settings.world_size or launched_ranks
    plans, shares = plan_group(settings, rank=0, world_size=ranks, weights=False), settings.share_micro_batches
    name, resume = group_name(settings), settings.resume
    check_run_folders(
        settings, plans, choose_run_folder(settings.output_dir, name=name, resume=resume, kind=GroupFolder)
    )
    data = dict[str, RunData]()
    if any(plan.reads_data for plan in plans.values()):
        data = prepare_group_data(plans)
        plans = counted(plans, data)
    group = first_step_of(plans, data, shares=shares)
    peaks = [group.largest.memory(stage, group.shared.machine) for stage in group.stages]
    sections = [_adapters(group), partition_lines(group.stages), _memory(group, peaks), _one_more(group)]
    sections += [message_lines(group.stages, group, with_data=bool(data))]
    sections += [*speed_lines(group, group.stages, group.shared), _batches(group, data)]
    sections += [*_data(group, data), *_samples(group, data)]
    return Report.of(sections, fits=fits(peaks, group.shared))


def _adapters(group: GroupPlan) -> list[str]:
    rows = []
    for number, (name, plan) in enumerate(group.plans.items()):
        adapter, batches = plan.adapter, plan.batches
        rows.append(
            [
                name,
                adapter.method,
                str(adapter.rank),
                ",".join(target.name for target in adapter.targets),
                ranges(adapter.layers),
                f"{sum(adapter.num_trained().values()):,}",
                f"{batches.global_batch_size} = {batches.micro_batch_size} x {batches.accumulation_steps} x"
                f" {batches.data_parallel}",
                f"{plan.settings.max_steps:,}",
                bytes_in_words(_own_bytes(group, number)),
            ]
        )
    trained = sum(sum(plan.adapter.num_trained().values()) for plan in group.plans.values())
    header = ("adapter", "method", "rank", "linears", "layers", "trained", "batch", "steps", "bytes per rank")
    return [
        f"{count_text(len(group.plans), 'adapter')}: {trained:,} trained parameters on a frozen base of"
        f" {num_base_parameters(group.shared.source.shape):,}",
        *aligned_lines([header, *rows], indent="  "),
        "  (batch: samples per step = rows of a micro-batch x micro-batches x data-parallel ranks; bytes per rank: its"
        " tensors, gradients and moments on the rank that holds most)",
    ]


def _own_bytes(group: GroupPlan, adapter: int) -> int:
    return max(bank_bytes(stage.parts[adapter]) for stage in group.stages)


def _memory(group: GroupPlan, peaks: Sequence[StageMemory]) -> list[str]:
    tokens, most = group.largest.tokens, max(map(len, group.largest.owners))
    micro_batches = f"{tokens:,} tokens of up to {count_text(most, 'adapter')} at step 1"
    machine = group.shared.machine
    lines = memory_lines(group.stages, peaks, tokens=tokens, micro_batches=micro_batches, machine=machine)
    return [*lines, *verdict_lines(peaks, group.shared)]


def _one_more(group: GroupPlan) -> list[str]:
    """What the run needs beside with its largest adapter twice."""
    number = max(range(len(group.plans)), key=lambda number: _own_bytes(group, number))
    name, machine = list(group.plans)[number], group.shared.machine
    samples = None if group.samples is None else {**group.samples, "": group.samples[name]}
    more = replace(group, plans={**group.plans, "": group.plans[name]}, samples=samples)
    before, after = (
        [run.largest.memory(stage, machine).allocated for stage in run.stages] for run in (group, more)
    )
    added = max(new - old for new, old in zip(after, before, strict=True))
    line = (
        f"  like {name}: {bytes_in_words(added)} per rank, {bytes_in_words(_own_bytes(group, number))} of them its"
        " tensors, gradients and moments"
    )
    if added > _own_bytes(group, number):
        line += "; the rest are its factors, and tokens where micro-batches have room for more"
    return ["one more adapter", line]


def _batches(group: GroupPlan, data: Data) -> list[str]:
    shapes = group.batches.shapes
    apart = sum(len(shape.shares) for shape in shapes)
    lines = [
        "batches",
        f"  step 1: {len(shapes):,} micro-batches on a data-parallel rank, which hold {apart:,} of single adapters;"
        f" {sum(shape.num_tokens for shape in shapes) / len(shapes):,.0f} positions each",
    ]
    if not group.shares_micro_batches:
        lines.append("  (--share_micro_batches false: each micro-batch has one adapter)")
    if not data and any(plan.settings.epochs is not None for plan in group.plans.values()):
        lines.append("  (the steps of --epochs are counted from data, and none is read)")
    return lines


def _data(group: GroupPlan, data: Data) -> list[list[str]]:
    if not data:
        return [no_data_lines(group.shared)]
    rows, notes = [], []
    for name, own in data.items():
        settings, train = group.plans[name].settings, own.train
        numbers = [len(train), train.num_tokens, train.num_supervised, train.longest, train.truncated_prompts]
        numbers += [len(own.validation)]
        passes = f"{epochs_of(settings, len(train)):.2f}"
        rows.append([name, settings.task, *(f"{number:,}" for number in numbers), passes])
        notes += [f"  {name}: {note}" for note in own.notes]
        notes += [f"  warning: {name}: {warning}" for warning in own.warnings(group.plans[name])]
    header = ("adapter", "task", "samples", "tokens", "supervised", "longest", "cut", "validation", "passes")
    return [
        [
            "data: training parts, validation samples, and how often a run sees its training part",
            *aligned_lines([header, *rows], indent="  "),
            *notes,
        ]
    ]


def _samples(group: GroupPlan, data: Data) -> list[list[str]]:
    """The first sample of each adapter, once if it is the same for several."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, own in data.items():
        found.setdefault(tuple(sample_lines(group.plans[name], own)), []).append(name)
    return [[f"{', '.join(names)}: {lines[0]}", *lines[1:]] for lines, names in found.items()]
