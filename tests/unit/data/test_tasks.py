"""What each task makes of a row: prompt, answer, references and choices, letter by letter, out of every format."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from support.folders import SHARED_DATA
from support.task_files import HUB_ROWS, refusal, write, write_rows

from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.settings import TASK_NAMES, Settings, make_settings
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example, Parts, Reading
from megatron_tiedlora.data.tasks import TASKS, demo, get_task
from megatron_tiedlora.evaluation.metrics import METRICS, Answer

# Prompt and completion of each task's row of the hub, and what it has besides: further references, or choices.
EXPECTED = {
    "squad": (
        "Context: The Grotto is a replica of the grotto at Lourdes. Question: What is the Grotto a replica of? Answer:",
        " the grotto at Lourdes",
    ),
    "dialogsum": (
        "#Person1#: Hello, Ann!\n#Person2#: Hello. Coffee?\nSummary:",
        " Ann offers #Person1# a coffee.",
    ),
    "hellaswag": ("Roof shingle removal: A man is sitting on a roof. He", " starts pulling up roofing."),
    "iwslt2017": ("Vielen Dank, Chris.\nEnglish:", " Thank you so much, Chris."),
    "gsm8k": ("Question: Ann has 2 apples and buys 3. How many?\nAnswer:", " 2 + 3 = <<2+3=5>>5\n#### 5"),
}
MORE_REFERENCES = {"squad": ("Lourdes",)}
CHOICES = {
    "hellaswag": ("is ripping level tiles off.", "is holding a cube.", "sleeps.", "starts pulling up roofing."),
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
    assert tuple(TASKS) == TASK_NAMES
    for name in TASK_NAMES:
        assert get_task(name).name == make_settings({"task": name, "train_file": "rows.jsonl"}).task == name


def test_what_a_record_says_of_defaults_stands_in_the_help() -> None:
    for kind in (Settings, EvaluateSettings):
        assert kind.model_fields["max_new_tokens"].description.endswith("[500, or half of a shorter context; demo 200]")
    assert EvaluateSettings.model_fields["limit"].description.endswith("[all; demo 24]")
    own = {name: (task.scored_rows, task.max_new_tokens) for name, task in TASKS.items()}
    assert own.pop("demo") == (24, 200) and set(own.values()) == {(None, 500)}


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
    silent = dataclasses.replace(plural, parts=lambda *_: Parts({"word": "ox"}, None, ()))
    for task, words in ((plural, ":2: field 'plural' is missing"), (silent, ":1: the row has no answer")):
        message = refusal(lambda task=task: load_split(task, "test", files={"test": path}, seed=0))
        assert path + words in message
        assert task is silent or "task plural reads 'word', 'plural'" in message


# Worked rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("task", EXPECTED)
def test_a_row_of_the_hub(task: str, suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [HUB_ROWS[task]])
    for split in ("train", "test"):
        (sample,) = read(task, path, split)
        prompt, completion = EXPECTED[task]
        assert (sample.prompt, sample.completion) == (prompt, completion)
        assert sample.references == (completion[1:], *MORE_REFERENCES.get(task, ()))
        assert sample.choices == CHOICES.get(task, ())
        assert sample.source == {".jsonl": f"{path}:1", ".json": f"{path}: item 1"}.get(suffix, f"{path}: row 1")
    if task == "iwslt2017":  # without the field around them
        (flat,) = read(task, write_rows(tmp_path / f"flat{suffix}", [HUB_ROWS[task]["translation"]]))
        assert (flat.prompt, flat.references) == (sample.prompt, sample.references)


def test_squad_repeats_no_reference(tmp_path: Path) -> None:
    row = {**HUB_ROWS["squad"], "answers": [{"text": "a cat"}, {"text": "a cat "}, {"text": "cats"}]}
    sample = read_one("squad", tmp_path, row)
    assert (sample.completion, sample.references) == (" a cat", ("a cat", "cats"))


@pytest.mark.parametrize(
    ("task", "answer_field", "known"),
    [
        ("squad", "answers", "context, id, question, title"),
        ("dialogsum", "summary", "dialogue, id, topic"),
        ("iwslt2017", "en", "use one of de"),
        ("gsm8k", "answer", "use one of question"),
    ],
)
def test_templates_name_fields_but_not_the_answer(task: str, answer_field: str, known: str, tmp_path: Path) -> None:
    name = known.split(",")[0].removeprefix("use one of ")
    assert read_one(task, tmp_path, HUB_ROWS[task], reading=Reading(template=f"<{{{name}}}>")).prompt.startswith("<")
    message = refusal(lambda: read_one(task, tmp_path, HUB_ROWS[task], reading=Reading(template=f"{{{answer_field}}}")))
    assert f"no field {answer_field!r}" in message and message.endswith(known)


def test_nested_squad_gives_the_same(tmp_path: Path) -> None:
    question = {"id": "1", "question": "Q?", "answers": [{"text": "one", "answer_start": 0}, {"text": "two"}]}
    nested = {"data": [{"title": "t", "paragraphs": [{"context": "C.", "qas": [question]}]}]}
    (sample,) = read("squad", write(tmp_path / "nested.json", json.dumps(nested)))
    assert sample.prompt == "Context: C. Question: Q? Answer:"
    assert (sample.completion, sample.references) == (" one", ("one", "two"))
    question["question"] = ""
    message = refusal(lambda: read("squad", write(tmp_path / "bad.json", json.dumps(nested))))
    assert "paragraph 1, question 1" in message and "'question'" in message


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
    leaks = Reading(template="{references}")
    assert "no field 'references'" in refusal(lambda: read_one("custom", tmp_path, row, reading=leaks))


# HellaSwag, whose texts are those of lm-evaluation-harness: its two functions stand here as they are there ------------


def test_hellaswag_is_cleaned_as_its_public_definition_says(tmp_path: Path) -> None:
    row = {
        "activity_label": "Health",
        "ctx_a": "[header] How to sleep [title] Go to bed early. [step] Do it  every day.",
        "ctx_b": "",
        "endings": ["[substeps] Wash it. [title] Dry it.", "Rest [a [b] c]", " two  spaces ", "[step]"],
        "label": 0,
    }
    sample = read_one("hellaswag", tmp_path, row)
    assert sample.prompt == "Health: How to sleep. Go to bed early. Do it every day."
    assert sample.choices == (" Wash it.. Dry it.", "Rest c]", "two spaces", "[step]")
    assert sample.endings == ("  Wash it.. Dry it.", " Rest c]", " two spaces", " [step]")
    assert (sample.completion, sample.references) == ("  Wash it.. Dry it.", ("Wash it.. Dry it.",))
    capitals = {**row, "ctx_a": "On a roof.", "ctx_b": "the MAN [x] sits", "label": "2"}
    assert read_one("hellaswag", tmp_path, capitals).prompt == "Health: On a roof. The man sits"
    assert read_one("hellaswag", tmp_path, capitals).references == ("two spaces",)
    assert read_one("hellaswag", tmp_path, {**row, "ctx_a": "On a roof. [step]"}).prompt == "Health: On a roof."


def test_a_template_can_show_hellaswag_s_endings(tmp_path: Path) -> None:
    row = HUB_ROWS["hellaswag"]
    shows = Reading(template=r"{split_type}: {context}\n{endings}\nRight:")
    sample = read_one("hellaswag", tmp_path, row, reading=shows)
    assert sample.prompt == (
        "indomain: Roof shingle removal: A man is sitting on a roof. He\n"
        "1. is ripping level tiles off.\n2. is holding a cube.\n3. sleeps.\n4. starts pulling up roofing.\nRight:"
    )
    assert sample.completion == " starts pulling up roofing."
    message = refusal(lambda: read_one("hellaswag", tmp_path, row, reading=Reading(template="{label}")))
    assert "no field 'label'" in message
    assert "activity_label, context, ctx, ctx_a, ctx_b, endings, ind, source_id, split, split_type" in message


def preprocess(text: str) -> str:
    text = text.strip()
    # NOTE: Brackets are artifacts of the WikiHow dataset portion of HellaSwag.
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    text = text.replace("  ", " ")
    return text


def process_doc(doc: dict[str, Any]) -> dict[str, Any]:
    ctx = doc["ctx_a"] + " " + doc["ctx_b"].capitalize()
    return {
        "query": preprocess(doc["activity_label"] + ": " + ctx),
        "choices": [preprocess(ending) for ending in doc["endings"]],
        "gold": int(doc["label"]),
    }


def test_prompts_and_endings_are_the_harness_s(tmp_path: Path) -> None:
    """Context and continuation as `loglikelihood` gets them: a space between, and the context's last ones moved."""
    draw = random.Random(3)
    parts = ["Wash it.", " [title]", " [step]", "[substeps] ", "Dry  it. ", "[header] How to", " a [b]", "  Go on."]

    def text() -> str:
        return "x" + "".join(draw.choices(parts, k=draw.randint(1, 5)))

    rows = [
        {"activity_label": "Health", "ctx_a": text(), "ctx_b": draw.choice(["", "the MAN", "[step]"]),
         "endings": [text()[draw.randint(0, 1) :] for _ in range(4)], "label": draw.randint(0, 3)}
        for _ in range(1000)
    ]  # fmt: skip
    files = {"test": write_rows(tmp_path / "rows.jsonl", rows)}
    for row, sample in zip(rows, load_split("hellaswag", "test", files=files, seed=0), strict=True):
        theirs = process_doc(row)
        moved = len(theirs["query"]) - len(theirs["query"].rstrip())
        expected = [theirs["query"][len(theirs["query"]) - moved :] + " " + choice for choice in theirs["choices"]]
        assert sample.prompt == theirs["query"].rstrip()
        for mine, ending, choice in zip(sample.endings, expected, theirs["choices"], strict=True):
            assert mine == ending or not choice.strip()  # of an ending of only brackets nothing would be left
        assert sample.completion == sample.endings[theirs["gold"]]
        scores = tuple(-float(draw.randint(1, 90)) for _ in range(4))
        ours = METRICS["accuracy_loglikelihood"].sample(Answer("", sample, scores))
        per_character = [score / len(choice) for score, choice in zip(scores, sample.choices, strict=True)]
        assert ours == 100.0 * (sample.choices[per_character.index(max(per_character))].strip() == sample.references[0])


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
    found = [(sample.prompt, len(sample.references)) for sample in by_topic]
    assert found == [("topic 0: A", 3), ("topic 1: B", 1), ("topic 3: C", 1)]
    train = load_split("dialogsum", "train", files={"train": path, "validation": path}, seed=0)
    expected = [(row["dialogue"], (row["summary"].strip(),)) for row in rows]
    assert [(sample.prompt[0], sample.references) for sample in train] == expected


