"""Norm, fused QKV projection with the tied update, and rotation: one step of the model, with one backward pass.

    [Q | K | V] = rotated(W x + c + F A x)        x = norm(hidden), F = (alpha / r) diag(v) B diag(u)

With dy the gradient of the sum, h = A x and g = dy F, the backward pass is

    dx = dy W + g A        dA = g^T x        dF = dy^T h

so it keeps the norm's input, one number a token for the norm, and h, r numbers a token, and makes no matmul that gives
tokens x o. x is computed again. A frozen factor has no gradient, and what only that would need is not computed. A and F
come from the adapter's bank, which makes of dF the gradients of B, u and v for all layers at once.

Under sequence parallelism h is computed from each rank's part of the sequence and travels beside x, and g beside dx, in
the messages that the projection has anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.parallel.collectives import SEQUENCE_DIM, all_gather, all_reduce, end_to_end, reduce_scatter
from megatron_tiedlora.parallel.first_derivative import first_derivative_only
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import Kernels, as_rows
from megatron_tiedlora.parallel.layers import frozen_parameter, multiply, padded, wide_product


class NormedQkv(nn.Module):
    """Queries, keys and values of this rank's heads. Holds the norm's weight beside W, as one step uses both."""

    def __init__(
        self,
        hidden_size: int,
        rows: tuple[int, int, int],
        *,
        head_dim: int,
        eps: float,
        bias: bool,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """Make empty weights.

        Args:
            rows: of Q, K and V on this rank.
        """
        super().__init__()
        self.rows = rows
        self.head_dim = head_dim
        self.eps = eps
        self.kernels = kernels
        self.norm = frozen_parameter(hidden_size, dtype=dtype)
        self.weight = frozen_parameter(sum(rows), hidden_size, dtype=dtype)
        self.bias = frozen_parameter(sum(rows), dtype=dtype) if bias else None

    def forward(
        self,
        hidden: torch.Tensor,
        table: tuple[torch.Tensor, torch.Tensor],
        tensor_parallel: TensorParallel,
        update: LayerUpdate | None = None,
        *,
        num_rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What flows between layers, (b, s, d) or (1, b s / p, d) -> queries (b, heads, s, head_dim), keys and values.

        The three share one storage.

        Args:
            table: of the s tokens' positions, see `rotation_table`.
            num_rows: b.
        """
        a, f, grad_a, grad_f = (None,) * 4 if update is None else update
        shape = _Shape(self.rows, self.head_dim, self.eps, num_rows, tensor_parallel, self.kernels)
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _NormedQkv.apply(
            hidden, grad_a, grad_f, a, f, self.norm, self.weight, self.bias, *table, shape
        )
        return heads


