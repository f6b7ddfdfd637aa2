"""Defines the task IWSLT 2017, German to English: one sentence of a talk and its translation.

Rows are {"translation": {"de", "en"}}, as on the hub, or flat {"de", "en"}. They can also come from two text files with
aligned lines, given as `train.de,train.en`. These files have plain sentences, or they are files of the release
(`train.tags.*`, `*.xml`). In release files, each `<seg>` element and each line without a leading tag is a sentence.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.data import readers
from megatron_tiedlora.data.readers import is_rows_file, required_text, without, without_line_breaks
from megatron_tiedlora.data.sources import parse_source
from megatron_tiedlora.data.tables import HubData, Row
from megatron_tiedlora.data.task import Parts, Reading, Task

_LANGUAGES = ("de", "en")
_SEGMENT = re.compile(r"<seg\b[^>]*>([^<]*)</seg>")  # entities are not decoded, as in the hub's rows


def _parts(row: Mapping[str, Any], source: str, _: Reading) -> Parts:
    # Generation would stop at a line break inside a sentence.
    german, english = (without_line_breaks(required_text(row, name, source)) for name in _LANGUAGES)
    return Parts({**without(row, "en"), "de": german}, None, (english,))


def _unfold(row: Mapping[str, Any], source: str) -> Iterator[Row]:
    """Yield the row with the fields `de` and `en` of its `translation`. A flat row is yielded unchanged."""
    pair = row.get("translation")
    yield ({**without(row, "translation"), **pair} if isinstance(pair, Mapping) else dict(row)), source


def _aligned_files(argument: str, flag: str) -> Callable[[], list[Row]] | None:
    """Return a function that reads the rows of two text files, or None if the argument names data files.

    The last suffix .de or .en determines the language of a file. Without such a suffix, the first file is German."""
    names = [argument] if user_path(argument).exists() else [name.strip() for name in argument.split(",")]
    bare = [parse_source(name).name for name in names]
    if len(names) > 1 and all(map(_holds_rows, bare)):
        return None
    if len(names) == 1:
        if not is_rows_file(bare[0]) and (_language(bare[0]) or bare[0].lower().endswith(".txt")):
            raise UserError(f"{flag} {argument}: this is text in one language; give two files as {flag} GERMAN,ENGLISH")
        return None
    if len(names) != 2 or any(not name or _holds_rows(name) for name in bare):
        kinds = f"only hub ids and data files ({', '.join(readers.SUFFIXES)})"
        said = f"{flag} {argument}: these {len(names)} files cannot be read together"
        raise UserError(f"{said}; give two text files as {flag} GERMAN,ENGLISH, or {kinds}")
    if bare != names:
        said = f"{flag} {argument}: two aligned text files are one source, which cannot have weights"
        raise UserError(f"{said}; give {flag} {','.join(bare)}")
    first, second = (_language(name) for name in names)
    if first is not None and first == second:
        raise UserError(f"{flag} {argument}: both files end in .{first}; give one German and one English file")
    return partial(_read_aligned, *(reversed(names) if first == "en" or second == "de" else names))


def _read_aligned(german_name: str, english_name: str) -> list[Row]:
    german, english = (_sentences(name) for name in (german_name, english_name))
    _check_aligned(german, english)
    rows: list[Row] = []
    for (number, de), (other, en) in zip(german.lines, english.lines, strict=True):
        for name, of_line, line in ((german_name, number, de), (english_name, other, en)):
            if not line.strip():
                raise UserError(f"{name}:{of_line}: the line is empty; add the sentence, or remove it from both files")
        rows.append(({"de": de, "en": en}, f"{german_name}:{number}"))
    return rows


def _holds_rows(name: str) -> bool:
    """Return whether a name refers to a data file, or can only refer to a hub data set."""
    if is_rows_file(name) or user_path(name).exists() or _language(name) or name.lower().endswith(".txt"):
        return is_rows_file(name)
    return "/" in name and readers.may_be_hub_id(name.partition(":")[0])


@dataclass(frozen=True)
class _Sentences:
    """The sentences of a file.

    unit: the word for one sentence in messages: "line" or "sentence".
    lines: the line number and the text of each sentence.
    blank: the number of sentences before each skipped blank line, and that line's line number.
    """

    name: str
    unit: str
    lines: list[tuple[int, str]]
    blank: list[tuple[int, int]] = field(default_factory=list)


def _sentences(name: str) -> _Sentences:
    """Return the sentences of a file. In a plain file, every line is a sentence. In a file of the release, segments and
    lines without a tag are sentences, and blank lines are skipped."""
    lines = list(enumerate(readers.read_lines(name), start=1))
    base = Path(name.lower()).name
    if not (base.endswith(".xml") or base.startswith("train.tags.")):
        return _Sentences(name, "line", lines)
    found = _Sentences(name, "sentence", [])
    for number, line in lines:
        text = line.strip()
        segments = [segment.strip() for segment in _SEGMENT.findall(text)] if text.startswith("<") else [text]
        if text.startswith("<") and len(segments) < text.count("<seg"):
            raise UserError(f"{name}:{number}: a <seg> does not end on its line; put each <seg> on a separate line")
        if text:
            found.lines.extend((number, segment) for segment in segments)
        elif not base.endswith(".xml"):  # in .xml files a missing sentence is an empty segment
            found.blank.append((len(found.lines), number))
    if not found.lines:
        raise UserError(f"{name}: has tags but no sentences; give the file with the sentences")
    return found


def _check_aligned(german: _Sentences, english: _Sentences) -> None:
    """Raise UserError if the files have different numbers of sentences, or blank lines at different positions."""
    if len(german.lines) != len(english.lines):
        shorter = min(german, english, key=lambda sentences: len(sentences.lines))
        blank = f" ({shorter.name}:{shorter.blank[0][1]} is blank)" if shorter.blank else ""
        raise UserError(
            f"{german.name} has {len(german.lines)} {german.unit}s and {english.name} has {len(english.lines)}{blank};"
            f" make {german.unit} N of one file the translation of {german.unit} N of the other file"
        )
    before = [{count for count, _ in sentences.blank} for sentences in (german, english)]
    if all(before) and before[0] != before[1]:
        count = min(before[0] ^ before[1])
        file = german if count in before[0] else english
        number = next(line for start, line in file.blank if start == count)
        raise UserError(
            f"{file.name}:{number}: the line is blank, but the other file has other blank lines, so a sentence may"
            " be missing; remove the blank lines from both files, or add the sentences"
        )


def _language(name: str) -> str | None:
    found = [suffix[1:] for suffix in Path(name.lower()).suffixes if suffix[1:] in _LANGUAGES]
    return found[-1] if found else None


TASK = Task(
    name="iwslt2017",
    fields=_LANGUAGES,
    template="{de}\nEnglish:",
    parts=_parts,
    metrics=("bleu",),
    stop="\n",  # one sentence per line
    hub={
        split: HubData("IWSLT/iwslt2017", split, "iwslt2017-de-en", parquet_branch=True)
        for split in ("train", "validation", "test")
    },
    validation_rows=888,  # the size of the official validation split
    unfold=_unfold,
    read_files=_aligned_files,
)
