"""The rows that an evaluation decodes: read and tokenised by every rank, and the same on each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored
from megatron_tiedlora.evaluation.plan import EvaluationPlan
from megatron_tiedlora.parallel.agreement import broadcast_object, sum_over_ranks


@dataclass(frozen=True)
class HeldOut:
    """The samples to decode, and their tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    scored: ScoredSet

    @property
    def sha256(self) -> str:
        """Of prompts, references and choices: what ranks must share."""
        digest = hashlib.sha256()
        for example, prompt in zip(self.scored.examples, self.scored.prompts, strict=True):
            digest.update(repr((prompt.tolist(), example.references, example.choices)).encode())
        return digest.hexdigest()


def read_held_out(plan: EvaluationPlan) -> HeldOut:
    """Read, check and tokenise the rows of the plan's split.

    Raises:
        UserError: files, rows, tokenizer or vocabulary that do not fit, named.
    """
    settings = plan.settings
    tokenizer = load_tokenizer(settings.tokenizer or plan.source.weights_folder())
    check_vocabulary(tokenizer, plan.source.config.vocab_size)
    examples = load_split(
        plan.task,
        settings.split,
        files={"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file},
        seed=settings.seed,
        prompt_template=settings.prompt_template,
        tokenizer=tokenizer,
        limit=plan.limit,
    )
    room = plan.max_length - plan.max_new_tokens
    return HeldOut(tokenizer, encode_scored(examples, plan.task, tokenizer, longest_prompt=room))


def check_same_rows(held_out: HeldOut, device: torch.device) -> None:
    """Every rank reads the rows for itself; raise UserError where one found others than rank 0."""
    mine = held_out.sha256
    differing = sum_over_ranks([float(mine != broadcast_object(mine, device))], device)[0]
    if differing:
        raise UserError(f"{differing:.0f} ranks read other rows than rank 0; give every host the same files")
