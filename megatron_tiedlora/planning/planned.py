"""A layout of a run on a cluster, and what it costs: memory, messages and time, each counted when it is asked for.

A dry run has one such layout, a search has thousands. Those of a search share what does not depend on a choice
(`_DEPENDS`), and the schedules of those with as many stages and micro-batches are simulated together (`time_together`).
Stages that do the same share all of it: the first of them has most micro-batches in flight.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.parallel.groups import Traffic
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, StagePlan, plan_stages
from megatron_tiedlora.planning.machines import Constant, Machine
from megatron_tiedlora.planning.memory import StageMemory, held_memory, step_memory, with_reserves
from megatron_tiedlora.planning.passes import engine_traffic, stage_work, step_traffic
from megatron_tiedlora.planning.step_plan import StepPlan, Work
from megatron_tiedlora.planning.step_time import (
    DTYPES,
    RANKS_PER_NODE,
    Links,
    Seconds,
    StepParts,
    Term,
    stage_terms,
    step_seconds,
    sum_terms,
)

_Part = TypeVar("_Part")

_GRID = ("tp_size", "pp_size", "dp_size")
_STORAGE = ("base_format", "products", "keep_transposed")
_ENGINE = ("zero_stage", "live_parameters", "overlaps_gathers")
_CHOICES = (*_GRID, "rows", "shards_sequences", "recompute")
# What is computed once for all layouts with the same values of these fields, beside the model and the data.
_DEPENDS = {
    "stages": (*_GRID, *_STORAGE),
    "links": _GRID,
    "first_of": _GRID,
    "held_memory": (*_GRID, *_STORAGE, *_ENGINE),
    "step_memory": _CHOICES,
    "stage_work": _CHOICES,
    "stage_seconds": (*_CHOICES, *_STORAGE),
    "sums": (*_GRID, *_ENGINE),
    "work": (),
    "steps": (),
}


@dataclass(frozen=True)
class Cluster:
    """What is booked: so many ranks, `per_node` in each node, on such cards."""

    world_size: int
    per_node: int
    machine: Machine

    @property
    def capacity(self) -> float:
        """The bytes of memory for each rank."""
        return self.machine["memory"] / (1 if self.machine.on_gpu else self.per_node)


@dataclass(eq=False, kw_only=True)
class Planned:
    """A layout of a run on a cluster.

    Attributes:
        step: the step that is planned, which layouts with the same micro-batches share.
        known: the parts that are computed once for several layouts.
    """

    step: StepPlan
    layout: Layout
    cluster: Cluster
    known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def alone(cls, step: StepPlan, machine: Machine, *, per_node: int = RANKS_PER_NODE) -> "Planned":
        """The layout of a run, which shares nothing."""
        return Planned(step=step, layout=step.layout, cluster=Cluster(step.layout.world_size, per_node, machine))

    @property
    def machine(self) -> Machine:
        """What all ranks run on."""
        return self.cluster.machine

    def stage(self, index: int) -> StagePlan:
        """A stage. Layouts with the same partition and storage share all of it but the layout."""
        found = self._once("stages", lambda: plan_stages(self.step.shape, self.layout))
        return replace(found[index], layout=self.layout)

    @cached_property
    def stages(self) -> list[StagePlan]:
        """Every stage, in order."""
        return [self.stage(index) for index in range(self.layout.pp_size)]

    @cached_property
    def links(self) -> Links:
        """The links that carry the messages of each group of ranks."""
        return self._once("links", lambda: Links(self.layout, self.cluster.per_node))

    # Memory -----------------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> float:
        """The most bytes of a rank for the base, whatever its micro-batches and schedule are."""
        return max(held.base + held.dequantised for held in map(self._held, self._first_stages))

    @property
    def has_room_for_weights(self) -> bool:
        """Whether the base weights fit in a rank's memory."""
        return self.weights <= self.cluster.capacity

    def memory(self, index: int) -> StageMemory:
        """The bytes of a rank of a stage."""
        stage = self.stage(index)
        step = self._once("step_memory", lambda: step_memory(stage, self.step.largest), index)
        return with_reserves(stage, self._held(index).plus(step), self.machine)

    @cached_property
    def fullest(self) -> tuple[int, StageMemory]:
        """The stage whose ranks need most, and what they need."""
        found = {index: self.memory(index) for index in self._first_stages}
        return max(found.items(), key=lambda item: item[1].total)

    @property
    def needed(self) -> float:
        """The bytes that the fullest rank needs, or its weights if these are too large."""
        return self.fullest[1].total if self.has_room_for_weights else self.weights

    @property
    def fits(self) -> bool:
        """Whether every rank's card is large enough."""
        return self.needed <= self.cluster.capacity

    # Messages ---------------------------------------------------------------------------------------------------------

    def traffic(self, index: int, *, of_engine: bool = True) -> Traffic:
        """The messages of a rank of a stage in a step.

        Args:
            of_engine: whether DeepSpeed's messages in the data-parallel group are counted, by their upper bounds.
        """
        stage, shapes = self.stage(index), self.step.batches
        sent = step_traffic(stage, shapes)
        if of_engine:
            sent.include(engine_traffic(stage, num_micro_batches=len(shapes)))
        return sent

    # Time -------------------------------------------------------------------------------------------------------------

    @cached_property
    def work(self) -> Work:
        """Tokens and FLOPs of the samples of a step, which are the same in all layouts."""
        return self._once("work", lambda: self.step.work)

    @cached_property
    def seconds(self) -> Seconds:
        """The seconds of a step."""
        return step_seconds([self.parts])[0]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one rank."""
        return self.work.tokens / self.seconds.total / self.cluster.world_size

    @property
    def dtype(self) -> str:
        """The name of the base's dtype."""
        return DTYPES[self.layout.dtype.itemsize]

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: the share of the peak in the dtype of the base."""
        return self.work.flops / self.seconds.total / (self.machine[f"peak.{self.dtype}"] * self.cluster.world_size)

    @property
    def hours(self) -> float:
        """The hours of the run: of the tokens of all its steps at the speed of this one."""
        return self._once("steps", lambda: self.step.steps) * self.seconds.total / 3600

    @cached_property
    def hours_in_turn(self) -> float:
        """The hours of the adapters one after another, each alone in this layout."""
        alone = []
        for name, plan in self.step.plans.items():
            samples = None if self.step.samples is None else {ONLY: self.step.samples[name]}
            own = StepPlan({ONLY: plan}, samples=samples)
            changes = {key: getattr(own.layout, key) for key in ("adapters", "named", "micro_batches", "compiled")}
            alone.append(Planned(step=own, layout=replace(self.layout, **changes), cluster=self.cluster))
        time_together(alone)
        return sum(one.hours for one in alone)

    def changed(self, constants: dict[str, Constant]) -> "Planned":
        """The same layout on a machine with other constants."""
        cluster = replace(self.cluster, machine=self.machine.changed(constants))
        return Planned(step=self.step, layout=self.layout, cluster=cluster)

    @property
    def parts(self) -> StepParts:
        """What the time of a step follows from."""
        batches, first_of = self.step.batches, self._first_of
        kinds = set(batches)
        passes = {index: {batch: self._seconds(index, batch) for batch in kinds} for index in self._first_stages}
        shards = (*self._values(_STORAGE), len(batches)) if self.layout.zero_stage >= 2 else ()
        sums = self._once(
            "sums", lambda: max(sum(term.seconds for term in self.sum_terms(index)) for index in passes), *shards
        )
        return StepParts(batches, [passes[first] for first in first_of], sums, self.machine["step"])

    def pass_terms(self, index: int, batch: MicroBatchShape) -> tuple[list[Term], list[Term]]:
        """What the passes of a micro-batch on a stage spend their time on."""
        work = self._once("stage_work", lambda: stage_work(self.stage(index), batch), index, batch)
        return stage_terms(work, self.stage(index), self.links, self.machine)

    def sum_terms(self, index: int) -> list[Term]:
        """The messages once a step of a stage's rank."""
        return sum_terms(self.stage(index), self.step.batches, self.links, self.machine)

    # Parts that several layouts share ---------------------------------------------------------------------------------

    def _values(self, fields: Sequence[str]) -> tuple[Hashable, ...]:
        return tuple(getattr(self.layout, name) for name in fields)

    def _once(self, part: str, compute: Callable[[], _Part], *beside: Hashable) -> _Part:
        """A part of `_DEPENDS`, of a stage, or by whatever else it depends on."""
        key = (part, *self._values(_DEPENDS[part]), *beside)
        if key not in self.known:
            self.known[key] = compute()
        found: _Part = self.known[key]
        return found

    @cached_property
    def _first_of(self) -> list[int]:
        """By stage, the first stage that does the same."""
        firsts: dict[Hashable, int] = {}

        def first(stage: StagePlan) -> int:
            crosses = [self.links.to_next(near).num_nodes for near in (stage.index - 1, stage.index)]
            kinds = tuple((kind, len(blocks)) for kind, blocks in stage.kinds.items())
            return firsts.setdefault((stage.is_first, stage.is_last, kinds, *crosses), stage.index)

        return self._once("first_of", lambda: list(map(first, self.stages)))

    @property
    def _first_stages(self) -> list[int]:
        return list(dict.fromkeys(self._first_of))

    def _held(self, index: int) -> StageMemory:
        return self._once("held_memory", lambda: held_memory(self.stage(index)), index)

    def _seconds(self, index: int, batch: MicroBatchShape) -> tuple[Seconds, ...]:
        beside = index, batch, self._values(_ENGINE) if self.layout.zero_stage == 3 else ()
        return self._once("stage_seconds", lambda: tuple(map(Seconds.of, self.pass_terms(index, batch))), *beside)


def time_together(rows: Sequence[Planned]) -> None:
    """Set the seconds of many layouts: one simulation for all with as many stages and micro-batches."""
    for row, seconds in zip(rows, step_seconds([row.parts for row in rows]), strict=True):
        row.seconds = seconds
