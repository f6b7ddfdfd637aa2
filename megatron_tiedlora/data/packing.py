"""Samples packed end to end into rows, so that little time goes to padding: first-fit decreasing, then evened out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = list[list[int]]


def pack(lengths: Sequence[int] | NDArray[np.int64], capacity: int, *, multiple: int = 1) -> Rows:
    """Which samples share a row, as indices into `lengths`; longest rows first. A function of its arguments alone.

    First-fit decreasing needs at most 11/9 of the fewest rows possible, and one (Johnson, 1973). Their number is then
    rounded up to a multiple, and where that leaves rows to spare the samples are spread over all of them, longest first
    to the shortest row, so that no rank waits for a fuller one.

    Args:
        capacity: tokens that a row holds; no sample is longer.
        multiple: of which the number of rows is one; rows may be empty.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    assert not order or int(lengths[order[0]]) <= capacity, "a sample is longer than a row"
    rows: Rows = []
    room: list[int] = []
    for index in order:
        size = int(lengths[index])
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= size
    missing = -len(rows) % multiple
    if missing:
        rows = _spread(lengths, order, len(rows) + missing, capacity) or rows + [[] for _ in range(missing)]
    return sorted(rows, key=lambda row: -sum(int(lengths[index]) for index in row))


def _spread(
    lengths: Sequence[int] | NDArray[np.int64], order: Sequence[int], num_rows: int, capacity: int
) -> Rows | None:
    """`order` over `num_rows` rows, each sample to the row with the fewest tokens; None where that is too full."""
    rows: Rows = [[] for _ in range(num_rows)]
    filled = [0] * num_rows
    for index in order:
        place = filled.index(min(filled))
        filled[place] += int(lengths[index])
        if filled[place] > capacity:
            return None
        rows[place].append(index)
    return rows
