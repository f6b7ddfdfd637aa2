"""Compute the loss: the cross entropy of the next token, or an `Objective`, summed over the tokens of each adapter.

The forward pass of a loss also computes its gradients. The backward pass only multiplies them by a factor, so only the
gradients are saved. The backward pass cannot be differentiated again.

If a tensor has rows of several adapters, the rows of each adapter form spans of consecutive rows. A sum over the rows
of one adapter, or a product with a factor, does not depend on the rows of other adapters.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, padded
from megatron_tiedlora.parallel.groups import RankGroup, all_gather, unchanged
from megatron_tiedlora.parallel.kernels import EAGER, Kernels, soft_capped, times_slope
from megatron_tiedlora.parallel.rows import as_rows, run_in_parts, scaled, upcast


class RowSpan(NamedTuple):
    """Consecutive rows that belong to one adapter.

    Attributes:
        adapter: the index of the adapter in the micro-batch.
        size: the number of rows.
    """

    adapter: int
    size: int


RowSpans = tuple[RowSpan, ...]


def span_starts(spans: Sequence[RowSpan]) -> list[int]:
    """Return the index of the first row of each span."""
    return [0, *accumulate(span.size for span in spans)][: len(spans)]


def spans_between(spans: Sequence[RowSpan], start: int, stop: int) -> RowSpans:
    """Return the spans of rows `start` to `stop` - 1."""
    found = []
    for span, first in zip(spans, span_starts(spans), strict=True):
        size = min(stop, first + span.size) - max(start, first)
        if size > 0:
            found.append(RowSpan(span.adapter, size))
    return tuple(found)


def scaled_by_adapter(tensor: Tensor, factors: Tensor, spans: Sequence[RowSpan] | None) -> Tensor:
    """Multiply each row by the factor of its adapter, rounded as in `scaled`. Without spans there is one adapter.

    Args:
        tensor: (..., n), with spans of its rows; or (n,), with spans of its elements.
        factors: (adapters,); or () without spans.
    """
    if spans is None:
        return scaled(tensor, factors)
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
    parts = zip(rows.split([span.size for span in spans]), spans, strict=True)
    return torch.cat([scaled(part, factors[span.adapter]) for part, span in parts]).view(tensor.shape)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `backward` of an autograd Function so that it raises an error if it is differentiated again.

    torch's `once_differentiable` raises only if the incoming gradient has a graph. The gradient of a loss has no graph,
    so autograd would silently treat values computed from it as constants.

    Raises:
        RuntimeError: the backward pass was called with `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the frozen base has no second derivative: call backward without create_graph=True")
        return backward(ctx, *gradients)

    return checked


class _EarlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], spans: Sequence[RowSpans | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.needs, ctx.spans = ctx.needs_input_grad[2:], spans
        inner = [
            tensor.detach().requires_grad_() if tensor is not None and needs else tensor
            for tensor, needs in zip(inputs, ctx.needs, strict=True)
        ]
        wanted = [tensor for tensor, needs in zip(inner, ctx.needs, strict=True) if tensor is not None and needs]
        # A caller's hooks are for tensors that are saved until the backward pass, and these tensors are not.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged):
            loss = function(*inner)
        # autograd.grad is not used, because torch's hooks for several gradients fail inside it (seen in 2.13).
        loss.backward(torch.ones_like(loss), inputs=wanted)
        ctx.save_for_backward(*(tensor.grad for tensor in wanted))
        return loss.detach()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        needs_and_spans = zip(ctx.needs, ctx.spans, strict=True)
        found = (scaled_by_adapter(next(saved), gradient, own) if needs else None for needs, own in needs_and_spans)
        return None, None, *found


def run_with_early_backward(
    function: Callable[..., Tensor], *inputs: Tensor | None, spans: Sequence[RowSpans | None] | None = None
) -> Tensor:
    """Return `function(*inputs)`, a scalar or one loss per adapter, (adapters,), and compute its gradients immediately.

    Only the gradients of inputs that require one are saved for the backward pass.

    Args:
        function: computes the loss. It may use other tensors than `inputs`, but they get no gradient.
        inputs: tensors of any float dtype. At least one must require a gradient. The result must depend on every
            input that requires a gradient.
        spans: for several losses, the spans of rows of each input. The loss of an adapter depends only on its spans.
    """
    return cast(Tensor, _EarlyBackward.apply(function, spans or [None] * len(inputs), *inputs))


# Summed cross entropy -------------------------------------------------------------------------------------------------
#
# -log softmax(z)[y] = logsumexp_i(l_i) - sum_i t_i, in at least fp32, over a vocabulary that is sharded over the ranks.
# Rank i has l_i, the logsumexp of its own logits, and t_i, the label's logit if the rank has it, otherwise 0. One
# message sends these two numbers per token.

IGNORED_LABEL = -100


class VocabularyShard(NamedTuple):
    """This rank's rows of the frozen vocabulary projection W, and settings for computing losses from them."""

    weight: FrozenWeight  # (V_local, d), the rows of ids first_id to first_id + V_local - 1, without padding
    first_id: int
    group: RankGroup
    rows_at_once: int  # the number of rows whose logits are in memory at a time, a multiple of `SIZE_MULTIPLE`
    kernels: Kernels = EAGER
    cap: float | None = None  # see `ModelShape.logit_cap`


