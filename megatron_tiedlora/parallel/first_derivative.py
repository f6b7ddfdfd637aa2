"""Handwritten backward passes, which cannot be differentiated again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


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
