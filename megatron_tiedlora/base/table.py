"""Tables as text, aligned or in Markdown: whatever shows rows of cells makes its lines here."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest


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
