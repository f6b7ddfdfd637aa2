"""Predict the time of a step from the counts of `passes` and the constants of a machine.

    step = the longest path through the passes of all stages + messages once per step + time outside passes

The time of a pass is the sum of its terms. Only three terms overlap with other terms: kernel launches by the host of a
GPU, gathers of ZeRO-3 with `overlap_comm`, and tensor-parallel messages with `--overlap halves`.

A pass starts once its rank has finished the previous pass and its input is ready. With 1F1B and p equal stages, each
stage is idle for (p - 1) / (m + p - 1) of a step of m micro-batches. The simulation here also handles unequal stages.

In a ring of n ranks, an all-gather or reduce-scatter of B bytes takes B (n - 1) / n divided by the bandwidth. An
all-reduce takes twice as long. A process group that spans nodes uses the network cards of all its ranks in a node, up
to the bandwidth inside a node. Each message has a fixed cost of `message` seconds.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base import messages, shapes
from megatron_tiedlora.parallel.groups import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, StagePlan
from megatron_tiedlora.planning.machines import Machine
from megatron_tiedlora.planning.passes import PassWork, StageWork, engine_traffic, once_traffic

# Links between ranks --------------------------------------------------------------------------------------------------


RANKS_PER_NODE = 8  # the default
_RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # how often a ring transfers (n - 1) / n of the bytes


class Term(NamedTuple):
    """One term of the time of a step: an amount of work divided by a rate, plus a constant.

    Attributes:
        purpose: a field of `step_time.Seconds`.
        label: the name that the output of `--why` shows.
        rate: the amount per second, in `unit`; 0 if the term takes only `fixed` seconds.
        fixed: the seconds that do not depend on the amount.
    """

    purpose: str
    label: str
    amount: float
    rate: float
    unit: str
    fixed: float = 0.0

    @property
    def seconds(self) -> float:
        """The time of the term in seconds."""
        return (self.amount / self.rate if self.rate else 0.0) + self.fixed


class Link(NamedTuple):
    """The link that carries the messages of a process group.

    Attributes:
        size: the number of ranks in the group.
        num_nodes: the number of nodes on which these ranks run.
        per_node: the maximum number of ranks of the group in a node.
    """

    size: int
    num_nodes: int
    per_node: int

    def term(self, kind: str, count: int, num_bytes: float, machine: Machine, *, purpose: str) -> Term:
        """Return the term for the time of `count` consecutive messages with `num_bytes` bytes in total."""
        carried = num_bytes * _RINGS[kind] * (self.size - 1) / self.size if kind in _RINGS else num_bytes
        label, fixed = f"{kind}, {messages.count_text(int(count), 'message')}", count * machine["message"]
        bandwidth = machine["node_bandwidth"] * machine["node_link"]  # per rank in one direction
        if self.num_nodes > 1:
            bandwidth = min(bandwidth, self.per_node * machine["network_bandwidth"] * machine["network_link"])
        return Term(purpose, label, carried, bandwidth, "B", fixed)


@dataclass(frozen=True)
class Links:
    """The links of all process groups of a layout on nodes with `ranks_per_node` ranks."""

    layout: Layout
    ranks_per_node: int

    @cached_property
    def by_group(self) -> dict[str, Link]:
        """The link of each process group except the pipeline group, by name."""
        layout = self.layout
        ranks = np.arange(layout.world_size).reshape(layout.pp_size, layout.dp_size, layout.tp_size)  # see `Grid`
        groups = {
            TENSOR: ranks[0, 0],
            DATA: ranks[0, :, 0],
            TIED: ranks[:, :, 0],
            STAGE: ranks[0],
            MODEL: ranks[:, 0],
            WORLD: ranks,
        }
        found = {}
        for group, members in groups.items():
            _, in_nodes = np.unique(members // self.ranks_per_node, return_counts=True)
            found[group] = Link(members.size, len(in_nodes), int(in_nodes.max()))
        return found

    def to_next(self, stage: int) -> Link:
        """Return the link from a stage to the next: the network if any rank of the stage sends to a different node."""
        width, per_node = self.layout.tp_size * self.layout.dp_size, self.ranks_per_node
        first = stage * width
        crosses = any(rank // per_node != (rank + width) // per_node for rank in (first, first + width - 1))
        return Link(2, 1 + crosses, 1)

    def terms(self, traffic: Traffic, machine: Machine, *, purpose: str) -> list[Term]:
        """Return the terms for the time of all messages except those between stages."""
        return [
            self.by_group[group].term(kind, traffic.messages[group, kind], size, machine, purpose=purpose)
            for (group, kind), size in traffic.bytes.items()
            if group != PIPELINE and self.by_group[group].size > 1
        ]


DTYPES = {1: "fp8", 2: "bf16", 4: "fp32"}  # by bytes per element
PERSISTENT = 100_000  # ZeRO-3 does not shard smaller parameters (elements); stage3_param_persistence_threshold


class Seconds(NamedTuple):
    """The seconds of a pass, of all passes of a stage, or of a step, by purpose.

    Attributes:
        matmuls: matmuls of the base and the adapter, recomputation included.
        attention: attention, recomputation included.
        elementwise: elementwise kernels: norms, gate, rotation, residuals, loss.
        dequantised: dequantising or transposing weights of a quantised base, and rounding inputs of FP8 matmuls.
        launches: kernel launches by the host that do not overlap with computation.
        tensor: messages of the tensor-parallel group.
        gathers: ZeRO-3 gathers of weights that do not overlap with computation.
        pipeline: messages with hidden states, and the overhead of DeepSpeed's pipeline instructions.
        bubble: waiting for other pipeline stages.
        sums: messages that ranks send once per step.
        outside: the remaining time of a step, outside its passes and messages.
    """

    matmuls: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    dequantised: float = 0.0
    launches: float = 0.0
    tensor: float = 0.0
    gathers: float = 0.0
    pipeline: float = 0.0
    bubble: float = 0.0
    sums: float = 0.0
    outside: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all fields."""
        return sum(self)

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "Seconds":
        """Return the total seconds of the terms, by purpose."""
        found = dict.fromkeys(cls._fields, 0.0)
        for term in terms:
            found[term.purpose] += term.seconds
        return cls(**found)


