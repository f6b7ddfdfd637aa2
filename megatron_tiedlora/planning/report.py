"""Report the memory, messages and time of a layout as text, for a dry run and for `tiedlora plan --why`.

A dry run needs no weights and no data. A dry run of a preset model needs no files at all.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megatron_tiedlora.base.messages import (
    aligned_lines,
    amount_text,
    bytes_in_words,
    count_text,
    printable,
    range_text,
    time_text,
)
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data import encode, loader, sources
from megatron_tiedlora.data.splits import files_of
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.parallel.groups import DATA, GROUPS, WORLD
from megatron_tiedlora.planning import adapter_plans, machines, memory, run_plan, step_time
from megatron_tiedlora.planning.counted_steps import epochs_of
from megatron_tiedlora.planning.passes import STOP_VOTES_BYTES, engine_traffic, saved_per_token
from megatron_tiedlora.planning.planned import Planned, StepPlan
from megatron_tiedlora.runtime import run_folder, stopping


class DryRunReport(NamedTuple):
    """The text that a dry run prints, and whether the card of --gpu has enough memory (True without --gpu)."""

    text: str
    fits: bool


def dry_run_report(settings: Settings, *, launched_ranks: int = 1) -> DryRunReport:
    """Return the complete report for --world_size ranks, or for the launched ranks if this flag is not given.

    Raises:
        UserError: the run itself would raise the same error.
    """
    ranks = settings.world_size or launched_ranks
    plans = adapter_plans.plan_adapters(settings, rank=0, world_size=ranks, weights=False)
    adapter_plans.check_run_folders(settings, plans, run_folder.choose_run_folder(settings))
    data: adapter_plans.Data = {}
    if any(plan.reads_data for plan in plans.values()):
        data = adapter_plans.prepare_all_data(plans)
        plans = adapter_plans.counted(plans, data)
    step = StepPlan.first(plans, data, shares=settings.share_micro_batches)
    planned = Planned(step=step, layout=step.layout, machine=step.shared.machine)
    on_card = settings.gpu is not None
    partition, needed, *others = layout_sections(planned, on_card=on_card)
    needed += [] if step.layout.named else _decoding(step, data)
    sections = [_adapters(step), partition, needed, *_one_more(planned), *others, _batches(step, data)]
    sections += [_data(step, data), *_samples(step, data)]
    text = "\n\n".join("\n".join(map(printable, section)) for section in sections)
    return DryRunReport(text, planned.fits or not on_card)


def layout_sections(planned: Planned, *, on_card: bool = True) -> list[list[str]]:
    """Return the sections of a report about a layout: its stages, memory, messages, and time.

    Args:
        on_card: whether the user chose the machine. Otherwise the report omits the time and the memory limit.
    """
    sections = [partition_lines(planned), memory_lines(planned, judged=on_card), message_lines(planned)]
    return [*sections, *([time_lines(planned)] if on_card else [])]


# The adapters and their data -----------------------------------------------------------------------------------------


def _samples(step: StepPlan, data: adapter_plans.Data) -> list[list[str]]:
    """Return the first sample of each adapter, divided into supervised and other spans. Equal samples appear once."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, own in data.items():
        ids, supervised, settings = own.train.sample(0), own.train.supervised_of(0), step.plans[name].settings
        rows = sources.row_stream(get_task(settings.task), "train", files=files_of(settings), reading=own.reading)
        *_, (_, source) = next(itertools.islice(rows, own.first_row, None))
        edges = [0, *(np.flatnonzero(supervised[1:] != supervised[:-1]) + 1).tolist(), len(ids)]
        lines = [f"first sample ({source}), {len(ids)} tokens"]
        for start, stop in itertools.pairwise(edges):
            lines.append(f"  [{'supervised' if supervised[start] else 'not supervised'}, {stop - start} tokens]")
            lines += (f"    {line}" for line in encode.decode_ids(own.tokenizer, ids[start:stop].tolist()).splitlines())
        found.setdefault(tuple(lines), []).append(name)
    labels = {lines: ", ".join(filter(None, names)) for lines, names in found.items()}
    return [[f"{label and f'{label}: '}{lines[0]}", *lines[1:]] for lines, label in labels.items()]


