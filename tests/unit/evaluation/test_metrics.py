"""Metrics against values worked by hand, the tasks' own definitions and the libraries; intervals against a plain
bootstrap."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.task_files import refusal

from megatron_tiedlora.data.task import Example
from megatron_tiedlora.evaluation.metrics import (
    METRICS,
    Answer,
    bleu_statistics,
    chosen_ending,
    final_number,
    find_metric,
    normalise_squad,
)
from megatron_tiedlora.evaluation.results import score_answers


def answer(prediction: str, *references: str, choices: tuple[str, ...] = (), scores: tuple[float, ...] = ()) -> Answer:
    return Answer(prediction, Example("p", " c", "rows.jsonl:7", references, choices=choices), scores)


def sample(metric: str, prediction: str, *references: str, **keywords: Any) -> float:
    return METRICS[metric].sample(answer(prediction, *references, **keywords))


# --------------------------------------------------------------------------------------------- numbers and texts


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 3 = <<6*3=18>>18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -12", "-12"),
        ("#### -1,200.50", "-1200.50"),
        ("#### 5 and then #### 6", "5"),  # the first one, as GSM8K's own script
        ("#### 18.", "18."),  # and its full stop
        ("#### $18", None),
        ("####18", None),
        ("The answer is 18", None),
        ("", None),
    ],
)
def test_gsm8k_takes_the_number_behind_the_hashes(text: str, number: str | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's\tHat.", "cats hat"),
        ("a an the", ""),
        ("Theatre and another banana", "theatre and another banana"),
        ("U.S.A.", "usa"),
        ("20 %", "20"),
        ("The-end", "theend"),  # punctuation goes before articles
        ("“Über” the Hügel", "“über” hügel"),  # ASCII punctuation only
    ],
)
def test_squad_normalisation(text: str, normal: str) -> None:
    assert normalise_squad(text) == normal


GOLDS = ("Denver Broncos", "the Broncos", "Broncos")
# metric, prediction, references, score
SCORES: list[tuple[str, str, tuple[str, ...], float]] = [
    ("gsm8k", "so\n#### 1,000", ("... #### 1000",), 100),
    ("gsm8k", "#### -3", ("#### 3",), 0),
    ("gsm8k", "#### 18.0", ("#### 18",), 0),  # numbers are compared as strings
    ("gsm8k", "18", ("#### 18",), 0),
    ("gsm8k", "none", ("none",), 0),  # no number is wrong, whatever the reference
    ("gsm8k", "#### 2", ("#### 1", "#### 2"), 100),
    ("squad", "The Denver Broncos.", GOLDS, 100),
    ("squad", "broncos", GOLDS, 100),
    ("squad", "Denver", GOLDS, 0),
    ("squad", "", GOLDS, 0),
    ("squad", "the", ("a",), 100),
    ("squad_f1", "the", ("a",), 0),  # nothing in common once normalised, though exact match calls these equal
    ("squad_f1", "The Denver Broncos.", ("denver broncos",), 100),
    ("squad_f1", "the Denver Broncos team", ("Denver Broncos",), 80),  # p = 2/3, r = 1
    ("squad_f1", "no no no", ("no no",), 80),  # bags, not sets: two of three, two of two
    ("squad_f1", "blue red", ("red blue",), 100),  # order does not count
    ("squad_f1", "Denver", ("Carolina Panthers", "Denver Broncos won the game"), 40),  # p = 1, r = 1/4
    ("squad_f1", "Denver", ("Carolina",), 0),
    ("squad_f1", "", ("Denver",), 0),
    ("exact_match", " Yes\n", ("no", "Yes "), 100),  # white space at the ends only
    ("exact_match", "yes", ("Yes",), 0),
    ("exact_match", "a  b", ("a b",), 0),
    ("rougeL", "the cat is on the mat", ("the cat sat on the mat",), 500 / 6),  # 5 of 6 words in order, both ways
    ("rougeL", "The CAT, sat!", ("the cat sat",), 100),
    ("rougeL", "a b", ("a b c d",), 200 / 3),  # p = 1, r = 1/2
    ("rougeL", "b a", ("a b",), 50),  # a subsequence of one word
    ("rougeL", "he was running", ("he was runs",), 100),  # one stem; 2/3 without the stemmer
    ("rougeL", "a b", ("x y", "a b c d", "b"), 200 / 3),  # the best reference, neither first nor last nor a mean
    ("rougeL", "", ("a b",), 0),
    ("rougeL", "猫", ("猫",), 0),  # the library's tokens are a-z and 0-9
    # Effective order: three words have no 4-gram, and are right all the same; sacrebleu's sentence default gives 0.
    ("bleu", "a b c", ("a b c",), 100),
    ("bleu", "", ("a b c",), 0),
    ("bleu", "Yes, it is.", ("Yes , it is .",), 100),  # it tokenises
]


@pytest.mark.parametrize(("metric", "prediction", "references", "score"), SCORES)
def test_scores_worked_by_hand(metric: str, prediction: str, references: tuple[str, ...], score: float) -> None:
    assert sample(metric, prediction, *references) == pytest.approx(score)


# --------------------------------------------------------------------------------------------- BLEU

# n-grams matched of predicted: 4/5 3/4 2/3 1/2, lengths 5 and 5; 4/4 3/3 2/2 1/1, lengths 4 and 6.
BLEU_PAIR = [answer("a b c d e", "a b c d f"), answer("x y z w", "x y z w v u")]


def test_bleu_of_a_corpus_and_of_a_sentence() -> None:
    assert [METRICS["bleu"].sample(one) for one in BLEU_PAIR] == pytest.approx(
        [100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, 100 * math.exp(1 - 6 / 4)]
    )
    corpus = 100 * math.exp(1 - 11 / 9) * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25
    assert score_answers(["bleu"], BLEU_PAIR)["bleu"].value == pytest.approx(corpus)
    # 3/4, 2/3, 1/2 and no 4-gram of one: "exp" smoothing takes 1/2 of a match for the first order without one.
    none = [answer("a b c d", "a b c x")]
    assert score_answers(["bleu"], none)["bleu"].value == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)


def test_bleu_takes_the_closest_reference_and_the_union_of_n_grams() -> None:
    found = bleu_statistics(answer("a b c d", "a b", "c d e f g", "a b c"))
    # Lengths 2, 5 and 3: 5 and 3 are as close, the shorter counts. "a b", "b c" and "c d" are all in some reference.
    assert found == (4, 3, 4, 3, 1, 0, 4, 3, 2, 1)


def bleu_corpus(count: int, *, num_references: int | None, seed: int = 0) -> list[Answer]:
    """Noisy copies; 1 to 3 references each where `num_references` is None."""
    draw = random.Random(seed)
    words = [f"w{index}" for index in range(40)] + [",", "."]

    def noisy(text: list[str]) -> str:
        return " ".join(draw.choice(words) if draw.random() < 0.25 else word for word in text[: draw.randint(3, 30)])

    answers = []
    for _ in range(count):
        text = [draw.choice(words) for _ in range(draw.randint(3, 30))]
        number = draw.randint(1, 3) if num_references is None else num_references
        answers.append(answer(noisy(text), *(noisy(text) for _ in range(number))))
    return answers


@pytest.mark.parametrize(("num_references", "said"), [(1, "nrefs:1|"), (2, "nrefs:2|"), (None, "nrefs:var|")])
def test_bleu_is_sacrebleu_s_to_the_last_bit(num_references: int | None, said: str) -> None:
    from sacrebleu.metrics import BLEU

    answers = bleu_corpus(300, num_references=num_references)
    theirs = BLEU()
    most = max(len(one.references) for one in answers)
    streams: Any = [[(*one.references, None, None)[index] for one in answers] for index in range(most)]
    expected = theirs.corpus_score([one.prediction for one in answers], streams, n_bootstrap=1000)
    ours = score_answers(["bleu"], answers)["bleu"]
    assert ours.value == expected.score and 20 < ours.value < 80
    assert ours.signature.startswith(said) and "eff:no|tok:13a|smooth:exp" in ours.signature
    plain = BLEU()
    plain.corpus_score([one.prediction for one in answers], streams)
    assert ours.signature == str(plain.get_signature())
    assert (ours.high - ours.low) / 2 == pytest.approx(expected._ci, rel=0.1)
    assert (ours.high + ours.low) / 2 == pytest.approx(expected._mean, abs=0.3)


# --------------------------------------------------------------------------------------------- choices

ENDINGS = ("He sits down.", "He stands up.", "He runs away from the dog.", "She waits.")


@pytest.mark.parametrize(
    ("text", "ending"),
    [
        ("He stands up.", 1),
        ("  he STANDS\n up. ", 1),
        ("He stands", 1),  # F1 4/5 against 2/5
        ("He runs from dogs", 2),
        ("He", None),  # the first two are as near, and nearest
        ("banana", None),
        ("", None),
        ("...", None),
    ],
)
def test_which_ending_a_text_means(text: str, ending: int | None) -> None:
    assert chosen_ending(text, ENDINGS) == (None if ending is None else ENDINGS[ending].lower())
    for right in ENDINGS:
        expected = 100 if ending is not None and ENDINGS[ending] == right else 0
        assert sample("accuracy", text, right, choices=ENDINGS) == expected


def test_an_ending_that_is_given_word_for_word_wins_over_its_like() -> None:
    """Without punctuation these two are one text; equality comes first."""
    choices = ("He waits.", "He waits!", "No.")
    assert sample("accuracy", "he waits!", "He waits!", choices=choices) == 100
    assert sample("accuracy", "he waits", "He waits!", choices=choices) == 0
    assert sample("accuracy", "no", "No.", choices=choices) == 100
    assert sample("accuracy", "banana", "No.", choices=("No.", "no.")) == 0  # nothing in common with the one there is
    assert sample("accuracy", "He goes", "He goes.", choices=("He goes.", "he  goes.", "No.")) == 100  # one text, twice


def test_likelihood_per_character() -> None:
    """lm-evaluation-harness's acc_norm: -12 nats over 6 characters beat -9 over 3, though -9 is more likely."""
    choices = ("abcdef", "xyz")
    for right, expected in zip(choices, (100, 0), strict=True):
        for scores in (
            (-12.0, -9.0),
            (-15.0, -8.0),  # -2.5 a character against -2.67; with the leading space -2.14 against -2
            (-12.0, -6.0),  # equal: the first
        ):
            assert sample("accuracy_loglikelihood", "", right, choices=choices, scores=scores) == expected
    umlauts = ("äöü", "abcd")  # 3 characters in 6 bytes
    assert sample("accuracy_loglikelihood", "", "abcd", choices=umlauts, scores=(-6.0, -7.0)) == 100
    assert sample("accuracy_loglikelihood", "", "abcdef", choices=choices, scores=(math.nan, -6.0)) == 0
    assert sample("accuracy_loglikelihood", "", "xyz", choices=choices, scores=(-math.inf, -6.0)) == 100
    assert [name for name, metric in METRICS.items() if metric.needs_choice_scores] == ["accuracy_loglikelihood"]


