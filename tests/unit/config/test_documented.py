"""Documents explain every flag of a command with settings, and their examples in Python are complete."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from pathlib import Path
from textwrap import dedent

import pytest
from folders import ROOT

from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import CommandSettings, field_flags
from megatron_tiedlora.config.launch_settings import LaunchSettings
from megatron_tiedlora.config.plan_settings import PlanSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.sweep_settings import SweepSettings

DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = frozenset(re.findall(r"--[a-z][a-z0-9_]*", "\n".join(file.read_text() for file in DOCUMENTS)))


@pytest.mark.parametrize(
    "kind", [Settings, EvaluateSettings, SweepSettings, LaunchSettings, DoctorSettings, BenchSettings, PlanSettings]
)
def test_every_flag_is_in_a_document(kind: type[CommandSettings]) -> None:
    missing = [name for name, field in kind.model_fields.items() if not NAMED & {*field_flags(name, field)}]
    assert not missing


def examples(document: Path) -> list[str]:
    """The indented blocks of a document that begin with an import."""
    blocks = re.findall(r"(?:(?:    .*)?\n)+", document.read_text())
    return [found for block in blocks if (found := dedent(block).strip()).startswith(("import ", "from "))]


def missing_names(tree: ast.Module) -> set[str]:
    """Names that a program reads and never binds."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return {node.id for node in names} - bound


def test_examples_in_python_are_complete() -> None:
    """Each runs by itself: it imports what it uses, and what it imports of this package is there."""
    found = {f"{file.name}: {text}": ast.parse(text) for file in DOCUMENTS for text in examples(file)}
    assert len(found) >= 6
    assert not {where: missing for where, tree in found.items() if (missing := missing_names(tree))}
    for node in (node for tree in found.values() for node in ast.walk(tree)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron_tiedlora"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