def _adapters(step: StepPlan) -> list[str]:
    """Return a table of the trained tensors of a single adapter, or a table with one row per adapter."""
    base = f"{num_base_parameters(step.shape):,}"
    if not step.layout.named:
        adapter, plan = step.shared.adapter, step.shared
        counts, linears = adapter.num_trained(), ", ".join(target.name for target in adapter.targets)
        total = sum(counts.values())
        rows = [[name, " x ".join(map(str, adapter.shape(name))), f"{count:,}"] for name, count in counts.items()]
        rows.append(["all", "", f"{total:,}"])
        for other in ("lora", "vera"):
            same = sum(replace(adapter, method=other).num_trained().values())
            rows.append([f"{other} of the same rank", "", f"{same:,}", f"({total / same:.2%} of it)"])
        rows.append(["frozen base", "", base])
        return [
            f"trained parameters: {adapter.method}, rank {adapter.rank}, {len(adapter.layers)} adapted layers"
            f" ({linears})",
            *run_plan.start_lines(plan.settings, plan.source),
            *aligned_lines(rows, align="<<><", indent="  "),
        ]
    table, totals = list[Sequence[str]](), list[int]()
    for number, (name, plan) in enumerate(step.plans.items()):
        adapter, batches = plan.adapter, plan.batches
        totals.append(sum(adapter.num_trained().values()))
        parts = f"{batches.micro_batch_size} x {batches.accumulation_steps} x {batches.data_parallel}"
        linears = ",".join(target.name for target in adapter.targets)
        own_bytes = bytes_in_words(_own_bytes(step, number))
        batch_size, steps = f"{batches.global_batch_size} = {parts}", f"{plan.settings.max_steps:,}"
        of_adapter = adapter.method, str(adapter.rank), linears, ranges(adapter.layers), f"{totals[-1]:,}"
        table.append((name, *of_adapter, batch_size, steps, plan.rate_in_words, own_bytes))
    header = ("adapter", "method", "rank", "linears", "layers", "trained", "batch", "steps", "rate", "bytes per rank")
    return [
        f"{count_text(len(table), 'adapter')}: {sum(totals):,} trained parameters on a frozen base of {base}",
        *aligned_lines([header, *table], indent="  "),
        "  (batch: samples per step = rows of a micro-batch x micro-batches x data-parallel ranks; bytes per rank: its"
        " tensors, gradients and moments on the rank that holds most)",
    ]


def _decoding(step: StepPlan, data: adapter_plans.Data) -> list[str]:
    """Return a line about the memory of the key-value cache if the run generates answers, else an empty list."""
    plan = step.shared
    sets = [part for own in data.values() for part in (own.scored, own.scored_validation) if part is not None]
    if not sets:
        return []
    longest, batch = max(len(prompt) for part in sets for prompt in part.prompts), plan.settings.eval_batch_size
    tokens = longest + plan.max_new_tokens
    size = max(memory.cache_bytes(stage, sequences=batch, tokens=tokens) for stage in plan.stages)
    return [
        f"  decoding: up to {bytes_in_words(size)} of keys and values for {batch} prompts of up to {longest} tokens"
        f" with {plan.max_new_tokens} new ones (--eval_batch_size, --max_new_tokens)"
    ]


