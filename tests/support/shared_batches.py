"""Micro-batches of several adapters, alone and end to end in a shared one, for tests of the bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle_training import OracleBatch
from tiny_models import pack_samples, pad_packs, pad_samples, random_batches

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
            batch = self._padded([[next(left) for _ in range(count)] for count in rows])
            if number in self.silent:
                batch.labels.fill_(IGNORED_LABEL)
            found.append(batch)
        return found

    def _padded(self, rows: list[list[OracleBatch]]) -> OracleBatch:
        if not self.packed:
            assert all(len(row) == 1 for row in rows), "rows of several samples are packed"
            batch = pad_samples([row[0] for row in rows], multiple=8)
            positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids).contiguous()
            return OracleBatch(batch.input_ids, batch.labels, positions=positions)
        return pad_packs([pack_samples(row) for row in rows], multiple=8)


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
    batches = [batch for _, batch in parts]
    shares = tuple(Share(name, *batch.input_ids.shape) for name, batch in parts)
    if len(batches) == 1:
        (batch,) = batches
        assert batch.positions is not None
        return SharedBatch(batch.input_ids, batch.positions, batch.labels, batch.documents, shares)
    documents = None
    if batches[0].documents is not None:
        documents = _end_to_end([batch.documents for batch in batches])
    return SharedBatch(
        _end_to_end([batch.input_ids for batch in batches]),
        _end_to_end([batch.positions for batch in batches]),
        _end_to_end([batch.labels for batch in batches]),
        documents,
        shares,
    )


def rounds(members: Sequence[Member], *, shared: bool) -> list[SharedBatch]:
    """The first micro-batches of all, the second of all, ...; with `shared` those of a round in one."""
    found = []
    for number in range(max(len(member.rows) for member in members)):
        parts = [(m.name, m.micro_batches[number]) for m in members if number < len(m.rows)]
        found += [joined(parts)] if shared else [joined([part]) for part in parts]
    return found


def _end_to_end(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])[None]
