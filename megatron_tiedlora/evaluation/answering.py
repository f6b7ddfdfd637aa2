"""The held-out samples that are answered, as ids, and their answers: divides them over ranks, and puts the answers back
in order. Every rank reads and tokenises the rows, and all must get the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.adapters.adapter_bank import filled
from megatron_tiedlora.base.errors import UserError, count_text
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.data.chat import chat_writer, set_chat_template
from megatron_tiedlora.data.encode import continuation_ids, decode_ids, encode_prompts
from megatron_tiedlora.data.splits import read_split
from megatron_tiedlora.data.task import Example, Reading, Task, join_answer
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Agree, Prompts, ending_log_likelihoods, generate
from megatron_tiedlora.evaluation.metrics import Answer, find_metric
from megatron_tiedlora.parallel.agreement import gather_on_rank_0, num_differing
from megatron_tiedlora.parallel.groups import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_tiedlora.evaluation.plan import EvaluationPlan, Plans

# Settings that do not decide which rows are answered, and how.
_OWN = marked(EvaluateSettings, per_adapter=True)
_decoded = partial(decode_ids, skip_special=True)
# Rows of several adapters that are decoded together are at most those of so many batches, which bounds the memory.
BATCHES_AT_ONCE = 4
_Found = dict[int, tuple[str, tuple[float, ...]]]  # an answer's text and the scores of its choices, by sample


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
    reading: Reading,
    longest_prompt: int,
    model_folder: Path,
    vocab_size: int,
) -> ScoredSet:
    """Tokenise samples as training does, with prompts truncated to `longest_prompt` tokens.

    Args:
        reading: what the user decided about rows.
        model_folder: its files name tokens that end a sequence, in addition to the tokenizer's.
        vocab_size: rows of the model's embedding.

    Raises:
        UserError: the tokenizer has no end token, the task's metrics cannot score an example, or a choice has no
            token.
    """
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
    choices: list[tuple[str, ...]] = [()] * len(examples)
    if reads_choices:  # as they follow the prompt
        choices = [
            example.endings or tuple(join_answer(example.prompt, choice) for choice in example.choices)
            for example in examples
        ]
    plain = reading.special_tokens == "plain"
    ids = iter(continuation_ids(tokenizer, [text for texts in choices for text in texts], plain=plain))
    endings = [tuple(tuple(next(ids)) for _ in texts) for texts in choices]
    for example, of_example in zip(examples, endings, strict=True):
        if not all(of_example):
            raise UserError(f"{example.source}: a choice has no token; remove the row")
    note = chat_writer(tokenizer, reading) if any(example.conversation for example in examples) else ""
    return ScoredSet(task, tuple(examples), tuple(prompts), tuple(endings), num_truncated, ends, note)


@dataclass(frozen=True)
class Questions:
    """What one adapter is to answer, and how.

    Attributes:
        batch_size: samples that a data-parallel rank decodes together.
    """

    scored: ScoredSet
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    batch_size: int


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
        found[name] = Questions(scored, tokenizer, plan.max_new_tokens, plan.settings.batch_size)
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


def answer_all(
    decoder: Decoder,
    questions: Mapping[str, Questions],
    *,
    grid: Grid,
    agree: Agree = bool,
    progress: bool = False,
) -> dict[str, list[Answer]]:
    """Answer the prompts of each adapter by greedy decoding.

    Data-parallel ranks share the prompts. All ranks run the same number of batches, so that they can agree on
    stopping, and because every call of the model is a collective under ZeRO-3. A rank without prompts left decodes
    the first prompt again and discards the result. Up to `BATCHES_AT_ONCE` batches of different adapters are decoded
    together.

    Args:
        questions: by the adapter's name in the stage's bank; "" if the stage has one adapter at most.
        agree: maps "this rank's sequences are done" to "those of all ranks are"; may raise.
        progress: show a progress bar.

    Returns:
        by the same names all answers in the samples' order on rank 0, none elsewhere.
    """
    sets = [_AskedSet(name, asked, grid) for name, asked in questions.items()]
    # Tensor-parallel ranks have the same answers, and only the last stage has log-likelihoods.
    sends = grid.tp_rank == 0 and decoder.is_last
    num_samples = sum(len(some.order) for some in sets)
    with progress_bar("decoding", "sample", total=num_samples, shows=progress) as bar:
        for number in range(max(some.num_batches for some in sets)):
            present = [some for some in sets if number < some.num_batches]
            num_rows = [min(some.batch_size, some.num_asked(number)) for some in present]  # the first rank has most
            rooms = [BATCHES_AT_ONCE * some.asked.batch_size for some in present]
            for together in filled(present, num_rows, rooms):
                asked = [some.batch(number) for some in together]
                prompts = [some.prompts(indices) for some, indices in zip(together, asked, strict=True)]
                found = generate(decoder, prompts, agree=agree)
                for some, indices, rows in zip(together, asked, found, strict=True):
                    some.take(decoder, indices, rows)
                    bar.update(some.num_asked(number))
    gathered = [gather_on_rank_0(some.mine if sends else {}, kind=_Found) for some in sets]
    pairs = zip(sets, gathered, strict=True)
    return {some.adapter: [] if parts is None else some.answers(parts) for some, parts in pairs}


class _AskedSet:
    """The samples of one adapter in the batches in which it answers them.

    The longest come first, so that running out of memory shows at once and not after hours.
    """

    def __init__(self, adapter: str, asked: Questions, grid: Grid) -> None:
        prompts = asked.scored.prompts
        self.adapter, self.asked, self.grid = adapter, asked, grid
        self.order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        self.batch_size = min(asked.batch_size, -(-len(self.order) // grid.dp_size))
        self.is_end = _stop_test(asked.tokenizer, asked.scored.task.stop)
        self.mine: _Found = {}

    @property
    def num_batches(self) -> int:
        """How many batches every data-parallel rank decodes."""
        return -(-len(self.order) // (self.batch_size * self.grid.dp_size))

    def num_asked(self, number: int) -> int:
        """How many samples all ranks answer in a batch."""
        whole = self.batch_size * self.grid.dp_size
        return min(whole, len(self.order) - number * whole)

    def batch(self, number: int) -> list[int]:
        """This rank's samples in a batch; there may be none."""
        start = (number * self.grid.dp_size + self.grid.dp_rank) * self.batch_size
        return self.order[start : start + self.batch_size]

    def prompts(self, indices: Sequence[int]) -> Prompts:
        """The prompts of this rank's samples."""
        ids = [self.asked.scored.prompts[index].tolist() for index in indices or self.order[:1]]
        asked = self.asked
        return Prompts(ids, asked.scored.end_ids, asked.max_new_tokens, self.is_end, self.adapter)

    def take(self, decoder: Decoder, indices: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Keep the answers of a batch, and score the choices of its samples."""
        scored = self.asked.scored
        choice_scores: list[list[float]] = [[] for _ in rows]
        if any(scored.endings):
            used = indices or self.order[:1]
            samples = [(scored.prompts[index].tolist(), scored.endings[index]) for index in used]
            choice_scores = ending_log_likelihoods(decoder, samples, adapter=self.adapter)
        for index, row, scores in zip(indices, rows, choice_scores, strict=False):
            self.mine[index] = (_text(self.asked.tokenizer, row, scored.task.stop), tuple(scores))

    def answers(self, gathered: Sequence[_Found]) -> list[Answer]:
        """All answers in the samples' order, from those of all ranks."""
        found = {index: answer for part in gathered for index, answer in part.items()}
        return [Answer(found[i][0], example, found[i][1]) for i, example in enumerate(self.asked.scored.examples)]


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