def _batches(step: StepPlan, data: adapter_plans.Data) -> list[str]:
    lines, counts_epochs = ["batches"], any(plan.settings.epochs is not None for plan in step.plans.values())
    for name, plan in () if step.layout.named else step.plans.items():
        number, steps = plan.batches.global_batch_size, plan.settings.max_steps
        lines.append(f"  global batch {count_text(number, 'sample')}, {plan.batches_in_words}")
        lines.append(f"  learning rate {plan.rate_in_words}")
        if data or not counts_epochs:
            lines.append(f"  {count_text(steps, 'step')}, {count_text(steps * number, 'sample')}")
        if step.samples is not None:
            dataset, batch = step.samples[name]
            positions = sum(loader.num_positions(dataset, batch.micro_batches, pad_multiple=step.layout.pad_multiple))
            rows = count_text(sum(map(len, batch.micro_batches)), "row")
            lines.append(
                f"  step 1: {batch.num_tokens:,} tokens in {rows} of"
                f" {count_text(len(batch.micro_batches), 'micro-batch')}, {1 - batch.num_tokens / positions:.1%} of the"
                f" {positions:,} positions are padding"
            )
        elif plan.settings.packing:
            most = count_text(plan.batches.accumulation_steps, "micro-batch")
            lines.append(
                f"  samples of {plan.settings.max_length:,} tokens make {most} per data-parallel rank, shorter samples"
                " make fewer"
            )
    if step.layout.named:
        shapes = step.batches
        apart, positions = sum(len(shape.adapters) for shape in shapes), sum(shape.num_tokens for shape in shapes)
        lines.append(
            f"  step 1: {len(shapes):,} micro-batches on a data-parallel rank, which hold {apart:,} of single"
            f" adapters; {positions / len(shapes):,.0f} positions each"
        )
        if not step.shares_micro_batches:
            lines.append("  (--share_micro_batches false: each micro-batch has one adapter)")
    if counts_epochs and not data:
        lines.append("  (the steps of --epochs are counted from data, and none is read)")
    return lines


def _data(step: StepPlan, data: adapter_plans.Data) -> list[str]:
    """Return a table of the data splits of each adapter. If the plan has no data, return a note instead."""
    if not data:
        shared = step.shared
        needed = "a model folder" if shared.source.folder is None else "--train_file or --task"
        length = shared.settings.max_length
        none = f"  (none is read, so every row has {length:,} tokens; give {needed} to count them)"
        return ["data", none, *(f"  warning: {excess}" for excess in shared.rank_excess)]
    rows, notes = [], []
    for name, own in data.items():
        plan, label = step.plans[name], name and f"{name}: "
        passes = f"{epochs_of(plan.settings, len(own.train)):.2f}"
        parts = ((name, plan.settings.task, "train"), own.train, passes), (("", "", "validation"), own.validation, "")
        for labels, part, seen in parts:
            numbers = (len(part), part.num_tokens, part.num_supervised, part.longest, part.truncated_prompts)
            rows.append([*labels, *(f"{number:,}" for number in numbers), seen])
        notes += [f"  {label}{note}" for note in own.notes]
        notes += [f"  warning: {label}{warning}" for warning in own.warnings(plan)]
    header = ("adapter", "task", "part", "samples", "tokens", "supervised", "longest", "cut", "passes")
    first = 0 if step.layout.named else 1
    table = aligned_lines([row[first:] for row in (header, *rows)], indent="  ")
    return ["data, and how often a run sees its training part", *table, *notes]


def _own_bytes(step: StepPlan, adapter: int) -> int:
    return max(memory.group_bytes(stage.parts[adapter]) for stage in step.stages)


def _one_more(planned: Planned) -> list[list[str]]:
    """Return a section about the memory that another adapter as large as the largest needs; [] without --adapters."""
    step = planned.step
    if not step.layout.named:
        return []
    number = max(range(len(step.plans)), key=lambda number: _own_bytes(step, number))
    name = list(step.plans)[number]
    again = f"{name} again"  # unique, as adapter names have no blanks
    samples = None if step.samples is None else {**step.samples, again: step.samples[name]}
    grown = replace(step, plans={**step.plans, again: step.plans[name]}, samples=samples)
    more = Planned(step=grown, layout=grown.layout, machine=planned.machine)
    before, after = ([one.memory(stage.index).allocated for stage in one.stages] for one in (planned, more))
    added = max(new - old for new, old in zip(after, before, strict=True))
    line = (
        f"  like {name}: {bytes_in_words(added)} per rank, {bytes_in_words(_own_bytes(step, number))} of them its"
        " tensors, gradients and moments"
    )
    if added > _own_bytes(step, number):
        line += "; the rest are its factors, and tokens where micro-batches have room for more"
    return [["one more adapter", line]]


# The layout ----------------------------------------------------------------------------------------------------------


