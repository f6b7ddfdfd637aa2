"""base/table.py: widths, sides and indents of text tables, by hand."""

from __future__ import annotations

from megatron_tiedlora.base.errors import aligned_lines

ROWS = [["stage", "bytes"], ["0", "12.50 GB"], ["1-3", ""]]


def test_labels_to_the_left_and_numbers_to_the_right() -> None:
    """Two spaces apart, and no line ends with spaces."""
    assert aligned_lines(ROWS) == ["stage     bytes", "0      12.50 GB", "1-3"]
    assert aligned_lines(ROWS, indent="  ") == ["  stage     bytes", "  0      12.50 GB", "  1-3"]


def test_a_side_for_each_column() -> None:
    """The last one is for the columns that follow, too."""
    rows = [("a", "bb", "c", "d"), ("aaa", "b", "ccc", "ddd")]
    assert aligned_lines(rows, align="<") == ["a    bb  c    d", "aaa  b   ccc  ddd"]
    assert aligned_lines(rows, align="<<>") == ["a    bb    c    d", "aaa  b   ccc  ddd"]


def test_rows_may_end_early_or_late() -> None:
    """A row without its last cells leaves them empty, and one cell more than the header has is a column too."""
    rows = [("host", "ranks"), ("alpha", "8", "note"), ("b",)]
    assert aligned_lines(rows, align="<") == ["host   ranks", "alpha  8      note", "b"]


def test_spaces_of_a_header_make_its_column_wider() -> None:
    assert aligned_lines([("", "  most"), ("one", "1")]) == ["       most", "one       1"]
