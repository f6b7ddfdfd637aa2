"""RMS norm: y = weight * x / sqrt(mean(x^2) + eps), the division in max(fp32, input dtype); see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.frozen_weight import frozen_parameter
from megatron_tiedlora.parallel.kernels import Kernels, as_rows


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float, kernels: Kernels) -> torch.Tensor:
        normed, root = kernels.normalise(as_rows(hidden), weight.detach(), eps)
        ctx.save_for_backward(hidden, weight, root)
        ctx.kernels = kernels
        return normed.view(hidden.shape)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, root = ctx.saved_tensors
        found = ctx.kernels.norm_gradient(as_rows(gradient), as_rows(hidden), weight.detach(), root)
        return found.view(hidden.shape), None, None, None


class RmsNorm(nn.Module):
    """RMS norm with a frozen weight. It saves its input and one number per token for the backward pass."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.weight = frozen_parameter(hidden_size, dtype=dtype)
        self.eps = eps
        self.kernels = kernels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d) in the input's dtype."""
        normed: torch.Tensor = _RmsNorm.apply(hidden, self.weight, self.eps, self.kernels)
        return normed
