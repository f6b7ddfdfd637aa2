"""A gradient of which every rank and micro-batch has a part, summed over ranks in one message a step."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megatron_tiedlora.parallel.collectives import all_reduce
from megatron_tiedlora.parallel.groups import ALONE, RankGroup


class StepSum:
    """Holds back a tensor's gradients until the step's last backward pass, which then gives their sum over the group.

    Backward passes before the last one give zeros, so that an engine that takes gradients as they come gets the sum
    once. Until `start` says how many there are, each backward pass is a step of its own.
    """

    def __init__(self, group: RankGroup = ALONE, *, keeps: bool = True) -> None:
        """Sum over `group`.

        Args:
            keeps: whether the sum is left on this rank; where not, zeros are. Ranks whose gradients are summed or
                averaged later must leave it to one of them: adding zeros gives the same bits in any order of sums.
        """
        self.group = group
        self._keeps = keeps
        self.start(1)

    def start(self, num_passes: int) -> None:
        """Begin a step of so many backward passes; what an unfinished one has left is dropped."""
        self._left = num_passes
        self._parts: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, its gradient summed. Every rank of the group has as many backward passes or none."""
        copied: torch.Tensor = _Summed.apply(tensor, self)
        return copied

    def take(self, gradient: torch.Tensor) -> torch.Tensor:
        """What a backward pass gives on, from this rank's part; like it."""
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
