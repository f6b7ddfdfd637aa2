"""Frozen linear layers and the embedding, sized by what one rank holds.

They own local weights and leave their values to the checkpoint reader. Y = X W^T with W (out, in); column-parallel
layers hold rows of W, row-parallel layers hold columns (see ShardSpec). Weights are created empty and never trained.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def frozen_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without a gradient, on the current default device."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class FrozenLinear(nn.Module):
    """Y = X W^T + b on the rank's part of W."""

    def __init__(self, local_in: int, local_out: int, *, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.weight = frozen_parameter(local_out, local_in, dtype=dtype)
        self.bias = frozen_parameter(local_out, dtype=dtype) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., local_in) -> (..., local_out)."""
        return functional.linear(hidden, self.weight, self.bias)


class FrozenEmbedding(nn.Module):
    """Rows of a (vocabulary, d) table by token id."""

    def __init__(self, local_vocabulary: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = frozen_parameter(local_vocabulary, hidden_size, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(b, s) int64 -> (b, s, d)."""
        return functional.embedding(tokens, self.weight)
