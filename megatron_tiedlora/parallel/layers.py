"""Matmuls with a frozen weight, and the embedding. Linears with an adapter are in `model/linears.py`.

Y = X W^T with W (out, in). The weight is never trained: dX = dY W does not need X, so X is not saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.collectives import leave_tensor_parallel_region
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, register
from megatron_tiedlora.parallel.groups import TensorParallel

# Rows of matmuls, and columns sent beside others, are padded to multiples of this: fast kernels want rows of
# 16-bit numbers to start at multiples of 16 bytes, and a CPU takes a third longer for 511 rows than for 512.
SIZE_MULTIPLE = 8
_HALF = (torch.bfloat16, torch.float16)


def padded(size: int, multiple: int = SIZE_MULTIPLE) -> int:
    """`size`, rounded up to the next multiple."""
    return -(-size // multiple) * multiple


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
        ctx.weight = weight
        return weight.times_transposed(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.weight.times(grad_y.flatten(0, -2)).view(*grad_y.shape[:-1], -1), None


def wide_matmul(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in `dtype`, from matrices of one dtype, which is not wider than `dtype`.

    From 16 bits to fp32, on CUDA, the sums are returned unrounded. With any other pair of dtypes
    they are first rounded to the dtype of the matrices.
    """
    if left.is_cuda and left.dtype in _HALF and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def frozen_linear(x: torch.Tensor, weight: FrozenWeight) -> torch.Tensor:
    """x W^T, (..., out), from x (..., in) and W (out, in). It saves nothing for the backward pass, dX = dY W."""
    product: torch.Tensor = _FrozenLinear.apply(x, weight)
    return product


class VocabularyParallelEmbedding(nn.Module):
    """Looks token ids up in a (vocabulary, d) table. A rank adds zeros for tokens whose rows other ranks hold."""

    weight: nn.Parameter

    def __init__(self, weight: FrozenWeight) -> None:
        """`weight`: (local vocabulary, d), stored as one tensor."""
        super().__init__()
        self.frozen = register(self, weight)

    def forward(self, tokens: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """Tokens (b, s) int64 -> activations between layers, (b, s, d) or (1, b s / p, d)."""
        if tensor_parallel.group.size == 1:
            return functional.embedding(tokens, self.weight)
        local_vocabulary = self.weight.shape[0]
        local_tokens = tokens - tensor_parallel.group.rank * local_vocabulary
        foreign = (local_tokens < 0) | (local_tokens >= local_vocabulary)
        rows = functional.embedding(local_tokens.masked_fill(foreign, 0), self.weight)
        return leave_tensor_parallel_region(rows.masked_fill(foreign[..., None], 0.0), tensor_parallel)
