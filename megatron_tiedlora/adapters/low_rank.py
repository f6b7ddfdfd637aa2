"""The low-rank update of a linear, z = W x + F A x, as pure functions on one rank's tensors: what the adapter adds.

With ax = A x, dy the gradient of z and grad_ax = dy F:

    dA = grad_ax^T x        dF = dy^T ax        dx = dy W + grad_ax A

No matmul here gives anything of the size tokens x out. Rows are flat: (tokens, features). F = (alpha / r) diag(v) B
diag(u) and what becomes of dF are the bank's (`tied_adapter`), the matmuls with W are the projection's.
"""

from __future__ import annotations

import torch

from megatron_tiedlora.parallel.layers import padded, wide_matmul


def reduce_input(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """ax = A x, (..., r), from x (..., in) and A (r, in)."""
    return torch.mm(x.flatten(0, -2), a.t()).view(*x.shape[:-1], -1)


def add_update_(z: torch.Tensor, ax: torch.Tensor, f: torch.Tensor) -> None:
    """z += F ax in place: z (tokens, out), ax (tokens, r), F (out, r)."""
    torch.addmm(z, ax, f.t(), out=z)


def gradient_of_ax(grad_z: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """dy F, (tokens, r), from dy (tokens, out)."""
    return grad_z @ f


def gradient_of_f(grad_z: torch.Tensor, ax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dF = dy^T ax, (out, r), in `dtype`."""
    return wide_matmul(grad_z.t(), ax, dtype)


def gradient_of_a(grad_ax: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dA = grad_ax^T x, (r, in), in `dtype`, from grad_ax (tokens, r) and x (tokens, in)."""
    return wide_matmul(grad_ax.t(), x, dtype)


def add_share_(grad_x: torch.Tensor, grad_ax: torch.Tensor | None, a: torch.Tensor | None) -> torch.Tensor:
    """grad_x + grad_ax A in the place of grad_x, both (..., in) and (..., r); `grad_x` alone where nothing is added."""
    if grad_ax is not None and a is not None:
        rows = grad_x.view(-1, grad_x.shape[-1])
        torch.addmm(rows, grad_ax.reshape(-1, grad_ax.shape[-1]), a, out=rows)
    return grad_x


def beside(wide: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """[wide | narrow | zeros] for one message, with columns that divide by `layers.SIZE_MULTIPLE` where `wide`'s do."""
    missing = padded(narrow.shape[-1]) - narrow.shape[-1]
    return torch.cat((wide, narrow, narrow.new_zeros(*narrow.shape[:-1], missing)), dim=-1)


def apart(joined: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of `beside`, the second of `size` columns; views."""
    width = joined.shape[-1] - padded(size)
    return joined[..., :width], joined[..., width : width + size]
