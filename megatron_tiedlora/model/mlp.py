"""SwiGLU: y = W_down (silu(W_gate x) * (W_up x)), gate and up fused into one product."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.parallel.layers import FrozenLinear


class SwiGlu(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, hidden_size: int, local_intermediate: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = FrozenLinear(hidden_size, 2 * local_intermediate, dtype=dtype)
        self.down = FrozenLinear(local_intermediate, hidden_size, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(b, s, d) -> (b, s, d)."""
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)