def partition_lines(planned: Planned) -> list[str]:
    """Return a table with the layers of each stage, its fraction of the work, and its base weights."""
    shape, layout = planned.step.shape, planned.layout
    cut = "" if layout.tp_size == 1 else f", {'' if layout.sequence_parallel else 'no '}sequence parallelism"
    cut += ", micro-batches in two halves" if layout.overlap else ""
    rows = []
    for stage in planned.stages:
        names = ["embedding"] * stage.is_first + [ranges(stage.blocks)] + ["head"] * stage.is_last
        adapted = ranges(sorted({layer for part in stage.parts for layer in part.layers})) or "none"
        rows.append([" + ".join(names), f"{stage.cost_share:.1%}", adapted, bytes_in_words(stage.full_base_bytes)])
    return [
        f"layout: {count_text(layout.world_size, 'rank')} = tensor {layout.tp_size}{cut} x pipeline {layout.pp_size}"
        f" x data {layout.dp_size}, {count_text(shape.num_layers, 'layer')}",
        *stage_table(("layers", "work", "adapted", "base weights of the stage"), rows),
    ]


def memory_lines(planned: Planned, *, judged: bool) -> list[str]:
    """Return a table of the memory per rank of each stage, by purpose, and notes about it.

    Args:
        judged: whether to add a line that states whether the machine's memory is large enough.
    """
    layout, stages, largest = planned.layout, planned.stages, planned.step.largest
    micro_batches = f"{layout.rows} x {largest.tokens // layout.rows} tokens"
    if layout.named:
        most = count_text(max(map(len, largest.adapters)), "adapter")
        micro_batches = f"{largest.tokens:,} tokens of up to {most} at step 1"
    memories = [planned.memory(stage.index) for stage in stages]
    names = {
        "base": "base weights",
        # the column for the buffer that all quantised weights of a rank share
        "dequantised": "one transposed" if layout.storage.products and layout.on_gpu else "one dequantised",
        "adapter": "adapters" if layout.named else "adapter",
        "libraries": "CUDA, NCCL" if layout.on_gpu else "process",
        "slack": "allocator",
    }
    seldom = {"dequantised", "engine", "buffers"}
    shown = [name for name in memories[0]._fields if name not in seldom or any(getattr(one, name) for one in memories)]
    cells = [
        [*(bytes_in_words(getattr(needed, name)) for name in shown), bytes_in_words(needed.total)]
        + [str(memory.micro_batches_in_flight(stage))]
        for stage, needed in zip(stages, memories, strict=True)
    ]
    lines = [
        f"bytes per rank, ZeRO-{layout.zero_stage}, {count_text(layout.dp_size, 'data-parallel rank')}, micro-batches"
        f" of up to {micro_batches}, on {'GPUs' if layout.on_gpu else 'CPUs'}",
        *stage_table([*(names.get(name, name) for name in shown), "sum", "in flight"], cells),
        *(f"  ({note})" for note in _memory_notes(planned)),
    ]
    if judged:
        (_, fullest), room = planned.fullest, planned.capacity
        size, name = max((size, name) for name, size in fullest._asdict().items())
        fits = "it fits" if fullest.total <= room else f"IT DOES NOT FIT; {name} {bytes_in_words(size)}"
        needs = f"{bytes_in_words(fullest.total)} of {bytes_in_words(room)}"
        lines.append(f"  {planned.machine.name}: the fullest rank needs {needs}: {fits}")
    return lines


