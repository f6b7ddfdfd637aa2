"""The memory and time of every candidate. What does not depend on a choice is computed once for all its values.

| computed once for each | what |
|---|---|
| tensor, pipeline, storage | stages |
| the same, ZeRO | what ranks hold (`held_bytes`), messages once a step |
| tensor, pipeline, sequences, micro-batch, recompute | activations (`step_bytes`), counts of passes (`stage_work`) |
| number of stages and micro-batches | a simulation of the schedule, for all layouts together |

Stages that do the same share these too: the first of them has most micro-batches in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.memory import HeldBytes, StageMemory, StepBytes, held_bytes, with_reserves
from megatron_tiedlora.planning.micro_batches import Batch
from megatron_tiedlora.planning.passes import StageWork, stage_work
from megatron_tiedlora.planning.search import Candidate, Cluster, PlannedRun
from megatron_tiedlora.planning.stages import StagePlan, plan_stages
from megatron_tiedlora.planning.step_plan import Work
from megatron_tiedlora.planning.step_time import (
    Links,
    Seconds,
    StageSeconds,
    StepParts,
    Term,
    stage_seconds,
    stage_terms,
    step_parts,
    step_seconds,
    sum_terms,
)

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Priced:
    """A candidate with its price.

    Attributes:
        memory: of the fullest rank; None if its weights alone do not fit.
        weights: the bytes of these weights.
        stage: the index of that rank's stage.
        seconds: of a step; None if it does not fit.
    """

    candidate: Candidate
    cluster: Cluster
    work: Work
    weights: float
    memory: StageMemory | None = None
    stage: int = 0
    seconds: Seconds | None = None

    @property
    def name(self) -> str:
        """The candidate's."""
        return self.candidate.name

    @property
    def needed(self) -> float:
        """The bytes that the fullest rank needs, or its weights if these are too large."""
        return self.weights if self.memory is None else self.memory.total

    @property
    def fits(self) -> bool:
        """Whether every rank's card is large enough."""
        return self.memory is not None and self.memory.total <= capacity(self.cluster)

    @property
    def step(self) -> Seconds:
        """The seconds of a step of a layout that fits."""
        assert self.seconds is not None, "only layouts that fit have a time"
        return self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of one rank."""
        return self.work.tokens / self.step.total / self.cluster.world_size

    @property
    def dtype(self) -> str:
        """The name of the base's dtype."""
        return "fp32" if self.candidate.layout.dtype.itemsize == 4 else "bf16"

    @property
    def mfu(self) -> float:
        """Of the peak in the dtype of the base, as a run reports it."""
        peak = self.cluster.machine[f"peak.{self.dtype}"]
        return self.work.flops / self.step.total / (peak * self.cluster.world_size)


def capacity(cluster: Cluster) -> float:
    """The bytes of memory for each rank."""
    return cluster.machine["memory"] / (1 if cluster.machine.on_gpu else cluster.per_node)


