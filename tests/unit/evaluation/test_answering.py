"""Answers to a set of samples: shared out over data-parallel ranks, put back in order, cut at the task's stop text."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluation_runs import assert_same_answers
from support.forked_ranks import run_on_ranks
from support.task_files import refusal
from support.tiny_decoders import build, calls_of
from support.tiny_models import write_tiny_model

from megatron_tiedlora.data.splits import Encoding
from megatron_tiedlora.data.task import Example, Reading, Task
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import end_ids, load_tokenizer
from megatron_tiedlora.evaluation.answering import Answerer, ScoredSet, _stop_test, _text, answer_all, encode_scored
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.parallel.groups import Grid

NEW_TOKENS = 20
SIZE: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "batch_size": 4}
STOP = "s"  # a letter that some of the answers below do hold
# Ranks, tensor, pipeline: what is left is data parallel.
LAYOUTS = (pytest.param(2, 1, 1, marks=pytest.mark.slow), (4, 2, 1), (4, 1, 2))


def examples(count: int = 13, *, choices: bool = True) -> list[Example]:
    """Prompts of different lengths in no order of length, each with two to four choices."""
    draw = random.Random(11)
    found = []
    for index in range(count):
        prompt = "".join(draw.choice("abcdef ") for _ in range(draw.randint(1, 40))) + "?"
        endings = tuple("".join(draw.choice("uvwxyz") for _ in range(draw.randint(1, 9))) for _ in range(2 + index % 3))
        found.append(Example(prompt, f" {endings[0]}", f"row {index}", choices=endings if choices else ()))
    return found


def task(stop: str | None = STOP) -> Task:
    return replace(get_task("hellaswag"), stop=stop)


def scored_of(
    folder: Path, rows: list[Example], *, stop: str | None = STOP, config: Path | None = None, **changes: Any
) -> ScoredSet:
    """The samples for a tokenizer in `folder` and a generation config in `config`, by default the same folder."""
    tokenizer = load_tokenizer(folder)
    ends = end_ids(tokenizer, config or folder, vocab_size=320)
    return encode_scored(rows, Encoding(task(stop), tokenizer, Reading(), 60, ends, 320), **{**SIZE, **changes})


def answers(
    folder: Path, grid: Grid, batch_size: int, *, stop: str | None = STOP, choices: bool = True, **options: Any
) -> list[Answer]:
    scored = scored_of(folder, examples(choices=choices), stop=stop, batch_size=batch_size)
    return answer_all(Answerer(build(folder, grid=grid)), {"": scored}, grid=grid, **options)[""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Answer]:
    """One sample at a time."""
    return answers(folder, Grid(0, 1), 1)


def test_answers_stand_in_the_samples_order_and_end_before_the_stop(folder: Path, alone: list[Answer]) -> None:
    assert [answer.example for answer in alone] == examples()
    scored = scored_of(folder, examples(), stop=None)
    settings = [RowSettings(scored.encoding.end_ids, NEW_TOKENS)] * len(scored.prompts)
    prompts = Prompts([prompt.tolist() for prompt in scored.prompts], settings)
    (rows,) = generate(build(folder, grid=Grid(0, 1)), [prompts])
    texts = [scored.encoding.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert [answer.prediction for answer in alone] == [text.split(STOP)[0].strip() for text in texts]
    assert any(STOP in text for text in texts) and not all(STOP in text for text in texts)
    for answer in alone:  # each choice has a score of its own
        assert len(answer.choice_scores) == len(answer.example.choices) == len(set(answer.choice_scores))
        assert all(score < 0 for score in answer.choice_scores)


def test_samples_without_choices_have_no_scores(folder: Path, alone: list[Answer]) -> None:
    found = answers(folder, Grid(0, 1), 4, choices=False)
    assert all(answer.choice_scores == () for answer in found)
    assert [answer.prediction for answer in found] == [answer.prediction for answer in alone]


def test_the_stop_ends_decoding_and_not_only_the_text(folder: Path) -> None:
    """A stop text of several tokens (bytes here), one of which alone must not stop anything."""
    free = answers(folder, Grid(0, 1), 4, stop=None)
    text = max((answer.prediction for answer in free), key=len)
    stop = text[4:7]
    decoder, index = build(folder, grid=Grid(0, 1)), [answer.prediction for answer in free].index(text)
    with calls_of(decoder) as calls:
        scored = scored_of(folder, [examples()[index]], stop=stop)
        found = answer_all(Answerer(decoder), {"": scored}, grid=Grid(0, 1))[""]
    assert found[0].prediction == text.split(stop)[0].strip()
    assert len(calls) - 2 < NEW_TOKENS  # two calls are the choices'


def _answer_rank(folder: str, world_size: int, tp: int, pp: int) -> Any:
    grid = Grid(torch.distributed.get_rank(), world_size, tp_size=tp, pp_size=pp)
    return [answers(Path(folder), grid, batch_size) for batch_size in (2, 5, 100)]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "tp", "pp"), LAYOUTS)
def test_every_layout_gives_the_same_answers_on_rank_0(
    folder: Path, alone: list[Answer], ranks: int, tp: int, pp: int, tmp_path: Path
) -> None:
    """13 samples over two data-parallel ranks: one of them has a batch less, or a smaller one."""
    found = run_on_ranks(_answer_rank, str(folder), ranks, tp, pp, ranks=ranks, folder=tmp_path / "ranks")
    for ours in found[0]:
        assert_same_answers({"": ours}, {"": alone}, near=1e-4)
    assert all(ours == [] for others in found[1:] for ours in others)


def test_every_rank_agrees_as_often(folder: Path) -> None:
    """Whatever a rank's own sequences do: it asks after every few tokens, and after every batch."""
    asked: list[bool] = []

    def never(mine: bool) -> bool:
        asked.append(mine)
        return False

    answers(folder, Grid(0, 1), 5, agree=never)
    assert len(asked) == 3 * (NEW_TOKENS // 8 + 1)


def test_an_answer_ends_at_any_end_token_of_the_model(folder: Path, alone: list[Answer], tmp_path: Path) -> None:
    """Chat models list several in generation_config.json, of which the tokenizer knows one."""
    tokenizer = load_tokenizer(folder)
    text = alone[0].prediction
    letter = next(letter for letter in text[1:] if letter.isascii() and letter.isalnum())
    (token,) = tokenizer.encode(letter, add_special_tokens=False)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{tokenizer.eos_token_id}, {token}]}}')
    scored = scored_of(folder, examples(), config=tmp_path)
    assert scored.encoding.end_ids == {tokenizer.eos_token_id, token}
    found = answer_all(Answerer(build(folder, grid=Grid(0, 1))), {"": scored}, grid=Grid(0, 1))[""]
    assert found[0].prediction == text.split(letter)[0].strip()


