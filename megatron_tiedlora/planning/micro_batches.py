"""The sizes of micro-batches that their messages and saved bytes depend on, from the rows of their samples.

A micro-batch has tokens of one adapter, or of several adapters of a bank, whose rows are then end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.model.batch import padded_positions
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.layout import Layout

SampleRow = NDArray[np.bool_]
"""Whether each token of a row's samples, end to end, is supervised; never the first of a sample."""


class ShareShape(NamedTuple):
    """The part of a micro-batch that one adapter owns.

    Attributes:
        adapter: its number in the layout.
        num_tokens: its positions, padding included.
        num_after: those of them that are computed after the last attention; see `Supervised`.
    """

    adapter: int
    num_tokens: int
    num_after: int


@dataclass(frozen=True)
class MicroBatchShape:
    """The sizes of a micro-batch that its messages and its work depend on.

    Attributes:
        num_rows, length: of its tokens; those of a bank's micro-batch are one row.
        shares: one for each adapter that it has tokens of.
        squared_lengths: the sum of s^2 over its documents of s tokens, for attention.
    """

    num_rows: int
    length: int
    num_supervised: int
    shares: tuple[ShareShape, ...]
    squared_lengths: int = 0

    @property
    def num_tokens(self) -> int:
        """The positions, padding included."""
        return self.num_rows * self.length

    @property
    def adapters(self) -> tuple[int, ...]:
        """The numbers of the adapters that it has tokens of."""
        return tuple(share.adapter for share in self.shares)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step on a data-parallel rank.

    Attributes:
        kinds: the different ones.
        order: by micro-batch in the order in which they run, its index in `kinds`.
        numbers: by kind, how many there are.
    """

    kinds: tuple[MicroBatchShape, ...]
    order: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Iterable[MicroBatchShape]) -> Batches:
        """Micro-batches in their order."""
        indices: dict[MicroBatchShape, int] = {}
        order = tuple(indices.setdefault(batch, len(indices)) for batch in shapes)
        numbers = Counter(order)
        return cls(tuple(indices), order, tuple(numbers[index] for index in range(len(indices))))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def shapes(self) -> tuple[MicroBatchShape, ...]:
        """Their shapes, in order."""
        return tuple(self.kinds[index] for index in self.order)

    @property
    def adapters(self) -> list[int]:
        """The numbers of the adapters that take the step."""
        return sorted({adapter for batch in self.kinds for adapter in batch.adapters})


def assumed_row(layout: Layout) -> SampleRow:
    """A row of a run without data: one full sample, of which all tokens are supervised.

    No position predicts the first token of a sample.
    """
    row: SampleRow = np.arange(layout.length) > 0
    return row


def shared_shape(layout: Layout, parts: Sequence[tuple[int, Sequence[SampleRow]]]) -> MicroBatchShape:
    """The shape of a micro-batch of rows of several adapters. The position before a token predicts it.

    Args:
        parts: the number of each adapter in the layout, and its rows.
    """
    shares, num_supervised = _shares(layout, parts)
    num_tokens, num_rows = sum(share.num_tokens for share in shares), len(parts[0][1]) if len(parts) == 1 else 1
    return MicroBatchShape(num_rows, num_tokens // num_rows, num_supervised, shares)


def _shares(layout: Layout, parts: Sequence[tuple[int, Sequence[SampleRow]]]) -> tuple[tuple[ShareShape, ...], int]:
    """The shares, and the number of supervised positions.

    In each part of the sequence an adapter's supervised positions are padded, and then all of them, up to as many as
    the part with most has, with positions of the part's last adapter.
    """
    lengths = [padded(max(1, *map(len, rows)), layout.pad_multiple) for _, rows in parts]
    sizes = [length * len(rows) for length, (_, rows) in zip(lengths, parts, strict=True)]
    starts = np.cumsum([0, *sizes])
    edges = np.arange(layout.sequence_parts + 1) * (starts[-1] // layout.sequence_parts)
    after = np.zeros((layout.sequence_parts, len(parts)), dtype=np.int64)
    total, last = 0, np.zeros(layout.sequence_parts, dtype=np.int64)
    for index, ((_, rows), length) in enumerate(zip(parts, lengths, strict=True)):
        places = [starts[index] + number * length + np.flatnonzero(row) - 1 for number, row in enumerate(rows)]
        counts = np.diff(np.searchsorted(np.concatenate(places), edges))
        here = (edges[:-1] < starts[index + 1]) & (edges[1:] > starts[index])
        after[here, index] = [padded_positions(int(count)) for count in counts[here]]
        last[here], total = index, total + int(counts.sum())
    by_part = after.sum(axis=1)
    after[np.arange(len(last)), last] += by_part.max() - by_part
    found = zip(parts, sizes, after.sum(axis=0).tolist(), strict=True)
    return tuple(ShareShape(adapter, size, num_after) for (adapter, _), size, num_after in found), total
