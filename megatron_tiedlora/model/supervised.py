"""Which positions of a micro-batch have a label, so that what comes after the last attention computes no others.

Found on the host from the labels there, so that no step waits for the device to count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.parallel.loss import IGNORED_LABEL


class Supervised(NamedTuple):
    """The supervised positions of labels (b, s), n of them.

    With activations cut along the sequence each of the p ranks computes positions of its own part. All compute equally
    many, m / p, as messages of equal parts need, and a multiple of `SIZE_MULTIPLE`; what a part has too few of is
    filled up with positions that are computed for nothing. Each part has at least one.

    Attributes:
        rows: (m,) int64, positions in (b s), part by part.
        local_rows: (m,) int64, the same in (b s / p) of their own part.
        kept: (n,) int64, which of `rows` are supervised.
        targets: (n,) int64, their labels.
    """

    rows: torch.Tensor
    local_rows: torch.Tensor
    kept: torch.Tensor
    targets: torch.Tensor

    def of_part(self, part: int, num_parts: int) -> torch.Tensor:
        """`local_rows` of one part, (m / p,)."""
        return self.local_rows.chunk(num_parts)[part]


def positions_after(num_supervised: int) -> int:
    """m / p, where the part with most supervised positions has `num_supervised`."""
    return padded(max(1, num_supervised))


def find_supervised(labels: torch.Tensor, num_parts: int = 1) -> Supervised:
    """The supervised positions of labels (b, s) int64, -100 where there is none.

    Args:
        num_parts: ranks over which activations are cut along the sequence; divides b s.
    """
    by_part = labels.reshape(num_parts, -1)
    found = [(part != IGNORED_LABEL).nonzero()[:, 0] for part in by_part]
    most = positions_after(max(len(rows) for rows in found))
    filled = [torch.nn.functional.pad(rows, (0, most - len(rows))) for rows in found]
    local_rows = torch.cat(filled)
    rows = local_rows + torch.arange(num_parts, device=labels.device).repeat_interleave(most) * by_part.shape[1]
    places = torch.arange(most, device=labels.device)
    kept = torch.cat([part * most + places[: len(rows)] for part, rows in enumerate(found)])
    return Supervised(rows, local_rows, kept, labels.flatten()[rows[kept]])
