"""What a metric is: a score for one answer, and how the scores of many make one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.evaluation.answers import Answer


def _accepts(_: Example) -> None:
    """Any example can be scored."""


@dataclass(frozen=True)
class Metric:
    """One metric. Every score is in per cent, 0 to 100, and higher is better.

    The value of many answers is the mean of `sample`, unless the metric is one of a whole corpus: it then has
    `statistics`, whose sums over the answers `combine` turns into the value.

    Attributes:
        name: its key in `METRICS`.
        sample: the score of one answer.
        signature: says by which rule, library and version these answers are scored; two values compare only where
            their signatures agree.
        needs_choice_scores: whether it reads `Answer.choice_scores`, which cost a pass of the model for each choice.
        check: raises UserError for an example that the metric can never score as right, before anything is decoded.
        statistics: the counts of one answer, always the same number of them.
        combine: the corpus's value from the counts, summed over its answers.
    """

    name: str
    sample: Callable[[Answer], float]
    signature: Callable[[Sequence[Answer]], str]
    needs_choice_scores: bool = False
    check: Callable[[Example], None] = _accepts
    statistics: Callable[[Answer], tuple[int, ...]] | None = None
    combine: Callable[[Sequence[int]], float] | None = None

    def __post_init__(self) -> None:
        assert (self.statistics is None) == (self.combine is None), self.name


def fixed(signature: str) -> Callable[[Sequence[Answer]], str]:
    """A signature that does not depend on the answers."""
    return lambda _: signature
