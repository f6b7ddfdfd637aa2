"""Rows out of files of every format, folders, patterns and the hub; of a broken one a line that names its place. Two
aligned texts of IWSLT, as plain sentences or as the release has them, beside files of rows."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.task_files import refusal, write, write_rows

from megatron_tiedlora.data import readers
from megatron_tiedlora.data.readers import about_num_rows, read_rows, row_data
from megatron_tiedlora.data.sources import local_files, parse_sources
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tables import HubData
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tasks.iwslt2017 import TASK

Row = dict[str, Any]


def rows(name: str, count: int) -> list[Row]:
    return [{"prompt": f"{name}{number}", "completion": "x"} for number in range(count)]


# Formats ----------------------------------------------------------------------------------------------------

ROWS = rows("r", 150)  # more than are decoded at a time


def write_csv(file: Path) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_arrow(file: Path, kind: str) -> None:
    import pyarrow

    table = pyarrow.Table.from_pylist(ROWS)
    with getattr(pyarrow.ipc, f"new_{kind}")(str(file), table.schema) as writer:
        writer.write_table(table)


def save_to_disk(folder: Path, **parts: list[Row]) -> None:
    """As one data set, or as several that have names."""
    import datasets

    made = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    (datasets.DatasetDict(made) if len(parts) > 1 else made["train"]).save_to_disk(str(folder))


def write_folder(folder: Path) -> None:
    folder.mkdir()
    write_rows(folder / "2.parquet", ROWS[70:])
    write_rows(folder / "1.jsonl", ROWS[:70])
    (folder / "README.md").write_text("no rows")


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda file: write_rows(file, ROWS),
    "a.json": lambda file: write_rows(file, ROWS),
    "nested.json": lambda file: write(file, json.dumps({"version": 1, "data": ROWS})),
    "a.csv": write_csv,
    "a.jsonl.gz": lambda file: write(file, gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode())),
    "a.parquet": lambda file: write_rows(file, ROWS),
    "file.arrow": lambda file: write_arrow(file, "file"),
    "stream.arrow": lambda file: write_arrow(file, "stream"),
    "saved": lambda folder: save_to_disk(folder, train=ROWS),
    "saved splits": lambda folder: save_to_disk(folder, train=ROWS, test=ROWS[:1]),
    "folder": write_folder,
    "pattern/*.[jp]*": lambda pattern: write_folder(pattern.parent),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    found = read_rows(str(tmp_path / name))
    assert [row for row, _ in found] == ROWS
    if name.endswith(("parquet", "arrow")):
        assert [place for _, place in found] == [f"{tmp_path / name}: row {number}" for number in range(1, 151)]
    assert len(read_rows(str(tmp_path / name), limit=1)) == 1


def test_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "x\xe2\x80\xa8y"}')
    assert read_rows(path) == [({"a": 1}, f"{path}:1"), ({"a": "x\u2028y"}, f"{path}:4")]


def test_csv_values_are_texts(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", '\ufeffid,prompt,completion\r\n007,"a ""b""\n,c",1.0\r\n\n8,,NA\n')
    assert read_rows(path) == [
        ({"id": "007", "prompt": 'a "b"\n,c', "completion": "1.0"}, f"{path}:2"),
        ({"id": "8", "prompt": "", "completion": "NA"}, f"{path}:5"),
    ]


def test_lines_of_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\ntwo\xe2\x80\xa8half\x0b\rthree\n")
    assert readers.read_lines(path) == ["one", "", "two\u2028half\x0b\rthree"]
    assert "the file has no text" in refusal(lambda: readers.read_lines(write(tmp_path / "b.txt", " \n")))
    assert "no such file" in refusal(lambda: readers.read_lines(tmp_path / "c.txt"))
    assert f"{path}:2: not UTF-8 (byte 0xff" in refusal(lambda: readers.read_lines(write(Path(path), b"a\n\xff\n")))


# Names ------------------------------------------------------------------------------------------------------


def test_names_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        calls.append((name, config, split))
        return datasets.Dataset.from_list(rows("h", 5))

    monkeypatch.setattr(datasets, "load_dataset", load)
    for given in ("some/data", "some/data:main", "some/data:main:part", "some/data::part"):
        assert len(read_rows(parse_sources(given, "--train_file")[0].name)) == 5
    assert calls == [
        ("some/data", None, "train"),
        ("some/data", "main", "train"),
        ("some/data", "main", "part"),
        ("some/data", None, "part"),
    ]
    assert row_data("a/b:c:d:e", split="") == HubData("a/b", "d:e", "c")
    assert read_rows("some/data", limit=3)[2][1] == "some/data[train]: row 3"


def test_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prompts(given: str) -> list[str]:
        return [row["prompt"] for row, _ in read_rows(given)]

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
    assert "no file matches this pattern" in refusal(lambda: read_rows("*.csv"))
    (tmp_path / "empty").mkdir()
    assert "the folder has no .jsonl" in refusal(lambda: read_rows("empty"))


def test_how_many_rows_a_bar_expects(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows("a", 20)), write_rows(tmp_path / "b.json", rows("b", 7))
    assert about_num_rows(a) == 20 and about_num_rows(b) is None
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / "c.jsonl", rows("c", 3))
    assert about_num_rows(f"{tmp_path}/**/*.jsonl") == 23
    assert about_num_rows("some/data") is None and about_num_rows(f"{tmp_path}/missing.jsonl") is None


# Broken files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2,}\n', [":3:", "broken JSON"]),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', [":2:", "a list"]),
        ("a.jsonl", '{"a": 1}\n"text"\n', [":2:", "a string"]),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', [":2:", "0xff"]),
        ("a.jsonl", '{"a": 1}\n{"a": "cut of', [":2:", "broken JSON"]),
        ("a.jsonl", "\n\n", [": the data has no rows"]),
        ("a.json", "", [": the data has no rows"]),
        ("a.json", "[]", [": the data has no rows"]),
        ("a.json", "[{},\n{]", ["line 2"]),
        ("a.json", "3", ["a number"]),
        ("a.tsv", "[{},\n{]", ["suffix"]),
        ("a.txt", "a text", ["unknown suffix '.txt'", '; write each text as a row {"text": ...} of a .jsonl file']),
        ("a.parquet", "[{},\n{]", ["parquet"]),
        ("a.parquet.gz", "", ["unknown suffix '.parquet.gz'"]),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": 2,}\n', mtime=0), [":2: broken JSON"]),
        ("a.csv", "prompt,completion\na\n", [":2", "has 1 fields", "names 2"]),
        ("a.csv", "prompt,completion\na,b,c\n", [":2", "has 3 fields"]),
        ("a.csv", 'prompt,completion\na,"b\n', ["broken CSV"]),
        ("a.csv", "prompt,prompt\na,b\n", [":1", "names a field twice"]),
        ("a.csv", b"prompt,completion\na,\xff\n", [":2", "0xff"]),
        ("a.csv", "prompt,completion\n", ["has no rows"]),
        ("a.csv", "", ["has no rows"]),
    ],
)
def test_a_broken_file_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, words: list[str]
) -> None:
    path = write(tmp_path / name, content)
    message = refusal(lambda: read_rows(path))
    assert message.startswith(path) and all(word in message for word in words), message


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for name in (str(tmp_path / "missing.jsonl"), "missing.parquet", "./missing"):
        assert "no such file" in refusal(lambda name=name: read_rows(name))
    assert "the folder has no" in refusal(lambda: read_rows(tmp_path))


def test_broken_packed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(b'{"a": 1}\n{"a": 2}\n')
    for content in (whole[:-9], b"not gzip", b"", whole[:12] + b"\xff" * 20):
        path = write(tmp_path / "a.jsonl.gz", content)
        message = refusal(lambda path=path: read_rows(path))
        assert message.startswith(path) and ("the .gz file is not" in message or "no rows" in message), message
    monkeypatch.setattr(readers, "_GZIP_MEMORY", 1000)
    monkeypatch.setattr(readers, "_GZIP_RATIO", 1)
    for name in ("a.jsonl.gz", "a.json.gz", "a.csv.gz"):
        path = write(tmp_path / name, gzip.compress(b"{}\n" * 1000))
        said = refusal(lambda path=path: read_rows(path))
        assert "the file unpacks to more than" in said and said.endswith(" bytes; give a smaller file")


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"ARROW1\0\0" + b"\xff" * 100, b"\xff" * 100, b"x" * 9])
def test_broken_arrow(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.arrow", content)
    message = refusal(lambda: read_rows(path))
    assert message.startswith(path) and ("readable" in message or "no rows" in message or "need more" in message)


def test_broken_saved_folders(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    save_to_disk(parts, train=rows("a", 3), other=rows("b", 1))
    assert "has no split 'test', only " in refusal(lambda: read_rows(parts, split="test"))
    assert len(read_rows(parts / "train", split="test", limit=2)) == 2
    for content in ("{", "{}", json.dumps({"_data_files": [{"filename": "gone.arrow"}]})):
        write(parts / "train" / "state.json", content)
        message = refusal(lambda: read_rows(parts / "train"))
        assert message.startswith(f"{parts / 'train'}: save_to_disk's folder is broken")


# Aligned texts ----------------------------------------------------------------------------------------------


def read(path: str, split: Any = "test", **options: Any) -> list[Example]:
    return load_split("iwslt2017", split, files={split: path}, seed=0, **options)


@pytest.mark.parametrize(
    ("german", "english", "swapped"),
    [
        ("train.de", "train.en", False),
        ("train.de", "train.en", True),
        ("train.tags.de-en.de", "train.tags.de-en.en", True),
        ("a.DE.txt", "b.en.txt", True),
        ("source.txt", "target.txt", False),  # no language in the names: German stands first
        ("source.txt", "target.en", True),
        ("source.de", "target.txt", True),
    ],
)
def test_aligned_files(german: str, english: str, swapped: bool, tmp_path: Path) -> None:
    # U+2028 ends a line for `splitlines`, not here; a byte order mark and \r\n are no part of a sentence.
    first = write(tmp_path / german, b"\xef\xbb\xbfGuten Tag.\r\nJa\xe2\x80\xa8nein.\r\n")
    second = write(tmp_path / english, "Good day.\nYes no.")
    path = f"{second}, {first}" if swapped else f"{first},{second}"
    samples = read(path)
    assert [(sample.prompt, sample.completion) for sample in samples] == [
        ("Guten Tag.\nEnglish:", " Good day."),
        ("Ja\u2028nein.\nEnglish:", " Yes no."),
    ]
    assert [sample.source for sample in samples] == [f"{first}:1", f"{first}:2"]
    assert len(read(path, limit=1)) == 1


def aligned_refusal(folder: Path, german: str | bytes, english: str | bytes) -> str:
    first, second = write(folder / "x.de", german), write(folder / "x.en", english)
    return refusal(lambda: read(f"{first},{second}", "train"))


def test_aligned_files_that_do_not_fit(tmp_path: Path) -> None:
    message = aligned_refusal(tmp_path, "a\nb\nc\n", "a\nb\n")
    assert f"{tmp_path}/x.de has 3 lines and {tmp_path}/x.en has 2" in message
    assert f"{tmp_path}/x.en:2: the line is empty" in aligned_refusal(tmp_path, "a\nb\nc\n", "a\n \nc\n")
    assert f"{tmp_path}/x.de:1: the line is empty" in aligned_refusal(tmp_path, "\nb\n", "\nb\n")
    assert f"{tmp_path}/x.de:2: not UTF-8" in aligned_refusal(tmp_path, b"a\n\xe4\n", "a\nb\n")
    assert f"{tmp_path}/x.en: the file has no text" in aligned_refusal(tmp_path, "a\n", "\n")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("x.de", ["--test_file", "text in one language", "GERMAN,ENGLISH"]),
        ("x.txt", ["text in one language"]),
        ("x.de,y.de", ["both files end in .de"]),
        ("x.de,x.en,x.fr", ["3 files", "GERMAN,ENGLISH"]),
        ("x.de,", ["2 files", "GERMAN,ENGLISH"]),
        ("x.jsonl,y.de", ["2 files", "data files (.jsonl, .json, .csv, .parquet, .arrow)"]),
        ("IWSLT/iwslt2017,y.de", ["2 files", "only hub ids and data files"]),
        ("x.de:0.5,y.de:0.5", ["two aligned text files are one source", "; give --test_file x.de,y.de"]),
        ("x.de,x.en:0.3", ["which cannot have weights"]),
        ("x.de,missing.en", ["missing.en: no such file"]),
        ("x.de,.", ["is a folder", "a text file"]),
    ],
)
def test_names_that_are_no_pair(names: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.de", "y.de", "x.txt", "x.jsonl"):
        write(tmp_path / name, "a\n")
    message = refusal(lambda: read(names))
    assert all(word in message for word in words)


def test_files_of_rows_are_read_as_such(tmp_path: Path) -> None:
    """Also where a name has a comma or a language, where there are several, and among data sets of the hub."""
    for name in ("a,b.jsonl", "train.de.jsonl", "train.en.parquet"):
        path = write_rows(tmp_path / name, [{"de": "Ja.", "en": "Yes."}])
        assert [sample.completion for sample in read(path)] == [" Yes."]
    a, b = (write_rows(tmp_path / name, [{"de": "Ja.", "en": name}]) for name in ("a.jsonl", "b.csv.jsonl"))
    samples = load_split("iwslt2017", "train", files={"train": f"{a}:0.5,{b}:0.5", "validation": a}, seed=0)
    assert [sample.completion for sample in samples] == [" a.jsonl", " b.csv.jsonl"]
    assert "2 files" in refusal(lambda: read(f"{a}:0.5,./none/none:0.5"))
    assert TASK.read_files is not None
    assert TASK.read_files(f"{a}:0.5,someone/pairs:de-en:train:0.5", "--train_file") is None


TAGS = """<url>http://www.ted.com/talks/x</url>
<keywords>talks, science</keywords>
<speaker>A. Person</speaker>
<talkid>1</talkid>
<title>A. Person: {title}</title>
<description>{title}.</description>
{first}
 {second}
