"""Tokenises the held-out samples, divides them over the ranks, generates answers and returns these in order. Every rank
reads and tokenises the rows, and all ranks must get the same ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.messages import UserError, count_text
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.data.chat import chat_writer, template_end_ids
from megatron_tiedlora.data.encode import continuation_ids, decode_ids, encode_prompts
from megatron_tiedlora.data.splits import Encoding, open_encoding, read_split
from megatron_tiedlora.data.task import Example, join_answer
from megatron_tiedlora.evaluation import generate as generation
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.metrics import Answer, find_metric
from megatron_tiedlora.evaluation.sampling import GREEDY, Sampling
from megatron_tiedlora.parallel.agreement import gather_on_rank_0, num_differing
from megatron_tiedlora.parallel.groups import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_tiedlora.evaluation.plan import EvaluationPlan, EvaluationPlans

# The settings that decide neither which rows are answered nor how.
_OWN = marked(EvaluateSettings, per_adapter=True)
_decoded = partial(decode_ids, skip_special=True)
# The maximum number of full batches, of different adapters, that are decoded together. It bounds the memory.
BATCHES_AT_ONCE = 4
_Answers = dict[int, tuple[str, tuple[float, ...]]]  # the answer's text and the scores of the choices, by sample index


@dataclass(frozen=True)
class ScoredSet:
    """The tokenised held-out samples for which an adapter generates answers.

    Attributes:
        encoding: how the rows became token ids. Its `max_length` is the maximum number of tokens in a prompt.
        prompts: the token ids of each sample's prompt, with BOS.
        endings: the token ids of each choice of each sample, as it follows the prompt; empty if there are none.
        num_truncated: the number of prompts that were shortened.
        max_new_tokens: the maximum number of tokens in an answer. Prompts are shortened to leave room for them.
        batch_size: the number of samples for which a data-parallel rank generates answers at once.
        chat_note: a description of the template that wrote the text of chats; '' if the rows are not chats.
    """

    encoding: Encoding
    examples: tuple[Example, ...]
    prompts: tuple[NDArray[np.int32], ...]
    endings: tuple[tuple[tuple[int, ...], ...], ...]
    num_truncated: int
    max_new_tokens: int
    batch_size: int
    chat_note: str = ""

    @property
    def sha256(self) -> str:
        """Return a hash of prompts, references and choices, which must be equal on all ranks."""
        digest = hashlib.sha256()
        for example, prompt in zip(self.examples, self.prompts, strict=True):
            digest.update(repr((prompt.tolist(), example.references, example.choices)).encode())
        return digest.hexdigest()


def encode_scored(
    examples: Sequence[Example], encoding: Encoding, *, max_new_tokens: int, batch_size: int
) -> ScoredSet:
    """Tokenise samples as in training, with prompts shortened to `encoding.max_length` tokens. Raises UserError if a
    metric of the task cannot score an example, or if a choice has no token."""
    tokenizer, reading = encoding.tokenizer, encoding.reading
    metrics = [find_metric(name) for name in encoding.task.metrics]
    for metric in metrics:
        for example in examples:
            metric.check(example)
    for example in examples:
        if not example.prompt:
            raise UserError(f"{example.source}: the row is text without a prompt; give rows with a prompt")
    prompts, num_truncated = encode_prompts(tokenizer, examples, max_length=encoding.max_length, reading=reading)
    reads_choices, plain = any(metric.needs_choice_scores for metric in metrics), reading.special_tokens == "plain"
    choices = [  # the texts of the choices as they follow the prompt
        (example.endings or tuple(join_answer(example.prompt, choice) for choice in example.choices))
        if reads_choices
        else ()
        for example in examples
    ]
    ids = iter(continuation_ids(tokenizer, [text for texts in choices for text in texts], plain=plain))
    endings = [tuple(tuple(next(ids)) for _ in texts) for texts in choices]
    for example, prompt, of_example in zip(examples, prompts, endings, strict=True):
        encoding.check([*prompt.tolist(), *sum(of_example, ())], example.source)
        if not all(of_example):
            raise UserError(f"{example.source}: a choice has no tokens; remove the row")
    encoding = replace(encoding, end_ids=encoding.end_ids | template_end_ids(tokenizer, examples))
    note = chat_writer(tokenizer, reading) if any(example.conversation for example in examples) else ""
    samples = tuple(examples), tuple(prompts), tuple(endings), num_truncated
    return ScoredSet(encoding, *samples, max_new_tokens, batch_size, note)


def read_scored(plans: EvaluationPlans) -> dict[str, ScoredSet]:
    """Return the tokenised samples of each adapter. Rows are read once for all adapters that have the same settings.
    Raises UserError, which names the cause, if files, rows, tokenizer or vocabulary are not valid."""
    read: dict[str, ScoredSet] = {}
    found = {}
    for name, plan in plans.items():
        same = {key: value for key, value in plan.settings.model_dump().items() if key not in _OWN}
        key = repr((same, plan.longest_prompt, plan.limit))
        if key not in read:
            read[key] = _read(plan)
        found[name] = read[key]
    return found


def _read(plan: EvaluationPlan) -> ScoredSet:
    """Return the rows of the plan's split, checked and tokenised."""
    settings, folder, vocab_size = plan.settings, plan.source.weights_folder(), plan.source.shape.vocab_size
    encoding = open_encoding(settings, folder, vocab_size=vocab_size, max_length=plan.longest_prompt)
    rows = read_split(settings, settings.split, tokenizer=encoding.tokenizer, limit=plan.limit)
    batch_size = len(rows) if settings.engine == "vllm" else settings.batch_size  # vLLM makes its own batches
    return encode_scored(rows, encoding, max_new_tokens=plan.max_new_tokens, batch_size=batch_size)


