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
from megatron_tiedlora.config.cli import build_parser, parse_settings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import CommandSettings, flag_word
from megatron_tiedlora.config.launch_settings import DoctorSettings, LaunchSettings
from megatron_tiedlora.config.plan_settings import PlanSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.sweep_settings import SweepSettings

DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = frozenset(re.findall(r"--[a-z][a-z0-9_]*", "\n".join(file.read_text() for file in DOCUMENTS)))


KINDS = [Settings, EvaluateSettings, SweepSettings, LaunchSettings, DoctorSettings, BenchSettings, PlanSettings]


@pytest.mark.parametrize("kind", KINDS)
def test_a_help_begins_with_what_the_command_does(kind: type[CommandSettings]) -> None:
    usage, empty, about, *_ = build_parser(kind).format_help().splitlines()
    assert usage.startswith("usage: tiedlora ") and usage.endswith("[--FLAG VALUE ...]") and not empty
    assert kind.about.startswith(about)


def test_a_help_shows_the_types_that_a_flag_takes() -> None:
    def shown(kind: type[CommandSettings]) -> set[str]:
        flags = (line for line in build_parser(kind).format_help().splitlines() if line.startswith("  --"))
        return {line[2:].split("  ")[0] for line in flags}

    assert {
        "--learning_rates X[,X...]",
        "--together N|auto",
        "--single_layers N[,N...]|paper",
        "--ranks N[,N...]",
        "--methods {lora,vera,tl1,tl2,tl3,tl4,tl5,tl6}[,...]",
    } < shown(SweepSettings)
    assert {
        "--dry_run [{true,false}]",
        "--compile {auto,true,false}",
        "--alpha X",
        "--targets TEXT[,TEXT...]",
        "--base {int8,fp8,nf4}",
    } < shown(Settings)
    assert {"--json TEXT", "--shares X[,X...]"} < shown(BenchSettings)
    assert "--model" in build_parser(PlanSettings).format_help().splitlines()[0]


def test_the_name_of_a_flag_is_its_name_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("json: figures.json\n")
    assert parse_settings([f"--config={file}"], BenchSettings).json_file == "figures.json"
    assert parse_settings(["--json=-"], DoctorSettings).json_file == "-"


@pytest.mark.parametrize("kind", KINDS)
def test_every_flag_is_in_a_document(kind: type[CommandSettings]) -> None:
    missing = [name for name in kind.model_fields if flag_word(name, kind) not in NAMED]
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
