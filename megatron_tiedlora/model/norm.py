"""RMS norm, y = weight * x / sqrt(mean(x^2) + eps), or LayerNorm, that of x - mean(x) plus a bias; see `kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.frozen_weight import frozen_parameter
from megatron_tiedlora.parallel.kernels import Kernels, as_rows, detached


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        kernels: Kernels,
    ) -> torch.Tensor:
        normed, root = kernels.normalise(as_rows(hidden), weight.detach(), detached(bias), eps)
        ctx.save_for_backward(hidden, weight, bias, root)
        ctx.kernels = kernels
        return normed.view(hidden.shape)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, root = ctx.saved_tensors
        rows = (as_rows(gradient), as_rows(hidden))
        found = ctx.kernels.norm_gradient(*rows, weight.detach(), detached(bias), root)
        return found.view(hidden.shape), None, None, None, None


class Norm(nn.Module):
    """A norm with a frozen weight, and a bias if it is a LayerNorm.

    It saves its input and one number per token for the backward pass.
    """

    def __init__(
        self, hidden_size: int, *, eps: float, norm_has_bias: bool, dtype: torch.dtype, kernels: Kernels
    ) -> None:
        super().__init__()
        self.weight = frozen_parameter(hidden_size, dtype=dtype)
        self.register_parameter("bias", frozen_parameter(hidden_size, dtype=dtype) if norm_has_bias else None)
        self.eps = eps
        self.kernels = kernels

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d) in the input's dtype."""
        normed: torch.Tensor = _Norm.apply(hidden, self.weight, self.bias, self.eps, self.kernels)
        return normed