@dataclass(frozen=True)
class StepParts:
    """The times from which the time of a step is computed.

    Attributes:
        batches: the micro-batches in order.
        stages: the times of the forward and the backward pass, by stage and micro-batch.
        sums: the time of the messages that ranks send once per step.
        outside: see `Seconds`.
    """

    batches: Sequence[MicroBatchShape]
    stages: Sequence[Mapping[MicroBatchShape, tuple[Seconds, ...]]]
    sums: float
    outside: float

    def busiest(self) -> tuple[int, Seconds]:
        """Return the index of the stage whose passes take the longest, and the time of these passes."""
        firsts: dict[int, int] = {}
        for index, passes in enumerate(self.stages):  # stages with the same work share one object
            firsts.setdefault(id(passes), index)
        counts, spent = Counter(self.batches), {}
        for index in firsts.values():
            both = [np.sum(self.stages[index][batch], axis=0) for batch in counts]
            spent[index] = Seconds(*np.dot(list(counts.values()), both).tolist())
        return max(spent.items(), key=lambda item: item[1].total)


def stage_terms(work: StageWork, stage: StagePlan, links: Links, machine: Machine) -> tuple[list[Term], list[Term]]:
    """Return the terms for the time of the forward and of the backward pass of a micro-batch."""
    layout = stage.layout
    forward, backward, again = (pass_terms(each, layout, links, machine) for each in work)
    if layout.overlap:
        for terms in (forward, backward, again):
            terms.append(_hidden(terms, stage, machine))
    backward += [term._replace(label=f"{term.label}, recomputed") for term in again]
    gathers = []
    if layout.zero_stage == 3 and layout.dp_size > 1:  # a message for each sharded parameter
        gathered = engine_traffic(stage, num_micro_batches=1).bytes[DATA, "all-gather"] / 2  # two passes gather
        count = sum(number for tensor, number in stage.local_base.items() if tensor.size > PERSISTENT)
        gathers.append(links.by_group[DATA].term("all-gather", count, gathered, machine, purpose="gathers"))
    for terms, sent, neighbour in (
        (forward, work.forward.sent, stage.index),
        (backward, work.backward.sent, stage.index - 1),
    ):
        beside = []
        if layout.overlaps_gathers and gathers:  # a longer pass hides all gathers, a shorter one a part
            hidden = min(Seconds.of(terms).total, sum(term.seconds for term in gathers))
            beside.append(Term("gathers", "hidden behind the pass", 0.0, 0.0, "s", fixed=-hidden))
        terms += [*gathers, *beside]
        if layout.pp_size > 1:
            terms.append(Term("pipeline", "DeepSpeed's instructions", 0.0, 0.0, "", fixed=machine["instruction"]))
        if count := sent.messages[PIPELINE, "send"]:
            link, size = links.to_next(neighbour), sent.bytes[PIPELINE, "send"]
            terms.append(link.term("send", count, size, machine, purpose="pipeline"))
    return forward, backward


