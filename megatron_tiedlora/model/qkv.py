"""The epilogue of the fused QKV projection: it splits the result into heads and rotates queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_tiedlora.parallel.kernels import Kernels


@dataclass(frozen=True)
class RotatedHeads:
    """An `Epilogue`: [Q | K | V], (b, s, o) -> queries, keys and values, (b, heads, s, head_dim), in one storage.

    Attributes:
        rows: output features of Q, K and V on this rank.
        tensors: cos and sin of the s tokens' positions, see `rotation_table`.
    """

    rows: tuple[int, int, int]
    head_dim: int
    kernels: Kernels
    tensors: tuple[torch.Tensor, ...]

    def forward(self, projected: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values."""
        cos, sin = tensors
        query, key, value = (size // self.head_dim for size in self.rows)
        heads = projected.view(-1, query + key + value, self.head_dim).detach()
        rotated = self.kernels.rotate(heads, cos, sin, query + key)
        return rotated.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2).split((query, key, value), dim=1)

    def backward(self, gradients: Sequence[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """The gradient of [Q | K | V] from the gradients of the rotated heads."""
        # Kernels for GPUs return gradients in token order; then this copies nothing.
        parts = (gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients)
        batch, _, length, _ = gradients[0].shape
        return self.kernels.rotate_gradient(*parts, *tensors).view(batch, length, -1)
