"""The step of a run as a plan: its layout, its micro-batches and the largest one, from its samples or without data.

A run of one adapter is a list of one, which shares its micro-batches with none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.loader import GlobalBatch, fill_rounds, largest_positions, num_positions
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.planning.adapter_plans import Data, Plans, shared_plan
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, SampleRow, StagePlan, plan_stages, shared_shape
from megatron_tiedlora.planning.memory import LargestMicroBatch
from megatron_tiedlora.planning.passes import step_flops
from megatron_tiedlora.planning.run_plan import RunPlan

Samples = Mapping[str, tuple[TokenDataset, GlobalBatch]]  # of each adapter's step, and where its samples are


class Work(NamedTuple):
    """The tokens of the samples of a step of the whole run, and their FLOPs, as `mfu` of a run counts them."""

    tokens: int
    flops: int


def micro_batch_capacity(plans: Plans, *, shares: bool) -> int:
    """The most tokens in a micro-batch of several adapters: those that the largest one of one adapter may have.

    A rank has memory for these. 0: nothing is shared.
    """
    return max(plan.layout.rows * plan.layout.length for plan in plans.values()) if shares else 0


def longest_run(plans: Plans) -> RunPlan:
    """The plan that trains on most tokens, which decides on kernels for all."""
    return max(plans.values(), key=lambda plan: plan.num_tokens)


@dataclass(frozen=True)
class StepPlan:
    """The plans of all adapters as one run, of which each takes its first step, or one that `samples` holds.

    Attributes:
        samples: None for a run without data: each row is then one full sample, and all its tokens are supervised.
    """

    plans: Plans
    shares_micro_batches: bool = True
    samples: Samples | None = None

    @classmethod
    def first(cls, plans: Plans, data: Data, *, shares: bool) -> StepPlan:
        """The first step of all adapters; without data if `data` has none."""
        if not data:
            return cls(plans, shares)
        samples = {name: (data[name].train, plan.global_batch(data[name].train)) for name, plan in plans.items()}
        return cls(plans, shares, samples)

    @cached_property
    def shared(self) -> RunPlan:
        """See `shared_plan`."""
        return shared_plan(self.plans)

    @property
    def shape(self) -> ModelShape:
        """Shape of the base model."""
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
            named=ONLY not in self.plans,
            rows=max(plan.layout.rows for plan in self.plans.values()),
            micro_batches=max(len(self.rounds), *(plan.layout.micro_batches for plan in self.plans.values())),
            compiled=longest_run(self.plans).layout.compiled,
        )

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """Every pipeline stage, in order."""
        return plan_stages(self.shape, self.layout)

    @cached_property
    def batches(self) -> tuple[MicroBatchShape, ...]:
        """This rank's micro-batches of the step, in the order in which they run."""
        own = {name: self._own(name) for name in self._taking}

        @cache
        def batch_of(*some: tuple[str, int]) -> MicroBatchShape:
            rows, squared = zip(*(own[name][index] for name, index in some), strict=True)
            numbers = (self._numbers[name] for name, _ in some)
            shape = shared_shape(self.layout, list(zip(numbers, rows, strict=True)))
            return shape._replace(squared_lengths=sum(squared))

        alike = self.samples is None  # all micro-batches of an adapter
        return tuple(batch_of(*((name, 0 if alike else index) for name, index in some)) for some in self.rounds)

    @cached_property
    def largest(self) -> LargestMicroBatch:
        """The largest micro-batch that any step may have, if it has the adapters of one of this step."""
        longest = dict.fromkeys(self.plans, self.layout.length)  # tokens of a row
        if self.samples is not None and not self.shared.settings.packing:
            longest |= {name: dataset.longest for name, (dataset, _) in self.samples.items()}
        longest = {name: padded(length, self.layout.pad_multiple) for name, length in longest.items()}
        own = [plan.layout.rows * longest[name] for name, plan in self.plans.items()]
        tokens = max(*own, min(sum(own), micro_batch_capacity(self.plans, shares=self.shares_micro_batches)))
        owners = dict.fromkeys(tuple(self._numbers[name] for name, _ in some) for some in self.rounds)
        document = max(longest.values())
        if self.samples is not None and self.shared.settings.packing:
            document = max(dataset.longest for dataset, _ in self.samples.values())
        return LargestMicroBatch(tokens, self._most_documents(), document, tuple(owners))

    @cached_property
    def works(self) -> dict[str, Work]:
        """The work of each adapter that takes the step."""
        found = {}
        for name in self._taking:
            plan = self.plans[name]
            length, number = plan.settings.max_length, plan.batches.global_batch_size
            counts = number * length, number * length**2, number * (length - 1)  # all samples have the full length
            if self.samples is not None:
                _, batch = self.samples[name]
                counts = batch.num_tokens, batch.squared_lengths, batch.num_supervised
            found[name] = Work(counts[0], step_flops(self.shape, plan.adapter, *counts).total())
        return found

    @property
    def work(self) -> Work:
        """Of all samples of the step."""
        return Work(*map(sum, zip(*self.works.values(), strict=True)))

    @property
    def steps(self) -> float:
        """How many such steps have the tokens of the run. Adapters with fewer steps than others end earlier."""
        tokens = sum(work.tokens * self.plans[name].settings.max_steps for name, work in self.works.items())
        whole, rest = divmod(tokens, self.work.tokens)
        return tokens / self.work.tokens if rest else whole

    @cached_property
    def _numbers(self) -> dict[str, int]:
        """The number of each adapter in the layout."""
        return {name: number for number, name in enumerate(self.plans)}

    @property
    def _taking(self) -> list[str]:
        """The adapters that take the step, in order."""
        return [name for name in self.plans if self.samples is None or name in self.samples]

    def _most_documents(self) -> int:
        """The most documents in a micro-batch of the step; the padding of a packed row is one too."""
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
        """The positions of each of an adapter's micro-batches, on the rank where they are most."""
        plan, layout = self.plans[name], self.plans[name].layout
        if self.samples is None:
            return [layout.rows * padded(layout.length, layout.pad_multiple)] * layout.micro_batches
        dataset, batch = self.samples[name]
        positions = num_positions(dataset, batch.micro_batches, pad_multiple=layout.pad_multiple)
        return largest_positions(positions, dp_size=plan.grid.dp_size)

    def _own(self, name: str) -> list[tuple[list[SampleRow], int]]:
        """The rows of each of an adapter's micro-batches on this rank, and the sum of s^2 over samples of s tokens.

        Without data a row is one full sample. No position predicts the first token of a sample.
        """
        layout, grid = self.plans[name].layout, self.shared.grid
        if self.samples is None:
            rows = [np.arange(layout.length) > 0] * layout.rows
            return [(rows, layout.rows * layout.length**2)] * layout.micro_batches
        (dataset, batch), found = self.samples[name], []
        for samples in batch.on_rank(grid.dp_rank, dp_size=grid.dp_size):
            lengths = dataset.lengths_of([index for row in samples for index in row])
            rows = [np.concatenate([dataset.supervised_of(index) for index in row]) for row in samples]
            found.append((rows, int((lengths**2).sum())))
        return found
