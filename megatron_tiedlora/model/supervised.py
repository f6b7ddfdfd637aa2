"""The positions of a micro-batch that have a label. The layers after the last attention compute only these.

They are found on the host, so that no step waits for the device to count them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.parallel.loss import IGNORED_LABEL


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
    """

    rows: torch.Tensor
    local_rows: torch.Tensor
    supervised: torch.Tensor
    targets: torch.Tensor

    def of_part(self, part: int, num_parts: int) -> torch.Tensor:
        """`local_rows` of one part, (m / p,)."""
        return self.local_rows.chunk(num_parts)[part]


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
