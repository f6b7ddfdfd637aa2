"""A model's answer, and a metric: the score of one answer, and how the scores of many become one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.examples import Example


@dataclass(frozen=True)
class Answer:
    """One answered example.

    Attributes:
        prediction: the generated text, without the prompt, cut at the task's stop text.
        choice_scores: log-likelihood in nats of each of `example.choices` after the prompt, summed over its tokens;
            empty if none were computed.
    """

    prediction: str
    example: Example
    choice_scores: tuple[float, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """The texts that the prediction is scored against: the example's references that are not blank.

        Raises:
            UserError: the example has none.
        """
        found = tuple(text for text in self.example.references if text.strip())
        if not found:
            raise UserError(f"{self.example.source}: no reference to score against; give the row an answer")
        return found


@dataclass(frozen=True)
class Metric:
    """One metric. Every score is in per cent, 0 to 100, and higher is better.

    The value of many answers is the mean of `sample`. A corpus metric has `statistics` instead: `combine` turns their
    sums over the answers into the value.

    Attributes:
        name: its key in `METRICS`.
        sample: the score of one answer.
        signature: the rule, library and version by which these answers are scored. Two values are comparable only if
            their signatures are equal.
        needs_choice_scores: whether it reads `Answer.choice_scores`, which cost a model pass per choice.
        check: raises UserError, before decoding, for an example that the metric can never score as correct.
        statistics: a fixed number of counts of one answer.
        combine: computes the corpus value from the counts, summed over the answers.
    """

    name: str
    sample: Callable[[Answer], float]
    signature: Callable[[Sequence[Answer]], str]
    needs_choice_scores: bool = False
    check: Callable[[Example], None] = lambda _: None
    statistics: Callable[[Answer], tuple[int, ...]] | None = None
    combine: Callable[[Sequence[int]], float] | None = None

    def __post_init__(self) -> None:
        assert (self.statistics is None) == (self.combine is None), self.name


def fixed(signature: str) -> Callable[[Sequence[Answer]], str]:
    """A signature that does not depend on the answers."""
    return lambda _: signature
