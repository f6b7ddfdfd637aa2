"""docs/guide.md as a newcomer follows it: its commands run one after another, with a small model in place of the large.

What differs from the guide is in `HERE`, `MORE` and `STARTS`: fewer steps and shorter rows, two ranks on this machine's
CPUs in the place of cards and hosts. /shared is a folder of the test, in which both models are the small one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from folders import ROOT
from guide_commands import ADAPTERS, COMMANDS, words_of
from ranks import free_port
from run_files import files_of, losses, status
from run_helpers import Ended, run_ranks, start_command, write_rows
from task_files import HUB_ROWS
from tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

MAIN = ROOT / "megatron_tiedlora" / "__main__.py"
# Flags of the guide, and what stands in their place here.
HERE = {
    "--max_length 2048": "--max_length 64",
    "--max_steps 235": "--max_steps 2",
    "--gpus_per_node 1": "--ranks_on_cpu 1",
    "--gpus_per_node 8": "--ranks_on_cpu 2",
    "--nodes 4": "--ranks_on_cpu 2",
    "--nodes 16": "--ranks_on_cpu 2",
    "--num_gpus 8": "--num_gpus 2",
    "doctor --hostfile hosts": "doctor",
}
# Flags beside those of the guide, by command.
MORE = {
    "plan": ["--global_batch_size=8"],
    "run": ["--save_interval=1"],
    "evaluate": ["--test_file=gsm8k.jsonl", "--max_new_tokens=3"],
    "doctor": ["--measure_seconds=0.1"],
}
# What starts ranks that this test starts itself, and the start of the command that each of them is.
STARTS = {
    r"torchrun --nproc_per_node 8 --no-python tiedlora": "",
    r"tiedlora run --hostfile hosts": "train --save_interval 1",
    r"sbatch --nodes 16 launch/slurm.sbatch": "train --resume auto",
}


@dataclass(frozen=True)
class Newcomer:
    """A folder with what the guide expects to be there, in which its commands are run.

    Attributes:
        parts: by how many ranks the evaluation divides each layer.
    """

    folder: Path
    parts: int

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    def run(self, command: str) -> Ended | None:
        """Run a command of this project to its end, which must be a success; None for one of another program."""
        ranks = None
        for start, ours in STARTS.items():
            if command.startswith(start):
                command, ranks = f"tiedlora {ours} {command.removeprefix(start)}", 2
        if "--tensor_parallel 8" in command:
            command, ranks = command.replace("--tensor_parallel 8", f"--tensor_parallel {self.parts}"), self.parts
        for theirs, here in HERE.items():
            command = re.sub(rf"{theirs}\b", here, command)
        program, *words = words_of(command, str(self.shared))
        if program != "tiedlora":
            return None
        words += MORE.get(words[0], ())
        if words[0] == "doctor":
            words.append(f"--master_port={free_port()}")
        if "--adapters" in words and words[0] == "train":
            words.append("--global_batch_size=8")
        if words[0] == "run":
            line = [sys.executable, "-m", "megatron_tiedlora", *words]
            return start_command(line, folder=self.folder).wait().expect(0)
        return run_ranks(words, folder=self.folder, ranks=ranks, script=MAIN).expect(0)


@pytest.fixture(params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def newcomer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Newcomer]:
    shared = tmp_path / "shared"
    if request.param == "tiny":
        write_tiny_model(shared / "llama2-7b", hidden_size=64, intermediate_size=128, num_layers=2, max_positions=4096)
    else:
        from megatron_tiedlora.data.demo import demo_model_path

        shutil.copytree(demo_model_path(), shared / "llama2-7b")
    (shared / "llama2-70b").symlink_to("llama2-7b")
    write_rows(shared / "data.jsonl", 24)
    for entry in yaml.safe_load(ADAPTERS):
        write_rows(shared / Path(entry["train_file"]).name, 16)
    (tmp_path / "adapters.yaml").write_text(ADAPTERS.replace("/shared/", f"{shared}/").replace("100", "1"))
    (tmp_path / "gsm8k.jsonl").write_text(2 * f"{json.dumps(HUB_ROWS['gsm8k'])}\n")
    yield Newcomer(tmp_path, 2 if request.param == "tiny" else 3)


@pytest.mark.timeout(900)
def test_the_guide_from_weights_to_a_served_model(newcomer: Newcomer) -> None:
    outputs: dict[str, str] = {}
    for command in COMMANDS:
        whole = lose_the_last_step(newcomer.shared / "runs" / "four") if "--resume auto" in command else None
        if ended := newcomer.run(command):
            outputs[command] = ended.outputs[0]
        assert whole is None or files_of(newcomer.shared / "runs" / "four" / "adapter") == whole

    def output(words: str) -> str:
        (found,) = (text for command, text in outputs.items() if words in command)
        return found

    folder, shared = newcomer.folder, newcomer.shared
    assert "it fits" in output("--dry_run") and "first sample" in output("--dry_run")
    for run in (folder / "runs" / "seven", folder / "runs" / "seven-nf4", *(shared / "runs").iterdir()):
        assert status(run)["state"] == "finished" and [step for step, _ in losses(run)] == [1, 2], run
        assert (run / "adapter" / "adapter_config.json").is_file() and (run / "peft" / "adapter_config.json").is_file()
    assert {run.name for run in (shared / "runs").iterdir()} == {"one-card", "one-node", "four", "sixteen"}
    assert json.loads((folder / "constants.json").read_text())["name"] == "measured"
    names = [entry["name"] for entry in yaml.safe_load(ADAPTERS)]
    assert all((folder / "runs" / "many" / name / "adapter").is_dir() for name in names)
    table = (folder / "runs" / "many-scores" / "table.csv").read_text().splitlines()
    assert len(table) == 1 + len(names)
    for model in ("merged", "peft-16"):
        assert any((folder / "runs" / "seven" / model).glob("*.safetensors"))
    verdicts = re.findall(r"(ok|differs, as it should|\S+)$", output("tiedlora verify"), re.MULTILINE)
    assert verdicts.count("ok") >= 4 and set(verdicts) <= {"ok", "verdict", "differs, as it should"}, verdicts
    printed = output("tiedlora export").replace(f"{shared}/", "/shared/")
    for command in COMMANDS:
        if command.startswith(("vllm serve /shared", "python convert_lora_to_gguf.py", "llama-server -m BASE")):
            assert f"\n{command}\n" in printed, command
    served = re.findall(r"^ *vllm serve .*$", output("--adapters adapters.yaml"), re.MULTILINE)
    assert len(served) == 1 and all(f"{name}=" in served[0] for name in names)


def lose_the_last_step(run: Path) -> dict[str, bytes]:
    """Leave a run as if it had been killed after its first step; returns the adapter that it had at its end."""
    adapter = files_of(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step_2")
    (run / "checkpoints" / "latest").write_text("step_1\n")
    return adapter
