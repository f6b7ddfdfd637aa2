"""What a run of several adapters needs and sends, from their plans alone: its layout, and its shared micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_tiedlora.data.loader import GlobalBatch, largest_positions, num_positions
from megatron_tiedlora.data.shared import fill_rounds
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.micro_batches import MicroBatchShape, SampleRow, assumed_row, shared_shape
from megatron_tiedlora.planning.stages import StagePlan, plan_stages
from megatron_tiedlora.training.build_bank import Plans, shared_plan
from megatron_tiedlora.training.plan import RunPlan

Batches = Mapping[str, tuple[TokenDataset, GlobalBatch]]  # of each adapter's step, and where its samples are


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
    """The plans of all adapters as one run, of which each takes its first step, or one that `batches` holds.

    Attributes:
        batches: None for a run without data: each row is then one full sample, and all its tokens are supervised.
    """

    plans: Plans
    shares_micro_batches: bool = True
    batches: Batches | None = None

    @cached_property
    def shared(self) -> RunPlan:
        """See `shared_plan`."""
        return shared_plan(self.plans)

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
            is_bank=True,
            rows=max(plan.layout.rows for plan in self.plans.values()),
            micro_batches=len(self.rounds),
            compiled=longest_run(self.plans).layout.compiled,
        )

    @cached_property
    def stages(self) -> tuple[StagePlan, ...]:
        """Every pipeline stage, in order."""
        return plan_stages(self.shared.source.shape, self.layout)

    @cached_property
    def micro_batches(self) -> tuple[MicroBatchShape, ...]:
        """The shapes of this rank's micro-batches of the step."""
        numbers = {name: number for number, name in enumerate(self.plans)}
        rows = {name: self._rows(name) for name in self._taking}
        return tuple(
            shared_shape(self.layout, [(numbers[name], rows[name][index]) for name, index in some])
            for some in self.rounds
        )

    def most_tokens(self, longest: Mapping[str, int]) -> int:
        """The tokens of the largest micro-batch that any step may have.

        Args:
            longest: the tokens of each adapter's longest row.
        """
        multiple = self.layout.pad_multiple
        own = [plan.layout.rows * padded(longest[name], multiple) for name, plan in self.plans.items()]
        return max(*own, min(sum(own), micro_batch_capacity(self.plans, shares=self.shares_micro_batches)))

    def most_documents(self) -> int:
        """The most documents in a micro-batch of the step; the padding of a packed row is one too."""
        if self.batches is None or not self.shared.settings.packing:
            return max(sum(self.plans[name].layout.rows for name, _ in some) for some in self.rounds)
        counts = {
            name: [sum(map(len, rows)) + len(rows) for rows in batch.on_rank(0, dp_size=self.shared.grid.dp_size)]
            for name, (_, batch) in self.batches.items()
        }
        return max(sum(counts[name][number] for name, number in some) for some in self.rounds)

    @property
    def _taking(self) -> list[str]:
        """The adapters that take the step, in order."""
        return [name for name in self.plans if self.batches is None or name in self.batches]

    def _largest(self, name: str) -> Sequence[int]:
        plan = self.plans[name]
        if self.batches is None:
            layout = plan.layout
            return [layout.rows * padded(layout.length, layout.pad_multiple)] * layout.micro_batches
        dataset, batch = self.batches[name]
        multiple = plan.layout.pad_multiple
        positions = [num_positions(dataset, [rows], pad_multiple=multiple) for rows in batch.micro_batches]
        return largest_positions(positions, dp_size=plan.grid.dp_size)

    def _rows(self, name: str) -> list[list[SampleRow]]:
        plan = self.plans[name]
        if self.batches is None:
            return [[assumed_row(plan.layout)] * plan.layout.rows] * plan.layout.micro_batches
        return list(plan.sample_rows(*self.batches[name]))
