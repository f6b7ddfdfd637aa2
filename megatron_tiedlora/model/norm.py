"""RMS norm: y = weight * x / sqrt(mean(x^2) + eps), the division in max(fp32, input dtype).

With n = x / sqrt(mean(x^2) + eps) and g = weight * dy its gradient is dx = (g - n mean(g n)) / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_tiedlora.parallel.first_derivative import first_derivative_only
from megatron_tiedlora.parallel.layers import frozen_parameter
from megatron_tiedlora.parallel.loss import upcast


def inverse_root(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of every row, (..., 1) in max(fp32, input dtype)."""
    return torch.rsqrt(upcast(hidden).square().mean(-1, keepdim=True) + eps)


def normalise(hidden: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight * x * scale with the rows' `inverse_root`; rounded before the weight is applied, as in transformers."""
    return weight * (upcast(hidden) * scale).to(hidden.dtype)


def norm_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, (..., d), from the norm's output gradient, its input, `inverse_root` and weight."""
    normed = upcast(hidden) * scale
    weighted = upcast(gradient) * weight
    return ((weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * scale).to(hidden.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        scale = inverse_root(hidden, eps)
        ctx.save_for_backward(hidden, scale, weight)
        return normalise(hidden, scale, weight)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return norm_gradient(gradient, *ctx.saved_tensors), None, None


class RmsNorm(nn.Module):
    """RMS norm with a frozen weight. Keeps its input and one number a row for the backward pass."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(hidden_size, dtype=dtype)
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d) in the input's dtype."""
        normed: torch.Tensor = _RmsNorm.apply(hidden, self.weight, self.eps)
        return normed
