"""What each task makes of a row: prompt, answer, references and choices, letter by letter, out of every format."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from task_files import HUB_ROWS, refusal, write, write_rows

from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.train_fields import TASK_NAMES
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example, Parts, Reading
from megatron_tiedlora.data.tasks import TASKS, get_task

EXPECTED = {
    "squad": (
        "Context: The Grotto is a replica of the grotto at Lourdes. Question: What is the Grotto a replica of? Answer:",
        " the grotto at Lourdes",
        ("the grotto at Lourdes", "Lourdes"),
        (),
    ),
    "dialogsum": (
        "#Person1#: Hello, Ann!\n#Person2#: Hello. Coffee?\nSummary:",
        " Ann offers #Person1# a coffee.",
        ("Ann offers #Person1# a coffee.",),
        (),
    ),
    "hellaswag": (
        "Roof shingle removal: A man is sitting on a roof. He",
        " starts pulling up roofing.",
        ("starts pulling up roofing.",),
        ("is ripping level tiles off.", "is holding a cube.", "sleeps.", "starts pulling up roofing."),
    ),
    "iwslt2017": (
        "Vielen Dank, Chris.\nEnglish:",
        " Thank you so much, Chris.",
        ("Thank you so much, Chris.",),
        (),
    ),
    "gsm8k": (
        "Question: Ann has 2 apples and buys 3. How many?\nAnswer:",
        " 2 + 3 = <<2+3=5>>5\n#### 5",
        ("2 + 3 = <<2+3=5>>5\n#### 5",),
        (),
    ),
}


def read(task: str, path: str, split: Any = "test", **options: Any) -> list[Example]:
    return load_split(task, split, files={split: path}, seed=0, **options)


def read_one(task: str, folder: Path, row: dict[str, Any], **options: Any) -> Example:
    (sample,) = read(task, write_rows(folder / "rows.jsonl", [row]), **options)
    return sample


# The table --------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    assert {name: (task.metrics, task.stop) for name, task in TASKS.items()} == {
        "custom": (("exact_match",), None),
        "demo": (("gsm8k",), "\nQuestion:"),
        "dialogsum": (("rougeL",), "\n"),
        "gsm8k": (("gsm8k",), "\nQuestion:"),
        "hellaswag": (("accuracy", "accuracy_loglikelihood"), "\n"),
        "iwslt2017": (("bleu",), "\n"),
        "squad": (("squad", "squad_f1"), "\n"),
    }
    assert tuple(TASKS) == TASK_NAMES and all(get_task(name).name == name for name in TASK_NAMES)


def test_what_a_record_says_of_defaults_stands_in_the_help() -> None:
    for kind in (Settings, EvaluateSettings):
        assert kind.model_fields["max_new_tokens"].description.endswith("[500, or half of a shorter context; demo 200]")
    assert EvaluateSettings.model_fields["limit"].description.endswith("[all; demo 24]")
    own = {name: (task.scored_rows, task.max_new_tokens) for name, task in TASKS.items()}
    assert own.pop("demo") == (24, 200) and set(own.values()) == {(None, 500)}


def test_settings_know_the_same_names() -> None:
    for name in TASK_NAMES:
        assert make_settings({"task": name, "train_file": "rows.jsonl"}).task == name
    message = refusal(lambda: make_settings({"task": "dialogsumm"}))
    assert message.startswith("--task dialogsumm") and "did you mean dialogsum?" in message


def test_a_task_is_one_record(tmp_path: Path) -> None:
    """What a sixth task would be: a copy of the record with other fields reads splits without any other change."""

    def parts(row: Any, source: str, _: Any) -> Parts:
        return Parts({"word": row["word"]}, None, (row["plural"],))

    plural = dataclasses.replace(
        get_task("custom"), name="plural", fields=("word", "plural"), template="One {word}, two", parts=parts
    )
    path = write_rows(tmp_path / "rows.jsonl", [{"word": "ox", "plural": "oxen"}, {"word": "ox"}])
    (sample,) = load_split(plural, "test", files={"test": path}, seed=0, limit=1)
    assert (sample.prompt, sample.completion) == ("One ox, two", " oxen")
    message = refusal(lambda: load_split(plural, "test", files={"test": path}, seed=0))
    assert f"{path}:2: field 'plural' is missing" in message and "task plural reads 'word', 'plural'" in message
    silent = dataclasses.replace(plural, parts=lambda *_: Parts({"word": "ox"}, None, ()))
    assert f"{path}:1: the row has no answer" in refusal(
        lambda: load_split(silent, "test", files={"test": path}, seed=0)
    )


# Worked rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("task", EXPECTED)
def test_a_row_of_the_hub(task: str, suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [HUB_ROWS[task]])
    for split in ("train", "test"):
        (sample,) = read(task, path, split)
        assert (sample.prompt, sample.completion, sample.references, sample.choices) == EXPECTED[task]
        assert sample.source == {".jsonl": f"{path}:1", ".json": f"{path}: item 1"}.get(suffix, f"{path}: row 1")


def test_squad_repeats_no_reference(tmp_path: Path) -> None:
    row = {**HUB_ROWS["squad"], "answers": [{"text": "a cat"}, {"text": "a cat "}, {"text": "cats"}]}
    sample = read_one("squad", tmp_path, row)
    assert (sample.completion, sample.references) == (" a cat", ("a cat", "cats"))


@pytest.mark.parametrize(
    ("task", "answer_field", "known"),
    [
        ("squad", "answers", "context, id, question, title"),
        ("dialogsum", "summary", "dialogue, id, topic"),
        ("iwslt2017", "en", "are de"),
        ("gsm8k", "answer", "are question"),
    ],
)
def test_templates_name_fields_but_not_the_answer(task: str, answer_field: str, known: str, tmp_path: Path) -> None:
    name = known.split(",")[0].removeprefix("are ")
    assert read_one(task, tmp_path, HUB_ROWS[task], reading=Reading(template=f"<{{{name}}}>")).prompt.startswith("<")
    message = refusal(lambda: read_one(task, tmp_path, HUB_ROWS[task], reading=Reading(template=f"{{{answer_field}}}")))
    assert f"no field {answer_field!r}" in message and message.endswith(known)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_iwslt_flat_rows(suffix: str, tmp_path: Path) -> None:
    (sample,) = read("iwslt2017", write_rows(tmp_path / f"a{suffix}", [HUB_ROWS["iwslt2017"]["translation"]]))
    assert (sample.prompt, sample.completion, sample.references, sample.choices) == EXPECTED["iwslt2017"]


def test_no_answer_holds_the_line_break_that_ends_it(tmp_path: Path) -> None:
    row = {"dialogue": "#Person1#: Hi.", "summary": "They\u00a0greet.\r\n\n They part.\n"}
    assert read_one("dialogsum", tmp_path, row).completion == " They\u00a0greet. They part."
    sample = read_one("iwslt2017", tmp_path, {"de": "Ja,\nbitte.", "en": "Yes,\nplease."})
    assert (sample.prompt, sample.completion) == ("Ja, bitte.\nEnglish:", " Yes, please.")


def test_custom_rows_may_list_more_answers(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Hello", "references": ["Hey", "Hello ", "Hi!"]}
    sample = read_one("custom", tmp_path, row)
    assert (sample.completion, sample.references) == (" Hello", ("Hello", "Hey", "Hi!"))
    assert read_one("custom", tmp_path, {**row, "references": None}).references == ("Hello",)
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    assert read_one("custom", tmp_path, {**chat, "references": ["Hey"]}).references == ("Hello", "Hey")
    assert "no field 'references'" in refusal(
        lambda: read_one("custom", tmp_path, row, reading=Reading(template="{references}"))  # would leak the answers
    )


# Several references -----------------------------------------------------------------------------------------


def dialogues(*rows: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"id": f"t{number}", "dialogue": dialogue, "summary": summary, "topic": f"topic {number}"}
        for number, (dialogue, summary) in enumerate(rows)
    ]


def test_dialogsum_merges_held_out_rows_of_a_dialogue(tmp_path: Path) -> None:
    rows = dialogues(("A", "a1"), ("B", "b1"), ("A", "a2"), ("C", "c1"), ("B", "b1 "), ("A", "a3"))
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for split in ("validation", "test"):
        samples = read("dialogsum", path, split)
        assert [sample.prompt[0] for sample in samples] == ["A", "B", "C"]
        assert [sample.references for sample in samples] == [("a1", "a2", "a3"), ("b1",), ("c1",)]
        assert [sample.completion for sample in samples] == [" a1", " b1", " c1"]
        assert [sample.source for sample in samples] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    # A limit counts samples, not rows; rows are merged by the dialogue, whatever else the prompt shows.
    assert read("dialogsum", path, limit=2) == read("dialogsum", path)[:2]
    by_topic = read("dialogsum", path, reading=Reading(template="{topic}: {dialogue}"))
    assert [(sample.prompt, len(sample.references)) for sample in by_topic] == [
        ("topic 0: A", 3),
        ("topic 1: B", 1),
        ("topic 3: C", 1),
    ]
    train = load_split("dialogsum", "train", files={"train": path, "validation": path}, seed=0)
    assert [(sample.prompt[0], sample.references) for sample in train] == [
        (row["dialogue"], (row["summary"].strip(),)) for row in rows
    ]


def test_dialogsum_of_the_original_release_gives_the_same(tmp_path: Path) -> None:
    original = {"fname": "test_0", "dialogue": "A", "summary1": "a1", "topic1": "t", "summary2": "a2", "summary3": "a3"}
    for suffix in (".jsonl", ".json", ".parquet"):
        path = write_rows(tmp_path / f"original{suffix}", [original])
        for split in ("train", "test"):
            (sample,) = read("dialogsum", path, split)
            assert (sample.prompt, sample.completion) == ("A\nSummary:", " a1")
            assert sample.references == ("a1", "a2", "a3")
    message = refusal(lambda: read_one("dialogsum", tmp_path, original, reading=Reading(template="{summary2}")))
    assert message.endswith("are dialogue, fname, topic1")


def test_a_dialogue_is_never_on_both_sides_of_the_cut(tmp_path: Path) -> None:
    rows = dialogues(*((f"D{number % 40}", f"s{number}") for number in range(120)))
    files = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    train = load_split("dialogsum", "train", files=files, seed=1)
    validation = load_split("dialogsum", "validation", files=files, seed=1)
    assert (len(train), len(validation)) == (114, 2)  # of 40 dialogues with three rows each 5 % are held out
    assert all(len(sample.references) == 3 for sample in validation)
    assert not {sample.prompt for sample in train} & {sample.prompt for sample in validation}


# Rows that do not fit ---------------------------------------------------------------------------------------


def changed(task: str, **fields: Any) -> dict[str, Any]:
    return {**HUB_ROWS[task], **fields}


NESTED = {"title": "t", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        # Another task's file.
        ("squad", HUB_ROWS["gsm8k"], ["'context' is missing", "'question', 'answer'", "task squad reads"]),
        ("gsm8k", NESTED, ["'question' is missing", "'title', 'paragraphs'", "task gsm8k reads 'question', 'answer'"]),
        ("gsm8k", HUB_ROWS["iwslt2017"], ["'question' is missing", "task gsm8k reads"]),
        ("dialogsum", HUB_ROWS["squad"], ["'dialogue' is missing", "task dialogsum reads"]),
        ("hellaswag", HUB_ROWS["dialogsum"], ["'activity_label' is missing", "'ctx_a', 'ctx_b', 'endings'"]),
        ("iwslt2017", {"translation": {"fr": "Oui.", "en": "Yes."}}, ["'de' is missing", "'fr', 'en'"]),
        ("iwslt2017", {"translation": "Ja."}, ["'de' is missing", "'translation'"]),
        ("demo", HUB_ROWS["squad"], ["'answer' is missing", "task demo reads"]),
        # A split without labels.
        ("hellaswag", changed("hellaswag", label=""), ["'label'", "test split has no labels", "validation split"]),
        ("hellaswag", changed("hellaswag", label=None), ["'label'", "validation split"]),
        ("hellaswag", changed("hellaswag", label=-1), ["'label'", "validation split"]),
        ("hellaswag", changed("hellaswag", label="4"), ["'label' is '4'", "expected 0 to 3"]),
        ("hellaswag", changed("hellaswag", label=True), ["'label' is True"]),
        ("hellaswag", changed("hellaswag", label="B"), ["'label' is 'B'"]),
        ("hellaswag", changed("hellaswag", endings=[]), ["'endings' is an empty list"]),
        ("hellaswag", changed("hellaswag", endings=["a", " "]), ["'endings' is empty"]),
        ("hellaswag", changed("hellaswag", endings="a"), ["'endings' is 'a', not a list"]),
        ("hellaswag", changed("hellaswag", ctx_b=None), ["'ctx_b' is missing"]),
        # No answer.
        ("squad", changed("squad", answers={"text": [], "answer_start": []}), ["'answers' is an empty list"]),
        ("squad", changed("squad", answers={"text": [""], "answer_start": [0]}), ["'answers' is empty"]),
        ("squad", changed("squad", answers={}), ["'answers' is None, not a list"]),
        ("squad", changed("squad", answers="Lourdes"), ["'answers' is 'Lourdes', not a list"]),
        ("dialogsum", {"dialogue": "A"}, ["'summary' is missing", "'dialogue'"]),
        ("dialogsum", {"dialogue": "A", "summary1": "a", "summary2": " "}, ["'summary2' is empty"]),
        ("dialogsum", {"dialogue": ["A", "B"], "summary": "a"}, ["'dialogue' is ['A', 'B'] (list)", "give a text"]),
        ("iwslt2017", {"de": "Ja.", "en": ""}, ["'en' is empty"]),
        ("gsm8k", changed("gsm8k", answer=5), ["'answer' is 5 (int)", "put it in quotes"]),
        ("custom", {"prompt": "a", "completion": "b", "references": []}, ["'references' is an empty list"]),
        ("custom", {"prompt": "a", "completion": "b", "references": "c"}, ["'references' is 'c', not a list"]),
        ("custom", {"prompt": "a", "completion": "b", "references": ["c", ""]}, ["'references' is empty"]),
    ],
)
def test_rows_that_do_not_fit(task: str, row: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n" + json.dumps(row) + "\n")
    message = refusal(lambda: read(task, path))
    assert message.startswith(f"{path}:2")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("task", TASK_NAMES)
def test_files_that_do_not_fit_any_task(task: str, tmp_path: Path) -> None:
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: read(task, write(tmp_path / "empty.jsonl", "")), "holds no rows"),
        (lambda: read(task, write(tmp_path / "rows.tsv", "a,b\n")), "unknown suffix '.tsv'"),
        (lambda: read(task, write(tmp_path / "rows.csv", "a,b\n")), "holds no rows"),
        (lambda: read(task, str(tmp_path / "none.jsonl")), "no such file"),
        (lambda: read(task, write(tmp_path / "rows.jsonl", "{]\n")), "rows.jsonl:1: broken JSON"),
    ]
    for call, words in calls:
        assert words in refusal(call)
