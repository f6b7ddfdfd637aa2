"""Reads the tables of a dry run's report."""

from __future__ import annotations

import re


def stage_table(text: str, title: str) -> list[dict[str, str]]:
    """The cells of the table under the section that starts with `title`, by stage and column; joint lines repeated."""
    section = text[re.search(rf"^{title}", text, re.MULTILINE).start() :].split("\n\n")[0]  # type: ignore[union-attr]
    table = [line for line in section.splitlines() if re.match(r"  (stage|\d+(-\d+)?) {2,}", line)]  # and no notes
    header, *lines = [re.split(" {2,}", line.strip()) for line in table]
    assert header[0] == "stage", header
    stages: list[dict[str, str]] = []
    for label, *cells in lines:
        first, last = (label.split("-") * 2)[:2]
        assert int(first) == len(stages)
        row = dict(zip(header[1:], cells, strict=True))
        stages += [row] * (int(last) - int(first) + 1)
    return stages
