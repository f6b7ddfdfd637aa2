"""The fused QKV projection: its epilogue splits the result into heads, normalises them if they have norms, and rotates
queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from megatron_tiedlora.base.shapes import HeadShape
from megatron_tiedlora.model.normed_linear import Epilogue, NormedLinear
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_parameter
from megatron_tiedlora.parallel.kernels import Kernels


class QkvLinear(NormedLinear):
    """[Q | K | V] of this rank's heads. Its `table` are cos and sin of the tokens' positions, see `rotation_table`.

    The results are queries, keys and values, (b, heads, s, head_dim), in one storage.
    """

    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None

    def __init__(
        self,
        weight: FrozenWeight,
        local_heads: HeadShape,
        *,
        rotates: bool = True,
        bias: nn.Parameter | None = None,
        eps: float,
        norm_has_bias: bool = False,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        super().__init__(weight, bias=bias, eps=eps, norm_has_bias=norm_has_bias, dtype=dtype, kernels=kernels)
        assert rotates or not local_heads.norms, "no family has norms of heads that are not rotated"
        self.heads = local_heads
        self.rotates = rotates
        for name, norm in (("query_norm", local_heads.query_norm), ("key_norm", local_heads.key_norm)):
            self.register_parameter(name, None if norm is None else frozen_parameter(norm.size, dtype=dtype))

    def epilogue(self, table: tuple[torch.Tensor, ...]) -> Epilogue:
        """The heads as they are, `RotatedHeads`, or `RotatedNormedHeads` if they have norms."""
        if not self.rotates:
            return PlainHeads(self.heads)
        if self.query_norm is None or self.key_norm is None:
            return RotatedHeads(self.heads, self.kernels, table)
        return RotatedNormedHeads(self.heads, self.kernels, table, (self.query_norm, self.key_norm))


@dataclass(frozen=True)
class PlainHeads:
    """An `Epilogue`: [Q | K | V], (b, s, o) -> queries, keys and values, (b, heads, s, head_dim), in one storage.

    Attributes:
        heads: of this rank.
    """

    heads: HeadShape

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Queries, keys and values."""
        return self._joined(self._split(projected), projected.shape), ()

    def backward(self, gradients: Sequence[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        """The gradient of [Q | K | V] from those of the heads."""
        batch, _, length, _ = gradients[0].shape
        return torch.cat(_by_token(gradients), dim=1).view(batch, length, -1)

    @property
    def _num_rotated(self) -> int:
        return self.heads.num + self.heads.num_kv

    def _split(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(-1, self._num_rotated + self.heads.num_kv, self.heads.dim).detach()

    def _joined(self, heads: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, ...]:
        sizes = (self.heads.num, self.heads.num_kv, self.heads.num_kv)
        return heads.view(*shape[:-1], -1, self.heads.dim).transpose(1, 2).split(sizes, dim=1)


@dataclass(frozen=True)
class RotatedHeads(PlainHeads):
    """The same with rotated queries and keys.

    Attributes:
        table: cos and sin of the s tokens' positions.
    """

    kernels: Kernels
    table: tuple[torch.Tensor, ...]

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Queries, keys and values; cos and sin."""
        cos, sin = self.table
        rotated = self.kernels.rotate(self._split(projected), cos, sin, self._num_rotated)
        return self._joined(rotated, projected.shape), self.table

    def backward(self, gradients: Sequence[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        """The gradient of [Q | K | V] from the gradients of the rotated heads."""
        batch, _, length, _ = gradients[0].shape
        return self.kernels.rotate_gradient(*_by_token(gradients), *saved).view(batch, length, -1)


@dataclass(frozen=True)
class RotatedNormedHeads(RotatedHeads):
    """The same with an RMS norm of each head of queries and keys before the rotation.

    It saves its result, which attention saves too, and one number per token and head.

    Attributes:
        norms: weights of the norms of queries and of keys, (head_dim,).
    """

    norms: tuple[torch.Tensor, torch.Tensor]

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Queries, keys and values; the heads, the norms' roots, cos, sin and the norms' weights."""
        assert self.heads.query_norm is not None
        rotated, root = self.kernels.rotate_normed(
            self._split(projected), *self.table, self._weight(self.norms), self.heads.query_norm.eps
        )
        return self._joined(rotated, projected.shape), (rotated, root, *self.table, *self.norms)

    def backward(self, gradients: Sequence[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        """The gradient of [Q | K | V] from the gradients of the rotated heads."""
        rotated, root, cos, sin, *norms = saved
        batch, _, length, _ = gradients[0].shape
        found = self.kernels.rotate_normed_gradient(
            *_by_token(gradients), rotated.detach(), root, cos, sin, self._weight(norms)
        )
        return found.view(batch, length, -1)

    def _weight(self, norms: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm's weight of each head, (num + num_kv, head_dim)."""
        numbers = (self.heads.num, self.heads.num_kv)
        return torch.cat([norm.detach().expand(count, -1) for norm, count in zip(norms, numbers, strict=True)])


def _by_token(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(b, heads, s, head_dim) -> (b s, heads, head_dim). Kernels for GPUs return this order; then nothing is copied."""
    return [gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients]
