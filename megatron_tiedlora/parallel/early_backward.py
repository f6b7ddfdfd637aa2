"""A loss whose backward pass runs in its forward pass, so that of all that lies between only one gradient is kept.

What has no trained tensor needs of the backward pass only the factor that comes in, and that scales its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_tiedlora.parallel.first_derivative import first_derivative_only
from megatron_tiedlora.parallel.kernels import scaled


class _EarlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        inner = hidden.detach().requires_grad_()
        # A caller's hooks are for what is kept until the backward pass; nothing here is.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            loss = function(inner)
        # Not autograd.grad, inside of which torch's hooks for several gradients fail (seen in 2.13).
        loss.backward(inputs=(inner,))
        ctx.save_for_backward(inner.grad)
        return loss.detach()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (of_hidden,) = ctx.saved_tensors
        return scaled(of_hidden, gradient), None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def run_with_early_backward(function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """`function(hidden)`, a scalar, of which only the gradient of `hidden`, like it, is kept.

    Args:
        function: of `hidden` alone: other tensors that it uses get no gradient.
        hidden: any float dtype.
    """
    loss: torch.Tensor = _EarlyBackward.apply(hidden, function)
    return loss
