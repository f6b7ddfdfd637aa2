"""SwiGLU behind its norm: y = W_down (silu(W_gate x) * (W_up x)), x = norm(hidden), gate and up in one matmul."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_tiedlora.model.normed_linear import NormedLinear
from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import Kernels, as_rows
from megatron_tiedlora.parallel.layers import RowParallelLinear


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
        return kernels.gate(as_rows(gate_up)).view(*gate_up.shape[:-1], -1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        found = ctx.kernels.gate_gradient(as_rows(gradient), as_rows(gate_up))
        return found.view(gate_up.shape), None


class SwiGlu(nn.Module):
    """The feed-forward part of a block, in two steps. `activate` saves its input, gate and up for the backward pass."""

    def __init__(self, gate_up: NormedLinear, down: RowParallelLinear, *, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = gate_up
        self.down = down

    def activate(self, hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """Activations between layers, (b, s, d) or (1, b s / p, d) -> silu(W_gate x) * (W_up x), (..., local f)."""
        (gate_up,) = self.gate_up(hidden, tensor_parallel, num_rows=len(hidden))
        gated: torch.Tensor = _Gated.apply(gate_up, self.kernels)
        return gated

    def project(self, gated: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """W_down y: the result of `activate`, (..., local f) -> activations between layers."""
        output: torch.Tensor = self.down(gated, tensor_parallel)
        return output
