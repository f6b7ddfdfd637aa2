"""IWSLT 2017, German to English: one sentence of a talk and its translation.

Rows are {"translation": {"de", "en"}}, as on the hub, or flat {"de", "en"}. They can also come from two text files
with aligned lines, given as `train.de,train.en`: plain sentences, or the files of the release, `train.tags.*` and
`*.xml`, whose sentences are the lines without a tag at their start and the `<seg>` elements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.data.fields import required_text, without, without_line_breaks
from megatron_tiedlora.data.readers import SUFFIXES, Row, is_rows_file, read_lines
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.sources import without_weight
from megatron_tiedlora.data.task import HubSource, Parts, Task

_LANGUAGES = ("de", "en")
_SEGMENT = re.compile(r"<seg\b[^>]*>([^<]*)</seg>")  # with its entities, as the hub's rows have them


def _parts(row: Mapping[str, Any], source: str, _: Reading) -> Parts:
    # Decoding would stop at a line break inside a sentence.
    german, english = (without_line_breaks(required_text(row, name, source)) for name in _LANGUAGES)
    return Parts({**without(row, "en"), "de": german}, None, (english,))


def _unfold(row: Mapping[str, Any], source: str) -> Iterator[Row]:
    """Yield the row with the languages of its `translation` as fields. A flat row is yielded unchanged."""
    pair = row.get("translation")
    yield ({**without(row, "translation"), **pair} if isinstance(pair, Mapping) else dict(row)), source


def _aligned_files(argument: str, flag: str, reading: Reading) -> Callable[[], list[Row]] | None:
    """What reads the rows of two text files "GERMAN,ENGLISH", or None if the argument is one file of rows.

    The last suffix that is .de or .en tells the language of a file; without one, the order does.
    """
    names = [argument] if user_path(argument).exists() else [name.strip() for name in argument.split(",")]
    if len(names) > 1 and all(is_rows_file(without_weight(name)) for name in names):
        return None
    if len(names) == 1:
        if not is_rows_file(argument) and (_language(argument) or argument.lower().endswith(".txt")):
            raise UserError(f"{flag} {argument}: text of one language; give both as {flag} GERMAN,ENGLISH")
        return None
    if len(names) != 2 or any(not name or is_rows_file(name) for name in names):
        shapes = f"two text files as {flag} GERMAN,ENGLISH, or one {', '.join(SUFFIXES)} file of rows"
        raise UserError(f"{flag} {argument}: {len(names)} files, expected {shapes}")
    first, second = (_language(name) for name in names)
    if first is not None and first == second:
        raise UserError(f"{flag} {argument}: both files end in .{first}; give the German and the English one")
    german_name, english_name = reversed(names) if first == "en" or second == "de" else names
    return partial(_read_aligned, german_name, english_name, reading)


def _read_aligned(german_name: str, english_name: str, reading: Reading) -> list[Row]:
    german, english = (_sentences(name, reading) for name in (german_name, english_name))
    if len(german) != len(english):
        raise UserError(
            f"{german_name} has {len(german)} lines and {english_name} has {len(english)}; line N of one must be the "
            "translation of line N of the other"
        )
    rows: list[Row] = []
    for (number, de), (other, en) in zip(german, english, strict=True):
        for name, place, line in ((german_name, number, de), (english_name, other, en)):
            if not line.strip():
                raise UserError(f"{name}:{place}: the line is empty; remove this line from both files or fill it")
        rows.append(({"de": de, "en": en}, f"{german_name}:{number}"))
    return rows


def _sentences(name: str, reading: Reading) -> list[tuple[int, str]]:
    """Number and text of each sentence of a file. Version 0.1 took every line for one."""
    lines = list(enumerate(read_lines(name), start=1))
    base = Path(name.lower()).name
    if reading.first_rules or not (base.endswith(".xml") or base.startswith("train.tags.")):
        return lines
    found = []
    for number, line in lines:
        text = line.strip()
        segments = [segment.strip() for segment in _SEGMENT.findall(text)] if text.startswith("<") else [text]
        if text.startswith("<") and len(segments) < text.count("<seg"):
            raise UserError(f"{name}:{number}: a <seg> does not end on its line; put each on a line of its own")
        found += [(number, segment) for segment in segments]
    if not found:
        raise UserError(f"{name}: holds no sentence, only tags; give the file of the sentences")
    return found


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
    hub=HubSource(
        "IWSLT/iwslt2017",
        {"train": "train", "validation": "validation", "test": "test"},
        config="iwslt2017-de-en",
        parquet_branch=True,
    ),
    validation_rows=888,  # the size of the official part
    unfold=_unfold,
    read_files=_aligned_files,
)
