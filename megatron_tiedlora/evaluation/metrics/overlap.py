"""Metrics that count what an answer shares with its references, whose number may differ by sample.

BLEU is sacrebleu's with its defaults, on detokenised text. The score of a sample is its sentence BLEU (with effective
order, as sacrebleu advises); the corpus value is not the mean of these, but comes from summed n-gram counts.
ROUGE-L is that of Google's rouge-score: F of the longest common subsequence of stemmed tokens, which are runs of a-z
and 0-9 in lower case. So text in another script has none and scores 0. The library and its stemmer read no data files.
Both libraries are imported when the first answer is scored, since many runs never score one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
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


# ROUGE-L --------------------------------------------------------------------------------------------------------------


def rouge_l(answer: Answer) -> float:
    """100 times the F of ROUGE-L for the best reference.

    Tokens and definition are the library's. Its own search fills a table of all pairs of tokens, which takes minutes
    and gigabytes for a long text.
    """
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=True)
    prediction = tokenizer.tokenize(answer.prediction)
    return 100.0 * max(_f(tokenizer.tokenize(reference), prediction) for reference in answer.references)


def _f(reference: Sequence[str], prediction: Sequence[str]) -> float:
    if not reference or not prediction:
        return 0.0
    common = common_length(reference, prediction)
    precision, recall = common / len(prediction), common / len(reference)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence of two sequences.

    An integer has one bit per token of `one`. Each token of `other` takes one step of additions and masks (Crochemore
    et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem", 2001). A zero bit
    marks a position at which the length grows.
    """
    bits = {token: bytearray(len(one) // 8 + 1) for token in other}
    for index, token in enumerate(one):
        if token in bits:
            bits[token][index // 8] |= 1 << index % 8
    positions = {token: int.from_bytes(marks, "little") for token, marks in bits.items()}
    row = mask = (1 << len(one)) - 1
    for token in other:
        matches = row & positions[token]
        row = ((row + matches) | (row - matches)) & mask
    return len(one) - row.bit_count()


def rouge_signature(_: Sequence[Answer]) -> str:
    """Library, variant, and how several references count."""
    return f"rouge-score {version('rouge-score')}, rougeL F, stemmer; best of the references of each sample"


ROUGE_L = Metric("rougeL", rouge_l, rouge_signature)
