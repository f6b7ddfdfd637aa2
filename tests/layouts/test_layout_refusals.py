"""Layouts that do not fit are refused with one line, on every rank and in a dry run, before a weight is read.

The model's folder has a config and a tokenizer but no weights, so whoever looks for a weight first says something else.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.run_files import edit_json, losses
from support.run_helpers import Base, run
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import plan_run

pytestmark = pytest.mark.distributed


Refusal = tuple[int, Sequence[str], dict[str, Any], dict[str, Any]]
"""Ranks; what the line must hold, the values and the fix; settings; and fields of the model's config that differ."""


def over_stages(stage: int, **settings: Any) -> Refusal:
    """A ZeRO stage that does not go with a pipeline, of the default file, zero2.json, or another."""
    parts = [f"--ds_config {settings.get('ds_config', 'zero2.json')}", f"ZeRO-{stage}", "--pipeline_parallel 2"]
    return 2, [*parts, "Use zero1.json"], {"pipeline_parallel": 2, **settings}, {}


def tensor(size: int, what: str, possible: str, **config: Any) -> Refusal:
    """A number of tensor-parallel ranks that does not divide one of the model's sizes."""
    parts = [f"--tensor_parallel {size} ", f" {what}", f"Possible values: {possible}"]
    return size, parts, {"tensor_parallel": size}, config


TP2, ZERO1 = {"tensor_parallel": 2}, {"ds_config": "zero1.json"}
TP2_PP2 = {**TP2, **ZERO1, "pipeline_parallel": 2}
# The model: 4 heads of 8 on 2 key-value heads, hidden size 32, feed-forward width 48, 3 layers.
REFUSALS: dict[str, Refusal] = {
    "default over stages": over_stages(2),
    "zero2 over stages": over_stages(2, ds_config="zero2.json"),
    "offload over stages": over_stages(2, ds_config="zero2_offload.json"),
    "zero3 over stages": over_stages(3, ds_config="zero3.json"),
    "attention heads": tensor(3, "4 (attention heads)", "1, 2"),
    "key-value heads": tensor(4, "2 (key-value heads)", "1, 2"),
    "hidden size": tensor(3, "32 (hidden size)", "1, 2", num_attention_heads=6, num_key_value_heads=6),
    "width": tensor(4, "50 (feed-forward width)", "1, 2", num_key_value_heads=4, intermediate_size=50),
    "stages": (4, ["--pipeline_parallel 4", "3 layers", "at most 3"], {**ZERO1, "pipeline_parallel": 4}, {}),
    "a world that does not divide": (3, ["3 ranks", "--tensor_parallel 2", "2 or 4 ranks"], TP2, {}),
    "a grid": (3, ["3 ranks", "--tensor_parallel 2 x --pipeline_parallel 2", "Start 4 ranks"], TP2_PP2, {}),
    "rates over stages": (
        2,
        ["--rate_factors with ZeRO-1", "--layers on every stage", "give --ds_config zero0.json"],
        {**ZERO1, "pipeline_parallel": 2, "layers": "1", "rate_factors": "B=2", "method": "lora"},
        {},
    ),
    "rates over stages, none on one of them": (
        2,
        ["--rate_factors with ZeRO-1"],
        {**ZERO1, "pipeline_parallel": 2, "layers": "1", "rate_factors": "A=3,B=3", "method": "tl5"},
        {},
    ),
    "a batch": (3, ["--global_batch_size 4", "data parallel 3", "3 or 6"], {"micro_batch_size": 1}, {}),
}


def without_weights(base: Base, folder: Path, **config: Any) -> Path:
    """A copy of the model's folder without its weights, and with some fields of its config changed."""
    model = Path(shutil.copytree(base.model, folder, ignore=shutil.ignore_patterns("*.safetensors")))
    edit_json(model / "config.json", **config)
    return model


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(base: Base, tmp_path: Path, name: str) -> None:
    ranks, parts, changes, config = REFUSALS[name]
    settings = base.settings(model=without_weights(base, tmp_path / "model", **config), **changes)
    plans = [partial(plan_run, make_settings(settings), rank=rank, world_size=ranks) for rank in range(ranks)]
    for plan in (*plans, partial(dry_run_report, make_settings({**settings, "dry_run": True, "world_size": ranks}))):
        message = refusal(plan)
        assert all(part in message for part in parts), message


def test_a_preset_is_refused_too() -> None:
    said = r"--tensor_parallel 16 .* 8 \(key-value heads\)\. Possible values: 1, 2, 4, 8"
    with pytest.raises(UserError, match=said):
        dry_run_report(make_settings({"model": "llama2-70b", "dry_run": True, "world_size": 16, "tensor_parallel": 16}))


@pytest.mark.parametrize(
    ("ranks", "settings", "said"),
    [
        (2, {"pipeline_parallel": 2, "ds_config": "zero3.json"}, "Use zero1.json"),
        (None, {"pipeline_parallel": 2, "ds_config": "zero3.json", "dry_run": True, "world_size": 2}, "Use zero1.json"),
        (2, {"tensor_parallel": 2}, "model.safetensors"),  # it fits, and so gets as far as the weights
    ],
    ids=["run", "dry_run", "weights_would_be_missed"],
)
def test_a_start_ends_with_one_line(
    base: Base, tmp_path: Path, ranks: int | None, settings: dict[str, Any], said: str
) -> None:
    model = without_weights(base, tmp_path / "model")
    assert said in run(base, tmp_path / "run", ranks=ranks, expect=2, model=model, **settings).error_line()
    if said != "model.safetensors":
        assert not (tmp_path / "run").exists() and not (tmp_path / "run-work" / "runs").exists()


@pytest.mark.parametrize("sequence_parallel", [pytest.param(True, marks=pytest.mark.slow), False])
def test_whole_sequences_are_accepted(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sequence_parallel: bool
) -> None:
    """Cutting activations along the sequence is a choice; a run and a dry run of it say which was made."""
    short = {"max_steps": 1, "warmup_steps": 1, "eval_interval": 1}
    settings = {"tensor_parallel": 2, "sequence_parallel": sequence_parallel, **short}
    ended = run(base, tmp_path / "run", ranks=2, **settings)
    assert [step for step, _ in losses(tmp_path / "run")] == [1]
    assert ("with sequence parallelism" in ended.outputs[0]) == sequence_parallel
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
    assert dry_run_report(make_settings(base.settings(**settings, dry_run=True, world_size=2))).text
