"""Turns text into token ids, with the same function for training and for generation.

tokens = [BOS] + prompt + completion + EOS. Prompt and completion are tokenised separately, so that the ids a model
sees before it answers do not depend on the answer. The positions after the prompt are supervised, including EOS; they
are chosen by position, never by id (padding may equal EOS). A prompt that does not fit loses its middle; an answer
is never cut.

Owns ids, lengths and counts. Leaves batches and labels to `loader`, and storage to `cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.data.tokenizer import library_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1000  # samples per tokenizer call: enough for its threads, and frequent updates of the progress bar


@dataclass(frozen=True)
class EncodedExample:
    """One sample as ids.

    tokens: (length,) int32, including BOS and EOS.
    prompt_length: number of unsupervised tokens at the start (BOS and prompt).
    truncated: whether the prompt lost its middle.
    """

    tokens: NDArray[np.int32]
    prompt_length: int
    truncated: bool


@dataclass(frozen=True)
class TokenDataset:
    """All samples of a split, concatenated.

    tokens: (N,) int32. offsets: (n + 1,) int64; sample i is tokens[offsets[i]:offsets[i + 1]].
    prompt_lengths: (n,) int32. truncated_prompts: how many prompts lost their middle.
    """

    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int32]
    truncated_prompts: int

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each sample, (n,) int64."""
        return np.diff(self.offsets)

    def lengths_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        """Number of tokens of the given samples, (len(indices),) int64."""
        samples = np.asarray(indices, dtype=np.int64)
        return self.offsets[samples + 1] - self.offsets[samples]

    @property
    def supervised_counts(self) -> NDArray[np.int64]:
        """Number of supervised tokens of each sample, (n,) int64. No position predicts the first token."""
        return self.lengths - np.maximum(self.prompt_lengths, 1)

    @property
    def num_supervised(self) -> int:
        """Number of supervised tokens of all samples."""
        return int(self.supervised_counts.sum())

    def sample(self, index: int) -> NDArray[np.int32]:
        """Return the ids of one sample, (length,) int32."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_length: int
) -> tuple[list[NDArray[np.int32]], int]:
    """[BOS] + ids of each prompt, (length,) int32, and the number of prompts that lost their middle to `max_length`.

    If a prompt fits, these are exactly the ids that training puts before the answer.
    """
    bos = _bos_id(tokenizer)
    encoded = [_with_bos(ids, bos, room=max_length) for ids in _ids(tokenizer, list(prompts))]
    return [np.asarray(ids, dtype=np.int32) for ids, _ in encoded], sum(cut for _, cut in encoded)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int
) -> list[EncodedExample]:
    """Return samples as ids, each of at most `max_length` tokens.

    Raises UserError if the tokenizer has no EOS, or if an answer with BOS, EOS and one token of its prompt does not
    fit in `max_length` (the message names the sample).
    """
    bos = _bos_id(tokenizer)
    eos = _eos_id(tokenizer)
    prompts = _ids(tokenizer, [example.prompt for example in examples])
    completions = continuation_ids(tokenizer, [example.completion for example in examples])
    encoded = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        answer = completion if completion[-1:] == [eos] else [*completion, eos]
        room = max_length - len(answer)
        if room < (bos is not None) + bool(prompt):
            raise UserError(
                f"{example.source}: the answer of {len(answer)} tokens (including EOS) does not fit in "
                f"max_length {max_length} with a prompt before it; raise --max_length or remove the row"
            )
        start, truncated = _with_bos(prompt, bos, room=room)
        tokens = np.asarray([*start, *answer], dtype=np.int32)
        encoded.append(EncodedExample(tokens=tokens, prompt_length=len(start), truncated=truncated))
    return encoded


def encode_dataset(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    progress: bool = False,
) -> TokenDataset:
    """Tokenise all samples, with a progress bar if it takes more than a few seconds.

    Raises UserError as `encode_examples` does, and if no token is supervised.
    """
    encoded: list[EncodedExample] = []
    with tqdm(total=len(examples), desc="tokenising", unit="sample", delay=2, disable=not progress) as bar:
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            encoded += encode_examples(tokenizer, chunk, max_length=max_length)
            bar.update(len(chunk))
    lengths = np.asarray([len(sample.tokens) for sample in encoded], dtype=np.int64)
    dataset = TokenDataset(
        tokens=np.concatenate([np.empty(0, np.int32), *(sample.tokens for sample in encoded)]),
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        prompt_lengths=np.asarray([sample.prompt_length for sample in encoded], dtype=np.int32),
        truncated_prompts=sum(sample.truncated for sample in encoded),
    )
    check_supervised(dataset, examples[0].source if examples else "data")
    return dataset


def check_supervised(dataset: TokenDataset, source: str) -> None:
    """Raise UserError if no token of the data set is supervised, so that there is no loss to compute."""
    if dataset.num_supervised < 1:
        raise UserError(f"{source}: no supervised token in {len(dataset)} samples; give samples with an answer")


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """Decode ids to text. Raises UserError naming the tokenizer if its library fails."""
    with library_errors(tokenizer.name_or_path, "cannot decode some ids"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special))


def adds_prefix_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a space before any text (SentencePiece's dummy prefix, `add_prefix_space`)."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))
    return bool(tokens) and tokens[0].startswith(("▁", "Ġ"))


def continuation_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokenise texts that follow a prompt, so that decoding prompt and continuation gives the joined text.

    A tokenizer that prefixes a space would add one to " 42" and to "42". So a leading space is removed, and the
    tokenizer adds it again. A text without one is tokenised after a newline, whose ids are then dropped. If the
    newline merges with the text into one token, the extra space stays.
    """
    if not adds_prefix_space(tokenizer):
        return _ids(tokenizer, texts)
    newline = _ids(tokenizer, ["\n"])[0]
    guarded = [text[1:] if text.startswith(" ") else "\n" + text for text in texts]
    encoded = _ids(tokenizer, guarded)
    for index, text in enumerate(texts):
        if not text.startswith(" "):
            ids = encoded[index]
            whole = newline and ids[: len(newline)] == newline
            encoded[index] = ids[len(newline) :] if whole else _ids(tokenizer, [text])[0]
    return encoded


def _with_bos(ids: list[int], bos: int | None, *, room: int) -> tuple[list[int], bool]:
    """Return BOS and a prompt within `room` tokens, and whether its middle was removed.

    A chat template may have written BOS already; a second one is not added.
    """
    start = [] if bos is None or ids[:1] == [bos] else [bos]
    if len(start) + len(ids) <= room:
        return start + ids, False
    keep = max(room - len(start), 0)
    head = (keep + 1) // 2
    return start + ids[:head] + ids[len(ids) - (keep - head) :], True


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    with library_errors(tokenizer.name_or_path, "cannot encode a text"):
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
    return [list(ids) for ids in encoded["input_ids"]]


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token; give another --tokenizer"
        )
    return int(tokenizer.eos_token_id)
