"""Batches for every layout from one plan: which samples make a step does not depend on how many ranks there are.

A step takes the next global batch of `order.sample_indices` and cuts it into micro-batches of rows: several samples
packed into a row, or samples sorted by length, one a row. Micro-batch j goes to accumulation step j // dp on
data-parallel rank j % dp. The supervised tokens of the whole step follow from lengths alone, so every rank knows the
loss's denominator without a message.

Owns labels, padding and resume by a count of consumed samples. Leaves which samples share a row to `packing`, and
devices to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.order import sample_indices
from megatron_tiedlora.data.packing import Rows, pack
from megatron_tiedlora.engine.runner import StepInput
from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.planning.layout import BASE_MULTIPLE


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right to one length (b rows, s positions); causal attention needs no mask for that.

    input_ids: (b, s) int64. labels: (b, s) int64, already shifted: labels[:, t] is token t + 1 where that is
    supervised, else -100. position_ids: (b, s) int64, from 0 up in each sample.
    documents: (b, s) int64, the number of each token's sample in its row, padding being one more; None where each row
    is one sample. lengths: (b,) int64, real tokens of each row. num_samples is 0 for a batch that only fills up.
    num_tokens: real tokens. num_supervised: labels that are not -100. squared_lengths: sum of the samples' squared
    lengths.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    documents: torch.Tensor | None
    lengths: torch.Tensor
    num_samples: int
    num_tokens: int
    num_supervised: int
    squared_lengths: int

    @property
    def model_input(self) -> StepInput:
        """What the model is called with."""
        return StepInput(self.input_ids, self.position_ids, self.labels, self.documents)


@dataclass(frozen=True)
class GlobalBatch:
    """The plan of one optimizer step, the same on every rank.

    micro_batches: of each its rows, and of each row its samples' indices; one sample a row stand shortest first.
    num_supervised, num_tokens, squared_lengths: of all samples of the step.
    consumed_samples: samples consumed once this step is done; what a resume starts from.
    """

    micro_batches: Sequence[Rows]
    num_supervised: int
    num_tokens: int
    squared_lengths: int
    consumed_samples: int

    def on_rank(self, dp_rank: int, *, dp_size: int) -> Sequence[Rows]:
        """Return this rank's micro-batches in the order of accumulation."""
        if len(self.micro_batches) % dp_size:
            raise ValueError(f"{len(self.micro_batches)} micro-batches do not divide over {dp_size} ranks")
        return self.micro_batches[dp_rank::dp_size]


@dataclass(frozen=True)
class TrainingStep:
    """One rank's share of a global batch.

    num_supervised, num_tokens, squared_lengths: of the samples of the whole global batch. num_positions: of its
    micro-batches on all ranks, padding included. consumed_samples: after this step.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_supervised: int
    num_tokens: int
    squared_lengths: int
    num_positions: int
    consumed_samples: int


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut, the same on every rank.

    Attributes:
        micro_batch_size: rows of a micro-batch; packed, at most.
        packed_length: tokens of a row that holds several samples; None: one sample a row.
        least_micro_batches: packed, as many for each rank or more, as far as one sample a row would give as many.
    """

    global_batch_size: int
    micro_batch_size: int
    dp_size: int
    packed_length: int | None = None
    least_micro_batches: int = 1

    @property
    def most_micro_batches(self) -> int:
        """Of a rank in a step: those of one sample a row."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)


def plan_global_batch(
    dataset: TokenDataset, shape: BatchShape, *, seed: int, consumed_samples: int
) -> GlobalBatch:
    """Plan the step that follows `consumed_samples`; a pure function of its arguments.

    Packed, the number of micro-batches and that of their rows follow from the samples, and are the same on every rank.
    """
    size, micro = shape.global_batch_size, shape.micro_batch_size
    if size % micro:
        raise ValueError(f"global batch {size} does not divide into micro-batches of {micro}")
    indices = sample_indices(len(dataset), seed=seed, consumed=consumed_samples, count=size)
    lengths = dataset.lengths[indices]
    if shape.packed_length is None:
        rows = [[index] for index in np.argsort(lengths, kind="stable").tolist()]
        micro_batches = [rows[start : start + micro] for start in range(0, size, micro)]
    else:
        micro_batches = pack(
            lengths,
            shape.packed_length,
            group_size=micro,
            multiple=shape.dp_size,
            least_groups=shape.dp_size * min(shape.least_micro_batches, shape.most_micro_batches),
        )
    return GlobalBatch(
        micro_batches=[[[int(indices[index]) for index in row] for row in rows] for rows in micro_batches],
        num_supervised=int(dataset.supervised_counts[indices].sum()),
        num_tokens=int(lengths.sum()),
        squared_lengths=int((lengths**2).sum()),
        consumed_samples=consumed_samples + size,
    )


class TrainingLoader:
    """Endless steps of one data-parallel rank, from `consumed_samples` on.

    `consumed_samples` counts the global batches handed out so far; a new loader started with the count of a
    finished step (`TrainingStep.consumed_samples`) goes on exactly there.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        shape: BatchShape,
        *,
        seed: int,
        dp_rank: int,
        pad_id: int,
        pad_multiple: int = BASE_MULTIPLE,
        consumed_samples: int = 0,
    ) -> None:
        self._dataset = dataset
        self._shape = shape
        self._seed = seed
        self._dp_rank = dp_rank
        self._pad_id = pad_id
        self._pad_multiple = pad_multiple
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[TrainingStep]:
        return self

    def __next__(self) -> TrainingStep:
        plan = plan_global_batch(
            self._dataset, self._shape, seed=self._seed, consumed_samples=self.consumed_samples
        )
        micro_batches = tuple(
            collate(
                self._dataset,
                rows,
                pad_id=self._pad_id,
                pad_multiple=self._pad_multiple,
                packed=self._shape.packed_length is not None,
            )
            for rows in plan.on_rank(self._dp_rank, dp_size=self._shape.dp_size)
        )
        self.consumed_samples = plan.consumed_samples
        return TrainingStep(
            micro_batches=micro_batches,
            num_supervised=plan.num_supervised,
            num_tokens=plan.num_tokens,
            squared_lengths=plan.squared_lengths,
            num_positions=num_positions(self._dataset, plan.micro_batches, pad_multiple=self._pad_multiple),
            consumed_samples=plan.consumed_samples,
        )


