"""README.md, docs/guide.md and docs/serving.md as a newcomer follows them: each command is declared, checked, and run
where it can be.

`ROWS` of tests/support/document_rows.py says how each is checked in this process, and a command without a row fails.
The walks of `-m slow` run the commands one after another, with a small model in place of the large: the guide's from
the source tree, and the README's from a wheel. What differs there from the text is in `HERE`, `MORE` and
`STARTS`: fewer steps and shorter rows, two ranks on this machine's CPUs in the place of cards and hosts. /shared is a
folder of the test, in which all models are the small one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from support.document_rows import DOCUMENTS, GUIDE, PRESETS, README, ROWS, SERVING, Document, Reader, row_of, words_of
from support.folders import ROOT
from support.native_files import with_adapter, write_native
from support.ranks import ENVIRONMENT, free_port
from support.run_files import files_of, losses, status
from support.run_helpers import run_ranks, start_command, write_rows
from support.task_files import HUB_ROWS
from support.tiny_models import write_tiny_model
from support.wheel import Installed, install_wheel

from megatron_tiedlora.commands.front import find_command


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_is_right(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Plans and dry runs are made and what they write is read; runs are planned to the end; the rest is parsed."""
    monkeypatch.chdir(tmp_path)
    document, shared = DOCUMENTS[name], tmp_path / "shared"
    model = write_tiny_model(shared / "llama2-7b", hidden_size=64, intermediate_size=128, max_positions=4096)
    (shared / "llama2-70b").symlink_to(model)
    write_rows(shared / "data.jsonl", 256)
    for file in re.findall(r"--adapters (\S+\.yaml)", document.text):
        Path(file).write_text(document.adapters)
    if document is SERVING:
        write_native(Path("runs/seven/adapter"), model, with_adapter(model, "tl6")[2])
    is_readme = document is README
    places = PRESETS if is_readme else {"/shared": str(shared)}
    reader = Reader(tmp_path, document, places, is_readme, capsys)
    for command in document.commands:
        row_of(command).check(reader, command)
    expected = {README: (20, 0), GUIDE: (20, 6), SERVING: (3, 0)}[document]
    assert len(document.commands) >= expected[0] and len(reader.ranks) >= expected[1]


def test_every_row_has_a_command_and_every_command_of_the_package_that_users_need() -> None:
    commands = [command for document in DOCUMENTS.values() for command in document.commands]
    assert all(any(re.match(row.pattern, command) for command in commands) for row in ROWS)
    named = {find_command(name).name for name in re.findall(r"\btiedlora ([\w-]+)", "\n".join(commands))}  # type: ignore[union-attr]
    assert named >= {"train", "run", "plan", "doctor", "evaluate", "sweep", "merge", "export", "verify", "import"}


def test_blocks_that_are_no_commands_are_known() -> None:
    """Output, YAML, Python and the formula; a command of a program that `PROGRAMS` lacks would be among them."""
    starts = ("z = W x", " " * 20, "merged files, bit by bit", "- {name: ", "from megatron_tiedlora", "adapter = load")
    others = [block for document in DOCUMENTS.values() for block in document.others]
    assert len(others) == 7 and all(block.startswith(starts) for block in others)


# The walks -----------------------------------------------------------------------------------------------------------

# Flags of the documents, and what stands in their place here. Commands about presets need no file and run as they are.
HERE = {
    "tiedlora train --dry_run ...": "tiedlora train --dry_run --model /shared/llama2-7b --train_file data.jsonl",
    "--ds_config zero1.json ...": "--ds_config zero1.json --model /shared/llama2-70b --train_file data.jsonl",
    "meta-llama/Llama-2-70b-hf": "/shared/llama2-70b",
    "meta-llama/Llama-2-7b-hf": "/shared/llama2-7b",
    "--model M": "--model /shared/llama2-7b",
    "--peft DIR": "--peft RUN/peft",
    "RUN": "runs/llama2-7b-custom-tl6-r8",
    "doctor --hostfile hosts --tensor_parallel 8 --pipeline_parallel 2": "doctor",
    "--tensor_parallel 8 --pipeline_parallel 2": "--pipeline_parallel 2",
    "--tensor_parallel 4 --pipeline_parallel 2": "--tensor_parallel 2",
    "--max_length 2048": "--max_length 64",
    "--max_steps 235": "--max_steps 2",
    "--gpus_per_node 1": "--ranks_on_cpu 1",
    "--gpus_per_node 8": "--ranks_on_cpu 2",
    "--nodes 4": "--ranks_on_cpu 2",
    "--nodes 16": "--ranks_on_cpu 2",
    "--num_gpus 8": "--num_gpus 2",
    "doctor --hostfile hosts": "doctor",
}
# Flags beside those of the documents, by command. A run has those that neither the command nor its YAML file gives.
MORE = {
    "plan": ["--global_batch_size=8"],
    "run": ["--save_interval=1"],
    "evaluate": ["--test_file=gsm8k.jsonl", "--max_new_tokens=3"],
    "serve": ["--dry_run"],
    "push": ["--dry_run", "--output=published"],
    "sweep": ["--dry_run", "--ranks=2,8", *(f"--{name}_file=squad.jsonl" for name in ("train", "validation", "test"))],
}
OF_A_RUN = ("--max_steps=2", "--max_length=64", "--global_batch_size=8")
# What starts ranks that this test starts itself, and the start of the command that each of them is.
STARTS = {
    r"torchrun --nproc_per_node 8 --no-python tiedlora": "",
    r"tiedlora run --hostfile hosts": "train --save_interval 1",
    r"sbatch .*?launch/slurm.sbatch": "train --resume auto",
}
Start = Callable[[Sequence[str], int | None], str]