class _Found(NamedTuple):
    """The losses of n rows and the values that their gradients need, each (n,)."""

    losses: Tensor
    total: Tensor  # logsumexp over all ids
    columns: Tensor  # the column of the label in this rank's logits, 0 if another rank has it
    own: Tensor  # whether this rank has the label
    picked: Tensor  # the label's capped logit, 0 if another rank has it


def _losses(local_logits: Tensor, labels: Tensor, shard: VocabularyShard) -> _Found:
    index = labels - shard.first_id
    own = (index >= 0) & (index < local_logits.shape[1])
    index = index.masked_fill(~own, 0)
    picked = soft_capped(upcast(local_logits.gather(1, index[:, None])[:, 0]), shard.cap).masked_fill(~own, 0.0)
    numbers = torch.stack((shard.kernels.row_log_sums(local_logits, shard.cap), picked))[None]
    by_rank = all_gather(numbers, shard.group, dim=0)  # (ranks, 2, T)
    total = by_rank[:, 0].logsumexp(dim=0)
    return _Found(total - by_rank[:, 1].sum(dim=0), total, index, own, picked)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
        weight, kernels, rows_at_once = shard.weight, shard.kernels, shard.rows_at_once
        num_rows, needs_rows = len(rows), ctx.needs_input_grad[0]
        if padding := padded(num_rows) - num_rows:
            rows = functional.pad(rows, (0, 0, 0, padding))
            labels = functional.pad(labels, (0, padding), value=IGNORED_LABEL)
        gradient = torch.empty_like(rows) if needs_rows else None
        losses = [upcast(rows[:0, 0])]
        logits = rows.new_empty(min(rows_at_once, len(rows)), weight.local_shape[0])  # the same memory for all chunks
        for start in range(0, len(rows), rows_at_once):
            part = slice(start, start + rows_at_once)
            local_logits = as_rows(weight.times_transposed(rows[part], out=logits[: len(rows[part])]))
            found = _losses(local_logits, labels[part], shard)
            losses.append(found.losses[: max(num_rows - start, 0)])
            if gradient is not None:
                kernels.exp_logits_(local_logits, found.total, shard.cap)
                # Subtract 1 from the probability of each label on this rank; expm1 avoids the rounding of bf16.
                index = (torch.arange(len(local_logits), device=local_logits.device), found.columns)
                missing = times_slope(torch.expm1(found.picked - found.total), found.picked, shard.cap)
                missing = missing.to(local_logits.dtype)
                # scatter_ is not used, because it would visit every element.
                local_logits.index_put_(index, torch.where(found.own, missing, local_logits[index]))
                weight.times(local_logits, out=gradient[part])
        ctx.save_for_backward(None if gradient is None else gradient[:num_rows])
        return torch.cat(losses)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (grad_rows,) = ctx.saved_tensors
        return scaled(grad_rows, gradient[:, None]), None, None


def token_losses(rows: Tensor, labels: Tensor, shard: VocabularyShard) -> Tensor:
    """Return -log softmax(rows W^T)[label] of each row, (n,), in max(fp32, dtype of `rows`), the same on every rank.

    W is frozen, so if `rows` needs a gradient, the forward pass also computes it, in chunks of rows. Only this gradient
    is saved for the backward pass, which multiplies each row of it by a factor; logits are not saved.

    Args:
        rows: (n, d), any float dtype, the same on every rank. Its gradient is the partial sum for this rank's shard of
            the vocabulary. This function does not sum it over ranks.
        labels: (n,) int64, all supervised, the same on every rank.
    """
    return cast(Tensor, _TokenLosses.apply(rows, labels, shard))


def label_logprobs(logits: Tensor, labels: Tensor, num_top: int) -> Tensor:
    """Return log softmax(logits)[label] of each row, and the most likely ids, as fp32 numbers in fp64, (n, 1 + 2
    num_top): the label's log-probability, the ids of the `num_top` most likely tokens, and their log-probabilities.

    The ids are in descending order of their log-probability, and smaller ones come first if it is the same.

    Args:
        logits: (n, V), any float dtype.
        labels: (n,) int64.
    """

    def read(logits: Tensor, labels: Tensor) -> Tensor:
        logprobs = upcast(logits).log_softmax(-1).float()
        own = logprobs.gather(-1, labels[:, None])
        if not num_top:
            return own.double()
        ordered = logprobs.sort(dim=-1, descending=True, stable=True)
        return torch.cat([own.double(), *(part[:, :num_top].double() for part in reversed(ordered))], dim=1)

    return cast(Tensor, run_in_parts(read, (logits, labels), [True, True]))
