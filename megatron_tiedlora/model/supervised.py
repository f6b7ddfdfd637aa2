"""The positions of a micro-batch that have a label. The layers after the last attention compute only these.

They are found on the host, so that no step waits for the device to count them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.parallel.pieces import Piece, Pieces, part_of, starts_of


class Supervised(NamedTuple):
    """The supervised positions of labels (b, s), n of them.

    With activations sharded along the sequence, each of the p ranks computes positions of its own part. All ranks
    compute the same number, m / p, a multiple of `SIZE_MULTIPLE`, since messages have equal parts. A part with fewer
    positions is padded with positions whose results are not used. Each part has at least one position.

    Attributes:
        rows: (m,) int64, indices into (b s), part by part.
        local_rows: (m,) int64, the same as indices into the (b s / p) of their part.
        supervised: (n,) int64, which of `rows` have a label.
        targets: (n,) int64, the labels.
        pieces: whose `rows` are, if the tokens belong to several owners; else there are none.
        supervised_pieces: the same of `supervised`.
    """

    rows: torch.Tensor
    local_rows: torch.Tensor
    supervised: torch.Tensor
    targets: torch.Tensor
    pieces: Pieces = ()
    supervised_pieces: Pieces = ()

    def of_part(self, part: int, num_parts: int) -> torch.Tensor:
        """`local_rows` of one part, (m / p,)."""
        return self.local_rows.chunk(num_parts)[part]

    def pieces_of_part(self, part: int, num_parts: int) -> Pieces:
        """`pieces` of one part."""
        size = len(self.rows) // num_parts
        return part_of(self.pieces, part * size, (part + 1) * size)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Supervised:
        """The same with `move` applied to every tensor."""
        return self._replace(
            rows=move(self.rows),
            local_rows=move(self.local_rows),
            supervised=move(self.supervised),
            targets=move(self.targets),
        )


def padded_positions(num_supervised: int) -> int:
    """m / p, from the number of supervised positions in the part that has most."""
    return padded(max(1, num_supervised))


def find_supervised(labels: torch.Tensor, num_parts: int = 1) -> Supervised:
    """The supervised positions of labels (b, s) int64, -100 where there is no label.

    Args:
        num_parts: ranks over which activations are sharded along the sequence; it divides b s.
    """
    by_part = labels.reshape(num_parts, -1)
    found = [(part != IGNORED_LABEL).nonzero()[:, 0] for part in by_part]
    most = padded_positions(max(len(rows) for rows in found))
    filled = [torch.nn.functional.pad(rows, (0, most - len(rows))) for rows in found]
    local_rows = torch.cat(filled)
    rows = local_rows + torch.arange(num_parts, device=labels.device).repeat_interleave(most) * by_part.shape[1]
    indices = torch.arange(most, device=labels.device)
    supervised = torch.cat([part * most + indices[: len(rows)] for part, rows in enumerate(found)])
    return Supervised(rows, local_rows, supervised, labels.flatten()[rows[supervised]])


def find_shared_supervised(labels: torch.Tensor, pieces: Sequence[Piece], num_parts: int = 1) -> Supervised:
    """The same for tokens of several owners.

    In each part an owner's positions are padded to a multiple of `SIZE_MULTIPLE` with the first of its own tokens
    there, as if it were alone: no result of one owner depends on a token of another, not even by a factor of zero.

    Args:
        labels: (1, s) int64.
        pieces: whose the s tokens are.
    """
    by_part = labels.reshape(num_parts, -1)
    length = by_part.shape[1]
    found = [
        _by_piece(part, part_of(pieces, number * length, (number + 1) * length))
        for number, part in enumerate(by_part)
    ]
    most = max(sum(len(rows) for _, rows, _ in part) for part in found)
    local_rows, supervised, of_rows, of_supervised = [], [], [], []
    start = 0
    for part in found:
        missing = most - sum(len(rows) for _, rows, _ in part)
        for number, (owner, rows, count) in enumerate(part, start=1):
            if number == len(part):
                rows = torch.cat((rows, rows[-1:].expand(missing)))
            local_rows.append(rows)
            supervised.append(torch.arange(start, start + count, device=labels.device))
            of_rows.append(Piece(owner, len(rows)))
            of_supervised.append(Piece(owner, count))
            start += len(rows)
    joined, chosen = torch.cat(local_rows), torch.cat(supervised)
    rows = joined + torch.arange(num_parts, device=labels.device).repeat_interleave(most) * length
    targets = labels.flatten()[rows[chosen]]
    return Supervised(rows, joined, chosen, targets, tuple(of_rows), tuple(of_supervised))


def _by_piece(labels: torch.Tensor, pieces: Sequence[Piece]) -> list[tuple[int, torch.Tensor, int]]:
    """(owner, its positions with padding, how many of them have a label) of each piece of labels (s / p,)."""
    found = []
    for (owner, size), start in zip(pieces, starts_of(pieces), strict=True):
        rows = (labels[start : start + size] != IGNORED_LABEL).nonzero()[:, 0] + start
        filled = torch.nn.functional.pad(rows, (0, padded_positions(len(rows)) - len(rows)), value=start)
        found.append((owner, filled, len(rows)))
    return found
