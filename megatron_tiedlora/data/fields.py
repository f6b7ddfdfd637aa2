"""Checked access to a row's fields, and small changes to them, shared by all tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

# The lookbehind lets a match start only where white space starts; a search from every blank would be quadratic.
_LINE_BREAK = re.compile(r"(?<!\s)\s*[\r\n]\s*")


def required_text(row: Mapping[str, Any], name: str, source: str) -> str:
    """Return the text of field `name`. Raises UserError naming source and field if it is missing or empty."""
    value = row.get(name)
    if value is None:
        found = f"{source}: field {name!r} is missing; the row has {describe_fields(row)}"
        raise UserError(f"{found}; fill the field, or remove the row")
    return checked_text(value, name, source)


def checked_text(value: Any, name: str, source: str, *, allow_empty: bool = False) -> str:
    """Return `value` if it is text that can be tokenised. Raises UserError naming source and field."""
    if not isinstance(value, str):
        fix = "put it in quotes" if isinstance(value, int | float) else "give a text, or remove the row"
        raise UserError(f"{source}: field {name!r} is {shown(value)} ({type(value).__name__}), not text; {fix}")
    if not allow_empty and not value.strip():
        raise UserError(f"{source}: field {name!r} is empty; remove the row or fill it")
    if not is_text(value):
        raise UserError(f"{source}: field {name!r} holds half of a surrogate pair, which is not text; remove it")
    return value


def is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8. JSON and the command line can produce strings that cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def required_texts(value: Any, name: str, source: str) -> tuple[str, ...]:
    """Return the texts of the list in field `name`. Raises UserError if there is none, or one is empty."""
    if not isinstance(value, list | tuple):
        said = f"{source}: field {name!r} is {shown(value)}, not a list of texts"
        raise UserError(f"{said}; give at least one text, as a list")
    if not value:
        raise UserError(f"{source}: field {name!r} is an empty list; every row needs at least one text in it")
    return tuple(checked_text(text, name, source) for text in value)


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the row's fields without those named. A prompt may use all fields but the answer."""
    return {name: value for name, value in row.items() if name not in names}


def without_line_breaks(text: str) -> str:
    """Return the text with each line break and the white space around it replaced by one space."""
    return _LINE_BREAK.sub(" ", text.strip())


def describe_fields(row: Mapping[str, Any]) -> str:
    """Return the names of a row's fields, for a message."""
    return ", ".join(repr(str(name)) for name in row) or "no fields"
