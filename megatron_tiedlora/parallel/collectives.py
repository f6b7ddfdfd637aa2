"""Sums over all ranks that the loop needs once a step. A world of one needs no message."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import distributed

from megatron_tiedlora.config.errors import UserError


def world_size() -> int:
    """Ranks in the process group, 1 without one."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise fp64 sum of a few numbers over all ranks, the same on each."""
    if world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(total)
    summed: list[float] = total.tolist()
    return summed


def broadcast_object(value: object, device: torch.device) -> object:
    """Rank 0's value on every rank (a small picklable one, from a peer of the same run)."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]


def decided_by_rank_0(decide: Callable[[], object], device: torch.device) -> object:
    """What `decide` returns on rank 0, on every rank; only rank 0 calls it.

    Raises:
        UserError: rank 0's, on every rank, so that none waits for one that has left.
    """
    answer: object = None
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        try:
            answer = decide()
        except UserError as error:
            answer = error
    answer = broadcast_object(answer, device)
    if isinstance(answer, UserError):
        raise answer
    return answer
