"""--dry_run: a report on a run without starting it. It needs no weights; presets need no files at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.wording import bytes_in_words
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.loader import GlobalBatch, num_positions
from megatron_tiedlora.data.text_ids import decode_ids
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.parallel.traffic import DATA, GROUPS, WORLD
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.memory import (
    COMMUNICATOR_BYTES,
    CONTEXT_BYTES,
    cache_bytes,
    eager_bytes,
    micro_batches_in_flight,
    num_communicators,
    stage_memory,
)
from megatron_tiedlora.planning.micro_batches import assumed_micro_batches
from megatron_tiedlora.planning.saved import token_bytes
from megatron_tiedlora.planning.traffic import STOP_VOTES_BYTES, engine_bytes, step_traffic
from megatron_tiedlora.training.init_from import start_lines
from megatron_tiedlora.training.length import epochs_of
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.run_data import RunData, first_source, prepare_data
from megatron_tiedlora.training.step import LONG_STEP_SECONDS


def dry_run_report(settings: Settings, *, launched_ranks: int = 1) -> str:
    """The whole report as text, for --world_size ranks or else for as many as were launched.

    Raises:
        UserError: as the run itself would.
    """
    plan = plan_run(settings, rank=0, world_size=settings.world_size or launched_ranks, weights=False)
    sections = [_parameters(plan), _partition(plan)]
    if plan.source.folder is None:
        no_data = ["data", "  (a preset shape has no tokenizer; give a model folder to count tokens)"]
        sections += [_memory(plan), _messages(plan), _batches(plan), no_data]
    else:
        data = prepare_data(plan)
        plan = plan.counted(len(data.train))
        first = FirstStep(data, plan.global_batch(data.train))
        sections += [_memory(plan, first), _messages(plan, first), _batches(plan, first)]
        sections += [_data(plan, data), _sample(plan, data)]
    return "\n\n".join("\n".join(map(printable, section)) for section in sections)


@dataclass(frozen=True)
class FirstStep:
    """The data of a run, and the plan of its first step."""

    data: RunData
    batch: GlobalBatch


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


def _partition(plan: RunPlan) -> list[str]:
    grid, layout = plan.grid, plan.layout
    cut = "" if grid.tp_size == 1 else f", {'' if layout.sequence_parallel else 'no '}sequence parallelism"
    rows = []
    for stage in plan.stages:
        names = ["embedding"] * stage.is_first + [_ranges(stage.blocks)] + ["head"] * stage.is_last
        rows.append(
            [
                " + ".join(names),
                f"{stage.cost_share:.1%}",
                _ranges(stage.adapted) or "none",
                bytes_in_words(stage.full_base_bytes),
            ]
        )
    return [
        f"layout: {grid.world_size} ranks = tensor {grid.tp_size}{cut} x pipeline {grid.pp_size} x data {grid.dp_size},"
        f" {plan.source.shape.num_layers} layers",
        *_stage_table(("layers", "work", "adapted", "base weights of the stage"), rows),
    ]


def _memory(plan: RunPlan, first: FirstStep | None = None) -> list[str]:
    layout, packing = plan.layout, plan.settings.packing
    longest = layout.length if first is None else first.data.train.longest
    length = padded(layout.length if packing else longest, layout.pad_multiple)
    documents = layout.rows
    if first is not None and packing:  # a micro-batch's samples, and the padding of each row
        documents = max(sum(map(len, rows)) + len(rows) for rows in first.batch.micro_batches)
    else:
        longest = length
    cells = []
    for stage in plan.stages:
        memory = stage_memory(stage, tokens=layout.rows * length, documents=documents, longest=longest)
        sizes = {
            "base weights": memory.base,
            **({_shared_memory(layout): memory.dequantised} if memory.dequantised else {}),
            "adapter": memory.adapter,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            **({"engine": memory.engine} if layout.pp_size > 1 or memory.engine else {}),
            **({"CUDA, NCCL": memory.libraries} if layout.on_gpu else {}),
            "sum": memory.total,
        }
        cells.append([*map(bytes_in_words, sizes.values()), str(micro_batches_in_flight(stage))])
    header = (*sizes, "in flight")
    return [
        f"bytes per rank, ZeRO-{layout.zero_stage}, {layout.dp_size} data-parallel ranks, micro-batches of"
        f" up to {layout.rows} x {length} tokens, on {'GPUs' if layout.on_gpu else 'CPUs'}",
        *_stage_table(header, cells),
        f"  (a block saves {token_bytes(plan.source.shape, layout).saved / 1e3:,.1f} kB per token of each micro-batch"
        " in flight; the last block saves less, as its MLP runs its backward pass at once)",
        *_base_line(plan),
        _kernels_line(plan, tokens=layout.rows * length),
        *_engine_line(plan),
        *_libraries_line(plan),
        *([] if first is None else _decoding(plan, first.data)),
    ]


def _shared_memory(layout: Layout) -> str:
    """What the memory holds that all quantised weights of a rank share."""
    return "one transposed" if layout.products and layout.on_gpu else "one dequantised"


def _base_line(plan: RunPlan) -> list[str]:
    """The note on the base weights if they are quantised."""
    if plan.layout.base is None:
        return []
    sizes = sorted({stage.quantised_bytes for stage in plan.stages})
    words = " to ".join(bytes_in_words(size) for size in sizes[:: max(1, len(sizes) - 1)])
    kept = " with transposed copies" if plan.layout.keep_transposed else ""
    how = "each is dequantised just before its matmul, in memory that all of them share"
    if plan.layout.products and plan.layout.on_gpu:
        how = "they are multiplied in fp8"
        how += "" if kept else ", in the backward pass by a transposed copy, in memory that all of them share"
    return [
        f"  (base weights: {words} of them before ZeRO are the linears of the blocks in {plan.layout.base}{kept};"
        f" {how})"
    ]


def _kernels_line(plan: RunPlan, *, tokens: int) -> str:
    """A line on the temporary bytes of kernels that are not compiled."""
    size = eager_bytes(plan.source.shape, plan.layout, tokens)
    if not size:
        return "  (compiled kernels are assumed; --compile false shows the activations of a node without a compiler)"
    return f"  (kernels that are not compiled need {bytes_in_words(size)} of the activations for a moment)"


def _libraries_line(plan: RunPlan) -> list[str]:
    """The note on the table's column `CUDA, NCCL`."""
    if not plan.on_gpu:
        return []
    counts = sorted({num_communicators(stage) for stage in plan.stages})
    return [
        f"  (CUDA, NCCL: estimates of memory outside PyTorch, {bytes_in_words(CONTEXT_BYTES)} of context and"
        f" {bytes_in_words(COMMUNICATOR_BYTES)} for each of {' to '.join(map(str, counts[:: max(1, len(counts) - 1)]))}"
        " communicators)"
    ]


