"""Frozen linear layers and the embedding, sized by what one rank holds. Their values come from the checkpoint reader.

Y = X W^T with W (out, in). Column-parallel layers hold rows of W, and give their part of the output features; a
row-parallel layer holds columns, and gives an addend of the output that is summed over the ranks (see ShardSpec).
Weights are created empty and never trained: dX = dY W needs nothing of X, so no layer keeps its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.parallel.collectives import leave_tensor_parallel_region
from megatron_tiedlora.parallel.first_derivative import first_derivative_only
from megatron_tiedlora.parallel.groups import TensorParallel

# Rows of products, and columns that travel beside others, are filled up to multiples of this: fast kernels want rows of
# 16-bit numbers to start at multiples of 16 bytes, and a CPU takes a third longer for 511 rows than for 512.
SIZE_MULTIPLE = 8
_HALF = (torch.bfloat16, torch.float16)
_LEAVES_WIDE = "dtype" in torch.ops.aten.mm.overloads()


def padded(size: int, multiple: int = SIZE_MULTIPLE) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without a gradient, on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return multiply(hidden, weight, bias)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None, None


def multiply(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(..., in) times W^T, W (out, in), plus the bias: (..., out). For use where autograd is not looking.

    Not `functional.linear`, in whose place DeepSpeed's zero.Init puts a function of its own (seen in 0.19.8).
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    product = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return product.view(*hidden.shape[:-1], weight.shape[0])


def wide_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right, of matrices of one dtype, in `dtype`, which is as wide as theirs or wider.

    The sum leaves the matmul unrounded where torch can do that: from 16 bits to fp32, on CUDA, from torch 2.8 on. Any
    other pair of dtypes is rounded to the matrices' own first.
    """
    if left.is_cuda and left.dtype in _HALF and dtype == torch.float32 and _LEAVES_WIDE:
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def frozen_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """hidden (..., in) times W^T, W (out, in), plus the bias: (..., out).

    Keeps W alone for the backward pass, which gives the gradient of `hidden` and of nothing else; torch's own product
    is replaced by one that keeps its input under ZeRO-3 (seen in DeepSpeed 0.19.8).
    """
    product: torch.Tensor = _FrozenLinear.apply(hidden, weight, bias)
    return product


class ColumnParallelLinear(nn.Module):
    """Y_i = X W_i^T + b_i with W = [W_1; ...; W_p]: every rank sees all of X and gives its own features.

    The caller has brought X into the region (`enter_tensor_parallel_region`), since other products may share it.
    """

    def __init__(self, in_size: int, local_out: int, *, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = frozen_parameter(local_out, in_size, dtype=dtype)
        self.bias = frozen_parameter(local_out, dtype=dtype) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(b, s, in) -> (b, s, local_out)."""
        return frozen_linear(hidden, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """Y = sum_i X_i W_i^T + b with W = [W_1, ..., W_p]: every rank has its features of X. b is added once."""

    def __init__(self, local_in: int, out_size: int, *, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = frozen_parameter(out_size, local_in, dtype=dtype)
        self.bias = frozen_parameter(out_size, dtype=dtype) if bias else None

    def forward(self, local_hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """(..., local_in) -> what flows between layers: (b, s, out), or (1, b s / p, out) with sequence parallelism."""
        output = leave_tensor_parallel_region(frozen_linear(local_hidden, self.weight), tensor_parallel)
        return output if self.bias is None else output + self.bias


class VocabularyParallelEmbedding(nn.Module):
    """Rows of a (vocabulary, d) table by token id; a rank adds zeros for the tokens of other ranks' rows."""

    def __init__(self, local_vocabulary: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(local_vocabulary, hidden_size, dtype=dtype)

    def forward(self, tokens: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        """(b, s) int64 -> what flows between layers, (b, s, d) or (1, b s / p, d)."""
        if tensor_parallel.group.size == 1:
            return functional.embedding(tokens, self.weight)
        local_vocabulary = self.weight.shape[0]
        local_tokens = tokens - tensor_parallel.group.rank * local_vocabulary
        foreign = (local_tokens < 0) | (local_tokens >= local_vocabulary)
        rows = functional.embedding(local_tokens.masked_fill(foreign, 0), self.weight)
        return leave_tensor_parallel_region(rows.masked_fill(foreign[..., None], 0.0), tensor_parallel)
