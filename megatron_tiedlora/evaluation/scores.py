"""Scores of many answers: each metric's value with a 95 % bootstrap interval over the samples.

Resample i of n answers is row i of `numpy.random.default_rng(seed).integers(n, size=(resamples, n))`. It depends on
nothing else, so all metrics, and all models that are scored on one test set, use the same resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.evaluation.metrics import Answer, Metric, find_metric

_PERCENTILES = (2.5, 97.5)
# Random numbers drawn at a time; this bounds the memory.
_DRAWN_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Score:
    """A metric's value over `num_samples` answers.

    Attributes:
        value: in per cent.
        low, high: ends of the 95 % percentile bootstrap interval, in per cent.
        signature: the rule, library and version of the metric.
    """

    metric: str
    value: float
    low: float
    high: float
    num_samples: int
    signature: str

    def plain(self) -> dict[str, Any]:
        """The score as it is written to files."""
        return {
            "score": self.value,
            "n": self.num_samples,
            "confidence_interval": [self.low, self.high],
            "signature": self.signature,
        }


def score_answers(
    metric_names: Sequence[str], answers: Sequence[Answer], *, seed: int = 0, resamples: int = 1000
) -> dict[str, Score]:
    """The scores by metric, in the order of `metric_names`.

    Args:
        answers: in the order of their file; the interval depends on the order.

    Raises:
        UserError: no answers, an unknown metric, or an example that a metric cannot score.
    """
    if not answers:
        raise UserError("no answers to score; the split is empty")
    scores = {}
    for metric in map(find_metric, metric_names):
        value, resampled = _bootstrap(metric, answers, seed=seed, resamples=resamples)
        low, high = np.percentile(resampled, _PERCENTILES).tolist()
        scores[metric.name] = Score(metric.name, value, low, high, len(answers), metric.signature(answers))
    return scores


def _bootstrap(metric: Metric, answers: Sequence[Answer], *, seed: int, resamples: int) -> tuple[float, Any]:
    """The metric's value, and its values on the resamples, (resamples,)."""
    num = len(answers)
    if metric.statistics is None or metric.combine is None:
        samples = [metric.sample(answer) for answer in answers]
        drawn = _resampled_sums(np.array(samples)[:, None], seed=seed, resamples=resamples)
        return math.fsum(samples) / num, np.concatenate([sums[:, 0] for sums in drawn]) / num
    counts = np.array([metric.statistics(answer) for answer in answers], dtype=np.float64)  # exact up to 2 ** 53
    combine = metric.combine
    drawn = _resampled_sums(counts, seed=seed, resamples=resamples)
    values = [combine(row) for sums in drawn for row in sums.astype(np.int64).tolist()]
    return combine(counts.sum(0).astype(np.int64).tolist()), np.array(values)


def _resampled_sums(table: Any, *, seed: int, resamples: int) -> Iterator[Any]:
    """Yield the sums over the samples of each resample of `table` (num, k), in chunks of (some, k)."""
    num = len(table)
    draw = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        indices = draw.integers(num, size=(rows, num)) + np.arange(rows)[:, None] * num
        times = np.bincount(indices.ravel(), minlength=rows * num).reshape(rows, num)
        yield times.astype(np.float64) @ table
