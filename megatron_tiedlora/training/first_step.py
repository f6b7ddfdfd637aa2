"""The first step of a run as a plan: its micro-batches, and the largest one, from its samples or without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from megatron_tiedlora.data.loader import GlobalBatch
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.micro_batches import assumed_micro_batches, micro_batch_shape
from megatron_tiedlora.planning.work import Batch, Batches
from megatron_tiedlora.training.plan import RunPlan

if TYPE_CHECKING:  # a plan without data does not wait for what reads it
    from megatron_tiedlora.training.run_data import RunData


@dataclass(frozen=True)
class FirstStep:
    """The data of a run, and the plan of its first step."""

    data: RunData
    batch: GlobalBatch


class LargestMicroBatch(NamedTuple):
    """The largest micro-batch of a run: the length of its rows, padding included, its documents and the longest one."""

    length: int
    documents: int
    longest: int


def largest_micro_batch(layout: Layout, *, packing: bool, first: FirstStep | None = None) -> LargestMicroBatch:
    """The largest micro-batch; without data each row is one sample of the full length."""
    if first is not None:
        return largest_of(layout, first.data.train, first.batch, packing=packing)
    length = padded(layout.length, layout.pad_multiple)
    return LargestMicroBatch(length, layout.rows, length)


def largest_of(layout: Layout, dataset: TokenDataset, batch: GlobalBatch, *, packing: bool) -> LargestMicroBatch:
    """The largest micro-batch of these samples: of a run as many rows, of `batch` the documents."""
    length = padded(layout.length if packing else dataset.longest, layout.pad_multiple)
    if packing:  # a micro-batch's samples, and the padding of each row
        documents = max(sum(map(len, rows)) + len(rows) for rows in batch.micro_batches)
        return LargestMicroBatch(length, documents, dataset.longest)
    return LargestMicroBatch(length, layout.rows, length)


def first_batches(plan: RunPlan, layout: Layout, first: FirstStep | None = None) -> Batches:
    """The micro-batches of data-parallel rank 0 in the first step.

    Args:
        layout: of the plan, or one that differs from it in what no sample depends on.
    """
    if first is None:
        shapes = assumed_micro_batches(layout)
        return Batches((Batch(shapes[0], layout.rows * layout.length**2),), (0,) * len(shapes), (len(shapes),))
    return batches_of(plan, first.data.train, first.batch, layout=layout)


def batches_of(plan: RunPlan, dataset: TokenDataset, batch: GlobalBatch, *, layout: Layout | None = None) -> Batches:
    """This data-parallel rank's micro-batches of a step on these samples.

    Args:
        layout: in place of the plan's; see `first_batches`.
    """
    found = []
    rows_of_rank = batch.on_rank(plan.grid.dp_rank, dp_size=plan.grid.dp_size)
    for marks, rows in zip(plan.sample_rows(dataset, batch), rows_of_rank, strict=True):
        lengths = dataset.lengths_of([index for row in rows for index in row])
        found.append(Batch(micro_batch_shape(layout or plan.layout, marks), int((lengths**2).sum())))
    return Batches.of(found)
