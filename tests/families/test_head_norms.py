"""The gradient through norms of heads, which are not kept but computed again from the rotated result."""

from __future__ import annotations

import pytest
import torch

from megatron_tiedlora.parallel.kernels import rotate_normed, rotate_normed_gradient


def _found_and_true(dtype: torch.dtype) -> tuple[float, float]:
    """Errors, of the norm of the true gradient: of the kernel and of autograd through the same function, in `dtype`."""
    draw = torch.Generator().manual_seed(4)
    heads, gradient = (torch.randn(300, 5, 32, generator=draw).to(dtype) for _ in range(2))
    angles = 40 * torch.rand(300, 1, 12, generator=draw)
    cos, sin = (1.2 * angles.cos()).to(dtype), (1.2 * angles.sin()).to(dtype)  # part of a head, scaled
    weight = (10 ** (2 * torch.rand(3, 32, generator=draw) - 1)).to(dtype)  # from 0.1 to 10

    def by_autograd(kind: torch.dtype) -> torch.Tensor:
        inputs = heads.to(kind).requires_grad_()
        rotated, _ = rotate_normed(inputs, cos.to(kind), sin.to(kind), weight.to(kind), 1e-6)
        return torch.autograd.grad(rotated, inputs, gradient.to(kind))[0].double()

    rotated, root = rotate_normed(heads, cos, sin, weight, 1e-6)
    parts = gradient.split((2, 1, 2), dim=1)
    found = rotate_normed_gradient(*parts, rotated, root, None, cos, sin, weight).double()
    true = by_autograd(torch.float64)
    return float((found - true).norm() / true.norm()), float((by_autograd(dtype) - true).norm() / true.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_gradient_is_as_exact_as_autograd_s(dtype: torch.dtype, bound: float) -> None:
    found, plain = _found_and_true(dtype)
    assert found <= bound and found <= max(1.5 * plain, 1e-14)
