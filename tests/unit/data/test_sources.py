"""What a data flag may name: several sources with weights, folders, patterns, hub data sets; and broken files."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_files import refusal, write, write_rows

from megatron_tiedlora.data import readers
from megatron_tiedlora.data.readers import about_num_rows, read_rows, split_hub_name
from megatron_tiedlora.data.sources import Source, local_files, mixed, parse_sources
from megatron_tiedlora.data.splits import load_split


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{number}", "completion": "x"} for number in range(count)]


def prompts(given: str, split: Any = "train", seed: int = 0, **files: str) -> list[str]:
    """The prompts of a split, of which nothing is held out unless it is the point."""
    chosen = {"train": given, "validation": files.pop("validation", given), **files}
    return [sample.prompt for sample in load_split("custom", split, files=chosen, seed=seed)]


# Several sources --------------------------------------------------------------------------------------------


def test_several_files_are_read_one_after_another(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 3)), write_rows(tmp_path / "b.json", rows("b", 2))
    assert prompts(f"{a}, {b}") == ["a0", "a1", "a2", "b0", "b1"]
    comma = write_rows(tmp_path / "a,b.jsonl", rows("c", 1))  # a name that exists is one file

    assert prompts(comma) == ["c0"]


def test_weights_are_shares_of_the_samples(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 90)), write_rows(tmp_path / "b.jsonl", rows("b", 20))
    found = prompts(f"{a}:0.5,{b}:0.5")
    counts = Counter(found)
    assert sum(count for name, count in counts.items() if name[0] == "a") == 90  # none is lost, and none repeated
    assert sum(count for name, count in counts.items() if name[0] == "b") == 90  # each four or five times
    assert {counts[f"b{number}"] for number in range(20)} == {4, 5} and len(counts) == 110
    assert found == prompts(f"{a}:0.5,{b}:0.5") and found != prompts(f"{a}:0.5,{b}:0.5", seed=1)
    quarter = Counter(name[0] for name in prompts(f"{a}:0.75,{b}:.25"))
    assert quarter == {"a": 90, "b": 30}
    sources = parse_sources(f"{a}:0.5,{b}:0.5", "--train_file")
    assert mixed(sources, [90, 20], np.zeros(110, bool), seed=0).lines == (
        f"{a}: 90 rows make 90 samples, 1.00 of each", f"{b}: 20 rows make 90 samples, 4.50 of each"
    )  # fmt: skip
    assert mixed([Source("a"), Source("b")], [1, 1], np.zeros(2, bool), seed=0).lines == ()
    assert [name[0] for name in prompts(f"{a}:0.9,{b}:0.1")] == ["a"] * 180 + ["b"] * 20


def test_held_out_rows_are_taken_out_before_rows_are_repeated(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 90)), write_rows(tmp_path / "b.jsonl", rows("b", 30))
    files = {"train": f"{a}:0.5,{b}:0.5"}
    train, held_out = (load_split("custom", split, files=files, seed=3) for split in ("train", "validation"))
    held = [sample.prompt for sample in held_out]
    assert len(held) == len(set(held)) == 6 and not set(held) & {sample.prompt for sample in train}
    shares = Counter(sample.prompt[0] for sample in train)
    assert shares["a"] == shares["b"] == 90 - sum(name[0] == "a" for name in held)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("a.jsonl:0.5,b.jsonl:0.6", ["0.5 + 0.6 = 1.1", "sum to 1"]),
        ("a.jsonl:0.5,b.jsonl", ["b.jsonl has no weight", "all or none"]),
        ("a.jsonl:0,b.jsonl:1", ["0 + 1", "above 0"]),
        ("a.jsonl,,b.jsonl", ["between the commas is empty"]),
        ("a.jsonl:0.5", ["the weights are 0.5"]),
    ],
)
def test_weights_that_do_not_fit(given: str, words: list[str]) -> None:
    message = refusal(lambda: parse_sources(given, "--train_file"))
    assert message.startswith(f"--train_file {given}: ") and all(word in message for word in words)


def test_a_weight_of_one_source_and_names_with_colons(tmp_path: Path) -> None:
    assert parse_sources("a/b:main:train", "--train_file") == (Source("a/b:main:train"),)
    both = (Source("a/b:main:train", 0.25), Source("c.csv", 0.75))
    assert parse_sources("a/b:main:train:0.25,c.csv:0.75", "--train_file") == both
    assert mixed([Source("a", 1.0)], [2], np.zeros(2, bool), seed=0).rows.tolist() == [0, 1]


def test_a_weight_that_repeats_rows_very_often_is_rejected() -> None:
    sources = (Source("a", 0.999), Source("b", 0.001))
    assert len(mixed(sources, [999, 1], np.zeros(1000, bool), seed=0).rows) == 1000
    message = refusal(lambda: mixed(sources, [1, 2], np.zeros(3, bool), seed=0))
    assert len(mixed((Source("a", 0.999), Source("b", 0.001)), [1, 1], np.zeros(2, bool), seed=0).rows) == 1000
    assert message.startswith("--train_file: a is 0.999 of the samples if each of its 1 rows is used 1,998 times")


@pytest.mark.parametrize("flag", ["--validation_file", "--test_file"])
def test_only_training_files_have_weights(flag: str) -> None:
    message = refusal(lambda: parse_sources("a.jsonl:0.5,b.jsonl:0.5", flag))
    assert message.startswith(f"{flag} a.jsonl:0.5,b.jsonl:0.5: only --train_file takes weights")


def test_a_group_whose_rows_are_all_held_out(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 19)), write_rows(tmp_path / "b.jsonl", rows("b", 1))
    message = ""
    for seed in range(60):
        try:
            load_split("custom", "train", files={"train": f"{a},{b}"}, seed=seed)
        except ValueError as error:
            message = str(error)
    assert message == f"{b}: all of its rows became validation rows; give --validation_file"


# Names ------------------------------------------------------------------------------------------------------


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        calls.append((name, config, split))
        return datasets.Dataset.from_list(rows("h", 2))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for given in ("some/data", "some/data:main", "some/data:main:part", "some/data::part"):
        assert len(read_rows(parse_sources(given, "--train_file")[0].name)) == 2
    assert calls == [
        ("some/data", None, "train"),
        ("some/data", "main", "train"),
        ("some/data", "main", "part"),
        ("some/data", None, "part"),
    ]
    assert split_hub_name("a/b:c:d:e") == ("a/b", "c", "d:e")


def test_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b.jsonl", "a.jsonl", "c.json"):
        write_rows(tmp_path / name, rows(name[0], 1))
    write_rows(tmp_path / "in" / "d.jsonl", rows("d", 1))
    assert prompts(str(tmp_path)) == ["a0", "b0", "c0"]  # in the order of their names, and not of folders in it
    assert prompts(f"{tmp_path}/**/*.jsonl") == ["a0", "b0", "d0"]
    assert set(local_files(f"{tmp_path}/*.jsonl:0.5,{tmp_path}/in:0.5")) == {
        str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "in/d.jsonl")
    }
    monkeypatch.chdir(tmp_path)
    assert prompts("[ab].jsonl") == ["a0", "b0"]
    assert "no file has a name of this pattern" in refusal(lambda: read_rows("*.csv"))
    (tmp_path / "empty").mkdir()
    assert "is a folder without a .jsonl" in refusal(lambda: read_rows("empty"))


# Broken files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prompt,completion\na\n", [":2", "has 1 fields", "names 2"]),
        ("prompt,completion\na,b,c\n", [":2", "has 3 fields"]),
        ('prompt,completion\na,"b\n', ["broken CSV"]),
        ("prompt,prompt\na,b\n", [":1", "names a field twice"]),
        (b"prompt,completion\na,\xff\n", [":2", "0xff"]),
        ("prompt,completion\n", ["holds no rows"]),
        ("", ["holds no rows"]),
    ],
)
def test_broken_csv(content: str | bytes, words: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", content)
    message = refusal(lambda: read_rows(path))
    assert message.startswith(path) and all(word in message for word in words), message


def test_csv_values_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", '\ufeffid,prompt,completion\r\n007,"a ""b""\n,c",1.0\r\n\n8,,NA\n')
    assert read_rows(path) == [
        ({"id": "007", "prompt": 'a "b"\n,c', "completion": "1.0"}, f"{path}:2"),
        ({"id": "8", "prompt": "", "completion": "NA"}, f"{path}:5"),
    ]
    assert len(read_rows(path, limit=1)) == 1


def test_broken_packed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(b'{"a": 1}\n{"a": 2}\n')
    for content in (whole[:-9], b"not gzip", b"", whole[:12] + b"\xff" * 20):
        path = write(tmp_path / "a.jsonl.gz", content)
        message = refusal(lambda path=path: read_rows(path))
        assert message.startswith(path) and ("not a readable .gz" in message or "no rows" in message), message
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2,}\n'))
    assert f"{path}:2: broken JSON" in refusal(lambda: read_rows(path))
    monkeypatch.setattr(readers, "_GZIP_MEMORY", 1000)
    monkeypatch.setattr(readers, "_GZIP_RATIO", 1)
    for name in ("a.jsonl.gz", "a.json.gz", "a.csv.gz"):
        path = write(tmp_path / name, gzip.compress(b"{}\n" * 1000))
        assert refusal(lambda path=path: read_rows(path)).endswith("when unpacked; give a smaller part of it")
    assert "unknown suffix '.parquet.gz'" in refusal(lambda: read_rows(write(tmp_path / "a.parquet.gz", whole)))
    said = refusal(lambda: read_rows(write(tmp_path / "a.txt", b"a text")))
    assert "unknown suffix '.txt'" in said
    assert said.endswith('; write each text as a row {"text": ...} of a .jsonl file')


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"ARROW1\0\0" + b"\xff" * 100, b"\xff" * 100, b"x" * 9])
def test_broken_arrow(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", content)
    message = refusal(lambda: read_rows(path))
    assert message.startswith(path) and ("readable" in message or "no rows" in message or "need more" in message)


def test_broken_saved_folders(tmp_path: Path) -> None:
    import datasets

    whole, parts = datasets.Dataset.from_list(rows("a", 3)), tmp_path / "parts"
    datasets.DatasetDict({"train": whole}).save_to_disk(str(parts))
    assert "has no split 'test', only train" in refusal(lambda: read_rows(parts, split="test"))
    assert len(read_rows(parts / "train", split="test", limit=2)) == 2
    for content in ("{", "{}", json.dumps({"_data_files": [{"filename": "gone.arrow"}]})):
        write(parts / "train" / "state.json", content)
        message = refusal(lambda: read_rows(parts / "train"))
        assert message.startswith(f"{parts / 'train'}: not a readable folder of save_to_disk")


def test_how_many_rows_a_bar_expects(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 20)), write_rows(tmp_path / "b.json", rows("b", 7))
    assert about_num_rows(a) == 20 and about_num_rows(b) is None
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "c.jsonl", rows("c", 3))
    assert about_num_rows(f"{tmp_path}/**/*.jsonl") == 23
    assert about_num_rows("some/data") is None and about_num_rows(f"{tmp_path}/missing.jsonl") is None
