"""What settings are declared with: marks, and names from other tools; help texts and documents explain every flag."""

from __future__ import annotations

import ast
import builtins
import importlib
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.folders import ROOT
from support.task_files import refusal, write

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.commands.front import COMMANDS
from megatron_tiedlora.config import fields, other_names
from megatron_tiedlora.config.adapter_settings import EvaluateSettings, MergeSettings
from megatron_tiedlora.config.cli import build_parser, parse_settings
from megatron_tiedlora.config.job_settings import DoctorSettings, SweepSettings, parse_plan, parse_sweep
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.run_folder import run_name

MARKS = fields.declared(Settings)
DOCUMENTS = [ROOT / "README.md", ROOT / "launch" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = frozenset(re.findall(r"--[a-z][a-z0-9_]*", "\n".join(file.read_text() for file in DOCUMENTS)))


def kinds() -> list[type[fields.CommandSettings]]:
    """The settings of every command, of its own."""
    modules = {command.settings.partition(":")[0] for command in COMMANDS}
    found = [importlib.import_module(f"megatron_tiedlora.config.{module}") for module in sorted(modules)]
    return [
        value
        for module in found
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, fields.CommandSettings) and value.__module__ == module.__name__
    ]


def test_all_commands_have_settings() -> None:
    assert sorted(kind.prog for kind in kinds()) == sorted(f"tiedlora {command.name}" for command in COMMANDS)


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_setting_is_declared(kind: type[fields.CommandSettings]) -> None:
    for name, own in fields.declared(kind).items():
        assert isinstance(own, fields.Declared) and kind.model_fields[name].description, name
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
    both = set(fields.marked(Settings, per_adapter=True)) & set(fields.marked(Settings, of_group=True))
    assert both == {"output_dir"}, "the folder of all has those of the adapters"
    shared = {"model", "dtype", "base", "max_length", "micro_batch_size", "tensor_parallel", "ds_config", "packing"}
    assert not shared & set(fields.marked(Settings, per_adapter=True))
    assert {"rank", "learning_rate", "beta1", "train_file", "seed"} <= set(fields.marked(Settings, per_adapter=True))


def test_what_a_resume_compares() -> None:
    compared = set(fields.marked(Settings, compared=True))
    assert {"rank", "learning_rate", "seed", "dtype", "base", "max_length", "init_from", "train_on"} <= compared
    for name in ("tensor_parallel", "packing", "model", "train_file", "output_dir", "save_interval", "adapters"):
        assert name not in compared, name


CHANGES: dict[str, Any] = {
    **{"method": "lora", "rank": 4, "targets": "all", "alpha": 3.0, "layers": "1", "init_std_a": 0.5},
    **{"init_std_b": 0.5, "rslora": True},
}


@pytest.mark.parametrize("name", fields.marked(Settings, decides="adapter"))
def test_a_run_is_named_after_what_is_not_derived(name: str) -> None:
    """So --init_from need not be read to find the folder if all of these are given."""
    same = run_name(make_settings({name: CHANGES[name]})) == run_name(make_settings({}))
    assert same == MARKS[name].derived


def test_an_evaluation_hands_on_what_it_shares() -> None:
    """A sweep gives them to tiedlora evaluate as tiedlora train had them."""
    shared = fields.marked(EvaluateSettings, shared=True)
    given = make_settings({"task": "demo", "seed": 3, "dtype": "fp32", "tensor_parallel": 2, "add_bos": "true"})
    words = [f"--{name}={getattr(given, name)}" for name in shared if getattr(given, name) is not None]
    found = parse_settings(words, EvaluateSettings)
    assert len(shared) == 17 and all(getattr(found, name) == getattr(given, name) for name in shared)
    assert not {"output_dir", "take_over", "max_length", "adapters"} & set(shared)
    assert set(fields.marked(BenchSettings, shared=True)) < set(Settings.model_fields)


def test_what_a_sweep_records() -> None:
    assert set(SweepSettings.model_fields) - set(fields.marked(SweepSettings, lasts="")) == {
        *("output_dir", "dry_run", "take_over", "tables_from", "slurm", "gpu", "constants", "part")
    }