def _engine_line(plan: RunPlan) -> list[str]:
    """The note on the table's column `engine`."""
    if plan.layout.zero_stage == 3 and plan.layout.dp_size > 1:
        return [
            "  (engine: base weights that ZeRO-3 holds gathered, more with a larger stage3_max_live_parameters in"
            " --ds_config)"
        ]
    if plan.layout.pp_size == 1:
        return []
    kilobytes = 2 * token_bytes(plan.source.shape, plan.layout).hidden / 1e3
    return [
        f"  (engine: hidden states that DeepSpeed's pipeline holds, up to {kilobytes:,.1f} kB per token of each"
        " micro-batch in flight)"
    ]


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


def _messages(plan: RunPlan, first: FirstStep | None = None) -> list[str]:
    """The messages of a rank of each stage by group. Bytes are those of whole tensors, as parallel.traffic counts."""
    if first is None:
        shapes, of = assumed_micro_batches(plan.layout), f"samples of {plan.layout.length:,} tokens, all supervised"
    else:
        shapes = plan.micro_batches(first.data.train, first.batch)
        of = "step 1's samples on data-parallel rank 0"
    lines = [f"messages and bytes per step and rank: {of}"]
    if plan.grid.world_size == 1:
        return [*lines, "  none: one rank sends nothing"]
    traffic = [step_traffic(stage, shapes) for stage in plan.stages]
    groups = [group for group in GROUPS if any(found.of_group(group)[0] for found in traffic)]
    rows = []
    for stage, found in zip(plan.stages, traffic, strict=True):
        sent = [found.of_group(group) for group in groups]
        at_most = engine_bytes(stage, num_micro_batches=len(shapes))
        rows.append([f"{count:,} / {bytes_in_words(size)}" for count, size in sent])
        rows[-1] += [f"at most {bytes_in_words(at_most)}"] * (plan.grid.dp_size > 1)
    header = ["all ranks" if group == WORLD else group for group in groups] + [DATA] * (plan.grid.dp_size > 1)
    lines += _stage_table(header, rows)
    lines.append("  (bytes are of whole tensors; the checks of the first steps send a little more)")
    if plan.grid.dp_size > 1:
        lines.append("  (data: only DeepSpeed sends in this group, and it chooses the number of messages)")
    if plan.grid.pp_size == 1 and len(shapes) > 1:
        lines.append(
            f"  (if steps take longer than {LONG_STEP_SECONDS:.0f} s, all ranks send {len(shapes) - 1:,} more messages"
            f" of {STOP_VOTES_BYTES} B, to stop in time)"
        )
    return lines


def _stage_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each stage; neighbours with equal cells share a line."""
    labels: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if index and list(row) == list(rows[index - 1]):
            labels[-1] = (labels[-1][0], index)
        else:
            labels.append((index, index))
    lines = [["stage", *header]]
    lines += [[str(a) if a == b else f"{a}-{b}", *rows[a]] for a, b in labels]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        f"  {line[0]:<{widths[0]}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """1,2,3,5 -> 1-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _batches(plan: RunPlan, first: FirstStep | None = None) -> list[str]:
    b = plan.batches
    lines = [
        "batches",
        f"  global batch {b.global_batch_size} samples, {plan.batches_in_words}",
        f"  {plan.settings.max_steps} steps, {plan.settings.max_steps * b.global_batch_size:,} samples",
    ]
    if first is None and plan.settings.epochs is not None:
        lines[-1] = f"  --epochs {plan.settings.epochs:g}: its steps are counted from data, and a preset reads none"
    if first is not None:
        lines.append(_fill(plan, first))
    elif plan.settings.packing:
        lines.append(
            f"  samples of {plan.settings.max_length:,} tokens make {b.accumulation_steps:,} micro-batches per"
            " data-parallel rank, shorter samples make fewer"
        )
    return lines


def _fill(plan: RunPlan, first: FirstStep) -> str:
    """A line on how many positions of the first step hold a token."""
    step = first.batch
    positions = num_positions(first.data.train, step.micro_batches, pad_multiple=plan.layout.pad_multiple)
    num_rows = sum(len(rows) for rows in step.micro_batches)
    return (
        f"  step 1: {step.num_tokens:,} tokens in {num_rows} rows of {len(step.micro_batches)} micro-batches,"
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
    return [*lines, *(f"  warning: {warning}" for warning in data.warnings(plan.settings))]


def _sample(plan: RunPlan, data: RunData) -> list[str]:
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