@pytest.mark.parametrize("metric", ["accuracy", "accuracy_loglikelihood"])
@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ((), "the row has no endings"),
        (("right", " "), "one of the 2 endings is empty"),
        (("a", "b"), "the endings lack the correct one, 'right'"),
    ],
)
def test_endings_that_cannot_be_scored(metric: str, choices: tuple[str, ...], said: str) -> None:
    message = refusal(lambda: sample(metric, "x", "right", choices=choices, scores=(-1.0, -2.0)))
    assert message.startswith(f"rows.jsonl:7: {said}")


# --------------------------------------------------------------------------------------------- all metrics


def test_every_task_s_metrics_exist() -> None:
    from megatron_tiedlora.data.tasks import TASKS

    assert {name for task in TASKS.values() for name in task.metrics} <= METRICS.keys()
    for name, metric in METRICS.items():
        assert metric.name == name
        right, wrong = (
            metric.sample(answer(text, "#### 7 it is so", choices=("#### 7 it is so", "#### 8 not"), scores=scores))
            for text, scores in (("#### 7 it is so", (-1.0, -2.0)), ("#### 8 not", (-3.0, -1.0)))
        )
        assert right == pytest.approx(100) and 0 <= wrong < 50, name


@pytest.mark.parametrize("metric", METRICS)
def test_blank_references_do_not_count(metric: str) -> None:
    """An empty one beside a real one changes nothing, not even BLEU's closest length; empty ones alone are an error."""
    keywords: Any = {"choices": ("#### 7 b", "c"), "scores": (-1.0, -9.0)}
    for text in ("", "#### 7", "x"):
        alone = sample(metric, text, "#### 7 b", **keywords)
        assert sample(metric, text, " ", "#### 7 b", "", **keywords) == alone
    assert sample(metric, "", "", "word", choices=("word", "c"), scores=(-9.0, -1.0)) == 0
    blank = [answer("x", "", " \n", **keywords)]
    assert refusal(lambda: score_answers([metric], blank)).startswith("rows.jsonl:7: the row has no reference answer")


