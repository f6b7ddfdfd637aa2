"""docs/guide.md: its table is planned anew. tests/runs/test_document_commands.py checks and runs all its commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from document_rows import GUIDE, words_of
from folders import ROOT

from megatron_tiedlora.config.plan_settings import FORMAT_NAMES, parse_plan
from megatron_tiedlora.planning.cluster_report import plan_cluster
from megatron_tiedlora.planning.machines import GPUS

TEXT = GUIDE.text
PLANS = {name: command for command in GUIDE.commands for name in re.findall(r"tiedlora plan .* --yaml (\S+)", command)}
ROWS = {Path(name).name: title for title, name in re.findall(r"^\| (.*?) \| `([\w-]+\.yaml)` \|", TEXT, re.MULTILINE)}


@pytest.mark.parametrize("name", PLANS)
def test_the_table_is_what_its_commands_plan(name: str) -> None:
    """But for the data: every sample has the full length, and the model is a preset, so that no file is needed."""
    words = words_of(PLANS[name], {})[2:]
    for flag in ("--train_file", "--yaml"):
        del words[words.index(flag) : words.index(flag) + 2]
    words[words.index("--model") + 1] = Path(words[words.index("--model") + 1]).name
    row, file = plan_cluster(parse_plan(words)).rows[0], Path(name).name
    line = f"| {ROWS.get(file, '?')} | `{file}` | `{row.name}` | {row.needed / 1e9:.1f} | {row.tokens_per_second:,.0f}"
    line += f" | {row.hours:.2f} | {row.hours * row.cluster.world_size:.1f} |"
    print(f"\n{line}")
    assert line in TEXT


def test_the_words_about_70b_on_one_card_are_those_of_its_plans() -> None:
    """16 bits do not fit; 4 bits do without recompute, 8 bits only with full recompute."""
    flags = ["--model=llama2-70b", "--gpus_per_node=1", "--max_length=2048"]
    rows = {name: plan_cluster(parse_plan([*flags, f"--formats={name}"])).rows for name in FORMAT_NAMES}
    recomputes = {name: {row.layout.recompute for row in found} for name, found in rows.items()}
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
