"""What a plan of a run of several adapters has of its own. test_price.py has the prices of all layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.planned import H100, THREE, searched, short, stage_table
from support.run_helpers import Base, run_ranks

from megatron_tiedlora.base.messages import bytes_in_words
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_plan
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.planning.cluster_report import plan_cluster
from megatron_tiedlora.planning.layout import plan_stages
from megatron_tiedlora.planning.passes import step_traffic
from megatron_tiedlora.planning.report import dry_run_report

SOURCE = short("llama2-7b", 6)


@pytest.fixture
def three(tmp_path: Path) -> str:
    """The file of three adapters that differ in what a step needs."""
    file = tmp_path / "three.yaml"
    file.write_text(THREE)
    return str(file)


def test_the_tensors_of_all_adapters_are_summed(three: str) -> None:
    """One message over two data-parallel ranks with the gradients of all, and a report of each."""
    flags = ("--ds_config=zero0.json", "--recompute=none", "--micro_batch_size=1", "--tensor_parallel=1")
    found = searched(
        *flags, f"--adapters={three}", "--pipeline_parallel=1", "--formats=none", "--global_batch_size=16",
        source=SOURCE, ranks=2,
    )  # fmt: skip
    (one,) = found.candidates
    trained = sum(sum(adapter.num_trained().values()) for adapter in one.layout.adapters)
    assert one.seconds.sums == pytest.approx(4 * trained / 360e9 + 2 * 15e-6, rel=1e-3)


# Numbers of the dry run ---------------------------------------------------------------------------------------------


def planned(folder: Path, *flags: str) -> dict[str, Any]:
    """The record of a plan, whose YAML is written beside it."""
    assert call("plan", [*flags, f"--json={folder / 'plan.json'}", f"--yaml={folder / 'plan.yaml'}"]) == 0
    record: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return record


def dry_run(folder: Path, *flags: str) -> str:
    """What launch/train.py --dry_run says of the YAML of a plan."""
    return dry_run_report(parse_settings([f"--config={folder / 'plan.yaml'}", "--dry_run", *flags], Settings)).text


@pytest.mark.cpu_seconds(25, reason="a plan and a dry run, which trace shared micro-batches")
def test_the_dry_run_of_a_plan_s_yaml_has_its_numbers(
    tmp_path: Path, three: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU: memory of the fullest rank, the verdict, and the time of a step. The command names the file too."""
    record = planned(tmp_path, "--model=llama2-13b", f"--adapters={three}", "--global_batch_size=16", "--formats=none")
    row = record["layouts"][0]
    report = dry_run(tmp_path, "--gpu=h100", "--world_size=8")
    needed, room = bytes_in_words(row["bytes"]["needed"]), bytes_in_words(H100["memory"])
    assert f"h100: the fullest rank needs {needed} of {room}: it fits" in report
    assert f"{row['tokens_per_second_per_rank']:,.0f} tokens/s of each rank" in report
    text = capsys.readouterr().out
    assert f"start {row['layout']}" in text and f"adapters: {three}" in (tmp_path / "plan.yaml").read_text()
    assert "3 adapters of " in text and "500 to 2,000 steps of 16 to 48 samples = 140,000 samples" in text


