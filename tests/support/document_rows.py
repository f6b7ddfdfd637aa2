"""What README.md, docs/guide.md and docs/serving.md tell a reader to paste, and how a test's own process checks it.

`ROWS` has a check for each kind: the command is parsed by its own parser, and what it starts is planned at the size
that it names.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config import adapter_settings
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import DoctorSettings, parse_launch, parse_plan, parse_sweep
from megatron_tiedlora.config.service_settings import ServiceSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.export_peft import Export
from megatron_tiedlora.convert.serving import serve_hints
from megatron_tiedlora.planning.run_plan import plan_run
from support.folders import ROOT

# The first word of a command. A block with one of them has nothing but commands and comments.
PROGRAMS = frozenset(
    (
        *("tiedlora", "deepspeed", "torchrun", "sbatch", "kubectl", "make", "pip", "hf", "python", "vllm"),
        *("llama-server", "docker", "srun", "git", "mpirun", "curl"),
    )
)


@dataclass(frozen=True)
class Document:
    """A document with commands.

    Attributes:
        commands: each as one line, without a comment behind it, in the order of the text.
        others: the blocks that are no commands: output, YAML, Python, formulas.
    """

    text: str
    commands: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def adapters(self) -> str:
        """The text of its file of several adapters."""
        (found,) = (block for block in self.others if block.startswith("- {name: "))
        return found


def read_document(name: str) -> Document:
    """The document of that name. Raises AssertionError for a block that mixes commands with anything else."""
    text = (ROOT / name).read_text()
    commands: list[str] = []
    others: list[str] = []
    for block in _blocks(text):
        lines = [line for line in re.sub(r" *\\\n *", " ", block).splitlines() if not line.startswith("#")]
        known = [line.split()[0] in PROGRAMS for line in lines]
        if any(known):
            assert all(known), f"{name}: commands beside something else:\n{block}"
            commands += [re.sub(r" +# .*", "", line).rstrip() for line in lines]
        else:
            others.append(block)
    return Document(text, tuple(commands), tuple(others))


def _blocks(text: str) -> Iterator[str]:
    """The blocks between fences, and the indented ones."""
    yield from re.findall(r"^```\w*\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^ {4}.*\n)+", plain, re.MULTILINE):
        yield dedent(block).strip("\n")


def words_of(command: str, places: Mapping[str, str]) -> list[str]:
    """The words of a command; one that begins with a name of `places`, or --FLAG= and it, has its place instead."""
    words = shlex.split(command)
    for name, place in places.items():
        words = [re.sub(rf"^(--\w+=)?{re.escape(name)}(?=/|$)", rf"\g<1>{place}", word) for word in words]
    return words


README, GUIDE, SERVING = map(read_document, ("README.md", "docs/guide.md", "docs/serving.md"))
DOCUMENTS = {"README.md": README, "docs/guide.md": GUIDE, "docs/serving.md": SERVING}
# Presets in the place of the README's models, whose plans need no file; words that stand for the reader's own.
PRESETS = {"meta-llama/Llama-2-7b-hf": "llama2-7b", "meta-llama/Llama-2-70b-hf": "llama2-70b"}
PRESETS |= {"/shared/llama2-70b": "llama2-70b", "M": "llama2-7b"}


@dataclass(frozen=True)
class Reader:
    """Checks the commands of a document in this process, in a folder that is the current one.

    Attributes:
        places: names of the document, and what has their place here.
        fits: whether a run is to fit the card of which the document speaks, as its models are presets of the true size.
        ranks: of a YAML file that a plan has written.
    """

    folder: Path
    document: Document
    places: dict[str, str]
    fits: bool
    capsys: pytest.CaptureFixture[str]
    ranks: dict[str, int] = field(default_factory=dict)

    def words(self, command: str) -> list[str]:
        """The words of a command of this package behind `tiedlora NAME`."""
        words = words_of(command, self.places)
        return words[words.index("tiedlora") + 2 :]

    def started(self, words: Sequence[str], *, ranks: int = 1) -> None:
        """What `tiedlora train` says of a run on so many ranks, or as many as its YAML file was planned for."""
        of_file = self.ranks.get(words[words.index("--config") + 1], 1) if "--config" in words else ranks
        dry = [word for word in words if word not in ("--dry_run", "...")]
        dry = dry if "--gpu" in dry else [*dry, "--plan_for", "gpu"]
        dry = dry if "--world_size" in dry else [*dry, "--world_size", str(of_file)]
        settings = parse_settings([*dry, "--dry_run"], Settings)
        if settings.adapters is None and settings.init_from is None:
            plan = plan_run(settings, rank=0, world_size=settings.world_size or of_file, weights=False)
            assert plan.layout.world_size == settings.world_size
        if self.fits and settings.init_from is None:
            self.whole_dry_run(dry)

    def whole_dry_run(self, words: list[str]) -> None:
        """A dry run for a card, without data: all rows have the model's length."""
        for flag in ("--train_file", "--validation_file", "--plan_for"):
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
        assert call("train", [*words, "--dry_run", *(() if "--gpu" in words else ("--gpu", "h100"))]) == 0
        assert ": it fits" in self.capsys.readouterr().out, words