def test_unknown_metric_and_no_answers() -> None:
    assert refusal(lambda: find_metric("rouge1")).startswith(
        "metric 'rouge1' is unknown; use one of exact_match, gsm8k, "
    )
    assert "no answers to score" in refusal(lambda: score_answers(["squad"], []))


def test_no_network_no_data_and_no_library_before_it_is_needed(tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from megatron_tiedlora.evaluation.results import score_answers
from megatron_tiedlora.evaluation.metrics import METRICS, Answer
assert not {"nltk", "rouge_score", "sacrebleu"} & sys.modules.keys()
from megatron_tiedlora.data.task import Example
example = Example("p", " Running dogs", "here", choices=("Running dogs", "No cats"))
scores = score_answers(list(METRICS), [Answer("runs dog", example, (-1.0, -2.0))])
print(*(f"{name}={score.value:.1f}" for name, score in scores.items()))
"""
    homes = dict.fromkeys(("HOME", "HF_HOME", "NLTK_DATA"), str(tmp_path))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **homes}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for said in ("exact_match=0.0", "rougeL=100.0", "accuracy_loglikelihood=100.0"):
        assert said in done.stdout
    assert not list(tmp_path.iterdir())  # and nothing is written at home


# --------------------------------------------------------------------------------------------- intervals


def test_the_interval_is_a_percentile_bootstrap() -> None:
    """1,200 answers, so that the resamples are drawn in pieces; against the plain computation and the normal one."""
    draw = random.Random(1)
    answers = [answer("the red cat" if draw.random() < 0.3 else f"cat {draw.random()}", "red cat") for _ in range(1200)]
    for name in ("squad", "squad_f1"):
        score = score_answers([name], answers, seed=5, resamples=2000)[name]
        samples = np.array([METRICS[name].sample(one) for one in answers])
        indices = np.random.default_rng(5).integers(1200, size=(2000, 1200))
        means = sorted(samples[indices].mean(axis=1))
        assert score.value == pytest.approx(samples.mean()) and score.num_samples == 1200
        # The 2.5th percentile of 2,000 lies between the 50th and 51st, at rank 0.025 * 1999 = 49.975 from 0.
        assert score.low == pytest.approx(means[49] + 0.975 * (means[50] - means[49]))
        assert score.high == pytest.approx(means[1949] + 0.025 * (means[1950] - means[1949]))
        half = 1.96 * samples.std() / math.sqrt(1200)
        assert score.low == pytest.approx(samples.mean() - half, abs=0.1 * half)
        assert score.high == pytest.approx(samples.mean() + half, abs=0.1 * half)


def test_the_corpus_s_interval_recombines_resampled_counts() -> None:
    from sacrebleu.metrics import BLEU

    answers = bleu_corpus(40, num_references=1, seed=3)
    score = score_answers(["bleu"], answers, seed=2, resamples=200)["bleu"]
    values = []
    for indices in np.random.default_rng(2).integers(40, size=(200, 40)):
        chosen = [answers[index] for index in indices]
        streams = [[one.references[0] for one in chosen]]
        values.append(BLEU().corpus_score([one.prediction for one in chosen], streams).score)
    assert [score.low, score.high] == np.percentile(values, [2.5, 97.5]).tolist()


def test_scores_depend_on_the_seed_and_on_nothing_else() -> None:
    answers = bleu_corpus(50, num_references=None)
    both = score_answers(["bleu", "rougeL"], answers)
    assert list(both) == ["bleu", "rougeL"]
    for _ in range(2):
        assert both["rougeL"] == score_answers(["rougeL"], answers)["rougeL"]
    other = score_answers(["rougeL"], answers, seed=1)["rougeL"]
    assert other.value == both["rougeL"].value and other.low != both["rougeL"].low
    assert both["rougeL"].low < both["rougeL"].value < both["rougeL"].high
    assert both["rougeL"].signature.endswith("rougeL F, stemmer; best of the references of each sample")


@pytest.mark.parametrize("metric", ["rougeL", "bleu"])
@pytest.mark.parametrize("count", [1, 30])
def test_equal_answers_have_an_interval_of_one_point(metric: str, count: int) -> None:
    score = score_answers([metric], [answer("a b c d e f", "a b c d e g")] * count)[metric]
    assert 0 < score.value < 100
    assert score.low == pytest.approx(score.value) and score.high == pytest.approx(score.value)
