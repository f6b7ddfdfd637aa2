"""Define a micro-batch, its supervised positions, and the documents that are packed in it.

The tensors have the same names from the loader to the loss: tokens, positions, labels, documents, token_index. The
layers after the last attention compute only supervised positions. These positions are found on the host, so that no
step waits for the device to count them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.adapters.adapter_groups import AdapterSegments, spans_of
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.loss import IGNORED_LABEL, RowSpan, RowSpans, span_starts, spans_between
from megatron_tiedlora.parallel.objectives import Objective

# Rows are padded to a multiple of this, because repeated shapes need less memory and fewer kernels.
PAD_MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A micro-batch of b rows on the host, padded on the right to one length s. Causal attention needs no padding mask.

    Attributes:
        tokens: (b, s) int64.
        positions: (b, s) int64, the position ids, counted from 0 in each sample.
        labels: (b, s) int64, already shifted: labels[:, t] is token t + 1 if that token is supervised, else -100.
        documents: (b, s) int64, document ids. Tokens attend only within their document. In a packed row the id is the
            index of the token's sample in the row, and padding is one more document. None if each row is one sample.
        token_index: (b, s) int64, the index of each token in the whole run, which determines dropout; 0 for padding.
            None if there is no dropout.
        segments: the rows of each adapter. If there are several adapters, all rows are concatenated, so b is 1.
        objectives: the loss of each segment; empty for the cross entropy.
        loss_inputs: with `objectives` the numbers of each label, (2, b, s) fp32, see `Objective`; otherwise None.
        lengths: (rows,) int64, the number of tokens in each row without padding. With several adapters, these are their
            rows before concatenation.
        num_samples: the number of samples; 0 for a batch of padding only.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    documents: Tensor | None = None
    token_index: Tensor | None = None
    segments: AdapterSegments = ()
    objectives: tuple[Objective, ...] = ()
    loss_inputs: Tensor | None = None
    lengths: Tensor
    num_samples: int

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens without padding."""
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        """Return the number of labels that are not -100."""
        return int((self.labels != IGNORED_LABEL).sum())

    def supervised(self, num_parts: int = 1) -> "Supervised":
        """Return the supervised positions of the micro-batch; see `find_supervised`."""
        return find_supervised(self.labels, num_parts, self.segments, self.objectives, self.loss_inputs)


class Supervised(NamedTuple):
    """The n supervised positions of labels (b, s).

    If activations are sharded along the sequence, each of the p ranks computes the positions in its own shard. All
    ranks compute the same number of positions, m / p, because collectives need equal shards. It is a positive multiple
    of `SIZE_MULTIPLE`. A shard with fewer supervised positions is padded with positions whose results are not used.

    Attributes:
        rows: (m,) int64, indices into (b s), one shard after another.
        local_rows: (m,) int64, `rows` as indices into the (b s / p) tokens of their shard.
        supervised: (n,) int64, indices into `rows`, of the positions that have a label.
        labels: (n,) int64, the labels of these positions.
        spans: the span of each adapter in `rows`, if there are several adapters.
        supervised_spans: the span of each adapter in `supervised`, if there are several adapters.
        objectives: the loss of each adapter; empty for the cross entropy.
        inputs: with `objectives` the numbers of the labels, (2, n).
        report: a function that is called with the cross entropy of each label, (n,), detached; or None.
    """

    rows: Tensor
    local_rows: Tensor
    supervised: Tensor
    labels: Tensor
    spans: RowSpans = ()
    supervised_spans: RowSpans = ()
    objectives: tuple[Objective, ...] = ()
    inputs: Tensor | None = None
    report: Callable[[Tensor], None] | None = None

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Supervised":
        """Return a copy with `move` applied to every tensor."""
        return Supervised._make(move(value) if isinstance(value, Tensor) else value for value in self)

    def summed(self, losses: Tensor) -> Tensor:
        """Report the losses, and return their sum, (), or the sum of each adapter, (adapters,), if there are several.

        Args:
            losses: (n,), the cross entropy of each label. The sums are of the `objectives` instead, if there are any.
        """
        if self.report is not None:
            self.report(losses.detach())
        spans = self.supervised_spans or (RowSpan(0, len(losses)),)
        totals = [losses.new_zeros(()) for _ in range(1 + max(span.adapter for span in spans))]
        for start, (adapter, size) in zip(span_starts(spans), spans, strict=True):
            part = losses[start : start + size]
            if self.inputs is not None:
                part = self.objectives[adapter].losses(-part, self.inputs[:, start : start + size])
            totals[adapter] = totals[adapter] + part.sum()
        return torch.stack(totals) if self.supervised_spans else totals[0]


