"""What `tools/plan.py` writes is what runs: `--dry_run` of its YAML has its numbers, and its commands train here."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.planned import stage_table
from support.run_files import losses, run_settings, status
from support.run_helpers import run_ranks, start_command, write_rows
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import bytes_in_words, time_text
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_launch
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.planning.report import dry_run_report

pytestmark = pytest.mark.distributed

# Columns of the table of --dry_run on CPUs, by the field of the plan's record.
COLUMNS = {
    "base": "base weights",
    "dequantised": "one dequantised",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "engine": "engine",
    "buffers": "buffers",
    "libraries": "process",
    "slack": "allocator",
    "needed": "sum",
}
ON_GPU = {"libraries": "CUDA, NCCL"}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of plans of a tiny model with rows."""
    folder = tmp_path_factory.mktemp("job")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_layers": 5, "num_kv_heads": 4}
    model, rows = write_tiny_model(folder / "model", **shape), write_rows(folder / "rows.jsonl", 24)
    sizes = ["--global_batch_size=16", "--max_length=64", "--max_steps=2", "--method=lora", "--targets=all"]
    return [f"--model={model}", f"--train_file={rows}", *sizes]


def planned(folder: Path, *flags: str) -> Mapping[str, Any]:
    """The record of a plan, whose YAML is plan.yaml in the folder."""
    assert call("plan", [*flags, f"--json={folder / 'plan.json'}", f"--yaml={folder / 'plan.yaml'}"]) == 0
    record: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return record


def assert_same_numbers(record: Mapping[str, Any], report: str, *, on_gpu: bool) -> None:
    """Memory by column, messages and bytes by stage and group, and with a card the time by what it is spent on."""
    chosen = record["chosen"]
    row = next(row for row in record["layouts"] if row["layout"] == chosen["layout"])
    memory = stage_table(report, "bytes per rank")[row["bytes"]["stage"]]
    columns = {**COLUMNS, **(ON_GPU if on_gpu else {})}
    expected = {columns[name]: row["bytes"][name] for name in columns}
    assert memory.pop("in flight").isdigit()
    assert memory == {name: bytes_in_words(size) for name, size in expected.items() if name in memory}
    assert not any(size for name, size in expected.items() if name not in memory)
    found = []
    for cells in stage_table(report, "messages and bytes"):
        sizes = {group.replace("all ranks", "world"): cell for group, cell in cells.items()}
        found.append({**dict.fromkeys(chosen["messages"][0], "0 / 0 B"), **sizes})
    by_engine = "zero0" not in chosen["layout"]  # DeepSpeed sums gradients, and chooses the number of messages
    for cells, groups in zip(found, chosen["messages"], strict=True):
        for group, sent in groups.items():
            words = f"{sent['messages']:,} / {bytes_in_words(sent['bytes'])}"
            at_most = f"at most {bytes_in_words(sent['bytes'])}"
            assert cells.pop(group) == (at_most if group == "data" and sent["messages"] and by_engine else words)
        assert cells == {}
    if not on_gpu:
        return
    spent, room = dict(row["seconds"]), row["bytes"]["of"]
    step = spent.pop("step")
    assert f"needs {bytes_in_words(row['bytes']['needed'])} of {bytes_in_words(room)}: it fits" in report
    rate, ranks = row["tokens_per_second_per_rank"], record["ranks"]
    assert f"  a step of {rate * ranks * step:,.0f} tokens takes {time_text(step)}: {rate:,.0f} tokens/s of" in report
    assert f" tokens/s of each rank, MFU {row['mfu']:.1%}\n" in report
    shares = ", ".join(f"{name} {seconds / step:.1%}" for name, seconds in spent.items() if seconds)
    assert f"\n  {shares}\n" in report


