"""Norm and column-parallel frozen linear with its low-rank update: one autograd step with a handwritten backward pass.

    y = epilogue(W x + c + F A x)        x = norm(hidden)

For the backward pass it saves the norm's input, one number per token for the norm, and A x, r numbers per token; x is
computed again. Gradients of frozen factors are not computed. The algebra of the update is in `adapters/low_rank.py`;
A and F come from the adapter.

Under sequence parallelism each rank computes A x from its part of the sequence. A x is sent in the same message as x,
and its gradient in the same message as the gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from megatron_tiedlora.adapters import low_rank
from megatron_tiedlora.adapters.tied_adapter import LinearUpdate
from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.collectives import SEQUENCE_DIM, all_gather, all_reduce, end_to_end, reduce_scatter
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_parameter, register
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import Kernels, as_rows, detached


class Epilogue(Protocol):
    """A function of the projection's result, with its derivative."""

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """From (b, s, local_out), which it may overwrite, to the results, and to what `backward` needs."""

    def backward(self, gradients: Sequence[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        """From the gradients of the results to the gradient of the projection, (b, s, local_out)."""


class Unchanged:
    """The epilogue that does nothing."""

    def forward(self, projected: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Return the projection itself."""
        return (projected,), ()

    def backward(self, gradients: Sequence[torch.Tensor], *saved: torch.Tensor) -> torch.Tensor:
        """Return its gradient."""
        return gradients[0]


class NormedLinear(nn.Module):
    """The weight and bias of the norm, and this rank's shard of W and its bias."""

    def __init__(
        self,
        weight: FrozenWeight,
        *,
        bias: nn.Parameter | None = None,
        eps: float,
        norm_has_bias: bool = False,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """`weight` is W, (local out, in).

        Args:
            norm_has_bias: True for a LayerNorm, False for an RMS norm.
            dtype: of the norm's weight and bias.
        """
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        in_size = weight.local_shape[1]
        self.norm = frozen_parameter(in_size, dtype=dtype)
        self.register_parameter("norm_bias", frozen_parameter(in_size, dtype=dtype) if norm_has_bias else None)
        self.frozen = register(self, weight)
        self.register_parameter("bias", bias)

    def epilogue(self, table: tuple[torch.Tensor, ...]) -> Epilogue:
        """What follows the projection; `table` is what the caller of `forward` has given for it."""
        return Unchanged()

    def forward(
        self,
        hidden: torch.Tensor,
        tensor_parallel: TensorParallel,
        update: LinearUpdate | None = None,
        *,
        num_rows: int,
        table: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Activations between layers, (b, s, d) or (1, b s / p, d), to the results of the epilogue.

        Args:
            num_rows: b.
            table: for the epilogue.
        """
        a, f, grad_a, grad_f = (None,) * 4 if update is None else update
        step = _Step(self.frozen, self.eps, num_rows, tensor_parallel, self.kernels, self.epilogue(table))
        results: tuple[torch.Tensor, ...] = _NormedLinear.apply(
            hidden, grad_a, grad_f, a, f, self.norm, self.norm_bias, self.bias, step
        )
        return results


@dataclass(frozen=True)
class _Step:
    weight: FrozenWeight
    eps: float
    num_rows: int
    tensor_parallel: TensorParallel
    kernels: Kernels
    epilogue: Epilogue


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        grad_a: torch.Tensor | None,
        grad_f: torch.Tensor | None,
        a: torch.Tensor | None,
        f: torch.Tensor | None,
        norm: torch.Tensor,
        norm_bias: torch.Tensor | None,
        bias: torch.Tensor | None,
        step: _Step,
    ) -> tuple[torch.Tensor, ...]:
        normed, root = step.kernels.normalise(as_rows(hidden), norm.detach(), detached(norm_bias), step.eps)
        normed = normed.view(hidden.shape)
        ax = None if a is None else low_rank.reduce_input(normed, a)
        normed, ax = _enter(normed, ax, step)
        projected = step.weight.times_transposed(_flat(normed), bias).view(*normed.shape[:-1], -1)
        if ax is not None and f is not None:
            low_rank.add_update_(_flat(projected), _flat(ax), f)
        results, saved = step.epilogue.forward(projected)
        needs_hidden, needs_a, needs_f = ctx.needs_input_grad[:3]
        ctx.step = step
        ctx.wide = next((tensor.dtype for tensor in (grad_a, grad_f) if tensor is not None), None)
        ctx.save_for_backward(
            *((hidden, root) if needs_hidden or needs_a else (None, None)),
            ax if needs_f else None,
            *(a, f, norm, norm_bias, *saved),
        )
        return results

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, root, ax, a, f, norm, norm_bias, *saved = ctx.saved_tensors
        needs_hidden, needs_a, needs_f = ctx.needs_input_grad[:3]
        step: _Step = ctx.step
        grad_projected = step.epilogue.backward(gradients, *saved)
        rows = _flat(grad_projected)
        grad_a = grad_ax = grad_hidden = None
        grad_f = low_rank.gradient_of_f(rows, _flat(ax), ctx.wide) if needs_f else None
        if f is not None and (needs_hidden or needs_a):
            grad_ax = low_rank.gradient_of_ax(rows, f).view(*grad_projected.shape[:-1], -1)
        grad_normed = step.weight.times(rows).view(*grad_projected.shape[:-1], -1) if needs_hidden else None
        grad_normed, grad_ax = _leave(grad_normed, grad_ax, a, step.tensor_parallel, needs_ax=needs_a)
        if needs_a:
            assert grad_ax is not None
            normed = step.kernels.apply_norm(as_rows(hidden), norm.detach(), detached(norm_bias), root)
            grad_a = low_rank.gradient_of_a(_flat(grad_ax), normed, ctx.wide)
        if grad_normed is not None:
            inputs = (as_rows(grad_normed), as_rows(hidden))
            found = step.kernels.norm_gradient(*inputs, norm.detach(), detached(norm_bias), root)
            grad_hidden = found.view(hidden.shape)
        return grad_hidden, grad_a, grad_f, *(None,) * 6


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """(b, s, n) -> (b s, n), a view."""
    return tensor.view(-1, tensor.shape[-1])


def _enter(normed: torch.Tensor, ax: torch.Tensor | None, step: _Step) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x and A x of whole sequences, (b, s, n), on every rank; gathered in one message if sequences are sharded."""
    if step.tensor_parallel.sequence_parts == 1:
        return normed, ax
    joined = normed if ax is None else low_rank.beside(normed, ax)
    whole = all_gather(joined, step.tensor_parallel.group, SEQUENCE_DIM)[0].unflatten(0, (step.num_rows, -1))
    if ax is None:
        return whole, None
    whole, narrow = low_rank.apart(whole, ax.shape[-1])
    return whole, narrow.contiguous()  # a copy: A x is saved, and a view would keep x in memory


def _leave(
    grad_normed: torch.Tensor | None,
    grad_ax: torch.Tensor | None,
    a: torch.Tensor | None,
    tensor_parallel: TensorParallel,
    *,
    needs_ax: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and A x; that of x is summed over the ranks and includes the update's share.

    Under sequence parallelism this rank gets its part of the sequence. With `needs_ax` the gradient of A x is summed in
    the same message, and A's gradient follows from it and this rank's part of x. Without sequence parallelism A's
    gradient is this rank's addend, from all of x. In both cases it is summed over ranks where A was gathered.
    """
    group, in_parts = tensor_parallel.group, tensor_parallel.sequence_parts > 1
    if in_parts:
        grad_normed, grad_ax = (None if part is None else end_to_end(part) for part in (grad_normed, grad_ax))
    if in_parts and needs_ax:
        assert grad_ax is not None
        if grad_normed is None:
            return None, reduce_scatter(grad_ax, group, SEQUENCE_DIM)
        size = grad_ax.shape[-1]
        joined = reduce_scatter(low_rank.beside(grad_normed, grad_ax), group, SEQUENCE_DIM)
        grad_normed, grad_ax = low_rank.apart(joined, size)
        return low_rank.add_share_(grad_normed, grad_ax, a), grad_ax
    if grad_normed is None:
        return None, grad_ax
    grad_normed = low_rank.add_share_(grad_normed, grad_ax, a)
    if in_parts:
        return reduce_scatter(grad_normed, group, SEQUENCE_DIM), grad_ax
    return all_reduce(grad_normed, group), grad_ax
