"""docs/guide.md: its table is planned anew; each command is run or parsed, with a tiny model in place of the large."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from folders import ROOT
from run_helpers import write_rows
from tiny_models import write_tiny_model, write_tiny_tokenizer

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands import export, merge, plan, verify
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.launch_settings import parse_launch
from megatron_tiedlora.config.plan_settings import parse_plan
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.serving import serve_hints
from megatron_tiedlora.planner.report import make_plan
from megatron_tiedlora.training.plan import plan_run

TEXT = (ROOT / "docs" / "guide.md").read_text()
COMMANDS = [line.strip() for line in TEXT.replace("\\\n", "").splitlines() if line.startswith("    ")]
JOB = ("--max_length=2048", "--global_batch_size=128", "--max_steps=235")
JOBS = {
    "7B on one card": ("--model=llama2-7b", "--gpus_per_node=1", "--formats=none"),
    "7B on one card, 4 bits": ("--model=llama2-7b", "--gpus_per_node=1", "--formats=nf4"),
    "70B on one card, 4 bits": ("--model=llama2-70b", "--gpus_per_node=1", "--formats=nf4"),
    "70B on one node": ("--model=llama2-70b", "--formats=none"),
    "70B on 4 nodes": ("--model=llama2-70b", "--nodes=4", "--formats=none"),
    "70B on 16 nodes": ("--model=llama2-70b", "--nodes=16", "--formats=none"),
}
# Of other programs; what of them is ours is checked below.
OTHERS = ("make test", "hf download", "kubectl apply -f launch/kubernetes/pytorchjob.yaml")


@pytest.mark.parametrize("name", JOBS)
def test_the_table_is_what_the_planner_says(name: str) -> None:
    made = make_plan(parse_plan([*JOBS[name], *JOB]))
    row = made.plan.rows[0]
    hours = made.plan.hours(row)
    line = f"| {name} | `{row.name}` | {row.needed / 1e9:.1f} | {row.tokens_per_second:,.0f} | {hours:.2f}"
    line += f" | {hours * made.cluster.world_size:.1f} |"
    print(f"\n{line}")
    assert line in TEXT


def test_every_command_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made and what they write is read; runs are planned to the end; the rest is parsed."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model", vocab_size=320, hidden_size=64, intermediate_size=128, max_positions=4096)
    write_tiny_tokenizer(tmp_path / "model", vocab_size=320)
    write_rows(tmp_path / "data.jsonl", 256)
    ranks: dict[str, int] = {}  # of a YAML file

    def started(words: Sequence[str]) -> None:
        """What launch/train.py says of a run on as many ranks as its YAML file was planned for."""
        of_file = ranks.get(words[words.index("--config") + 1], 1) if "--config" in words else 1
        dry = [word for word in words if word != "--dry_run"]
        dry = dry if "--gpu" in dry else [*dry, "--plan_for", "gpu"]
        settings = parse_settings([*dry, "--dry_run", "--world_size", str(of_file)], Settings)
        if settings.adapters is None:
            assert plan_run(settings, rank=0, world_size=of_file, weights=False).layout.world_size == of_file

    def planned(words: Sequence[str]) -> None:
        assert plan.main(words) == 0
        made = parse_plan(words)
        assert made.settings.yaml is not None
        ranks[made.settings.yaml] = made.settings.world_size

    checks: dict[str, Callable[[list[str]], Any]] = {
        "train": started,
        "plan": planned,
        "run": lambda words: started(parse_launch(words).arguments),
        "doctor": lambda words: parse_settings(words, DoctorSettings),
        "evaluate": lambda words: parse_settings(words, EvaluateSettings),
        "merge": lambda words: merge.parser().parse_known_names(words),
        "export": lambda words: export.parser().parse_known_names(words),
        "verify": lambda words: verify.parser().parse_known_names(words),
    }
    hints = serve_hints(Path("runs/seven/peft-16"), "/shared/llama2-7b", 16, find_model("llama2-7b").shape, ["qkv"])
    seen = set()
    for command in COMMANDS:
        words = shlex.split(re.sub(r"/shared/llama2-\w+", "model", command))
        if words[0] == "tiedlora":
            seen.add(words[1])
            checks[words[1]](words[2:])
        elif words[0] == "sbatch":
            started(words[words.index("launch/slurm.sbatch") + 1 :])
        else:
            assert command in hints or command.startswith(OTHERS), command
    assert seen == set(checks) and len(ranks) == 4
