"""Implement frozen linears with their low-rank updates and a handwritten backward pass, and norms without a linear.

    column-parallel, after a norm     z = W x + c + F A x                x = norm(hidden), or hidden without a norm
    row-parallel, before a norm       y = norm(sum_i z_i + c)            z_i = W_i x_i + F A_i x_i

The backward pass needs the norm's input, one element per token for the norm, and A x, r elements per token. It
recomputes x. Gradients of frozen factors are not computed. The algebra of the update is in `adapters/low_rank.py`, and
the adapter provides A and F. The MLP, whose linears are one autograd function, is in `layer_specs.py`.

Under sequence parallelism each rank computes A x of a column-parallel linear from its shard of the sequence. A x is
sent in the same message as x, and its gradient in the same message as the gradient of x. In a row-parallel linear every
rank has its own features x_i. Each rank's partial sum includes the update, so that the update needs no message of its
own. A is sharded like the columns of W, so each rank computes the complete gradient of its shard. F is not sharded, and
each rank computes a partial sum of its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron_tiedlora.adapters.low_rank import AllRows, apart, beside, flat
from megatron_tiedlora.adapters.tied_adapter import LinearUpdate
from megatron_tiedlora.base.shapes import HeadShape, NormShape, RopeShape
from megatron_tiedlora.parallel import groups
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_parameter, register
from megatron_tiedlora.parallel.kernels import EAGER, Kernels, as_rows, as_wide_rows, detached
from megatron_tiedlora.parallel.loss import first_derivative_only


class Norm(nn.Module):
    """An RMS norm, y = weight * x / sqrt(mean(x^2) + eps), or LayerNorm, the RMS norm of x - mean(x) plus a bias.

    The input and one element per token are saved for the backward pass.
    """

    def __init__(self, shape: NormShape, *, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.weight, bias = norm_parameters(shape, dtype)
        self.register_parameter("bias", bias)
        self.eps = shape.eps
        self.kernels = kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised hidden states (..., d), in the dtype of the input."""
        return cast(Tensor, _Norm.apply(hidden, self.weight, self.bias, self.eps, self.kernels))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kernels: Kernels) -> Tensor:
        normed, root = kernels.normalise(as_rows(hidden), weight.detach(), detached(bias), eps)
        ctx.save_for_backward(hidden, weight, bias, root)
        ctx.kernels = kernels
        return normed.view(hidden.shape)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, root = ctx.saved_tensors
        rows = (as_rows(gradient), as_rows(hidden))
        found = ctx.kernels.norm_gradient(*rows, weight.detach(), detached(bias), root)
        return found.view(hidden.shape), None, None, None, None


