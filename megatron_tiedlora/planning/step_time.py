"""How long a step takes: the counts of `work`, by the constants of a machine, along the schedule of `schedule`.

    step = the longest path through the passes of all stages + sums of the step + what is outside passes

A pass takes the sum of its parts. A part runs beside another one only where the code does so: on a GPU the host's
launches, and gathers of ZeRO-3 with `overlap_comm`.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_tiedlora.base.base_formats import BASE_FORMATS
from megatron_tiedlora.parallel.traffic import DATA, PIPELINE
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.links import Links
from megatron_tiedlora.planning.machines import Machine
from megatron_tiedlora.planning.schedule import FORWARD, Pass, one_f_one_b, simulate
from megatron_tiedlora.planning.stages import StagePlan
from megatron_tiedlora.planning.traffic import engine_traffic, once_traffic
from megatron_tiedlora.planning.work import PassWork, StageWork

DTYPES = {1: "fp8", 2: "bf16", 4: "fp32"}  # by bytes


class Seconds(NamedTuple):
    """Seconds by what they are spent on; of a pass, of a stage's passes, or of a step.

    Attributes:
        products: matmuls, frozen ones and the adapter's, with those that are computed again.
        attention: the same of attention.
        between: norms, gate, rotation, residuals, loss: what moves memory.
        dequantised: making weights of a quantised base ready for a matmul.
        launches: of the host, that the device does not hide.
        tensor: messages of the tensor group.
        gathers: weights that ZeRO-3 gathers and nothing hides.
        pipeline: sending hidden states, and DeepSpeed's instructions.
        bubble: waiting for other stages.
        sums: messages once a step.
        outside: of a step beside its passes and messages.
    """

    products: float = 0.0
    attention: float = 0.0
    between: float = 0.0
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

    def plus(self, other: Seconds) -> Seconds:
        """Each of them with that of another."""
        return Seconds(*map(operator.add, self, other))

    def times(self, number: int) -> Seconds:
        """Each of them `number` times."""
        return Seconds(*(number * seconds for seconds in self))


class StageSeconds(NamedTuple):
    """The passes of a micro-batch on a rank of a stage."""

    forward: Seconds
    backward: Seconds


@dataclass(frozen=True)
class StepParts:
    """What the time of a step follows from.

    Attributes:
        stages: by stage, by micro-batch in the order in which they run; equal ones may be the same object.
        sums: of the messages once a step.
        outside: see `Seconds`.
    """

    stages: Sequence[Sequence[StageSeconds]]
    sums: float
    outside: float


def stage_seconds(work: StageWork, stage: StagePlan, links: Links, machine: Machine) -> StageSeconds:
    """The passes of a micro-batch of this work on a rank of the stage."""
    layout = stage.layout
    forward = pass_seconds(work.forward, layout, links, machine)
    backward = pass_seconds(work.backward, layout, links, machine)
    backward = backward.plus(pass_seconds(work.again, layout, links, machine))
    gather = _gather_seconds(stage, links, machine)
    found = []
    for seconds, goes_back in ((forward, False), (backward, True)):
        exposed = max(0.0, gather - seconds.total) if layout.overlaps_gathers else gather
        found.append(seconds._replace(gathers=exposed, pipeline=_sending(stage, work, links, machine, goes_back)))
    return StageSeconds(*found)


def pass_seconds(work: PassWork, layout: Layout, links: Links, machine: Machine) -> Seconds:
    """A pass without gathers and sends to other stages."""
    dtype = DTYPES[layout.dtype.itemsize]
    of_linears = dtype if layout.products is None else DTYPES[1]
    products = work.linears / machine.rate("matmul", of_linears)
    products += (work.head + work.low_rank) / machine.rate("matmul", dtype)
    attention = work.attention / machine.rate("attention", dtype)
    between = work.moved / (machine["bandwidth"] * machine["elementwise"])
    dequantised = work.weights * _seconds_per_weight(layout, machine)
    device, launches = products + attention + between + dequantised, work.blocks * machine["block"]
    if machine["hides_launches"]:
        launches = max(0.0, launches - device)
    tensor = links.seconds(work.sent, machine, without=PIPELINE)
    return Seconds(products, attention, between, dequantised, launches, tensor)


def _seconds_per_weight(layout: Layout, machine: Machine) -> float:
    """Of making one weight ready for a matmul: dequantised, or read for a transposed copy by products in fp8."""
    if layout.base is None:
        return 0.0
    if rate := machine[f"dequantise.{layout.base}"]:
        return 1 / rate
    moved = machine["bandwidth"] * machine["elementwise"]
    if layout.products is not None and layout.on_gpu:  # half of the passes need a transposed copy, read and written
        return 0.0 if layout.keep_transposed else 1.0 / moved
    return (BASE_FORMATS[layout.base].bits / 8 + layout.dtype.itemsize) / moved


def _gather_seconds(stage: StagePlan, links: Links, machine: Machine) -> float:
    """What ZeRO-3 gathers for one pass."""
    layout = stage.layout
    if layout.zero_stage < 3 or layout.dp_size == 1:
        return 0.0
    sent = engine_traffic(stage, num_micro_batches=1)
    # Of two passes. A message for each parameter that is not so small that all ranks keep it.
    gathered = sent.bytes[DATA, "all-gather"] / 2
    count = sum(tensor.size > PERSISTENT for tensor in stage.local_base)
    return links[DATA].seconds("all-gather", gathered, count, machine)


PERSISTENT = 100_000  # numbers of a parameter that ZeRO-3 does not shard; stage3_param_persistence_threshold


def _sending(stage: StagePlan, work: StageWork, links: Links, machine: Machine, goes_back: bool) -> float:
    """Sending a pass's result to the next stage, and what DeepSpeed's pipeline adds."""
    layout = stage.layout
    if layout.pp_size == 1:
        return 0.0
    sent = (work.backward if goes_back else work.forward).sent
    size, count = sent.bytes[PIPELINE, "send"], sent.messages[PIPELINE, "send"]
    if not count:
        return machine["instruction"]
    link = links.to_next(stage.index - 1 if goes_back else stage.index)
    return machine["instruction"] + link.seconds("send", size, count, machine)


def sum_seconds(stage: StagePlan, links: Links, machine: Machine, *, num_micro_batches: int) -> float:
    """The messages that a rank sends once a step: gradients, norms, reports; of ZeRO-3 only gradients."""
    seconds = links.seconds(once_traffic(stage), machine)
    sent = engine_traffic(stage, num_micro_batches=num_micro_batches)
    for (group, kind), size in sent.bytes.items():
        if stage.layout.zero_stage < 3 or kind != "all-gather":
            seconds += links[group].seconds(kind, size, sent.messages[group, kind], machine)
    return seconds


def step_seconds(steps: Sequence[StepParts]) -> list[Seconds]:
    """The time of each step, by what the stage that works longest spends it on.

    Steps with as many stages and micro-batches are simulated together.
    """
    found: list[Seconds] = [Seconds()] * len(steps)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, step in enumerate(steps):
        alike[len(step.stages), len(step.stages[0])].append(index)
    for (num_stages, num_micro_batches), indices in alike.items():
        order = one_f_one_b(num_stages, num_micro_batches)
        spans = simulate(order, _costs([steps[index] for index in indices])).seconds
        for index, span in zip(indices, spans.tolist(), strict=True):
            found[index] = _by_purpose(steps[index], span)
    return found


def _costs(steps: Sequence[StepParts]) -> Callable[[int, Pass], Any]:
    """By rank and pass, the cost in each of the steps. Micro-batches that are one object share it."""
    known: dict[Hashable, Any] = {}
    uniform = all(passes[0] is passes[-1] and len(set(map(id, passes))) == 1 for s in steps for passes in s.stages)

    def cost(rank: int, one: Pass) -> Any:
        key = (rank, one.kind, 0 if uniform else one.micro_batch)
        if key not in known:
            passes = [step.stages[rank][one.micro_batch] for step in steps]
            chosen = (each.forward if one.kind == FORWARD else each.backward for each in passes)
            known[key] = np.array([seconds.total for seconds in chosen])
        return known[key]

    return cost


def _by_purpose(step: StepParts, span: float) -> Seconds:
    """The seconds of the stage that works longest, and what it waits for."""
    by_stage = {id(passes): passes for passes in step.stages}.values()
    passes = max(by_stage, key=lambda passes: sum(number * sum(map(sum, each)) for each, number in _counted(passes)))
    spent = Seconds()
    for each, number in _counted(passes):
        spent = spent.plus(each.forward.plus(each.backward).times(number))
    return spent._replace(bubble=max(0.0, span - spent.total), sums=step.sums, outside=step.outside)


def _counted(passes: Sequence[StageSeconds]) -> list[tuple[StageSeconds, int]]:
    """The different micro-batches, and how many there are of each."""
    numbers = Counter(map(id, passes))
    return [(each, numbers[id(each)]) for each in {id(each): each for each in passes}.values()]
