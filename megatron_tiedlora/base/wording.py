"""Words for what several packages tell: a size, and what an error of another library says."""

from __future__ import annotations


def bytes_in_words(size: float) -> str:
    """A number of bytes with a decimal unit: `1.50 GB`, `640 B`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
