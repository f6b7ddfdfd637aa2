"""Answers held-out samples: divides them over ranks, and puts the answers back in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from megatron_tiedlora.adapters.adapter_bank import filled
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.data.text_ids import decode_ids
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Agree, Prompts, ending_log_likelihoods, generate
from megatron_tiedlora.evaluation.held_out import Questions
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.parallel.agreement import gather_on_rank_0
from megatron_tiedlora.parallel.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_decoded = partial(decode_ids, skip_special=True)

# Rows of several adapters that are decoded together are at most those of so many batches, which bounds the memory.
BATCHES_AT_ONCE = 4


def answer_all(
    decoder: Decoder,
    questions: Sequence[Questions],
    *,
    grid: Grid,
    agree: Agree = bool,
    progress: bool = False,
) -> list[list[Answer]]:
    """Answer the prompts of each adapter by greedy decoding.

    Data-parallel ranks share the prompts. All ranks run the same number of batches, so that they can agree on
    stopping, and because every call of the model is a collective under ZeRO-3. A rank without prompts left decodes
    the first prompt again and discards the result. Up to `BATCHES_AT_ONCE` batches of different adapters are decoded
    together.

    Args:
        agree: maps "this rank's sequences are done" to "those of all ranks are"; may raise.
        progress: show a progress bar.

    Returns:
        for each adapter all answers in the samples' order on rank 0, none elsewhere.
    """
    sets = [_AskedSet(some, grid) for some in questions]
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
    return [[] if parts is None else some.answers(parts) for some, parts in zip(sets, gathered, strict=True)]


_Found = dict[int, tuple[str, tuple[float, ...]]]  # an answer's text and the scores of its choices, by sample


class _AskedSet:
    """The samples of one adapter in the batches in which it answers them.

    The longest come first, so that running out of memory shows at once and not after hours.
    """

    def __init__(self, asked: Questions, grid: Grid) -> None:
        prompts = asked.scored.prompts
        self.asked, self.grid = asked, grid
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
        return Prompts(ids, asked.scored.end_ids, asked.max_new_tokens, self.is_end, asked.adapter)

    def take(self, decoder: Decoder, indices: Sequence[int], rows: Sequence[Sequence[int]]) -> None:
        """Keep the answers of a batch, and score the choices of its samples."""
        scored = self.asked.scored
        choice_scores: list[list[float]] = [[] for _ in rows]
        if any(scored.endings):
            used = indices or self.order[:1]
            samples = [(scored.prompts[index].tolist(), scored.endings[index]) for index in used]
            choice_scores = ending_log_likelihoods(decoder, samples, adapter=self.asked.adapter)
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
