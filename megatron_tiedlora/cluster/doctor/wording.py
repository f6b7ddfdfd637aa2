"""Names, times and counts as text."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_NAMES = 8


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
    """`1 host`, `2 hosts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
