"""Rows of several owners in one tensor: each owner's rows are consecutive, so they are its pieces of the tensor.

A sum over an owner's rows, or a factor for them, is computed as if the tensor had no other rows.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from megatron_tiedlora.parallel.kernels import scaled


class Piece(NamedTuple):
    """Consecutive rows of one owner.

    Attributes:
        owner: its number, from 0.
        size: the number of rows.
    """

    owner: int
    size: int


Pieces = tuple[Piece, ...]


def starts_of(pieces: Sequence[Piece]) -> list[int]:
    """The first row of each piece."""
    return [0, *accumulate(piece.size for piece in pieces)][: len(pieces)]


def part_of(pieces: Sequence[Piece], start: int, stop: int) -> Pieces:
    """The pieces of rows `start` to `stop` - 1."""
    found = []
    for piece, first in zip(pieces, starts_of(pieces), strict=True):
        size = min(stop, first + piece.size) - max(start, first)
        if size > 0:
            found.append(Piece(piece.owner, size))
    return tuple(found)


def scaled_by_owner(tensor: torch.Tensor, factors: torch.Tensor, pieces: Sequence[Piece] | None) -> torch.Tensor:
    """`scaled`, with each owner's own factor; without pieces there is one owner, and one factor ().

    Args:
        tensor: (..., n), whose rows the pieces are; or (n,), whose numbers they are.
        factors: (owners,).
    """
    if pieces is None:
        return scaled(tensor, factors)
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
    parts = zip(rows.split([piece.size for piece in pieces]), pieces, strict=True)
    return torch.cat([scaled(part, factors[piece.owner]) for part, piece in parts]).view(tensor.shape)


def sums_by_owner(numbers: torch.Tensor, pieces: Sequence[Piece], *, at_once: int) -> torch.Tensor:
    """The sum of each owner's numbers, (owners,), added up in chunks of `at_once` numbers of each piece.

    Args:
        numbers: (n,).
    """
    totals = [numbers.new_zeros(()) for _ in range(1 + max(piece.owner for piece in pieces))]
    for part, piece in zip(numbers.split([piece.size for piece in pieces]), pieces, strict=True):
        for chunk in part.split(at_once):
            totals[piece.owner] += chunk.sum()
    return torch.stack(totals)
