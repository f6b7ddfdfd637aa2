"""Answers held-out samples: divides them over ranks, and puts the answers back in order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.chat import chat_writer
from megatron_tiedlora.data.encode import encode_prompts_of
from megatron_tiedlora.data.examples import Example, join_answer
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.task import Task
from megatron_tiedlora.data.text_ids import continuation_ids, decode_ids
from megatron_tiedlora.data.tokenizer import end_ids
from megatron_tiedlora.evaluation.answers import Answer
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Agree, generate
from megatron_tiedlora.evaluation.likelihood import ending_log_likelihoods
from megatron_tiedlora.evaluation.metrics import find_metric
from megatron_tiedlora.parallel.agreement import gather_on_rank_0
from megatron_tiedlora.parallel.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_decoded = partial(decode_ids, skip_special=True)


@dataclass(frozen=True)
class ScoredSet:
    """Held-out samples as ids.

    Attributes:
        prompts: ids of BOS and prompt, by sample.
        endings: ids of each choice as it follows the prompt, by sample; empty if a sample has no choices.
        num_truncated: how many prompts lost their middle.
        end_ids: tokens that end an answer.
        chat_note: what wrote the text of chats; '' if the rows are no chats.
    """

    task: Task
    examples: tuple[Example, ...]
    prompts: tuple[NDArray[np.int32], ...]
    endings: tuple[tuple[tuple[int, ...], ...], ...]
    num_truncated: int
    end_ids: frozenset[int]
    chat_note: str = ""

    @property
    def sha256(self) -> str:
        """Hash of prompts, references and choices, which must be the same on all ranks."""
        digest = hashlib.sha256()
        for example, prompt in zip(self.examples, self.prompts, strict=True):
            digest.update(repr((prompt.tolist(), example.references, example.choices)).encode())
        return digest.hexdigest()


def encode_scored(
    examples: Sequence[Example],
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reading: Reading | None = None,
    longest_prompt: int,
    model_folder: Path,
    vocab_size: int,
) -> ScoredSet:
    """Tokenise samples as training does, with prompts truncated to `longest_prompt` tokens.

    Args:
        reading: what the user decided about rows; by default nothing.
        model_folder: its files name tokens that end a sequence, in addition to the tokenizer's.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the tokenizer has no end token, the task's metrics cannot score an example, or a choice has no
            token.
    """
    reading = reading or Reading()
    ends = end_ids(tokenizer, model_folder, vocab_size=vocab_size)
    metrics = [find_metric(name) for name in task.metrics]
    for metric in metrics:
        for example in examples:
            metric.check(example)
    for example in examples:
        if not example.prompt:
            raise UserError(f"{example.source}: is text without a prompt, which cannot be answered; give other rows")
    prompts, num_truncated = encode_prompts_of(tokenizer, examples, max_length=longest_prompt, reading=reading)
    reads_choices = any(metric.needs_choice_scores for metric in metrics)
    choices = [_follow(example) if reads_choices else () for example in examples]
    plain = reading.special_tokens == "plain"
    ids = iter(continuation_ids(tokenizer, [text for texts in choices for text in texts], plain=plain))
    endings = [tuple(tuple(next(ids)) for _ in texts) for texts in choices]
    for example, of_example in zip(examples, endings, strict=True):
        if not all(of_example):
            raise UserError(f"{example.source}: a choice has no token; remove the row")
    note = chat_writer(tokenizer, reading) if any(example.conversation for example in examples) else ""
    return ScoredSet(task, tuple(examples), tuple(prompts), tuple(endings), num_truncated, ends, note)


def _follow(example: Example) -> tuple[str, ...]:
    """The choices as they follow the prompt."""
    return example.endings or tuple(join_answer(example.prompt, choice) for choice in example.choices)


def answer_all(
    decoder: Decoder,
    scored: ScoredSet,
    *,
    tokenizer: PreTrainedTokenizerBase,
    grid: Grid,
    max_new_tokens: int,
    batch_size: int,
    agree: Agree = bool,
    progress: bool = False,
) -> list[Answer] | None:
    """Answer every prompt by greedy decoding. Returns all answers in the samples' order on rank 0, None elsewhere.

    Data-parallel ranks share the prompts. All ranks run the same number of batches, so that they can agree on
    stopping, and because every call of the model is a collective under ZeRO-3. A rank without prompts left decodes
    the first prompt again and discards the result.

    Args:
        batch_size: samples that a data-parallel rank decodes together.
        agree: maps "this rank's sequences are done" to "those of all ranks are"; may raise.
        progress: show a progress bar.
    """
    # Longest first, so that running out of memory shows at once and not after hours.
    order = sorted(range(len(scored.prompts)), key=lambda index: -len(scored.prompts[index]))
    batch_size = min(batch_size, -(-len(order) // grid.dp_size))
    num_batches = -(-len(order) // (batch_size * grid.dp_size))
    has_endings = any(scored.endings)
    is_end = _stop_test(tokenizer, scored.task.stop)
    mine: dict[int, tuple[str, tuple[float, ...]]] = {}
    with tqdm(total=len(order), desc="decoding", unit="sample", disable=not progress, leave=False) as bar:
        for number in range(num_batches):
            start = (number * grid.dp_size + grid.dp_rank) * batch_size
            indices = order[start : start + batch_size]
            used = indices or order[:1]
            prompts = [scored.prompts[index].tolist() for index in used]
            rows = generate(
                decoder, prompts, end_ids=scored.end_ids, max_new_tokens=max_new_tokens, is_end=is_end, agree=agree
            )
            choice_scores: list[list[float]] = [[] for _ in used]
            if has_endings:
                samples = [(prompt, scored.endings[index]) for prompt, index in zip(prompts, used, strict=True)]
                choice_scores = ending_log_likelihoods(decoder, samples)
            for index, row, scores in zip(indices, rows, choice_scores, strict=False):
                mine[index] = (_text(tokenizer, row, scored.task.stop), tuple(scores))
            bar.update(min(batch_size * grid.dp_size, len(order) - number * batch_size * grid.dp_size))
    # Tensor-parallel ranks have the same answers, and only the last stage has log-likelihoods.
    sends = grid.tp_rank == 0 and decoder.is_last
    gathered = gather_on_rank_0(mine if sends else {}, kind=dict[int, tuple[str, tuple[float, ...]]])
    if gathered is None:
        return None
    found = {index: answer for part in gathered for index, answer in part.items()}
    return [Answer(found[i][0], example, found[i][1]) for i, example in enumerate(scored.examples)]


def _stop_test(tokenizer: PreTrainedTokenizerBase, stop: str | None) -> Callable[[Sequence[int]], bool]:
    """A test whether new tokens contain the stop text. It runs after each token, so it looks at the last ones first."""
    if stop is None:
        return lambda _: False
    width = len(stop.encode())  # a token is at least one byte

    def ends(row: Sequence[int]) -> bool:
        # The whole text is decoded only if the last tokens contain the stop text.
        return stop in _decoded(tokenizer, row[-width:]) and _cut(_decoded(tokenizer, row), stop) is not None

    return ends


def _text(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], stop: str | None) -> str:
    text = _decoded(tokenizer, row)
    cut = None if stop is None else _cut(text, stop)
    return text[:cut].strip()


def _cut(text: str, stop: str) -> int | None:
    """The position of the stop text; None if the text does not contain it.

    A stop text of white space counts only after something visible: models that were not trained on the task often
    write a line break before their answer.
    """
    first = 0 if stop.strip() else len(text) - len(text.lstrip())
    position = text.find(stop, first)
    return position if position >= 0 else None
