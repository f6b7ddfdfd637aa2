"""SwiGLU: y = W_down (silu(W_gate x) * (W_up x)), gate and up fused into one product."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.parallel.collectives import enter_tensor_parallel_region
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.layers import ColumnParallelLinear, RowParallelLinear


class SwiGlu(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, hidden_size: int, local_intermediate: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(hidden_size, 2 * local_intermediate, dtype=dtype)
        self.down = RowParallelLinear(local_intermediate, hidden_size, dtype=dtype)

    def forward(self, hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """What flows between layers, (b, s, d) or (b, s / p, d), and the same back."""
        gate, up = self.gate_up(enter_tensor_parallel_region(hidden, tensor_parallel)).chunk(2, dim=-1)
        output: torch.Tensor = self.down(functional.silu(gate) * up, tensor_parallel)
        return output
