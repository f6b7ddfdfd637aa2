"""Collectives of tensor parallelism, as functions that autograd can differentiate.

Each region function is the adjoint of its partner: copy_to (identity; backward all-reduce) and reduce_from (all-reduce;
backward identity), gather_from (all-gather; backward reduce-scatter) and reduce_scatter_to (reduce-scatter; backward
all-gather). The gradients that arrive in the backward pass of a gather are partial sums, one per rank, so they are
summed and never just sliced. No function changes its input. In a group of one rank none sends anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed
from torch.autograd.function import once_differentiable

from megatron_tiedlora.parallel.groups import RankGroup, TensorParallel

# Renamed in torch 2.13, where the old names warn.
_all_gather_into = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter_into = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor

SEQUENCE_DIM = 1  # of activations (1, b s, d)


def all_reduce(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The sum over the group, bit-equal on every rank; a new tensor unless the group has one rank."""
    if group.size == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group.handle)
    return total


def largest_of_all(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The elementwise maximum over the group; a new tensor unless the group has one rank."""
    if group.size == 1:
        return tensor
    largest = tensor.clone()
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group.handle)
    return largest


def all_gather(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """The ranks' tensors, of equal shapes, concatenated along `dim` in rank order."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    _all_gather_into(gathered, tensor.contiguous(), group=group.handle)
    return gathered.view(group.size, *tensor.shape).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """This rank's equal part along `dim` of the sum over the group. The group's size must divide `dim`."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    parts = tensor.unflatten(dim, (group.size, tensor.shape[dim] // group.size)).movedim(dim, 0).contiguous()
    mine = torch.empty_like(parts[0])
    _reduce_scatter_into(mine, parts.flatten(0, 1), group=group.handle)
    return mine


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
        return all_reduce(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return all_gather(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return reduce_scatter(gradient, ctx.group, ctx.dim), None, None


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


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_gather(gradient, ctx.group, ctx.dim), None, None


def copy_to_tensor_parallel_region(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The tensor itself. Each rank has an addend of its gradient; these are summed over the group."""
    if group.size == 1:
        return tensor
    copied: torch.Tensor = _CopyTo.apply(tensor, group)
    return copied


def reduce_from_tensor_parallel_region(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The sum over the group. Its gradient, the same on every rank, is passed on unchanged."""
    if group.size == 1:
        return tensor
    reduced: torch.Tensor = _ReduceFrom.apply(tensor, group)
    return reduced


def gather_from_tensor_parallel_region(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """The ranks' parts, concatenated along `dim`. The gradient is summed over the group; each rank gets its part."""
    if group.size == 1:
        return tensor
    gathered: torch.Tensor = _GatherFrom.apply(tensor, group, dim)
    return gathered


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


def gather_from_sequence_parallel_region(hidden: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """(1, b s / size, d) -> (1, b s, d)."""
    return gather_from_tensor_parallel_region(hidden, group, SEQUENCE_DIM)


def reduce_scatter_to_sequence_parallel_region(hidden: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """Addends (b, s, d) of the ranks -> this rank's part of their sum, (1, b s / size, d)."""
    if group.size == 1:
        return hidden
    scattered: torch.Tensor = _ReduceScatterTo.apply(end_to_end(hidden), group, SEQUENCE_DIM)
    return scattered


def enter_tensor_parallel_region(hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """Activations between layers -> (b, s, d) or (1, b s, d) on every rank, for column-parallel layers."""
    if tensor_parallel.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel.group)
    return copy_to_tensor_parallel_region(hidden, tensor_parallel.group)


def leave_tensor_parallel_region(hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """Addends (b, s, d) of the ranks -> their sum, in the shape of activations between layers."""
    if tensor_parallel.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(hidden, tensor_parallel.group)
    return reduce_from_tensor_parallel_region(hidden, tensor_parallel.group)
