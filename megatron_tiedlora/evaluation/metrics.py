"""Defines the answer of a model, the metrics, and a table of metrics by name. Nothing is downloaded.

The definitions come from the tasks or from reference libraries. The libraries are imported when the first answer is
scored, because many runs do not score answers. Exact match and F1 use the reference with the highest score.

`accuracy` compares the ending that the generated text matches with the correct ending, which is the first reference.
`accuracy_loglikelihood` chooses the ending with the highest log-likelihood per character. lm-evaluation-harness also
has `acc`, the choice without division by length. `acc` favours short endings and is not reported here.

BLEU is computed by sacrebleu with its defaults, on detokenised text. The score of a sample is its sentence BLEU (with
effective order, as sacrebleu advises). The corpus value is not the mean of these scores, but is computed from summed
n-gram counts. ROUGE-L follows Google's rouge-score. It is the F-measure of the longest common subsequence of stemmed
tokens. Tokens are runs of a-z and 0-9 in lower case, so text in another script has no tokens and scores 0.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.data.task import Example

_FINAL_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answer:
    """A model's answer to an example.

    Attributes:
        prediction: the generated text, without the prompt, cut at the task's stop text.
        choice_scores: the log-likelihood in nats of each of `example.choices` after the prompt, summed over its tokens;
            empty if they were not computed.
    """

    prediction: str
    example: Example
    choice_scores: tuple[float, ...] = ()

    @property
    def references(self) -> tuple[str, ...]:
        """Return the example's references that are not blank. Raises UserError if there are none."""
        found = tuple(text for text in self.example.references if text.strip())
        if not found:
            raise UserError(f"{self.example.source}: the row has no reference answer; add one, or remove the row")
        return found


@dataclass(frozen=True)
class Metric:
    """A metric. Every score is in per cent, 0 to 100, and higher is better.

    The value for many answers is the mean of their scores by `sample`, or it is computed by `corpus`.

    Attributes:
        name: the name in `METRICS`.
        sample: a function that returns the score of one answer.
        signature: the rule, library and version of the metric, or a function that returns them for all answers. Two
            values are comparable only if their signatures are equal.
        needs_choice_scores: whether the metric reads `Answer.choice_scores`, for which the model scores each choice.
        check: a function that raises UserError, before decoding, for an example that can never be scored as correct.
        corpus: a function answer -> a fixed number of counts, and a function sums of these counts -> the value.
    """

    name: str
    sample: Callable[[Answer], float]
    signature: str | Callable[[Sequence[Answer]], str]
    needs_choice_scores: bool = False
    check: Callable[[Example], None] = lambda _: None
    corpus: tuple[Callable[[Answer], tuple[int, ...]], Callable[[Sequence[int]], float]] | None = None


# Exact match and F1 -------------------------------------------------------------------------------------------------


def match(normalise: Callable[[str], str | None]) -> Callable[[Answer], float]:
    """Return a function that returns 100 if the normalised prediction equals a normalised reference, otherwise 0.

    A text that `normalise` returns None for equals no other.
    """

    def score(answer: Answer) -> float:
        wanted = set(map(normalise, answer.references)) - {None}
        return 100.0 * (normalise(answer.prediction) in wanted)

    return score


def final_number(text: str) -> str | None:
    """Return the first number after `#### `, without commas, as in GSM8K's own script. Return None if there is none."""
    match = _FINAL_NUMBER.search(text)
    return match.group(1).replace(",", "") if match else None


def has_final_number(example: Example) -> None:
    """Raise UserError if no reference has a final number, because no prediction could then be correct."""
    if not any(final_number(reference) for reference in example.references):
        raise UserError(f"{example.source}: no answer ends with '#### NUMBER', which metric gsm8k compares; add it")


