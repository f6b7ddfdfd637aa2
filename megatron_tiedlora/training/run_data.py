"""The data of a run: read and tokenised once a host, before any rank waits for another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.cache import tokenise_once
from megatron_tiedlora.data.encode import TokenDataset, encode_prompts
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.data.tasks import Split, get_task, load_split
from megatron_tiedlora.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_tiedlora.training.plan import RunPlan

# What the demo decodes before and after training: enough to see a change, short enough for two CPU cores.
DEMO_SCORED_SAMPLES = 24
# Of the demo's worked answers, 99 % are shorter; decoding stops at EOS anyway.
MAX_NEW_TOKENS = 200


@dataclass(frozen=True)
class ScoredSet:
    """Held-out samples for greedy decoding: prompts as ids, with the texts that predictions are scored against."""

    examples: tuple[Example, ...]
    prompts: tuple[NDArray[np.int32], ...]
    metric: str


@dataclass(frozen=True)
class RunData:
    """Tokenised splits, the tokenizer, and what is decoded before and after training (None: nothing)."""

    tokenizer: PreTrainedTokenizerBase
    train: TokenDataset
    validation: TokenDataset
    scored: ScoredSet | None
    first_example: Example

    @cached_property  # every save writes it
    def sha256(self) -> str:
        """Of the tokenised training and validation parts: what ranks must share, and a resumed run must find again."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation):
            for array in (split.tokens, split.offsets, split.prompt_lengths):
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def prepare_data(plan: RunPlan, *, progress: bool) -> RunData:
    """Read, check and tokenise every split of the run.

    Raises:
        UserError: files, rows, tokenizer or vocabulary that do not fit, named.
    """
    settings = plan.settings
    model_folder = plan.source.weights_folder()  # refuses a preset, which has none
    tokenizer = load_tokenizer(settings.tokenizer or model_folder)
    check_vocabulary(tokenizer, plan.source.config.vocab_size)
    train = _read(settings, "train", tokenizer)
    train_set, validation_set = (
        tokenise_once(examples, tokenizer, max_length=settings.max_length, progress=progress)
        for examples in (train, _read(settings, "validation", tokenizer))
    )
    return RunData(tokenizer, train_set, validation_set, _scored(plan, tokenizer), train[0])


def _read(
    settings: Settings, split: Split, tokenizer: PreTrainedTokenizerBase, limit: int | None = None
) -> list[Example]:
    return load_split(
        settings.task,
        split,
        files={"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file},
        seed=settings.seed,
        prompt_template=settings.prompt_template,
        tokenizer=tokenizer,
        limit=limit,
    )


def _scored(plan: RunPlan, tokenizer: PreTrainedTokenizerBase) -> ScoredSet | None:
    settings = plan.settings
    if settings.task == "demo":
        limit: int | None = DEMO_SCORED_SAMPLES
    elif settings.test_file is not None:
        limit = None
    else:
        return None
    examples = _read(settings, "test", tokenizer, limit)
    room = max(min(settings.max_length, plan.source.config.max_positions - MAX_NEW_TOKENS), 1)
    prompts = encode_prompts(tokenizer, [e.prompt for e in examples], max_length=room)
    return ScoredSet(tuple(examples), tuple(prompts), get_task(settings.task).metric)
