"""--dry_run: a report on a run without starting it. It needs no weights and no data; presets need no files at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.table import aligned_lines
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.loader import GlobalBatch, num_positions
from megatron_tiedlora.data.text_ids import decode_ids
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.planning.memory import bank_bytes, cache_bytes
from megatron_tiedlora.training.adapter_plans import choose_folder, plan_adapters
from megatron_tiedlora.training.dry_run_tables import (
    memory_lines,
    message_lines,
    no_data_lines,
    partition_lines,
    ranges,
    speed_lines,
    verdict,
)
from megatron_tiedlora.training.init_from import start_lines
from megatron_tiedlora.training.length import epochs_of
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.run_data import Data, RunData, counted, first_source, prepare_all_data
from megatron_tiedlora.training.step_plan import StepPlan


class DryRunReport(NamedTuple):
    """A dry run as text, and whether every rank fits in the card of --gpu; without --gpu it does."""

    text: str
    fits: bool


def dry_run_report(settings: Settings, *, launched_ranks: int = 1) -> DryRunReport:
    """The whole report, for --world_size ranks or else for as many as were launched.

    Raises:
        UserError: as the run itself would.
    """
    plans = plan_adapters(settings, rank=0, world_size=settings.world_size or launched_ranks, weights=False)
    choose_folder(settings, plans)
    data: Data = {}
    if any(plan.reads_data for plan in plans.values()):
        data = prepare_all_data(plans)
        plans = counted(plans, data)
    step = StepPlan.first(plans, data, shares=settings.share_micro_batches)
    memories = [step.largest.memory(stage, step.shared.machine) for stage in step.stages]
    several = settings.adapters is not None
    sections = [_adapter_table(step) if several else _parameters(step.shared), partition_lines(step.stages)]
    verdict_lines, fits = verdict(memories, step.shared)
    memory = [*memory_lines(step, memories), *verdict_lines]
    if several:
        sections += [memory, _one_more(step)]
    else:
        sections.append([*memory, *_decoding(step.shared, data)])
    sections += [message_lines(step), *speed_lines(step)]
    sections.append(_shared_batches(step) if several else _batches(step, data))
    if data:
        sections += [_data_table(step, data) if several else _data(step.shared, data), *_samples(step, data)]
    else:
        sections.append(no_data_lines(step.shared))
    return DryRunReport("\n\n".join("\n".join(map(printable, section)) for section in sections), fits)


def _samples(step: StepPlan, data: Data) -> list[list[str]]:
    """The first sample of each adapter, once if it is the same for several."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, own in data.items():
        found.setdefault(tuple(_sample_lines(step.plans[name], own)), []).append(name)
    labels = {lines: ", ".join(filter(None, names)) for lines, names in found.items()}
    return [[f"{label and f'{label}: '}{lines[0]}", *lines[1:]] for lines, label in labels.items()]


def _sample_lines(plan: RunPlan, data: RunData) -> list[str]:
    """The first sample as text, with what is supervised."""
    ids, supervised = data.train.sample(0), data.train.supervised_of(0)
    edges = [0, *(np.flatnonzero(supervised[1:] != supervised[:-1]) + 1).tolist(), len(ids)]
    lines = [f"first sample ({first_source(plan.settings, data)}), {len(ids)} tokens"]
    for start, stop in itertools.pairwise(edges):
        name = "supervised" if supervised[start] else "not supervised"
        lines.append(f"  [{name}, {stop - start} tokens]")
        lines += _indented(decode_ids(data.tokenizer, ids[start:stop].tolist()))
    return lines


def _indented(text: str) -> Iterable[str]:
    return (f"    {line}" for line in text.splitlines())


# One adapter, in full ------------------------------------------------------------------------------------------------