def padded_positions(num_supervised: int) -> int:
    """Return the number of positions, including padding, to compute for `num_supervised` positions of a shard."""
    return padded(max(1, num_supervised))


def find_supervised(
    labels: Tensor,
    num_parts: int = 1,
    segments: AdapterSegments = (),
    objectives: tuple[Objective, ...] = (),
    inputs: Tensor | None = None,
) -> Supervised:
    """Return the supervised positions of labels (b, s) int64. Positions with the label -100 are not supervised.

    In each shard, the positions of an adapter are padded to a multiple of `SIZE_MULTIPLE` with the position of its
    first token in the shard. So the results of one adapter never depend on tokens of another adapter, not even through
    a multiplication by zero.

    Args:
        num_parts: the number of shards of activations along the sequence; it must divide b s.
        segments: the adapters of the micro-batch; if there are several adapters, b is 1.
        objectives, inputs: see `MicroBatch.objectives` and `MicroBatch.loss_inputs`.
    """
    spans, by_part = spans_of(segments), labels.reshape(num_parts, -1)
    length = by_part.shape[1]
    owned = spans or (RowSpan(0, labels.numel()),)
    found = list[list[tuple[int, Tensor, int]]]()  # for each shard and span: adapter, positions and first position
    for number, part_labels in enumerate(by_part):
        within = spans_between(owned, number * length, (number + 1) * length)
        of_spans = zip(within, part_labels.split([span.size for span in within]), span_starts(within), strict=True)
        found.append([(a, (own != IGNORED_LABEL).nonzero()[:, 0] + start, start) for (a, _), own, start in of_spans])
    most = max(sum(padded_positions(len(rows)) for _, rows, _ in part) for part in found)
    local_rows, supervised = list[Tensor](), list[Tensor]()
    of_rows, of_supervised = list[RowSpan](), list[RowSpan]()
    for part_number, part in enumerate(found, start=1):
        for number, (adapter, rows, first) in enumerate(part, start=1):
            start = sum(map(len, local_rows))
            size = padded_positions(len(rows)) if number < len(part) else part_number * most - start
            local_rows.append(torch.nn.functional.pad(rows, (0, size - len(rows)), value=first))
            supervised.append(torch.arange(start, start + len(rows), device=labels.device))
            of_rows.append(RowSpan(adapter, size))
            of_supervised.append(RowSpan(adapter, len(rows)))
    joined, chosen = torch.cat(local_rows), torch.cat(supervised)
    rows = joined + torch.arange(num_parts, device=labels.device).repeat_interleave(most) * length
    chosen_rows = rows[chosen]
    own_spans = (tuple(of_rows), tuple(of_supervised)) if spans else ((), ())
    own_inputs = None if inputs is None else inputs.flatten(1)[:, chosen_rows]
    return Supervised(rows, joined, chosen, labels.flatten()[chosen_rows], *own_spans, objectives, own_inputs)


# Documents ------------------------------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """The n documents of concatenated rows (b s). Document i has the tokens bounds[i] to bounds[i + 1] - 1.

    Attributes:
        bounds: n + 1 indices on the host, from 0 to b s.
        offsets: `bounds` as (n + 1,) int32 on the device.
        longest: the number of tokens in the longest document.
    """

    bounds: list[int]
    offsets: Tensor
    longest: int


def find_documents(ids: Sequence[Tensor], device: torch.device) -> Documents:
    """Return the documents of consecutive blocks of rows. A new document begins at a new row and where the id changes.

    If the ids are on the host, the function does not synchronise with the device.

    Args:
        ids: (b, s) int64, one tensor for each block.
    """
    begins = torch.cat([document_begins(block).flatten() for block in ids])
    bounds = [*begins.nonzero()[:, 0].tolist(), len(begins)]
    offsets = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    return Documents(bounds, offsets, max(stop - start for start, stop in pairwise(bounds)))


def document_begins(ids: Tensor) -> Tensor:
    """Return for each token of document ids (b, s) whether a document begins there, (b, s) bool."""
    begins = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return begins


def whole_rows(size: int, length: int, device: torch.device) -> Documents:
    """Return the documents of rows (size, length) that contain one document each."""
    bounds = list(range(0, (size + 1) * length, length))
    offsets = torch.arange(0, (size + 1) * length, length, dtype=torch.int32, device=device)
    return Documents(bounds, offsets, length)
