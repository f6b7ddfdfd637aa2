"""Rows, and what tokenising them once has to give: the samples of lists of examples, and version 0.1's hash; and micro-
batches of several adapters, alone and end to end in a shared one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tiedlora.adapters.adapter_groups import AdapterSegment
from megatron_tiedlora.data.cache import TrainingData, tokenised_once
from megatron_tiedlora.data.encode import encode_dataset
from megatron_tiedlora.data.splits import Encoding, load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.parallel.loss import IGNORED_LABEL
from megatron_tiedlora.parallel.objectives import Objective
from support.oracle_training import SETTINGS, OracleBatch, with_objective
from support.tiny_models import pack_samples, pad_samples, random_batches

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": " ".join(WORDS[: 1 + number % 10]) + f" {number}", "completion": " ".join(WORDS[number % 7 :])}
        for number in range(first, first + count)
    ]


def chats(count: int) -> list[dict[str, Any]]:
    def turns(number: int) -> list[dict[str, Any]]:
        return [
            {"role": role, "content": WORDS[(number + index) % 10]}
            for index in range(1 + number % 4)
            for role in ("user", "assistant")
        ]

    return [{"messages": turns(number)} for number in range(count)]


def expected(how: Encoding, files: Mapping[str, str], seed: int) -> dict[str, TokenDataset]:
    """The same from lists of samples, in this process."""
    return {
        split: encode_dataset(
            load_split(how.task, split, files=files, seed=seed, tokenizer=how.tokenizer, reading=how.reading),
            how.tokenizer,
            max_length=how.max_length,
            reading=how.reading,
        )
        for split in ("train", "validation")
    }


def check_same(found: TokenDataset, right: TokenDataset) -> None:
    assert len(found) == len(right) > 0
    for index in range(len(right)):
        assert found.sample(index).tolist() == right.sample(index).tolist()
        assert found.supervised_of(index).tolist() == right.supervised_of(index).tolist()
    assert found.lengths.tolist() == right.lengths.tolist()
    assert found.num_supervised_of(slice(None)).tolist() == right.num_supervised_of(slice(None)).tolist()
    for name in ("num_tokens", "num_supervised", "longest", "truncated_prompts", "shortened_chats", "lost_turns"):
        assert getattr(found, name) == getattr(right, name), name
    prompts, of_right = found.prompt_lengths, right.prompt_lengths
    assert (prompts is None) == (of_right is None)
    assert prompts is None or of_right is None or prompts.tolist() == of_right.tolist()


def sha256_of_arrays(parts: Mapping[str, TokenDataset]) -> str:
    """As version 0.1 hashed the arrays of both parts."""
    digest = hashlib.sha256()
    for part in parts.values():
        prompts = part.prompt_lengths
        for array in (part.tokens, part.offsets, part.supervised if prompts is None else prompts):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


@dataclass(frozen=True)
class TokenStore:
    """Training data that is tokenised once, into the cache of a folder."""

    tokenizer: Any
    folder: Path

    @property
    def tokens(self) -> Path:
        return self.folder / "tokens"

    def encoding(self, task: str = "custom", *, max_length: int = 40, template: str | None = None) -> Encoding:
        ends = frozenset([self.tokenizer.eos_token_id])
        return Encoding(
            get_task(task), self.tokenizer, Reading(template=template), max_length, ends, len(self.tokenizer)
        )

    def start(
        self, files: str | Mapping[str, str], how: Encoding | None = None, *, seed: int = 0, **keywords: Any
    ) -> TrainingData:
        """What a start gets for its files, of which a single one is that of --train_file."""
        given = {"train": files} if isinstance(files, str) else files
        return tokenised_once(how or self.encoding(), files=given, seed=seed, cache_dir=self.folder, **keywords)

    def check(self, files: str | Mapping[str, str], how: Encoding | None = None, *, seed: int = 3) -> TrainingData:
        """The same, which is what lists of samples in this process give, with version 0.1's hash."""
        given, how = {"train": files} if isinstance(files, str) else files, how or self.encoding()
        found, right = self.start(given, how, seed=seed), expected(how, given, seed)
        check_same(found.train, right["train"])
        check_same(found.validation, right["validation"])
        assert found.sha256 == sha256_of_arrays(right)
        first = load_split(how.task, "train", files=given, seed=seed, reading=how.reading)[0]
        whole = {**given, "validation": given["train"]}
        order = load_split(how.task, "train", files=whole, seed=seed, reading=how.reading)
        assert order[found.first_row].prompt == first.prompt
        return found


@dataclass(frozen=True)
class Member:
    """An adapter and its samples.

    Attributes:
        adapter: keywords of `random_adapter`, with its method.
        rows: the rows of each of its micro-batches; the samples of each row.
        silent: which of its micro-batches have no supervised token.
        objective: see `OracleBatch`.
    """

    name: str
    adapter: dict[str, Any]
    rows: tuple[tuple[int, ...], ...]
    seed: int = 0
    packed: bool = False
    silent: tuple[int, ...] = ()
    objective: str | None = None

    @property
    def samples(self) -> list[OracleBatch]:
        """All of its samples in this step."""
        samples = random_batches(1, samples_per_step=sum(map(sum, self.rows)), seed=self.seed)[0]
        return [with_objective(sample, self.objective, seed) for seed, sample in enumerate(samples)]

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
                batch = replace(batch, attention_mask=None, positions=positions)
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
    segments: tuple[AdapterSegment, ...]
    objectives: tuple[Objective, ...] = ()
    loss_inputs: torch.Tensor | None = None

    def supervised(self, num_parts: int = 1) -> Supervised:
        """Its supervised positions."""
        return find_supervised(self.labels, num_parts, self.segments, self.objectives, self.loss_inputs)


def joined(parts: Sequence[tuple[str, OracleBatch]]) -> SharedBatch:
    """One shared micro-batch from those of (adapter, its micro-batch)."""
    segments = tuple(AdapterSegment(name, *batch.input_ids.shape) for name, batch in parts)
    of_each = [(batch.input_ids, batch.positions, batch.labels, batch.documents) for _, batch in parts]
    objectives = tuple(Objective(b.objective, SETTINGS[b.objective]) for _, b in parts if b.objective)
    inputs = [batch.loss_inputs.flatten(1) for _, batch in parts if batch.loss_inputs is not None]
    more = {"objectives": objectives, "loss_inputs": torch.cat(inputs, 1) if inputs else None}
    if len(parts) == 1:
        return SharedBatch(*of_each[0], segments, **more)
    return SharedBatch(*map(_end_to_end, zip(*of_each, strict=True)), segments, **more)


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
