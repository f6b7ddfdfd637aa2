"""Rows, tasks and splits: every broken input is one line that names its place."""

import json
from pathlib import Path

import pytest
from folders import SHARED_DATA
from task_files import refusal, write, write_rows

from megatron_tiedlora.data import readers
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading, join_answer
from megatron_tiedlora.data.tasks import demo


def custom(path: str, **options) -> list:
    return load_split("custom", "test", files={"test": path}, seed=0, **options)


# Files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "place", "reason"),
    [
        ('{"a": 1}\n\n{"a": 2,}\n', ":3:", "broken JSON"),
        ('{"a": 1}\n[1, 2]\n', ":2:", "a list"),
        ('{"a": 1}\n"text"\n', ":2:", "a string"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ":2:", "0xff"),
        ('{"a": 1}\n{"a": "cut of', ":2:", "broken JSON"),
    ],
)
def test_broken_line_is_named(tmp_path, content, place, reason):
    path = write(tmp_path / "data.jsonl", content)
    message = refusal(lambda: read_rows(path))
    assert path + place in message and reason in message


def test_blank_lines_and_byte_order_mark(tmp_path):
    path = write(tmp_path / "data.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "x\xe2\x80\xa8y"}')
    assert read_rows(path) == [({"a": 1}, f"{path}:1"), ({"a": "x\u2028y"}, f"{path}:4")]
    assert len(read_rows(path, limit=1)) == 1


def test_json_and_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    listed = write(tmp_path / "list.json", json.dumps(rows))
    nested = write(tmp_path / "nested.json", json.dumps({"version": 1, "data": rows}))
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    for path in (listed, nested, str(table)):
        assert [row for row, _ in read_rows(path)] == rows
    assert "row 2" in read_rows(table)[1][1]


def test_tables_of_many_rows_are_read_in_order(tmp_path):
    """One row group or record batch holds more rows than are decoded at a time."""
    import pyarrow

    rows = [{"prompt": f"{number}", "completion": "b"} for number in range(150)]
    table = pyarrow.Table.from_pylist(rows)
    paths = [write_rows(tmp_path / "a.parquet", rows)]
    for kind in ("file", "stream"):
        paths.append(str(tmp_path / f"{kind}.arrow"))
        with getattr(pyarrow.ipc, f"new_{kind}")(paths[-1], table.schema) as writer:
            writer.write_table(table)
    for path in paths:
        assert read_rows(path) == [(row, f"{path}: row {number}") for number, row in enumerate(rows, start=1)]


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "list.json"])
def test_empty_file(tmp_path, name):
    path = write(tmp_path / name, "[]" if name == "list.json" else "\n\n" if name.endswith("l") else "")
    assert f"{path}: holds no rows" in refusal(lambda: read_rows(path))


def test_wrong_files(tmp_path):
    for name in (str(tmp_path / "missing.jsonl"), "missing.parquet", "./missing"):
        assert "no such file" in refusal(lambda name=name: read_rows(name))
    assert "is a folder" in refusal(lambda: read_rows(tmp_path))
    for name, reason in (("a.tsv", "suffix"), ("a.parquet", "parquet"), ("a.json", "line 2")):
        path = write(tmp_path / name, "[{},\n{]")
        message = refusal(lambda path=path: read_rows(path))
        assert path in message and reason in message
    assert "a number" in refusal(lambda: read_rows(write(tmp_path / "n.json", "3")))


