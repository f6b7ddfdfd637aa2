"""Collectives of tensor parallelism, as functions that autograd can differentiate.

Each region function is the adjoint of its partner: copy_to (identity; backward all-reduce) and reduce_from (all-reduce;
backward identity), gather_from (all-gather; backward reduce-scatter) and reduce_scatter_to (reduce-scatter; backward
all-gather). Gradients that arrive in a gather's backward are parts, one from each rank, so they are summed and never
sliced. None changes its input, and in a group of one none sends anything.
"""

from __future__ import annotations

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
    """The sum over the group, bit-equal on every rank; a new tensor unless the group is one rank."""
    if group.size == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total, group=group.handle)
    return total


def all_gather(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """The ranks' tensors, of equal shapes, concatenated along `dim` in rank order."""
    if group.size == 1:
        return tensor
    dim %= tensor.ndim
    gathered = tensor.new_empty((group.size * tensor.shape[0], *tensor.shape[1:]))
    _all_gather_into(gathered, tensor.contiguous(), group=group.handle)
    return gathered.view(group.size, *tensor.shape).movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """This rank's equal part along `dim` of the sum over the group. `dim` must divide by the group's size."""
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
    """The tensor itself; its gradient, of which each rank has a part, is summed over the group."""
    if group.size == 1:
        return tensor
    copied: torch.Tensor = _CopyTo.apply(tensor, group)
    return copied


def reduce_from_tensor_parallel_region(tensor: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """The sum over the group; its gradient, the same on every rank, passes as it is."""
    if group.size == 1:
        return tensor
    reduced: torch.Tensor = _ReduceFrom.apply(tensor, group)
    return reduced


def gather_from_tensor_parallel_region(tensor: torch.Tensor, group: RankGroup, dim: int) -> torch.Tensor:
    """The ranks' parts along `dim`, joined; of the gradient, which is summed over the group, each keeps its part."""
    if group.size == 1:
        return tensor
    gathered: torch.Tensor = _GatherFrom.apply(tensor, group, dim)
    return gathered


def end_to_end(hidden: torch.Tensor) -> torch.Tensor:
    """(b, s, d) -> (1, b s, d), rows one after another, so that each rank's part of them lies in one piece."""
    return hidden.flatten(0, 1)[None]


def gather_from_sequence_parallel_region(hidden: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """(1, b s / size, d) -> (1, b s, d)."""
    return gather_from_tensor_parallel_region(hidden, group, SEQUENCE_DIM)


def reduce_scatter_to_sequence_parallel_region(hidden: torch.Tensor, group: RankGroup) -> torch.Tensor:
    """(b, s, d), of which each rank has an addend, -> this rank's (1, b s / size, d) of the sum."""
    if group.size == 1:
        return hidden
    scattered: torch.Tensor = _ReduceScatterTo.apply(end_to_end(hidden), group, SEQUENCE_DIM)
    return scattered


def enter_tensor_parallel_region(hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """What flows between layers -> (b, s, d) or (1, b s, d) on every rank, for column-parallel layers."""
    if tensor_parallel.sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, tensor_parallel.group)
    return copy_to_tensor_parallel_region(hidden, tensor_parallel.group)


def leave_tensor_parallel_region(hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
    """Addends (b, s, d) of the ranks -> their sum, in the form that flows between layers."""
    if tensor_parallel.sequence_parallel:
        return reduce_scatter_to_sequence_parallel_region(hidden, tensor_parallel.group)
    return reduce_from_tensor_parallel_region(hidden, tensor_parallel.group)
