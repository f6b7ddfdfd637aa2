"""The tables of --dry_run by stage, from what the planners predict: the cut, bytes per rank, and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_tiedlora.base.table import aligned_lines
from megatron_tiedlora.base.wording import bytes_in_words, count_text, time_text
from megatron_tiedlora.parallel.traffic import DATA, GROUPS, WORLD
from megatron_tiedlora.planning.links import RANKS_PER_NODE, Links
from megatron_tiedlora.planning.machines import Machine
from megatron_tiedlora.planning.memory import (
    StageMemory,
    eager_bytes,
    micro_batches_in_flight,
    num_communicators,
)
from megatron_tiedlora.planning.saved import token_bytes
from megatron_tiedlora.planning.stages import StagePlan
from megatron_tiedlora.planning.step_time import planned_seconds
from megatron_tiedlora.planning.traffic import STOP_VOTES_BYTES, engine_bytes, step_traffic
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.step import LONG_STEP_SECONDS
from megatron_tiedlora.training.step_plan import StepPlan

Stages = Sequence[StagePlan]


def partition_lines(stages: Stages) -> list[str]:
    """The layers, work and base weights of each stage."""
    shape, layout = stages[0].shape, stages[0].layout
    cut = "" if layout.tp_size == 1 else f", {'' if layout.sequence_parallel else 'no '}sequence parallelism"
    rows = []
    for stage in stages:
        names = ["embedding"] * stage.is_first + [ranges(stage.blocks)] + ["head"] * stage.is_last
        rows.append(
            [
                " + ".join(names),
                f"{stage.cost_share:.1%}",
                ranges(stage.adapted) or "none",
                bytes_in_words(stage.full_base_bytes),
            ]
        )
    return [
        f"layout: {count_text(layout.world_size, 'rank')} = tensor {layout.tp_size}{cut} x pipeline {layout.pp_size}"
        f" x data {layout.dp_size}, {count_text(shape.num_layers, 'layer')}",
        *stage_table(("layers", "work", "adapted", "base weights of the stage"), rows),
    ]


def memory_lines(step: StepPlan, memories: Sequence[StageMemory]) -> list[str]:
    """The bytes of a rank of each stage, by purpose, with notes."""
    stages, shape, layout, largest = step.stages, step.shape, step.layout, step.largest
    micro_batches = f"{layout.rows} x {largest.tokens // layout.rows} tokens"
    if layout.named:
        most = count_text(max(map(len, largest.owners)), "adapter")
        micro_batches = f"{largest.tokens:,} tokens of up to {most} at step 1"
    # what all quantised weights of a rank share
    shared, cells = "one transposed" if layout.products and layout.on_gpu else "one dequantised", []
    for stage, memory in zip(stages, memories, strict=True):
        sizes = {
            "base weights": memory.base,
            **({shared: memory.dequantised} if memory.dequantised else {}),
            "adapters" if layout.named else "adapter": memory.adapter,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "activations": memory.activations,
            **({"engine": memory.engine} if layout.pp_size > 1 or memory.engine else {}),
            **({"buffers": memory.buffers} if any(one.buffers for one in memories) else {}),
            "CUDA, NCCL" if layout.on_gpu else "process": memory.libraries,
            "allocator": memory.slack,
            "sum": memory.total,
        }
        cells.append([*map(bytes_in_words, sizes.values()), str(micro_batches_in_flight(stage))])
    header = (*sizes, "in flight")
    saved = max(token_bytes(shape, layout, adapter).saved for adapter in range(len(layout.adapters)))
    return [
        f"bytes per rank, ZeRO-{layout.zero_stage}, {count_text(layout.dp_size, 'data-parallel rank')}, micro-batches"
        f" of up to {micro_batches}, on {'GPUs' if layout.on_gpu else 'CPUs'}",
        *stage_table(header, cells),
        f"  (a block saves {saved / 1e3:,.1f} kB per token of each micro-batch"
        " in flight; the last block saves less, as its MLP runs its backward pass at once)",
        *_base_line(stages),
        _kernels_line(stages[0], tokens=step.largest.tokens),
        *_engine_line(stages[0]),
        *_reserves_lines(stages, step.shared.machine),
    ]


def _base_line(stages: Stages) -> list[str]:
    """The note on the base weights if they are quantised."""
    layout = stages[0].layout
    if layout.base_format is None:
        return []
    sizes = sorted({stage.quantised_bytes for stage in stages})
    words = " to ".join(bytes_in_words(size) for size in sizes[:: max(1, len(sizes) - 1)])
    kept = " with transposed copies" if layout.keep_transposed else ""
    how = "each is dequantised just before its matmul, in memory that all of them share"
    if layout.products and layout.on_gpu:
        how = "they are multiplied in fp8"
        how += "" if kept else ", in the backward pass by a transposed copy, in memory that all of them share"
    return [
        f"  (base weights: {words} of them before ZeRO are the linears of the blocks in {layout.base_format}{kept};"
        f" {how})"
    ]


def _kernels_line(stage: StagePlan, *, tokens: int) -> str:
    """A line on the temporary bytes of kernels that are not compiled."""
    size = eager_bytes(stage.shape, stage.layout, tokens)
    if not size:
        return "  (compiled kernels are assumed; --compile false shows the activations of a node without a compiler)"
    return f"  (kernels that are not compiled need {bytes_in_words(size)} of the activations for a moment)"


def _reserves_lines(stages: Stages, machine: Machine) -> list[str]:
    """The notes on the columns that are no counts but reserves of a machine."""
    counts = sorted({num_communicators(stage) for stage in stages})
    context, each = bytes_in_words(machine["context"]), bytes_in_words(machine["communicator"])
    words = f"process: a reserve of {context} for Python and its libraries"
    if stages[0].layout.on_gpu:
        number = " to ".join(map(str, counts[:: max(1, len(counts) - 1)]))
        words = f"CUDA, NCCL: a reserve outside PyTorch, {context} of context and {each} for each of {number}"
        words += " communicators"
    slack = f"allocator: a reserve of {machine['slack']:.0%} for what it cannot use"
    return [f"  ({words}; {slack}; constants of {machine.name})"]


def no_data_lines(plan: RunPlan) -> list[str]:
    """The section on data of a dry run that reads none."""
    needed = "a model folder" if plan.source.folder is None else "--train_file or --task"
    length = plan.settings.max_length
    none = f"  (none is read, so every row has {length:,} tokens; give {needed} to count them)"
    return ["data", none, *(f"  warning: {excess}" for excess in plan.rank_excess)]


def verdict(memories: Sequence[StageMemory], plan: RunPlan) -> tuple[list[str], bool]:
    """With --gpu: a line on whether the fullest rank fits in that card, and whether it does; without --gpu it does."""
    if plan.settings.gpu is None:
        return [], True
    machine, fullest = plan.machine, max(memories, key=lambda memory: memory.total)
    words = f"  {machine.name}: the fullest rank needs {bytes_in_words(fullest.total)} of"
    words += f" {bytes_in_words(machine['memory'])}"
    if fullest.total <= machine["memory"]:
        return [f"{words}: it fits"], True
    size, name = max((size, name) for name, size in fullest._asdict().items())
    return [f"{words}: IT DOES NOT FIT; {name} {bytes_in_words(size)}"], False


def speed_lines(step: StepPlan) -> list[list[str]]:
    """With --gpu: the planned time of a step, by what it is spent on."""
    plan = step.shared
    if plan.settings.gpu is None:
        return []
    links = Links(step.layout, RANKS_PER_NODE)
    spent = planned_seconds(step.stages, step.batches, links, plan.machine)
    rate = step.work.tokens / spent.total / plan.grid.world_size
    return [
        [
            f"speed on {plan.machine.name}, planned and not measured, {RANKS_PER_NODE} ranks in a node",
            f"  a step takes {time_text(spent.total)}: {rate:,.0f} tokens/s of each rank",
            f"  {shares_text(spent._asdict())}",
        ]
    ]


def shares_text(spent: Mapping[str, float]) -> str:
    """What a planned step is spent on, as shares of it."""
    total = sum(spent.values())
    return ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in spent.items() if seconds)


def _engine_line(stage: StagePlan) -> list[str]:
    """The note on the table's column `engine`."""
    layout = stage.layout
    if layout.zero_stage == 3 and layout.dp_size > 1:
        return [
            "  (engine: base weights that ZeRO-3 holds gathered, more with a larger stage3_max_live_parameters in"
            " --ds_config)"
        ]
    if layout.pp_size == 1:
        return []
    kilobytes = 2 * token_bytes(stage.shape, layout).hidden / 1e3
    return [
        f"  (engine: hidden states that DeepSpeed's pipeline holds, up to {kilobytes:,.1f} kB per token of each"
        " micro-batch in flight)"
    ]


