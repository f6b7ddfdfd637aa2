"""Stores the samples of a split as token ids, and determines the order in which samples are drawn.

The arrays may be memory-mapped files that several splits and processes share. Computations over all samples process one
block of samples at a time, so they need memory for only one block.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.messages import UserError, count_text

FACTS = np.dtype(
    [("supervised", np.int32), ("cut", np.bool_), ("lost_turns", np.int32)]
    + [("chat", np.bool_), ("ended", np.bool_), ("first", np.bool_), ("number", np.int64), ("source", np.int32)]
)
"""Values per stored sample. `supervised` is the number of supervised tokens, `cut` is whether the middle of the prompt
was removed, and `lost_turns` is the number of turns removed from a chat. In the cache, `chat` is whether the sample is
a chat, `ended` is whether the supervised tokens of a chat include an end token, and `first` is whether the sample is
the first of its row. `number` is the row's sample index in `RowStream`, and `source` is the index of the row's
source."""

_ALL = np.empty(0, np.int64)  # marks the default order: the order in which samples are stored

Indices = Sequence[int] | NDArray[np.int64] | slice

_BLOCK, _BLOCK_TOKENS = 2**11, 2**18  # maximum samples and tokens per block; a longer sample is its own block


def _total(values: Callable[["TokenDataset", slice], NDArray[Any]]) -> cached_property[int]:
    """Return an attribute with the sum of `values`, which returns one number for each sample of a block."""
    return cached_property(lambda dataset: sum(int(values(dataset, block).sum()) for block in dataset._blocks()))


@dataclass(frozen=True)
class TokenDataset:
    """The samples of a split.

    tokens: (N,) int32, the token ids of all stored samples.
    offsets: (m + 1,) int64; stored sample i is tokens[offsets[i]:offsets[i + 1]].
    supervised: (N,) bool, whether each token is supervised; always False for the first token of a sample.
    facts: (m,) of dtype `FACTS`; by default only the field `supervised` is computed.
    order: (n,) int64, the index of each sample of the split among the stored ones; may repeat. Default: 0 to m - 1.
    num_tokens, num_supervised: the total number of tokens and of supervised tokens of all samples.
    truncated_prompts: the number of prompts from which the middle was removed.
    shortened_chats, lost_turns: the number of chats from which turns were removed, and the number of these turns.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    facts: NDArray[np.void] = field(default_factory=lambda: np.empty(0, FACTS))
    order: NDArray[np.int64] = field(default_factory=lambda: _ALL)

    def __post_init__(self) -> None:
        if self.order is _ALL:
            object.__setattr__(self, "order", np.arange(len(self.offsets) - 1))
        if len(self.facts) != len(self.offsets) - 1:
            facts = np.zeros(len(self.offsets) - 1, FACTS)
            before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.supervised, dtype=np.int64)])
            facts["supervised"] = before[self.offsets[1:]] - before[self.offsets[:-1]]
            object.__setattr__(self, "facts", facts)

    @classmethod
    def after_prompts(
        cls, tokens: NDArray[np.int32], offsets: NDArray[np.int64], prompt_lengths: NDArray[np.int32]
    ) -> "TokenDataset":
        """Return samples in which all tokens after prompts are supervised. prompt_lengths: (n,) tokens per prompt."""
        return cls(tokens, offsets, _from(offsets[:-1] + np.maximum(prompt_lengths, 1), offsets))

    def __len__(self) -> int:
        return len(self.order)

    def lengths_of(self, indices: Indices) -> NDArray[np.int64]:
        """Return the number of tokens of each given sample, (number of samples,) int64."""
        stored = self.order[indices]
        return self.offsets[stored + 1] - self.offsets[stored]

    def num_supervised_of(self, indices: Indices) -> NDArray[np.int64]:
        """Return the number of supervised tokens of each given sample, (number of samples,) int64."""
        return self._facts("supervised", indices).astype(np.int64)

    def _facts(self, name: str, indices: Indices) -> NDArray[Any]:
        return self.facts[name][self.order[indices]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each sample, (n,) int64."""
        return self.lengths_of(slice(None))

    num_tokens = _total(lambda self, block: self.lengths_of(block))
    num_supervised = _total(lambda self, block: self.num_supervised_of(block))
    truncated_prompts = _total(lambda self, block: self._facts("cut", block))
    shortened_chats = _total(lambda self, block: self._facts("lost_turns", block) > 0)
    lost_turns = _total(lambda self, block: self._facts("lost_turns", block))

    @cached_property
    def longest(self) -> int:
        """Return the number of tokens of the longest sample; 0 if there are no samples."""
        return max((int(self.lengths_of(block).max()) for block in self._blocks()), default=0)

    @property
    def prompt_lengths(self) -> NDArray[np.int32] | None:
        """Return each sample's number of unsupervised tokens, (n,) int32. Return None if, in any sample, an
        unsupervised token follows a supervised one."""
        whole = self._gathered(slice(None))
        starts = whole.offsets[1:] - whole.facts["supervised"]
        if not np.array_equal(whole.supervised, _from(starts, whole.offsets)):
            return None
        return (starts - whole.offsets[:-1]).astype(np.int32)

    def sample(self, index: int) -> NDArray[np.int32]:
        """Return the token ids of one sample, (length,) int32."""
        return self.tokens[self._span(index)]

    def supervised_of(self, index: int) -> NDArray[np.bool_]:
        """Return whether each token of one sample is supervised, (length,) bool."""
        return self.supervised[self._span(index)]

    def _span(self, index: int) -> slice:
        stored = self.order[index]
        return slice(self.offsets[stored], self.offsets[stored + 1])

    def update_digest(self, digest: "hashlib._Hash") -> None:
        """Add ids, offsets and supervised positions to a hash. Checkpoints store the hash, so it must not change."""
        for block in self._blocks():
            digest.update(self._gathered(block).tokens.data)
        end = np.zeros(1, np.int64)
        digest.update(end.data)
        for block in self._blocks():
            ends = end + np.cumsum(self.lengths_of(block))
            digest.update(ends.data)
            end = ends[-1:]
        after_prompts = all(self._gathered(block).prompt_lengths is not None for block in self._blocks())
        for block in self._blocks():
            part = self._gathered(block)
            prompts = part.prompt_lengths if after_prompts else None
            digest.update((part.supervised if prompts is None else prompts).data)

    def _blocks(self) -> Iterator[slice]:
        start = 0
        while start < len(self):
            ends = np.cumsum(self.lengths_of(slice(start, start + _BLOCK)))
            count = max(int(np.searchsorted(ends, _BLOCK_TOKENS, side="right")), 1)
            yield slice(start, start + count)
            start += count

    def _gathered(self, block: slice) -> "TokenDataset":
        """Return the samples of a block as a new data set with copied arrays."""
        stored = self.order[block]
        starts, lengths = self.offsets[stored], self.lengths_of(block)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        indices = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenDataset(self.tokens[indices], offsets, self.supervised[indices], self.facts[stored])


def check_supervised(dataset: TokenDataset, source: str) -> None:
    """Raise UserError if no token of the data set is supervised, because then there is no loss."""
    if dataset.num_supervised < 1:
        samples = count_text(len(dataset), "sample")
        raise UserError(f"{source}: no supervised token in {samples}; give samples with an answer")


def _from(starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return whether each token is at or after its sample's position in `starts`, (N,) bool."""
    return np.arange(offsets[-1]) >= np.repeat(starts, np.diff(offsets))


# The order of samples -------------------------------------------------------------------------------------------------
#
# The order is a pure function of seed, epoch and number of consumed samples. It uses PCG64's raw stream and a stable
# sort. NumPy guarantees that both are the same in all versions, unlike `Generator.permutation`. So a run can be resumed
# with a newer NumPy.


def permutation(num_items: int, *, seed: int, stream: int) -> NDArray[np.int64]:
    """Return a permutation of range(num_items), (num_items,) int64, that depends only on (seed, stream)."""
    words = [seed % 2**64, stream]
    raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(num_items)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=1)  # consecutive steps are in the same epoch, and sorting millions of numbers takes a second
def _epoch(num_items: int, seed: int, epoch: int) -> NDArray[np.unsignedinteger[Any]]:
    """Return the permutation of an epoch in the smallest integer type, because every rank keeps it in memory."""
    order = permutation(num_items, seed=seed, stream=epoch).astype(np.min_scalar_type(num_items))
    order.flags.writeable = False
    return order


def sample_indices(num_samples: int, *, seed: int, consumed: int, count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` samples that follow the first `consumed` samples, (count,) int64.

    Each epoch has its own permutation of all samples. The result may span epochs and be longer than the data set.

    Raises ValueError if there are no samples.
    """
    if num_samples < 1:
        raise ValueError("cannot draw samples from an empty data set")
    epoch, offset = divmod(consumed, num_samples)
    parts: list[NDArray[np.int64]] = []
    missing = count
    while missing > 0:
        part = _epoch(num_samples, seed, epoch)[offset : offset + missing]
        parts.append(part.astype(np.int64))
        missing -= len(part)
        epoch, offset = epoch + 1, 0
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
