"""Turns the segments of samples into token ids and labels, with the same function for training and for generation.

tokens = start + segments, each with EOS where its sample says so. `start` is what the tokenizer itself puts before a
text, usually BOS or nothing. Segments are tokenised separately, so that the ids a model sees before it answers do not
depend on the answer. What is supervised is known by position, never by id (padding may equal EOS). A prompt that does
not fit loses its middle, and a chat its first exchanges; an answer is never cut. A text without a prompt becomes
several samples.

Owns samples, labels, lengths and counts. Leaves batches to `loader`, storage to `cache`, and a chat's text to `chat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.chat import Chat, opened_chat
from megatron_tiedlora.data.examples import Example, Segment
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.text_ids import segment_ids
from megatron_tiedlora.data.tokenizer import start_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # samples per tokenizer call: enough for its threads, and frequent updates of the progress bar


@dataclass(frozen=True)
class EncodedExample:
    """One sample as ids.

    tokens: (length,) int32, including BOS and EOS.
    supervised: (length,) bool, which tokens are learned; never the first, which no position predicts.
    truncated: whether the prompt lost its middle.
    lost_turns: number of turns that a chat lost.
    """

    tokens: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    truncated: bool = False
    lost_turns: int = 0

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first supervised one."""
        return int(self.supervised.argmax()) if self.supervised.any() else len(self.tokens)


@dataclass(frozen=True)
class TokenDataset:
    """All samples of a split, concatenated.

    tokens: (N,) int32. offsets: (n + 1,) int64; sample i is tokens[offsets[i]:offsets[i + 1]].
    supervised: (N,) bool, which tokens are learned; never the first of a sample.
    truncated_prompts: how many prompts lost their middle.
    shortened_chats, lost_turns: how many chats lost turns, and how many turns those are.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    supervised: NDArray[np.bool_]
    truncated_prompts: int = 0
    shortened_chats: int = 0
    lost_turns: int = 0

    @classmethod
    def after_prompts(
        cls, tokens: NDArray[np.int32], offsets: NDArray[np.int64], prompt_lengths: NDArray[np.int32]
    ) -> TokenDataset:
        """Samples that are supervised from their prompts' ends on. prompt_lengths: (n,) tokens of the prompts."""
        return cls(tokens, offsets, _from(offsets[:-1] + np.maximum(prompt_lengths, 1), offsets))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each sample, (n,) int64."""
        return np.diff(self.offsets)

    def lengths_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Number of tokens of the given samples, (len(indices),) int64."""
        samples = np.asarray(indices, dtype=np.int64)
        return self.offsets[samples + 1] - self.offsets[samples]

    @cached_property
    def supervised_counts(self) -> NDArray[np.int64]:
        """Number of supervised tokens of each sample, (n,) int64."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.supervised, dtype=np.int64)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens of all samples."""
        return int(self.supervised_counts.sum())

    @property
    def prompt_lengths(self) -> NDArray[np.int32] | None:
        """Tokens before the supervised ones of each sample, (n,) int32; None if some do not all come last."""
        starts = self.offsets[1:] - self.supervised_counts
        if not np.array_equal(self.supervised, _from(starts, self.offsets)):
            return None
        return (starts - self.offsets[:-1]).astype(np.int32)

    def sample(self, index: int) -> NDArray[np.int32]:
        """Return the ids of one sample, (length,) int32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def supervised_of(self, index: int) -> NDArray[np.bool_]:
        """Return which tokens of one sample are supervised, (length,) bool."""
        return self.supervised[self.offsets[index] : self.offsets[index + 1]]


def _from(starts: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) bool: whether each token is at or after its sample's position in `starts`."""
    return np.arange(offsets[-1]) >= np.repeat(starts, np.diff(offsets))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_length: int, reading: Reading | None = None
) -> tuple[list[NDArray[np.int32]], int]:
    """The ids of texts as prompts, (length,) int32, and the number of prompts that lost something to `max_length`."""
    examples = [Example(prompt, "", "a prompt") for prompt in prompts]
    return encode_prompts_of(tokenizer, examples, max_length=max_length, reading=reading)


