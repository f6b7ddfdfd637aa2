"""Handwritten backward passes: they cannot be differentiated again, and that of a loss can run in its forward pass.

Without trained tensors in between, the backward pass of a loss needs only the incoming factor, which scales the
gradient. So only this gradient is saved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from megatron_tiedlora.parallel.kernels import scaled


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's `backward` that raises an error if it is differentiated again.

    torch's `once_differentiable` raises only if the incoming gradient has a graph. The gradient of a loss has none, so
    autograd would silently treat what is computed from it as a constant.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the frozen base has no second derivative: call backward without create_graph=True")
        return backward(ctx, *gradients)

    return checked


class _EarlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        inner = hidden.detach().requires_grad_()
        # A caller's hooks are for tensors saved until the backward pass; these are not.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            loss = function(inner)
        # Not autograd.grad, inside of which torch's hooks for several gradients fail (seen in 2.13).
        loss.backward(inputs=(inner,))
        ctx.save_for_backward(inner.grad)
        return loss.detach()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad_hidden,) = ctx.saved_tensors
        return scaled(grad_hidden, gradient), None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def run_with_early_backward(function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """`function(hidden)`, a scalar. Only the gradient of `hidden`, of its shape and dtype, is saved for backward.

    Args:
        function: it is differentiated for `hidden` alone; other tensors that it uses get no gradient.
        hidden: any float dtype.
    """
    loss: torch.Tensor = _EarlyBackward.apply(hidden, function)
    return loss