def _parameters(plan: RunPlan) -> list[str]:
    adapter, counts = plan.adapter, plan.adapter.num_trained()
    linears, total = ", ".join(target.name for target in adapter.targets), sum(counts.values())
    rows = [(name, " x ".join(map(str, adapter.shape(name))), f"{count:,}") for name, count in counts.items()]
    rows.append(("all", "", f"{total:,}"))
    comparison = []
    for other in ("lora", "vera"):
        same = sum(replace(adapter, method=other).num_trained().values())
        comparison.append((f"{other} of the same rank", "", f"{same:,}", f"({total / same:.2%} of it)"))
    base = ("frozen base", "", f"{num_base_parameters(plan.source.shape):,}")
    return [
        f"trained parameters: {adapter.method}, rank {adapter.rank}, {len(adapter.layers)} adapted layers ({linears})",
        *start_lines(plan.settings, plan.source),
        *aligned_lines([*rows, *comparison, base], align="<<><", indent="  "),
    ]


def _decoding(plan: RunPlan, data: Data) -> list[str]:
    """A line on the memory of decoding, if the run decodes anything."""
    sets = [part for own in data.values() for part in (own.scored, own.scored_validation) if part is not None]
    if not sets:
        return []
    longest, batch = max(len(prompt) for part in sets for prompt in part.prompts), plan.settings.eval_batch_size
    size = max(cache_bytes(stage, sequences=batch, tokens=longest + plan.max_new_tokens) for stage in plan.stages)
    return [
        f"  decoding: up to {bytes_in_words(size)} of keys and values for {batch} prompts of up to {longest} tokens"
        f" with {plan.max_new_tokens} new ones (--eval_batch_size, --max_new_tokens)"
    ]


def _batches(step: StepPlan, data: Data) -> list[str]:
    ((name, plan),) = step.plans.items()
    b, steps, batch = plan.batches, plan.settings.max_steps, step.batch(name)
    lines = [
        "batches",
        f"  global batch {count_text(b.global_batch_size, 'sample')}, {plan.batches_in_words}",
        f"  {count_text(steps, 'step')}, {count_text(steps * b.global_batch_size, 'sample')}",
    ]
    if batch is None and plan.settings.epochs is not None:
        lines[-1] = f"  --epochs {plan.settings.epochs:g}: its steps are counted from data, and none is read"
    if batch is not None:
        lines.append(_fill(plan, data[name], batch))
    elif plan.settings.packing:
        lines.append(
            f"  samples of {plan.settings.max_length:,} tokens make {count_text(b.accumulation_steps, 'micro-batch')}"
            " per data-parallel rank, shorter samples make fewer"
        )
    return lines


def _fill(plan: RunPlan, data: RunData, step: GlobalBatch) -> str:
    """A line on how many positions of the first step hold a token."""
    positions = num_positions(data.train, step.micro_batches, pad_multiple=plan.layout.pad_multiple)
    num_rows = sum(len(rows) for rows in step.micro_batches)
    micro_batches = count_text(len(step.micro_batches), "micro-batch")
    return (
        f"  step 1: {step.num_tokens:,} tokens in {count_text(num_rows, 'row')} of {micro_batches},"
        f" {1 - step.num_tokens / positions:.1%} of the {positions:,} positions are padding"
    )


def _data(plan: RunPlan, data: Data) -> list[str]:
    (own,) = data.values()
    header = ("", "samples", "tokens", "supervised", "longest", "cut")
    rows = [(name, *_counts(part)) for name, part in (("train", own.train), ("validation", own.validation))]
    return [
        f"data: {plan.settings.task}",
        *aligned_lines([header, *rows], indent="  "),
        f"  the run sees the training part {epochs_of(plan.settings, len(own.train)):.2f} times",
        *(f"  {line}" for line in own.notes),
        *(f"  warning: {warning}" for warning in own.warnings(plan)),
    ]


def _counts(part: TokenDataset) -> list[str]:
    """Samples, tokens, supervised tokens, the longest sample, and prompts that are cut."""
    numbers = (len(part), part.num_tokens, part.num_supervised, part.longest, part.truncated_prompts)
    return [f"{number:,}" for number in numbers]


