"""Plan a step of a run, and the memory, messages and time of its layout on a cluster.

A `StepPlan` describes the micro-batches of a step, with or without data. A run without --adapters counts as a run with
one adapter. A `Planned` is one layout of such a step. Each cost is computed on first use.

A dry run plans one layout, and a search plans thousands. Layouts share a value if they are equal in all fields that
affect this value (`_DEPENDS`). The schedules of layouts with equal numbers of stages and micro-batches are simulated
together (`time_together`). Stages that do the same work use the values of the first such stage, which has the most
micro-batches in flight.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.loader import GlobalBatch, fill_rounds, largest_positions, num_positions
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.groups import Traffic
from megatron_tiedlora.planning import machines, run_plan, step_time
from megatron_tiedlora.planning.adapter_plans import Data, Plans, shared_plan
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, SampleRow, StagePlan, plan_stages, shared_shape
from megatron_tiedlora.planning.memory import LargestMicroBatch, StageMemory, held_memory, step_memory, with_reserves
from megatron_tiedlora.planning.passes import engine_traffic, stage_work, step_flops, step_traffic

# The step -------------------------------------------------------------------------------------------------------------


Samples = Mapping[str, tuple[TokenDataset, GlobalBatch]]  # by adapter name: the dataset, and the samples of a step


class Work(NamedTuple):
    """The number of tokens of a step on all ranks, and their model FLOPs, from which the MFU is computed."""

    tokens: int
    flops: int


def micro_batch_capacity(plans: Plans, *, shares: bool) -> int:
    """Return the maximum number of tokens in a micro-batch of several adapters; 0 if adapters share no micro-batches.

    This number is the size of the largest micro-batch of a single adapter, which fits in the memory of a rank.
    """
    return max(plan.layout.rows * plan.layout.length for plan in plans.values()) if shares else 0


def longest_run(plans: Plans) -> run_plan.RunPlan:
    """Return the plan that trains on the most tokens. Its settings decide whether kernels are compiled."""
    return max(plans.values(), key=lambda plan: plan.num_tokens)


@dataclass(frozen=True)
class StepPlan:
    """A step in which all adapters of a run are trained together.

    Attributes:
        samples: the samples of the step; None without data. Then each row is a supervised sample of maximum length.
    """

    plans: Plans
    shares_micro_batches: bool = True
    samples: Samples | None = None

    @classmethod
    def first(cls, plans: Plans, data: Data, *, shares: bool) -> "StepPlan":
        """Return the first step of all adapters, planned without samples if `data` is empty."""
        if not data:
            return cls(plans, shares)
        samples = {name: (data[name].train, plan.global_batch(data[name].train)) for name, plan in plans.items()}
        return cls(plans, shares, samples)

    @cached_property
    def shared(self) -> run_plan.RunPlan:
        """The plan that all adapters share; see `shared_plan`."""
        return shared_plan(self.plans)

    @property
    def shape(self) -> ModelShape:
        """The shape of the base model."""
        return self.shared.source.shape

    @cached_property
    def rounds(self) -> list[list[tuple[str, int]]]:
        """For each shared micro-batch, the micro-batches of single adapters that it contains; see `fill_rounds`."""
        capacity = micro_batch_capacity(self.plans, shares=self.shares_micro_batches)
        return fill_rounds({name: self._largest(name) for name in self._taking}, capacity=capacity)

    @cached_property
    def layout(self) -> Layout:
        """The layout of all adapters, from which the planners compute costs."""
        return replace(
            self.shared.layout,
            adapters=tuple(plan.adapter for plan in self.plans.values()),
            named=ONLY not in self.plans,
            rows=max(plan.layout.rows for plan in self.plans.values()),
            micro_batches=max(len(self.rounds), *(plan.layout.micro_batches for plan in self.plans.values())),
            compiled=longest_run(self.plans).layout.compiled,
        )

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """All pipeline stages in order."""
        return plan_stages(self.shape, self.layout)

    @cached_property
    def batches(self) -> tuple[MicroBatchShape, ...]:
        """This rank's micro-batches of the step, in the order in which they run."""
        own = {name: self._own(name) for name in self._taking}

        @cache
        def batch_of(*some: tuple[str, int]) -> MicroBatchShape:
            rows, lengths = zip(*(own[name][index] for name, index in some), strict=True)
            indices = (self._index_of[name] for name, _ in some)
            shape = shared_shape(self.layout, list(zip(indices, rows, strict=True)))
            return shape._replace(lengths=tuple(chain(*lengths)))

        alike = self.samples is None  # then all micro-batches of an adapter are equal
        return tuple(batch_of(*((name, 0 if alike else index) for name, index in some)) for some in self.rounds)

    @cached_property
    def largest(self) -> LargestMicroBatch:
        """The largest micro-batch of any step with the same combinations of adapters as this step."""
        longest = dict.fromkeys(self.plans, self.layout.length)  # tokens per row
        if self.samples is not None and not self.shared.settings.packing:
            longest |= {name: dataset.longest for name, (dataset, _) in self.samples.items()}
        longest = {name: padded(length, self.layout.pad_multiple) for name, length in longest.items()}
        own = [plan.layout.rows * longest[name] for name, plan in self.plans.items()]
        tokens = max(*own, min(sum(own), micro_batch_capacity(self.plans, shares=self.shares_micro_batches)))
        groups = dict.fromkeys(tuple(self._index_of[name] for name, _ in some) for some in self.rounds)
        document = max(longest.values())
        if self.samples is not None and self.shared.settings.packing:
            document = max(dataset.longest for dataset, _ in self.samples.values())
        return LargestMicroBatch(tokens, self._most_documents(), document, tuple(groups))

    @cached_property
    def works(self) -> dict[str, Work]:
        """The work of each adapter in the step, by name."""
        found = {}
        for name in self._taking:
            plan = self.plans[name]
            length, number = plan.settings.max_length, plan.batches.global_batch_size
            counts = (length,) * number, number * (length - 1)  # all samples have the full length
            if self.samples is not None:
                _, batch = self.samples[name]
                counts = batch.lengths, batch.num_supervised
            found[name] = Work(sum(counts[0]), step_flops(self.shape, plan.adapter, *counts).total())
        return found

    @property
    def work(self) -> Work:
        """The total work of the step."""
        return Work(*map(sum, zip(*self.works.values(), strict=True)))

    @property
    def steps(self) -> float:
        """The tokens of the run, divided by the tokens of this step. Adapters with fewer steps end earlier."""
        tokens = sum(work.tokens * self.plans[name].settings.max_steps for name, work in self.works.items())
        whole, rest = divmod(tokens, self.work.tokens)
        return tokens / self.work.tokens if rest else whole

    @cached_property
    def _index_of(self) -> dict[str, int]:
        """The index of each adapter in the layout."""
        return {name: index for index, name in enumerate(self.plans)}

    @property
    def _taking(self) -> list[str]:
        """The names of the adapters that are trained in the step, in order."""
        return [name for name in self.plans if self.samples is None or name in self.samples]

    def _most_documents(self) -> int:
        """Return the maximum number of documents in a micro-batch. Padding of a packed row counts as a document."""
        if self.samples is None or not self.shared.settings.packing:
            return max(sum(self.plans[name].layout.rows for name, _ in some) for some in self.rounds)
        dp_size, most = self.shared.grid.dp_size, 0
        for dp_rank in range(dp_size):
            counts = {
                name: [sum(map(len, rows)) + len(rows) for rows in batch.on_rank(dp_rank, dp_size=dp_size)]
                for name, (_, batch) in self.samples.items()
            }
            most = max(most, *(sum(counts[name][number] for name, number in some) for some in self.rounds))
        return most

    def _largest(self, name: str) -> Sequence[int]:
        """Return the number of positions of each micro-batch of an adapter, on the rank with the most positions."""
        plan, layout = self.plans[name], self.plans[name].layout
        if self.samples is None:
            return [layout.rows * padded(layout.length, layout.pad_multiple)] * layout.micro_batches
        dataset, batch = self.samples[name]
        positions = num_positions(dataset, batch.micro_batches, pad_multiple=layout.pad_multiple)
        return largest_positions(positions, dp_size=plan.grid.dp_size)

    def _own(self, name: str) -> list[tuple[list[SampleRow], list[int]]]:
        """Return, for each micro-batch of an adapter on this rank, its rows and the lengths of its samples.

        Without data, each row is one sample of the maximum length. No position predicts the first token of a sample.
        """
        layout, grid = self.plans[name].layout, self.shared.grid
        if self.samples is None:
            rows = [np.arange(layout.length) > 0] * layout.rows
            return [(rows, [layout.length] * layout.rows)] * layout.micro_batches
        (dataset, batch), found = self.samples[name], []
        for samples in batch.on_rank(grid.dp_rank, dp_size=grid.dp_size):
            lengths = dataset.lengths_of([index for row in samples for index in row])
            rows = [np.concatenate([dataset.supervised_of(index) for index in row]) for row in samples]
            found.append((rows, lengths.tolist()))
        return found