def normalise_squad(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation, articles and repeated spaces, as in SQuAD v1.1."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 (0 to 1) of two multisets of normalised tokens, 2 |common| / (|prediction| + |reference|).

    It equals SQuAD's 2 p r / (p + r), but uses one division, so that equal F1 values are equal floats. Without a common
    token it is 0, even if both texts are empty after normalisation, as in the v1.1 script (v2.0 differs here).
    """
    found, wanted = normalise_squad(prediction).split(), normalise_squad(reference).split()
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def squad_f1(answer: Answer) -> float:
    """Return 100 times the highest F1 over the references."""
    return 100.0 * max(token_f1(answer.prediction, reference) for reference in answer.references)


# Several endings ----------------------------------------------------------------------------------------------------


def checked_choices(answer: Answer) -> tuple[str, ...]:
    """Return the endings. Raises UserError if there are none, if one is blank, or if the correct one is missing."""
    example = answer.example
    if not example.choices:
        raise UserError(f"{example.source}: the row has no endings, but accuracy needs several; add endings")
    if not all(choice.strip() for choice in example.choices):
        raise UserError(f"{example.source}: one of the {len(example.choices)} endings is empty; add its text")
    if answer.references[0].strip() not in {choice.strip() for choice in example.choices}:
        raise UserError(f"{example.source}: the endings lack the correct one, {answer.references[0]!r}; add it")
    return example.choices


def _plain(text: str) -> str:
    """Return the text in lower case with single spaces."""
    return " ".join(text.lower().split())


def chosen_ending(prediction: str, choices: Sequence[str]) -> str | None:
    """Return the ending that a generated text matches, in lower case with single spaces, or None if it matches none.

    An ending matches if it equals the text, ignoring case and white space. Otherwise the ending with the highest SQuAD
    F1 matches. None matches if two different endings have the highest F1, or if every F1 is 0 (as for an empty text).
    """
    text = _plain(prediction)
    endings = list(dict.fromkeys(map(_plain, choices)))
    if text in endings:
        return text
    scores = [token_f1(text, ending) for ending in endings]
    best = max(scores)
    return endings[scores.index(best)] if best > 0 and scores.count(best) == 1 else None


def accuracy(answer: Answer) -> float:
    """Return 100 if the generated text matches the correct ending. Otherwise return 0."""
    return 100.0 * (chosen_ending(answer.prediction, checked_choices(answer)) == _plain(answer.references[0]))


def accuracy_loglikelihood(answer: Answer) -> float:
    """Return 100 if the correct ending has the highest log-likelihood per character. Otherwise return 0.

    If two endings have equal values, the first is chosen. Characters are the Unicode code points of the cleaned ending
    without the space that joins it to the prompt, as in `acc_norm` of lm-evaluation-harness. A NaN score gives 0.
    """
    choices = checked_choices(answer)
    assert len(answer.choice_scores) == len(choices), f"{answer.example.source}: {len(answer.choice_scores)} scores"
    scores = [score / len(choice) for score, choice in zip(answer.choice_scores, choices, strict=True)]
    if any(map(math.isnan, scores)):
        return 0.0
    return 100.0 * (choices[scores.index(max(scores))].strip() == answer.references[0].strip())


# BLEU ---------------------------------------------------------------------------------------------------------------


def sentence_bleu(answer: Answer) -> Any:
    """Return sacrebleu's sentence BLEU, including the counts from which it is computed."""
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True).sentence_score(answer.prediction, list(answer.references))


def bleu_statistics(answer: Answer) -> tuple[int, ...]:
    """Return the lengths of prediction and closest reference, and for each n the counts of matched and all n-grams."""
    found = sentence_bleu(answer)
    return (found.sys_len, found.ref_len, *found.counts, *found.totals)


