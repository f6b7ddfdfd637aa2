"""--dry_run: a report on a run without starting it. It needs no weights and no data; presets need no files at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.loader import GlobalBatch, num_positions
from megatron_tiedlora.data.text_ids import decode_ids
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.planning.memory import StageMemory, cache_bytes
from megatron_tiedlora.runtime.run_folder import choose_run_folder
from megatron_tiedlora.training.dry_run_tables import (
    DryRunReport,
    fits,
    memory_lines,
    message_lines,
    no_data_lines,
    partition_lines,
    speed_lines,
    verdict_lines,
)
from megatron_tiedlora.training.first_step import FirstStep
from megatron_tiedlora.training.init_from import start_lines
from megatron_tiedlora.training.length import epochs_of
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.run_data import RunData, first_source, prepare_data


def dry_run_report(settings: Settings, *, launched_ranks: int = 1) -> DryRunReport:
    """The whole report, for --world_size ranks or else for as many as were launched.

    Raises:
        UserError: as the run itself would.
    """
    plan = plan_run(settings, rank=0, world_size=settings.world_size or launched_ranks, weights=False)
    choose_run_folder(settings.output_dir, name=plan.name, resume=settings.resume)
    data = prepare_data(plan) if plan.reads_data else None
    plan = plan if data is None else plan.counted(len(data.train))
    first = FirstStep(plan, plan.layout, data)
    memories = [first.largest.memory(stage, plan.machine) for stage in plan.stages]
    sections = [_parameters(plan), partition_lines(plan.stages), _memory(first, memories)]
    sections += [message_lines(plan.stages, first, with_data=data is not None)]
    sections += [*speed_lines(first, plan.stages, plan), _batches(first)]
    sections += [no_data_lines(plan)] if data is None else [_data(plan, data), sample_lines(plan, data)]
    return DryRunReport.of(sections, fits=fits(memories, plan))


def _parameters(plan: RunPlan) -> list[str]:
    shape, adapter = plan.source.shape, plan.adapter
    linears = ", ".join(target.name for target in adapter.targets)
    layers = f"{len(adapter.layers)} adapted layers ({linears})"
    lines = [f"trained parameters: {adapter.method}, rank {adapter.rank}, {layers}"]
    lines += start_lines(plan.settings, plan.source)
    counts = adapter.num_trained()
    wide = max(map(len, counts))
    lines += [
        f"  {name:<{wide}}  {' x '.join(map(str, adapter.shape(name))):<22}{count:>15,}"
        for name, count in counts.items()
    ]
    lines.append(f"  {'all':<{wide + 24}}{sum(counts.values()):>15,}")
    for other in ("lora", "vera"):
        same = replace(adapter, method=other)
        total = sum(same.num_trained().values())
        name = f"{other} of the same rank"
        lines.append(f"  {name:<{wide + 24}}{total:>15,}   ({sum(counts.values()) / total:.2%} of it)")
    lines.append(f"  {'frozen base':<{wide + 24}}{num_base_parameters(shape):>15,}")
    return lines


def _memory(first: FirstStep, memories: Sequence[StageMemory]) -> list[str]:
    plan, largest, machine = first.plan, first.largest, first.plan.machine
    micro_batches = f"{first.layout.rows} x {largest.tokens // first.layout.rows} tokens"
    lines = memory_lines(plan.stages, memories, tokens=largest.tokens, micro_batches=micro_batches, machine=machine)
    lines += verdict_lines(memories, plan)
    return [*lines, *([] if first.data is None else _decoding(plan, first.data))]


def _decoding(plan: RunPlan, data: RunData) -> list[str]:
    """A line on the memory of decoding, if the run decodes anything."""
    sets = [part for part in (data.scored, data.scored_validation) if part is not None]
    if not sets:
        return []
    longest, batch = max(len(prompt) for part in sets for prompt in part.prompts), plan.settings.eval_batch_size
    size = max(cache_bytes(stage, sequences=batch, tokens=longest + plan.max_new_tokens) for stage in plan.stages)
    return [
        f"  decoding: up to {bytes_in_words(size)} of keys and values for {batch} prompts of up to {longest} tokens"
        f" with {plan.max_new_tokens} new ones (--eval_batch_size, --max_new_tokens)"
    ]


def _batches(first: FirstStep) -> list[str]:
    plan, b, steps = first.plan, first.plan.batches, first.plan.settings.max_steps
    lines = [
        "batches",
        f"  global batch {count_text(b.global_batch_size, 'sample')}, {plan.batches_in_words}",
        f"  {count_text(steps, 'step')}, {count_text(steps * b.global_batch_size, 'sample')}",
    ]
    if first.data is None and plan.settings.epochs is not None:
        lines[-1] = f"  --epochs {plan.settings.epochs:g}: its steps are counted from data, and none is read"
    if first.data is not None and first.batch is not None:
        lines.append(_fill(plan, first.data, first.batch))
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


def _data(plan: RunPlan, data: RunData) -> list[str]:
    lines = [
        f"data: {plan.settings.task}",
        f"  {'':<12}{'samples':>10}{'tokens':>14}{'supervised':>14}{'longest':>10}{'cut':>8}",
    ]
    for name, split in (("train", data.train), ("validation", data.validation)):
        lines.append(
            f"  {name:<12}{len(split):>10,}{split.num_tokens:>14,}{split.num_supervised:>14,}"
            f"{split.longest:>10,}{split.truncated_prompts:>8,}"
        )
    lines.append(f"  the run sees the training part {epochs_of(plan.settings, len(data.train)):.2f} times")
    lines += (f"  {line}" for line in data.notes)
    return [*lines, *(f"  warning: {warning}" for warning in data.warnings(plan))]


def sample_lines(plan: RunPlan, data: RunData) -> list[str]:
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
