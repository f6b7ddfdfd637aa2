"""Batches for every layout from one plan: which samples make a step does not depend on how many ranks there are.

A step takes the next global batch of `order.sample_indices`, sorts it by length into global / micro
micro-batches, and gives micro-batch j to accumulation step j // dp on data-parallel rank j % dp. The
supervised tokens of the whole step follow from lengths alone, so every rank knows the loss's denominator
without a message.

Owns labels, padding and resume by a count of consumed samples. Leaves devices to the engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.order import sample_indices
from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.pipeline.running import StepInput

# Shapes that repeat are kinder to memory and kernels.
BASE_MULTIPLE = 8


def pad_multiple(sequence_parts: int = 1) -> int:
    """What lengths are padded to a multiple of, so that sequence parallelism can cut them into equal parts.

    8, whatever the layout, for 1, 2, 4 and 8 parts; else the least common multiple. Padding changes no loss.
    """
    return math.lcm(BASE_MULTIPLE, sequence_parts)


@dataclass(frozen=True)
class MicroBatch:
    """Samples padded on the right to one length (b samples, s positions); causal attention needs no mask for that.

    input_ids: (b, s) int64. labels: (b, s) int64, already shifted: labels[:, t] is token t + 1 where that is
    supervised, else -100. position_ids: (b, s) int64, 0 to s - 1 in each row.
    lengths: (b,) int64, real tokens of each row. num_samples is 0 (and b is 1) for a batch that only fills up.
    num_tokens: real tokens. num_supervised: labels that are not -100.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: torch.Tensor
    num_samples: int
    num_tokens: int
    num_supervised: int

    @property
    def model_input(self) -> StepInput:
        """What the model is called with."""
        return StepInput(self.input_ids, self.position_ids, self.labels)


@dataclass(frozen=True)
class GlobalBatch:
    """The plan of one optimizer step, the same on every rank.

    micro_batches: (global / micro, micro) int64 sample indices, shortest samples first.
    num_supervised, num_tokens: of all samples of the step.
    consumed_samples: samples consumed once this step is done; what a resume starts from.
    """

    micro_batches: NDArray[np.int64]
    num_supervised: int
    num_tokens: int
    consumed_samples: int

    def on_rank(self, dp_rank: int, *, dp_size: int) -> NDArray[np.int64]:
        """Return this rank's micro-batches in the order of accumulation, (steps, micro) int64."""
        if len(self.micro_batches) % dp_size:
            raise ValueError(f"{len(self.micro_batches)} micro-batches do not divide over {dp_size} ranks")
        return self.micro_batches[dp_rank::dp_size]


@dataclass(frozen=True)
class TrainingStep:
    """One rank's share of a global batch.

    num_supervised, num_tokens: of the whole global batch. consumed_samples: after this step.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_supervised: int
    num_tokens: int
    consumed_samples: int


def plan_global_batch(
    dataset: TokenDataset, *, seed: int, consumed_samples: int, global_batch_size: int, micro_batch_size: int
) -> GlobalBatch:
    """Plan the step that follows `consumed_samples`; a pure function of its arguments."""
    if global_batch_size % micro_batch_size:
        raise ValueError(f"global batch {global_batch_size} does not divide into micro-batches of {micro_batch_size}")
    indices = sample_indices(len(dataset), seed=seed, consumed=consumed_samples, count=global_batch_size)
    lengths = dataset.lengths[indices]
    return GlobalBatch(
        micro_batches=indices[np.argsort(lengths, kind="stable")].reshape(-1, micro_batch_size),
        num_supervised=int(dataset.supervised_counts[indices].sum()),
        num_tokens=int(lengths.sum()),
        consumed_samples=consumed_samples + global_batch_size,
    )


class TrainingLoader:
    """Endless steps of one data-parallel rank, from `consumed_samples` on.

    `consumed_samples` counts the global batches handed out so far; a new loader started with the count of a
    finished step (`TrainingStep.consumed_samples`) goes on exactly there.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        pad_id: int,
        pad_multiple: int = BASE_MULTIPLE,
        consumed_samples: int = 0,
    ) -> None:
        self._dataset = dataset
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._pad_id = pad_id
        self._pad_multiple = pad_multiple
        self.consumed_samples = consumed_samples

    def __iter__(self) -> Iterator[TrainingStep]:
        return self

    def __next__(self) -> TrainingStep:
        plan = plan_global_batch(
            self._dataset,
            seed=self._seed,
            consumed_samples=self.consumed_samples,
            global_batch_size=self._global_batch_size,
            micro_batch_size=self._micro_batch_size,
        )
        micro_batches = tuple(
            collate(self._dataset, indices, pad_id=self._pad_id, pad_multiple=self._pad_multiple)
            for indices in plan.on_rank(self._dp_rank, dp_size=self._dp_size)
        )
        self.consumed_samples = plan.consumed_samples
        return TrainingStep(
            micro_batches=micro_batches,
            num_supervised=plan.num_supervised,
            num_tokens=plan.num_tokens,
            consumed_samples=plan.consumed_samples,
        )


def num_evaluation_batches(dataset: TokenDataset, *, micro_batch_size: int, dp_size: int) -> int:
    """Return how many batches `evaluation_batches` gives on each rank."""
    total = -(-len(dataset) // micro_batch_size)
    return -(-total // dp_size)


def evaluation_batches(
    dataset: TokenDataset,
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    pad_id: int,
    pad_multiple: int = BASE_MULTIPLE,
) -> Iterator[MicroBatch]:
    """Yield one rank's batches of a pass over all samples, sorted by length, each sample once over all ranks.

    Every rank gets the same number of batches, so that collectives match; where samples have run out a batch
    is one padded row without a label.
    """
    order = np.argsort(dataset.lengths, kind="stable")
    for step in range(num_evaluation_batches(dataset, micro_batch_size=micro_batch_size, dp_size=dp_size)):
        start = (step * dp_size + dp_rank) * micro_batch_size
        indices = order[start : start + micro_batch_size]
        yield collate(dataset, indices, pad_id=pad_id, pad_multiple=pad_multiple)


def collate(
    dataset: TokenDataset, indices: Sequence[int] | NDArray[np.int64], *, pad_id: int, pad_multiple: int = BASE_MULTIPLE
) -> MicroBatch:
    """Pad samples to a common length that is a multiple of `pad_multiple`, whatever the layout.

    No index at all gives one row of padding without a label.
    """
    samples = [dataset.sample(int(index)) for index in indices]
    longest = max((len(sample) for sample in samples), default=1)
    shape = (max(len(samples), 1), -(-longest // pad_multiple) * pad_multiple)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    for row, (index, sample) in enumerate(zip(indices, samples, strict=True)):
        first = max(int(dataset.prompt_lengths[int(index)]), 1)  # the first token that is predicted
        input_ids[row, : len(sample)] = sample
        labels[row, first - 1 : len(sample) - 1] = sample[first:]
    lengths = [len(sample) for sample in samples] or [0]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.arange(shape[1]).repeat(shape[0], 1),
        lengths=torch.tensor(lengths),
        num_samples=len(samples),
        num_tokens=sum(lengths),
        num_supervised=int((labels != IGNORED_LABEL).sum()),
    )