def norm_parameters(shape: NormShape, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the uninitialised weight of a norm, and its bias or None."""
    bias = None if shape.bias_name is None else frozen_parameter(shape.size, dtype=dtype)
    return frozen_parameter(shape.size, dtype=dtype), bias


class NormedLinear(nn.Module):
    """A column-parallel linear: this rank's shard of W, its bias, and the weights of the norm before it, if any."""

    norm: nn.Parameter | None
    norm_bias: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: FrozenWeight,
        *,
        norm: NormShape | None,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """Create the linear from `weight`, which is W (local out, in). `dtype` is the dtype of the activations."""
        super().__init__()
        self.eps = None if norm is None else norm.eps
        self.dtype = dtype
        self.kernels = kernels
        own, norm_bias = (None, None) if norm is None else norm_parameters(norm, dtype)
        self.register_parameter("norm", own)
        self.register_parameter("norm_bias", norm_bias)
        self.frozen = register(self, weight)
        self.register_parameter("bias", bias)

    def projection(
        self, tensor_parallel: groups.TensorParallel, update: LinearUpdate, *, num_rows: int
    ) -> "tuple[Projection, Operands]":
        """Return the `Projection` for one call with (num_rows, s) tokens, and its operands."""
        projection = Projection(self.frozen, update.rows, self.eps, num_rows, tensor_parallel, self.kernels)
        return projection, Operands(update.a, update.f, self.norm, self.norm_bias, self.bias)


class Operands(NamedTuple):
    """The tensors of a projection except W. A tensor that does not exist is None.

    Attributes:
        a, f: the factors of the update, A (r, local in) and F (local out, r).
        norm, norm_bias: the norm's weight and bias.
        bias: the bias of the linear.
    """

    a: Tensor | None = None
    f: Tensor | None = None
    norm: Tensor | None = None
    norm_bias: Tensor | None = None
    bias: Tensor | None = None


class Needs(NamedTuple):
    """Flags for the gradients that a backward pass returns: of the input, of A and of F."""

    x: bool
    a: bool
    f: bool


def gradient_dtype(*slots: Tensor | None) -> torch.dtype | None:
    """Return the dtype of the factors' gradients and gradient slots, or None if all factors are frozen."""
    return next((tensor.dtype for tensor in slots if tensor is not None), None)


@dataclass(frozen=True)
class Projection:
    """Computes z from the hidden states, and the gradients from dz. Autograd does not record these operations.

    Attributes:
        rows: the tokens to which the factors of the update apply.
        eps: the epsilon of the norm; None if there is no norm.
        num_rows: the number b of (b, s) tokens, needed if activations are sharded along the sequence.
        tensor_parallel: the ranks that have the same hidden states, or shards of them; by default only this rank.
    """

    weight: FrozenWeight
    rows: AllRows
    eps: float | None = None
    num_rows: int = 0
    tensor_parallel: groups.TensorParallel = field(default_factory=groups.TensorParallel)
    kernels: Kernels = EAGER

    @property
    def _in_parts(self) -> bool:
        """Return whether the hidden states are sharded along the sequence."""
        return self.tensor_parallel.sequence_parts > 1

    def reads_input(self, needs: Needs) -> bool:
        """Return whether `backward` needs the hidden states and the norm's 1 / sqrt(mean(x^2) + eps), its `root`."""
        return needs.a or (needs.x and self.eps is not None)

    def forward(
        self, hidden: Tensor, operands: Operands, *, ax: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return z (b, s, local out), the norm's root (..., 1) (see `kernels.normalise`), and A x (b, s, r).

        Args:
            hidden: activations between layers, (b, s, d) or (1, b s / p, d); or this rank's features, (..., local in).
            ax: A x, if an earlier call returned it.
        """
        a, f, norm, norm_bias, bias = operands
        normed, root = hidden, None
        if norm is not None:
            normed, root = self.kernels.normalise(as_rows(hidden), norm.detach(), detached(norm_bias), self.eps)
            normed = normed.view(hidden.shape)
        known = ax is not None
        if a is not None and not known:
            ax = self.rows.reduce_input(normed, a, local=self._in_parts)
        normed, gathered = self._enter(normed, None if known else ax)
        ax = ax if known else gathered
        projected = self.weight.times_transposed(normed.flatten(0, -2), bias).view(*normed.shape[:-1], -1)
        if ax is not None and f is not None:
            self.rows.add_update_(flat(projected), ax, f)
        return projected, root, ax

    def backward(
        self,
        grad_projected: Tensor,
        hidden: Tensor | None,
        root: Tensor | None,
        ax: Tensor | None,
        operands: Operands,
        needs: Needs,
        wide: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of `hidden`, A and F.

        Args:
            hidden, root: see `reads_input`.
            ax: A x; needed for the gradient of F.
            wide: the dtype of the gradients of A and F.
        """
        a, f, norm, norm_bias, _ = operands
        rows = grad_projected.flatten(0, -2)
        grad_a = grad_f = grad_ax = None
        if needs.f:
            assert ax is not None and wide is not None
            grad_f = self.rows.gradient_of_f(rows, ax, wide)
        if f is not None and (needs.x or needs.a):
            grad_ax = self.rows.gradient_of_ax(rows, f)
        grad_normed = self.weight.times(rows).view(*grad_projected.shape[:-1], -1) if needs.x else None
        grad_normed, grad_ax = self._leave(grad_normed, grad_ax, a, needs_ax=needs.a)
        if needs.a:
            assert grad_ax is not None and hidden is not None and wide is not None
            normed = as_rows(hidden)
            if norm is not None:
                normed = self.kernels.apply_norm(normed, norm.detach(), detached(norm_bias), root)
            grad_a = self.rows.gradient_of_a(grad_ax, normed, wide, local=self._in_parts)
        if norm is None or grad_normed is None:
            return grad_normed, grad_a, grad_f
        assert hidden is not None
        inputs = (as_wide_rows(grad_normed), as_rows(hidden))
        grad_hidden = self.kernels.norm_gradient(*inputs, norm.detach(), detached(norm_bias), root).view(hidden.shape)
        return grad_hidden, grad_a, grad_f

    def _enter(self, normed: Tensor, ax: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x and A x of complete sequences, (b, s, n), on every rank. Shards are gathered in one message."""
        if not self._in_parts:
            return normed, ax
        narrow = None if ax is None else self.rows.columns(ax, local=True)
        joined = normed if narrow is None else beside(normed, narrow)
        whole = groups.all_gather(joined, self.tensor_parallel.group, groups.SEQUENCE_DIM)[0].unflatten(
            0, (self.num_rows, -1)
        )
        if narrow is None:
            return whole, None
        whole, narrow = apart(whole, narrow.shape[-1])
        # This is a copy, because A x is saved, and a view would keep x in memory.
        return whole, self.rows.of_columns(narrow.contiguous(), local=False)

    def _leave(
        self, grad_normed: Tensor | None, grad_ax: Tensor | None, a: Tensor | None, *, needs_ax: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x and A x. The gradient of x is summed over ranks and includes that of the update.

        Under sequence parallelism, the results are for this rank's shard of the sequence. With `needs_ax`, the gradient
        of A x is summed in the same message. A's gradient is then computed from this rank's shard of x. Without
        sequence parallelism, A's gradient is this rank's partial sum, from all of x. In both cases, the gather of A
        sums A's gradient over ranks in its backward pass.
        """
        group, in_parts = self.tensor_parallel.group, self._in_parts
        if in_parts and grad_normed is not None:
            grad_normed = groups.end_to_end(grad_normed)
        if in_parts and needs_ax:
            assert grad_ax is not None
            narrow = self.rows.columns(grad_ax, local=False)
            if grad_normed is None:
                return None, self.rows.of_columns(groups.reduce_scatter(narrow, group, groups.SEQUENCE_DIM), local=True)
            joined = groups.reduce_scatter(beside(grad_normed, narrow), group, groups.SEQUENCE_DIM)
            grad_normed, narrow = apart(joined, narrow.shape[-1])
            grad_ax = self.rows.of_columns(narrow, local=True)
            return self.rows.add_input_gradient_(grad_normed, grad_ax, a, local=True), grad_ax
        if grad_normed is None:
            return None, grad_ax
        grad_normed = self.rows.add_input_gradient_(grad_normed, grad_ax, a, local=False)
        if in_parts:
            return groups.reduce_scatter(grad_normed, group, groups.SEQUENCE_DIM), grad_ax
        return groups.all_reduce(grad_normed, group), grad_ax


class _Projected(torch.autograd.Function):
    """Computes z, or with `split` the queries, keys and values from z."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        grad_a: Tensor | None,
        grad_f: Tensor | None,
        operands: Operands,
        projection: Projection,
        split: "SplitHeads | None",
    ) -> tuple[Tensor, ...]:
        projected, root, ax = projection.forward(hidden, operands)
        results, saved = ((projected,), ()) if split is None else split.forward(projected)
        needs = Needs(*ctx.needs_input_grad[:3])
        ctx.projection, ctx.split = projection, split
        ctx.wide = gradient_dtype(grad_a, grad_f)
        ctx.save_for_backward(
            *((hidden, root) if projection.reads_input(needs) else (None, None)),
            ax if needs.f else None,
            *(*operands[:4], *saved),
        )
        return results

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, root, ax, a, f, norm, norm_bias, *saved = ctx.saved_tensors
        needs, operands = Needs(*ctx.needs_input_grad[:3]), Operands(a, f, norm, norm_bias)
        grad_projected = gradients[0] if ctx.split is None else ctx.split.backward(gradients, *saved)
        found = ctx.projection.backward(grad_projected, hidden, root, ax, operands, needs, ctx.wide)
        return *found, *(None,) * 3


class RowParallelLinear(nn.Module):
    """A row-parallel linear: this rank's columns of W, the bias, and the norm after it, if any."""

    bias: nn.Parameter | None

    def __init__(self, weight: FrozenWeight, *, bias: nn.Parameter | None = None, norm: Norm | None = None) -> None:
        """Create the linear from `weight`, which is W_i (out, local in)."""
        super().__init__()
        self.frozen = register(self, weight)
        self.register_parameter("bias", bias)
        self.norm = norm

    def forward(
        self, local_hidden: Tensor, tensor_parallel: groups.TensorParallel, update: LinearUpdate | None = None
    ) -> Tensor:
        """Return activations between layers, (b, s, out) or (1, b s / p, out), from local features (..., local in)."""
        update = update or LinearUpdate()
        operands, projection = Operands(update.a, update.f), Projection(self.frozen, update.rows)
        (addend,) = _Projected.apply(local_hidden, update.grad_a, update.grad_f, operands, projection, None)
        return self.total(addend, tensor_parallel)

    def total(self, addend: Tensor, tensor_parallel: groups.TensorParallel) -> Tensor:
        """Return y from the ranks' partial sums (b, s, out), as activations between layers. The bias is added once.

        Under sequence parallelism, the norm is computed on this rank's shard of the sequence.
        """
        output = groups.leave_tensor_parallel_region(addend, tensor_parallel)
        output = output if self.bias is None else output + self.bias
        return output if self.norm is None else self.norm(output)


# The QKV projection ---------------------------------------------------------------------------------------------------


class QkvLinear(NormedLinear):
    """Computes [Q | K | V] of this rank's heads and splits it into heads, which may be normalised and rotated.

    All of this, with the norm before it, is one autograd function.
    """

    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None

    def __init__(
        self, weight: FrozenWeight, local_heads: HeadShape, *, rope: RopeShape | None, dtype: torch.dtype, **others: Any
    ) -> None:
        """Create the linear from this rank's weight and heads. Without `rope`, queries and keys are not rotated.

        Args:
            others: the other arguments of `NormedLinear`.
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
        tensor_parallel: groups.TensorParallel,
        update: LinearUpdate | None = None,
        *,
        num_rows: int,
        table: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each (b, heads, s, head_dim), as views of one tensor.

        Args:
            hidden: activations between layers, (b, s, d) or (1, b s / p, d).
            num_rows: the number of rows b.
            table: the cos and sin of the tokens' positions if heads are rotated; see `rotation_table`.
        """
        update = update or LinearUpdate()
        projection, operands = self.projection(tensor_parallel, update, num_rows=num_rows)
        norms = tuple(norm for norm in (self.query_norm, self.key_norm) if norm is not None)
        split = SplitHeads(self.heads, self.kernels, table, norms, tensor_parallel.group)
        heads: tuple[Tensor, ...] = _Projected.apply(hidden, update.grad_a, update.grad_f, operands, projection, split)
        return heads


@dataclass(frozen=True)
class SplitHeads:
    """Splits [Q | K | V], (b, s, o), into queries, keys and values, (b, heads, s, head_dim), as views of one tensor.

    If there is a table, queries and keys are rotated. If there are norms, either each of their heads has an RMS norm
    before the rotation, or all heads share one. The backward pass needs the result, which attention saves too, and one
    element per token and norm. A norm that all heads share is computed over the heads of all ranks. In each pass, one
    message then sums the means of the ranks' heads over the group, two elements per token.

    Attributes:
        heads: the heads of this rank.
        table: the cos and sin of the positions of the s tokens; () if there is no rotation.
        norms: the norm weights of queries and of keys, (head_dim,), or (heads * head_dim,) for a shared norm; or ().
        group: the ranks that share the heads.
    """

    heads: HeadShape
    kernels: Kernels
    table: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    group: groups.RankGroup

    def forward(self, projected: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return queries, keys and values, and the tensors that `backward` needs: the table, or with norms the heads,
        the norms' roots, the table and the norms' weights. `projected` may be overwritten."""
        counts = (self.heads.num, self.heads.num_kv, self.heads.num_kv)
        heads, saved = projected.view(-1, sum(counts), self.heads.dim).detach(), self.table
        if self.norms:
            norm, weight = self.heads.norms[0], self._weight(self.norms)
            if norm.sharded:
                means = self.kernels.square_means(heads, self.heads.num, self.heads.num_kv)
                root = torch.rsqrt(groups.all_reduce(means, self.group) / self.group.size + norm.eps)
                heads = self.kernels.rotate_with_root(heads, *self.table, self._by_head(root), weight)
            else:
                heads, root = self.kernels.rotate_normed(heads, *self.table, weight, norm.eps)
            saved = (heads, root, *self.table, *self.norms)
        elif self.table:
            cos, sin = self.table
            heads = self.kernels.rotate(heads, cos, sin, self.heads.num + self.heads.num_kv)
        by_token = heads.view(*projected.shape[:-1], -1, self.heads.dim)
        return by_token.transpose(1, 2).split(counts, dim=1), saved

    def backward(self, gradients: Sequence[Tensor], *saved: Tensor) -> Tensor:
        """Return the gradient of [Q | K | V] from the gradients of the results."""
        batch, _, length, _ = gradients[0].shape
        # (b, heads, s, head_dim) -> (b s, heads, head_dim). GPU kernels use this order, so nothing is copied.
        by_token = [gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients]
        if self.norms:
            (query, key, _), (rotated, root, cos, sin, *norms) = by_token, saved
            rotated, mean = rotated.detach(), None
            if self.heads.norms[0].sharded:
                means = groups.all_reduce(self.kernels.product_means(query, key, rotated), self.group)
                mean, root = self._by_head(means / self.group.size), self._by_head(root)
            numbers = rotated, root, mean, cos, sin, self._weight(norms)
            found = self.kernels.rotate_normed_gradient(*by_token, *numbers)
        else:
            found = self.kernels.rotate_gradient(*by_token, *saved) if saved else torch.cat(by_token, dim=1)
        return found.view(batch, length, -1)

    def _weight(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the norm weights of each head, (num + num_kv, head_dim)."""
        counts = self.heads.num, self.heads.num_kv
        by_head = (norm.detach().view(-1, self.heads.dim) for norm in norms)
        return torch.cat([norm.expand(count, -1) for norm, count in zip(by_head, counts, strict=True)])

    def _by_head(self, numbers: Tensor) -> Tensor:
        """Expand a value for queries and one for keys, (T, 2), to all of their heads, (T, num + num_kv, 1)."""
        counts = self.heads.num, self.heads.num_kv
        return torch.cat([numbers[:, i : i + 1].expand(-1, count) for i, count in enumerate(counts)], dim=1)[..., None]