class Pricer:
    """Prices candidates of one cluster, and remembers the parts."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._known: dict[Hashable, Any] = {}

    def price(self, candidates: Iterable[Candidate]) -> list[Priced]:
        """All of them, in their order."""
        priced = [self._with_memory(candidate) for candidate in candidates]
        fitting = [index for index, one in enumerate(priced) if one.fits]
        seconds = step_seconds([self.parts(priced[index].candidate) for index in fitting])
        for index, found in zip(fitting, seconds, strict=True):
            priced[index] = replace(priced[index], seconds=found)
        return priced

    def price_in_full(self, candidate: Candidate) -> Priced:
        """One of them, with a time and all of its memory even if it does not fit."""
        found = self._with_memory(candidate, drops=False)
        (seconds,) = step_seconds([self.parts(candidate)])
        return replace(found, seconds=seconds)

    def _with_memory(self, candidate: Candidate, *, drops: bool = True) -> Priced:
        groups = self._groups(candidate)
        held = [self._held(candidate, group) for group in groups]
        weights = max(each.weights for each in held)
        work = self._work(candidate)
        if drops and weights > capacity(self.cluster):
            return Priced(candidate, self.cluster, work, weights)
        stages = self._stages(candidate)
        found = [
            with_reserves(stages[group], each, self._step(candidate, group), self.cluster.machine)
            for group, each in zip(groups, held, strict=True)
        ]
        fullest = max(range(len(groups)), key=lambda number: found[number].total)
        return Priced(candidate, self.cluster, work, weights, found[fullest], groups[fullest])

    def parts(self, candidate: Candidate) -> StepParts:
        """What a candidate's time follows from."""
        groups, layout, batches = self._groups(candidate), candidate.layout, candidate.step.batches
        by_group = {group: [self._seconds(candidate, group, batch) for batch in batches.kinds] for group in groups}
        of_stage = self._group_of_stage(candidate)
        shards = (candidate.storage, len(batches)) if _shards(layout) else ()
        sums = self._once(
            ("sums", *_grid(layout), candidate.engine_file, *shards),
            lambda: max(sum(term.seconds for term in self.sum_terms(candidate, group)) for group in groups),
        )
        return StepParts(batches, [by_group[index] for index in of_stage], sums, self.cluster.machine["step"])

    def stage(self, candidate: Candidate, index: int) -> StagePlan:
        """One of its stages; layouts with the same partition and storage share all of it but the layout."""
        return replace(self._stages(candidate)[index], layout=candidate.layout)

    def stage_terms(self, candidate: Candidate, stage: int, batch: Batch) -> tuple[list[Term], list[Term]]:
        """What the passes of a micro-batch on a stage spend their time on."""
        work, found = self._passes(candidate, stage, batch), self.stage(candidate, stage)
        return stage_terms(work, found, self.links(candidate), self.cluster.machine)

    def sum_terms(self, candidate: Candidate, stage: int) -> list[Term]:
        """The messages once a step of a stage's rank."""
        links, machine = self.links(candidate), self.cluster.machine
        return sum_terms(self.stage(candidate, stage), candidate.step.batches, links, machine)

    # Parts that several candidates share ------------------------------------------------------------------------------

    def _once(self, key: Hashable, compute: Callable[[], _Part]) -> _Part:
        if key not in self._known:
            self._known[key] = compute()
        found: _Part = self._known[key]
        return found

    def _stages(self, candidate: Candidate) -> Sequence[StagePlan]:
        key = ("stages", *_grid(candidate.layout), candidate.storage)
        return self._once(key, lambda: plan_stages(candidate.step.shape, candidate.layout))

    def links(self, candidate: Candidate) -> Links:
        """The links of its groups."""
        layout = candidate.layout
        return self._once(("links", *_grid(layout)), lambda: Links(layout, self.cluster.per_node))

    def _group_of_stage(self, candidate: Candidate) -> list[int]:
        """By stage, the first stage that does the same."""

        def find() -> list[int]:
            links, found = self.links(candidate), []
            firsts: dict[Hashable, int] = {}
            for stage in self._stages(candidate):
                crosses = [links.to_next(near).num_nodes for near in (stage.index - 1, stage.index)]
                key = (stage.is_first, stage.is_last, _kinds(stage), *crosses)
                found.append(firsts.setdefault(key, stage.index))
            return found

        return self._once(("groups", *_grid(candidate.layout)), find)

    def _groups(self, candidate: Candidate) -> list[int]:
        return list(dict.fromkeys(self._group_of_stage(candidate)))

    def _held(self, candidate: Candidate, group: int) -> HeldBytes:
        key = ("held", *_grid(candidate.layout), candidate.storage, candidate.engine_file, group)
        return self._once(key, lambda: held_bytes(self.stage(candidate, group)))

    def _step(self, candidate: Candidate, group: int) -> StepBytes:
        key = ("step", *_choices(candidate.layout), group)
        return self._once(key, lambda: candidate.step.largest.step_bytes(self.stage(candidate, group)))

    def _passes(self, candidate: Candidate, group: int, batch: Batch) -> StageWork:
        key = ("passes", *_choices(candidate.layout), group, batch)
        return self._once(key, lambda: stage_work(self.stage(candidate, group), batch))

    def _seconds(self, candidate: Candidate, group: int, batch: Batch) -> StageSeconds:
        layout = candidate.layout
        gathers = candidate.engine_file if layout.zero_stage == 3 else ""

        def compute() -> StageSeconds:
            work, stage = self._passes(candidate, group, batch), self.stage(candidate, group)
            return stage_seconds(work, stage, self.links(candidate), self.cluster.machine)

        return self._once(("seconds", *_choices(layout), candidate.storage, gathers, group, batch), compute)

    def _work(self, candidate: Candidate) -> Work:
        """Tokens and FLOPs of the samples of a step, which are the same in all layouts."""
        return self._once("work", lambda: candidate.step.work)


def _kinds(stage: StagePlan) -> Hashable:
    """What the blocks of a stage do, and how many there are of each kind."""
    return tuple((kind.traced, kind.number) for kind in stage.owned_by(range(len(stage.parts))).kinds)


def hours_in_turn(row: Priced, run: PlannedRun) -> float:
    """The hours of the adapters of a run one after another, each alone in the layout of a row."""
    alone = run.alone(row.candidate.layout, row.candidate.step)
    parts = []
    for layout, step in alone:
        stages, links = plan_stages(step.shape, layout), Links(layout, row.cluster.per_node)
        parts.append(step_parts(stages, step.batches, links, row.cluster.machine))
    spent = (step.steps * seconds.total for (_, step), seconds in zip(alone, step_seconds(parts), strict=True))
    return sum(spent) / 3600


def _shards(layout: Layout) -> bool:
    """Whether the engine's messages depend on the micro-batches or on the storage of the base: from ZeRO-2 on."""
    return layout.zero_stage >= 2


def _grid(layout: Layout) -> tuple[int, int, int]:
    return layout.tp_size, layout.pp_size, layout.dp_size


def _choices(layout: Layout) -> tuple[Hashable, ...]:
    """What activations and passes depend on, beside the model and the data."""
    return (*_grid(layout), layout.rows, layout.shards_sequences, layout.recompute)
