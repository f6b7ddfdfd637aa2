"""--dry_run with --adapters: a row for each adapter, the tables of one run, and what one more adapter costs."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from support.planned import stage_memory, stage_table
from support.run_files import files_of
from support.run_helpers import Base, begin, run_ranks, write_adapters
from support.task_files import refusal

from megatron_tiedlora.base.messages import bytes_in_words
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.adapter_plans import counted, plan_adapters, prepare_all_data
from megatron_tiedlora.planning.layout import MicroBatchShape
from megatron_tiedlora.planning.memory import group_bytes
from megatron_tiedlora.planning.passes import step_traffic
from megatron_tiedlora.planning.planned import StepPlan
from megatron_tiedlora.planning.report import dry_run_report

OWN: dict[str, dict[str, Any]] = {
    "small": {},
    "wide": {"method": "lora", "rank": 16, "targets": "all", "global_batch_size": 4},
    "late": {"rank": 2, "layers": [3], "max_steps": 7},
    "more": {"method": "vera", "rank": 4, "global_batch_size": 16, "epochs": 2},
}


@pytest.fixture(autouse=True)
def _cache(own_cache: None) -> None:
    """Tokens are kept where runs keep them."""


def settings_of(base: Base, folder: Path, own: dict[str, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """The settings of a run of these adapters, whose file is written to `folder`."""
    file = write_adapters(folder / "adapters.yaml", own)
    return {**base.settings(rank=None), "adapters": str(file), "dry_run": True, **changes}


def table(text: str, title: str) -> list[dict[str, str]]:
    """The cells of a section's table by row and column, split at two spaces or more."""
    section = next(part for part in text.split("\n\n") if part.startswith(title) or f"\n{title}" in part)
    header, *lines = [re.split(" {2,}", line.strip()) for line in section.splitlines()[1:]]
    return [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]


def test_each_adapter_has_a_row(base: Base, tmp_path: Path) -> None:
    text = dry_run_report(make_settings(settings_of(base, tmp_path, OWN))).text
    rows = {row["adapter"]: row for row in table(text, "4 adapters: ")}
    assert list(rows) == list(OWN)
    assert [row["rank"] for row in rows.values()] == ["8", "16", "2", "4"]
    assert rows["wide"]["linears"] == "qkv,o_proj,gate_up,down_proj" and rows["late"]["layers"] == "3"
    assert rows["late"]["steps"] == "7" and rows["wide"]["batch"].startswith("4 = ")
    plans = plan_adapters(make_settings(settings_of(base, tmp_path, OWN)), rank=0, world_size=1)
    for name, plan in plans.items():
        trained = sum(plan.adapter.num_trained().values())
        assert rows[name]["trained"] == f"{trained:,}"
        assert rows[name]["bytes per rank"] == bytes_in_words(group_bytes(plan.stage.parts[0]))
    data = {row["adapter"]: row for row in table(text, "data, and how often a run sees its training part")}
    assert list(data) == list(OWN) and data["more"]["passes"] == "2.00"
    parts = prepare_all_data(plans).values()
    assert [row["samples"] for row in data.values()] == [f"{len(own.train):,}" for own in parts]
    assert {row["part"] for row in data.values()} == {"train"}
    assert re.findall(r"^ +validation +(\d+) ", text, re.MULTILINE) == [f"{len(own.validation)}" for own in parts]
    assert text.count("first sample") == 1 and "small, wide, late, more: first sample" in text


def test_the_tables_are_those_of_all(base: Base, tmp_path: Path) -> None:
    """At a layout: memory and messages of the adapter group, which one adapter's micro-batches alone do not have."""
    layout = {"tensor_parallel": 2, "pipeline_parallel": 2, "world_size": 4}
    settings = settings_of(base, tmp_path, OWN, **layout)
    text = dry_run_report(make_settings(settings)).text
    messages, memory = stage_table(text, "messages and bytes"), stage_table(text, "bytes per rank")
    group = grouped(settings)
    assert max(len(shape.adapters) for shape in group.batches) > 1
    for stage, sent, needed in zip(group.stages, messages, memory, strict=True):
        traffic = step_traffic(stage, group.batches)
        for name, cell in sent.items():
            count, size = traffic.of_group(name.replace("all ranks", "world"))
            assert cell == f"{count:,} / {bytes_in_words(size)}", name
        assert needed["adapters"] == bytes_in_words(4 * sum(stage.held))
        assert needed["optimizer"] == bytes_in_words(8 * sum(stage.trained))
    assert "1 / 32 B" in messages[0]["model"], "one message with the squares of four norms"
    apart = dry_run_report(make_settings({**settings, "share_micro_batches": False})).text
    assert "each micro-batch has one adapter" in apart and "of up to 1 adapter at step 1," in apart


