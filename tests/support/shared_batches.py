"""Micro-batches of several adapters, alone and end to end in a shared one, for tests of the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle_training import OracleBatch
from tiny_models import pack_samples, pad_samples, random_batches

from megatron_tiedlora.adapters.adapter_bank import Share
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.parallel.loss import IGNORED_LABEL


@dataclass(frozen=True)
class Member:
    """An adapter and its samples.

    Attributes:
        adapter: keywords of `random_adapter`, with its method.
        rows: the rows of each of its micro-batches; the samples of each row.
        silent: which of its micro-batches have no supervised token.
    """

    name: str
    adapter: dict[str, Any]
    rows: tuple[tuple[int, ...], ...]
    seed: int = 0
    packed: bool = False
    silent: tuple[int, ...] = ()

    @property
    def samples(self) -> list[OracleBatch]:
        """All of its samples in this step."""
        return random_batches(1, samples_per_step=sum(map(sum, self.rows)), seed=self.seed)[0]

    @property
    def micro_batches(self) -> list[OracleBatch]:
        """The samples in its rows, padded to a multiple of 8; positions and, if packed, documents are given."""
        left, found = iter(self.samples), []
        for number, rows in enumerate(self.rows):
            parts = [[next(left) for _ in range(count)] for count in rows]
            assert self.packed or all(len(row) == 1 for row in parts), "rows of several samples are packed"
            batch = pad_samples([pack_samples(row) if self.packed else row[0] for row in parts], multiple=8)
            if not self.packed:
                positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids).contiguous()
                batch = OracleBatch(batch.input_ids, batch.labels, positions=positions)
            if number in self.silent:
                batch.labels.fill_(IGNORED_LABEL)
            found.append(batch)
        return found


@dataclass(frozen=True)
class SharedBatch:
    """The micro-batches of some adapters end to end: all tensors are (1, tokens). That of one is as it is."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor | None
    shares: tuple[Share, ...]

    def supervised(self, num_parts: int = 1) -> Supervised:
        """Its supervised positions."""
        return find_supervised(self.labels, num_parts, self.shares)


def joined(parts: Sequence[tuple[str, OracleBatch]]) -> SharedBatch:
    """One shared micro-batch from those of (adapter, its micro-batch)."""
    shares = tuple(Share(name, *batch.input_ids.shape) for name, batch in parts)
    of_each = [(batch.input_ids, batch.positions, batch.labels, batch.documents) for _, batch in parts]
    if len(parts) == 1:
        return SharedBatch(*of_each[0], shares)
    return SharedBatch(*map(_end_to_end, zip(*of_each, strict=True)), shares)


def rounds(members: Sequence[Member], *, shared: bool) -> list[SharedBatch]:
    """The first micro-batches of all, the second of all, ...; with `shared` those of a round in one."""
    found = []
    for number in range(max(len(member.rows) for member in members)):
        parts = [(m.name, m.micro_batches[number]) for m in members if number < len(m.rows)]
        found += [joined(parts)] if shared else [joined([part]) for part in parts]
    return found


def _end_to_end(tensors: Sequence[Any]) -> Any:
    """(1, all their numbers); None if they are None."""
    return None if tensors[0] is None else torch.cat([tensor.flatten() for tensor in tensors])[None]
