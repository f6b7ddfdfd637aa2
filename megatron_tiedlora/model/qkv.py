"""The fused QKV projection: norm, linear with its update, and an epilogue that splits the result into heads, normalises
them if they have norms, and rotates queries and keys. All of it is one autograd step with one backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
        hidden: Tensor,
        tensor_parallel: TensorParallel,
        update: LinearUpdate | None = None,
        *,
        num_rows: int,
        table: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values, (b, heads, s, head_dim), in one storage.

        Args:
            hidden: activations between layers, (b, s, d) or (1, b s / p, d).
            num_rows: b.
            table: cos and sin of the tokens' positions, if it rotates; see `rotation_table`.
        """
        update = update or LinearUpdate()
        projection, operands = self.projection(tensor_parallel, update, num_rows=num_rows)
        norms = tuple(norm for norm in (self.query_norm, self.key_norm) if norm is not None)
        epilogue = SplitHeads(self.heads, self.kernels, table, norms, tensor_parallel.group)
        return project(hidden, update, projection, operands, epilogue)


@dataclass(frozen=True)
class SplitHeads(Epilogue):
    """[Q | K | V], (b, s, o) -> queries, keys and values, (b, heads, s, head_dim), in one storage.

    With a table queries and keys are rotated. With norms each head of them has an RMS norm before the rotation, or all
    heads together have one. A norm saves its result, which attention saves too, and one number per token. All heads
    together are those of all ranks: the means of the ranks' equally many heads are summed over the group, two numbers
    per token, in one message in each pass.

    Attributes:
        heads: of this rank.
        table: cos and sin of the s tokens' positions; () if there is no rotation.
        norms: weights of the norms of queries and of keys, (head_dim,), or (heads * head_dim,) of all heads; or ().
        group: the ranks that share the heads.
    """

    heads: HeadShape
    kernels: Kernels
    table: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    group: RankGroup

    def forward(self, projected: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Queries, keys and values; and what `backward` needs: the table, or the heads, the norms' roots, the table and
        the norms' weights. It may overwrite `projected`."""
        counts = (self.heads.num, self.heads.num_kv, self.heads.num_kv)
        heads, saved = projected.view(-1, sum(counts), self.heads.dim).detach(), self.table
        if self.norms:
            heads, root = self._rotate_normed(heads)
            saved = (heads, root, *self.table, *self.norms)
        elif self.table:
            cos, sin = self.table
            heads = self.kernels.rotate(heads, cos, sin, self.heads.num + self.heads.num_kv)
        by_token = heads.view(*projected.shape[:-1], -1, self.heads.dim)
        return by_token.transpose(1, 2).split(counts, dim=1), saved

    def backward(self, gradients: Sequence[Tensor], *saved: Tensor) -> Tensor:
        """The gradient of [Q | K | V] from the gradients of the results."""
        batch, _, length, _ = gradients[0].shape
        # (b, heads, s, head_dim) -> (b s, heads, head_dim): kernels for GPUs return this order, then nothing is copied.
        by_token = [gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients]
        if self.norms:
            found = self._normed_gradient(*by_token, *saved)
        else:
            found = self.kernels.rotate_gradient(*by_token, *saved) if saved else torch.cat(by_token, dim=1)
        return found.view(batch, length, -1)

    def _rotate_normed(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """The heads behind the norms and the rotation, and the norms' roots."""
        norm, weight = self.heads.norms[0], self._weight(self.norms)
        if not norm.sharded:
            return self.kernels.rotate_normed(heads, *self.table, weight, norm.eps)
        means = self._over_ranks(self.kernels.square_means(heads, self.heads.num, self.heads.num_kv))
        root = torch.rsqrt(means + norm.eps)
        return self.kernels.rotate_with_root(heads, *self.table, self._by_head(root), weight), root

    def _normed_gradient(self, query: Tensor, key: Tensor, value: Tensor, rotated: Tensor, *saved: Tensor) -> Tensor:
        root, cos, sin, *norms = saved
        rotated = rotated.detach()
        mean: Tensor | None = None
        if self.heads.norms[0].sharded:
            means = self._over_ranks(self.kernels.product_means(query, key, rotated))
            root, mean = self._by_head(root), self._by_head(means)
        numbers = rotated, root, mean, cos, sin, self._weight(norms)
        return self.kernels.rotate_normed_gradient(query, key, value, *numbers)

    def _weight(self, norms: Sequence[Tensor]) -> Tensor:
        """The norm's weight of each head, (num + num_kv, head_dim)."""
        counts = self.heads.num, self.heads.num_kv
        by_head = (norm.detach().view(-1, self.heads.dim) for norm in norms)
        return torch.cat([norm.expand(count, -1) for norm, count in zip(by_head, counts, strict=True)])

    def _over_ranks(self, means: Tensor) -> Tensor:
        return all_reduce(means, self.group) / self.group.size

    def _by_head(self, numbers: Tensor) -> Tensor:
        """Numbers of queries and of keys, (T, 2), for each of their heads, (T, num + num_kv, 1)."""
        counts = self.heads.num, self.heads.num_kv
        return torch.cat([numbers[:, i : i + 1].expand(-1, count) for i, count in enumerate(counts)], dim=1)[..., None]
