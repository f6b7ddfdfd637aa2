"""Makes the micro-batches of training steps in any parallel layout. The samples of a step are the same in all layouts.

A step takes the next global batch from `token_dataset.sample_indices` and divides it into micro-batches of rows. A row
has one sample or several packed samples. Unpacked samples are sorted by length. Data-parallel rank j % dp gets
micro-batch j in accumulation step j // dp. Each rank computes the number of supervised tokens in the global batch, so
it knows the denominator of the loss without communication. Micro-batches of different adapters may be combined.

This module also makes labels, pads and packs rows, and resumes after a number of samples. It uses no GPUs.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tiedlora.adapters.adapter_groups import AdapterSegment
from megatron_tiedlora.base.messages import UserError, count_text
from megatron_tiedlora.config.batch import BatchPlan, filled
from megatron_tiedlora.data.token_dataset import TokenDataset, sample_indices
from megatron_tiedlora.model.batch import PAD_MULTIPLE, MicroBatch
from megatron_tiedlora.parallel.groups import concatenated
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

Rows = list[list[int]]
Lengths = Sequence[int] | NDArray[np.int64]

# Token t of sample i, counted in the run's order from 0, has the token index i * NUMBERS_OF_SAMPLE + t. So the index
# depends on the step, the sample and the token's position in the sample, but not on packing.
NUMBERS_OF_SAMPLE = 2**24


@dataclass(frozen=True)
class GlobalBatch:
    """The plan of one optimizer step, which is the same on every rank.

    micro_batches: the rows of each micro-batch, as lists of sample indices. Unpacked rows are sorted by length.
    ordinals: the same rows, with each sample's position in the run (from 0) instead of its index in the data set.
    num_supervised, num_tokens: totals over all samples of the step.
    lengths: the number of tokens of each sample.
    consumed_samples: the number of samples used up to and including this step. A resumed run continues after them.
    """

    micro_batches: Sequence[Rows]
    ordinals: Sequence[Rows]
    num_supervised: int
    num_tokens: int
    lengths: tuple[int, ...]
    consumed_samples: int

    def on_rank(self, dp_rank: int, *, dp_size: int) -> Sequence[Rows]:
        """Return the micro-batches of one data-parallel rank in accumulation order."""
        if len(self.micro_batches) % dp_size:
            raise ValueError(f"{len(self.micro_batches)} micro-batches cannot be divided equally over {dp_size} ranks")
        return self.micro_batches[dp_rank::dp_size]


@dataclass(frozen=True)
class TrainingStep:
    """One rank's micro-batches of a global batch.

    num_supervised, num_tokens, lengths: as in `GlobalBatch`, for the samples of all ranks.
    num_positions: the number of token positions in the micro-batches of all ranks, including padding.
    largest: the largest number of positions on any data-parallel rank, for each accumulation step.
    consumed_samples: the number of samples used up to and including this step.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_supervised: int
    num_tokens: int
    lengths: tuple[int, ...]
    num_positions: int
    largest: tuple[int, ...]
    consumed_samples: int


def plan_global_batch(dataset: TokenDataset, shape: BatchPlan, *, seed: int, consumed_samples: int) -> GlobalBatch:
    """Return the plan of the step after the first `consumed_samples` samples. The plan depends only on the arguments.

    With packing, the numbers of micro-batches and rows depend on the samples, but are the same on every rank.
    """
    size, micro = shape.global_batch_size, shape.micro_batch_size
    if size % micro:
        raise ValueError(f"global batch {size} does not divide into micro-batches of {micro}")
    indices = sample_indices(len(dataset), seed=seed, consumed=consumed_samples, count=size)
    lengths = dataset.lengths_of(indices)
    if shape.packed_length is None:
        rows = [[index] for index in np.argsort(lengths, kind="stable").tolist()]
        micro_batches = [rows[start : start + micro] for start in range(0, size, micro)]
    else:
        micro_batches = pack(
            lengths,
            shape.packed_length,
            group_size=micro,
            multiple=shape.data_parallel,
            min_groups=shape.data_parallel * min(shape.min_micro_batches, shape.accumulation_steps),
        )
    return GlobalBatch(
        micro_batches=[[[int(indices[index]) for index in row] for row in rows] for rows in micro_batches],
        ordinals=[[[consumed_samples + index for index in row] for row in rows] for rows in micro_batches],
        num_supervised=int(dataset.num_supervised_of(indices).sum()),
        num_tokens=int(lengths.sum()),
        lengths=tuple(lengths.tolist()),
        consumed_samples=consumed_samples + size,
    )