def check_same_rows(scored: Sequence[ScoredSet]) -> None:
    """Raise UserError if the rows of a rank differ from the rows of rank 0. Every rank reads the rows itself."""
    if differing := num_differing(" ".join(some.sha256 for some in scored)):
        raise UserError(f"{count_text(differing, 'rank')} read different rows from rank 0; give every host the same")


class Answerer:
    """Continues prompts and scores endings with this package's decoder. A subclass may do so with another program.
    `is_last` is whether this rank has log-likelihoods."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.is_last = decoder, decoder.is_last

    def generate(self, given: Sequence[generation.Prompts], *, agree: generation.Agree = bool) -> list[list[list[int]]]:
        """See the function `generate`."""
        return generation.generate(self.decoder, given, agree=agree)

    def score(self, samples: Sequence[generation.Endings], *, adapter: str = ONLY) -> list[list[float]]:
        """See `ending_log_likelihoods`."""
        return generation.ending_log_likelihoods(self.decoder, samples, adapter=adapter)

    def close(self) -> None:
        """Free the memory beside the model, or end the other program."""
        self.decoder.close()


def answer_all(
    answerer: Answerer,
    scored: Mapping[str, ScoredSet],
    sampling: Sampling = GREEDY,
    *,
    grid: Grid,
    agree: generation.Agree = bool,
    progress: bool = False,
) -> dict[str, list[Answer]]:
    """Generate answers to the prompts of each adapter. A sampled answer depends on the index of its sample.

    The prompts are divided over the data-parallel ranks. All ranks run the same number of batches and agree on when to
    stop. With ZeRO-3, every call of the model is also a collective. A rank without prompts computes the first prompt
    again and discards the result. Up to `BATCHES_AT_ONCE` batches of different adapters run together.

    Args:
        scored: the samples by adapter name, which is ONLY if the stage has at most one adapter.
        agree: a function that gets whether this rank has finished, and returns whether all have. It may raise an error.
        progress: whether to show a progress bar.

    Returns:
        the answers by adapter name: on rank 0 in the order of the samples, on other ranks empty lists.
    """
    sets = [_AskedSet(name, own, grid, sampling) for name, own in scored.items()]
    # Tensor-parallel ranks have the same answers, and only the last stage has log-likelihoods.
    sends = grid.tp_rank == 0 and answerer.is_last
    num_samples = sum(len(some.order) for some in sets)
    with progress_bar("decoding", "sample", total=num_samples, shows=progress) as bar:
        for number in range(max(len(some.batches) for some in sets)):
            present = [some for some in sets if number < len(some.batches)]
            num_rows = [min(some.batch_size, len(some.batches[number])) for some in present]  # rank 0 has the most rows
            rooms = [BATCHES_AT_ONCE * some.scored.batch_size for some in present]
            for together in filled(zip(present, num_rows, rooms, strict=True)):
                found = answerer.generate([some.ask(number) for some in together], agree=agree)
                for some, rows in zip(together, found, strict=True):
                    some.take(answerer, rows)
                    bar.update(len(some.batches[number]))
    gathered = [gather_on_rank_0(some.mine if sends else {}, kind=_Answers) for some in sets]
    pairs = zip(sets, gathered, strict=True)
    return {some.adapter: [] if parts is None else some.answers(parts) for some, parts in pairs}


class _AskedSet:
    """The samples of one adapter, divided into batches for all data-parallel ranks.

    The longest prompts come first, so that a run with too little memory fails at once and not after hours.
    """

    def __init__(self, adapter: str, scored: ScoredSet, grid: Grid, sampling: Sampling) -> None:
        prompts = scored.prompts
        self.adapter, self.scored, self.grid = adapter, scored, grid
        self.order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        self.batch_size = min(scored.batch_size, -(-len(self.order) // grid.dp_size))
        whole = self.batch_size * grid.dp_size
        self.batches = [self.order[start : start + whole] for start in range(0, len(self.order), whole)]
        is_end = _stop_test(scored.encoding.tokenizer, scored.encoding.task.stop)
        self.settings = generation.RowSettings(scored.encoding.end_ids, scored.max_new_tokens, is_end, sampling)
        self.asked: list[int] = []  # this rank's samples in the current batch; it may be empty
        self.mine: _Answers = {}

    def ask(self, number: int) -> generation.Prompts:
        """Return the prompts of this rank's samples in a batch. If there are none, return the first of all prompts."""
        scored, start = self.scored, self.grid.dp_rank * self.batch_size
        self.asked = self.batches[number][start : start + self.batch_size]
        rows = self.asked or self.order[:1]
        ids = [scored.prompts[index].tolist() for index in rows]
        return generation.Prompts(ids, [replace(self.settings, number=index) for index in rows], self.adapter)

    def take(self, answerer: Answerer, rows: Sequence[Sequence[int]]) -> None:
        """Store the answers of the batch, and score the choices of its samples."""
        scored, encoding = self.scored, self.scored.encoding
        choice_scores: list[list[float]] = [[] for _ in rows]
        if any(scored.endings):
            samples = [(scored.prompts[i].tolist(), scored.endings[i]) for i in self.asked or self.order[:1]]
            choice_scores = answerer.score(samples, adapter=self.adapter)
        for index, row, scores in zip(self.asked, rows, choice_scores, strict=False):
            self.mine[index] = (_text(encoding.tokenizer, row, encoding.task.stop), tuple(scores))

    def answers(self, gathered: Sequence[_Answers]) -> list[Answer]:
        """Return all answers in the order of the samples, from the answers of all ranks."""
        found = {index: answer for part in gathered for index, answer in part.items()}
        return [Answer(found[i][0], example, found[i][1]) for i, example in enumerate(self.scored.examples)]


def _stop_test(tokenizer: PreTrainedTokenizerBase, stop: str | None) -> Callable[[Sequence[int]], bool]:
    """Return a function that tests whether new tokens contain the stop text. It is called after each new token."""
    stops = [] if stop is None else [stop]
    return generation.text_test(partial(_decoded, tokenizer), stops, lambda text, stop: _cut(text, stop) is not None)


def _text(tokenizer: PreTrainedTokenizerBase, row: Sequence[int], stop: str | None) -> str:
    text = _decoded(tokenizer, row)
    cut = None if stop is None else _cut(text, stop)
    return text[:cut].strip()


def _cut(text: str, stop: str) -> int | None:
    """Return the position of the stop text, or None if the text does not contain it.

    A stop text of white space counts only after visible text. Models that were not trained on the task often write a
    line break before their answer.
    """
    first = 0 if stop.strip() else len(text) - len(text.lstrip())
    position = text.find(stop, first)
    return position if position >= 0 else None
