"""Backward passes that are written by hand, and have no backward pass of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's `backward` that refuses to be differentiated again.

    torch's `once_differentiable` refuses only where the incoming gradient has a graph; the gradient of a loss has none,
    and what follows from it would be taken for a constant without a word.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the frozen base has no second derivative: call backward without create_graph=True")
        return backward(ctx, *gradients)

    return checked