def training_steps(
    dataset: TokenDataset,
    shape: BatchPlan,
    *,
    seed: int,
    dp_rank: int,
    pad_id: int,
    pad_multiple: int = PAD_MULTIPLE,
    consumed_samples: int = 0,
    numbered: bool = False,
) -> Iterator[TrainingStep]:
    """Yield the training steps of one data-parallel rank after the first `consumed_samples` samples, without end.

    To continue after a step, pass its `consumed_samples`. If `numbered`, micro-batches have token indices. Raises
    UserError if a global batch has no supervised token. The error occurs on every rank at the same step.
    """
    dp_size, packed = shape.data_parallel, shape.packed_length is not None
    make = partial(collate, dataset, pad_id=pad_id, pad_multiple=pad_multiple, packed=packed)
    while True:
        plan = plan_global_batch(dataset, shape, seed=seed, consumed_samples=consumed_samples)
        if not plan.num_supervised:
            raise UserError(
                f"the global batch after {count_text(consumed_samples, 'sample')} has no supervised token, so it has"
                " no loss; raise --global_batch_size, or remove samples with a single token"
            )
        consumed_samples = plan.consumed_samples
        positions = num_positions(dataset, plan.micro_batches, pad_multiple=pad_multiple)
        own = zip(plan.on_rank(dp_rank, dp_size=dp_size), plan.ordinals[dp_rank::dp_size], strict=True)
        yield TrainingStep(
            micro_batches=tuple(make(rows, ordinals=ordinals if numbered else None) for rows, ordinals in own),
            num_supervised=plan.num_supervised,
            num_tokens=plan.num_tokens,
            lengths=plan.lengths,
            num_positions=sum(positions),
            largest=largest_positions(positions, dp_size=dp_size),
            consumed_samples=consumed_samples,
        )


def largest_positions(positions: Sequence[int], *, dp_size: int) -> tuple[int, ...]:
    """Return the largest number of positions on any rank, for each accumulation step of a global batch."""
    return tuple(max(positions[start : start + dp_size]) for start in range(0, len(positions), dp_size))


def _evaluation_rows(dataset: TokenDataset, micro_batch_size: int, dp_size: int) -> Iterator[list[Rows]]:
    """Yield the rows of every rank, one batch at a time. Samples are sorted by length, and each is on one rank."""
    order = np.argsort(dataset.lengths, kind="stable")
    whole = micro_batch_size * dp_size
    for first in range(0, len(order), whole):
        starts = range(first, first + whole, micro_batch_size)
        yield [[[index] for index in order[start : start + micro_batch_size].tolist()] for start in starts]


def evaluation_batches(
    dataset: TokenDataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_id: int,
    pad_multiple: int = PAD_MULTIPLE,
) -> Iterator[MicroBatch]:
    """Yield one rank's batches for one pass over all samples, sorted by length. Each sample is on exactly one rank.

    Every rank gets the same number of batches, so that collectives match. If a rank has no samples for a batch, it gets
    one row of padding without labels.
    """
    for of_ranks in _evaluation_rows(dataset, micro_batch_size, dp_size):
        yield collate(dataset, of_ranks[dp_rank], pad_id=pad_id, pad_multiple=pad_multiple)


def evaluation_sizes(
    dataset: TokenDataset, *, micro_batch_size: int, dp_size: int, pad_multiple: int = PAD_MULTIPLE
) -> Iterator[int]:
    """Yield the largest number of positions on any rank, for each batch of `evaluation_batches`."""
    for of_ranks in _evaluation_rows(dataset, micro_batch_size, dp_size):
        yield max(num_positions(dataset, of_ranks, pad_multiple=pad_multiple))


