"""Samples packed end to end into rows, so that little time goes to padding: first-fit decreasing, then evened out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = list[list[int]]
Lengths = Sequence[int] | NDArray[np.int64]


def pack(
    lengths: Lengths, capacity: int, *, group_size: int = 1, multiple: int = 1, least_groups: int = 1
) -> list[Rows]:
    """Which samples share a row and which rows a group, as indices into `lengths`; longest rows first.

    A function of its arguments alone. First-fit decreasing needs at most 11/9 of the fewest rows possible, and one
    (Johnson, 1973). Their number decides that of the groups. Then rows are added until all groups have equally many,
    and samples are spread evenly over them where they fit so, else the fullest rows are halved: no rank waits for a
    fuller one, and none has nothing to do.

    Args:
        capacity: tokens that a row holds; no sample is longer.
        group_size: rows of a group, at most.
        multiple: of which the number of groups is one.
        least_groups: as many groups or more, however few rows would do.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    if not order:
        return []
    assert int(lengths[order[0]]) <= capacity, "a sample is longer than a row"
    rows = _first_fit(lengths, order, capacity)
    num_groups = max(-(-len(rows) // group_size), least_groups)
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
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(capacity)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= size
    return rows


def _spread(lengths: Lengths, order: Sequence[int], num_rows: int, capacity: int) -> Rows | None:
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


def _halve(lengths: Lengths, rows: Rows, num_rows: int) -> Rows:
    """`num_rows` rows: the one with most tokens that can be halved is, again and again; empty ones where none can."""
    rows = list(rows)
    while len(rows) < num_rows:
        longest = max(rows, key=lambda row: _tokens(lengths, row) if len(row) > 1 else 0)
        place = rows.index(longest)
        rows[place] = longest[::2]
        rows.append(longest[1::2])
    return rows


def _tokens(lengths: Lengths, row: Sequence[int]) -> int:
    return sum(int(lengths[index]) for index in row)
