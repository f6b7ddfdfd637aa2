"""Packs samples into rows, so that little time is spent on padding: first-fit decreasing, then balanced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = list[list[int]]
Lengths = Sequence[int] | NDArray[np.int64]


def pack(lengths: Lengths, capacity: int, *, group_size: int = 1, multiple: int = 1, min_groups: int = 1) -> list[Rows]:
    """Return groups (micro-batches) of rows of indices into `lengths`; the longest rows come first.

    It is a pure function of its arguments. First-fit decreasing needs at most 11/9 of the minimum number of rows, plus
    one (Johnson, 1973). The number of groups follows from that. Then rows are added until all groups have the same
    number. Samples are spread evenly over the rows if they fit that way; otherwise the fullest rows are halved. So no
    rank waits for a fuller one, and none is idle.

    Args:
        capacity: tokens that a row holds; no sample is longer.
        group_size: maximum rows per group.
        multiple: the number of groups is a multiple of this.
        min_groups: minimum number of groups, even if fewer would hold all rows.
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
        row = next((row for row, left in enumerate(room) if left >= size), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= size
    return rows


def _spread(lengths: Lengths, order: Sequence[int], num_rows: int, capacity: int) -> Rows | None:
    """Spread `order` over `num_rows` rows: each sample goes to the shortest row. None if a row would overflow."""
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
    """Halve the longest row that has several samples until there are `num_rows`; if none has, add empty rows."""
    rows = list(rows)
    while len(rows) < num_rows:
        longest = max(rows, key=lambda row: _tokens(lengths, row) if len(row) > 1 else 0)
        rows[rows.index(longest)] = longest[::2]
        rows.append(longest[1::2])
    return rows


def _tokens(lengths: Lengths, row: Sequence[int]) -> int:
    return sum(int(lengths[index]) for index in row)
