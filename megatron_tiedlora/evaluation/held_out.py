"""The rows that an evaluation answers. Every rank reads and tokenises them, and all must get the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.data.chat import set_chat_template
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.splits import read_split
from megatron_tiedlora.data.tokenizer import check_vocabulary, load_tokenizer
from megatron_tiedlora.evaluation.answering import ScoredSet, encode_scored
from megatron_tiedlora.evaluation.plan import EvaluationPlan
from megatron_tiedlora.parallel.agreement import num_differing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_held_out(plan: EvaluationPlan) -> tuple[PreTrainedTokenizerBase, ScoredSet]:
    """Read, check and tokenise the rows of the plan's split; returns their tokenizer too.

    Raises:
        UserError: names the files, rows, tokenizer or vocabulary that do not fit.
    """
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
