"""The first step of a run as a plan: its micro-batches, and the largest one, from its samples or without data.

`group_plan.GroupPlan` has the same of a run of several adapters.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.loader import GlobalBatch
from megatron_tiedlora.data.packing import Rows
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.flops import step_flops
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.machines import Machine
from megatron_tiedlora.planning.memory import StageMemory, StepBytes, held_bytes, step_bytes, with_reserves
from megatron_tiedlora.planning.micro_batches import assumed_micro_batches, micro_batch_shape
from megatron_tiedlora.planning.stages import StagePlan
from megatron_tiedlora.planning.work import Batch, Batches
from megatron_tiedlora.training.plan import RunPlan

if TYPE_CHECKING:  # a plan without data does not wait for what reads it
    from megatron_tiedlora.training.run_data import RunData


class LargestMicroBatch(NamedTuple):
    """The largest micro-batch of a run: its tokens, padding included, its documents and the longest one.

    Attributes:
        owners: the numbers of the adapters that may own its tokens, in each case that there is.
    """

    tokens: int
    documents: int
    longest: int
    owners: tuple[tuple[int, ...], ...] = ((0,),)

    def step_bytes(self, stage: StagePlan) -> StepBytes:
        """What a rank of a stage needs for it beside what it holds anyway, in the case that needs most."""
        tokens, documents, longest, owners = self
        sizes = {"tokens": tokens, "documents": documents, "longest": longest}
        return max((step_bytes(stage, adapters=adapters, **sizes) for adapters in owners), key=sum)

    def memory(self, stage: StagePlan, machine: Machine) -> StageMemory:
        """All that such a rank needs."""
        return with_reserves(stage, held_bytes(stage), self.step_bytes(stage), machine)


class Work(NamedTuple):
    """The tokens of the samples of a step of the whole run, and their FLOPs, as `mfu` of a run counts them."""

    tokens: int
    flops: int


@dataclass(frozen=True)
class FirstStep:
    """The first step of a run of one adapter.

    Attributes:
        layout: of the plan, or one that differs from it in what no sample depends on.
        data: None for a run without data: each row is then one full sample, and all its tokens are supervised.
    """

    plan: RunPlan
    layout: Layout
    data: RunData | None = None

    @property
    def shape(self) -> ModelShape:
        """The model's."""
        return self.plan.source.shape

    @property
    def plans(self) -> dict[str, RunPlan]:
        """The only plan, whose adapter has no name."""
        return {"": self.plan}

    @cached_property
    def batch(self) -> GlobalBatch | None:
        """Its samples, if there is data."""
        return None if self.data is None else self.plan.global_batch(self.data.train)

    @cached_property
    def largest(self) -> LargestMicroBatch:
        """The largest micro-batch of the run."""
        layout = self.layout
        if self.data is not None and self.batch is not None:
            return largest_of(layout, self.data.train, self.batch, packing=self.plan.settings.packing)
        length = padded(layout.length, layout.pad_multiple)
        return LargestMicroBatch(layout.rows * length, layout.rows, length)

    @cached_property
    def batches(self) -> Batches:
        """The micro-batches of data-parallel rank 0."""
        layout, plan = self.layout, self.plan
        if self.data is None or self.batch is None:
            shapes = assumed_micro_batches(layout)
            return Batches((Batch(shapes[0], layout.rows * layout.length**2),), (0,) * len(shapes), (len(shapes),))
        return batches_of(plan, layout, self.data.train, self.batch)

    @cached_property
    def work(self) -> Work:
        """Of all samples."""
        return work_of(self.plan, self.batch)

    @property
    def steps(self) -> float:
        """How many such steps the run has."""
        return self.plan.settings.max_steps


def largest_of(layout: Layout, dataset: TokenDataset, batch: GlobalBatch, *, packing: bool) -> LargestMicroBatch:
    """The largest micro-batch of these samples: of a run as many rows, of `batch` the documents."""
    length = padded(layout.length if packing else dataset.longest, layout.pad_multiple)
    if packing:  # a micro-batch's samples, and the padding of each row
        documents = max(sum(map(len, rows)) + len(rows) for rows in batch.micro_batches)
        return LargestMicroBatch(layout.rows * length, documents, dataset.longest)
    return LargestMicroBatch(layout.rows * length, layout.rows, length)


def batches_of(plan: RunPlan, layout: Layout, dataset: TokenDataset, batch: GlobalBatch) -> Batches:
    """This data-parallel rank's micro-batches of a step on these samples."""
    ours = batch.on_rank(plan.grid.dp_rank, dp_size=plan.grid.dp_size)
    pairs = zip(plan.sample_rows(dataset, batch), squared_lengths(dataset, ours), strict=True)
    return Batches.of(Batch(micro_batch_shape(layout, rows), squared) for rows, squared in pairs)


def work_of(plan: RunPlan, batch: GlobalBatch | None) -> Work:
    """The work of a step of one adapter. Without data all its samples have the full length."""
    if batch is None:
        length, samples = plan.settings.max_length, plan.batches.global_batch_size
        tokens, squared, supervised = samples * length, samples * length**2, samples * (length - 1)
    else:
        tokens, squared, supervised = batch.num_tokens, batch.squared_lengths, batch.num_supervised
    flops = step_flops(
        plan.source.shape,
        plan.adapter,
        num_tokens=tokens,
        squared_lengths=squared,
        num_after=supervised,
        num_supervised=supervised,
    )
    return Work(tokens, flops.total)


def squared_lengths(dataset: TokenDataset, micro_batches: Iterable[Rows]) -> list[int]:
    """The sum of s^2 over the samples of each micro-batch."""
    lengths = (dataset.lengths_of([index for row in rows for index in row]) for rows in micro_batches)
    return [int((each**2).sum()) for each in lengths]
