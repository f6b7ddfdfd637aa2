"""ROUGE-L by Google's rouge-score: F of the longest common subsequence of stemmed tokens.

Its tokens are runs of a-z and 0-9 in lower case, so a text in another script has none and scores 0. The library and
its stemmer read no data files; they are imported when the first answer is scored, since a run may never score one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from megatron_tiedlora.evaluation.answers import Answer
from megatron_tiedlora.evaluation.metrics.metric import Metric


def rouge_l(answer: Answer) -> float:
    """100 times the F of ROUGE-L, of the reference that gives the highest."""
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rougeL"], use_stemmer=True).score_multi(answer.references, answer.prediction)
    return 100.0 * float(scores["rougeL"].fmeasure)


def rouge_signature(_: Sequence[Answer]) -> str:
    """Library, variant and how several references count."""
    return f"rouge-score {version('rouge-score')}, rougeL F, stemmer; best of the references of each sample"


ROUGE_L = Metric("rougeL", rouge_l, rouge_signature)
