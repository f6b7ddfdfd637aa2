"""The house's shape: imports go one way, files stay small, DeepSpeed is imported only where an engine is."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from support.folders import ROOT, SUPPORT

ORDER = (
    "base",
    "config",
    "parallel",
    "adapters",
    "model",
    "runtime",
    "data",
    "checkpoint",
    "engine",
    "convert",
    "evaluation",
    "planning",
    "training",
    "service",
    "cluster",
    "study",
    "peft",
    "integrations",
    "lm_eval",
    "selfcheck",
    "commands",
)
PACKAGE = ROOT / "megatron_tiedlora"
SOURCES = sorted(PACKAGE.rglob("*.py"))
ENGINE_FILES = {
    "runtime/process_group.py",
    "engine/runner.py",  # its schedules
    "engine/optimizers.py",  # the sharded optimizer
    "engine/pipelined.py",  # its PipelineModule
    "engine/engine.py",
}


def imported_modules(file: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code; of `from a import b` also a.b, if it is ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = names & MODULES.keys()
            found |= modules
            if modules != names:
                found.add(node.module)
    return found


def module_name(file: Path) -> str:
    """The name that a file of the package is imported by."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    """The place in the order of a module's package. The package's own `__init__` is above them all."""
    parts = module.split(".")
    if len(parts) == 1:
        return len(ORDER)
    return ORDER.index("commands" if parts[1] == "__main__" else parts[1])


MODULES = {module_name(file): file for file in SOURCES}


def test_every_package_has_a_place_in_the_order() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages | {"lm_eval"} == set(ORDER)  # lm_eval.py is a name that users import, as is `peft`
    assert len(packages) <= 20


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    for module in imported_modules(file):
        top = module.split(".")[0]
        assert top not in ("launch", "tools", "tests"), f"{file} imports {module}"
        if top == "megatron_tiedlora":
            assert floor(module) <= floor(module_name(file)), f"{file} imports {module}, an arrow that goes back"


def test_no_files_import_each_other() -> None:
    """No circle of files, imports inside of functions included: what is left, if files whose imports are all removed
    are removed again and again, are circles and what imports them."""
    left = {name: imported_modules(file) & MODULES.keys() for name, file in MODULES.items()}
    while ready := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in ready}
    assert not left


def type_names(node: ast.stmt) -> set[str]:
    """The name of the class that a statement defines, or the capitalised ones that it assigns: other names of types,
    and types that a call makes. Neither constants, which are all capitals, nor type variables, which say nothing."""
    if isinstance(node, ast.ClassDef):
        return {node.name}
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return set()
    if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "TypeVar":
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if name.lstrip("_")[:1].isupper() and not name.isupper()}


def function_names(node: ast.stmt) -> set[str]:
    """The name of the function that a statement defines, if it does."""
    return {node.name} if isinstance(node, ast.FunctionDef) else set()


def defined_names(names: Callable[[ast.stmt], set[str]]) -> Counter[str]:
    """In how many files a statement outside of classes and functions defines each name."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES]
    return Counter(name for tree in trees for name in set[str]().union(*map(names, tree.body)))


def test_no_two_types_share_a_name() -> None:
    assert not [name for name, count in defined_names(type_names).items() if count > 1]


@pytest.mark.parametrize("name", ["build_stage", "load_base", "load_adapter", "marked", "plan_cluster", "measure"])
def test_these_functions_have_a_name_of_their_own(name: str) -> None:
    """Of load_base and load_adapter there are those of the Python interface."""
    assert defined_names(function_names)[name] <= 1


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


def test_files_stay_under_500_lines() -> None:
    folders = ("megatron_tiedlora", "launch", "tools", "tests")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    long = {str(file.relative_to(ROOT)): count for file in files if (count := len(file.read_text().splitlines())) > 500}
    assert not long
