"""Handwritten backward passes: they cannot be differentiated again, and that of a loss can run in its forward pass.

The backward pass of a loss needs only the incoming factor, which scales the gradients. So only the gradients are saved.

Rows of several adapters are consecutive in one tensor, a span for each. A sum over one adapter's rows, or a factor for
them, is computed as if the tensor had no other rows.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.parallel.kernels import scaled


class RowSpan(NamedTuple):
    """Consecutive rows of one adapter.

    Attributes:
        adapter: its index among the adapters of the micro-batch.
        size: the number of rows.
    """

    adapter: int
    size: int


RowSpans = tuple[RowSpan, ...]


def span_starts(spans: Sequence[RowSpan]) -> list[int]:
    """The first row of each span."""
    return [0, *accumulate(span.size for span in spans)][: len(spans)]


def spans_between(spans: Sequence[RowSpan], start: int, stop: int) -> RowSpans:
    """The spans of rows `start` to `stop` - 1."""
    found = []
    for span, first in zip(spans, span_starts(spans), strict=True):
        size = min(stop, first + span.size) - max(start, first)
        if size > 0:
            found.append(RowSpan(span.adapter, size))
    return tuple(found)


def scaled_by_adapter(tensor: Tensor, factors: Tensor, spans: Sequence[RowSpan] | None) -> Tensor:
    """`scaled` with a factor for each adapter; without spans there is one adapter, and one factor ().

    Args:
        tensor: (..., n), with spans of its rows; or (n,), with spans of its elements.
        factors: (adapters,).
    """
    if spans is None:
        return scaled(tensor, factors)
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
    parts = zip(rows.split([span.size for span in spans]), spans, strict=True)
    return torch.cat([scaled(part, factors[span.adapter]) for part, span in parts]).view(tensor.shape)


def sums_by_adapter(numbers: Tensor, spans: Sequence[RowSpan], *, at_once: int) -> Tensor:
    """The sum of each adapter's elements, (adapters,), added up in chunks of `at_once` elements of each span.

    Args:
        numbers: (n,).
    """
    totals = [numbers.new_zeros(()) for _ in range(1 + max(span.adapter for span in spans))]
    for part, span in zip(numbers.split([span.size for span in spans]), spans, strict=True):
        for chunk in part.split(at_once):
            totals[span.adapter] += chunk.sum()
    return torch.stack(totals)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's `backward` that raises an error if it is differentiated again.

    torch's `once_differentiable` raises only if the incoming gradient has a graph. The gradient of a loss has none, so
    autograd would silently treat what is computed from it as a constant.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
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
        # A caller's hooks are for tensors saved until the backward pass; these are not.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            loss = function(*inner)
        # Not autograd.grad, inside of which torch's hooks for several gradients fail (seen in 2.13).
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


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def run_with_early_backward(
    function: Callable[..., Tensor], *inputs: Tensor | None, spans: Sequence[RowSpans | None] | None = None
) -> Tensor:
    """`function(*inputs)`, a scalar, or the losses of several adapters, (adapters,).

    Only the gradients of the inputs that need one are saved for backward.

    Args:
        function: it is differentiated for these inputs alone; other tensors that it uses get no gradient.
        inputs: of any float dtype. At least one needs a gradient, and the result must depend on all that do.
        spans: with several losses, the rows of each input that belong to each loss, which depends on these alone.
    """
    loss: Tensor = _EarlyBackward.apply(function, spans or [None] * len(inputs), *inputs)
    return loss