def test_dialogsum_of_the_original_release_gives_the_same(tmp_path: Path) -> None:
    original = {"fname": "test_0", "dialogue": "A", "summary1": "a1", "topic1": "t", "summary2": "a2", "summary3": "a3"}
    for suffix in (".jsonl", ".json", ".parquet"):
        path = write_rows(tmp_path / f"original{suffix}", [original])
        for split in ("train", "test"):
            (sample,) = read("dialogsum", path, split)
            assert (sample.prompt, sample.completion) == ("A\nSummary:", " a1")
            assert sample.references == ("a1", "a2", "a3")
    message = refusal(lambda: read_one("dialogsum", tmp_path, original, reading=Reading(template="{summary2}")))
    assert message.endswith("use one of dialogue, fname, topic1")


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
        ("hellaswag", changed("hellaswag", label=""), ["'label'", "as in HellaSwag's test split", "validation split"]),
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
    for name, content, words in (
        ("empty.jsonl", "", "has no rows"),
        ("rows.tsv", "a,b\n", "unknown suffix '.tsv'"),
        ("rows.csv", "a,b\n", "has no rows"),
        ("rows.jsonl", "{]\n", "rows.jsonl:1: broken JSON"),
    ):
        path = write(tmp_path / name, content)
        assert words in refusal(lambda path=path: read(task, path))
    assert "no such file" in refusal(lambda: read(task, str(tmp_path / "none.jsonl")))


