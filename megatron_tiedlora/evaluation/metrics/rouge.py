"""ROUGE-L by Google's rouge-score: F of the longest common subsequence of stemmed tokens.

Its tokens are runs of a-z and 0-9 in lower case, so text in another script has none and scores 0. The library and its
stemmer read no data files. They are imported when the first answer is scored, since many runs never score one.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from megatron_tiedlora.evaluation.metrics.metric import Answer, Metric


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