@pytest.mark.cpu_seconds(25, reason="the plan, its reasons and the dry run trace shared micro-batches of real samples")
def test_plans_with_data_have_the_numbers_of_the_dry_run(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPU ranks: each part of the fullest rank's memory, and the messages of the first step, whose micro-batches
    adapters share."""
    layout = "t2p2d1-b2-zero0"
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
    four = THREE.replace("24", "8").replace("48", "12").replace("3,5", "2,3") + "- name: more\n  epochs: 2\n"
    (tmp_path / "four.yaml").write_text(four)
    own = {"adapters": tmp_path / "four.yaml", "output_dir": tmp_path / "runs", "ranks_on_cpu": 4}
    own |= {"tensor_parallel": 2, "pipeline_parallel": 2, "ds_config": "zero0.json", "recompute": "none"}
    left = dict.fromkeys(("rank", "micro_batch_size", "max_steps", "warmup_steps"))
    flags = [*base.arguments(**left, **own), "--formats=none"]
    record = planned(tmp_path, *flags, f"--layout={layout}")
    row = next(row for row in record["layouts"] if row["layout"] == layout)
    report = dry_run(tmp_path, "--plan_for=cpu", "--world_size=4")
    memory = stage_table(report, "bytes per rank")[row["bytes"]["stage"]]
    names = {"base": "base weights", "adapter": "adapters", "libraries": "process", "slack": "allocator"}
    parts = {names.get(part, part): size for part, size in row["bytes"].items()}
    compared = parts.keys() & memory.keys()
    assert len(compared) > 5 and {name: memory[name] for name in compared} == {
        name: bytes_in_words(parts[name]) for name in compared
    }
    assert memory["sum"] == bytes_in_words(row["bytes"]["needed"])
    candidate = plan_cluster(parse_plan(flags)).row(layout, flag="why")
    assert max(len(batch.adapters) for batch in candidate.step.batches) > 1
    sent = stage_table(report, "messages and bytes")
    for stage, cells in zip(plan_stages(candidate.step.shape, candidate.layout), sent, strict=True):
        traffic = step_traffic(stage, candidate.step.batches)
        for name, cell in cells.items():
            if name != "DeepSpeed":
                count, size = traffic.of_group(name.replace("all ranks", "world"))
                assert cell == f"{count:,} / {bytes_in_words(size)}", name
    assert record["adapters"]["more"] == {"steps": 12, "global_batch_size": 4}, "two epochs of 24 samples"


def test_the_yaml_of_a_plan_starts_the_group(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks of this machine, as it stands."""
    (tmp_path / "two.yaml").write_text("- name: a\n- name: b\n  method: lora\n  global_batch_size: 6\n")
    flags = {"adapters": tmp_path / "two.yaml", "ranks_on_cpu": 2, "pipeline_parallel": 2, "micro_batch_size": None}
    with monkeypatch.context() as patch:  # ranks of later tests would inherit it from the process that forks them
        patch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
        own = {"max_steps": 2, "output_dir": tmp_path / "run"}
        record = planned(tmp_path, *base.arguments(**flags, **own), "--formats=none")
    assert record["adapters"]["b"] == {"steps": 2, "global_batch_size": 6}
    ended = run_ranks([f"--config={tmp_path / 'plan.yaml'}"], folder=tmp_path / "work", cache=base.cache, ranks=2)
    ended.expect(0)
    rows = (tmp_path / "run" / "table.csv").read_text().splitlines()
    assert len(rows) == 3 and all("finished" in row for row in rows[1:])
    assert (tmp_path / "run" / "b" / "peft").is_dir()


# Hours --------------------------------------------------------------------------------------------------------------


def test_hours_are_those_of_the_tokens_of_all(three: str) -> None:
    """Of the tokens of all steps at the speed of the first one; of as many steps of each, the steps' seconds."""
    flags = ("--formats=none", "--global_batch_size=16", "--max_length=1024", f"--adapters={three}")
    found = searched(*flags, source=SOURCE, ranks=2)
    row, tokens = found.rows[0], 1024 * (2000 * 16 + 500 * 24 + 2000 * 48)
    rate = 2 * row.tokens_per_second
    assert row.hours == pytest.approx(tokens / rate / 3600)
    Path(three).write_text(THREE.replace("  max_steps: 500\n", ""))
    again = searched(*flags, source=SOURCE, ranks=2)
    assert again.candidates[0].step.steps == 2000


def test_in_turn_is_the_plan_of_each_alone(three: str) -> None:
    """The hours that the planner gives each adapter's own run in the layout."""
    shared = ("--formats=none", "--max_length=1024")
    found = searched(*shared, f"--adapters={three}", "--global_batch_size=16", source=SOURCE, ranks=2)
    alone = {
        "plain": ["--global_batch_size=16"],
        "wide": ["--method=lora", "--rank=16", "--targets=all", "--global_batch_size=24", "--max_steps=500"],
        "late": ["--method=vera", "--layers=3,5", "--targets=qkv,down_proj", "--global_batch_size=48"],
    }
    singles = [searched(*shared, *own, source=SOURCE, ranks=2) for own in alone.values()]
    for layout in ("t1p2d1-b2-zero0", "t2p1d1-b1-zero0-selective", "t1p1d2-b4-zero3"):
        hours = sum(single.row(layout, flag="why").hours for single in singles)
        assert found.row(layout, flag="why").hours_in_turn == pytest.approx(hours, rel=1e-9), layout


def test_the_report_says_how_the_group_compares(three: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, whose ratio is that of the two numbers; and the arithmetic of a row."""
    name = "t1p2d4-b1-zero0"
    flags = ["--model=llama2-13b", f"--adapters={three}", "--global_batch_size=16", "--formats=none"]
    assert call("plan", [*flags, f"--layout={name}", f"--why={name}"]) == 0
    text = capsys.readouterr().out
    numbers = re.search(rf"{name}: 3 adapters together take ([\d.]+) hours; .*, ([\d.]+) \(([\d.]+) x as long\)", text)
    assert numbers is not None
    together, apart, ratio = map(float, numbers.groups())
    assert apart / together == pytest.approx(ratio, rel=0.01) and ratio > 1
    assert f"{name}: 22 micro-batches of up to 4,096 tokens of 1 adapter per rank and step" in text
    assert "layout: 8 ranks = tensor 1 x pipeline 2 x data 4, 40 layers" in text
    assert "hours of the tokens of all steps at the speed of step 1, which all take" in text
    assert "--max_steps 2000" in text and f"--adapters {three}" in text