@pytest.mark.parametrize("changes", [{}, {"max_length": 256}, {"share_micro_batches": False}], ids=str)
def test_one_more_adapter_costs_what_is_said(base: Base, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The difference to the same run with that entry twice; with room for its tokens also its factors and these."""
    changes = {"packing": False, **changes}
    adapters = {name: OWN[name] for name in ("small", "wide")} if "max_length" in changes else OWN
    settings = settings_of(base, tmp_path, adapters, **changes)
    text = dry_run_report(make_settings(settings)).text
    before = peak(grouped(settings))
    after = peak(grouped(settings_of(base, tmp_path, {**adapters, "again": OWN["wide"]}, **changes)))
    own = max(group_bytes(part) for part in grouped(settings).stages[0].parts)
    assert (after - before > own) == ("max_length" in changes), "each micro-batch is full otherwise"
    assert f"one more adapter\n  like wide: {bytes_in_words(after - before)} per rank," in text


def grouped(settings: dict[str, Any]) -> StepPlan:
    """The plan of the first step."""
    made = make_settings(settings)
    plans = plan_adapters(made, rank=0, world_size=settings.get("world_size", 1))
    data = prepare_all_data(plans)
    return StepPlan.first(counted(plans, data), data, shares=made.share_micro_batches)


def peak(group: StepPlan) -> float:
    """The bytes of the only stage, by the micro-batch that needs most; all of them count as the largest."""

    def bytes_of(shape: MicroBatchShape) -> float:
        assert group.samples is not None
        longest = group.samples["wide"][0].longest
        sizes = {"tokens": group.largest.tokens, "documents": group.largest.documents}
        machine = group.shared.machine
        found = stage_memory(group.stages[0], adapters=shape.adapters, longest=longest, machine=machine, **sizes)
        return found.allocated

    return max(map(bytes_of, group.batches))


def test_presets_need_no_files(tmp_path: Path) -> None:
    """Through the command, on a cluster's layout; nothing is written."""
    file = tmp_path / "four.yaml"
    file.write_text("- name: a\n- name: b\n  rank: 16\n- name: c\n  method: lora\n  epochs: 3\n")
    arguments = ["--model=llama2-70b", f"--adapters={file}", "--dry_run", "--world_size=16", "--plan_for=gpu"]
    ended = run_ranks([*arguments, "--tensor_parallel=8"], folder=tmp_path / "work").expect(0)
    assert {name for name in files_of(tmp_path / "work") if ".rank" not in name} == set()
    text = ended.outputs[0]
    assert [row["adapter"] for row in table(text, "3 adapters: ")] == ["a", "b", "c"]
    (memory,) = stage_table(text, "bytes per rank")
    assert memory["base weights"] == "17.25 GB" and "one more adapter\n  like c: " in text
    assert "counted from data" in text and "give a model folder to count them" in text


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"a": {"layers": [9]}}, {}, "adapters.yaml: a: --layers 9: "),
    ({"a": {}}, {"ds_config": "zero2.json"}, "ZeRO-2 clips the gradients of all adapters together"),
    ({"a": {}}, {"world_size": 3, "tensor_parallel": 2}, "--tensor_parallel 2"),
    ({"a": {}, "b": {"train_file": "missing.jsonl"}}, {}, "b: "),
    ({"logs": {}}, {}, "the run itself has a file 'logs'"),
    ({"adapter": {}}, {}, "the run itself has a file 'adapter'"),
    ({"profile": {}}, {}, "the run itself has a file 'profile'"),
    ({"a": {"profile": "1:2"}}, {}, "entry 1 (a): profile cannot differ between the adapters of a run"),
    ({"a": {}}, {"resume": "somewhere"}, "each adapter has its own checkpoints; give --resume auto"),
    ({"a": {}}, {"adapters": "nowhere.yaml"}, "--adapters nowhere.yaml: no such file"),
    ({"a": {}}, {"adapters": None, "share_micro_batches": False}, "--share_micro_batches needs --adapters"),
    ({}, {"adapters": None, "output_dir": __file__}, "is a file; give a folder"),
    ({"a": {}}, {"output_dir": "/etc/passwd"}, "--output_dir /etc/passwd: /etc/passwd is a file"),
    ({"a": {}}, {"output_dir": "/proc/self"}, "--output_dir /proc/self"),
    ({"a": {}, "b": {"output_dir": "/dev/null"}}, {}, "b: --output_dir /dev/null: /dev/null is a file"),
    ({"a": {"output_dir": "one"}, "b": {"output_dir": "./one"}}, {}, "b: output_dir is also the folder of a; change"),
    ({"a": {}, "b": {"output_dir": "{run}"}}, {}, "b: output_dir is also the folder of the run of all; change it"),
    ({"a": {}, "b": {"output_dir": "{run}/a"}}, {}, "b: output_dir is also the folder of a; change it"),
    ({"a": {"output_dir": "{run}/b"}, "b": {}}, {}, "b: output_dir is also the folder of a; change it"),
    ({"a": {"output_dir": "{run}/b/adapter"}, "b": {}}, {}, "a: output_dir is inside the folder of b; give a"),
    ({"a": {"output_dir": "{run}/logs/a"}, "b": {}}, {}, "a: output_dir is inside 'logs', where the run itself has"),
    ({"a": {"output_dir": "{run}/profile"}}, {}, "a: output_dir is inside 'profile', where the run itself has files"),
    ({"a": {}}, {"adapters": None, "halving": True}, "--halving needs --adapters"),
    ({"a": {"rank": 2}, "b": {"rank": 3}}, {"halving": True}, "no two adapters differ only in the learning rate"),
    (
        {"a": {"eval_metric": "exact_match"}, "b": {"eval_metric": "exact_match", "learning_rate": 1.0}},
        {"halving": True},
        "a: --halving compares validation losses; remove --eval_metric exact_match",
    ),
]