@dataclass(frozen=True)
class Newcomer:
    """A folder with what the documents expect to be there, in which their commands are run.

    Attributes:
        start: runs a command of this package on so many ranks, None for no launcher, and returns what rank 0 printed.
        printed: by what commands.
    """

    folder: Path
    start: Start
    printed: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def output(self, words: str) -> str:
        """What the one command with these words printed."""
        (found,) = (text for command, text in self.printed.items() if words in command)
        return found

    def run(self, command: str) -> None:
        """Run a command to its end, which must be a success, if the walks run it."""
        if row_of(command).runs:
            self.printed[command] = self._run(command)

    def _run(self, command: str) -> str:
        ranks = None
        if not re.search(r"--model llama2-\w+", command):
            for theirs, here in HERE.items():
                command = re.sub(rf"(?<![\w/]){re.escape(theirs)}(?!\w)", here, command)
            for start, ours in STARTS.items():
                if found := re.match(start, command):
                    command, ranks = f"tiedlora {ours} {command[found.end() :]}", 2
            if "--tensor_parallel 8" in command:
                command, ranks = command.replace("--tensor_parallel 8", "--tensor_parallel 2"), 2
        _, *words = words_of(command, {"/shared": str(self.shared)})
        if "--gpu" not in words and "--measure" not in words:
            words += MORE.get(words[0], ())
            if words[0] in ("train", "run") and "--config" not in words:
                words += [flag for flag in OF_A_RUN if flag.partition("=")[0] not in words]
        if words[0] == "doctor":
            words += [f"--master_port={free_port()}"]
        words += ["--measure_seconds=0.1"] if "--measure" in words else []
        return self.start(words, ranks)


def from_the_source(folder: Path) -> Start:
    """Commands of this tree, whose ranks a server of the tests forks."""

    def start(words: Sequence[str], ranks: int | None) -> str:
        if words[0] == "run":
            line = [sys.executable, "-m", "megatron_tiedlora", *words]
            return start_command(line, folder=folder).wait().expect(0).outputs[0]
        main = ROOT / "megatron_tiedlora" / "__main__.py"
        return run_ranks(words, folder=folder, ranks=ranks, script=main).expect(0).outputs[0]

    return start