def pass_terms(work: PassWork, layout: Layout, links: Links, machine: Machine) -> list[Term]:
    """Return the terms for the time of a pass, without gathers and without messages to other stages."""
    base, products = layout.storage[:2]
    dtype, moved = DTYPES[layout.dtype.itemsize], machine["bandwidth"] * machine["elementwise"]
    of_linears = dtype if products is None else DTYPES[1]
    of_blocks, in_dtype = machine.rate("matmul", of_linears), machine.rate("matmul", dtype)
    windowed, in_windows = work["windowed"], machine.rate("attention", dtype, windowed=True)
    found = [
        Term("matmuls", f"matmuls of blocks in {of_linears}", work["linears"], of_blocks, "FLOP"),
        Term("matmuls", f"head, adapter in {dtype}", work["head"] + work["low_rank"], in_dtype, "FLOP"),
        Term("attention", "attention", work["attention"] - windowed, machine.rate("attention", dtype), "FLOP"),
        Term("attention", "attention in windows", windowed, in_windows, "FLOP"),
        # The time to read inputs that computation does not hide.
        Term("attention", f"queries in {dtype} read", work["queries"], machine[f"queries.{dtype}"], "numbers"),
        Term("elementwise", "norms, gate, rotation, residuals, loss", work["moved"], moved, "B"),
    ]
    read = work["head_weights"]
    if base is None:
        read += work["weights"] + work["weights_back"]
    else:
        found += _dequantised(work, layout, base, machine)
    found.append(Term("matmuls", f"weights in {dtype} read", read, machine[f"weights.{dtype}"], "weights"))
    launches = work["blocks"] * machine["block"]
    if machine["hides_launches"]:
        launches -= sum(term.seconds for term in found)
    found.append(Term("launches", "the host launches kernels", work["blocks"], 0.0, "blocks", fixed=max(0.0, launches)))
    return found + links.terms(work.sent, machine, purpose="tensor")


def _hidden(terms: Sequence[Term], stage: StagePlan, machine: Machine) -> Term:
    """Return the term for the time that the tensor-parallel messages of one half save beside the other half.

    Each of the four linears of a block, the first one with attention, is computed beside one message.
    """
    spent, sizes = Seconds.of(terms), {name: linear.num_weights for name, linear in stage.shape.block.adaptable.items()}
    hidden = 1 - stage.is_last / len(stage.blocks)  # behind the last attention, halves do not alternate
    computed, message = spent.matmuls + spent.elementwise + spent.dequantised, hidden * spent.tensor / len(sizes)
    beside = [
        computed * size / sum(sizes.values()) + (spent.attention if name == shapes.QKV else 0.0)
        for name, size in sizes.items()
    ]
    saved = machine["hidden"] * sum(min(message, seconds) for seconds in beside)
    return Term("tensor", "hidden beside the other half", 0.0, 0.0, "s", fixed=-saved)


