"""Estimates a score, or a difference of scores, from several seeds of one run: the mean, the spread and an interval.

The value is the mean over the seeds. The spread is their standard deviation, with n - 1. Two things make the mean
uncertain: the test rows, and the seeds of training.

- Rows: all runs of a study answer the same rows, so each resample of `evaluation.results` draws the same rows for all
  runs and seeds. Resample b has the mean M_b over the seeds of the metric on its rows. BLEU is computed again for each.
- Seeds: N values estimate the standard error of their mean as spread / sqrt(N), but too small a value is likely if N is
  small. Student's t with N - 1 degrees of freedom allows for that.

The interval is the central 95 % of M_b + T spread / sqrt(N) over all resamples b and quantiles of T. With one seed it
is the bootstrap interval over the rows, and says nothing about other seeds. A difference is computed from the same rows
and seeds of both runs: the value, M_b and the spread are those of the N differences.

Simulated studies with three seeds, 200 or 1,000 rows, and seeds with a standard deviation of 0 to 5 points: this
interval contains the true mean in 96 to 98 % of them, a bootstrap over rows and seeds in 91 to 93 % (it cannot leave
the range of the seeds), and a bootstrap over the rows alone in 84 to 92 %.

Limits: T assumes that the results of seeds are normally distributed, which three seeds cannot show. T is 4.3 at N = 3
and 2.8 at N = 5, so three seeds show only differences that are larger than 2.5 times their spread.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.evaluation.metrics import find_metric
from megatron_tiedlora.evaluation.results import Score, bootstrap, interval, read_samples

_QUANTILES, _ANGLES = 1001, 100_000


@dataclass(frozen=True)
class Scored:
    """The score of one run, and its values for the resamples of the test rows, (resamples,); None without its rows."""

    score: Score
    resampled: Any


@dataclass(frozen=True)
class Estimate:
    """The mean over seeds of a score or difference, with its 95 % interval, in per cent; spread: None for one seed."""

    value: float
    low: float
    high: float
    spread: float | None
    num_seeds: int
    num_samples: int


BySeed = Mapping[int | None, Scored]  # the scores of one run; the seed None is the study's own
AllScored = Mapping[Path, Scored]  # by the folder of the score


def read_scored(scores: Mapping[Path, Score], metric: str) -> dict[Path, Scored]:
    """Return the scores of a study with their resampled values, by the folder of each score.

    Raises:
        UserError: the rows of a score cannot be read, or are not those of the other scores.
    """
    read = {folder: samples for folder in scores if (samples := read_samples(folder, find_metric(metric))) is not None}
    for folder, (table, of_rows) in read.items():
        first = next(iter(read))
        if of_rows != read[first][1] or len(table) != scores[folder].num_samples:
            raise UserError(f"{folder}: its test rows are not those of {first}; remove the folder and start again")
    tables = [table for table, _ in read.values()]
    values = bootstrap(find_metric(metric), tables) if tables else []
    resampled = {folder: drawn for folder, (_, drawn) in zip(read, values, strict=True)}
    return {folder: Scored(score, resampled.get(folder)) for folder, score in scores.items()}


def estimated(scores: BySeed) -> Estimate | None:
    """Return the mean score over the seeds; None if there is none.

    Raises:
        UserError: there are several seeds, and the rows of one of them are missing.
    """
    found = [scored.score for scored in scores.values()]
    if len(found) < 2:
        return next((Estimate(one.value, one.low, one.high, None, 1, one.num_samples) for one in found), None)
    resampled = [scored.resampled for scored in scores.values()]
    if any(drawn is None for drawn in resampled):
        raise UserError("the answers (predictions.jsonl) of a score are missing; remove its folder and start again")
    return _estimate([score.value for score in found], np.mean(resampled, axis=0), found[0].num_samples)


def difference(scores: BySeed, others: BySeed) -> Estimate | None:
    """Return the mean difference `scores` - `others` over the seeds of both, paired by seed and row; None if there is
    no such seed, or if a score has no rows."""
    pairs = [(scores[seed], others[seed]) for seed in scores if seed in others]
    if not pairs or any(one.resampled is None for pair in pairs for one in pair):
        return None
    values = [one.score.value - other.score.value for one, other in pairs]
    resampled = np.mean([one.resampled - other.resampled for one, other in pairs], axis=0)
    return _estimate(values, resampled, pairs[0][0].score.num_samples)


def averaged(estimates: Sequence[Estimate]) -> Estimate:
    """Return the mean over tasks. Their test sets are independent, so the squares of the error bars are added."""
    num, mean = len(estimates), math.fsum(one.value for one in estimates) / len(estimates)
    below = math.sqrt(sum((one.value - one.low) ** 2 for one in estimates)) / num
    above = math.sqrt(sum((one.high - one.value) ** 2 for one in estimates)) / num
    seeds, samples = min(one.num_seeds for one in estimates), sum(one.num_samples for one in estimates)
    return Estimate(mean, mean - below, mean + above, None, seeds, samples)


def _estimate(values: Sequence[float], resampled: Any, num_samples: int) -> Estimate:
    """Return the estimate from the values of the seeds, and their mean for each resample, (resamples,)."""
    num, mean = len(values), math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (num - 1)) if num > 1 else None
    noise = np.zeros(1) if spread is None else student(num - 1) * (spread / math.sqrt(num))
    return Estimate(mean, *interval(np.add.outer(resampled, noise)), spread, num, num_samples)


@cache
def student(freedom: int) -> Any:
    """Return equally likely quantiles of Student's t with `freedom` degrees of freedom, (1001,), from 0 to 1.

    With t = sqrt(freedom) tan(angle), the density of the angle is proportional to cos(angle) ** (freedom - 1).
    """
    angles = ((np.arange(_ANGLES) + 0.5) / _ANGLES - 0.5) * math.pi
    below = np.cumsum(np.cos(angles) ** (freedom - 1))
    at = np.interp(np.linspace(0, 1, _QUANTILES), (below - 0.5 * np.cos(angles) ** (freedom - 1)) / below[-1], angles)
    return math.sqrt(freedom) * np.tan(at)
