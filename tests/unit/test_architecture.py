"""The house's shape: imports go one way, files stay small, DeepSpeed is imported only where an engine is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from folders import ROOT, SUPPORT

ORDER = (
    "base",
    "config",
    "parallel",
    "adapters",
    "model",
    "runtime",
    "engine",
    "planning",
    "data",
    "checkpoint",
    "convert",
    "hf",
    "peft",
    "evaluation",
    "training",
    "planner",
    "sharing",
    "cluster",
    "study",
    "benchmark",
    "gpu_checks",
    "commands",
    "api",
)
INTERFACE = ROOT / "megatron_tiedlora" / "__init__.py"  # exports names of other packages, imported when they are used
SOURCES = sorted((ROOT / "megatron_tiedlora").rglob("*.py"))
ENGINE_FILES = {
    "runtime/process_group.py",
    "engine/topology.py",  # DeepSpeed's topology and process groups
    "engine/pipelined.py",  # its PipelineModule
    "engine/runner.py",  # its schedules
    "engine/engine.py",
    "engine/optimizer_state.py",
}


def imported_modules(file: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_every_package_has_a_place_in_the_order() -> None:
    packages = {path.parent.name for path in (ROOT / "megatron_tiedlora").glob("*/__init__.py")}
    assert packages == set(ORDER)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    if file == INTERFACE:
        return
    here = file.relative_to(ROOT / "megatron_tiedlora").parts[0]
    here = "commands" if here == "__main__.py" else here
    for module in imported_modules(file):
        parts = module.split(".")
        if parts[0] in ("launch", "tools", "tests"):
            pytest.fail(f"{file} imports {module}")
        if parts[0] == "megatron_tiedlora" and len(parts) > 1:
            assert here in ORDER, f"{file} imports {module}"
            assert ORDER.index(parts[1]) <= ORDER.index(here), f"{file} imports {module}, an arrow that goes back"


def test_deepspeed_only_where_an_engine_is() -> None:
    users = {
        str(file.relative_to(ROOT / "megatron_tiedlora"))
        for file in SOURCES
        if any(module.split(".")[0] == "deepspeed" for module in imported_modules(file))
    }
    assert users == ENGINE_FILES


def test_the_oracle_shares_no_code_with_the_package() -> None:
    for name in ("oracle.py", "oracle_training.py"):
        assert not any(module.startswith("megatron_tiedlora") for module in imported_modules(SUPPORT / name))


def test_files_stay_under_400_lines() -> None:
    folders = ("megatron_tiedlora", "launch", "tools", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    long = {str(file.relative_to(ROOT)): count for file in files if (count := len(file.read_text().splitlines())) > 400}
    assert not long
