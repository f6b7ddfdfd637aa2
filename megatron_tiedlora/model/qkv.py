"""The fused QKV projection: norm, linear with its update, and an epilogue that splits the result into heads, normalises
them if they have norms, and rotates queries and keys. All of it is one autograd step with one backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import LinearUpdate
from megatron_tiedlora.base.shapes import HeadShape, RopeShape
from megatron_tiedlora.model.linears import Epilogue, NormedLinear, project
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_parameter
from megatron_tiedlora.parallel.groups import RankGroup, TensorParallel, all_reduce
from megatron_tiedlora.parallel.kernels import Kernels


class QkvLinear(NormedLinear):
    """[Q | K | V] of this rank's heads."""

    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None

    def __init__(
        self, weight: FrozenWeight, local_heads: HeadShape, *, rope: RopeShape | None, dtype: torch.dtype, **others: Any
    ) -> None:
        """Without `rope` queries and keys are not rotated.

        Args:
            others: what the norm and the linear need beside `weight` and `dtype`; see `NormedLinear`.
        """
        super().__init__(weight, dtype=dtype, **others)
        assert rope or not local_heads.norms, "no family has norms of heads that are not rotated"
        self.heads = local_heads
        self.rope = rope
        for name, norm in (("query_norm", local_heads.query_norm), ("key_norm", local_heads.key_norm)):
            self.register_parameter(name, None if norm is None else frozen_parameter(norm.size, dtype=dtype))

    def forward(
        self,
        hidden: torch.Tensor,
        tensor_parallel: TensorParallel,
        update: LinearUpdate | None = None,
        *,
        num_rows: int,
        table: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, (b, heads, s, head_dim), in one storage.

        Args:
            hidden: activations between layers, (b, s, d) or (1, b s / p, d).
            num_rows: b.
            table: cos and sin of the tokens' positions, if it rotates; see `rotation_table`.
        """
        update = update or LinearUpdate()
        projection, operands = self.projection(tensor_parallel, update, num_rows=num_rows)
        return project(hidden, update, projection, operands, self.epilogue(table, tensor_parallel.group))

    def epilogue(self, table: tuple[torch.Tensor, ...], group: RankGroup) -> "PlainHeads":
        """The heads as they are, rotated, or if they have norms normalised and rotated."""
        if self.rope is None:
            return PlainHeads(self.heads)
        if self.query_norm is None or self.key_norm is None:
            return RotatedHeads(self.heads, self.kernels, table)
        return RotatedNormedHeads(self.heads, self.kernels, table, (self.query_norm, self.key_norm), group)


@dataclass(frozen=True)
class PlainHeads(Epilogue):
    """[Q | K | V], (b, s, o) -> queries, keys and values, (b, heads, s, head_dim), in one storage.

    Attributes:
        heads: of this rank.
    """

    heads: HeadShape

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Queries, keys and values; and what `backward` needs. It may overwrite `projected`."""
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
    """The same with an RMS norm of each head of queries and keys before the rotation, or of all heads together.

    It saves its result, which attention saves too, and one number per token per norm. All heads together are those of
    all ranks: the means of the ranks' equally many heads are summed over the group, two numbers per token, in one
    message in each pass.

    Attributes:
        norms: weights of the norms of queries and of keys, (head_dim,), or (heads * head_dim,) of all heads.
        group: the ranks that share the heads.
    """

    norms: tuple[torch.Tensor, torch.Tensor]
    group: RankGroup

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Queries, keys and values; the heads, the norms' roots, cos, sin and the norms' weights."""
        heads, weight, norm = self._split(projected), self._weight(self.norms), self.heads.norms[0]
        if norm.sharded:
            means = self._over_ranks(self.kernels.square_means(heads, self.heads.num, self.heads.num_kv))
            root = torch.rsqrt(means + norm.eps)
            rotated = self.kernels.rotate_with_root(heads, *self.table, self._by_head(root), weight)
        else:
            rotated, root = self.kernels.rotate_normed(heads, *self.table, weight, norm.eps)
        return self._joined(rotated, projected.shape), (rotated, root, *self.table, *self.norms)

    def backward(self, gradients: Sequence[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        """The gradient of [Q | K | V] from the gradients of the rotated heads."""
        rotated, root, cos, sin, *norms = saved
        (batch, _, length, _), (query, key, value) = gradients[0].shape, _by_token(gradients)
        rotated = rotated.detach()
        mean: torch.Tensor | None = None
        if self.heads.norms[0].sharded:
            means = self._over_ranks(self.kernels.product_means(query, key, rotated))
            root, mean = self._by_head(root), self._by_head(means)
        numbers = rotated, root, mean, cos, sin, self._weight(norms)
        found = self.kernels.rotate_normed_gradient(query, key, value, *numbers)
        return found.view(batch, length, -1)

    def _weight(self, norms: Sequence[torch.Tensor]) -> torch.Tensor:
        """The norm's weight of each head, (num + num_kv, head_dim)."""
        counts = self.heads.num, self.heads.num_kv
        by_head = (norm.detach().view(-1, self.heads.dim) for norm in norms)
        return torch.cat([norm.expand(count, -1) for norm, count in zip(by_head, counts, strict=True)])

    def _over_ranks(self, means: torch.Tensor) -> torch.Tensor:
        return all_reduce(means, self.group) / self.group.size

    def _by_head(self, numbers: torch.Tensor) -> torch.Tensor:
        """Numbers of queries and of keys, (T, 2), for each of their heads, (T, num + num_kv, 1)."""
        counts = self.heads.num, self.heads.num_kv
        return torch.cat([numbers[:, i : i + 1].expand(-1, count) for i, count in enumerate(counts)], dim=1)[..., None]


def _by_token(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """(b, heads, s, head_dim) -> (b s, heads, head_dim). Kernels for GPUs return this order; then nothing is copied."""
    return [gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients]
