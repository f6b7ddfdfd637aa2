"""What a run of several adapters needs and sends, from their plans alone: its layout, and its shared micro-batches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.loader import GlobalBatch, largest_positions, num_positions
from megatron_tiedlora.data.shared import fill_rounds
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.micro_batches import SampleRow, assumed_row, shared_shape
from megatron_tiedlora.planning.stages import StagePlan, plan_stages
from megatron_tiedlora.planning.work import Batch, Batches
from megatron_tiedlora.training.first_step import LargestMicroBatch, Work, squared_lengths, work_of
from megatron_tiedlora.training.member_plans import Data, Plans, shared_plan
from megatron_tiedlora.training.plan import RunPlan

Samples = Mapping[str, tuple[TokenDataset, GlobalBatch]]  # of each adapter's step, and where its samples are


def micro_batch_capacity(plans: Plans, *, shares: bool) -> int:
    """The most tokens in a micro-batch of several adapters: those that the largest one of one adapter may have.

    A rank has memory for these. 0: nothing is shared.
    """
    return max(plan.layout.rows * plan.layout.length for plan in plans.values()) if shares else 0


def longest_run(plans: Plans) -> RunPlan:
    """The plan that trains on most tokens, which decides on kernels for all."""

    def num_tokens(plan: RunPlan) -> int:
        return plan.settings.max_steps * plan.settings.global_batch_size * plan.settings.max_length

    return max(plans.values(), key=num_tokens)


@dataclass(frozen=True)
class GroupPlan:
    """The plans of all adapters as one run, of which each takes its first step, or one that `samples` holds.

    Attributes:
        samples: None for a run without data: each row is then one full sample, and all its tokens are supervised.
    """

    plans: Plans
    shares_micro_batches: bool = True
    samples: Samples | None = None

    @cached_property
    def shared(self) -> RunPlan:
        """See `shared_plan`."""
        return shared_plan(self.plans)

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return self.shared.source.shape

    @cached_property
    def rounds(self) -> list[list[tuple[str, int]]]:
        """Which of this rank's micro-batches go together; see `fill_rounds`."""
        capacity = micro_batch_capacity(self.plans, shares=self.shares_micro_batches)
        return fill_rounds({name: self._largest(name) for name in self._taking}, capacity=capacity)

    @cached_property
    def layout(self) -> Layout:
        """The record that the planners read."""
        return replace(
            self.shared.layout,
            adapters=tuple(plan.adapter for plan in self.plans.values()),
            named=True,
            rows=max(plan.layout.rows for plan in self.plans.values()),
            micro_batches=len(self.rounds),
            compiled=longest_run(self.plans).layout.compiled,
        )

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """Every pipeline stage, in order."""
        return plan_stages(self.shape, self.layout)

    @cached_property
    def batches(self) -> Batches:
        """This rank's micro-batches of the step."""
        numbers, found = {name: number for number, name in enumerate(self.plans)}, dict[Hashable, Batch]()
        rows = {name: self._rows(name) for name in self._taking}
        squared = {name: self._squared(name) for name in self._taking}

        def batch_of(some: Sequence[tuple[str, int]]) -> Batch:
            # without data all micro-batches of an adapter are alike
            key = tuple(some) if self.samples is not None else tuple(name for name, _ in some)
            if key not in found:
                shape = shared_shape(self.layout, [(numbers[name], rows[name][index]) for name, index in some])
                found[key] = Batch(shape, sum(squared[name][index] for name, index in some))
            return found[key]

        return Batches.of(map(batch_of, self.rounds))

    @cached_property
    def largest(self) -> LargestMicroBatch:
        """The largest micro-batch that any step may have, if it has the adapters of one of this step."""
        longest = {name: self._longest(name) for name in self.plans}
        multiple = self.layout.pad_multiple
        own = [plan.layout.rows * padded(longest[name], multiple) for name, plan in self.plans.items()]
        tokens = max(*own, min(sum(own), micro_batch_capacity(self.plans, shares=self.shares_micro_batches)))
        owners = dict.fromkeys(batch.shape.adapters for batch in self.batches.kinds)
        return LargestMicroBatch(tokens, self._most_documents(), min(tokens, max(longest.values())), tuple(owners))

    @cached_property
    def works(self) -> dict[str, Work]:
        """The work of each adapter that takes the step."""
        return {
            name: work_of(self.plans[name], None if self.samples is None else self.samples[name][1])
            for name in self._taking
        }

    @property
    def work(self) -> Work:
        """Of all samples of the step."""
        return Work(*map(sum, zip(*self.works.values(), strict=True)))

    @property
    def steps(self) -> float:
        """How many such steps have the tokens of the run. Adapters with fewer steps than others end earlier."""
        tokens = sum(work.tokens * self.plans[name].settings.max_steps for name, work in self.works.items())
        return tokens / self.work.tokens

    def _longest(self, name: str) -> int:
        """The tokens of an adapter's longest row."""
        if self.samples is None or name not in self.samples or self.shared.settings.packing:
            return self.layout.length
        return self.samples[name][0].longest

    def _most_documents(self) -> int:
        """The most documents in a micro-batch of the step; the padding of a packed row is one too."""
        if self.samples is None or not self.shared.settings.packing:
            return max(sum(self.plans[name].layout.rows for name, _ in some) for some in self.rounds)
        counts = {
            name: [sum(map(len, rows)) + len(rows) for rows in batch.on_rank(0, dp_size=self.shared.grid.dp_size)]
            for name, (_, batch) in self.samples.items()
        }
        return max(sum(counts[name][number] for name, number in some) for some in self.rounds)

    @property
    def _taking(self) -> list[str]:
        """The adapters that take the step, in order."""
        return [name for name in self.plans if self.samples is None or name in self.samples]

    def _largest(self, name: str) -> Sequence[int]:
        plan = self.plans[name]
        if self.samples is None:
            layout = plan.layout
            return [layout.rows * padded(layout.length, layout.pad_multiple)] * layout.micro_batches
        dataset, batch = self.samples[name]
        multiple = plan.layout.pad_multiple
        positions = [num_positions(dataset, [rows], pad_multiple=multiple) for rows in batch.micro_batches]
        return largest_positions(positions, dp_size=plan.grid.dp_size)

    def _rows(self, name: str) -> list[list[SampleRow]]:
        plan = self.plans[name]
        if self.samples is None:
            return [[assumed_row(plan.layout)] * plan.layout.rows] * plan.layout.micro_batches
        return list(plan.sample_rows(*self.samples[name]))

    def _squared(self, name: str) -> list[int]:
        """The sum of s^2 over the samples of each micro-batch."""
        layout, grid = self.plans[name].layout, self.shared.grid
        if self.samples is None:
            return [layout.rows * layout.length**2] * layout.micro_batches
        dataset, batch = self.samples[name]
        return squared_lengths(dataset, batch.on_rank(grid.dp_rank, dp_size=grid.dp_size))


def first_step_of(plans: Plans, data: Data, *, shares: bool) -> GroupPlan:
    """The first step of a run of these adapters; without data if `data` has none."""
    if not data:
        return GroupPlan(plans, shares)
    samples = {name: (data[name].train, plan.global_batch(data[name].train)) for name, plan in plans.items()}
    return GroupPlan(plans, shares, samples)
