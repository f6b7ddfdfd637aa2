"""IWSLT's text files: two aligned texts, as plain sentences or as the release has them, beside files of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from task_files import refusal, write, write_rows

from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tasks.iwslt2017 import TASK


def read(task: str, path: str, split: Any = "test", **options: Any) -> list[Example]:
    return load_split(task, split, files={split: path}, seed=0, **options)


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
    samples = read("iwslt2017", path)
    assert [(sample.prompt, sample.completion) for sample in samples] == [
        ("Guten Tag.\nEnglish:", " Good day."),
        ("Ja\u2028nein.\nEnglish:", " Yes no."),
    ]
    assert [sample.source for sample in samples] == [f"{first}:1", f"{first}:2"]
    assert len(read("iwslt2017", path, limit=1)) == 1


def aligned_refusal(folder: Path, german: str | bytes, english: str | bytes) -> str:
    first, second = write(folder / "x.de", german), write(folder / "x.en", english)
    return refusal(lambda: read("iwslt2017", f"{first},{second}", "train"))


def test_aligned_files_that_do_not_fit(tmp_path: Path) -> None:
    message = aligned_refusal(tmp_path, "a\nb\nc\n", "a\nb\n")
    assert f"{tmp_path}/x.de has 3 lines and {tmp_path}/x.en has 2" in message
    assert f"{tmp_path}/x.en:2: the line is empty" in aligned_refusal(tmp_path, "a\nb\nc\n", "a\n \nc\n")
    assert f"{tmp_path}/x.de:1: the line is empty" in aligned_refusal(tmp_path, "\nb\n", "\nb\n")
    assert f"{tmp_path}/x.de:2: not UTF-8" in aligned_refusal(tmp_path, b"a\n\xe4\n", "a\nb\n")
    assert f"{tmp_path}/x.en: holds no lines" in aligned_refusal(tmp_path, "a\n", "\n")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("x.de", ["--test_file", "text of one language", "GERMAN,ENGLISH"]),
        ("x.txt", ["text of one language"]),
        ("x.de,y.de", ["both files end in .de"]),
        ("x.de,x.en,x.fr", ["3 files", "GERMAN,ENGLISH"]),
        ("x.de,", ["2 files", "GERMAN,ENGLISH"]),
        ("x.jsonl,y.de", ["2 files", "files of rows (.jsonl, .json, .csv, .parquet, .arrow)"]),
        ("IWSLT/iwslt2017,y.de", ["2 files", "only hub ids and files of rows"]),
        ("x.de:0.5,y.de:0.5", ["two aligned texts are one source, which has no weights; give --test_file x.de,y.de"]),
        ("x.de,x.en:0.3", ["which has no weights"]),
        ("x.de,missing.en", ["missing.en: no such file"]),
        ("x.de,.", ["is a folder", "a text file"]),
    ],
)
def test_names_that_are_no_pair(names: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("x.de", "y.de", "x.txt", "x.jsonl"):
        write(tmp_path / name, "a\n")
    message = refusal(lambda: read("iwslt2017", names))
    assert all(word in message for word in words)


def test_files_of_rows_are_read_as_such(tmp_path: Path) -> None:
    """Also where a name has a comma or a language, where there are several, and among data sets of the hub."""
    for name in ("a,b.jsonl", "train.de.jsonl", "train.en.parquet"):
        path = write_rows(tmp_path / name, [{"de": "Ja.", "en": "Yes."}])
        assert [sample.completion for sample in read("iwslt2017", path)] == [" Yes."]
    a, b = (write_rows(tmp_path / name, [{"de": "Ja.", "en": name}]) for name in ("a.jsonl", "b.csv.jsonl"))
    samples = load_split("iwslt2017", "train", files={"train": f"{a}:0.5,{b}:0.5", "validation": a}, seed=0)
    assert [sample.completion for sample in samples] == [" a.jsonl", " b.csv.jsonl"]
    assert "2 files" in refusal(lambda: read("iwslt2017", f"{a}:0.5,./none/none:0.5"))
    assert TASK.read_files is not None
    assert TASK.read_files(f"{a}:0.5,someone/pairs:de-en:train:0.5", "--train_file") is None


# The release ------------------------------------------------------------------------------------------------

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
    samples = read("iwslt2017", ",".join(files))
    assert [sample.references[0] for sample in samples] == [english[name] for name in ("first", "second", "third")]
    assert [sample.source for sample in samples] == [f"{files[0]}:{place}" for place in places]
    if form is XML:
        broken = write(tmp_path / "x.de.xml", "<seg id='1'>a\nb</seg>\n")
        assert f"{broken}:1: a <seg> does not end" in refusal(lambda: read("iwslt2017", f"{broken},{files[1]}"))
    nothing = write(tmp_path / "train.tags.none.de", "<url>x</url>\n")
    assert "holds no sentence" in refusal(lambda: read("iwslt2017", f"{nothing},{files[1]}"))


def release(folder: Path, german: str, english: str) -> list[Example]:
    names = ("train.tags.de-en.de", "train.tags.de-en.en")
    files = [write(folder / name, text) for name, text in zip(names, (german, english), strict=True)]
    return read("iwslt2017", ",".join(files))


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
    assert message.startswith(f"{tmp_path}/train.tags.de-en.de:7: is blank, and the other file is blank elsewhere")
    xml = [XML.format(**{**texts, "second": "a"}).replace("<doc ", "\n \n<doc ") for texts in (GERMAN, ENGLISH)]
    files = [write(tmp_path / f"dev.{name}.xml", text) for name, text in zip(("de", "en"), xml, strict=True)]
    assert len(read("iwslt2017", ",".join(files))) == 3
    write(tmp_path / "dev.en.xml", xml[1].replace(">a<", "> <"))
    assert f"{tmp_path}/dev.en.xml:9: the line is empty" in refusal(lambda: read("iwslt2017", ",".join(files)))