def corpus_bleu(sums: Sequence[int]) -> float:
    """Return sacrebleu's corpus BLEU from summed statistics. It is bit-identical to the result of `corpus_score`."""
    from sacrebleu.metrics import BLEU

    corpus, orders = BLEU(), len(sums) // 2 - 1
    score = BLEU.compute_bleu(
        correct=list(sums[2 : 2 + orders]),
        total=list(sums[2 + orders :]),
        sys_len=sums[0],
        ref_len=sums[1],
        smooth_method=corpus.smooth_method,
        smooth_value=corpus.smooth_value,
        effective_order=corpus.effective_order,
        max_ngram_order=corpus.max_ngram_order,
    )
    return float(score.score)


def bleu_signature(answers: Sequence[Answer]) -> str:
    """Return sacrebleu's own signature. It depends only on the number of references of the answers."""
    from sacrebleu.metrics import BLEU

    counts = [len(answer.references) for answer in answers]
    fewest, most = min(counts), max(counts)
    # sacrebleu knows its signature only after scoring. Two sentences with the fewest and most references are enough.
    streams: list[Any] = [["x", "x" if number < fewest else None] for number in range(most)]
    scorer = BLEU()
    scorer.corpus_score(["x", "x"], streams)
    return str(scorer.get_signature())


# ROUGE-L ------------------------------------------------------------------------------------------------------------


def rouge_l(answer: Answer) -> float:
    """Return 100 times the highest ROUGE-L F-measure over the references.

    Tokens and definition are the same as in the library. The library's own search is not used. It fills a table of all
    pairs of tokens, which takes minutes and gigabytes for a long text.
    """
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer, best = DefaultTokenizer(use_stemmer=True), 0.0
    prediction = tokenizer.tokenize(answer.prediction)
    for text in answer.references:
        reference = tokenizer.tokenize(text)
        if common := common_length(reference, prediction):
            precision, recall = common / len(prediction), common / len(reference)
            best = max(best, 2 * precision * recall / (precision + recall))
    return 100.0 * best


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence of two sequences.

    An integer has one bit per token of `one`. Each token of `other` updates it with a few additions and masks
    (Crochemore et al., "A fast and practical bit-vector algorithm for the longest common subsequence problem", 2001). A
    zero bit marks a position at which the length grows.
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


# All ----------------------------------------------------------------------------------------------------------------

_EXACT_RULE = "exact match, white space at the ends apart; any of the references of each sample"
_SQUAD_RULE = "lower case, no punctuation, no articles; best of the references of each sample"
_ROUGE_RULE = "rouge-score {}, rougeL F, stemmer; best of the references of each sample"
_BLEU_OF_CORPUS = bleu_statistics, corpus_bleu
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("exact_match", match(str.strip), _EXACT_RULE),
        Metric(
            "gsm8k",
            match(final_number),
            "GSM8K exact match: first number behind ####, commas dropped, compared as text; no number is wrong",
            check=has_final_number,
        ),
        Metric("squad", match(normalise_squad), f"SQuAD v1.1 exact match: {_SQUAD_RULE}"),
        Metric("squad_f1", squad_f1, f"SQuAD v1.1 F1 over bags of tokens: {_SQUAD_RULE}"),
        Metric("rougeL", rouge_l, lambda _: _ROUGE_RULE.format(version("rouge-score"))),
        Metric("bleu", lambda answer: float(sentence_bleu(answer).score), bleu_signature, corpus=_BLEU_OF_CORPUS),
        Metric(
            "accuracy",
            accuracy,
            "accuracy of the generated ending: the one that equals the text but for case and white space, else the one"
            " of highest SQuAD F1 to it; a tie is wrong",
        ),
        Metric(
            "accuracy_loglikelihood",
            accuracy_loglikelihood,
            "accuracy by log-likelihood per character of the ending (acc_norm of lm-evaluation-harness)",
            needs_choice_scores=True,
        ),
    )
}


def find_metric(name: str) -> Metric:
    """Return the metric with this name. Raises UserError, which lists the metrics, if there is no such metric."""
    if name not in METRICS:
        raise UserError(f"metric {name!r} is unknown; use one of {', '.join(METRICS)}")
    return METRICS[name]
