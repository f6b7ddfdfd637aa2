"""How messages word sizes, times, counts, names, first lines of errors and the nearest name; and tables as text."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

Number = TypeVar("Number", int, float)

_SCALES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_LONGEST_NAME, _MOST_NAMES = 200, 8
_LIKENESS = 0.6  # of a name that is suggested; below it most suggestions mislead


def bytes_in_words(size: float) -> str:
    """A number of bytes with a decimal unit, of GB at most: `1.50 GB`, `640 B`."""
    return amount_text(size, "B", prefixes="GMk")


def amount_text(value: float, unit: str, *, prefixes: str = "PTGMk") -> str:
    """A number with the largest of these decimal prefixes that leaves at least 1: `1.50 TFLOP`, `640 B`."""
    for prefix in prefixes:
        if value >= _SCALES[prefix]:
            return f"{value / _SCALES[prefix]:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


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


def range_text(values: Collection[Number], words: Callable[[Number], str] = "{:,}".format) -> str:
    """`7`, `1 to 7`: the least and the most, or one of them if both are worded alike."""
    return " to ".join(dict.fromkeys(map(words, (min(values), max(values)))))


# Tables ---------------------------------------------------------------------------------------------------------------


def aligned_lines(rows: Sequence[Sequence[str]], *, align: str = "<>", indent: str = "") -> list[str]:
    """One line for each row. Columns are as wide as their longest cell and two spaces apart.

    Args:
        rows: the header, if there is one, is the first. The last cells of a row may be missing. Spaces around a header
            make its column wider.
        align: `<` for each column that is aligned to the left and `>` for the right; the last one is for all that
            follow, so that by default only the first column, of labels, is to the left.
        indent: what each line begins with.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = align.ljust(len(widths), align[-1])
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False))
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return lines


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV below the names of the columns; what a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
