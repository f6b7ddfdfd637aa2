"""Scores of one prediction against its references, each from the task's own definition. 1.0 is right, 0.0 is wrong."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

_FINAL_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def final_number(text: str) -> str | None:
    """The number behind `####`, commas dropped, as GSM8K extracts it; None where there is none."""
    match = _FINAL_NUMBER.search(text)
    return match.group(1).replace(",", "") if match else None


def gsm8k_exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether the final number equals a reference's, as strings; a prediction without one is wrong."""
    found = final_number(prediction)
    return float(found is not None and found in {final_number(reference) for reference in references})


def normalise_squad(text: str) -> str:
    """SQuAD v1.1: lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether the normalised prediction equals any normalised reference."""
    found = normalise_squad(prediction)
    return float(any(found == normalise_squad(reference) for reference in references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """Whether the prediction equals a reference, white space at the ends apart."""
    return float(prediction.strip() in {reference.strip() for reference in references})


# By the name that the task table uses.
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "gsm8k": gsm8k_exact_match,
    "squad": squad_exact_match,
    "exact_match": exact_match,
}
