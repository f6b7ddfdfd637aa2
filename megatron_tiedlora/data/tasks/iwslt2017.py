"""IWSLT 2017, German to English: one sentence of a talk and its translation.

Rows are {"translation": {"de", "en"}}, as on the hub, or flat {"de", "en"}. They can also come from two text files
with aligned lines, given as `train.de,train.en`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.data.fields import required_text, without, without_line_breaks
from megatron_tiedlora.data.readers import SUFFIXES, Row, is_rows_file, read_lines
from megatron_tiedlora.data.task import HubSource, Parts, Task

_LANGUAGES = ("de", "en")


def _parts(row: Mapping[str, Any], source: str, _: Any) -> Parts:
    # Decoding would stop at a line break inside a sentence.
    german, english = (without_line_breaks(required_text(row, name, source)) for name in _LANGUAGES)
    return Parts({**without(row, "en"), "de": german}, None, (english,))


def _unfold(row: Mapping[str, Any], source: str) -> Iterator[Row]:
    """Yield the row with the languages of its `translation` as fields. A flat row is yielded unchanged."""
    pair = row.get("translation")
    yield ({**without(row, "translation"), **pair} if isinstance(pair, Mapping) else dict(row)), source


def _read_aligned(argument: str, flag: str) -> list[Row] | None:
    """The rows of two text files "GERMAN,ENGLISH", or None if the argument is one file of rows.

    The last suffix that is .de or .en tells the language of a file; without one, the order does.
    """
    names = [argument] if user_path(argument).exists() else [name.strip() for name in argument.split(",")]
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
    german, english = read_lines(german_name), read_lines(english_name)
    if len(german) != len(english):
        raise UserError(
            f"{german_name} has {len(german)} lines and {english_name} has {len(english)}; line N of one must be the "
            "translation of line N of the other"
        )
    for number, pair in enumerate(zip(german, english, strict=True), start=1):
        for name, line in zip((german_name, english_name), pair, strict=True):
            if not line.strip():
                raise UserError(f"{name}:{number}: the line is empty; remove this line from both files or fill it")
    pairs = enumerate(zip(german, english, strict=True), start=1)
    return [({"de": de, "en": en}, f"{german_name}:{number}") for number, (de, en) in pairs]


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
    read_files=_read_aligned,
)
