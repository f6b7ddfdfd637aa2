"""Micro-batches of several adapters in shared ones: which go together, and their tensors end to end.

A micro-batch is never split, since its gradient is one sum; and an adapter has at most one in a shared micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from megatron_tiedlora.adapters.adapter_bank import Share, filled
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.parallel.collectives import concatenated

Owned = tuple[str, MicroBatch]  # an adapter's name, and one of its micro-batches


def shared_rounds(steps: Mapping[str, TrainingStep], *, capacity: int) -> list[list[Owned]]:
    """The micro-batches of a step, in shared ones.

    Args:
        steps: each adapter's share of a global batch on this rank.
        capacity: tokens, padding included; 0: nothing is shared.
    """
    rounds = fill_rounds({name: step.largest for name, step in steps.items()}, capacity=capacity)
    return [[(name, steps[name].micro_batches[number]) for name, number in some] for some in rounds]


def fill_rounds(largest: Mapping[str, Sequence[int]], *, capacity: int) -> list[list[tuple[str, int]]]:
    """Which micro-batches go together, by name and number: round by round, the first of every adapter, then the second.

    In a round a micro-batch joins the last shared one if they have at most `capacity` tokens together on every rank. So
    all ranks have as many, and each adapter's follow one another in their own order.

    Args:
        largest: the positions of each adapter's micro-batches, on the rank where they are most.
    """
    found: list[list[tuple[str, int]]] = []
    for number in range(max(map(len, largest.values()), default=0)):
        present = [(name, number) for name, positions in largest.items() if number < len(positions)]
        found += filled(present, [largest[name][number] for name, _ in present], [capacity] * len(present))
    return found


def shared_micro_batch(parts: Sequence[Owned]) -> MicroBatch:
    """The micro-batches of several adapters as one, all tensors (1, tokens); that of a single one stays as it is."""
    batches = [batch for _, batch in parts]
    shares = tuple(Share(name, *batch.tokens.shape) for name, batch in parts)
    if len(batches) == 1:
        return replace(batches[0], shares=shares)
    documents = [batch.documents for batch in batches if batch.documents is not None]
    assert len(documents) in (0, len(batches)), "some rows are packed and some are not"
    numbered = any(batch.numbers is not None for batch in batches)
    return MicroBatch(
        tokens=concatenated([batch.tokens for batch in batches])[None],
        positions=concatenated([batch.positions for batch in batches])[None],
        labels=concatenated([batch.labels for batch in batches])[None],
        documents=concatenated(documents)[None] if documents else None,
        numbers=concatenated([_numbers(batch) for batch in batches])[None] if numbered else None,
        shares=shares,
        lengths=concatenated([batch.lengths for batch in batches]),
        num_samples=sum(batch.num_samples for batch in batches),
    )


def _numbers(batch: MicroBatch) -> torch.Tensor:
    """The numbers of its tokens; zeros if its adapter has no dropout, for which they are not used."""
    return torch.zeros_like(batch.tokens) if batch.numbers is None else batch.numbers
