"""Exact match in three definitions, and SQuAD's F1. All of them take the best of the references."""

from __future__ import annotations

import re
import string
from collections import Counter

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.evaluation.metrics.metric import Answer, Metric, fixed

_FINAL_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: Answer) -> float:
    """100 if the prediction equals a reference, ignoring white space at the ends, else 0."""
    return 100.0 * (answer.prediction.strip() in {reference.strip() for reference in answer.references})


def final_number(text: str) -> str | None:
    """The first number after `#### `, without commas, as GSM8K's own script extracts it; None if there is none."""
    match = _FINAL_NUMBER.search(text)
    return match.group(1).replace(",", "") if match else None


def gsm8k_exact_match(answer: Answer) -> float:
    """100 if the final number equals a reference's as a string, else 0; also 0 if the prediction has none."""
    wanted = {final_number(reference) for reference in answer.references} - {None}
    return 100.0 * (final_number(answer.prediction) in wanted)


def has_final_number(example: Example) -> None:
    """Raise UserError if no reference has a final number, since no prediction could then be correct."""
    if not any(final_number(reference) for reference in example.references):
        raise UserError(f"{example.source}: no answer ends in '#### NUMBER', which metric gsm8k compares; add it")


def normalise_squad(text: str) -> str:
    """SQuAD v1.1: lower the case, then remove (ASCII) punctuation, then articles, then repeated spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(answer: Answer) -> float:
    """100 if the normalised prediction equals any normalised reference, else 0."""
    found = normalise_squad(answer.prediction)
    return 100.0 * any(found == normalise_squad(reference) for reference in answer.references)


def token_f1(prediction: str, reference: str) -> float:
    """F1 in 0..1 of the two bags of normalised tokens, 2 |common| / (|prediction| + |reference|).

    It equals SQuAD's 2 p r / (p + r), but with one division, so that equal F1 are equal floats. Without a common token
    it is 0, even if both texts are empty after normalisation, as in the v1.1 script (v2.0 differs there).
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