# A layout on a cluster ------------------------------------------------------------------------------------------------


_Part = TypeVar("_Part")

_GRID = ("tp_size", "pp_size", "dp_size")
_ENGINE = ("zero_stage", "live_parameters", "overlaps_gathers")
_CHOICES = (*_GRID, "rows", "shards_sequences", "recompute", "rounds")
# The fields of a layout on which each value depends. Layouts with equal fields share the value.
_DEPENDS = {
    "stages": (*_GRID, "storage"),
    "links": _GRID,
    "first_of": _GRID,
    "held_memory": (*_GRID, "storage", *_ENGINE),
    "step_memory": _CHOICES,
    "stage_work": _CHOICES,
    "stage_seconds": (*_CHOICES, "storage"),
    "sums": (*_GRID, *_ENGINE),
    "work": (),
    "steps": (),
}


@dataclass(eq=False, kw_only=True)
class Planned:
    """A layout of a run on a cluster, with its predicted costs.

    Attributes:
        step: the planned step. Layouts with the same micro-batches share this object.
        machine: the machine of all ranks.
        per_node: the number of ranks per node.
        known: a cache of values that several layouts share.
    """

    step: StepPlan
    layout: Layout
    machine: machines.Machine
    per_node: int = step_time.RANKS_PER_NODE
    known: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def stage(self, index: int) -> StagePlan:
        """Return the stage with this index. Layouts with the same partition and storage share its values."""
        found = self._once("stages", lambda: plan_stages(self.step.shape, self.layout))
        return replace(found[index], layout=self.layout)

    @cached_property
    def stages(self) -> list[StagePlan]:
        """All stages in order."""
        return [self.stage(index) for index in range(self.layout.pp_size)]

    @cached_property
    def links(self) -> step_time.Links:
        """The links that carry the messages of each process group."""
        return self._once("links", lambda: step_time.Links(self.layout, self.per_node))

    # Memory -----------------------------------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> float:
        """The largest number of bytes of base weights on any rank. It does not depend on micro-batches."""
        return max(held.base + held.dequantised for held in map(self._held, self._first_stages))

    @property
    def capacity(self) -> float:
        """The bytes of memory per rank."""
        return self.machine["memory"] / (1 if self.machine.on_gpu else self.per_node)

    @property
    def has_room_for_weights(self) -> bool:
        """Whether the base weights fit in a rank's memory."""
        return self.weights <= self.capacity

    def memory(self, index: int) -> StageMemory:
        """Return the memory that a rank of this stage needs."""
        stage = self.stage(index)
        step = self._once("step_memory", lambda: step_memory(stage, self.step.largest), index)
        return with_reserves(stage, self._held(index).plus(step), self.machine)

    @cached_property
    def fullest(self) -> tuple[int, StageMemory]:
        """The index of the stage that needs the most memory, and the memory per rank of this stage."""
        found = {index: self.memory(index) for index in self._first_stages}
        return max(found.items(), key=lambda item: item[1].total)

    @property
    def needed(self) -> float:
        """The largest number of bytes that any rank needs. If the weights alone do not fit, only they are counted."""
        return self.fullest[1].total if self.has_room_for_weights else self.weights

    @property
    def fits(self) -> bool:
        """Whether the memory of every rank is large enough."""
        return self.needed <= self.capacity

    # Messages ---------------------------------------------------------------------------------------------------------

    def traffic(self, index: int, *, of_engine: bool = True) -> Traffic:
        """Return the messages that a rank of a stage sends in one step.

        Args:
            of_engine: whether to include the upper bounds of DeepSpeed's messages in the data-parallel group.
        """
        stage, shapes = self.stage(index), self.step.batches
        sent = step_traffic(stage, shapes)
        if of_engine:
            sent.include(engine_traffic(stage, num_micro_batches=len(shapes)))
        return sent

    # Time -------------------------------------------------------------------------------------------------------------

    @cached_property
    def work(self) -> Work:
        """The tokens and FLOPs of a step, which are the same in all layouts."""
        return self._once("work", lambda: self.step.work)

    @cached_property
    def seconds(self) -> step_time.Seconds:
        """The predicted seconds of a step, by purpose."""
        return step_time.step_seconds([self.parts])[0]

    @property
    def tokens_per_second(self) -> float:
        """The number of tokens per second per rank."""
        return self.work.tokens / self.seconds.total / self.layout.world_size

    @property
    def dtype(self) -> str:
        """The name of the base's dtype."""
        return step_time.DTYPES[self.layout.dtype.itemsize]

    @property
    def mfu(self) -> float:
        """The model FLOPs utilisation (MFU), as a fraction of the peak FLOP/s in the dtype of the base."""
        return self.work.flops / self.seconds.total / (self.machine[f"peak.{self.dtype}"] * self.layout.world_size)

    @property
    def hours(self) -> float:
        """The hours of the run if all its tokens are processed at the speed of this step."""
        return self._once("steps", lambda: self.step.steps) * self.seconds.total / 3600

    @cached_property
    def hours_in_turn(self) -> float:
        """The hours to train the adapters one after another, each alone in this layout."""
        alone = []
        for name, plan in self.step.plans.items():
            samples = None if self.step.samples is None else {ONLY: self.step.samples[name]}
            own = StepPlan({ONLY: plan}, samples=samples)
            changes = {key: getattr(own.layout, key) for key in ("adapters", "named", "micro_batches", "compiled")}
            layout = replace(self.layout, **changes)
            alone.append(Planned(step=own, layout=layout, machine=self.machine, per_node=self.per_node))
        time_together(alone)
        return sum(one.hours for one in alone)

    def changed(self, constants: dict[str, machines.Constant]) -> "Planned":
        """Return this layout on a machine in which these constants are replaced, those of windows included."""
        machine = self.machine.changed(constants, windowed=None)
        return Planned(step=self.step, layout=self.layout, machine=machine, per_node=self.per_node)

    @property
    def parts(self) -> step_time.StepParts:
        """The times of passes and messages, from which the time of a step is computed."""
        batches, first_of = self.step.batches, self._first_of
        kinds = set(batches)
        passes = {index: {batch: self._seconds(index, batch) for batch in kinds} for index in self._first_stages}
        shards = (*self.layout.storage, len(batches)) if self.layout.zero_stage >= 2 else ()
        sums = self._once(
            "sums", lambda: max(sum(term.seconds for term in self.sum_terms(index)) for index in passes), *shards
        )
        return step_time.StepParts(batches, [passes[first] for first in first_of], sums, self.machine["step"])

    def pass_terms(self, index: int, batch: MicroBatchShape) -> tuple[list[step_time.Term], list[step_time.Term]]:
        """Return the terms that add up to the time of the forward and of the backward pass on a stage."""
        work = self._once("stage_work", lambda: stage_work(self.stage(index), batch), index, batch)
        return step_time.stage_terms(work, self.stage(index), self.links, self.machine)

    def sum_terms(self, index: int) -> list[step_time.Term]:
        """Return the terms that add up to the time of the messages that a rank of a stage sends once per step."""
        return step_time.sum_terms(self.stage(index), self.step.batches, self.links, self.machine)

    # Values that several layouts share --------------------------------------------------------------------------------

    def _values(self, fields: Sequence[str]) -> tuple[Hashable, ...]:
        return tuple(getattr(self.layout, name) for name in fields)

    def _once(self, part: str, compute: Callable[[], _Part], *beside: Hashable) -> _Part:
        """Return the value `part` of `_DEPENDS` from the cache, or compute it. `beside` extends the cache key."""
        key = (part, *self._values(_DEPENDS[part]), *beside)
        if key not in self.known:
            self.known[key] = compute()
        found: _Part = self.known[key]
        return found

    @cached_property
    def _first_of(self) -> list[int]:
        """For each stage, the index of the first stage that does the same work."""
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

    def _seconds(self, index: int, batch: MicroBatchShape) -> tuple[step_time.Seconds, ...]:
        beside = index, batch, self._values(_ENGINE) if self.layout.zero_stage == 3 else ()
        of_pass = step_time.Seconds.of
        return self._once("stage_seconds", lambda: tuple(map(of_pass, self.pass_terms(index, batch))), *beside)


def time_together(rows: Sequence[Planned]) -> None:
    """Compute `seconds` of many layouts. Layouts with equal numbers of passes and stages are simulated together."""
    for row, seconds in zip(rows, step_time.step_seconds([row.parts for row in rows]), strict=True):
        row.seconds = seconds