class Little(fields.CommandSettings):
    """Settings of a command without groups."""

    prog = "little"
    about = "A little."

    where: str = fields.setting_field("", "a place", metavar="PLACE", positional=True)
    rank: int = fields.shared_field(Settings, "rank", default=4, group="")
    loud: bool = fields.setting_field("", "say it", False)


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
def test_what_the_user_decides_anew_is_not_read_from_files(kind: type[fields.CommandSettings], tmp_path: Path) -> None:
    file, names = tmp_path / "mine.yaml", fields.marked(kind, lasts="command")
    others = ("slurm", "gpu", "constants", "part") if kind is SweepSettings else ("base_differs",)
    assert names == ("take_over", *others)
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
def test_a_help_begins_with_what_the_command_does(kind: type[fields.CommandSettings]) -> None:
    usage, empty, about, *_ = build_parser(kind).format_help().splitlines()
    assert usage.startswith("usage: tiedlora ") and usage.endswith("[--FLAG VALUE ...]") and not empty
    assert kind.about.startswith(about) and (kind.prog == "tiedlora plan") == ("--model" in usage)
    assert not [name for name in kind.model_fields if fields.flag_word(name, kind) not in NAMED], (
        "every flag is in a document"
    )


def test_a_help_shows_the_types_that_a_flag_takes() -> None:
    def shown(kind: type[fields.CommandSettings]) -> set[str]:
        flags = (line for line in build_parser(kind).format_help().splitlines() if line.startswith("  --"))
        return {line[2:].split("  ")[0] for line in flags}

    assert {
        "--learning_rates X|auto[,X|auto...]",
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


# Names from other tools: the tables hold, and every command answers with its own names, or not at all ----------------


def test_the_names_are_of_settings_that_exist_and_none_is_ours() -> None:
    assert set().union(*map(other_names._settings_in, other_names.SENTENCES.values())) <= set(Settings.model_fields)
    ours = fields.names_elsewhere(Settings)
    tables = [ours.keys(), other_names.SENTENCES.keys(), other_names.NOT_OFFERED.keys()]
    assert len(ours) > 150 and sum(map(len, tables)) == len(set().union(*tables))
    assert not set().union(*tables) & set(Settings.model_fields)
    for name in (*fields.names_elsewhere(*kinds()), *other_names.SENTENCES, *other_names.NOT_OFFERED):
        assert name == name.replace("-", "_").lower()


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--lr", "--learning_rate"),
        ("--num_train_epochs", "--epochs"),
        ("--num-train-epochs", "--epochs"),
        ("--lora_r", "--rank"),
        ("--bf16", "--dtype bf16"),
        ("--load_in_4bit", "here it is --base nf4"),
        ("--fp8", "here it is --base fp8"),
        ("--target_modules", "--targets: qkv (q_proj"),
        ("--per_device_train_batch_size", "--micro_batch_size"),
        ("--gradient_accumulation_steps", "--global_batch_size"),
        ("--lr_scheduler_type", "--schedule"),
        ("--max_seq_length", "--max_length"),
        ("--wandb_project", "--report_to"),
        ("--fp16", "fp16 is not supported"),
        ("--deepspeed", "--ds_config"),
        ("--LR", "--learning_rate"),
        ("--num_gpus", "--num_gpus N"),
    ],
)
def test_flags(flag: str, answer: str) -> None:
    message = refusal(lambda: parse_settings([flag, "1"], Settings))
    assert message.startswith(f"unknown argument {flag} (") and answer in message and message.endswith("; see --help")
    assert "did you mean" not in message


