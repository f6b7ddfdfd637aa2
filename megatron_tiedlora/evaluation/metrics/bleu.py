"""BLEU by sacrebleu with its defaults, on detokenised text. The corpus value comes from summed n-gram counts.

The score of a sample is sacrebleu's sentence BLEU (with effective order, as sacrebleu advises). The corpus value is
not the mean of these. A sample may have any number of references. sacrebleu is imported when the first answer is
scored, since many runs never score one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_tiedlora.evaluation.metrics.metric import Answer, Metric

_ORDERS = 4


def _sentence(answer: Answer) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True).sentence_score(answer.prediction, list(answer.references))


def sentence_bleu(answer: Answer) -> float:
    """sacrebleu's sentence BLEU."""
    return float(_sentence(answer).score)


def bleu_statistics(answer: Answer) -> tuple[int, ...]:
    """Lengths of prediction and closest reference, then matched and predicted n-grams, both for each order."""
    found = _sentence(answer)
    return (found.sys_len, found.ref_len, *found.counts, *found.totals)


def corpus_bleu(sums: Sequence[int]) -> float:
    """sacrebleu's corpus BLEU of summed statistics, bit-identical to its `corpus_score`."""
    from sacrebleu.metrics import BLEU

    corpus = BLEU()
    score = BLEU.compute_bleu(
        correct=list(sums[2 : 2 + _ORDERS]),
        total=list(sums[2 + _ORDERS :]),
        sys_len=sums[0],
        ref_len=sums[1],
        smooth_method=corpus.smooth_method,
        smooth_value=corpus.smooth_value,
        effective_order=corpus.effective_order,
        max_ngram_order=corpus.max_ngram_order,
    )
    return float(score.score)


def bleu_signature(answers: Sequence[Answer]) -> str:
    """sacrebleu's own signature. It depends only on the numbers of references of the answers."""
    from sacrebleu.metrics import BLEU

    counts = [len(answer.references) for answer in answers]
    fewest, most = min(counts), max(counts)
    # sacrebleu knows its signature only after scoring; two sentences with the extreme numbers are enough.
    streams: list[Any] = [["x", "x" if number < fewest else None] for number in range(most)]
    scorer = BLEU()
    scorer.corpus_score(["x", "x"], streams)
    return str(scorer.get_signature())


BLEU_METRIC = Metric("bleu", sentence_bleu, bleu_signature, statistics=bleu_statistics, combine=corpus_bleu)
