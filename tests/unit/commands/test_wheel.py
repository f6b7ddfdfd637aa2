"""The wheel, built from what the Dockerfile copies and installed without a network: its files, and commands from it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.folders import ROOT
from support.native_files import with_adapter, write_native
from support.ranks import free_port
from support.run_helpers import Base
from support.wheel import Installed, install_wheel, instructions

import megatron_tiedlora


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return install_wheel(tmp_path_factory.mktemp("wheel"))


def test_what_is_in_the_wheel(installed: Installed) -> None:
    with zipfile.ZipFile(installed.wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"megatron_tiedlora", f"megatron_tiedlora-{megatron_tiedlora.__version__}.dist-info"}
    files = {str(file.relative_to(ROOT)) for file in (ROOT / "megatron_tiedlora").rglob("*.py")}
    assert files <= set(names) and "megatron_tiedlora/py.typed" in names
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(shipped) > 3
    for file in shipped:
        assert (installed.site / "megatron_tiedlora" / "ds_configs" / file.name).read_bytes() == file.read_bytes()
    fields = HeaderParser().parsestr(metadata)
    assert fields["License-Expression"] == "Apache-2.0" and "Paper, https://arxiv.org" in fields["Project-URL"]
    core = [line for line in fields.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not any(re.match("deepspeed|datasets|tensorboard|matplotlib|sacrebleu|rouge", line) for line in core)
    assert any(line.startswith("torch") for line in core)


def output_of(installed: Installed, *words: object, **keywords: Any) -> str:
    """What a command that succeeds prints."""
    done = installed.run(*words, **keywords)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_help_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("tiedlora", "--help", folder=tmp_path)
    assert done.returncode == 0 and "\n  merge " in done.stdout and done.stderr == ""
    where = "import megatron_tiedlora; print(megatron_tiedlora.__file__)"
    found = installed.run(sys.executable, "-c", where, folder=tmp_path).stdout
    assert found.startswith(str(installed.site)), "not the clone's package is tested"


def test_the_engine_files_are_found_by_name_from_any_folder(installed: Installed, tmp_path: Path) -> None:
    words = ["tiedlora", "train", "--dry_run", "--model=llama2-7b", "--ds_config"]
    text = output_of(installed, *words, "zero3.json", folder=tmp_path, DS_ACCELERATOR="cpu")
    assert "trained parameters" in text and "ZeRO-3" in text
    done = installed.run(*words, "zero4.json", folder=tmp_path, DS_ACCELERATOR="cpu")
    told = "--ds_config zero4.json: no such file. Give a path or the name of a file in ds_configs/ (did you mean zero"
    assert done.returncode == 2 and told in done.stderr


NO_EXTRAS = """
import json, sys
for name in ("deepspeed", "datasets", "accelerate", "tensorboard", "matplotlib", "rouge_score", "sacrebleu"):
    sys.modules[name] = None
from megatron_tiedlora.commands.front import main
for words in json.loads(sys.argv[1]):
    if words[0] == "verify":
        del sys.modules["accelerate"]  # PEFT requires it
    try:
        main(words)
    except SystemExit as end:
        if end.code:
            raise
    print("END", flush=True)
"""


def test_merge_export_and_import_need_no_extra(installed: Installed, base: Base, tmp_path: Path) -> None:
    """One after another in a process; `verify` looks at both outputs in transformers and in PEFT, too."""
    write_native(tmp_path / "adapter", base.model, with_adapter(base.model, "tl6")[2])
    check = "check it with: tiedlora verify --adapter adapter"
    said = {
        ("merge", "--output=a merged one", "--dtype=bf16"): [f"{check} --merged 'a merged one'"],
        ("export", "--output=for peft", "--pad_rank_to=8"): [f"{check} --peft 'for peft'", "vllm serve", "-rank 8"],
        ("import", "--peft=for peft", "--output=and back"): ["train it further with: --init_from 'and back'"],
        ("verify", "--merged=a merged one", "--peft=for peft"): [],  # six rows: bits, by layers, and in the libraries
    }
    words = [[name, *(() if name == "import" else ["--adapter=adapter"]), *flags] for name, *flags in said]
    printed = output_of(installed, sys.executable, "-c", NO_EXTRAS, json.dumps(words), folder=tmp_path)
    *texts, rest = printed.split("END\n")
    for text, expected in zip(texts, said.values(), strict=True):
        assert all(word in text for word in expected), text
    assert texts[-1].count("ok") == 6 and not rest
    assert (tmp_path / "and back" / "adapter_config.json").is_file()


def test_run_starts_the_ranks_from_the_wheel(installed: Installed, base: Base, tmp_path: Path) -> None:
    words = ["tiedlora", "run", "--num_gpus=2", "--show_command", *base.arguments()]
    lines = output_of(installed, *words, folder=tmp_path).splitlines()
    (command,) = [line for line in lines if line.startswith("command ")]
    assert str(installed.site / "megatron_tiedlora" / "commands" / "train.py") in shlex.split(command)


# Several ranks by every way that has no script ---------------------------------------------------------------------

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=PORT"]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2", "--master_port=PORT"]
STARTS: Mapping[str, Sequence[str]] = {
    "alone": ["tiedlora", "train"],
    "run": ["tiedlora", "run", "--num_gpus=2"],
    "deepspeed --no_python": [*DEEPSPEED, "--no_python", "tiedlora", "train"],
    "deepspeed --module": [*DEEPSPEED, "--module", "megatron_tiedlora", "train"],
    "torchrun -m": [*TORCHRUN, "-m", "megatron_tiedlora", "train"],
    "torchrun --no-python": [*TORCHRUN, "--no-python", "tiedlora", "train"],
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", STARTS)
def test_a_run_from_the_wheel(name: str, installed: Installed, base: Base, tmp_path: Path) -> None:
    flags = base.arguments(max_steps=2, eval_interval=2, warmup_steps=1, output_dir="run", ds_config="zero1.json")
    start = [word.replace("=PORT", f"={free_port()}") for word in STARTS[name]]
    around = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": installed.path}
    text = output_of(installed, *start, *flags, folder=tmp_path, **around)
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())
    assert record["ranks"] == (1 if name == "alone" else 2)
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["state"] == "finished"
    folder = tmp_path / "run" if name == "run" else "run"  # which tells every host the whole path
    assert f"  tiedlora merge --adapter {folder}/adapter" in text


# The image and the other files of a package ------------------------------------------------------------------------


def test_the_commands_of_the_image(installed: Installed, tmp_path: Path) -> None:
    """Without docker: each RUN is a shell command, and its requirement and the start command are this package's."""
    assert [line.split()[0] for line in instructions("FROM")] == ["${CUDA_IMAGE}"]
    assert instructions("ARG")[0].startswith("CUDA_IMAGE=nvidia/cuda:")
    for command in instructions("RUN"):
        assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0, command
    (extras,) = re.findall(r'pip install .*"/src\[([\w,]+)\]"', "\n".join(instructions("RUN")))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"train", "eval", "check"} == set(extras.split(",")) <= set(known)
    (entry,), (arguments,) = (map(json.loads, instructions(name)) for name in ("ENTRYPOINT", "CMD"))
    assert output_of(installed, *entry, *arguments, folder=tmp_path).startswith("usage: tiedlora")
    sent = (ROOT / ".dockerignore").read_text().split()
    copied = {name for instruction in instructions("COPY") for name in instruction.split()[:-1]}
    assert {f"!{name}" for name in copied} <= set(sent)


def test_the_citation_and_the_changelog_have_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == megatron_tiedlora.__version__ and citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"\n## {megatron_tiedlora.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
