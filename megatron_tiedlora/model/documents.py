"""Start and end of the documents packed into rows, for attention on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch


class Documents(NamedTuple):
    """The n documents of concatenated rows (b s): document i is tokens bounds[i] to bounds[i + 1] - 1.

    Attributes:
        bounds: n + 1 numbers on the host, from 0 to b s.
        offsets: the same numbers, (n + 1,) int32 on the device.
        longest: the number of tokens in the longest document.
    """

    bounds: list[int]
    offsets: torch.Tensor
    longest: int


def find_documents(ids: torch.Tensor, device: torch.device) -> Documents:
    """The documents of `ids` (b, s) int64: a document begins with each new id and each new row.

    It does not synchronise with the device if `ids` are on the host.
    """
    return documents_end_to_end([ids], device)


def documents_end_to_end(ids: Sequence[torch.Tensor], device: torch.device) -> Documents:
    """The same for several blocks of rows, which follow one another."""
    begins = torch.cat([document_begins(block).flatten() for block in ids])
    bounds = [*begins.nonzero()[:, 0].tolist(), len(begins)]
    offsets = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Documents(bounds, offsets, max(stop - start for start, stop in pairwise(bounds)))


def document_begins(ids: torch.Tensor) -> torch.Tensor:
    """Whether a document begins at each token of (b, s) ids."""
    begins = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins


def whole_rows(size: int, length: int, device: torch.device) -> Documents:
    """The documents of rows (size, length) that hold one document each."""
    bounds = list(range(0, (size + 1) * length, length))
    offsets = torch.arange(0, (size + 1) * length, length, dtype=torch.int32, device=device)
    return Documents(bounds, offsets, length)
