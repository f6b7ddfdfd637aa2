"""The package keeps its proportions: lines by floor, modules, import lines, and the lines that explain.

A floor is a folder of the package. Its number is what was measured on the day this test was written, or less since.
A change that makes a floor smaller lowers its number, and one that has to raise a number writes the reason beside it.
`python -m pytest -s tests/unit/test_proportion.py` prints the tables with what is measured now, to be copied over those
below. Lines are only the shadow of what is wanted, which is fewer concepts: dense code is no gain.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.folders import ROOT

PACKAGE = ROOT / "megatron_tiedlora"
TOP = "(top)"  # the files of no folder
Table = Mapping[str, tuple[float, str]]

# fmt: off
# At most so many lines, and the reason where the number was raised.
LINES: Table = {
    "(top)": (84, "lm_eval.py; PEFT's method has a package"),
    "adapters": (1367, "layouts of adapters that come and go"),
    "base": (2141, "the extra `service`"),
    "checkpoint": (2224, "files of a checkpoint in any folder"),
    "cluster": (1459, "--on_end"),
    "commands": (1160, "serve-training"),
    "config": (3040, "serve-training"),
    "convert": (3353, "aliases, tags, lineage and gc of the index"),
    "data": (4625, "losses of tokens in shared micro-batches"),
    "engine": (1023, "optimizers in a module of their own; log-probabilities out"),
    "evaluation": (2110, "settings and log-probabilities of each row, prompts computed once"),
    "integrations": (2047, "--top_k for vLLM"),
    "model": (4319, "the tail of a stage in a module; losses of tokens"),
    "parallel": (2681, "losses of tokens; log-probabilities of the most likely tokens"),
    "peft": (439, "a package of its own, from integrations/ and peft.py"),
    "planning": (4661, "the decoder's module"),
    "runtime": (2210, "limits of many ranks"),
    "selfcheck": (4201, "the decoder's module"),
    "service": (3411, "protocol, order, durable queues and sampling; limits of polls, disk and crashes"),
    "study": (2052, "seeds, paired differences, LaTeX, jobs of Slurm"),
    "training": (2853, "models that are added to a running engine"),
}
WHOLE: Table = {
    "lines": (51460, "a training service for many clients"),
    "modules": (240, "the same"),
    "import lines in %": (6.34, "the same"),
}
# fmt: on
# Comments and docstrings in percent of all lines, when last measured. The share stays within a tenth of it: they are
# not thinned out to save lines.
EXPLAINING = 16.1


@dataclass(frozen=True)
class Measured:
    """Lines of some files: all, those of import statements, and those of comments and docstrings."""

    lines: Counter[str]
    modules: int
    imports: int
    explaining: int

    def floors(self) -> dict[str, float]:
        """Lines by floor, in the order of their names."""
        return {name: self.lines[name] for name in sorted(self.lines)}

    def whole(self) -> dict[str, float]:
        """What WHOLE bounds."""
        lines = self.lines.total()
        return {"lines": lines, "modules": self.modules, "import lines in %": round(100 * self.imports / lines, 2)}

    def explaining_share(self) -> float:
        """Comments and docstrings, in percent of all lines."""
        return 100 * self.explaining / self.lines.total()


def measure(package: Path) -> Measured:
    """Measure all modules of a package, but not what protoc writes."""
    lines: Counter[str] = Counter()
    imports = explaining = 0
    files = sorted(file for file in package.rglob("*.py") if not file.stem.endswith("_pb2"))
    for file in files:
        parts = file.relative_to(package).parts
        text = file.read_text(encoding="utf-8")
        lines[parts[0] if len(parts) > 1 else TOP] += len(text.splitlines())
        of_imports, of_text = lines_by_kind(text)
        imports += len(of_imports)
        explaining += len(of_text)
    return Measured(lines, len(files), imports, explaining)


def lines_by_kind(text: str) -> tuple[set[int], set[int]]:
    """Numbers of the lines of imports, and of those that hold nothing but a comment or a part of a docstring."""
    imports: set[int] = set()
    docstrings: set[int] = set()
    strings: set[int] = set()  # a line of a long string may begin with #
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.update(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno > node.lineno:
            strings.update(range(node.lineno + 1, node.end_lineno + 1))
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings.update(range(first.lineno, first.end_lineno + 1))
    rows = list(enumerate(text.splitlines(), start=1))
    comments = {number for number, row in rows if row.lstrip().startswith("#")} - strings - imports
    blank = {number for number, row in rows if not row.strip()}
    return imports, (docstrings - blank) | comments


def grown(measured: Mapping[str, float], table: Table) -> Iterator[str]:
    """What is larger than its number in the table, or has none."""
    for name, now in measured.items():
        if name not in table:
            yield f"{name} is new, with {now:g}"
        elif now > table[name][0]:
            yield f"{name} grew from {table[name][0]:g} to {now:g}"


def thinned(share: float, before: float) -> Iterator[str]:
    """A share of comments and docstrings that left the tenth around what it was; both in percent."""
    if abs(share - before) > before / 10:
        yield f"comments and docstrings are {share:.2f} % of all lines, and were {before:.2f} %"


def printed(measured: Mapping[str, float], table: Table) -> str:
    """The table's source with what is measured; a reason stays."""
    rows = (f'    "{name}": ({now:g}, "{table.get(name, (0, ""))[1]}"),' for name, now in measured.items())
    return "\n".join(rows)