def encode_prompts_of(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int, reading: Reading | None = None
) -> tuple[list[NDArray[np.int32]], int]:
    """The ids of the examples' prompts, and the number of prompts that lost something, as `encode_prompts` gives them.

    If a prompt fits, these are exactly the ids that training puts before the last answer.
    """
    with opened_chat(tokenizer, reading or Reading()) as chat:
        encoded = list(_Encoder(tokenizer, chat, max_length).prompts(examples))
    return [np.asarray(ids, dtype=np.int32) for ids, _ in encoded], sum(cut for _, cut in encoded)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int, reading: Reading | None = None
) -> list[EncodedExample]:
    """Return samples as ids, each of at most `max_length` tokens. A text without a prompt may become several.

    Raises UserError if the tokenizer has no EOS where one is needed, or if answers with the start and one token of
    their prompt do not fit in `max_length` (the message names the sample).
    """
    with opened_chat(tokenizer, reading or Reading()) as chat:
        return list(_Encoder(tokenizer, chat, max_length).samples(examples))


def encode_dataset(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    reading: Reading | None = None,
    progress: bool = False,
) -> TokenDataset:
    """Tokenise all samples, with a progress bar if it takes more than a few seconds.

    Raises UserError as `encode_examples` does, and if no token is supervised.
    """
    encoded: list[EncodedExample] = []
    bar = tqdm(total=len(examples), desc="tokenising", unit="sample", delay=2, disable=not progress)
    with bar, opened_chat(tokenizer, reading or Reading()) as chat:
        encoder = _Encoder(tokenizer, chat, max_length)
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            encoded += encoder.samples(chunk)
            bar.update(len(chunk))
    lengths = np.asarray([len(sample.tokens) for sample in encoded], dtype=np.int64)
    dataset = TokenDataset(
        tokens=np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in encoded)]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        supervised=np.concatenate([np.empty(0, np.bool_), *(sample.supervised for sample in encoded)]),
        truncated_prompts=sum(sample.truncated for sample in encoded),
        shortened_chats=sum(sample.lost_turns > 0 for sample in encoded),
        lost_turns=sum(sample.lost_turns for sample in encoded),
    )
    check_supervised(dataset, examples[0].source if examples else "data")
    return dataset


def check_supervised(dataset: TokenDataset, source: str) -> None:
    """Raise UserError if no token of the data set is supervised, so that there is no loss to compute."""
    if dataset.num_supervised < 1:
        raise UserError(f"{source}: no supervised token in {len(dataset)} samples; give samples with an answer")