def trains(reader: Reader, command: str) -> None:
    """A run of one process, or a dry run."""
    reader.started(reader.words(command))


def starts(reader: Reader, command: str) -> None:
    """Ranks that `tiedlora run` starts: on so many GPUs, or on the two nodes of 8 of which the README speaks."""
    settings = parse_launch(reader.words(command))
    reader.started(settings.arguments, ranks=settings.settings.num_gpus or 16)


def submits(reader: Reader, command: str) -> None:
    """Ranks of Slurm's tasks; `...` stands for the flags of the command before."""
    words = words_of(command, reader.places)
    own = words[words.index("launch/slurm.sbatch") + 1 :]
    assert (ROOT / "launch" / "slurm.sbatch").is_file()
    reader.started(own, ranks=16) if "..." not in own else parse_settings([*own[:-1], "--model=demo"], Settings)


def plans(reader: Reader, command: str) -> None:
    """A plan is made; what it writes is read by the commands after it."""
    words = reader.words(command)
    assert call("plan", words) == 0
    assert "\nstart " in reader.capsys.readouterr().out
    made = parse_plan(words).settings
    if made.yaml is not None:
        reader.ranks[made.yaml] = made.ranks_on_cpu or made.nodes * made.gpus_per_node


def parses(parse: Callable[[list[str]], Any]) -> Callable[[Reader, str], None]:
    """The command's own parser takes the words as they stand."""
    return lambda reader, command: parse(words_of(command.partition("tiedlora ")[2], {})[1:])


def installs(reader: Reader, command: str) -> None:
    """pip: the extras are this project's. The wheel's tests install it."""
    (extras,) = re.findall(r"pip install '\.\[([\w,-]+)\]'", command)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= known.keys()