def test_lines_of_text(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\ntwo\xe2\x80\xa8half\x0b\rthree\n")
    assert readers.read_lines(path) == ["one", "", "two\u2028half\x0b\rthree"]
    assert "holds no lines" in refusal(lambda: readers.read_lines(write(tmp_path / "b.txt", " \n")))
    assert "no such file" in refusal(lambda: readers.read_lines(tmp_path / "c.txt"))
    assert f"{path}:2: not UTF-8 (byte 0xff" in refusal(lambda: readers.read_lines(write(Path(path), b"a\n\xff\n")))


def test_hub_error_is_one_line(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise ConnectionError("no route\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refusal(lambda: read_rows("some/dataset", split="test"))
    assert "some/dataset" in message and "'test'" in message and "no route" in message


def test_hub_rows(monkeypatch):
    import datasets

    calls = []

    def load(name, config, *, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"question": f"q{i}", "answer": f"a #### {i}"} for i in range(100)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    train = load_split("gsm8k", "train", files={}, seed=1)
    validation = load_split("gsm8k", "validation", files={}, seed=1)
    load_split("squad", "test", files={}, seed=1, limit=0)
    assert calls[0] == ("openai/gsm8k", "main", "train") and calls[-1] == ("rajpurkar/squad", None, "validation")
    assert len(train) == 95 and len(validation) == 5
    assert readers.read_rows("some/dataset", limit=3)[2][1] == "some/dataset[train]: row 3"


# Prompts ----------------------------------------------------------------------------------------------------


def test_prompt_template(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": "2+2", "completion": "4", "level": "easy", "id": 7}])
    (sample,) = custom(path, reading=Reading(template=r"{level}\n{prompt} {{=}}"))
    assert (sample.prompt, sample.completion) == ("easy\n2+2 {=}", " 4")
    assert "id, level, prompt" in refusal(lambda: custom(path, reading=Reading(template="{question}")))
    leaks = Reading(template="{completion}")
    assert "'completion'" in refusal(lambda: custom(path, reading=leaks))
    assert "'id'" in refusal(lambda: custom(path, reading=Reading(template="{id}")))
    for broken in ("{prompt", "{prompt.x}", "{}", "{prompt!r}", "{prompt:>9}"):
        assert "--prompt_template" in refusal(lambda broken=broken: custom(path, reading=Reading(template=broken)))


def test_join_answer():
    assert [join_answer(*pair) for pair in (("A:", "4"), ("A: ", "4"), ("A:", "\n4"), ("", "4"))] == [
        " 4",
        "4",
        "\n4",
        "4",
    ]


# Named tasks ------------------------------------------------------------------------------------------------


def test_squad_flat_and_nested_give_the_same(tmp_path):
    flat = {"context": "C.", "question": "Q?", "answers": {"text": ["one", "two"], "answer_start": [0, 1]}}
    nested = {"data": [{"title": "t", "paragraphs": [{"context": "C.", "qas": [
        {"id": "1", "question": "Q?", "answers": [{"text": "one", "answer_start": 0}, {"text": "two"}]}]}]}
    ]}  # fmt: skip
    paths = [write_rows(tmp_path / "flat.jsonl", [flat]), write(tmp_path / "nested.json", json.dumps(nested))]
    for path in paths:
        (sample,) = load_split("squad", "test", files={"test": path}, seed=0)
        assert sample.prompt == "Context: C. Question: Q? Answer:"
        assert (sample.completion, sample.references) == (" one", ("one", "two"))
    flat["answers"]["text"] = []
    path = write_rows(tmp_path / "bad.jsonl", [flat])
    assert f"{path}:1: field 'answers'" in refusal(lambda: load_split("squad", "test", files={"test": path}, seed=0))
    nested["data"][0]["paragraphs"][0]["qas"][0]["question"] = ""
    path = write(tmp_path / "bad.json", json.dumps(nested))
    message = refusal(lambda: load_split("squad", "test", files={"test": path}, seed=0))
    assert "paragraph 1, question 1" in message and "'question'" in message


def test_validation_is_taken_out_of_train(tmp_path):
    path = write_rows(tmp_path / "data.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(60)])
    files = {"train": path}
    parts = {name: load_split("custom", name, files=files, seed=3) for name in ("train", "validation")}
    assert [len(part) for part in parts.values()] == [57, 3]
    assert len({sample.prompt for part in parts.values() for sample in part}) == 60
    assert parts["validation"] != load_split("custom", "validation", files=files, seed=4)
    # With a validation file of its own nothing is taken out of train.
    assert len(load_split("custom", "train", files={**files, "validation": path}, seed=3)) == 60
    assert "--test_file" in refusal(lambda: load_split("custom", "test", files=files, seed=3))
    one = write_rows(tmp_path / "one.jsonl", [{"prompt": "p", "completion": "c"}])
    assert len(load_split("custom", "train", files={"train": one}, seed=0)) == 1
    assert "--validation_file" in refusal(lambda: load_split("custom", "validation", files={"train": one}, seed=0))
    assert "'gms8k'" in refusal(lambda: load_split("gms8k", "train", files={}, seed=0))
    assert "--train_file" in refusal(lambda: load_split("custom", "train", files={}, seed=0))


def test_demo_rows(monkeypatch):
    monkeypatch.setattr(demo, "demo_examples", lambda split: [{"question": f"{split}?", "answer": "1\n#### 1"}])
    for seed in (0, 5):  # the held-out rows do not depend on a run's seed
        (sample,) = load_split("demo", "validation", files={}, seed=seed)
        assert (sample.prompt, sample.completion) == ("Question: validation?\nAnswer:", " 1\n#### 1")


def test_real_gsm8k():
    if not (SHARED_DATA / "gsm8k").is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    files = {name: str(SHARED_DATA / f"gsm8k/{name}.jsonl") for name in ("train", "test")}
    sizes = {name: len(load_split("gsm8k", name, files=files, seed=0)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 7000, "validation": 473, "test": 1319}
    sample = load_split("gsm8k", "test", files=files, seed=0, limit=1)[0]
    assert sample.prompt.startswith("Question: Janet") and sample.prompt.endswith("?\nAnswer:")
    assert sample.completion.startswith(" Janet") and "####" in sample.completion


def test_real_nested_squad():
    if not (SHARED_DATA / "xquad").is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    files = {"train": str(SHARED_DATA / "xquad/xquad.en.json")}
    train, validation = (load_split("squad", name, files=files, seed=0) for name in ("train", "validation"))
    assert (len(train), len(validation)) == (1190 - 59, 59)
    assert all(sample.references[0] == sample.completion[1:] for sample in train)
    assert len({sample.prompt.split(" Question: ")[0] for sample in train + validation}) == 240