def from_the_wheel(folder: Path, installed: Installed) -> Start:
    """Commands of the installed package, whose ranks torchrun starts."""
    changes = {**ENVIRONMENT, "PATH": installed.path, "MEGATRON_TIEDLORA_CACHE": str(folder / "cache")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--no-python", "--nproc_per_node"]

    def start(words: Sequence[str], ranks: int | None) -> str:
        torchrun = [] if ranks is None else [*launcher, ranks, f"--master_port={free_port()}"]
        done = installed.run(*torchrun, "tiedlora", *words, folder=folder, **changes)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout

    return start


def make_newcomer(folder: Path, document: Document, start: Start) -> Newcomer:
    """The folder of one who reads `document`."""
    shared = folder / "shared"
    write_tiny_model(shared / "llama2-7b", hidden_size=64, intermediate_size=128, num_layers=2, max_positions=4096)
    (shared / "llama2-70b").symlink_to("llama2-7b")
    for place in (shared, folder):
        for name in ("data", "dev", "other"):
            write_rows(place / f"{name}.jsonl", 24)
    for entry in yaml.safe_load(document.adapters):
        write_rows(folder / entry["train_file"].removeprefix("/"), 16)  # in the folder, or in its `shared`
    for file in re.findall(r"--adapters (\S+\.yaml)", document.text):
        (folder / file).write_text(re.sub("[12]00", "1", document.adapters.replace("/shared/", f"{shared}/")))
    for task in ("gsm8k", "squad"):
        (folder / f"{task}.jsonl").write_text(2 * f"{json.dumps(HUB_ROWS[task])}\n")
    return Newcomer(folder, start)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_the_guide_from_weights_to_a_served_model(tmp_path: Path) -> None:
    newcomer = make_newcomer(tmp_path, GUIDE, from_the_source(tmp_path))
    folder, shared, output = newcomer.folder, newcomer.shared, newcomer.output
    for command in GUIDE.commands:
        whole = lose_the_last_step(shared / "runs" / "four") if "--resume auto" in command else None
        newcomer.run(command)
        assert whole is None or files_of(shared / "runs" / "four" / "adapter") == whole
    assert "it fits" in output("--dry_run") and "first sample" in output("--dry_run")
    for run in (folder / "runs" / "seven", folder / "runs" / "seven-nf4", *(shared / "runs").iterdir()):
        assert status(run)["state"] == "finished" and [step for step, _ in losses(run)] == [1, 2], run
        assert (run / "adapter" / "adapter_config.json").is_file() and (run / "peft" / "adapter_config.json").is_file()
    assert {run.name for run in (shared / "runs").iterdir()} == {"one-card", "one-node", "four", "sixteen"}
    assert json.loads((folder / "constants.json").read_text())["name"] == "measured"
    names = [entry["name"] for entry in yaml.safe_load(GUIDE.adapters)]
    assert all((folder / "runs" / "many" / name / "adapter").is_dir() for name in names)
    table = (folder / "runs" / "many-scores" / "table.csv").read_text().splitlines()
    assert len(table) == 1 + len(names)
    for model in ("merged", "peft-16"):
        assert any((folder / "runs" / "seven" / model).glob("*.safetensors"))
    assert_verified(output("tiedlora verify"))
    printed = output("tiedlora export").replace(f"{shared}/", "/shared/")
    for command in GUIDE.commands:
        if command.startswith(("vllm serve /shared", "python convert_lora_to_gguf.py", "llama-server -m BASE")):
            assert f"\n{command}\n" in printed, command
    served = re.findall(r"^ *vllm serve .*$", output("--adapters adapters.yaml"), re.MULTILINE)
    assert len(served) == 1 and all(f"{name}=" in served[0] for name in names)


def assert_verified(table: str) -> None:
    """At least four rows of what `verify` prints are in order, and none is not."""
    verdicts = re.findall(r"(ok|differs, as it should|\S+)$", table, re.MULTILINE)
    assert verdicts.count("ok") >= 4 and set(verdicts) <= {"ok", "verdict", "differs, as it should"}, verdicts


def lose_the_last_step(run: Path) -> dict[str, bytes]:
    """Leave a run as if it had been killed after its first step; returns the adapter that it had at its end."""
    adapter = files_of(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step_2")
    (run / "checkpoints" / "latest").write_text("step_1\n")
    return adapter


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_the_readme_from_the_wheel(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    installed = install_wheel(tmp_path_factory.mktemp("wheel"))
    newcomer = make_newcomer(tmp_path, README, from_the_wheel(tmp_path, installed))
    for command in README.commands:
        newcomer.run(command)
    output = newcomer.output
    run = tmp_path / "runs" / "llama2-7b-custom-tl6-r8"
    finished = [run, tmp_path / "shared" / "runs" / "one"]
    finished += [tmp_path / "runs" / "four" / entry["name"] for entry in yaml.safe_load(README.adapters)]
    for folder in finished:
        assert status(folder)["state"] == "finished", folder
    for said in ("parameters", "bytes per rank", "messages", "first sample"):
        assert said in output("--dry_run ..."), said
    assert ": it fits" in output("--dry_run --gpu h100") and "\nstart " in output("tiedlora plan")
    assert "vllm serve" in output("--adapters four.yaml") and (tmp_path / "published" / "README.md").is_file()
    assert_verified(output("tiedlora verify"))
    again = [folder for folder in run.parent.glob("*/run.yaml") if "init_from: adapters/lora" in folder.read_text()]
    assert len(again) == 1 and status(again[0].parent)["state"] == "finished"
    assert "indexed" in output("tiedlora index") and "95 % interval" in output("tiedlora evaluate")
    code = "\n".join(block for block in README.others if block.startswith(("from megatron_tiedlora", "adapter = ")))
    (tmp_path / "use.py").write_text(code.replace("RUN/", f"{run}/"))
    done = installed.run(sys.executable, "use.py", folder=tmp_path, **ENVIRONMENT)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