@pytest.mark.parametrize(
    ("layout", "on_gpu"),
    [
        ("t2p1d2-b1-zero2-wholeseq-selective", True),
        ("t1p4d1-b2-zero1-full", False),
        ("t1p1d4-b2-zero3-selective", True),
        ("t1p2d2-b1-zero0-nf4", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("t1p1d4-b4-zero0", True),
                ("t4p1d1-b2-zero1", False),
                ("t2p2d1-b4-zero1", True),
                ("t1p2d2-b1-zero0-nf4", True),
                ("t2p1d2-b2-zero3-int8", False),
            )
        ),
    ],
)
def test_the_dry_run_of_a_plan_with_data_has_its_numbers(
    job: list[str], tmp_path: Path, layout: str, on_gpu: bool
) -> None:
    cluster = ["--gpus_per_node=4", "--gpu=h100"] if on_gpu else ["--ranks_on_cpu=4"]
    formats = next((name for name in ("nf4", "int8") if layout.endswith(name)), "none")
    record = planned(tmp_path, *job, *cluster, f"--formats={formats}", f"--layout={layout}")
    words = [f"--config={tmp_path / 'plan.yaml'}", "--dry_run", "--world_size=4"]
    report = dry_run_report(parse_settings([*words, *(["--gpu=h100"] if on_gpu else [])], Settings)).text
    assert_same_numbers(record, report, on_gpu=on_gpu)
    assert record["chosen"]["layout"] == layout


@pytest.mark.parametrize(
    "layout",
    [
        "t2p2d2-b2-zero1-full",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("", "t2p1d4-b1-zero3-selective-nf4")),
    ],
)
def test_the_dry_run_of_a_preset_s_plan_has_its_numbers(tmp_path: Path, layout: str) -> None:
    flags = ("--model=llama2-13b", "--global_batch_size=16", "--method=lora", "--rank=16", "--targets=all")
    record = planned(tmp_path, *flags, *([f"--layout={layout}"] if layout else []))
    assert record["chosen"]["layout"] == (layout or record["layouts"][0]["layout"])
    words = [f"--config={tmp_path / 'plan.yaml'}", "--dry_run", "--gpu=h100", "--world_size=8"]
    assert_same_numbers(record, dry_run_report(parse_settings(words, Settings)).text, on_gpu=True)


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["t1p2d1-b4-zero1-full", "t2p1d1-b2-zero1-selective-nf4"])
def test_a_plan_s_command_runs_here(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, launched: bool
) -> None:
    """With flags or the YAML file, as it is printed or by the ranks that it starts: two steps in that layout."""
    formats, with_file = ("nf4", True) if layout.endswith("nf4") else ("none", False)
    flags = [*job, "--ranks_on_cpu=2", f"--formats={formats}", f"--layout={layout}"]
    assert call("plan", [*flags, *([f"--yaml={tmp_path / 'plan.yaml'}"] if with_file else [])]) == 0
    start = capsys.readouterr().out.splitlines()[-1]
    assert start.startswith("tiedlora run --num_gpus 2 ") and ("--config" in start) == with_file
    run = tmp_path / "run"
    words = [*shlex.split(start)[1:], f"--output_dir={run}"]
    if launched:
        command = [sys.executable, "-m", "megatron_tiedlora", *words]
        start_command(command, folder=tmp_path / "work").wait().expect(0)
    else:
        ranks = parse_launch(words[1:])
        run_ranks(ranks.arguments, folder=tmp_path / "work", ranks=ranks.settings.num_gpus).expect(0)
    assert status(run)["state"] == "finished" and [step for step, _ in losses(run)] == [1, 2]
    sizes = {name: run_settings(run)[name] for name in ("tensor_parallel", "pipeline_parallel", "micro_batch_size")}
    expected = [int(number) for number in re.findall(r"[tpb](\d+)", layout)[:3]]
    assert list(sizes.values()) == expected
    chosen = {name: run_settings(run)[name] for name in ("recompute", "ds_config", "base")}
    assert list(chosen.values()) == [layout.split("-")[3], "zero1.json", "nf4" if with_file else None]
