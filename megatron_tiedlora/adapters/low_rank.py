"""The low-rank update of a linear, z = W x + F A x, as pure functions on one rank's tensors.

With ax = A x, dz the gradient of z and grad_ax = dz F:

    dA = grad_ax^T x        dF = dz^T ax        dx = dz W + grad_ax A

With dropout D on the update's input, ax = A D(x), dA = grad_ax^T D(x), and dx = dz W + D(grad_ax A): D multiplies each
element by a number, so it is its own adjoint.

No matmul here creates a (tokens, out) tensor. Rows are flat: (tokens, features). `tied_adapter` computes F = (alpha /
r) diag(v) B diag(u), and the gradients of B, u and v from dF. The projection computes the matmuls with W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_tiedlora.parallel.layers import padded, wide_matmul

Drop = Callable[[torch.Tensor], torch.Tensor]  # D of rows (tokens, in)


def reduce_input(x: torch.Tensor, a: torch.Tensor, drop: Drop | None = None) -> torch.Tensor:
    """ax = A D(x), (..., r), from x (..., in) and A (r, in)."""
    rows = x.flatten(0, -2)
    return torch.mm(rows if drop is None else drop(rows), a.t()).view(*x.shape[:-1], -1)


def add_update_(z: torch.Tensor, ax: torch.Tensor, f: torch.Tensor) -> None:
    """z += F ax in place: z (tokens, out), ax (tokens, r), F (out, r)."""
    torch.addmm(z, ax, f.t(), out=z)


def gradient_of_ax(grad_z: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """grad_ax = dz F, (tokens, r), from dz (tokens, out)."""
    return grad_z @ f


def gradient_of_f(grad_z: torch.Tensor, ax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dF = dz^T ax, (out, r), in `dtype`."""
    return wide_matmul(grad_z.t(), ax, dtype)


def gradient_of_a(
    grad_ax: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, drop: Drop | None = None
) -> torch.Tensor:
    """dA = grad_ax^T D(x), (r, in), in `dtype`, from grad_ax (tokens, r) and x (tokens, in)."""
    return wide_matmul(grad_ax.t(), x if drop is None else drop(x), dtype)


def add_share_(
    grad_x: torch.Tensor, grad_ax: torch.Tensor | None, a: torch.Tensor | None, drop: Drop | None = None
) -> torch.Tensor:
    """grad_x + D(grad_ax A), in place; grad_x alone if one of the others is None.

    Args:
        grad_x: (..., in), on the same tokens as grad_ax (..., r). Only D makes a second tensor of this size.
    """
    if grad_ax is None or a is None:
        return grad_x
    rows, narrow = grad_x.view(-1, grad_x.shape[-1]), grad_ax.reshape(-1, grad_ax.shape[-1])
    if drop is None:
        torch.addmm(rows, narrow, a, out=rows)
    else:
        rows.add_(drop(narrow @ a))
    return grad_x


def beside(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """[wide | narrow | zeros] for one message. `narrow` is padded to a multiple of `layers.SIZE_MULTIPLE` columns."""
    missing = padded(narrow.shape[-1]) - narrow.shape[-1]
    return torch.cat((wide, narrow, narrow.new_zeros(*narrow.shape[:-1], missing)), dim=-1)


def apart(joined: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`wide` and `narrow` from the result of `beside`, as views; `narrow` has `size` columns."""
    width = joined.shape[-1] - padded(size)
    return joined[..., :width], joined[..., width : width + size]
