"""Where documents that lie end to end in rows begin and end: what attention on GPUs is told of its tokens."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """The documents of rows (b, s), end to end: document i is tokens bounds[i] to bounds[i + 1] - 1 of (b s).

    Attributes:
        bounds: on the host, 0 first and b s last.
        offsets: the same, (n + 1,) int32 on the device.
        longest: tokens of the longest.
    """

    bounds: list[int]
    offsets: torch.Tensor
    longest: int


def find_documents(ids: torch.Tensor, device: torch.device) -> Documents:
    """Where the documents of `ids` (b, s) int64 begin and end: a new id or a new row begins one.

    Waits for nothing where `ids` are on the host.
    """
    begins = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = [*begins.flatten().nonzero()[:, 0].tolist(), ids.numel()]
    offsets = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Documents(bounds, offsets, max(stop - start for start, stop in pairwise(bounds)))


def whole_rows(size: int, length: int, device: torch.device) -> Documents:
    """Rows (size, length) that hold one document each."""
    bounds = list(range(0, (size + 1) * length, length))
    offsets = torch.arange(0, (size + 1) * length, length, dtype=torch.int32, device=device)
    return Documents(bounds, offsets, length)