@dataclass(frozen=True)
class _Shape:
    rows: tuple[int, int, int]
    head_dim: int
    eps: float
    num_rows: int
    tensor_parallel: TensorParallel
    kernels: Kernels

    @property
    def heads(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        query, key, value = (size // self.head_dim for size in self.rows)
        return query, key, value


class _NormedQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        grad_a: torch.Tensor | None,
        grad_f: torch.Tensor | None,
        a: torch.Tensor | None,
        f: torch.Tensor | None,
        norm: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        shape: _Shape,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normed, root = shape.kernels.normalise(as_rows(hidden), norm.detach(), shape.eps)
        normed = normed.view(hidden.shape)
        ax = None if a is None else multiply(normed, a)
        normed, ax = _enter(normed, ax, shape)
        fused = multiply(normed, weight, bias)
        if ax is not None and f is not None:
            rows = _flat(fused)
            torch.addmm(rows, _flat(ax), f.t(), out=rows)
        num_query, num_key, num_value = shape.heads
        rotated = shape.kernels.rotate(
            fused.view(-1, sum(shape.heads), shape.head_dim).detach(), cos, sin, num_query + num_key
        )
        needs_hidden, needs_a, needs_f = ctx.needs_input_grad[:3]
        ctx.shape = shape
        ctx.wide = next((tensor.dtype for tensor in (grad_a, grad_f) if tensor is not None), None)
        ctx.save_for_backward(
            *((hidden, root) if needs_hidden or needs_a else (None, None)),
            ax if needs_f else None,
            *(a, f, norm, weight, cos, sin),
        )
        heads = rotated.view(*fused.shape[:-1], -1, shape.head_dim).transpose(1, 2)
        query, key, value = heads.split((num_query, num_key, num_value), dim=1)
        return query, key, value

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, root, ax, a, f, norm, weight, cos, sin = ctx.saved_tensors
        needs_hidden, needs_a, needs_f = ctx.needs_input_grad[:3]
        shape: _Shape = ctx.shape
        grad_fused = _grad_fused(gradients, shape, cos, sin)
        rows = _flat(grad_fused)
        grad_a = grad_ax = grad_hidden = None
        grad_f = wide_product(rows.t(), _flat(ax), ctx.wide) if needs_f else None
        if f is not None and (needs_hidden or needs_a):
            grad_ax = (rows @ f).view(*grad_fused.shape[:-1], -1)
        grad_normed = (rows @ weight).view(*grad_fused.shape[:-1], -1) if needs_hidden else None
        grad_normed, grad_ax = _leave(grad_normed, grad_ax, a, shape.tensor_parallel, needs_ax=needs_a)
        if needs_a:
            assert grad_ax is not None
            normed = shape.kernels.apply_norm(as_rows(hidden), norm.detach(), root)
            grad_a = wide_product(_flat(grad_ax).t(), normed, ctx.wide)
        if grad_normed is not None:
            found = shape.kernels.norm_gradient(as_rows(grad_normed), as_rows(hidden), norm.detach(), root)
            grad_hidden = found.view(hidden.shape)
        return grad_hidden, grad_a, grad_f, *(None,) * 8


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(b, s, n) -> (b s, n), a view."""
    return tensor.view(-1, tensor.shape[-1])


def _grad_fused(
    gradients: tuple[torch.Tensor, ...], shape: _Shape, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """The gradient of the fused projection, (b, s, o), from those of the rotated heads (b, heads, s, head_dim)."""
    # Kernels for GPUs give them by tokens, where this copies nothing.
    parts = (gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients)
    batch, _, length, _ = gradients[0].shape
    return shape.kernels.rotate_gradient(*parts, cos, sin).view(batch, length, -1)


def _enter(
    normed: torch.Tensor, ax: torch.Tensor | None, shape: _Shape
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and h of whole sequences, (b, s, n), on every rank, in one message where ranks hold parts of them."""
    if shape.tensor_parallel.sequence_parts == 1:
        return normed, ax
    joined = normed if ax is None else _beside(normed, ax)
    whole = all_gather(joined, shape.tensor_parallel.group, SEQUENCE_DIM)[0].unflatten(0, (shape.num_rows, -1))
    if ax is None:
        return whole, None
    whole, beside = _split(whole, ax.shape[-1])
    return whole, beside.contiguous()  # a copy: h is kept, and must not keep x


def _leave(
    grad_normed: torch.Tensor | None,
    grad_ax: torch.Tensor | None,
    a: torch.Tensor | None,
    tensor_parallel: TensorParallel,
    *,
    needs_ax: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and h, each the sum over the ranks' rows of W and B, with h's share in that of x.

    Under sequence parallelism they come back as this rank's part of the sequence: A's gradient there is of its own x,
    where `needs_ax`, so h's travels too. Without it every rank takes its own addend of h's gradient to all of x, and
    A's gradient is a sum of that; either way the sum over ranks is taken where A was gathered.
    """
    group, in_parts = tensor_parallel.group, tensor_parallel.sequence_parts > 1
    if in_parts:
        grad_normed, grad_ax = (None if part is None else end_to_end(part) for part in (grad_normed, grad_ax))
    if in_parts and needs_ax:
        assert grad_ax is not None
        if grad_normed is None:
            return None, reduce_scatter(grad_ax, group, SEQUENCE_DIM)
        size = grad_ax.shape[-1]
        grad_normed, grad_ax = _split(reduce_scatter(_beside(grad_normed, grad_ax), group, SEQUENCE_DIM), size)
        return _add_share_(grad_normed, grad_ax, a), grad_ax
    if grad_normed is None:
        return None, grad_ax
    grad_normed = _add_share_(grad_normed, grad_ax, a)
    if in_parts:
        return reduce_scatter(grad_normed, group, SEQUENCE_DIM), grad_ax
    return all_reduce(grad_normed, group), grad_ax


def _add_share_(grad_normed: torch.Tensor, grad_ax: torch.Tensor | None, a: torch.Tensor | None) -> torch.Tensor:
    """grad_normed + grad_ax A, in its place."""
    if grad_ax is not None and a is not None:
        rows = grad_normed.view(-1, grad_normed.shape[-1])
        torch.addmm(rows, grad_ax.reshape(-1, grad_ax.shape[-1]), a, out=rows)
    return grad_normed


def _beside(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """[wide | narrow | zeros], so that the columns divide by layers.SIZE_MULTIPLE where those of `wide` do."""
    missing = padded(narrow.shape[-1]) - narrow.shape[-1]
    return torch.cat((wide, narrow, narrow.new_zeros(*narrow.shape[:-1], missing)), dim=-1)


def _split(joined: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of `_beside`, the second of `size` columns; views."""
    width = joined.shape[-1] - padded(size)
    return joined[..., :width], joined[..., width : width + size]