def makes(reader: Reader, command: str) -> None:
    """make: it has the target, `make train` runs what the README names next, and tests are where a command says."""
    target, *given = command.split()[1:]
    done = subprocess.run(["make", "-n", target, *given], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if target == "train":
        assert any(line in " ".join(done.stdout.split()) for line in README.commands if line.startswith("deepspeed "))
    assert all((ROOT / word.partition("=")[2]).exists() for word in given if word.startswith("TESTS="))


def launches(reader: Reader, command: str) -> None:
    """DeepSpeed's launcher with a script of this clone."""
    script, *words = command.split()[1:]
    assert (ROOT / script).is_file()
    parse_settings(words, Settings)


def serves(reader: Reader, command: str) -> None:
    """A server is planned where the document's own folders are; others are parsed."""
    words = reader.words(command)
    settings = parse_settings(words, adapter_settings.ServeSettings)
    if settings.adapters.is_dir():
        dry = words if settings.dry_run else ["--dry_run", *words]
        assert call("serve", dry) == 0
        assert " vllm serve " in reader.capsys.readouterr().out


def asks(reader: Reader, command: str) -> None:
    """A request for a completion, of an adapter that other documents train."""
    words = shlex.split(command)
    asked = json.loads(words[words.index("-d") + 1])
    assert words[1].endswith("/v1/completions") and asked["prompt"]
    assert f"--output_dir runs/{asked['model']}" in GUIDE.text


def chats(reader: Reader, command: str) -> None:
    """vLLM's own client, with an adapter that other documents train."""
    (_, _, url, address, flag, model) = shlex.split(command)
    assert (url, flag) == ("--url", "--model-name") and address.endswith("/v1")
    assert f"--output_dir runs/{model}" in GUIDE.text


def applies(reader: Reader, command: str) -> None:
    assert (ROOT / command.split()[-1]).is_file()


def is_others(reader: Reader, command: str) -> None:
    """Other programs: what an export prints, or what has of ours only a folder that a command before it wrote."""
    exported = {"tied": Export(Path("runs/seven/peft-16"), 16, ["qkv"])}
    hints = serve_hints(exported, replace(find_model("llama2-7b"), name="/shared/llama2-7b"))
    read = re.findall(r"runs/[\w/-]+|\w+\.gguf", command)[:1]
    before = " ".join(reader.document.commands).partition(command)[0]
    assert command in hints or command.startswith("hf ") or (read and read[0] in before), command


@dataclass(frozen=True)
class Row:
    """How commands are checked.

    Attributes:
        pattern: matches a command from its start.
        check: what is done in this process.
        runs: whether the walks run it too.
    """

    pattern: str
    check: Callable[[Reader, str], None]
    runs: bool = True


ROWS = (
    Row(r"pip install", installs, runs=False),
    Row(r"make ", makes, runs=False),
    Row(r"deepspeed launch/", launches, runs=False),  # the demo, whose weights are downloaded
    Row(r"tiedlora train ", trains),
    Row(r"tiedlora run ", starts),
    Row(r"tiedlora plan ", plans),
    Row(r"torchrun --nproc_per_node 8 --no-python tiedlora plan ", parses(parse_plan)),
    Row(r"sbatch .*launch/slurm\.sbatch", submits),
    Row(r"tiedlora doctor ", parses(lambda words: parse_settings(words, DoctorSettings))),
    Row(r"(torchrun --nproc_per_node 8 --no-python )?tiedlora evaluate ",
        parses(lambda words: parse_settings(words, EvaluateSettings))),
    Row(r"tiedlora sweep ", parses(parse_sweep)),
    Row(r"tiedlora merge ", parses(lambda words: parse_settings(words, adapter_settings.MergeSettings))),
    Row(r"tiedlora export ", parses(lambda words: parse_settings(words, adapter_settings.ExportSettings))),
    Row(r"tiedlora verify ", parses(lambda words: parse_settings(words, adapter_settings.VerifySettings))),
    Row(r"tiedlora import ", parses(lambda words: parse_settings(words, adapter_settings.ImportSettings))),
    Row(r"tiedlora index ", parses(lambda words: parse_settings(words, adapter_settings.IndexSettings))),
    Row(r"tiedlora serve ", serves),
    Row(r"tiedlora serve-training ", parses(lambda words: parse_settings(words, ServiceSettings)), runs=False),
    Row(r"curl ", asks, runs=False),
    Row(r"vllm chat ", chats, runs=False),
    Row(r"tiedlora push ", parses(lambda words: parse_settings(words, adapter_settings.PushSettings))),
    Row(r"kubectl apply -f launch/", applies, runs=False),
    Row(r"(hf|vllm serve|python convert_\w+\.py|llama-server) ", is_others, runs=False),
)  # fmt: skip


def row_of(command: str) -> Row:
    """The one row of a command."""
    found = [row for row in ROWS if re.match(row.pattern, command)]
    assert len(found) == 1, f"{command}: {len(found)} rows of ROWS say how it is checked"
    return found[0]