class _Encoder:
    """Ids of samples with one tokenizer, of at most `max_length` tokens. `chat` writes shorter chats."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Chat, max_length: int) -> None:
        self._tokenizer, self._chat, self._max_length = tokenizer, chat, max_length
        self._add_bos = chat.reading.add_bos
        self._start = start_ids(tokenizer, self._add_bos)

    def samples(self, examples: Sequence[Example]) -> Iterator[EncodedExample]:
        """Yield the samples of each example."""
        ids = segment_ids(self._tokenizer, [example.segments for example in examples])
        for example, parts in zip(examples, ids, strict=True):
            tokens, supervised = self._put_together(example, example.segments, parts)
            shorter, lost = example, 0
            while len(tokens) > self._max_length and (next_one := self._shortened(shorter)) is not None:
                shorter, lost = next_one, lost + _num_turns(shorter) - _num_turns(next_one)
                (parts,) = segment_ids(self._tokenizer, [shorter.segments])
                tokens, supervised = self._put_together(example, shorter.segments, parts)
            if len(tokens) > self._max_length and not example.prompt:
                yield from self._continued(tokens, supervised)
            else:
                yield self._cut_prompt(example, tokens, supervised, lost)

    def prompts(self, examples: Sequence[Example]) -> Iterator[tuple[list[int], bool]]:
        """Yield the ids of each prompt, and whether it lost something."""
        ids = segment_ids(self._tokenizer, [example.prompt_segments for example in examples])
        for example, parts in zip(examples, ids, strict=True):
            tokens, _ = self._put_together(example, example.prompt_segments, parts)
            shorter, whole = example, tokens
            while len(tokens) > self._max_length and (next_one := self._shortened(shorter)) is not None:
                shorter = next_one
                (parts,) = segment_ids(self._tokenizer, [shorter.prompt_segments])
                tokens, _ = self._put_together(example, shorter.prompt_segments, parts)
            if len(tokens) > self._max_length:
                tokens = self._without_middle(tokens, room=self._max_length)
            yield tokens, tokens is not whole

    def _put_together(
        self, example: Example, segments: Sequence[Segment], parts: Sequence[list[int]]
    ) -> tuple[list[int], list[bool]]:
        """The tokens of a sample, and which are supervised."""
        tokens: list[int] = []
        supervised: list[bool] = []
        for segment, ids in zip(segments, parts, strict=True):
            if segment.ends and ids[-1:] != [eos := self._eos()]:
                ids = [*ids, eos]
            tokens += ids
            supervised += [segment.supervised] * len(ids)
        start = self._start_of(example, tokens)
        tokens, supervised = [*start, *tokens], [*(False for _ in start), *supervised]
        supervised[:1] = [False] * len(supervised[:1])
        return tokens, supervised

    def _start_of(self, example: Example, tokens: list[int]) -> list[int]:
        """What is put in front: a chat template writes its own start, and nothing is written twice."""
        written = (example.templated and self._add_bos == "auto") or tokens[: len(self._start)] == self._start
        return [] if written else self._start

    def _eos(self) -> int:
        if self._tokenizer.eos_token_id is None:
            name = self._tokenizer.name_or_path
            raise UserError(f"{name}: the tokenizer has no end-of-sequence token; give another --tokenizer")
        return int(self._tokenizer.eos_token_id)

    def _shortened(self, example: Example) -> Example | None:
        """A chat without its first exchange; None if no more can be left out, or by the rules of version 0.1."""
        if example.conversation is None or self._chat.reading.first_rules:
            return None
        shorter = example.conversation.without_first_exchange()
        if shorter is None:
            return None
        segments, num_prompt = self._chat.segments(shorter, example.source)
        return replace(example, conversation=shorter, segments=segments, num_prompt=num_prompt)

    def _continued(self, tokens: list[int], supervised: list[bool]) -> Iterator[EncodedExample]:
        """A text in pieces of the maximum length. The last has two tokens at least, since one predicts nothing."""
        edges = [*range(0, len(tokens), self._max_length), len(tokens)]
        if edges[-1] - edges[-2] == 1:
            edges[-2] -= 1
        for start, stop in pairwise(edges):
            learned = np.asarray([False, *supervised[start + 1 : stop]], dtype=np.bool_)
            yield EncodedExample(np.asarray(tokens[start:stop], dtype=np.int32), learned)

    def _cut_prompt(
        self, example: Example, tokens: list[int], supervised: list[bool], lost_turns: int
    ) -> EncodedExample:
        """The sample, whose prompt loses its middle if it does not fit."""
        cut = len(tokens) > self._max_length
        if cut:
            first = supervised.index(True) if any(supervised) else len(tokens)
            answer, room = tokens[first:], self._max_length - (len(tokens) - first)
            if room < len(self._start_of(example, tokens[len(self._start) :])) + 1:
                raise UserError(
                    f"{example.source}: the answer of {len(answer)} tokens (including EOS) does not fit in "
                    f"max_length {self._max_length} with a prompt before it; raise --max_length or remove the row"
                )
            prompt = self._without_middle(tokens[:first], room=room)
            tokens, supervised = [*prompt, *answer], [*(False for _ in prompt), *supervised[first:]]
        return EncodedExample(
            np.asarray(tokens, dtype=np.int32), np.asarray(supervised, dtype=np.bool_), cut, lost_turns
        )

    def _without_middle(self, prompt: list[int], *, room: int) -> list[int]:
        """The start of a prompt and both its ends, `room` tokens in all."""
        start = self._start if prompt[: len(self._start)] == self._start else []
        ids, keep = prompt[len(start) :], max(room - len(start), 0)
        head = (keep + 1) // 2
        return [*start, *ids[:head], *ids[len(ids) - (keep - head) :]]


def _num_turns(example: Example) -> int:
    return 0 if example.conversation is None else len(example.conversation.messages)
