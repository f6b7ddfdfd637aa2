"""RMS norm: y = weight * x / sqrt(mean(x^2) + eps), the division in max(fp32, input dtype)."""

from __future__ import annotations

import torch
from torch import nn

from megatron_tiedlora.parallel.layers import frozen_parameter
from megatron_tiedlora.parallel.loss import upcast


class RmsNorm(nn.Module):
    """RMS norm with a frozen weight."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(hidden_size, dtype=dtype)
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d) in the input's dtype; rounded before the weight is applied, as in transformers."""
        wide = upcast(hidden)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden.dtype)
