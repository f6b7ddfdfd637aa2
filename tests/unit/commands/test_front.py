"""`tiedlora`: its table of commands, its help without heavy imports, its errors, and how texts name commands."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.folders import ROOT, python

import megatron_tiedlora
from megatron_tiedlora.base.installation import EXTRAS, missing_module, require_extra
from megatron_tiedlora.base.messages import UserError, show_messages
from megatron_tiedlora.commands import front
from megatron_tiedlora.commands.front import _OTHER_NAMES, COMMANDS, find_command
from megatron_tiedlora.config.cli import run_command

HEAVY = {"torch", "transformers", "deepspeed", "datasets", "matplotlib", "sqlite3"}  # some Pythons lack the last one


def leave(argv: Sequence[str]) -> int:
    """The exit status of the front, in this process."""
    with pytest.raises(SystemExit) as end:
        front.main(argv)
    return int(end.value.code or 0)


def scripts() -> dict[str, str | None]:
    """The command that each script in launch/ and tools/ runs, by the script's path; None if it runs no command."""
    files = [file for folder in ("launch", "tools") for file in sorted((ROOT / folder).glob("*.py"))]
    runs = re.compile(r"from megatron_tiedlora\.commands\.front import run\n[\s\S]*\n    run\(\"([a-z-]+)\"")
    found = {str(file.relative_to(ROOT)): runs.search(file.read_text()) for file in files}
    return {name: match and match[1] for name, match in found.items()}


def test_every_command_is_a_function_and_every_script_runs_one() -> None:
    names = [command.name for command in COMMANDS]
    assert len(set(names)) == len(names) and all(name == name.lower() for name in names)
    modules = {file.stem for file in (ROOT / "megatron_tiedlora" / "commands").glob("*.py")} - {"__init__", "front"}
    assert {command.main.partition(":")[0] for command in COMMANDS} == modules
    for command in COMMANDS:
        module, _, main = command.main.partition(":")
        function = getattr(importlib.import_module(f"megatron_tiedlora.commands.{module}"), main)
        (first, *_) = inspect.signature(function, eval_str=True).parameters.values()
        settings, _, name = command.settings.partition(":")
        reader = getattr(importlib.import_module(f"megatron_tiedlora.config.{settings}"), name)
        made = reader if isinstance(reader, type) else inspect.signature(reader, eval_str=True).return_annotation
        assert first.annotation is made, command.name
    ran = scripts()
    of_a_clone = {"tools/pack_gpu_check.py", "tools/run_offline.py", "tools/write_install_tables.py"}
    assert {name for name, command in ran.items() if command is None} == of_a_clone
    assert sorted(filter(None, ran.values())) == sorted({*names} - {"index", "serve", "push", "recipes", "env"})
    for name in ran.keys() - of_a_clone:
        assert len((ROOT / name).read_text().splitlines()) < 12, "scripts are thin"


HELP = """
import sys
from megatron_tiedlora.commands.front import COMMANDS, main
for words in ([], *([command.name] for command in COMMANDS)):
    try:
        main([*words, "--help"])
    except SystemExit as end:
        assert not end.code
    print("IMPORTED", *words, *sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:])))
"""


def test_help_imports_nothing_heavy_and_names_no_script() -> None:
    """The time of `--help` is that of its imports: torch takes a second or two, all others 0.2 s together.

    Who has installed the package has no launch/ and no tools/.
    """
    done = python("-c", HELP, *HEAVY, COLUMNS="200")
    *texts, _ = re.split(r"^IMPORTED.*\n", done.stdout, flags=re.MULTILINE)
    imported = re.findall("IMPORTED.*", done.stdout)
    names = ["", *(command.name for command in COMMANDS)]
    assert imported == [f"IMPORTED {name}".strip() for name in names]
    for name, text in zip(names, texts, strict=True):
        assert text.startswith(f"usage: tiedlora {name}") and not re.findall(r"\S*\.py\b", text), name


