"""How messages word sizes, times, counts, lists of names, the first line of a library's error, and the nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

_LONGEST_NAME, _MOST_NAMES = 200, 8
_LIKENESS = 0.6  # of a name that is suggested; below it most suggestions mislead


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
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=_LIKENESS)
    return f" (did you mean {matches[0]}?)" if matches else ""


def enumerate_names(names: Sequence[str]) -> str:
    """`a, b and c`; a long list is cut to its first names and the number of the others."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def time_text(seconds: float) -> str:
    """Seconds with the unit that fits: `85 us`, `3.2 ms`, `1.5 s`."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_text(number: int, noun: str) -> str:
    """`1 host`, `2 hosts`, `1,024 micro-batches`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"
