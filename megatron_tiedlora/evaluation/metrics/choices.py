"""Accuracy for examples with several endings, where the first reference is the correct one.

`accuracy` finds the ending in the generated text. `accuracy_loglikelihood` takes the ending with the highest
log-likelihood per character. The variant without normalisation, `acc` of lm-evaluation-harness, favours short endings
and is not reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.evaluation.metrics.exact import token_f1
from megatron_tiedlora.evaluation.metrics.metric import Answer, Metric, fixed


def checked_choices(answer: Answer) -> tuple[str, ...]:
    """The endings. Raises UserError if there are none, one is blank, or the correct one is not among them."""
    example = answer.example
    if not example.choices:
        raise UserError(f"{example.source}: no endings to choose from; accuracy needs several endings per row")
    if not all(choice.strip() for choice in example.choices):
        raise UserError(f"{example.source}: one of the {len(example.choices)} endings is empty")
    if answer.references[0].strip() not in {choice.strip() for choice in example.choices}:
        raise UserError(f"{example.source}: the right ending {answer.references[0]!r} is not among the endings")
    return example.choices


def _plain(text: str) -> str:
    """The text in lower case with single spaces."""
    return " ".join(text.lower().split())


def chosen_ending(prediction: str, choices: Sequence[str]) -> str | None:
    """The ending that a generated text means, in lower case with single spaces; None if it means no ending.

    It is the ending that equals the text, ignoring case and white space; otherwise the ending with the highest SQuAD
    F1. It is None if two different endings share the highest F1, or if all have 0 (for example with an empty text).
    """
    text = _plain(prediction)
    endings = list(dict.fromkeys(map(_plain, choices)))
    if text in endings:
        return text
    scores = [token_f1(text, ending) for ending in endings]
    best = max(scores)
    return endings[scores.index(best)] if best > 0 and scores.count(best) == 1 else None


def accuracy(answer: Answer) -> float:
    """100 if the generated text means the correct ending, else 0."""
    return 100.0 * (chosen_ending(answer.prediction, checked_choices(answer)) == _plain(answer.references[0]))


def accuracy_loglikelihood(answer: Answer) -> float:
    """100 if the correct ending has the highest log-likelihood per character (the first of equals), else 0.

    Characters are the Unicode code points of the cleaned ending, without the space that joins it to the prompt, as in
    `acc_norm` of lm-evaluation-harness. If a score is NaN, the result is 0.
    """
    choices = checked_choices(answer)
    assert len(answer.choice_scores) == len(choices), f"{answer.example.source}: {len(answer.choice_scores)} scores"
    scores = [score / len(choice) for score, choice in zip(answer.choice_scores, choices, strict=True)]
    if any(map(math.isnan, scores)):
        return 0.0
    return 100.0 * (choices[scores.index(max(scores))].strip() == answer.references[0].strip())


ACCURACY = Metric(
    "accuracy",
    accuracy,
    fixed(
        "accuracy of the generated ending: the one that equals the text but for case and white space, else the one of"
        " highest SQuAD F1 to it; a tie is wrong"
    ),
)
ACCURACY_LOGLIKELIHOOD = Metric(
    "accuracy_loglikelihood",
    accuracy_loglikelihood,
    fixed("accuracy by log-likelihood per character of the ending (acc_norm of lm-evaluation-harness)"),
    needs_choice_scores=True,
)
