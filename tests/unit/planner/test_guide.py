"""docs/guide.md: its table is planned anew from its commands; each command is planned or parsed at its own size.

tests/runs/test_guide_runs.py runs them, one after another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from folders import ROOT
from guide_commands import COMMANDS, TEXT, words_of
from run_helpers import write_rows
from tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands import export, merge, plan, verify
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.launch_settings import parse_launch
from megatron_tiedlora.config.plan_settings import FORMAT_NAMES, parse_plan
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.serving import Export, serve_hints
from megatron_tiedlora.planner.report import make_plan
from megatron_tiedlora.planning.cards import GPUS
from megatron_tiedlora.training.plan import plan_run

PLANS = {name: command for command in COMMANDS for name in re.findall(r"tiedlora plan .* --yaml (\S+)", command)}
ROWS = {Path(name).name: title for title, name in re.findall(r"^\| (.*?) \| `([\w-]+\.yaml)` \|", TEXT, re.MULTILINE)}
# Of other programs; what of them is ours is checked below.
OTHERS = (
    "make test",
    "hf download",
    "kubectl apply -f launch/kubernetes/pytorchjob.yaml",
    "vllm serve runs/seven/merged",
    "python convert_hf_to_gguf.py runs/seven/merged --outfile seven.gguf",
    "llama-server -m seven.gguf",
)


@pytest.mark.parametrize("name", PLANS)
def test_the_table_is_what_its_commands_plan(name: str) -> None:
    """But for the data: every sample has the full length, and the model is a preset, so that no file is needed."""
    words = words_of(PLANS[name], "")[2:]
    for flag in ("--train_file", "--yaml"):
        del words[words.index(flag) : words.index(flag) + 2]
    words[words.index("--model") + 1] = Path(words[words.index("--model") + 1]).name
    made = make_plan(parse_plan(words))
    row, file = made.plan.rows[0], Path(name).name
    hours = made.plan.hours(row)
    line = f"| {ROWS.get(file, '?')} | `{file}` | `{row.name}` | {row.needed / 1e9:.1f} | {row.tokens_per_second:,.0f}"
    line += f" | {hours:.2f} | {hours * made.cluster.world_size:.1f} |"
    print(f"\n{line}")
    assert line in TEXT


def test_the_words_about_70b_on_one_card_are_those_of_its_plans() -> None:
    """16 bits do not fit; 4 bits do without recompute, 8 bits only with full recompute."""
    flags = ["--model=llama2-70b", "--gpus_per_node=1", "--max_length=2048"]
    rows = {name: make_plan(parse_plan([*flags, f"--formats={name}"])).plan.rows for name in FORMAT_NAMES}
    recomputes = {name: {row.candidate.layout.recompute for row in found} for name, found in rows.items()}
    assert not rows["none"] and "none" in recomputes["nf4"]
    assert all(recomputes[name] == {"full"} for name in ("int8", "fp8", "fp8-products"))
    assert not rows["fp8-transposed"]


def test_the_words_about_the_table_are_those_of_its_plans() -> None:
    assert {Path(name).name for name in PLANS} == set(ROWS) and len(ROWS) == 6
    train = parse_plan(PLANS["seven.yaml"].split()[2:]).train
    samples = train.max_steps * train.global_batch_size
    said = f"{train.global_batch_size} samples in a step and {train.max_steps} steps, so {samples:,} samples, here of"
    assert f"{said} {train.max_length:,} tokens" in " ".join(TEXT.split())
    assert (train.method, train.rank) == ("tl6", 8) and "`tl6` at rank 8" in TEXT
    assert f"({GPUS['h100']['memory'] / 1e9:.1f} GB as PyTorch counts)" in TEXT


def test_kubernetes_takes_what_the_guide_says() -> None:
    (job,) = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / "pytorchjob.yaml").read_text())
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    names = [word.partition("=")[0] for word in container["args"]]
    assert names == ["--model", "--train_file", "--output_dir", "--resume"]
    nodes = parse_plan(PLANS["/shared/sixteen.yaml"].split()[2:]).settings.nodes
    ranks = nodes * int(job["spec"]["nprocPerNode"])
    assert f"{nodes - 1} replicas of the worker and {ranks} expected ranks" in TEXT


def test_every_command_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made and what they write is read; runs are planned to the end; the rest is parsed."""
    monkeypatch.chdir(tmp_path)
    shared = tmp_path / "shared"
    model = write_tiny_model(shared / "llama2-7b", hidden_size=64, intermediate_size=128, max_positions=4096)
    (shared / "llama2-70b").symlink_to(model)
    write_rows(shared / "data.jsonl", 256)
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
    exported = {"tied": Export(Path("runs/seven/peft-16"), 16, ["qkv"])}
    hints = serve_hints(exported, "/shared/llama2-7b", find_model("llama2-7b").shape)
    seen = set()
    for command in COMMANDS:
        words = words_of(command, str(shared))
        if "tiedlora" in words:
            name, *rest = words[words.index("tiedlora") + 1 :]
            seen.add(name)
            checks[name](rest)
        elif words[0] == "sbatch":
            started(words[words.index("launch/slurm.sbatch") + 1 :])
        else:
            assert command in hints or command.startswith(OTHERS), command
    assert seen == set(checks) and len(ranks) == len(PLANS)
