"""The row-parallel frozen linear with its low-rank update, and the norm behind it, if there is one.

    y = norm(sum_i z_i + c)        z_i = W_i x_i + F A_i x_i        W = [W_1, ..., W_p], A = [A_1, ..., A_p]

Every rank has its own features x_i, and computes an addend of the output, which is summed over the ranks. The update is
part of the addend, so it adds no message: A is sharded like the columns of W, and its gradient is complete on its rank.
F = (alpha / r) diag(v) B diag(u) is whole on every rank, which has an addend of its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.rows import AllRows
from megatron_tiedlora.adapters.tied_adapter import LinearUpdate
from megatron_tiedlora.model.normed_linear import Factors, Needs, Norm, gradient_dtype
from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.collectives import leave_tensor_parallel_region
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, register
from megatron_tiedlora.parallel.groups import TensorParallel


class RowParallelLinear(nn.Module):
    """This rank's columns of W, the bias and the norm."""

    bias: nn.Parameter | None

    def __init__(
        self, weight: FrozenWeight, *, bias: nn.Parameter | None = None, norm: Norm | None = None
    ) -> None:
        """`weight` is W_i, (out, local in)."""
        super().__init__()
        self.frozen = register(self, weight)
        self.register_parameter("bias", bias)
        self.norm = norm

    def forward(
        self, local_hidden: torch.Tensor, tensor_parallel: TensorParallel, update: LinearUpdate | None = None
    ) -> torch.Tensor:
        """(..., local_in) -> activations between layers, (b, s, out), or (1, b s / p, out) if sequence parallel."""
        a, f, grad_a, grad_f, rows = update or LinearUpdate()
        result = _RowParallel.apply(local_hidden, grad_a, grad_f, Factors(a, f), self.frozen, rows)
        return self.total(result, tensor_parallel)

    def total(self, addend: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """y from the ranks' addends (b, s, out), as activations between layers. The bias is added once.

        Under sequence parallelism the norm is that of this rank's part of the sequence.
        """
        output = leave_tensor_parallel_region(addend, tensor_parallel)
        output = output if self.bias is None else output + self.bias
        return output if self.norm is None else self.norm(output)


def addend(
    x: torch.Tensor, weight: FrozenWeight, factors: Factors, rows: AllRows
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z_i (tokens, out) and A_i D(x_i) of `rows` from x_i (tokens, local in). Autograd does not record it."""
    z, (a, f) = weight.times_transposed(x), factors
    if a is None or f is None:
        return z, None
    ax = rows.reduce_input(x, a, local=False)
    rows.add_update_(z, ax, f)
    return z, ax


def addend_gradients(
    grad_z: torch.Tensor,
    x: torch.Tensor | None,
    ax: torch.Tensor | None,
    weight: FrozenWeight,
    factors: Factors,
    needs: Needs,
    wide: torch.dtype | None,
    rows: AllRows,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x_i, A_i and F from dz (tokens, out).

    Args:
        x: needed for the gradient of A_i.
        ax: needed for that of F.
        wide: dtype of the gradients of A_i and F.
    """
    grad_x = grad_a = grad_f = grad_ax = None
    a, f = factors
    if needs.f:
        assert ax is not None and wide is not None
        grad_f = rows.gradient_of_f(grad_z, ax, wide)
    if f is not None and (needs.x or needs.a):
        grad_ax = rows.gradient_of_ax(grad_z, f)
    if needs.a:
        assert grad_ax is not None and x is not None and wide is not None
        grad_a = rows.gradient_of_a(grad_ax, x, wide, local=False)
    if needs.x:
        grad_x = rows.add_share_(weight.times(grad_z), grad_ax, a, local=False)
    return grad_x, grad_a, grad_f


class _RowParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        grad_a: torch.Tensor | None,
        grad_f: torch.Tensor | None,
        factors: Factors,
        weight: FrozenWeight,
        rows: AllRows,
    ) -> torch.Tensor:
        z, ax = addend(x.flatten(0, -2), weight, factors, rows)
        needs = Needs(*ctx.needs_input_grad[:3])
        ctx.weight, ctx.rows = weight, rows
        ctx.wide = gradient_dtype(grad_a, grad_f)
        ctx.save_for_backward(x if needs.a else None, ax if needs.f else None, *factors)
        return z.view(*x.shape[:-1], -1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_z: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, ax, *factors = ctx.saved_tensors
        inputs = None if x is None else x.flatten(0, -2)
        needs = Needs(*ctx.needs_input_grad[:3])
        grad_x, *others = addend_gradients(
            grad_z.flatten(0, -2), inputs, ax, ctx.weight, Factors(*factors), needs, ctx.wide, ctx.rows
        )
        return None if grad_x is None else grad_x.view(*grad_z.shape[:-1], -1), *others, None, None, None
