"""Cross entropy of the next token, summed, in at least fp32, over a vocabulary that is cut over the ranks.

-log softmax(z)[y] = logsumexp_i(l_i) - sum_i t_i, where rank i has l_i, the logsumexp of its own logits, and t_i, the
label's logit where it is one of its own, else 0. Two numbers a token travel, in one message.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_tiedlora.parallel.collectives import all_gather
from megatron_tiedlora.parallel.groups import RankGroup

IGNORED_LABEL = -100


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in max(fp32, its own dtype): the precision of norms, softmax and loss."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _losses(
    local_logits: torch.Tensor, labels: torch.Tensor, first_id: int, group: RankGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(losses (T,), logsumexp over all ids (T,), each label's place among the rank's ids (T,), whether it is one)."""
    wide = upcast(local_logits)
    index = labels - first_id
    own = (index >= 0) & (index < wide.shape[1])
    index = index.masked_fill(~own, 0)
    picked = wide.gather(1, index[:, None])[:, 0].masked_fill(~own, 0.0)
    numbers = torch.stack((wide.logsumexp(dim=-1), picked))[None]
    of_ranks = all_gather(numbers, group, dim=0)  # (ranks, 2, T)
    total = of_ranks[:, 0].logsumexp(dim=0)
    return total - of_ranks[:, 1].sum(dim=0), total, index, own


class _SumTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, local_logits: torch.Tensor, labels: torch.Tensor, first_id: int, group: RankGroup
    ) -> torch.Tensor:
        losses, total, index, own = _losses(local_logits, labels, first_id, group)
        ctx.save_for_backward(local_logits, total, index, own)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        local_logits, total, index, own = ctx.saved_tensors
        chance = (upcast(local_logits) - total[:, None]).exp()
        chance.scatter_add_(1, index[:, None], -own.to(chance.dtype)[:, None])
        return (chance * gradient).to(local_logits.dtype), None, None, None


def sum_token_losses(
    local_logits: torch.Tensor, labels: torch.Tensor, *, first_id: int, group: RankGroup
) -> torch.Tensor:
    """Sum over positions of -log softmax(logits)[label], the same on every rank.

    Args:
        local_logits: (T, V_local), any float dtype; the logits of ids first_id to first_id + V_local - 1, no padding.
        labels: (T,) int64, all of them supervised, the same on every rank.

    Returns:
        a scalar in max(fp32, dtype of `local_logits`). Its gradient with respect to `local_logits` needs no message.
    """
    loss: torch.Tensor = _SumTokenLosses.apply(local_logits, labels, first_id, group)
    return loss


@torch.no_grad()
def token_losses(local_logits: torch.Tensor, labels: torch.Tensor, *, first_id: int, group: RankGroup) -> torch.Tensor:
    """-log softmax(logits)[label] of each position, (T,), without a gradient; arguments as in `sum_token_losses`."""
    return _losses(local_logits, labels, first_id, group)[0]