# Other rows than the hub's ----------------------------------------------------------------------------------


def test_demo_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "demo_examples", lambda split: [{"question": f"{split}?", "answer": "1\n#### 1"}])
    for seed in (0, 5):  # the held-out rows do not depend on a run's seed
        (sample,) = load_split("demo", "validation", files={}, seed=seed)
        assert (sample.prompt, sample.completion) == ("Question: validation?\nAnswer:", " 1\n#### 1")


def test_real_gsm8k() -> None:
    if not (SHARED_DATA / "gsm8k").is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    files = {name: str(SHARED_DATA / f"gsm8k/{name}.jsonl") for name in ("train", "test")}
    sizes = {name: len(load_split("gsm8k", name, files=files, seed=0)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 7000, "validation": 473, "test": 1319}
    sample = load_split("gsm8k", "test", files=files, seed=0, limit=1)[0]
    assert sample.prompt.startswith("Question: Janet") and sample.prompt.endswith("?\nAnswer:")
    assert sample.completion.startswith(" Janet") and "####" in sample.completion


def test_real_nested_squad() -> None:
    if not (SHARED_DATA / "xquad").is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    files = {"train": str(SHARED_DATA / "xquad/xquad.en.json")}
    train, validation = (load_split("squad", name, files=files, seed=0) for name in ("train", "validation"))
    assert (len(train), len(validation)) == (1190 - 59, 59)
    assert all(sample.references[0] == sample.completion[1:] for sample in train)
    assert len({sample.prompt.split(" Question: ")[0] for sample in train + validation}) == 240
