"""How a full tensor is cut over tensor-parallel ranks: the one truth for loading, saving, merging and checks.

A cut runs along one dimension that is made of blocks (fused QKV: [Q rows | K rows | V rows]); every rank holds the same
contiguous fraction of each block, in the blocks' order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ShardSpec:
    """The cut of one tensor.

    Attributes:
        dim: the dimension that is cut, or None for a tensor that every rank holds whole.
        blocks: full sizes of the blocks along `dim`; their sum is the full size. For a replicated tensor they only say
            how it is fused from several sources along dimension 0.
    """

    dim: int | None
    blocks: tuple[int, ...]

    def block_slices(self, tp_rank: int = 0, tp_size: int = 1) -> tuple[slice, ...]:
        """For each block, the slice of it (in the block's own coordinates) that `tp_rank` of `tp_size` holds."""
        if self.dim is None:
            return tuple(slice(0, size) for size in self.blocks)
        for size in self.blocks:
            if size % tp_size:
                raise ValueError(f"a block of {size} does not divide by tensor parallel {tp_size}")
        return tuple(slice(tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size) for size in self.blocks)

    def block_offsets(self) -> tuple[int, ...]:
        """Where each block starts along the full dimension."""
        return tuple(sum(self.blocks[:index]) for index in range(len(self.blocks)))

    def local_size(self, tp_size: int = 1) -> int:
        """Size along `dim` (0 for a replicated tensor) that one rank holds."""
        return sum(part.stop - part.start for part in self.block_slices(0, tp_size))

    def split(self, full: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
        """The part of `full` that `tp_rank` of `tp_size` holds; a view where that is one piece."""
        if self.dim is None or tp_size == 1:
            return full
        pieces = [
            full.narrow(self.dim, offset + part.start, part.stop - part.start)
            for offset, part in zip(self.block_offsets(), self.block_slices(tp_rank, tp_size), strict=True)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim)

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The full tensor from the parts of all ranks, in rank order: the inverse of `split`."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        sizes = [size // len(parts) for size in self.blocks]
        cut = [part.split(sizes, dim=self.dim) for part in parts]
        return torch.cat([piece for block in zip(*cut, strict=True) for piece in block], dim=self.dim)