def _dequantised(work: PassWork, layout: Layout, base: str, machine: Machine) -> list[Term]:
    """Return the terms for the time to prepare quantised weights for matmuls.

    Usually, weights are dequantised. For FP8 matmuls, they are transposed instead, and activations are rounded.
    """
    moved, weights = machine["bandwidth"] * machine["elementwise"], work["weights"] + work["weights_back"]
    if layout.storage.products is not None:  # a weight is read and written, 1 byte each; on a CPU in the matmul
        transposed = 0.0 if layout.storage.keep_transposed or not layout.on_gpu else work["weights_back"]
        rounded = machine["round.forward"] * work["rounded"] + machine["round.backward"] * work["rounded_back"]
        return [
            Term("dequantised", f"weights in {base} transposed", 2 * transposed, moved, "B"),
            Term("dequantised", "activations and gradients rounded to fp8", rounded, moved, "B"),
        ]
    label = f"weights in {base} dequantised"
    if rate := machine[f"dequantise.{base}"]:
        return [Term("dequantised", label, weights, rate, "weights")]
    of_weight = shapes.BASE_FORMATS[base].bits / 8 + layout.dtype.itemsize
    return [Term("dequantised", label, of_weight * weights, moved, "B")]


def sum_terms(stage: StagePlan, batches: Sequence[MicroBatchShape], links: Links, machine: Machine) -> list[Term]:
    """Return the terms for the time of the messages that ranks send once per step, without the gathers of ZeRO-3."""
    once, sent = once_traffic(stage, batches), engine_traffic(stage, num_micro_batches=len(batches))
    if stage.layout.zero_stage == 3:
        del sent.bytes[DATA, "all-gather"]
    return links.terms(once, machine, purpose="sums") + links.terms(sent, machine, purpose="sums")


# The seconds of a step -----------------------------------------------------------------------------------------------


def step_seconds(steps: Sequence[StepParts]) -> list[Seconds]:
    """Return the seconds of each step by purpose. Those of passes are for the stage whose passes take the longest.

    Steps with equal numbers of stages and micro-batches are simulated together.
    """
    found: list[Seconds] = [Seconds()] * len(steps)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, step in enumerate(steps):
        alike[len(step.stages), len(step.batches)].append(index)
    for indices in alike.values():
        spans = pipeline_spans([steps[index] for index in indices])
        for index, span in zip(indices, spans.tolist(), strict=True):
            step = steps[index]
            _, spent = step.busiest()
            waits = span - spent.total
            # A rounding difference between two sums is not waiting time.
            bubble = waits if waits > 1e-9 * span else 0.0
            found[index] = spent._replace(bubble=bubble, sums=step.sums, outside=step.outside)
    return found


def pipeline_spans(steps: Sequence[StepParts]) -> NDArray[np.float64]:
    """Return the seconds from the start of each step to the end of its last pass, for steps with equal pass counts.

    A stage runs its passes in the 1F1B order of DeepSpeed's pipeline (0.19.8). Traces of real steps confirm it. A stage
    first runs as many forward passes as there are stages from itself to the last stage. Then it alternates one backward
    and one forward pass. Each pass runs as early as possible. A forward pass needs the output of the previous stage for
    the same micro-batch. A backward pass needs the gradient from the next stage.
    """

    @cache
    def costs(batches: tuple[MicroBatchShape, ...]) -> NDArray[np.float64]:
        """Return the seconds of the passes of one micro-batch of each step, as an array (pass, stage, step)."""
        totals = [
            [[seconds.total for seconds in stage[batch]] for stage in step.stages]
            for step, batch in zip(steps, batches, strict=True)
        ]
        return np.transpose(totals, (2, 1, 0))

    passes = [costs(batches) for batches in zip(*(step.batches for step in steps), strict=True)]
    num_stages = len(steps[0].stages)
    clocks = np.zeros((num_stages, len(steps)))
    gradients = np.zeros((num_stages + 1, len(steps)))  # the end of the latest backward pass of each stage
    for turn in range(len(passes) + num_stages):
        hidden = np.zeros(len(steps))  # the end of the same forward pass on the previous stage
        for stage in range(num_stages):
            back = turn - num_stages + stage
            if 0 <= back < len(passes):
                start = np.maximum(clocks[stage], gradients[stage + 1])
                clocks[stage] = gradients[stage] = start + passes[back][1, stage]
            if turn < len(passes):
                clocks[stage] = hidden = np.maximum(clocks[stage], hidden) + passes[turn][0, stage]
    spans: NDArray[np.float64] = clocks.max(axis=0)
    return spans
