"""The held-out rows that are answered, as ids. Every rank reads and tokenises them, and all must get the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.data.chat import chat_writer, set_chat_template
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.examples import Example, join_answer
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.splits import read_split
from megatron_tiedlora.data.task import Task
from megatron_tiedlora.data.text_ids import continuation_ids
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer
from megatron_tiedlora.evaluation.metrics import find_metric
from megatron_tiedlora.parallel.agreement import num_differing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_tiedlora.evaluation.plan import EvaluationPlan, Plans

# Settings that do not decide which rows are answered, and how.
_OWN = marked(EvaluateSettings, per_adapter=True)


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
    prompts, num_truncated = encode_prompts(tokenizer, examples, max_length=longest_prompt, reading=reading)
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


@dataclass(frozen=True)
class Questions:
    """What one adapter is to answer, and how.

    Attributes:
        batch_size: samples that a data-parallel rank decodes together.
        adapter: its name in the stage's bank; "" if the stage has one adapter at most.
    """

    scored: ScoredSet
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    batch_size: int
    adapter: str = ""


def read_questions(plans: Plans) -> dict[str, Questions]:
    """What each adapter is to answer. Rows that several answer in the same way are read once.

    Raises:
        UserError: names the files, rows, tokenizer or vocabulary that do not fit.
    """
    read: dict[str, tuple[PreTrainedTokenizerBase, ScoredSet]] = {}
    found = {}
    for name, plan in plans.items():
        same = {key: value for key, value in plan.settings.model_dump().items() if key not in _OWN}
        key = repr((same, plan.longest_prompt, plan.limit))
        if key not in read:
            read[key] = _read(plan)
        tokenizer, scored = read[key]
        found[name] = Questions(scored, tokenizer, plan.max_new_tokens, plan.settings.batch_size, name)
    return found


def _read(plan: EvaluationPlan) -> tuple[PreTrainedTokenizerBase, ScoredSet]:
    """Read, check and tokenise the rows of the plan's split; returns their tokenizer too."""
    settings = plan.settings
    tokenizer = load_tokenizer(settings.tokenizer or plan.source.weights_folder())
    set_chat_template(tokenizer, settings.chat_template)
    check_vocabulary(tokenizer, plan.source.shape.vocab_size)
    examples = read_split(settings, settings.split, tokenizer=tokenizer, limit=plan.limit)
    scored = encode_scored(
        examples,
        plan.task,
        tokenizer,
        reading=Reading.of(settings),
        longest_prompt=plan.longest_prompt,
        model_folder=plan.source.weights_folder(),
        vocab_size=plan.source.shape.vocab_size,
    )
    return tokenizer, scored


def check_same_rows(scored: Sequence[ScoredSet]) -> None:
    """Raise UserError if a rank has read other rows than rank 0, since every rank reads them itself."""
    if differing := num_differing(" ".join(some.sha256 for some in scored)):
        raise UserError(f"{count_text(differing, 'rank')} read other rows than rank 0; give every host the same files")