def _memory_notes(planned: Planned) -> Iterator[str]:
    """Yield notes about the columns of the memory table. The last columns are estimates for a machine, not counts."""
    layout, stages, machine = planned.layout, planned.stages, planned.machine
    saved = saved_per_token(planned.step.shape, layout)
    yield (
        f"a block saves {saved / 1e3:,.1f} kB per token of each micro-batch in flight; the last block saves less, as"
        " its MLP runs its backward pass at once"
    )
    if layout.storage.base is not None:
        sizes = range_text([stage.quantised_bytes for stage in stages], bytes_in_words)
        kept = " with transposed copies" if layout.storage.keep_transposed else ""
        how = "each is dequantised just before its matmul, in memory that all of them share"
        if layout.storage.products and layout.on_gpu:
            how = "they are multiplied in fp8"
            how += "" if kept else ", in the backward pass by a transposed copy, in memory that all of them share"
        yield (
            f"base weights: {sizes} of them before ZeRO are the linears of the blocks in {layout.storage.base}{kept};"
            f" {how}"
        )
    if eager := memory.eager_bytes(stages[0], planned.step.largest.tokens):
        yield f"kernels that are not compiled need {bytes_in_words(eager)} of the activations for a moment"
    else:
        yield "compiled kernels are assumed; --compile false shows the activations of a node without a compiler"
    if layout.zero_stage == 3 and layout.dp_size > 1:
        more = "more with a larger stage3_max_live_parameters in --ds_config"
        yield f"engine: base weights that ZeRO-3 holds gathered, {more}"
    elif layout.pp_size > 1:
        hidden = f"{2 * memory.hidden_bytes(stages[0]) / 1e3:,.1f} kB per token of each micro-batch in flight"
        yield f"engine: hidden states that DeepSpeed's pipeline holds, up to {hidden}"
    context, each = bytes_in_words(machine["context"]), bytes_in_words(machine["communicator"])
    reserve = f"process: a reserve of {context} for Python and its libraries"
    if layout.on_gpu:
        number = range_text([memory.num_communicators(stage) for stage in stages])
        reserve = f"CUDA, NCCL: a reserve outside PyTorch, {context} of context and {each} for each of {number}"
        reserve += " communicators"
    yield (
        f"{reserve}; allocator: a reserve of {machine['slack']:.0%} for what it cannot use; constants of {machine.name}"
    )


def time_lines(planned: Planned) -> list[str]:
    """Return lines with the predicted time of a step by purpose, and with all terms of the slowest stage's time."""
    spent, work, batches, parts = planned.seconds, planned.work, planned.step.batches, planned.parts
    index, passes = parts.busiest()
    batch = max(batches, key=lambda one: one.num_tokens)
    forward, backward = planned.pass_terms(index, batch)
    number, stages = count_text(len(batches), "micro-batch"), count_text(len(parts.stages), "stage")
    of_step = [
        (time_text(passes.total), f"both passes of {number}"),
        (time_text(spent.bubble), f"waiting: the schedule of {stages} and {number}, simulated"),
        *_terms(planned.sum_terms(index)),
        (time_text(spent.outside), "loader, agreements, optimizer"),
    ]
    first = f"stage {index} works longest; its forward pass of a micro-batch of {batch.num_tokens:,} tokens"
    tables = {first: [*_terms(forward)], "its backward pass": [*_terms(backward)], "in a step": of_step}
    times = iter(aligned_lines(list(itertools.chain(*tables.values())), align="><", indent="    "))
    return [
        f"speed on {planned.machine.name}, planned and not measured, {planned.per_node} ranks in a node",
        f"  a step of {work.tokens:,} tokens takes {time_text(spent.total)}: {planned.tokens_per_second:,.0f} tokens/s"
        f" of each rank, MFU {planned.mfu:.1%}",
        f"  {', '.join(f'{name} {part / spent.total:.1%}' for name, part in spent._asdict().items() if part)}",
        *(f"  {line}" for line in attention_lines(planned, "each rank")),
        *(line for title, rows in tables.items() for line in (f"  {title}", *itertools.islice(times, len(rows)))),
    ]


def attention_lines(planned: Planned, name: str) -> Iterator[str]:
    """Yield a line about the assumed attention kernel, and about the speed of layout `name` with the fastest one."""
    machine, kernel = planned.machine, machines.attention_of(planned.machine)
    if kernel is None or planned.dtype != "bf16":
        return
    assert machine.capability is not None, "only a GPU has a known attention kernel"
    known, where = machines.ATTENTION[machine.capability], "pip install of this project gives"
    where = "this computer has" if machines.is_here(machine) else where
    words = f"attention is planned by {kernel} ({known[kernel].value} of the peak), which {where}"
    if (other := machine.windowed) is not None:
        words += f", and in windows by {other.source.split(': ')[0]} ({other.value})"
    shape = planned.step.shape
    options = {"window": shape.window is not None, "cap": shape.heads.cap}
    faster = machines.faster_attention(machine.capability, kernel, head_dim=shape.heads.dim, **options)
    if faster is not None:
        share = known[faster.name]
        rate = f"{planned.changed({'attention.bf16': share}).tokens_per_second:,.0f} tokens/s"
        words += f"; with {faster.name} ({share.value}; {faster.install}) {name} would do {rate}"
    yield words


