"""What all ranks must agree on outside the model: sums of a few numbers, rank 0's decisions. One rank sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def max_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Elementwise fp64 maximum of a few numbers over all ranks, the same on each."""
    if world_size() == 1:
        return [float(value) for value in values]
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
    numbers: list[float] = largest.tolist()
    return numbers


def gather_numbers(value: int, device: torch.device) -> list[int]:
    """Every rank's whole number (up to 2^63), in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    numbers = torch.zeros(world_size(), dtype=torch.int64, device=device)
    numbers[distributed.get_rank()] = value
    distributed.all_reduce(numbers)
    found: list[int] = numbers.tolist()
    return found


def first_message(message: str | None, device: torch.device) -> str | None:
    """The message of the lowest rank that has one, on every rank; None where no rank has."""
    if world_size() == 1 or not sum_over_ranks([float(message is not None)], device)[0]:
        return message
    messages: list[str | None] = [None] * world_size()
    distributed.all_gather_object(messages, message)
    return next(text for text in messages if text is not None)


def broadcast_object(value: object, device: torch.device) -> object:
    """Rank 0's value on every rank (a small picklable one, from a peer of the same run)."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]


def gather_objects(value: Any) -> list[Any] | None:
    """Every rank's value (a picklable one, from a peer of the same run) in rank order on rank 0, None elsewhere."""
    if world_size() == 1:
        return [value]
    is_main = distributed.get_rank() == 0
    gathered: list[Any] | None = [None] * world_size() if is_main else None
    distributed.gather_object(value, gathered, dst=0)
    return gathered


def num_differing(value: str, device: torch.device) -> int:
    """How many ranks have another value than rank 0, the same number on every rank."""
    return round(sum_over_ranks([float(value != broadcast_object(value, device))], device)[0])


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
        answer.of_peer = distributed.is_initialized() and distributed.get_rank() != 0
        raise answer
    return answer
