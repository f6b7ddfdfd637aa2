"""What settings are declared with, and what is asked of these marks; help texts and documents explain every flag."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from folders import ROOT

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.commands.front import COMMANDS
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.cli import build_parser, parse_settings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import (
    CommandSettings,
    Declared,
    declared,
    flag_word,
    marked,
    setting_field,
    shared_field,
)
from megatron_tiedlora.config.launch_settings import DoctorSettings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.sweep_settings import SweepSettings
from megatron_tiedlora.runtime.run_folder import run_name

MARKS = declared(Settings)
DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = frozenset(re.findall(r"--[a-z][a-z0-9_]*", "\n".join(file.read_text() for file in DOCUMENTS)))


def kinds() -> list[type[CommandSettings]]:
    """The settings of every command, of its own."""
    modules = {command.settings.partition(":")[0] for command in COMMANDS}
    found = [importlib.import_module(f"megatron_tiedlora.config.{module}") for module in sorted(modules)]
    return [
        value
        for module in found
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, CommandSettings) and value.__module__ == module.__name__
    ]


def test_all_commands_have_settings() -> None:
    assert sorted(kind.prog for kind in kinds()) == sorted(f"tiedlora {command.name}" for command in COMMANDS)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_setting_is_declared(kind: type[CommandSettings]) -> None:
    for name, own in declared(kind).items():
        assert isinstance(own, Declared) and kind.model_fields[name].description, name
        assert own.group in kind.groups if kind.groups else not own.positional or own.metavar, name
    _, after_usage = build_parser(kind).format_help().split("\n\n", 1)
    assert max(len(line) for line in after_usage.splitlines() if line.startswith("  ")) <= 120


@pytest.mark.parametrize("name", MARKS)
def test_every_setting_of_a_run_says_what_it_decides(name: str) -> None:
    own = MARKS[name]
    assert own.decides is not None
    if own.by_content:
        assert own.decides in ("data", "model"), "else it is not compared anyway"
    if own.of_dry_run or own.lasts:
        assert own.decides == "nothing"
    if own.decides == "adapter":
        assert own.per_adapter and own.compared
    if own.holds == "rows":
        assert own.decides == "data" and own.by_content and own.per_adapter
    assert own.decided_by.keys() <= {"plan", "sweep"}


def test_what_an_adapter_and_the_run_of_all_have() -> None:
    both = set(marked(Settings, per_adapter=True)) & set(marked(Settings, of_group=True))
    assert both == {"output_dir"}, "the folder of all has those of the adapters"
    shared = {"model", "dtype", "base", "max_length", "micro_batch_size", "tensor_parallel", "ds_config", "packing"}
    assert not shared & set(marked(Settings, per_adapter=True))
    assert {"rank", "learning_rate", "beta1", "train_file", "seed"} <= set(marked(Settings, per_adapter=True))


def test_what_a_resume_compares() -> None:
    compared = set(marked(Settings, compared=True))
    assert {"rank", "learning_rate", "seed", "dtype", "base", "max_length", "init_from", "train_on"} <= compared
    for name in ("tensor_parallel", "packing", "model", "train_file", "output_dir", "save_interval", "adapters"):
        assert name not in compared, name


CHANGES: dict[str, Any] = {
    **{"method": "lora", "rank": 4, "targets": "all", "alpha": 3.0, "layers": "1", "init_std_a": 0.5},
    "init_std_b": 0.5,
}


@pytest.mark.parametrize("name", marked(Settings, decides="adapter"))
def test_a_run_is_named_after_what_is_not_derived(name: str) -> None:
    """So --init_from need not be read to find the folder if all of these are given."""
    same = run_name(make_settings({name: CHANGES[name]})) == run_name(make_settings({}))
    assert same == MARKS[name].derived


def test_an_evaluation_hands_on_what_it_shares() -> None:
    """A sweep gives them to tiedlora evaluate as tiedlora train had them."""
    shared = marked(EvaluateSettings, shared=True)
    given = make_settings({"task": "demo", "seed": 3, "dtype": "fp32", "tensor_parallel": 2, "add_bos": "true"})
    words = [f"--{name}={getattr(given, name)}" for name in shared if getattr(given, name) is not None]
    found = parse_settings(words, EvaluateSettings)
    assert len(shared) == 16 and all(getattr(found, name) == getattr(given, name) for name in shared)
    assert not {"output_dir", "take_over", "max_length", "adapters"} & set(shared)
    assert set(marked(BenchSettings, shared=True)) < set(Settings.model_fields)


def test_what_a_sweep_records() -> None:
    assert set(SweepSettings.model_fields) - set(marked(SweepSettings, lasts="")) == {
        *("output_dir", "dry_run", "take_over", "tables_from")
    }


class Little(CommandSettings):
    """Settings of a command without groups."""

    prog = "little"
    about = "A little."

    where: str = setting_field("", "a place", metavar="PLACE", positional=True)
    rank: int = shared_field(Settings, "rank", default=4, group="")
    loud: bool = setting_field("", "say it", False)


def test_a_shared_field_keeps_its_limits_and_its_names() -> None:
    assert parse_settings(["here"], Little) == Little(where="here", rank=4, loud=False)
    assert parse_settings(["--loud", "here", "--rank=8"], Little) == Little(where="here", rank=8, loud=True)
    for words, said in (
        (["here", "--rank=0"], "--rank 0: input should be greater than or equal to 1"),
        (["here", "--lora_r=3"], r"unknown argument --lora_r \(here it is --rank\); see --help"),
        (["--rank=2"], "the following arguments are required: PLACE"),
        (["here", "there"], "unknown argument 'there'; see --help"),
        (["here", "--loud=true"], "argument --loud: ignored explicit argument 'true'"),
        (["here", "--config=x"], "unknown argument --config; see --help"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_settings(words, Little)


@pytest.mark.parametrize("kind", [Settings, EvaluateSettings, SweepSettings], ids=lambda kind: kind.__name__)
def test_what_the_user_decides_anew_is_not_read_from_files(kind: type[CommandSettings], tmp_path: Path) -> None:
    file, names = tmp_path / "mine.yaml", marked(kind, lasts="command")
    assert names == (("take_over",) if kind is SweepSettings else ("take_over", "base_differs"))
    for name in names:
        file.write_text(f"{name}: true\n")
        with pytest.raises(UserError, match=f"^{file}: {name} is not read from a file; give --{name} on the command"):
            parse_settings([f"--config={file}"], kind)
    file.write_text("versions: {}\ntake_over: true\noutput_dir: other\n")  # as a run has recorded them
    assert parse_settings([f"--config={file}", "--output_dir=mine"], kind).output_dir == "mine"
    assert not parse_settings([f"--config={file}", "--output_dir=mine"], kind).take_over


# Help texts and documents ---------------------------------------------------------------------------------------------

KINDS = [kind for kind in kinds() if kind.groups]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_help_begins_with_what_the_command_does(kind: type[CommandSettings]) -> None:
    usage, empty, about, *_ = build_parser(kind).format_help().splitlines()
    assert usage.startswith("usage: tiedlora ") and usage.endswith("[--FLAG VALUE ...]") and not empty
    assert kind.about.startswith(about) and (kind.prog == "tiedlora plan") == ("--model" in usage)
    assert not [name for name in kind.model_fields if flag_word(name, kind) not in NAMED], "every flag is in a document"


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


def test_the_name_of_a_flag_is_its_name_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("json: figures.json\n")
    assert parse_settings([f"--config={file}"], BenchSettings).json_file == "figures.json"
    assert parse_settings(["--json=-"], DoctorSettings).json_file == "-"


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
