"""How long a step takes: the counts of `passes`, by the constants of a machine, along the passes of a pipeline.

    step = the longest path through the passes of all stages + sums of the step + what is outside passes

A pass takes the sum of its parts. A part runs beside another one only where the code does so: on a GPU the host's
launches, and gathers of ZeRO-3 with `overlap_comm`.

A pass starts as early as its rank's order and its input let it. With 1F1B and p equal stages each stage is idle for
(p - 1) / (m + p - 1) of a step of m micro-batches; the simulation also knows stages that differ.

Over a ring of n ranks an all-gather or reduce-scatter of B bytes takes B (n - 1) / n over the bandwidth, and an
all-reduce twice that. A group that spans nodes has the network cards of its ranks in a node together, at most the
bandwidth inside a node. Each message takes `message` seconds beside its bytes.
"""

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.messages import count_text
from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.parallel.groups import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, StagePlan
from megatron_tiedlora.planning.machines import Machine
from megatron_tiedlora.planning.passes import PassWork, StageWork, engine_traffic, once_traffic

# Links between ranks --------------------------------------------------------------------------------------------------


RANKS_PER_NODE = 8  # where nobody says it
_RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # how often a ring carries (n - 1) / n of the bytes


class Term(NamedTuple):
    """One term of a step's time: an amount at a rate.

    Attributes:
        purpose: a field of `step_time.Seconds`.
        label: its name for `--why`.
        rate: amount in `unit` per second; 0 if it costs only `fixed` seconds.
        fixed: seconds beside those of the amount.
    """

    purpose: str
    label: str
    amount: float
    rate: float
    unit: str
    fixed: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds that it takes."""
        return (self.amount / self.rate if self.rate else 0.0) + self.fixed


class Link(NamedTuple):
    """A link that carries the messages of a group.

    Attributes:
        size: ranks of the group.
        num_nodes: nodes that they are in.
        per_node: ranks of the group in a node.
    """

    size: int
    num_nodes: int
    per_node: int

    def term(self, kind: str, count: int, num_bytes: float, machine: Machine, *, purpose: str) -> Term:
        """Return the time of `count` messages of `num_bytes` together, one after another."""
        carried = num_bytes * _RINGS[kind] * (self.size - 1) / self.size if kind in _RINGS else num_bytes
        label, fixed = f"{kind}, {count_text(int(count), 'message')}", count * machine["message"]
        bandwidth = machine["node_bandwidth"] * machine["node_link"]  # of each rank, in one direction
        if self.num_nodes > 1:
            bandwidth = min(bandwidth, self.per_node * machine["network_bandwidth"] * machine["network_link"])
        return Term(purpose, label, carried, bandwidth, "B", fixed)


@dataclass(frozen=True)
class Links:
    """The links of all groups of a layout on nodes of `ranks_per_node` ranks."""

    layout: Layout
    ranks_per_node: int

    @cached_property
    def by_group(self) -> dict[str, Link]:
        """The link of each group except the pipeline."""
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
        """Return the link from a stage to the next one: over the network if one of its ranks sends to another node."""
        width, per_node = self.layout.tp_size * self.layout.dp_size, self.ranks_per_node
        first = stage * width
        crosses = any(rank // per_node != (rank + width) // per_node for rank in (first, first + width - 1))
        return Link(2, 1 + crosses, 1)

    def terms(self, traffic: Traffic, machine: Machine, *, purpose: str) -> list[Term]:
        """Return the time of all messages except to other stages."""
        return [
            self.by_group[group].term(kind, traffic.messages[group, kind], size, machine, purpose=purpose)
            for (group, kind), size in traffic.bytes.items()
            if group != PIPELINE and self.by_group[group].size > 1
        ]


DTYPES = {1: "fp8", 2: "bf16", 4: "fp32"}  # by bytes
PERSISTENT = 100_000  # elements of a parameter that ZeRO-3 does not shard; stage3_param_persistence_threshold


class Seconds(NamedTuple):
    """Seconds by what they are spent on; of a pass, of a stage's passes, or of a step.

    Attributes:
        matmuls: frozen ones and the adapter's, with those that are computed again.
        attention: the same of attention.
        elementwise: norms, gate, rotation, residuals, loss: what moves memory.
        dequantised: making weights of a quantised base ready for a matmul, and rounding what FP8 matmuls multiply.
        launches: launches of kernels by the host that the device does not hide.
        tensor: messages of the tensor group.
        gathers: weights that ZeRO-3 gathers and nothing hides.
        pipeline: sending hidden states, and DeepSpeed's instructions.
        bubble: waiting for other stages.
        sums: messages once a step.
        outside: the rest of a step beside its passes and messages.
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
        """The sum."""
        return sum(self)

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "Seconds":
        """Return the terms by purpose."""
        found = dict.fromkeys(cls._fields, 0.0)
        for term in terms:
            found[term.purpose] += term.seconds
        return cls(**found)