def _terms(terms: Iterable[step_time.Term]) -> Iterator[tuple[str, str]]:
    """Yield the time of each term, and a text that shows how this time is computed."""
    for term in (term for term in terms if term.seconds):
        rate = f": {amount_text(term.amount, term.unit)} / {amount_text(term.rate, term.unit)}/s" if term.rate else ""
        fixed = f" + {time_text(term.fixed)}" if term.rate and term.fixed else ""
        yield time_text(term.seconds), f"{term.label}{rate}{fixed}"


def message_lines(planned: Planned) -> list[str]:
    """Return a table of the messages that a rank of each stage sends in each process group.

    The sizes are those of full tensors, as in `parallel.groups`.
    """
    step, stages, layout, number = planned.step, planned.stages, planned.layout, len(planned.step.batches)
    of = "the step's samples on data-parallel rank 0"
    of = of if step.samples is not None else f"samples of {layout.length:,} tokens, all supervised"
    lines = [f"messages and bytes per step and rank: {of}"]
    if layout.world_size == 1:
        return [*lines, "  none: one rank sends nothing"]
    of_engine = layout.dp_size > 1 and (layout.engine_steps or layout.zero_stage == 3)
    sent = []
    for stage in stages:
        found = planned.traffic(stage.index, of_engine=False)
        sent.append({group: messages_text(*found.of_group(group)) for group in GROUPS if found.of_group(group)[0]})
        if of_engine:
            _, most = engine_traffic(stage, num_micro_batches=number).of_group(DATA)
            sent[-1][DATA if layout.engine_steps else "DeepSpeed"] = f"at most {bytes_in_words(most)}"
    lines += traffic_table(sent)
    lines.append("  (bytes are of whole tensors; the checks of the first steps send a little more)")
    if of_engine and not layout.engine_steps:
        lines.append("  (DeepSpeed: the base weights that ZeRO-3 gathers over data-parallel ranks)")
    elif of_engine:
        lines.append("  (data: only DeepSpeed sends in this group, and it chooses the number of messages)")
    if layout.pp_size == 1 and number > 1:
        lines.append(
            f"  (if steps take longer than {stopping.LONG_STEP_SECONDS:.0f} s, all ranks send {number - 1:,} more"
            f" messages of {STOP_VOTES_BYTES} B, to stop in time)"
        )
    return lines


def messages_text(number: int, size: float) -> str:
    """Return the number of messages and their total size as text."""
    return f"{number:,} / {bytes_in_words(size)}"


def traffic_table(sent: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a table of messages with one row per stage. `sent` contains the texts of each stage, by process group."""
    groups = [group for group in (*GROUPS, "DeepSpeed") if any(group in found for found in sent)]
    header = ["all ranks" if group == WORLD else group for group in groups]
    return stage_table(header, [[found.get(group, messages_text(0, 0)) for group in groups] for found in sent])


def stage_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table with one row per stage. Consecutive stages with equal cells share one row."""
    alike = itertools.groupby(enumerate(rows), key=lambda row: tuple(row[1]))
    stages = [[ranges([index for index, _ in some]), *cells] for cells, some in alike]
    return aligned_lines([("stage", *header), *stages], indent="  ")


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending integers as text. Consecutive integers become ranges, such as 1-3,5 for 1, 2, 3 and 5."""
    runs = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])  # the key is constant in a range
    found = ([number for _, number in run] for _, run in runs)
    return ",".join("-".join(dict.fromkeys(map(str, (run[0], run[-1])))) for run in found)