<url>http://www.ted.com/talks/y</url>
<translator href="x">B</translator>
{third}
"""
XML = """<?xml version="1.0" encoding="UTF-8"?>
<mteval>
<refset setid="iwslt2017-dev2010" srclang="german" trglang="english">
<doc docid="767" genre="lectures">
<title>{title}</title>
<seg id="1"> {first} </seg>
<seg id="2">{second}</seg>
</doc>
<doc docid="768"><seg id="1"> {third} </seg></doc>
</refset>
</mteval>
"""
GERMAN = {"title": "Titel", "first": "Vielen Dank, Chris.", "second": "2 < 3 & 4 > 1.", "third": "Ja."}
ENGLISH = {"title": "Title", "first": "Thank you, Chris.", "second": "2 < 3 & 4 > 1.", "third": "Yes."}


@pytest.mark.parametrize(
    ("names", "form", "places"),
    [
        (("train.tags.de-en.de", "train.tags.de-en.en"), TAGS, (7, 8, 11)),
        (("IWSLT17.TED.dev2010.de-en.de.xml", "IWSLT17.TED.dev2010.de-en.en.xml"), XML, (6, 7, 9)),
    ],
)
def test_the_release_is_read_as_its_segments(
    names: tuple[str, str], form: str, places: tuple[int, ...], tmp_path: Path
) -> None:
    german, english = ({**GERMAN}, {**ENGLISH})
    if form is XML:
        german["second"] = english["second"] = "2 &lt; 3 &amp; 4."  # as the hub has it
    files = [write(tmp_path / name, form.format(**texts)) for name, texts in zip(names, (german, english), strict=True)]
    samples = read(",".join(files))
    assert [sample.references[0] for sample in samples] == [english[name] for name in ("first", "second", "third")]
    assert [sample.source for sample in samples] == [f"{files[0]}:{place}" for place in places]
    if form is XML:
        broken = write(tmp_path / "x.de.xml", "<seg id='1'>a\nb</seg>\n")
        assert f"{broken}:1: a <seg> does not end" in refusal(lambda: read(f"{broken},{files[1]}"))
    nothing = write(tmp_path / "train.tags.none.de", "<url>x</url>\n")
    assert "has tags but no sentences" in refusal(lambda: read(f"{nothing},{files[1]}"))


def release(folder: Path, german: str, english: str) -> list[Example]:
    files = [write(folder / f"train.tags.de-en.{name}", text) for name, text in (("de", german), ("en", english))]
    return read(",".join(files))


def test_blank_lines_of_the_release_are_no_sentences(tmp_path: Path) -> None:
    """Between talks, at the end, and in one file only, if both have the same number of sentences."""
    german, english = (TAGS.format(**texts) for texts in (GERMAN, ENGLISH))
    expected = [ENGLISH[name] for name in ("first", "second", "third")]
    apart = [text.replace("<url>", "\n<url>") + "\n \n" for text in (german, english)]
    for one, other in (apart, (apart[0], english), (german, apart[1])):
        assert [sample.references[0] for sample in release(tmp_path, one, other)] == expected
    # A sentence that one file lacks would move all later ones.
    lost = german.replace(GERMAN["first"], "")
    message = refusal(lambda: release(tmp_path, lost, english))
    assert "has 2 sentences" in message and "train.tags.de-en.de:7 is blank" in message
    message = refusal(lambda: release(tmp_path, lost, english.replace(ENGLISH["third"], "")))
    assert message.startswith(f"{tmp_path}/train.tags.de-en.de:7: the line is blank, but the other file has other")
    xml = [XML.format(**{**texts, "second": "a"}).replace("<doc ", "\n \n<doc ") for texts in (GERMAN, ENGLISH)]
    files = [write(tmp_path / f"dev.{name}.xml", text) for name, text in zip(("de", "en"), xml, strict=True)]
    assert len(read(",".join(files))) == 3
    write(tmp_path / "dev.en.xml", xml[1].replace(">a<", "> <"))
    assert f"{tmp_path}/dev.en.xml:9: the line is empty" in refusal(lambda: read(",".join(files)))
