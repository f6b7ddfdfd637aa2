"""Define how a full tensor is sharded over tensor-parallel ranks, for loading, saving, merging and checks.

A tensor is sharded along one dimension, which consists of blocks (for fused QKV, [Q rows | K rows | V rows]). Every
rank holds an equal, contiguous slice of each block, in the order of the blocks. A vocabulary may be padded with zero
rows at its end, so that all shards have the same size; a full tensor never has padding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tiedlora.base.shapes import LinearShape


@dataclass(frozen=True)
class ShardSpec:
    """A description of how one tensor is sharded.

    Attributes:
        dim: the sharded dimension; None for a tensor that is replicated on every rank.
        blocks: the full sizes of the blocks along `dim`; their sum is the full size. For a replicated tensor they are
            the sizes of the source tensors that are fused along dimension 0.
        padded: whether the block is padded with zeros if its size is not divisible; only for a single block.
    """

    dim: int | None
    blocks: tuple[int, ...]
    padded: bool = False

    def __post_init__(self) -> None:
        assert not self.padded or len(self.blocks) == 1, "only a single block can be padded"

    def _shard_size(self, size: int, tp_size: int) -> int:
        if size % tp_size and not self.padded:
            raise ValueError(f"a block of size {size} is not divisible by the tensor-parallel size {tp_size}")
        return -(-size // tp_size)

    def block_slices(self, tp_rank: int = 0, tp_size: int = 1) -> tuple[slice, ...]:
        """Return the slice of each block that a rank holds, in indices relative to the block, without padding."""
        if self.dim is None:
            return tuple(slice(0, size) for size in self.blocks)
        slices = []
        for size in self.blocks:
            shard = self._shard_size(size, tp_size)
            slices.append(slice(min(tp_rank * shard, size), min((tp_rank + 1) * shard, size)))
        return tuple(slices)

    def local_shape(self, full_shape: Sequence[int], tp_size: int) -> tuple[int, ...]:
        """Return the shape of one rank's shard, including padding."""
        if self.dim is None:
            return tuple(full_shape)
        local = list(full_shape)
        local[self.dim] = sum(self._shard_size(size, tp_size) for size in self.blocks)
        return tuple(local)

    def split(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        """Return the shard of `full` for rank `tp_rank` of `tp_size`. It is a view for a single unpadded block."""
        if self.dim is None or tp_size == 1:
            return full
        parts = [
            block.narrow(self.dim, held.start, held.stop - held.start)
            for block, held in zip(full.split(self.blocks, self.dim), self.block_slices(tp_rank, tp_size), strict=True)
        ]
        missing = self.local_shape(full.shape, tp_size)[self.dim] - sum(part.shape[self.dim] for part in parts)
        if missing:
            shape = list(full.shape)
            shape[self.dim] = missing
            parts.append(full.new_zeros(shape))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the full tensor, without padding, from the shards of all ranks in rank order. This inverts `split`."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        sizes = [self._shard_size(size, len(parts)) for size in self.blocks]
        by_rank = [part.split(sizes, dim=self.dim) for part in parts]
        joined = [
            torch.cat(shards, dim=self.dim).narrow(self.dim, 0, size)
            for size, shards in zip(self.blocks, zip(*by_rank, strict=True), strict=True)
        ]
        return torch.cat(joined, dim=self.dim)


def weight_spec(linear: LinearShape) -> ShardSpec:
    """Return how a linear's matrix (out_size, in_size) is sharded."""
    if linear.sharded_dim == "row":
        return ShardSpec(1, (linear.in_size,))
    return ShardSpec(0, linear.blocks, padded=linear.sharded_dim == "vocabulary")


def bias_spec(linear: LinearShape) -> ShardSpec:
    """Return how a linear's bias (out_size,) is sharded."""
    return ShardSpec(None, linear.blocks) if linear.sharded_dim == "row" else weight_spec(linear)


def stream_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed for the random stream `name` of a run with `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_normal(shape: Sequence[int], *, std: float, seed: int, name: str) -> Tensor:
    """Return a full fp32 CPU tensor of samples from N(0, std^2). The samples depend only on the arguments."""
    generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, name))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32) * std
