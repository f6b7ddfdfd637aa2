"""A gradient that is summed over micro-batches and ranks, in one message per step."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_tiedlora.parallel.collectives import all_reduce
from megatron_tiedlora.parallel.groups import ALONE, RankGroup


class StepSum:
    """Accumulates a tensor's gradients; the last backward pass of the step returns their sum over the group.

    Earlier backward passes return zeros, so that an engine that adds up the gradients of all passes gets the sum once.
    Until `start` is called, each backward pass is a step of its own.
    """

    def __init__(self, group: RankGroup = ALONE, *, keeps: bool = True) -> None:
        """Sum over `group`.

        Args:
            keeps: whether this rank gets the sum; if not, it gets zeros. Among ranks whose gradients are summed or
                averaged later, only one may get it: adding zeros gives the same bits in any order of sums.
        """
        self.group = group
        self._keeps = keeps
        self.start(1)

    def start(self, num_passes: int) -> None:
        """Begin a step of `num_passes` backward passes; gradients of an unfinished step are dropped."""
        self._left = num_passes
        self._parts: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, with its gradient summed. All ranks of the group run equally many backward passes."""
        copied: torch.Tensor = _Summed.apply(tensor, self)
        return copied

    def take(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient that a backward pass returns, from this rank's addend; the same shape and dtype."""
        self._parts = gradient if self._parts is None else self._parts + gradient
        self._left -= 1
        if self._left:
            return torch.zeros_like(gradient)
        total = all_reduce(self._parts, self.group)
        self.start(1)
        return total if self._keeps else torch.zeros_like(total)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, step_sum: StepSum) -> torch.Tensor:
        ctx.step_sum = step_sum
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.step_sum.take(gradient), None