def message_lines(step: StepPlan) -> list[str]:
    """The messages of a rank of each stage by group. Bytes are those of whole tensors, as parallel.traffic counts."""
    stages, layout, micro_batches = step.stages, step.layout, step.batches.shapes
    of = "step 1's samples on data-parallel rank 0"
    of = of if step.samples is not None else f"samples of {layout.length:,} tokens, all supervised"
    lines = [f"messages and bytes per step and rank: {of}"]
    if layout.world_size == 1:
        return [*lines, "  none: one rank sends nothing"]
    traffic = [step_traffic(stage, micro_batches) for stage in stages]
    groups = [group for group in GROUPS if any(found.of_group(group)[0] for found in traffic)]
    of_engine = layout.dp_size > 1 and (layout.engine_steps or layout.zero_stage == 3)
    header = ["all ranks" if group == WORLD else group for group in groups]
    rows = []
    for stage, found in zip(stages, traffic, strict=True):
        sent = [found.of_group(group) for group in groups]
        rows.append([f"{count:,} / {bytes_in_words(size)}" for count, size in sent])
        if of_engine:
            rows[-1].append(f"at most {bytes_in_words(engine_bytes(stage, num_micro_batches=len(micro_batches)))}")
    lines += stage_table([*header, *([DATA if layout.engine_steps else "DeepSpeed"] * of_engine)], rows)
    lines.append("  (bytes are of whole tensors; the checks of the first steps send a little more)")
    if of_engine and not layout.engine_steps:
        lines.append("  (DeepSpeed: the base weights that ZeRO-3 gathers over data-parallel ranks)")
    elif of_engine:
        lines.append("  (data: only DeepSpeed sends in this group, and it chooses the number of messages)")
    if layout.pp_size == 1 and len(micro_batches) > 1:
        lines.append(
            f"  (if steps take longer than {LONG_STEP_SECONDS:.0f} s, all ranks send {len(micro_batches) - 1:,} more"
            f" messages of {STOP_VOTES_BYTES} B, to stop in time)"
        )
    return lines


def stage_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """One line for each stage; neighbours with equal cells share a line."""
    labels: list[tuple[int, int]] = []
    for index, row in enumerate(rows):
        if index and list(row) == list(rows[index - 1]):
            labels[-1] = (labels[-1][0], index)
        else:
            labels.append((index, index))
    stages = [[str(a) if a == b else f"{a}-{b}", *rows[a]] for a, b in labels]
    return aligned_lines([("stage", *header), *stages], indent="  ")


def ranges(numbers: Sequence[int]) -> str:
    """1,2,3,5 -> 1-3,5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
