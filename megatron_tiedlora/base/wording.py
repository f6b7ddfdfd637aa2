"""Wording that several packages share: sizes, the first line of a library's error, and the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_LONGEST_NAME = 200


def bytes_in_words(size: float) -> str:
    """A number of bytes with a decimal unit: `1.50 GB`, `640 B`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest_name(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' with the known name nearest to `name`, or '' if none is near."""
    if len(name) > _LONGEST_NAME:
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""