def num_evaluation_batches(dataset: TokenDataset, *, micro_batch_size: int, dp_size: int) -> int:
    """Return how many batches `evaluation_batches` gives on each rank."""
    total = -(-len(dataset) // micro_batch_size)
    return -(-total // dp_size)


def evaluation_batches(
    dataset: TokenDataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_id: int,
    pad_multiple: int = BASE_MULTIPLE,
) -> Iterator[MicroBatch]:
    """Yield one rank's batches of a pass over all samples, sorted by length, each sample once over all ranks.

    Every rank gets the same number of batches, so that collectives match; where samples have run out a batch
    is one padded row without a label.
    """
    order = np.argsort(dataset.lengths, kind="stable")
    for step in range(num_evaluation_batches(dataset, micro_batch_size=micro_batch_size, dp_size=dp_size)):
        start = (step * dp_size + dp_rank) * micro_batch_size
        indices = order[start : start + micro_batch_size]
        yield collate(dataset, [[index] for index in indices.tolist()], pad_id=pad_id, pad_multiple=pad_multiple)


def collate(
    dataset: TokenDataset,
    rows: Rows,
    *,
    pad_id: int,
    pad_multiple: int = BASE_MULTIPLE,
    packed: bool = False,
) -> MicroBatch:
    """Rows of samples, end to end, padded to a common length that is a multiple of `pad_multiple`.

    No row at all gives one of padding without a label, and so does a row without a sample.

    Args:
        packed: whether rows may hold several samples; the batch then says which tokens belong together.
    """
    lengths = _row_lengths(dataset, rows)
    shape = _padded_shape(lengths, pad_multiple)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    positions = np.zeros(shape, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int64)
    for number, row in enumerate(rows or [[]]):
        start = 0
        for place, index in enumerate(row):
            sample = dataset.sample(index)
            first, stop = max(int(dataset.prompt_lengths[index]), 1), start + len(sample)  # `first` is predicted first
            input_ids[number, start:stop] = sample
            labels[number, start + first - 1 : stop - 1] = sample[first:]
            positions[number, start:stop] = np.arange(len(sample))
            documents[number, start:stop] = place
            start = stop
        # Padding behind one sample goes on counting, as its tokens see that sample; packed it is a document of its own.
        positions[number, start:] = np.arange(shape[1] - start) + (0 if packed else start)
        documents[number, start:] = len(row)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        documents=torch.from_numpy(documents) if packed else None,
        lengths=torch.tensor(lengths),
        num_samples=sum(map(len, rows)),
        num_tokens=sum(lengths),
        num_supervised=int((labels != IGNORED_LABEL).sum()),
        squared_lengths=sum(int((dataset.lengths_of(row) ** 2).sum()) for row in rows),
    )


def num_positions(dataset: TokenDataset, micro_batches: Iterable[Rows], *, pad_multiple: int) -> int:
    """Positions of micro-batches as `collate` pads them."""
    return sum(math.prod(_padded_shape(_row_lengths(dataset, rows), pad_multiple)) for rows in micro_batches)


def _row_lengths(dataset: TokenDataset, rows: Rows) -> list[int]:
    """Tokens of each row; where there is no row, those of the one that stands in."""
    return [int(dataset.lengths_of(row).sum()) for row in rows] or [0]


def _padded_shape(lengths: Sequence[int], pad_multiple: int) -> tuple[int, int]:
    """(rows, positions of each) of a micro-batch of rows of these lengths."""
    return len(lengths), -(-max(*lengths, 1) // pad_multiple) * pad_multiple
