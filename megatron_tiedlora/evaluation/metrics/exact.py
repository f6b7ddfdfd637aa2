"""Exact match in three definitions, and SQuAD's F1; each is right where it is right for any of the references."""

from __future__ import annotations

import re
import string
from collections import Counter

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.evaluation.answers import Answer
from megatron_tiedlora.evaluation.metrics.metric import Metric, fixed

_FINAL_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: Answer) -> float:
    """100 where the prediction equals a reference, white space at the ends apart."""
    return 100.0 * (answer.prediction.strip() in {reference.strip() for reference in answer.references})


def final_number(text: str) -> str | None:
    """The first number behind `#### `, commas dropped, as GSM8K's own script extracts it; None where there is none."""
    match = _FINAL_NUMBER.search(text)
    return match.group(1).replace(",", "") if match else None


def gsm8k_exact_match(answer: Answer) -> float:
    """100 where the final number equals a reference's, as strings; a prediction without one is wrong."""
    wanted = {final_number(reference) for reference in answer.references} - {None}
    return 100.0 * (final_number(answer.prediction) in wanted)


def has_final_number(example: Example) -> None:
    """Raise UserError where no reference has a final number, so that no prediction could be right."""
    if not any(final_number(reference) for reference in example.references):
        raise UserError(f"{example.source}: no answer ends in '#### NUMBER', which metric gsm8k compares; add it")


def normalise_squad(text: str) -> str:
    """SQuAD v1.1: lower case, then no (ASCII) punctuation, then no articles, then single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(answer: Answer) -> float:
    """100 where the normalised prediction equals any normalised reference."""
    found = normalise_squad(answer.prediction)
    return 100.0 * any(found == normalise_squad(reference) for reference in answer.references)


def token_f1(prediction: str, reference: str) -> float:
    """F1 in 0..1 between the two bags of normalised tokens, 2 |common| / (|prediction| + |reference|).

    The same number as SQuAD's 2 p r / (p + r), in one division, so that equal F1 are equal floats. Without a common
    token it is 0, also where both texts are empty once normalised, as in the v1.1 script (v2.0's differs there).
    """
    found, wanted = normalise_squad(prediction).split(), normalise_squad(reference).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def squad_f1(answer: Answer) -> float:
    """100 times the best F1 over the references."""
    return 100.0 * max(token_f1(answer.prediction, reference) for reference in answer.references)


_SQUAD_RULE = "lower case, no punctuation, no articles; best of the references of each sample"

EXACT_MATCH = Metric(
    "exact_match",
    exact_match,
    fixed("exact match, white space at the ends apart; any of the references of each sample"),
)
GSM8K = Metric(
    "gsm8k",
    gsm8k_exact_match,
    fixed("GSM8K exact match: first number behind ####, commas dropped, compared as text; no number is wrong"),
    check=has_final_number,
)
SQUAD = Metric("squad", squad_exact_match, fixed(f"SQuAD v1.1 exact match: {_SQUAD_RULE}"))
SQUAD_F1 = Metric("squad_f1", squad_f1, fixed(f"SQuAD v1.1 F1 over bags of tokens: {_SQUAD_RULE}"))