@dataclass(frozen=True)
class StepParts:
    """The times from which the time of a step follows.

    Attributes:
        batches: its micro-batches, in order.
        stages: by stage and micro-batch, the times of the forward and the backward pass.
        sums: the time of the messages once a step.
        outside: see `Seconds`.
    """

    batches: Sequence[MicroBatchShape]
    stages: Sequence[Mapping[MicroBatchShape, tuple[Seconds, ...]]]
    sums: float
    outside: float

    def busiest(self) -> tuple[int, Seconds]:
        """Return the first stage of those that work longest, and the time of all its passes."""
        firsts: dict[int, int] = {}
        for index, passes in enumerate(self.stages):  # stages that do the same are one object
            firsts.setdefault(id(passes), index)
        counts, spent = Counter(self.batches), {}
        for index in firsts.values():
            both = [np.sum(self.stages[index][batch], axis=0) for batch in counts]
            spent[index] = Seconds(*np.dot(list(counts.values()), both).tolist())
        return max(spent.items(), key=lambda item: item[1].total)


def stage_terms(work: StageWork, stage: StagePlan, links: Links, machine: Machine) -> tuple[list[Term], list[Term]]:
    """Return the terms of the time of the forward and of the backward pass of a micro-batch."""
    layout = stage.layout
    forward, backward, again = (pass_terms(each, layout, links, machine) for each in work)
    backward += [term._replace(label=f"{term.label}, recomputed") for term in again]
    gathers = []
    if layout.zero_stage == 3 and layout.dp_size > 1:  # a message for each parameter that not all ranks keep
        gathered = engine_traffic(stage, num_micro_batches=1).bytes[DATA, "all-gather"] / 2  # two passes gather
        count = sum(number for tensor, number in stage.local_base.items() if tensor.size > PERSISTENT)
        gathers.append(links.by_group[DATA].term("all-gather", count, gathered, machine, purpose="gathers"))
    for terms, sent, neighbour in (
        (forward, work.forward.sent, stage.index),
        (backward, work.backward.sent, stage.index - 1),
    ):
        beside = []
        if layout.overlaps_gathers and gathers:  # hidden behind the pass, as far as that is long enough
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
    """Return a pass without gathers and sends to other stages."""
    base, products, _ = layout.storage
    dtype, moved = DTYPES[layout.dtype.itemsize], machine["bandwidth"] * machine["elementwise"]
    of_linears = dtype if products is None else DTYPES[1]
    of_blocks, in_dtype = machine.rate("matmul", of_linears), machine.rate("matmul", dtype)
    found = [
        Term("matmuls", f"matmuls of blocks in {of_linears}", work["linears"], of_blocks, "FLOP"),
        Term("matmuls", f"head, adapter in {dtype}", work["head"] + work["low_rank"], in_dtype, "FLOP"),
        Term("attention", "attention", work["attention"], machine.rate("attention", dtype), "FLOP"),
        # Reading inputs, if that is not hidden behind computing.
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


def _dequantised(work: PassWork, layout: Layout, base: str, machine: Machine) -> list[Term]:
    """Return the work to make weights ready for a matmul: they are dequantised, or transposed for FP8 matmuls, whose
    activations are rounded."""
    moved, weights = machine["bandwidth"] * machine["elementwise"], work["weights"] + work["weights_back"]
    if layout.storage.products is not None:  # a byte is read, one written; on a CPU in the time of the emulated matmul
        transposed = 0.0 if layout.storage.keep_transposed or not layout.on_gpu else work["weights_back"]
        rounded = machine["round.forward"] * work["rounded"] + machine["round.backward"] * work["rounded_back"]
        return [
            Term("dequantised", f"weights in {base} transposed", 2 * transposed, moved, "B"),
            Term("dequantised", "activations and gradients rounded to fp8", rounded, moved, "B"),
        ]
    label = f"weights in {base} dequantised"
    if rate := machine[f"dequantise.{base}"]:
        return [Term("dequantised", label, weights, rate, "weights")]
    of_weight = BASE_FORMATS[base].bits / 8 + layout.dtype.itemsize
    return [Term("dequantised", label, of_weight * weights, moved, "B")]


def sum_terms(stage: StagePlan, batches: Sequence[MicroBatchShape], links: Links, machine: Machine) -> list[Term]:
    """Return the messages that a rank sends once a step: gradients, norms, reports; of ZeRO-3 only gradients."""
    once, sent = once_traffic(stage, batches), engine_traffic(stage, num_micro_batches=len(batches))
    if stage.layout.zero_stage == 3:
        del sent.bytes[DATA, "all-gather"]
    return links.terms(once, machine, purpose="sums") + links.terms(sent, machine, purpose="sums")


# The seconds of a step -----------------------------------------------------------------------------------------------


def step_seconds(steps: Sequence[StepParts]) -> list[Seconds]:
    """Return the time of each step, by what the stage that works longest spends it on.

    Steps with as many stages and micro-batches are simulated together.
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
            # Another order of the same sum is no waiting.
            bubble = waits if waits > 1e-9 * span else 0.0
            found[index] = spent._replace(bubble=bubble, sums=step.sums, outside=step.outside)
    return found


def pipeline_spans(steps: Sequence[StepParts]) -> NDArray[np.float64]:
    """Return the seconds from the start to the end of the last pass of all stages, of steps with as many passes each.

    A stage runs its passes in the order 1F1B of DeepSpeed's pipeline (0.19.8), which the trace of real steps shows:
    forward passes until as many are in flight as stages follow, its own included; then one back, one forward. Each runs
    as early as it can: a forward pass takes the result of the same micro-batch on the stage before, a backward pass
    the result of the stage behind.
    """

    @functools.cache
    def costs(batches: tuple[MicroBatchShape, ...]) -> NDArray[np.float64]:
        """By pass and stage, the seconds in each of the steps of its micro-batch."""
        totals = [
            [[seconds.total for seconds in stage[batch]] for stage in step.stages]
            for step, batch in zip(steps, batches, strict=True)
        ]
        return np.transpose(totals, (2, 1, 0))

    passes = [costs(batches) for batches in zip(*(step.batches for step in steps), strict=True)]
    num_stages = len(steps[0].stages)
    clocks = np.zeros((num_stages, len(steps)))
    gradients = np.zeros((num_stages + 1, len(steps)))  # by stage, when its last backward pass has ended
    for turn in range(len(passes) + num_stages):
        hidden = np.zeros(len(steps))  # when the forward pass on the stage before has ended
        for stage in range(num_stages):
            back = turn - num_stages + stage
            if 0 <= back < len(passes):
                start = np.maximum(clocks[stage], gradients[stage + 1])
                clocks[stage] = gradients[stage] = start + passes[back][1, stage]
            if turn < len(passes):
                clocks[stage] = hidden = np.maximum(clocks[stage], hidden) + passes[turn][0, stage]
    spans: NDArray[np.float64] = clocks.max(axis=0)
    return spans
