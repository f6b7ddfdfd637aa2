"""Summed cross entropy of the next token, in at least fp32, over a vocabulary that is sharded over the ranks.

-log softmax(z)[y] = logsumexp_i(l_i) - sum_i t_i. Rank i has l_i, the logsumexp of its own logits, and t_i, the label's
logit if the rank has it, else 0. One message carries these two numbers per token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.parallel.backward import RowSpans, first_derivative_only, scaled_by_adapter, sums_by_adapter
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, padded
from megatron_tiedlora.parallel.groups import RankGroup, all_gather
from megatron_tiedlora.parallel.kernels import EAGER, Kernels, as_rows, upcast

IGNORED_LABEL = -100


class VocabularyShard(NamedTuple):
    """A rank's rows of the frozen vocabulary projection W, and how losses are computed from them."""

    weight: FrozenWeight  # (V_local, d), the rows of ids first_id to first_id + V_local - 1, without padding
    first_id: int
    group: RankGroup
    rows_at_once: int  # rows whose logits are in memory at one time, a multiple of `SIZE_MULTIPLE`
    kernels: Kernels = EAGER


class _Found(NamedTuple):
    """Numbers per row, each (n,)."""

    losses: Tensor
    total: Tensor  # logsumexp over all ids
    columns: Tensor  # of the labels among this rank's logits, 0 if another rank has the label
    own: Tensor  # whether this rank has the label
    picked: Tensor  # the label's logit, 0 if another rank has it


def _losses(local_logits: Tensor, labels: Tensor, shard: VocabularyShard) -> _Found:
    index = labels - shard.first_id
    own = (index >= 0) & (index < local_logits.shape[1])
    index = index.masked_fill(~own, 0)
    picked = upcast(local_logits.gather(1, index[:, None])[:, 0]).masked_fill(~own, 0.0)
    numbers = torch.stack((shard.kernels.row_log_sums(local_logits), picked))[None]
    by_rank = all_gather(numbers, shard.group, dim=0)  # (ranks, 2, T)
    total = by_rank[:, 0].logsumexp(dim=0)
    return _Found(total - by_rank[:, 1].sum(dim=0), total, index, own, picked)


class _SumTokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, shard: VocabularyShard, spans: RowSpans | None) -> Tensor:
        weight, kernels, rows_at_once = shard.weight, shard.kernels, shard.rows_at_once
        num_rows, needs_rows = len(rows), ctx.needs_input_grad[0]
        rows, labels = _padded_rows(rows, labels)
        gradient = torch.empty_like(rows) if needs_rows else None
        loss = torch.zeros((), dtype=upcast(rows[:0]).dtype, device=rows.device)
        by_row = [loss.new_empty(0)]  # losses of rows of several adapters
        logits = rows.new_empty(min(rows_at_once, len(rows)), weight.local_shape[0])  # one memory for all parts
        for start in range(0, len(rows), rows_at_once):
            part = slice(start, start + rows_at_once)
            local_logits = as_rows(weight.times_transposed(rows[part], out=logits[: len(rows[part])]))
            found = _losses(local_logits, labels[part], shard)
            losses = found.losses[: max(num_rows - start, 0)]
            if spans is None:
                loss += losses.sum()
            else:
                by_row.append(losses)
            if gradient is not None:
                kernels.exp_logits_(local_logits, found.total)
                # Subtract 1 from the probability of each label that this rank has; expm1 avoids the rounding of bf16.
                index = (torch.arange(len(local_logits), device=local_logits.device), found.columns)
                missing = torch.expm1(found.picked - found.total).to(local_logits.dtype)
                # Not scatter_, which would visit every element.
                local_logits.index_put_(index, torch.where(found.own, missing, local_logits[index]))
                weight.times(local_logits, out=gradient[part])
        ctx.spans = spans
        ctx.save_for_backward(None if gradient is None else gradient[:num_rows])
        return loss if spans is None else sums_by_adapter(torch.cat(by_row), spans, at_once=rows_at_once)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_rows,) = ctx.saved_tensors
        return scaled_by_adapter(grad_rows, gradient, ctx.spans), None, None, None


def _padded_rows(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, d) and labels (n,), padded with zeros and ignored labels to n = `padded(n)`."""
    missing = padded(len(rows)) - len(rows)
    if not missing:
        return rows, labels
    return functional.pad(rows, (0, 0, 0, missing)), functional.pad(labels, (0, missing), value=IGNORED_LABEL)


def sum_token_losses(rows: Tensor, labels: Tensor, shard: VocabularyShard, spans: RowSpans | None = None) -> Tensor:
    """Sum over rows of -log softmax(rows W^T)[label], the same on every rank.

    W is frozen, so the forward pass also computes the gradient of `rows`, some rows at a time. Only this gradient is
    saved for backward, no logits.

    Args:
        rows: (n, d), any float dtype, the same on every rank.
        labels: (n,) int64, all of them supervised, the same on every rank.
        spans: of the n rows, if they belong to several adapters.

    Returns:
        a scalar in max(fp32, dtype of `rows`), or with `spans` one per adapter, (adapters,). The gradient of `rows`
        is the addend of this rank's part of the vocabulary; no message is sent for it here.
    """
    loss: Tensor = _SumTokenLosses.apply(rows, labels, shard, spans)
    return loss


@torch.no_grad()
def token_losses(rows: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
    """-log softmax(rows W^T)[label] of each row, (n,), without a gradient. Arguments as in `sum_token_losses`."""
    num_rows = len(rows)
    rows, labels = _padded_rows(rows, labels)
    losses = [
        _losses(as_rows(shard.weight.times_transposed(part)), own, shard).losses
        for part, own in zip(rows.split(shard.rows_at_once), labels.split(shard.rows_at_once), strict=True)
    ]
    return torch.cat(losses)[:num_rows]