@pytest.mark.parametrize(("own", "changes", "message"), REFUSED)
def test_what_a_run_refuses_is_refused(
    base: Base, tmp_path: Path, own: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """A dry run and the start of a run say the same line, and nothing is made."""
    run = tmp_path / "run"
    settings = settings_of(base, tmp_path, own, **{"output_dir": str(run), **changes})
    file = tmp_path / "adapters.yaml"
    file.write_text(file.read_text().replace("{run}", str(run)))
    line = refusal(lambda: dry_run_report(make_settings(settings)))
    assert message in line
    if "world_size" not in changes:
        settings.pop("dry_run")
        assert refusal(lambda: begin(make_settings(settings))) == line
    assert not run.exists()


@pytest.mark.parametrize("many", [1200, pytest.param(4000, marks=pytest.mark.slow)])
def test_the_plan_of_thousands_of_adapters(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """No step of it compares each adapter with each other one: four times as many take about four times as long, where
    sixteen times would be the alternative. A line tells how far it is, if that takes half a second."""
    at_once = lambda *arguments, delay, **others: progress_bar(*arguments, delay=0.0, **others)  # noqa: E731
    monkeypatch.setattr("megatron_tiedlora.planning.adapter_plans.progress_bar", at_once)
    methods = ("lora", "tl6", "tl5", "vera")

    def seconds(number: int) -> float:
        lines = [f"- {{name: n{i}, rank: {i % 8 + 1}, method: {methods[i % 4]}}}\n" for i in range(number)]
        (tmp_path / "many.yaml").write_text("".join(lines))
        settings = settings_of(base, tmp_path, {}, adapters=str(tmp_path / "many.yaml"), halving=True)
        started = time.process_time()
        text = dry_run_report(make_settings(settings)).text
        assert text.startswith(f"{number:,} adapters: ")
        return time.process_time() - started

    seconds(100)  # what is traced and imported once
    few, of_many = seconds(100), seconds(many)
    assert of_many - few < 8 * (seconds(many // 4) - few)
    assert of_many < 60  # 9 on an idle machine; a busy one has taken five times as many
    assert f"planning: 100%| {many}/{many}" in capsys.readouterr().err
