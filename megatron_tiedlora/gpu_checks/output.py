"""The findings as lines for the screen, as markdown and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_tiedlora.gpu_checks.records import Check, Value

_WIDTH = 118
_NAMED = 3  # findings before each piece of advice
_COLUMNS = ("part", "check", "status", "value", "expected")


def shown_value(value: Value, unit: str = "") -> str:
    """A value with its unit, as short text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return f"{value} {unit}".rstrip()
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e9:
        text = f"{int(value):,}"
    elif 0.01 <= abs(value) < 1e6:
        text = f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    else:
        text = f"{value:.2e}"
    return f"{text} {unit}".rstrip()


def check_lines(check: Check, told: list[str]) -> list[str]:
    """One finding for the screen: name, status, value, and below it the fix if it is not in `told` yet."""
    held = f"  ({check.expected})" if check.expected else ""
    status = "" if check.status == "info" else check.status.upper()
    lines = [f"  {status:<4} {check.name:<58} {shown_value(check.value, check.unit)}{held}".rstrip()]
    why = "" if check.status == "pass" else check.why  # the files have it in any case
    is_new = bool(check.fix) and check.fix not in told
    if is_new:
        told.append(check.fix)
    for note in (why, f"-> {check.fix}" if is_new else ""):
        lines += textwrap.wrap(note, _WIDTH, initial_indent=" " * 9, subsequent_indent=" " * 9)
    return lines


def summary_line(checks: Sequence[Check]) -> str:
    """The number of findings of each status."""
    counts = Counter(check.status for check in checks)
    return ", ".join(f"{counts[status]} {status}" for status in ("pass", "warn", "fail", "skip") if counts[status])


def to_json(checks: Sequence[Check], about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, for scripts: fields as in `Check`; nan and infinities are strings, because JSON has none."""
    rows = [asdict(check) for check in checks]
    for row in rows:
        if isinstance(row["value"], float) and not math.isfinite(row["value"]):
            row["value"] = str(row["value"])
    return {**about, "checks": rows}


def to_markdown(checks: Sequence[Check], about: Mapping[str, Any]) -> list[str]:
    """A page: what was checked, a table of all findings, and what to do."""
    lines = ["# check_gpu", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    lines += [f"{summary_line(checks)}.", "", f"| {' | '.join(_COLUMNS)} | s | note |", "|---" * 7 + "|"]
    for check in checks:
        cells = [check.part, check.name, check.status, shown_value(check.value, check.unit), check.expected]
        lines.append(f"| {' | '.join(map(_cell, [*cells, f'{check.seconds:.1f}', check.why]))} |")
    wrong: dict[str, list[str]] = {}
    for check in checks:
        if check.fix:
            wrong.setdefault(check.fix, []).append(f"{check.part}: {check.name}")
    if wrong:
        lines += ["", "## What to do", "", *(f"- {_named(names)}: {fix}" for fix, names in wrong.items())]
    return lines


def _named(names: Sequence[str]) -> str:
    """The first findings that have the same fix, and the number of the others."""
    more = len(names) - _NAMED
    return ", ".join(f"**{name}**" for name in names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