def collate(
    dataset: TokenDataset,
    rows: Rows,
    *,
    pad_id: int,
    pad_multiple: int = PAD_MULTIPLE,
    packed: bool = False,
    ordinals: Rows | None = None,
) -> MicroBatch:
    """Return a micro-batch. The samples of a row are concatenated, and rows are padded to a multiple of `pad_multiple`.

    A row without samples becomes padding without labels. If `rows` is empty, the batch is one such row.

    Args:
        packed: whether rows may have several samples. If so, the batch has document ids.
        ordinals: as in `GlobalBatch`. If they are given, the batch has token indices.
    """
    lengths = _row_lengths(dataset, rows)
    shape = _padded_shape(lengths, pad_multiple)
    tokens, labels = (np.full(shape, value, dtype=np.int64) for value in (pad_id, IGNORED_LABEL))
    positions, documents, numbers = np.zeros((3, *shape), dtype=np.int64)
    for number, row in enumerate(rows or [[]]):
        start = 0
        for document, index in enumerate(row):
            sample, supervised = dataset.sample(index), dataset.supervised_of(index)
            stop = start + len(sample)
            tokens[number, start:stop] = sample
            labels[number, start : stop - 1] = np.where(supervised[1:], sample[1:], IGNORED_LABEL)
            positions[number, start:stop] = np.arange(len(sample))
            documents[number, start:stop] = document
            if ordinals is not None:
                numbers[number, start:stop] = ordinals[number][document] * NUMBERS_OF_SAMPLE + np.arange(len(sample))
            start = stop
        # Padding after a single sample continues the sample's position ids, since the padding attends to the sample. In
        # a packed row, the padding is a separate document.
        positions[number, start:] = np.arange(shape[1] - start) + (0 if packed else start)
        documents[number, start:] = len(row)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        documents=torch.from_numpy(documents) if packed else None,
        token_index=torch.from_numpy(numbers) if ordinals is not None else None,
        lengths=torch.tensor(lengths),
        num_samples=sum(map(len, rows)),
    )


def num_positions(dataset: TokenDataset, micro_batches: Iterable[Rows], *, pad_multiple: int) -> list[int]:
    """Return the number of positions of each micro-batch after padding by `collate`."""
    return [math.prod(_padded_shape(_row_lengths(dataset, rows), pad_multiple)) for rows in micro_batches]


def _row_lengths(dataset: TokenDataset, rows: Rows) -> list[int]:
    """Return the number of tokens per row. Without rows, return [0] for the row of padding that `collate` makes."""
    return [int(dataset.lengths_of(row).sum()) for row in rows] or [0]


