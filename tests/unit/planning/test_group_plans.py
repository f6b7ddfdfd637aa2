"""tools/plan.py --adapters: every layout that a run of several adapters accepts, with the numbers of its dry run."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from planned import H100, largest_memory, searched, short, step_parts, words_of_a_plan, words_of_a_run
from report_tables import stage_table
from run_helpers import Base, run_ranks, write_base

from megatron_tiedlora.base.errors import UserError, bytes_in_words
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.plan_settings import parse_plan
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.planning.adapter_plans import plan_adapters
from megatron_tiedlora.planning.cluster_report import plan_cluster
from megatron_tiedlora.planning.layout import Layout, plan_stages
from megatron_tiedlora.planning.passes import step_traffic
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.search import ENGINE_FILES, RECOMPUTES, STORAGES, divisors
from megatron_tiedlora.planning.step_plan import StepPlan
from megatron_tiedlora.planning.step_time import Links, step_seconds

SOURCE = short("llama2-7b", 6)
THREE = """\
- name: plain
- name: wide
  method: lora
  rank: 16
  targets: all
  global_batch_size: 24
  max_steps: 500
- name: late
  method: vera
  layers: 3,5
  targets: qkv,down_proj
  global_batch_size: 48
"""


@pytest.fixture
def three(tmp_path: Path) -> str:
    """The file of three adapters that differ in what a step needs."""
    file = tmp_path / "three.yaml"
    file.write_text(THREE)
    return str(file)


def group_of(file: str, ranks: int, **choices: Any) -> StepPlan:
    """The plan of a run of these adapters, without data."""
    values = {"model": SOURCE.name, "adapters": file, "dry_run": True, "plan_for": "gpu", "world_size": ranks}
    settings = make_settings({**values, **choices})
    plans = plan_adapters(settings, rank=0, world_size=ranks, weights=False, source=SOURCE)
    return StepPlan(plans, settings.share_micro_batches)


@pytest.mark.cpu_seconds(20, reason="hundreds of layouts, each asked of a run")
def test_what_is_enumerated_is_what_a_run_accepts(three: str) -> None:
    """The full product of all choices; a run of the group is asked about each. Rows divide each adapter's share."""
    ranks, per_node, storages = 6, 2, (STORAGES[0], STORAGES[3])
    flags = ("--global_batch_size=36", "--max_length=512", f"--adapters={three}", "--formats=none,nf4")
    found = searched(*flags, source=SOURCE, ranks=ranks, per_node=per_node)
    accepted, refused = dict[Any, Layout](), Counter[str]()
    for tp, pp in ((t, p) for t in divisors(ranks) for p in divisors(ranks) if ranks % (t * p) == 0):
        sizes = divisors(12 // (ranks // (tp * pp)))  # 12 is the most that divides 24, 36 and 48
        for file, storage, rows, recompute in product(ENGINE_FILES, storages, sizes, RECOMPUTES):
            for shards in [True, False] if tp > 1 else [True]:
                choices = {"global_batch_size": 36, "max_length": 512, "tensor_parallel": tp, "pipeline_parallel": pp}
                choices |= {"ds_config": file, "micro_batch_size": rows, "recompute": recompute}
                try:
                    layout = group_of(three, ranks, **choices, sequence_parallel=shards, **storage._asdict()).layout
                except UserError as error:
                    refused["over nodes" if per_node % tp else str(error)] += 1
                    continue
                if per_node % tp:
                    refused["over nodes"] += 1
                else:
                    accepted[file, storage, tp, pp, rows, recompute, shards] = layout
    mine = {
        (c.engine_file, c.storage, *sizes_of(c.layout), c.layout.recompute, c.layout.shards_sequences): c.layout
        for c in found.candidates
    }
    assert mine == accepted and len(mine) == len(found.candidates) > 200
    assert {c.storage.name for c in found.candidates} == {"none", "nf4"}
    assert {c.engine_file for c in found.candidates} == {"zero0.json", "zero3.json"}
    assert all(len(c.layout.adapters) == 3 and c.layout.named for c in found.candidates)
    theirs = Counter[str]()
    for words, number in found.refused.items():
        theirs["over nodes" if "span nodes" in words else words] += number
    assert theirs == refused
    assert any("ZeRO-1 clips the gradients of all adapters together" in words for words in refused)


def sizes_of(layout: Layout) -> tuple[int, int, int]:
    return layout.tp_size, layout.pp_size, layout.rows


@pytest.mark.cpu_seconds(30, reason="each size of a shared micro-batch is traced")
@pytest.mark.parametrize("shares", [True, False])
def test_each_layout_has_the_price_of_its_dry_run(three: str, shares: bool) -> None:
    """Memory of all stages and time, from the plans of a run with the flags of the layout."""
    given = {"global_batch_size": 16, "max_length": 1024, "share_micro_batches": shares}
    flags = (f"--{name}={value}" for name, value in given.items())
    found = searched(*flags, f"--adapters={three}", source=SOURCE, ranks=8, per_node=4)
    rows = found.all_rows
    assert {(row.layout.pp_size, row.layout.tp_size) for row in rows} >= {(1, 1), (2, 4), (4, 2)}
    for one in rows[:: max(1, len(rows) // 100)]:
        group = group_of(three, 8, **given, **one.flags)
        assert one.layout == group.layout
        memories = [largest_memory(group, stage, one.machine) for stage in group.stages]
        assert one.needed == max(memory.total for memory in memories), one.name
        parts = step_parts(group.stages, group.batches, Links(group.layout, 4), one.machine)
        assert one.seconds.total == pytest.approx(step_seconds([parts])[0].total, rel=1e-12), one.name
        assert one.work == group.work and group.work.tokens == (16 + 24 + 48) * 1024


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


LATE = "- name: all\n- name: late\n  layers: 3,4,5\n"


@pytest.mark.parametrize(
    ("flag", "of_stage"),
    [("--layers=2,3", 1), ("--layers=3,5", 1), (THREE, 1), (LATE, 2)],
    ids=["two", "apart", "three adapters", "late"],
)
def test_stages_share_what_they_do_alike(tmp_path: Path, flag: str, of_stage: int) -> None:
    """Stages differ if their blocks are adapted, or an input needs a gradient, or by their blocks' adapters."""
    source, ranks = short("llama2-7b", 6 if of_stage == 1 else 8), 6 if of_stage == 1 else 4
    if flag.startswith("-"):
        (tmp_path / "a.yaml").write_text(flag)
        flag = flag if flag.startswith("--") else f"--adapters={tmp_path / 'a.yaml'}"
    pinned = (f"--pipeline_parallel={ranks}", "--recompute=none", "--ds_config=zero0.json", "--formats=none")
    found = searched(flag, *pinned, "--global_batch_size=24", source=source, ranks=ranks)
    one = found.candidates[0]
    step, layout = one.step, one.layout
    stages = plan_stages(source.shape, layout)
    assert [len(stage.blocks) for stage in stages] == [of_stage] * ranks
    assert one.needed == max(largest_memory(step, stage, one.machine).total for stage in stages)
    assert one.parts.stages == step_parts(stages, step.batches, Links(layout, 8), one.machine).stages


# Numbers of the dry run ---------------------------------------------------------------------------------------------


def planned(folder: Path, *flags: str) -> dict[str, Any]:
    """The record of a plan, whose YAML is written beside it."""
    assert call("plan", [*flags, f"--json={folder / 'plan.json'}", f"--yaml={folder / 'plan.yaml'}"]) == 0
    record: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return record


def dry_run(folder: Path, *flags: str) -> str:
    """What launch/train.py --dry_run says of the YAML of a plan."""
    return dry_run_report(parse_settings([f"--config={folder / 'plan.yaml'}", "--dry_run", *flags], Settings)).text


@pytest.mark.cpu_seconds(30, reason="each size of a shared micro-batch is traced")
@pytest.mark.parametrize(
    "layout",
    ["", "t2p2d2-b2-zero0-full", "t2p1d4-b1-zero3-selective-nf4", "t1p8d1-b2-zero0", "t4p2d1-b1-zero0-wholeseq"],
)
def test_the_dry_run_of_a_plan_s_yaml_has_its_numbers(
    tmp_path: Path, three: str, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """On a GPU: memory of the fullest rank, the verdict, and the time of a step. The command names the file too."""
    chosen = [f"--layout={layout}"] if layout else []
    record = planned(tmp_path, "--model=llama2-13b", f"--adapters={three}", "--global_batch_size=16", *chosen)
    row = next(row for row in record["layouts"] if row["layout"] == layout or not layout)
    report = dry_run(tmp_path, "--gpu=h100", "--world_size=8")
    needed, room = bytes_in_words(row["bytes"]["needed"]), bytes_in_words(H100["memory"])
    assert f"h100: the fullest rank needs {needed} of {room}: it fits" in report
    assert f"{row['tokens_per_second_per_rank']:,.0f} tokens/s of each rank" in report
    text = capsys.readouterr().out
    assert f"start {row['layout']}" in text and f"adapters: {three}" in (tmp_path / "plan.yaml").read_text()
    assert "3 adapters of " in text and "500 to 2,000 steps of 16 to 48 samples = 140,000 samples" in text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny model with data."""
    return write_base(tmp_path_factory.mktemp("base"), vocab_size=320)


def flags_with_data(model: Base, folder: Path, ranks: int, **changes: Any) -> list[str]:
    """The flags of a plan of four adapters with data, which share micro-batches."""
    three = THREE.replace("24", "8").replace("48", "12").replace("3,5", "2,3")
    (folder / "four.yaml").write_text(three + "- name: more\n  epochs: 2\n")
    changes = {"rank": None, "micro_batch_size": None, "max_steps": None, "warmup_steps": None, **changes}
    own = {"adapters": folder / "four.yaml", "output_dir": folder / "runs", "ranks_on_cpu": ranks}
    return model.arguments(**{**own, "layers": None, **changes})


SHARED = "t2p2d1-b2-zero0"  # in which micro-batches of several adapters go together


@pytest.mark.parametrize("layout", [SHARED, "t1p1d4-b1-zero3-full", "t2p1d2-b2-zero0-wholeseq-selective"])
def test_plans_with_data_have_the_numbers_of_the_dry_run(
    tmp_path: Path, model: Base, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """On CPU ranks: each part of the fullest rank's memory, and the messages of the first step, which is shared."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(model.cache))
    recompute = next((word for word in ("full", "selective") if word in layout), "none")
    flags = flags_with_data(model, tmp_path, 4, recompute=recompute)
    record = planned(tmp_path, *flags, "--formats=none", f"--layout={layout}")
    row = next(row for row in record["layouts"] if row["layout"] == layout)
    report = dry_run(tmp_path, "--plan_for=cpu", "--world_size=4")
    memory = stage_table(report, "bytes per rank")[row["bytes"]["stage"]]
    names = {"base": "base weights", "adapter": "adapters", "libraries": "process", "slack": "allocator"}
    for part, size in row["bytes"].items():
        column = names.get(part, part)
        if column in memory:
            assert memory[column] == bytes_in_words(size), part
    assert memory["sum"] == bytes_in_words(row["bytes"]["needed"])
    candidate = plan_cluster(parse_plan([*flags, "--formats=none"])).row(layout, flag="why")
    most = max(len(batch.adapters) for batch in candidate.step.batches)
    assert (most > 1) == (layout == SHARED)
    stages = plan_stages(candidate.step.shape, candidate.layout)
    for stage, sent in zip(stages, stage_table(report, "messages and bytes"), strict=True):
        traffic = step_traffic(stage, candidate.step.batches)
        for name, cell in sent.items():
            if name != "DeepSpeed":
                count, size = traffic.of_group(name.replace("all ranks", "world"))
                assert cell == f"{count:,} / {bytes_in_words(size)}", name
    assert record["adapters"]["more"] == {"steps": 12, "global_batch_size": 4}, "two epochs of 24 samples"


def test_the_yaml_of_a_plan_starts_the_group(tmp_path: Path, model: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two ranks of this machine, as it stands."""
    (tmp_path / "two.yaml").write_text("- name: a\n- name: b\n  method: lora\n  global_batch_size: 6\n")
    flags = {"adapters": tmp_path / "two.yaml", "ranks_on_cpu": 2, "pipeline_parallel": 2, "micro_batch_size": None}
    with monkeypatch.context() as patch:  # ranks of later tests would inherit it from the process that forks them
        patch.setenv("MEGATRON_TIEDLORA_CACHE", str(model.cache))
        planned(tmp_path, *model.arguments(**flags, max_steps=2, output_dir=tmp_path / "run"), "--formats=none")
    ended = run_ranks([f"--config={tmp_path / 'plan.yaml'}"], folder=tmp_path / "work", cache=model.cache, ranks=2)
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


@pytest.mark.parametrize("layout", ["t1p2d1-b2-zero0", "t2p1d1-b1-zero0-selective", "t1p1d2-b4-zero3"])
def test_in_turn_is_the_plan_of_each_alone(three: str, layout: str) -> None:
    """The hours that the planner gives each adapter's own run in the layout."""
    shared = ("--formats=none", "--max_length=1024")
    found = searched(*shared, f"--adapters={three}", "--global_batch_size=16", source=SOURCE, ranks=2)
    row = found.row(layout, flag="why")
    alone = {
        "plain": ["--global_batch_size=16"],
        "wide": ["--method=lora", "--rank=16", "--targets=all", "--global_batch_size=24", "--max_steps=500"],
        "late": ["--method=vera", "--layers=3,5", "--targets=qkv,down_proj", "--global_batch_size=48"],
    }
    hours = 0.0
    for own in alone.values():
        single = searched(*shared, *own, source=SOURCE, ranks=2)
        hours += single.row(layout, flag="why").hours
    assert row.hours_in_turn == pytest.approx(hours, rel=1e-9)


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


# What a run refuses -------------------------------------------------------------------------------------------------

PINNED = {"tensor_parallel": "2", "pipeline_parallel": "2", "micro_batch_size": "1", "max_length": "512"}
VALUES: dict[str, tuple[str, ...]] = {
    "tensor_parallel": ("3", "4"),
    "pipeline_parallel": ("1", "64"),
    "ds_config": ("zero0.json", "zero1.json", "zero2.json", "zero3.json", "nosuch.json"),
    "micro_batch_size": ("3", "8"),
    "global_batch_size": ("7", "16"),
    "base": ("nf4", "int4"),
    "products": ("fp8",),
    "layers": ("1,2", "40"),
    "rank": ("0",),
    "resume": ("auto", "runs/one"),
    "report_to": ("wandb",),
    "halving": ("true",),
    "share_micro_batches": ("false",),
    "eval_metric": ("rouge",),
    "profile": ("5:3",),
}
ENTRIES = {
    "": "- name: a\n- name: b\n  rank: 16\n",
    "layers": "- name: a\n- name: b\n  layers: 50\n",
    "batch": "- name: a\n- name: b\n  global_batch_size: 9\n",
    "of all": "- name: a\n- name: b\n  dtype: fp32\n",
    "task": "- name: a\n- name: b\n  task: samsum\n",
    "twice": "- name: a\n- name: A\n",
    "none": "[]\n",
}


def test_a_plan_refuses_what_a_run_of_the_group_refuses(tmp_path: Path) -> None:
    """Over all pairs of flags, and of flags and files, in the same words."""
    values = [(name, value) for name, options in VALUES.items() for value in options]
    values += [("adapters", name) for name in ENTRIES if name]
    refused = 0
    for pair in combinations(values, 2):
        given = {**PINNED, "ds_config": "zero0.json", "global_batch_size": "8", "adapters": "", **dict(pair)}
        file = tmp_path / "a.yaml"
        file.write_text(ENTRIES[given["adapters"]])
        flags = ["--model=llama2-7b", *(f"--{name}={value}" for name, value in {**given, "adapters": file}.items())]
        expected, found = words_of_a_run(flags), words_of_a_plan(flags)
        assert found == expected, pair
        refused += bool(expected)
    assert refused > 200


@pytest.mark.parametrize("flags", [["--share_micro_batches=false"], ["--halving=true"]])
def test_what_needs_adapters_says_so(flags: list[str]) -> None:
    with pytest.raises(UserError, match="needs --adapters"):
        plan_cluster(parse_plan(["--model=llama2-7b", "--gpus_per_node=1", *flags]))
