"""SwiGLU: y = W_down (silu(W_gate x) * (W_up x)), gate and up fused into one product.

With s = sigmoid(g), the gradient of silu(g) * u is dg = dy u s (1 + g (1 - s)) and du = dy g s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.parallel.collectives import enter_tensor_parallel_region
from megatron_tiedlora.parallel.first_derivative import first_derivative_only
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron_tiedlora.parallel.loss import upcast


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, (..., f), from [gate | up], (..., 2 f)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gated_gradient(gradient: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The gradient of [gate | up], (..., 2 f), from that of `gated`, (..., f); inside in max(fp32, input dtype)."""
    gate, up = (upcast(part) for part in gate_up.chunk(2, dim=-1))
    wide, chance = upcast(gradient), torch.sigmoid(gate)
    found = torch.empty_like(gate_up)
    of_gate, of_up = found.chunk(2, dim=-1)
    of_gate.copy_(wide * up * chance * (1 + gate * (1 - chance)))
    of_up.copy_(wide * gate * chance)
    return found


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gated_gradient(gradient, *ctx.saved_tensors)


class SwiGlu(nn.Module):
    """The feed-forward part of a block. Keeps gate and up for the backward pass."""

    def __init__(self, hidden_size: int, local_intermediate: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = ColumnParallelLinear(hidden_size, 2 * local_intermediate, dtype=dtype)
        self.down = RowParallelLinear(local_intermediate, hidden_size, dtype=dtype)

    def forward(self, hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """What flows between layers, (b, s, d) or (b, s / p, d), and the same back."""
        gate_up = self.gate_up(enter_tensor_parallel_region(hidden, tensor_parallel))
        output: torch.Tensor = self.down(_Gated.apply(gate_up), tensor_parallel)
        return output