def _padded_shape(lengths: Sequence[int], pad_multiple: int) -> tuple[int, int]:
    """Return the padded shape (rows, positions per row) of a micro-batch whose rows have these lengths."""
    return len(lengths), -(-max(*lengths, 1) // pad_multiple) * pad_multiple


# Packing --------------------------------------------------------------------------------------------------------------


def pack(lengths: Lengths, capacity: int, *, group_size: int = 1, multiple: int = 1, min_groups: int = 1) -> list[Rows]:
    """Return micro-batches as lists of rows. A row is a list of indices into `lengths`. The longest rows come first.

    The result depends only on the arguments. First-fit decreasing determines the number of micro-batches. It fills at
    most 11/9 of the minimum number of rows, plus one (Johnson, 1973). Then rows are added until all micro-batches have
    the same number of rows. Samples are spread evenly over the rows if no row then exceeds `capacity`; otherwise the
    longest rows are split in two. So all ranks have a similar amount of work.

    Args:
        capacity: the maximum number of tokens per row; no sample is longer.
        group_size: the maximum number of rows per micro-batch.
        multiple: the number of micro-batches is divisible by this number.
        min_groups: the minimum number of micro-batches, even if all rows fit into fewer.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    if not order:
        return []
    assert int(lengths[order[0]]) <= capacity, "a sample is longer than a row"
    rows = _first_fit(lengths, order, capacity)
    num_groups = max(-(-len(rows) // group_size), min_groups)
    num_groups += -num_groups % multiple
    size = -(-len(rows) // num_groups)
    num_rows = size * num_groups
    rows = _spread(lengths, order, num_rows, capacity) or _halve(lengths, rows, num_rows)
    rows.sort(key=lambda row: -_tokens(lengths, row))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _first_fit(lengths: Lengths, order: Sequence[int], capacity: int) -> Rows:
    rows: Rows = []
    room: list[int] = []
    for index in order:
        size = int(lengths[index])
        row = next((row for row, left in enumerate(room) if left >= size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= size
    return rows


def _spread(lengths: Lengths, order: Sequence[int], num_rows: int, capacity: int) -> Rows | None:
    """Add each sample of `order` to the shortest of `num_rows` rows. Return None if a row exceeds `capacity`."""
    rows: Rows = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for index in order:
        row = filled.index(min(filled))
        filled[row] += int(lengths[index])
        if filled[row] > capacity:
            return None
        rows[row].append(index)
    return rows


def _halve(lengths: Lengths, rows: Rows, num_rows: int) -> Rows:
    """Halve the longest row of several samples until there are `num_rows` rows. Without such a row, add empty ones."""
    rows = list(rows)
    while len(rows) < num_rows:
        longest = max(rows, key=lambda row: _tokens(lengths, row) if len(row) > 1 else 0)
        rows[rows.index(longest)] = longest[::2]
        rows.append(longest[1::2])
    return rows


def _tokens(lengths: Lengths, row: Sequence[int]) -> int:
    return sum(int(lengths[index]) for index in row)


# Micro-batches of several adapters ------------------------------------------------------------------------------------
#
# An adapter's micro-batch is never split: its gradient is one sum. A shared micro-batch has at most one per adapter.


Owned = tuple[str, MicroBatch]  # an adapter's name, and one of its micro-batches


def shared_rounds(steps: Mapping[str, TrainingStep], *, capacity: int) -> list[list[Owned]]:
    """Return the combined micro-batches of a step. Each of them is a list of micro-batches of different adapters.

    Args:
        steps: this rank's training step of each adapter, by adapter name.
        capacity: the maximum number of tokens per combined micro-batch, including padding, or 0 not to combine any.
    """
    rounds = fill_rounds({name: step.largest for name, step in steps.items()}, capacity=capacity)
    return [[(name, steps[name].micro_batches[number]) for name, number in some] for some in rounds]


def fill_rounds(largest: Mapping[str, Sequence[int]], *, capacity: int) -> list[list[tuple[str, int]]]:
    """Return combined micro-batches as lists of (adapter name, micro-batch index). The first micro-batches of all
    adapters are combined, then their second micro-batches, and so on.

    A micro-batch is added to the last combined one if the total is at most `capacity` tokens per rank. So all ranks
    have the same number of combined micro-batches, and the order of each adapter does not change. `largest` has the
    largest number of positions on any rank, for each micro-batch of each adapter."""
    found: list[list[tuple[str, int]]] = []
    for number in range(max(map(len, largest.values()), default=0)):
        present = [(name, number) for name, positions in largest.items() if number < len(positions)]
        found += filled((one, largest[one[0]][number], capacity) for one in present)
    return found


def shared_micro_batch(parts: Sequence[Owned]) -> MicroBatch:
    """Combine the micro-batches of several adapters into one of shape (1, tokens). A single one keeps its shape."""
    batches = [batch for _, batch in parts]
    segments = tuple(AdapterSegment(name, *batch.tokens.shape) for name, batch in parts)
    if len(batches) == 1:
        return replace(batches[0], segments=segments)
    documents = [batch.documents for batch in batches if batch.documents is not None]
    assert len(documents) in (0, len(batches)), "some rows are packed and some are not"
    # A batch of an adapter without dropout has no token index. Zeros take its place and are not used.
    indices = [torch.zeros_like(batch.tokens) if batch.token_index is None else batch.token_index for batch in batches]
    indexed = any(batch.token_index is not None for batch in batches)
    inputs = [batch.loss_inputs.flatten(1) for batch in batches if batch.loss_inputs is not None]
    assert len(inputs) in (0, len(batches)), "some adapters have an objective and some have none"
    return MicroBatch(
        tokens=concatenated([batch.tokens for batch in batches])[None],
        positions=concatenated([batch.positions for batch in batches])[None],
        labels=concatenated([batch.labels for batch in batches])[None],
        documents=concatenated(documents)[None] if documents else None,
        token_index=concatenated(indices)[None] if indexed else None,
        segments=segments,
        objectives=tuple(objective for batch in batches for objective in batch.objectives),
        loss_inputs=torch.cat(inputs, 1)[:, None] if inputs else None,
        lengths=concatenated([batch.lengths for batch in batches]),
        num_samples=sum(batch.num_samples for batch in batches),
    )
