"""Micro-batches of several adapters in shared ones: which go together, and their tensors end to end.

A micro-batch is never split, since its gradient is one sum; and an adapter has at most one in a shared micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from megatron_tiedlora.adapters.adapter_bank import Share
from megatron_tiedlora.data.loader import MicroBatch, TrainingStep
from megatron_tiedlora.engine.runner import StepInput

Owned = tuple[str, MicroBatch]  # an adapter's name, and one of its micro-batches


def shared_rounds(steps: Mapping[str, TrainingStep], *, capacity: int) -> list[list[Owned]]:
    """The micro-batches of a step, in shared ones: round by round, the first of every adapter, then the second.

    In a round a micro-batch joins the last shared one if they have at most `capacity` tokens together on every rank. So
    all ranks have as many, and each adapter's follow one another in their own order.

    Args:
        steps: each adapter's share of a global batch on this rank.
        capacity: tokens, padding included; 0: nothing is shared.
    """
    found: list[list[Owned]] = []
    for number in range(max((len(step.micro_batches) for step in steps.values()), default=0)):
        present = {name: step for name, step in steps.items() if number < len(step.micro_batches)}
        found += filled(
            [((name, step.micro_batches[number]), step.largest[number]) for name, step in present.items()], capacity
        )
    return found


def filled(batches: Iterable[tuple[Owned, int]], capacity: int) -> list[list[Owned]]:
    """The micro-batches in shared ones of at most `capacity` tokens, in order.

    Args:
        batches: each with its tokens, padding included, on the rank where it has most.
    """
    found: list[list[Owned]] = []
    room = 0
    for own, num_tokens in batches:
        if num_tokens > room:
            found.append([])
            room = capacity
        found[-1].append(own)
        room -= num_tokens
    return found


def shared_input(parts: Sequence[Owned]) -> StepInput:
    """The input of the model for the micro-batches of several adapters: all tensors are (1, tokens)."""
    batches = [batch for _, batch in parts]
    documents = [batch.documents for batch in batches if batch.documents is not None]
    assert len(documents) in (0, len(batches)), "some rows are packed and some are not"
    return StepInput(
        _end_to_end([batch.input_ids for batch in batches]),
        _end_to_end([batch.position_ids for batch in batches]),
        _end_to_end([batch.labels for batch in batches]),
        _end_to_end(documents) if documents else None,
        None,
        tuple(Share(name, *batch.input_ids.shape) for name, batch in parts),
    )


def _end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])[None]