def test_what_the_front_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert leave(["--help"]) == leave(["-h"]) == leave(["help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {command.name} " in listed and command.about in listed for command in COMMANDS)
    assert leave(["--version"]) == 0
    assert capsys.readouterr().out == f"tiedlora {megatron_tiedlora.__version__}\n"
    assert leave(["help", "merge"]) == 0
    assert "usage: tiedlora merge" in capsys.readouterr().out
    for argv, said in (
        ([], "give a command"),
        (["trian", "--x"], "trian: no such command (did you mean train?)"),
        (["--learning_rate=1"], "--learning_rate=1: no such command"),
        (["merge", "--adaptor=x"], "--adapter"),
    ):
        assert leave(argv) == 2
        output = capsys.readouterr()
        assert said in output.err and output.err.startswith("error: ") and output.err.count("\n") == 1
        assert output.out == ""


@pytest.mark.parametrize("before", [["--local_rank=3"], ["--local-rank", "3"], []])
def test_the_rank_that_a_launcher_puts_first_is_no_command(
    before: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert leave([*before, "convert_nemo", "--help"]) == 0
    assert "usage: tiedlora convert-nemo" in capsys.readouterr().out


# How texts name commands ---------------------------------------------------------------------------------------------


def test_texts_name_a_command_by_its_one_name() -> None:
    """Not by its script, which only a clone has, but where a launcher needs a script."""
    of_commands = re.compile("|".join(re.escape(name) for name, command in scripts().items() if command))
    named = {
        (str(file.relative_to(ROOT)), line.strip())
        for folder, kind in (("megatron_tiedlora", "*.py"), ("docs", "*.md"), ("launch", "*.md"), (".", "*.md"))
        for file in (ROOT / folder).glob(kind if folder == "." else f"**/{kind}")
        if file.name != "front.py"
        for line in file.read_text().splitlines()
        if of_commands.search(line)
    }
    assert {name for name, _ in named} == {"README.md", "launch/README.md", "docs/install.md"}, named
    assert len(named) == 5 and ("README.md", "deepspeed launch/train.py --ds_config zero2.json") in named, named


def test_a_command_of_other_tools_is_answered_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"finetune": "train", "SFT": "train", "merge_lora": "merge", "inference": "evaluate"}
    for name, ours in {**_OTHER_NAMES, **known}.items():
        assert find_command(ours) is not None
        assert find_command(name) is None and leave([name, "--lr", "1e-4"]) == 2
        expected = f"no such command (here it is tiedlora {ours}); `tiedlora --help` lists them\n"
        assert capsys.readouterr().err == f"error: tiedlora {name}: {expected}"
    assert find_command("check_gpu") is find_command("check-gpu") is not None
    assert find_command("nothing") is None


# Extras --------------------------------------------------------------------------------------------------------------


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(UserError, match=r"^this needs deepspeed; .*pip install 'megatron_tiedlora\[train\]'$"):
        require_extra("train")
    with pytest.raises(UserError, match=r"this needs deepspeed and rouge_score; .*\[train,eval\]"):
        require_extra("train", "eval")
    require_extra("eval", only=["sacrebleu"])
    monkeypatch.setattr("megatron_tiedlora.base.installation._installed", lambda name: None)
    with pytest.raises(UserError, match=r"pip install '?" + re.escape(f"{ROOT}[train]")):
        require_extra("train")
    assert "[eval]" in str(missing_module(ModuleNotFoundError(name="rouge_score.tokenizers")))
    assert missing_module(ModuleNotFoundError(name="megatron_tiedlora.x")) is None
    with pytest.raises(SystemExit) as end:
        run_command(lambda argv: int(importlib.import_module("rouge_score") is None), [])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: this needs rouge_score; install it with: pip install ")


# Commands of a process in which some packages are not installed, and what each ends with.
WITHOUT = """
import json, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from megatron_tiedlora.commands.front import main
for words in json.loads(sys.argv[2]):
    try:
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    print("STATUS", status, flush=True)
    print("STATUS", file=sys.stderr, flush=True)
"""


def without(modules: str, commands: Sequence[Sequence[str]], folder: Path) -> list[tuple[str, int, str]]:
    """Output, status and errors of each command."""
    done = python("-c", WITHOUT, modules, json.dumps(commands), folder=folder, DS_ACCELERATOR="cpu")
    assert done.returncode == 0 and list(folder.iterdir()) == [], done.stderr
    ends = re.findall(r"((?:.*\n)*?)STATUS (\d+)\n", done.stdout)
    errors = done.stderr.split("STATUS\n")[:-1]
    return [(text, int(status), said) for (text, status), said in zip(ends, errors, strict=True)]


def test_a_command_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    names = ("train", "evaluate", "sweep", "bench", "doctor", "check-gpu")
    commands = [[name, *(["--output_dir=s"] if name == "sweep" else [])] for name in names]
    for name, (text, status, said) in zip(names, without("deepspeed,sacrebleu", commands, tmp_path), strict=True):
        assert status == 2 and text == "", said
        assert said.startswith("error: this needs deepspeed") and said.count("\n") == 1, name
        assert re.search(r"pip install 'megatron_tiedlora\[(train|eval|train,eval|check)\]'$", said.strip()), name


DRY_RUN = ["train", "--dry_run", "--model", "llama2-7b"]
ARITHMETIC = {
    "plan": ["plan", "--model", "llama2-7b", "--gpu", "h100", "--gpus_per_node", "2", "--formats", "none"],
    "a dry run": [*DRY_RUN, "--world_size", "2", "--tensor_parallel", "2", "--ds_config", "zero1.json"],
    "a dry run of offloading": [*DRY_RUN, "--ds_config", "zero2_offload.json"],
}


def test_what_is_only_computed_needs_no_extra(tmp_path: Path) -> None:
    modules = ",".join({*EXTRAS["train"], *EXTRAS["eval"]})
    for case, found in zip(ARITHMETIC, without(modules, list(ARITHMETIC.values()), tmp_path), strict=True):
        text, status, said = found
        assert (status, said) == (0, "") and re.search("parameters|layouts", text), case


# Messages and the report for bugs ----------------------------------------------------------------------------------


def test_messages_of_the_library_are_shown_by_commands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("megatron_tiedlora")
    before = ours.handlers[:], ours.level, ours.propagate
    logger = logging.getLogger("megatron_tiedlora.training.anything")
    try:
        ours.handlers[:], ours.propagate = [], True
        logger.info("unseen")
        assert capsys.readouterr() == ("", "")
        show_messages()
        show_messages()
        logger.info("compiling %s\n\x1b[2J", "kernels")
        logger.debug("unseen")
        assert capsys.readouterr() == ("", "compiling kernels\n\\x1b[2J\n")
    finally:
        ours.handlers[:], ours.propagate = before[0], before[2]
        ours.setLevel(before[1])


def test_the_report_for_bugs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert front.call("env", []) == 0
    text = capsys.readouterr().out
    assert "s3cret" not in text and re.search(r"\n  NCCL_DEBUG +INFO\n", text)
    assert re.search(r"\n  torch +\d", text) and re.search(r"\n  train +installed\n", text)
    assert front.call("env", [f"--json={tmp_path / 'env.json'}"]) == 0
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["versions"]["megatron_tiedlora"] == megatron_tiedlora.__version__
    assert Path(found["paths"]["package"]) == ROOT / "megatron_tiedlora"


# What a flag names is looked for before torch, DeepSpeed and transformers are imported, which takes seconds ----------

# (flag, value, what the error says), of a command; FOLDER is one with a model and data.
CASES = {
    "train": (
        ("adapters", "no.yaml", "--adapters no.yaml: no such file"),
        ("adapters", "FOLDER", "--adapters FOLDER: is a folder; give a YAML list"),
        ("train_file", "no.jsonl", "no.jsonl: no such file"),
        ("train_file", "FOLDER/rows.jsonl:0.5,no.jsonl:0.5", "no.jsonl: no such file"),
        ("train_file", "no*.jsonl", "no*.jsonl: no file matches this pattern"),
        ("validation_file", "./no.csv", "no.csv: no such file"),
        ("test_file", "no.parquet", "no.parquet: no such file"),
        ("ds_config", "no.json", "--ds_config no.json: no such file"),
        ("chat_template", "no.jinja", "--chat_template no.jinja: no such file"),
        ("model", "./no", "--model ./no: no such folder"),
    ),
    "evaluate": (
        ("test_file", "no.jsonl", "no.jsonl: no such file"),
        ("chat_template", "no.jinja", "--chat_template no.jinja: no such file"),
    ),
}
PROGRAM = """
import json, sys
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.commands.front import call
found = []
for arguments in json.loads(sys.argv[2]):
    try:
        call(sys.argv[1], arguments)
    except UserError as error:
        found.append(str(error))
print(json.dumps([found, sorted({"torch", "deepspeed", "transformers", "datasets"} & sys.modules.keys())]))
"""


@pytest.mark.parametrize("command", CASES)
def test_no_slow_import_comes_first(tmp_path: Path, command: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    given = [(flag, value.replace("FOLDER", str(tmp_path))) for flag, value, _ in CASES[command]]
    whole = {"train_file": f"{tmp_path}/rows.jsonl"} if command == "train" else {}
    whole |= {"model": str(tmp_path), "task": "custom"}
    calls = [[f"--{name}={text}" for name, text in {**whole, flag: value}.items()] for flag, value in given]
    ended = python("-c", PROGRAM, command, json.dumps(calls), folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found, imported = json.loads(ended.stdout.splitlines()[-1])
    assert len(found) == len(given), found
    for (_, _, message), said in zip(CASES[command], found, strict=True):
        assert message.replace("FOLDER", str(tmp_path)) in said and "\n" not in said
    assert imported == []