@pytest.mark.parametrize(("rank", "lora_alpha"), [(8, 1.0), (16, 32.0), (5, 0.5), (4, None)])
def test_rank_stabilised_lora(rank: int, lora_alpha: float | None) -> None:
    """The scale is that of PEFT's own layer, and a run's own record plans the same run again."""
    assert "(here it is --rslora)" in refusal(lambda: parse_settings(["--use_rslora", "true"], Settings))
    given = {"model": "llama2-7b", "rank": rank, "rslora": True, "dry_run": True}
    given |= {} if lora_alpha is None else {"alpha": lora_alpha}
    plan = plan_run(make_settings(given), rank=0, world_size=1, weights=False)
    config = LoraConfig(r=rank, lora_alpha=lora_alpha or rank, use_rslora=True, target_modules=["0"])
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config).base_model.model[0]
    assert plan.adapter.scale == pytest.approx(layer.scaling["default"])
    again = {name: value for name, value in plan.resolved_settings().items() if name != "epochs"}
    assert plan_run(make_settings(again), rank=0, world_size=1, weights=False).adapter == plan.adapter
    too_large = make_settings({**given, "alpha": 9e5})
    assert refusal(plan_run, too_large, rank=0, world_size=1, weights=False).startswith("--rslora true: alpha = ")


@pytest.mark.parametrize("text", ["", "B", "B=0", "B=-1", "B=nan", "C=2", "B=1,B=2", "b=2", "B=x", "B=1e7"])
def test_rates_of_factors_that_cannot_be(text: str) -> None:
    message = refusal(lambda: parse_settings([f"--rate_factors={text}", "--task=demo"], Settings))
    assert message.startswith(f"--rate_factors {text}: expected FACTOR=NUMBER[,...], e.g. B=16; each of A, B, u, v")


def test_a_slip_is_still_guessed_and_what_is_like_nothing_is_not() -> None:
    assert other_names.name_hint("--learning-rate", ["--learning_rate"], {}) == " (did you mean --learning_rate?)"
    assert other_names.name_hint("--rnak", ["--rank", "--alpha"], {}) == " (did you mean --rank?)"
    assert other_names.name_hint("--gibberish", ["--help", "--rank"], {}) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1e-4\n", "unknown setting 'lr' (here it is learning_rate)"),
        ("load_in_4bit: true\n", "unknown setting 'load_in_4bit' (here it is base nf4)"),
        ("zzz: 1\nrank: 4\nlr: 1e-4\n3: 4\n", "unknown settings 'zzz', 'lr' (here it is learning_rate), 3"),
        (
            "".join(f"z{number}: 1\n" for number in range(10_000)),
            f"unknown settings {', '.join(map(repr, ['z0', 'z1', 'z2', 'z3', 'z4', 'z5', 'z6', 'z7']))} and 9992 more",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_keys_of_a_file_have_no_dashes_and_all_that_are_unknown_are_told(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "mine.yaml", text)
    assert refusal(lambda: parse_settings([f"--config={file}"], Settings)) == f"{file}: {said}"


def test_names_in_a_program_have_no_dashes() -> None:
    said = "unknown settings 'rnk' (did you mean rank?), 'zzz'; see --help"
    assert refusal(lambda: Settings(rnk=1, zzz=2)) == said


# Values ---------------------------------------------------------------------------------------------------------------


def test_a_warm_up_follows_a_number_of_steps_that_is_written_as_a_power() -> None:
    assert parse_settings(["--max_steps=1e1", "--task=gsm8k"], Settings).warmup_steps == 10


def test_lists_of_other_commands_fold_too() -> None:
    sweep = parse_sweep(["--output_dir=x", "--methods=TL5,lora", "--single_layers=Paper", "--together=AUTO"]).settings
    assert (sweep.methods, sweep.single_layers, sweep.together) == (("tl5", "lora"), "paper", "auto")
    assert parse_settings(["--adapter=a", "--output=b", "--dtype=BFloat16"], MergeSettings).dtype == "bf16"
    plan = parse_plan(["--model=llama2-7b", "--gpu=H100-80GB", "--formats=4bit,NONE"]).settings
    assert (plan.gpu, plan.formats) == ("h100", ("nf4", "none"))


def test_the_table_of_values_names_what_exists() -> None:
    tables = [table for name, table in vars(other_names).items() if name.startswith("OTHER_")]
    assert len(tables) == 5
    for names in tables:
        assert set().union(*map(other_names._settings_in, names.values())) <= set(Settings.model_fields)
        assert all(name == name.replace("_", "-").lower() for name in names)
