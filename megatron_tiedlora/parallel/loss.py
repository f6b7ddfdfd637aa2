"""Cross entropy of the next token, summed, in at least fp32."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED_LABEL = -100


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in max(fp32, its own dtype): the precision of norms, softmax and loss."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def sum_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over positions of -log softmax(logits)[label].

    Args:
        logits: (T, V), any float dtype.
        labels: (T,) int64, all of them supervised.

    Returns:
        a scalar in max(fp32, dtype of `logits`).
    """
    return functional.cross_entropy(upcast(logits), labels, reduction="sum")