def test_what_no_prediction_could_get_right_is_refused_before_decoding(folder: Path) -> None:
    """A reference without its number, and answers that nothing ends."""
    sample, tokenizer = Example("How many?", " 18", "test.jsonl:3"), load_tokenizer(folder)
    encoding = Encoding(get_task("gsm8k"), tokenizer, Reading(), 60, frozenset(), 320)
    message = refusal(lambda: encode_scored([sample], encoding, **SIZE))
    assert message.startswith("test.jsonl:3") and "#### NUMBER" in message
    tokenizer.eos_token = None
    assert "end-of-sequence" in refusal(lambda: end_ids(tokenizer, folder, vocab_size=320))


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("Denver\nQ: who", "\n", "Denver"),
        ("\n\n Denver\n", "\n", "Denver"),  # a line break before the answer is not its end
        ("\n \n", "\n", ""),
        ("18\nQuestion: next", "\nQuestion:", "18"),
        ("\nQuestion: next", "\nQuestion:", ""),
        ("18\nSo", "\nQuestion:", "18\nSo"),
        ("a\nb", None, "a\nb"),
    ],
)
def test_where_a_prediction_ends(folder: Path, text: str, stop: str | None, left: str) -> None:
    tokenizer = load_tokenizer(folder)
    row = tokenizer.encode(text, add_special_tokens=False)
    assert _text(tokenizer, row, stop) == left
    ends = [_stop_test(tokenizer, stop)(row[: count + 1]) for count in range(len(row))]
    first = next((count for count, end in enumerate(ends) if end), None)
    assert (first is None) == (stop is None or text.lstrip("\n ").find(stop.lstrip("\n ") or stop) < 0)
    if first is not None:
        assert tokenizer.decode(row[: first + 1]).endswith(str(stop))
