"""Divide the rows of a pass into micro-batches, and find the log-probabilities of its tokens again.

The micro-batches of a pass depend on nothing but the pass, so its gradients do not depend on the requests of other
models. Each is one row, in which the pass's rows are documents one after the other, in their order. Micro-batches of
different models are then combined, as in a run of several adapters (`data/loader.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.data.loader import Owned, fill_rounds
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.parallel.objectives import Objective
from megatron_tiedlora.service.operations import Pass

# Smaller micro-batches would not keep a stage or rank busy for longer than it takes to start their kernels.
LEAST_TOKENS = 512


@dataclass(frozen=True)
class Division:
    """How passes are divided.

    Attributes:
        capacity: the most tokens of a micro-batch, including padding, on a rank.
        dp_size: the data-parallel ranks, which compute different micro-batches.
        per_rank: the number of micro-batches for each data-parallel rank that a pass is divided into if it is large
            enough, so that all pipeline stages are busy.
        multiple: the number of positions is padded to a multiple of this.
        shares: whether micro-batches of different models are combined.
    """

    capacity: int
    dp_size: int = 1
    per_rank: int = 1
    multiple: int = 8
    shares: bool = True

    def slices(self, lengths: Sequence[int]) -> list[slice]:
        """Return the rows of each micro-batch of a pass. Rows are added up to a limit, in their order."""
        share = -(-sum(lengths) // (self.dp_size * self.per_rank))
        limit = max(*lengths, min(self.capacity, max(LEAST_TOKENS, share)))
        rows = filled((index, length, limit) for index, length in enumerate(lengths))
        return [slice(some[0], some[-1] + 1) for some in rows]

    def micro_batches(self, given: Pass) -> list[MicroBatch]:
        """Return the micro-batches of a pass. Number j is for data-parallel rank j % `dp_size`; those at the end may
        be padding."""
        starts = torch.tensor([0, *given.lengths]).cumsum(0).tolist()
        found = [self._micro_batch(given, some, starts) for some in self.slices(given.lengths)]
        return found + [self._micro_batch(given, slice(0, 0), starts)] * (-len(found) % self.dp_size)

    def _micro_batch(self, given: Pass, some: slice, starts: Sequence[int]) -> MicroBatch:
        start, lengths = starts[some.start], given.lengths[some]
        size = sum(lengths)
        padding = max(size + -size % self.multiple, self.multiple) - size

        def row(values: Tensor, fill: int) -> Tensor:
            own = values[..., start : start + size]
            return torch.nn.functional.pad(own, (0, padding), value=fill)[None]

        documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
        positions = [torch.arange(length) for length in (*lengths, padding)]
        return MicroBatch(
            tokens=row(given.tokens, 0),
            positions=torch.cat(positions)[None],
            labels=row(given.targets, IGNORED_LABEL),
            documents=torch.nn.functional.pad(documents, (0, padding), value=len(lengths))[None],
            objectives=(Objective(given.objective, given.settings),),
            loss_inputs=row(given.inputs, 0).transpose(0, 1),
            lengths=torch.tensor([size]),
            num_samples=len(lengths),
        )


class Batches:
    """The micro-batches of the passes of several models, on all data-parallel ranks.

    Attributes:
        rounds: the combined micro-batches, as lists of a model and the number of one of its micro-batches on a rank.
    """

    def __init__(self, division: Division, passes: Sequence[tuple[str, Pass]]) -> None:
        """Divide passes, given with their models. Passes of a model stay in their order."""
        self._division, self._passes = division, passes
        self._batches: dict[str, list[MicroBatch]] = {}
        for model, one in passes:
            self._batches.setdefault(model, []).extend(division.micro_batches(one))
        step = division.dp_size
        largest = {
            model: [max(one.tokens.numel() for one in own[at : at + step]) for at in range(0, len(own), step)]
            for model, own in self._batches.items()
        }
        self.rounds = fill_rounds(largest, capacity=division.capacity if division.shares else 0)

    def on_rank(self, dp_rank: int) -> list[list[Owned]]:
        """Return the micro-batches that a data-parallel rank combines, in the order in which it runs them."""
        return [[(model, self._batch(model, number, dp_rank)) for model, number in some] for some in self.rounds]

    def _batch(self, model: str, number: int, dp_rank: int) -> MicroBatch:
        return self._batches[model][number * self._division.dp_size + dp_rank]

    def by_pass(self, by_rank: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the numbers of each pass's tokens in their order, from those of each data-parallel rank, in the order
        in which it computed them."""
        keys, parts = [key for some in self.rounds for key in some], dict[str, dict[tuple[int, int], Tensor]]()
        for dp_rank, values in enumerate(by_rank):
            sizes = [self._batch(*key, dp_rank).num_supervised for key in keys]
            for (model, number), part in zip(keys, values.split(sizes), strict=True):
                parts.setdefault(model, {})[number, dp_rank] = part
        whole = {model: torch.cat([own[key] for key in sorted(own)]) for model, own in parts.items()}
        for model, one in self._passes:
            size = sum(one.lengths)
            yield whole[model][:size]
            whole[model] = whole[model][size:]
