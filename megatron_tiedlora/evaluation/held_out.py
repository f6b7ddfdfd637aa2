"""The rows that an evaluation decodes: read and tokenised by every rank, and the same on each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.splits import read_split
from megatron_tiedlora.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored
from megatron_tiedlora.evaluation.plan import EvaluationPlan
from megatron_tiedlora.parallel.agreement import num_differing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOut:
    """The samples to decode, and their tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    scored: ScoredSet


def read_held_out(plan: EvaluationPlan) -> HeldOut:
    """Read, check and tokenise the rows of the plan's split.

    Raises:
        UserError: files, rows, tokenizer or vocabulary that do not fit, named.
    """
    settings = plan.settings
    tokenizer = load_tokenizer(settings.tokenizer or plan.source.weights_folder())
    check_vocabulary(tokenizer, plan.source.shape.vocab_size)
    examples = read_split(settings, settings.split, tokenizer=tokenizer, limit=plan.limit)
    scored = encode_scored(
        examples,
        plan.task,
        tokenizer,
        longest_prompt=plan.longest_prompt,
        model_folder=plan.source.weights_folder(),
        vocab_size=plan.source.shape.vocab_size,
    )
    return HeldOut(tokenizer, scored)


def check_same_rows(held_out: HeldOut) -> None:
    """Every rank reads the rows for itself; raise UserError where one found others than rank 0."""
    if differing := num_differing(held_out.scored.sha256):
        raise UserError(f"{differing} ranks read other rows than rank 0; give every host the same files")
