"""The DeepSpeed JSON: what is accepted, what it becomes in a run, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import run_helpers  # noqa: F401, it names the accelerator before DeepSpeed is imported
from support.task_files import refusal

from megatron_tiedlora.config.batch import BatchPlan
from megatron_tiedlora.engine.engine_json import REJECTED_SECTIONS, SHIPPED_CONFIGS, load_engine_config

SECTIONS = ("bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler")  # that a flag decides
BATCHES = BatchPlan(global_batch_size=8, micro_batch_size=2, data_parallel=2)


def load_json(tmp_path: Path, content: Any) -> Any:
    file = tmp_path / "engine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_engine_config(str(file), batches=BATCHES, gradient_clipping=0.5)


def test_shipped_configs() -> None:
    stages = {}
    for file in sorted(SHIPPED_CONFIGS.glob("*.json")):
        config = load_engine_config(file.name, batches=BATCHES, gradient_clipping=0.5)
        stages[file.name] = config.zero_stage
        found = [config.values[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu")]
        assert [*found, config.values["gradient_accumulation_steps"]] == [8, 2, 2]
        assert config.values["gradient_clipping"] == 0.5
        assert "auto" not in json.dumps(config.values)
        assert config.values["timers"] == {"throughput": {"enabled": False}}
    assert stages == {f"zero{stage}.json": stage for stage in range(4)} | {"zero2_offload.json": 2}


def test_auto_and_equal_batch_sizes_are_accepted(tmp_path: Path) -> None:
    zero = {"stage": "auto", "reduce_bucket_size": "auto"}
    config = load_json(tmp_path, {"steps_per_print": "auto", "gradient_clipping": "auto", "zero_optimization": zero})
    assert config.zero_stage == 0
    assert config.values["zero_optimization"] == {} and "steps_per_print" not in config.values
    content = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert load_json(tmp_path, {**content, "gradient_clipping": 0.5}).zero_stage == 0
    off, asked = {"throughput": {"enabled": False}}, {"throughput": {"enabled": True, "synchronized": False}}
    for timers, found in (({}, off), ({"other": 1}, {"other": 1, **off}), (asked, asked)):
        assert load_json(tmp_path, {"timers": timers} if timers else {}).values["timers"] == found


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "did you mean zero_optimization?"]),
        ({"zero_optimization": {"stag": 2}}, ["zero_optimization.stag", "did you mean stage?"]),
        ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, ["offload_optimizer.devise"]),
        ({"steps_per_print": "ten"}, ["steps_per_print = 'ten'", "a valid integer"]),
        ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown = 1", "a valid boolean"]),
        ({"flops_profiler": [True]}, ["flops_profiler = [True]", "a valid dictionary"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = True", "valid integer"]),
        ({"zero_optimization": 2}, ["zero_optimization must be an object"]),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 0}}, ["allgather_bucket_size = 0", "than 0"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, ["reduce_bucket_size", " 0"]),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, ["compute_grad_norm is false", "remove it"]),
        ({"train_batch_size": 16}, ["train_batch_size is 16", "make it 8", "--global_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["is 4", "make it 2", "--micro_batch_size"]),
        ({"gradient_accumulation_steps": 1}, ["is 1", "make it 2", "--micro_batch_size"]),
        ({"gradient_clipping": 1.0}, ["is 1.0", "make it 0.5", "--gradient_clipping"]),
        ("{", ["not valid JSON"]),
        ("[]", ["expected a JSON object"]),
        *(({name: {"enabled": True}}, [f"section {name!r}", REJECTED_SECTIONS[name], "--"]) for name in SECTIONS),
    ],
)
def test_refused_json(tmp_path: Path, content: Any, parts: list[str]) -> None:
    message = refusal(lambda: load_json(tmp_path, content))
    assert all(part in message for part in ["engine.json", *parts]), message


def test_json_in_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    missing = refusal(lambda: load_engine_config("zero_2.json", batches=BATCHES, gradient_clipping=1.0))
    assert "zero_2.json: no such file" in missing and missing.endswith("(did you mean zero2.json?)")
    assert load_engine_config("zero2.json", batches=BATCHES, gradient_clipping=1.0).zero_stage == 1