# Several adapters, a row for each ------------------------------------------------------------------------------------


def _adapter_table(step: StepPlan) -> list[str]:
    rows, counts = list[Sequence[str]](), list[int]()
    for number, (name, plan) in enumerate(step.plans.items()):
        adapter, batches = plan.adapter, plan.batches
        counts.append(sum(adapter.num_trained().values()))
        rows.append(
            [
                name,
                adapter.method,
                str(adapter.rank),
                ",".join(target.name for target in adapter.targets),
                ranges(adapter.layers),
                f"{counts[-1]:,}",
                f"{batches.global_batch_size} = {batches.micro_batch_size} x {batches.accumulation_steps} x"
                f" {batches.data_parallel}",
                f"{plan.settings.max_steps:,}",
                bytes_in_words(_own_bytes(step, number)),
            ]
        )
    header = ("adapter", "method", "rank", "linears", "layers", "trained", "batch", "steps", "bytes per rank")
    return [
        f"{count_text(len(rows), 'adapter')}: {sum(counts):,} trained parameters on a frozen base of"
        f" {num_base_parameters(step.shape):,}",
        *aligned_lines([header, *rows], indent="  "),
        "  (batch: samples per step = rows of a micro-batch x micro-batches x data-parallel ranks; bytes per rank: its"
        " tensors, gradients and moments on the rank that holds most)",
    ]


def _own_bytes(step: StepPlan, adapter: int) -> int:
    return max(bank_bytes(stage.parts[adapter]) for stage in step.stages)


def _one_more(step: StepPlan) -> list[str]:
    """Extra memory for one more copy of the largest adapter."""
    number = max(range(len(step.plans)), key=lambda number: _own_bytes(step, number))
    name, machine = list(step.plans)[number], step.shared.machine
    again = f"{name} again"  # a blank is in no adapter's name
    samples = None if step.samples is None else {**step.samples, again: step.samples[name]}
    more = replace(step, plans={**step.plans, again: step.plans[name]}, samples=samples)
    before, after = ([run.largest.memory(stage, machine).allocated for stage in run.stages] for run in (step, more))
    added = max(new - old for new, old in zip(after, before, strict=True))
    line = (
        f"  like {name}: {bytes_in_words(added)} per rank, {bytes_in_words(_own_bytes(step, number))} of them its"
        " tensors, gradients and moments"
    )
    if added > _own_bytes(step, number):
        line += "; the rest are its factors, and tokens where micro-batches have room for more"
    return ["one more adapter", line]


def _shared_batches(step: StepPlan) -> list[str]:
    shapes = step.batches.shapes
    apart = sum(len(shape.shares) for shape in shapes)
    lines = [
        "batches",
        f"  step 1: {len(shapes):,} micro-batches on a data-parallel rank, which hold {apart:,} of single adapters;"
        f" {sum(shape.num_tokens for shape in shapes) / len(shapes):,.0f} positions each",
    ]
    if not step.shares_micro_batches:
        lines.append("  (--share_micro_batches false: each micro-batch has one adapter)")
    if step.samples is None and any(plan.settings.epochs is not None for plan in step.plans.values()):
        lines.append("  (the steps of --epochs are counted from data, and none is read)")
    return lines


def _data_table(step: StepPlan, data: Data) -> list[str]:
    rows, notes = [], []
    for name, own in data.items():
        settings, passes = step.plans[name].settings, epochs_of(step.plans[name].settings, len(own.train))
        rows.append([name, settings.task, *_counts(own.train), f"{len(own.validation):,}", f"{passes:.2f}"])
        notes += [f"  {name}: {note}" for note in own.notes]
        notes += [f"  warning: {name}: {warning}" for warning in own.warnings(step.plans[name])]
    header = ("adapter", "task", "samples", "tokens", "supervised", "longest", "cut", "validation", "passes")
    return [
        "data: training parts, validation samples, and how often a run sees its training part",
        *aligned_lines([header, *rows], indent="  "),
        *notes,
    ]
