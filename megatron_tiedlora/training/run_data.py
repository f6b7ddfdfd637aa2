"""The data of a run, read and tokenised once per host, before any rank waits for another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from megatron_tiedlora.config.decoding import longest_prompt
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.cache import tokenise_once
from megatron_tiedlora.data.chat import chat_note, set_chat_template
from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.sources import mix_lines
from megatron_tiedlora.data.splits import read_split
from megatron_tiedlora.data.task import Split
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored
from megatron_tiedlora.training.plan import RunPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAINED_ON: tuple[Split, ...] = ("train", "validation")
_DRAW_STREAM = 2**32 + 1  # differs from the stream that splits off validation rows and from those of epochs (0, 1, ...)


@dataclass(frozen=True)
class RunData:
    """Tokenised splits and the tokenizer.

    Attributes:
        scored: samples to answer before and after training; None: none.
        scored_validation: samples to answer at every evaluation; None if the loss selects the best checkpoint.
        reading: what the user decided about rows.
        mix: how often the rows of each file are used, in words; empty if each is used once.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TokenDataset
    validation: TokenDataset
    scored: ScoredSet | None
    scored_validation: ScoredSet | None
    first_example: Example
    reading: Reading
    mix: tuple[str, ...] = ()

    @cached_property  # every save writes it
    def sha256(self) -> str:
        """Hash of the tokenised training and validation splits; a resumed run must have the same."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            prompts = split.prompt_lengths  # as version 0.1 stored what is supervised
            for array in (split.tokens, split.offsets, split.supervised if prompts is None else prompts):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def notes(self) -> list[str]:
        """How chats became text, what they lost, and old rules, for the first lines of a run."""
        lines = ["rows by the rules of version 0.1, with which the run began (--data_rules 1)"]
        lines = [*(lines if self.reading.first_rules else []), *self.mix]
        if self.first_example.conversation is not None:
            lines.append(f"chats by {chat_note(self.tokenizer, self.reading)}")
        for name, split in (("train", self.train), ("validation", self.validation)):
            if split.shortened_chats:
                lines.append(
                    f"{split.shortened_chats:,} {name} chats lost {split.lost_turns:,} turns at their start to fit"
                )
        return lines

    @property
    def shared_sha256(self) -> str:
        """Hash of all data that ranks must have in common."""
        scored = (part.sha256 for part in (self.scored, self.scored_validation) if part is not None)
        return " ".join([self.sha256, *scored])


def prepare_data(plan: RunPlan, *, progress: bool) -> RunData:
    """Read, check and tokenise every split of the run.

    Raises:
        UserError: a file, row, tokenizer or vocabulary does not fit.
    """
    settings = plan.settings
    model_folder = plan.source.weights_folder()  # raises for a preset, which has no files
    tokenizer, reading = load_tokenizer(settings.tokenizer or model_folder), Reading.of(settings)
    set_chat_template(tokenizer, settings.chat_template)
    check_vocabulary(tokenizer, plan.source.shape.vocab_size)
    train, validation = (read_split(settings, split, tokenizer=tokenizer) for split in _TRAINED_ON)
    train_set, validation_set = (
        tokenise_once(examples, tokenizer, max_length=settings.max_length, reading=reading, progress=progress)
        for examples in (train, validation)
    )
    return RunData(
        tokenizer,
        train_set,
        validation_set,
        _encode(plan, tokenizer, _test_examples(settings, tokenizer)),
        _encode(plan, tokenizer, [] if settings.eval_metric == "loss" else _drawn(validation, settings)),
        train[0],
        reading,
        tuple(mix_lines(example.source for example in train)),
    )


def _drawn(examples: list[Example], settings: Settings) -> list[Example]:
    """--eval_samples random validation samples, by the seed, in file order; files are often sorted."""
    order = permutation(len(examples), seed=settings.seed, stream=_DRAW_STREAM)[: settings.eval_samples]
    return [examples[index] for index in sorted(order.tolist())]


def _test_examples(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The test samples to answer before and after training: those that the task's record or the user asks for."""
    limit = get_task(settings.task).scored_rows
    if limit is None and settings.test_file is None:
        return []
    return read_split(settings, "test", tokenizer=tokenizer, limit=limit)


def _encode(plan: RunPlan, tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> ScoredSet | None:
    if not examples:
        return None
    return encode_scored(
        examples,
        get_task(plan.settings.task),
        tokenizer,
        reading=Reading.of(plan.settings),
        longest_prompt=longest_prompt(plan.settings.max_length, plan.source.shape.limit.tokens, plan.max_new_tokens),
        model_folder=plan.source.weights_folder(),
        vocab_size=plan.source.shape.vocab_size,
    )