# Tests ----------------------------------------------------------------------------------------------------------


def test_the_package_keeps_its_proportions() -> None:
    found = measure(PACKAGE)
    print(f"\nLINES\n{printed(found.floors(), LINES)}\nWHOLE\n{printed(found.whole(), WHOLE)}")
    print(f"comments and docstrings: {found.explaining_share():.2f} % of all lines, {EXPLAINING} % when last measured")
    changes = [
        *grown(found.floors(), LINES),
        *grown(found.whole(), WHOLE),
        *thinned(found.explaining_share(), EXPLAINING),
    ]
    wanted = f"Mend it, or change the number in {Path(__file__).name} and write the reason beside it."
    assert not changes, "; ".join(changes) + f". {wanted}"
    assert not LINES.keys() - found.lines.keys(), "a floor of the table is gone; take out its row"


SOURCE = """'''A docstring

of two lines.'''
import os
from os import (  # of which one
    # comment
    path,
)
TEXT = '''
# no comment
'''  # not a line of its own
def function():
    "One line."
    # Why.
    import sys
    "no docstring"
"""


def test_lines_are_told_apart() -> None:
    imports, explaining = lines_by_kind(SOURCE)
    assert imports == {4, 5, 6, 7, 8, 15}
    assert explaining == {1, 3, 13, 14}


def test_what_grew_is_named() -> None:
    found = Measured(Counter({"training": 90, "hf": 10, "api": 5}), modules=4, imports=9, explaining=20)
    floors = {"training": (89, "one run of many adapters"), "api": (6, "")}
    assert list(grown(found.floors(), floors)) == ["hf is new, with 10", "training grew from 89 to 90"]
    whole = {"lines": (105, ""), "modules": (3, ""), "import lines in %": (8.5, "")}
    assert list(grown(found.whole(), whole)) == ["modules grew from 3 to 4", "import lines in % grew from 8.5 to 8.57"]
    assert '    "training": (90, "one run of many adapters"),' in printed(found.floors(), floors)
    assert found.explaining_share() == pytest.approx(19.05, abs=0.01)
    assert not [*thinned(18.1, 20.0), *thinned(21.9, 20.0)]
    assert list(thinned(17.9, 20.0)) == ["comments and docstrings are 17.90 % of all lines, and were 20.00 %"]
    assert list(thinned(22.1, 20.0)) == ["comments and docstrings are 22.10 % of all lines, and were 20.00 %"]
