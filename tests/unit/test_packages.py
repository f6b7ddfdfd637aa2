"""What pyproject.toml declares is what is imported, with ranges; docs/install.md has the tables that the code gives."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.folders import ROOT

from megatron_tiedlora.base.installation import EXTRAS, missing_modules, require_extra
from megatron_tiedlora.service.endpoints import TESTED_CLIENTS
from tools.write_install_tables import PAGE, PURPOSES, with_tables

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The names of modules that differ from those of their packages.
MODULES = {"PyYAML": "yaml", "protobuf": "google", "reasoning-gym": "reasoning_gym", "rouge-score": "rouge_score"}
# Declared and not imported here: who needs them.
BY_OTHERS = {
    "gguf": "transformers reads the demo's weights through it",
    "filelock": "huggingface_hub and datasets lock files with it",
    "tensorboard": "torch.utils.tensorboard",
    "reasoning_gym": "the demo task loads one file of it",
    "mpi4py": "DeepSpeed's start by mpirun",
    "flash_attn": "PyTorch's table of attention kernels names it",
}



def declared(requirements: list[str]) -> set[str]:
    """The modules of requirements, without those that are extras of this package."""
    names = (re.split(r"[\[<>=!~; ]", line)[0] for line in requirements)
    return {MODULES.get(name, name.replace("-", "_")) for name in names if name != "megatron_tiedlora"}


# Imported and not declared: vLLM loads the plugin in its own environment, and pins torch and transformers.
OF_VLLM = {"vllm", "triton"}
OF_OTHERS = {"lm_eval", "axolotl", "swift"}  # which users install
CORE = declared(PROJECT["dependencies"])
OF_EXTRAS = {name: declared(lines) for name, lines in PROJECT["optional-dependencies"].items()}
USERS = ("train", "eval", "check", "peft", "quantised", "service", "mpi", "gpu")
INSTALLED_BY_USERS = set().union(*(OF_EXTRAS[name] for name in USERS))


def imports(tree: ast.AST, *, lazy: bool) -> Iterator[str]:
    """The packages that a module imports; with `lazy` also those that it imports in functions."""
    for node in ast.walk(tree) if lazy else ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def imported(*, lazy: bool = True) -> dict[str, set[str]]:
    """By package of others: the files that import it."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / "megatron_tiedlora").rglob("*.py")):
        for name in imports(ast.parse(file.read_text()), lazy=lazy):
            if name not in sys.stdlib_module_names and name != "megatron_tiedlora":
                found.setdefault(name, set()).add(str(file.relative_to(ROOT / "megatron_tiedlora")))
    return found


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    everything = CORE | INSTALLED_BY_USERS | OF_EXTRAS["demo-base"] | OF_EXTRAS["demo"]
    assert imported().keys() <= everything | OF_VLLM | OF_OTHERS, "imported, and not in pyproject.toml"
    assert everything - imported().keys() == BY_OTHERS.keys(), "in pyproject.toml, and nobody imports it"


def test_what_an_extra_brings_is_imported_where_it_is_used() -> None:
    """At the top of a module are the core's packages, but in the engine, integrations, metrics, and tests."""
    early = {file for name, files in imported(lazy=False).items() if name not in CORE for file in files}
    tests = ("selfcheck/conftest.py", "selfcheck/test_")
    others = ("lm_eval_model.py", "axolotl.py", "swift.py", "vllm/")
    inside = (f"integrations/{name}" for name in others)
    service = ("service/http.py", "service/server.py")
    owners = ("engine/", "peft/method.py", *inside, "evaluation/metrics.py", *service, *tests)
    assert early and all(file.startswith(owners) for file in early), sorted(early)


@pytest.mark.parametrize("requirements", [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()])
def test_every_dependency_has_a_range(requirements: list[str]) -> None:
    """But for types of other packages, which follow them."""
    own = "megatron_tiedlora["
    assert not [one for one in requirements if ">=" not in one and not one.startswith((own, "types-"))]


def test_extras_are_those_of_the_metadata() -> None:
    assert EXTRAS.keys() <= OF_EXTRAS.keys()
    for name in EXTRAS.keys() - {"demo"}:
        assert OF_EXTRAS[name] == set(EXTRAS[name]), name
    assert set(EXTRAS["demo"]) == OF_EXTRAS["demo"] | OF_EXTRAS["demo-base"] | OF_EXTRAS["peft"]
    for name in ("demo", "test"):  # without a C compiler the Makefile installs NAME-base
        assert any(line.startswith(f"megatron_tiedlora[{name}-base") for line in PROJECT["optional-dependencies"][name])


def test_a_run_does_without_what_only_trackers_and_figures_need(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "matplotlib", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    assert set(missing_modules("train")) == {"tensorboard", "matplotlib", "accelerate"}
    require_extra("train", "eval")


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    """After a change of either: python tools/write_install_tables.py."""
    assert Path(PAGE).read_text() == with_tables(PAGE.read_text())
    assert PURPOSES.keys() - {""} == OF_EXTRAS.keys()


def test_the_extra_of_the_client_has_the_releases_that_were_tried() -> None:
    first, last = TESTED_CLIENTS
    assert PROJECT["optional-dependencies"]["tinker"] == [f"tinker>=0.{first},<0.{last + 1}"]
