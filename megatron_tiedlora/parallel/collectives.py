"""Collectives of tensor parallelism, as functions that autograd can differentiate.

Entering a region and leaving it are adjoint: identity (backward all-reduce) and all-reduce (backward identity), or with
sequence parallelism all-gather (backward reduce-scatter) and reduce-scatter (backward all-gather). The gradients that
arrive in the backward pass of a gather are partial sums, one per rank, so they are summed and never just sliced. No
function changes its input. In a group of one rank none sends anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from megatron_tiedlora.parallel.groups import ALONE, RankGroup, TensorParallel

Function = Callable[[torch.Tensor], torch.Tensor]

SEQUENCE_DIM = 1  # of activations (1, b s, d)


def all_reduce(
    tensor: torch.Tensor, group: RankGroup, op: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM
) -> torch.Tensor:
    """The sum over the group, or what `op` says: bit-equal on every rank, a new tensor unless it is the only one."""
    if group.size == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    group.all_reduce_(total, op)
    return total


def largest_of_all(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The elementwise maximum over the group; a new tensor unless the group has one rank."""
    return all_reduce(tensor, group, distributed.ReduceOp.MAX)


def all_gather(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """The ranks' tensors, of equal shapes, concatenated along `dim` in rank order."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    group.all_gather_into(gathered, tensor.contiguous())
    return gathered.view(group.size, *tensor.shape).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """This rank's equal part along `dim` of the sum over the group. The group's size must divide `dim`."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    parts = tensor.unflatten(dim, (group.size, tensor.shape[dim] // group.size)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    group.reduce_scatter_into(mine, parts.flatten(0, 1))
    return mine


class _WithAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, function: Function, adjoint: Any) -> torch.Tensor:
        ctx.adjoint = adjoint
        return function(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        return ctx.adjoint(gradient), None, None


def with_adjoint(
    tensor: torch.Tensor, function: Function, adjoint: Callable[[torch.Tensor], torch.Tensor | None]
) -> torch.Tensor:
    """`function(tensor)`, whose gradient becomes that of the tensor by `adjoint`; None is no gradient."""
    found: torch.Tensor = _WithAdjoint.apply(tensor, function, adjoint)
    return found


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _GatherTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: RankGroup, dims: tuple[int, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.dims, ctx.shapes = group, dims, [tensor.shape for tensor in tensors]
        gathered = all_gather(concatenated(tensors)[None], group, dim=0)
        parts = gathered.split([tensor.numel() for tensor in tensors], dim=1)
        return tuple(
            part.reshape(group.size, *tensor.shape).movedim(0, dim).flatten(dim, dim + 1)
            for part, tensor, dim in zip(parts, tensors, dims, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        size = ctx.group.size
        by_rank = [
            gradient.unflatten(dim, (size, -1)).movedim(dim, 0).reshape(size, -1)
            for gradient, dim in zip(gradients, ctx.dims, strict=True)
        ]
        mine = reduce_scatter(torch.cat(by_rank, dim=1), ctx.group, dim=0)[0]
        parts = mine.split([shape.numel() for shape in ctx.shapes])
        return None, None, *(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


def concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All values of the tensors, one after another in one dimension."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def gather_from_tensor_parallel_region(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """The ranks' parts, concatenated along `dim`. The gradient is summed over the group; each rank gets its part."""
    if group.size == 1:
        return tensor
    gathers, scatters = (partial(function, group=group, dim=dim) for function in (all_gather, reduce_scatter))
    return with_adjoint(tensor, gathers, scatters)


def gather_together(tensors: Sequence[torch.Tensor], group: RankGroup, dims: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The same for several tensors of one dtype in one message, each along its own dimension.

    Their gradients are summed in one message too; a tensor without a gradient counts as one with zeros.
    """
    if group.size == 1 or not tensors:
        return tuple(tensors)
    gathered: tuple[torch.Tensor, ...] = _GatherTogether.apply(group, tuple(dims), *tensors)
    return gathered


def end_to_end(hidden: torch.Tensor) -> torch.Tensor:
    """(b, s, d) -> (1, b s, d): rows are concatenated, so that each rank's part is contiguous."""
    return hidden.flatten(0, 1)[None]


def enter_tensor_parallel_region(hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """Activations between layers -> (b, s, d) or (1, b s, d) on every rank, for column-parallel layers.

    Each rank has an addend of the result's gradient; these are summed over the group.
    """
    group = tensor_parallel.group
    if tensor_parallel.sequence_parallel:
        return gather_from_tensor_parallel_region(hidden, group, SEQUENCE_DIM)
    return hidden if group.size == 1 else with_adjoint(hidden, _itself, partial(all_reduce, group=group))


def leave_tensor_parallel_region(hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """Addends (b, s, d) of the ranks -> their sum, in the shape of activations between layers.

    The gradient of the sum is that of each addend; of a part of the sequence it is gathered.
    """
    group = tensor_parallel.group
    if group.size == 1:
        return hidden
    if not tensor_parallel.sequence_parallel:
        return with_adjoint(hidden, partial(all_reduce, group=group), _itself)
    gathers, scatters = (partial(function, group=group, dim=SEQUENCE_DIM) for function in (all_gather, reduce_scatter))
    return with_adjoint(end_to_end(hidden), scatters, gathers)


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
        return with_adjoint(tensor, _itself, self.take)

    def take(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient that a backward pass returns, from this rank's addend; the same shape and dtype."""
        self._parts = gradient if self._parts is None else self._parts + gradient
        self._left -= 1
        if self._left:
            return torch.zeros_like(gradient)
        total = all_reduce(self._parts, self.group)
        self.start(1)
        return total if self._keeps else torch.zeros_like(total)
