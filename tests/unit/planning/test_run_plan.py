"""The plan of a run and of its step: what adapters share, lengths, steps and ranks, and what is rejected."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.native_files import with_adapter
from support.run_helpers import write_rows
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError, count_text
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.checkpoint.native_adapter import save_adapter
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data.loader import GlobalBatch
from megatron_tiedlora.data.token_dataset import TokenDataset, sample_indices
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.planning.adapter_plans import length_warnings, shared_plan
from megatron_tiedlora.planning.counted_steps import steps_in_words, with_counted_steps
from megatron_tiedlora.planning.planned import StepPlan
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.selfcheck.step_bench import made_up


def plan_of(world_size: int = 1, **changes: Any) -> RunPlan:
    settings = make_settings({"model": "llama2-7b", "ds_config": "zero0.json", "global_batch_size": 8, **changes})
    return plan_run(settings, rank=0, world_size=world_size, weights=False)


def test_one_adapter_is_a_list_of_one() -> None:
    """Its layout is that of its plan, it shares with none, and a name alone changes no micro-batch and no work."""
    plan = plan_of(micro_batch_size=2)
    one, named = StepPlan({"": plan}), StepPlan({"a": plan})
    assert one.layout == plan.layout and not one.layout.named and named.layout.named
    assert one.rounds == [[("", number)] for number in range(4)]
    assert one.steps == plan.settings.max_steps and isinstance(one.steps, int)
    assert one.batches == named.batches
    assert (one.work, one.largest.tokens) == (named.work, named.largest.tokens)


def samples_of(*lengths: int) -> TokenDataset:
    """Samples of these lengths, of whose tokens the last three are supervised."""
    return made_up(320, np.array(lengths), num_labels=3)


def test_the_largest_packed_micro_batch_is_that_of_any_rank() -> None:
    """Rank 1 has most documents: three samples and the padding of their row."""
    plan = plan_of(2, packing=True, micro_batch_size=1, max_length=64)
    rows = [[[0]], [[1, 2, 3]]]
    batch = GlobalBatch(rows, rows, num_supervised=40, num_tokens=100, lengths=(100,), consumed_samples=4)
    largest = StepPlan({"": plan}, samples={"": (samples_of(40, 20, 20, 20), batch)}).largest
    assert largest.tokens == 64 and largest.documents == 4 and largest.longest == 40


def test_the_longest_document_is_that_of_any_adapter() -> None:
    plan = plan_of(packing=True, micro_batch_size=1, max_length=64)
    batch = GlobalBatch([[[0]]], [[[0]]], num_supervised=8, num_tokens=9, lengths=(9,), consumed_samples=1)
    samples = {name: (samples_of(size), batch) for name, size in (("a", 24), ("b", 40), ("c", 8))}
    assert StepPlan(dict.fromkeys(samples, plan), samples=samples).largest.longest == 40


def test_the_micro_batches_of_all_ranks_have_the_samples_of_the_step() -> None:
    """Packed rows of several samples: attention is within each of them."""
    plan, dataset = plan_of(2, packing=True, micro_batch_size=2, max_length=64), samples_of(40, 9, 20, 17, 31, 5, 12, 8)
    batch, shapes = plan.global_batch(dataset), []
    for rank in range(2):
        own = replace(plan, grid=Grid(rank, 2))
        shapes += StepPlan({"": own}, samples={"": (dataset, batch)}).batches
    lengths = sorted(length for shape in shapes for length in shape.lengths)
    assert lengths == sorted(batch.lengths) == sorted(dataset.lengths.tolist())
    assert sum(shape.num_supervised for shape in shapes) == batch.num_supervised


def test_the_stages_are_those_of_the_lowest_adapted_layer() -> None:
    plans = {"late": plan_of(layers=(30, 31)), "early": plan_of(layers=(2,)), "middle": plan_of(layers=(9, 20))}
    assert shared_plan(plans) is plans["early"]


# How many ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "layout", "words"),
    [
        (1, {"tensor_parallel": 2}, "1 rank is not a multiple of --tensor_parallel 2 x --pipeline_parallel 1. Start 2"),
        (3, {"pipeline_parallel": 2}, "3 ranks are not a multiple of --tensor_parallel 1 x --pipeline_parallel 2."),
    ],
)
def test_too_few_ranks_are_told_both_ways_to_have_more(world_size: int, layout: dict[str, int], words: str) -> None:
    settings = make_settings({"model": "llama2-7b", "ds_config": "zero1.json", **layout})
    with pytest.raises(UserError) as caught:
        plan_run(settings, rank=0, world_size=world_size)
    ranks, said = world_size + 1, str(caught.value)
    assert said.startswith(words)
    starts = f"or start the ranks by `tiedlora run --num_gpus {ranks} ...`"
    assert f"Plan without ranks by `--dry_run --world_size {ranks}`, {starts}" in said


def test_one_rank_and_one_step_are_no_plural() -> None:
    settings = make_settings({"model": "tiny", "dry_run": True, "max_steps": 1, "global_batch_size": 1})
    report = dry_run_report(settings).text
    assert "1 rank = tensor 1" in report and "1 data-parallel rank," in report and "  1 step, " in report
    assert not re.findall(r"\b1 (?:ranks|steps|rows|samples|data-parallel ranks|micro-batches)\b", report)
    assert [count_text(1, "micro-batch"), count_text(1200, "micro-batch")] == ["1 micro-batch", "1,200 micro-batches"]


# Lengths, steps of epochs and ranks of a run --------------------------------------------------------------------------


def settings_of(**values: Any) -> Settings:
    return make_settings({"model": "llama2-7b", "dry_run": True, **values})


def plan_of_folder(model: Path, **values: Any) -> RunPlan:
    given = {"model": str(model), "task": "custom", "train_file": "rows.jsonl", **values}
    return plan_run(make_settings(given), rank=0, world_size=1)


def test_a_default_max_length_is_the_model_s_and_a_given_one_holds(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    positions = plan_of_folder(model).source.shape.max_positions
    assert 8 < positions < 512
    assert plan_of_folder(model).settings.max_length == positions
    assert plan_of_folder(model, task="demo").settings.max_length == positions  # the demo's 512 is a default too
    assert plan_of_folder(model, max_length=16).settings.max_length == 16
    with pytest.raises(UserError, match=f"--max_length {positions + 1}: .* Give at most {positions}"):
        plan_of_folder(model, max_length=positions + 1)
    long = plan_run(settings_of(model="llama3.1-8b"), rank=0, world_size=1, weights=False)
    assert long.settings.max_length == 4096


@pytest.mark.parametrize(
    ("epochs", "samples", "batch", "steps"),
    [(3, 24, 4, 18), (1, 25, 4, 7), (0.5, 24, 4, 3), (1.1, 50, 1, 55), (2, 5, 256, 1), (1.5, 7, 2, 6)],
)
def test_steps_of_epochs(epochs: float, samples: int, batch: int, steps: int) -> None:
    """1.1 * 50 is more than 55 in binary; and every sample is seen at least so often as whole epochs say."""
    assert with_counted_steps(settings_of(epochs=epochs, global_batch_size=batch), samples).max_steps == steps
    seen = np.bincount(sample_indices(samples, seed=1, consumed=0, count=steps * batch), minlength=samples)
    assert seen.min() >= int(epochs)


def test_the_default_warm_up_is_shortened_and_a_given_one_is_not() -> None:
    counted = with_counted_steps(settings_of(epochs=2), 1000)
    assert (counted.max_steps, counted.warmup_steps, counted.epochs) == (8, 8, 2)
    assert with_counted_steps(settings_of(epochs=2), 10**6).warmup_steps == 50
    assert with_counted_steps(settings_of(epochs=2, warmup_steps=3), 1000).warmup_steps == 3
    with pytest.raises(UserError, match="--warmup_steps 9 is more than the 8 steps of --epochs 2"):
        with_counted_steps(settings_of(epochs=2, warmup_steps=9), 1000)
    plain = settings_of(max_steps=7)
    assert with_counted_steps(plain, 1000) is plain


def test_warnings_name_the_number_and_the_flag() -> None:
    def found(cut: int, max_steps: int) -> list[str]:
        train = samples_of(*[4] * 12800)
        train.facts["cut"][:cut] = True
        return length_warnings(settings_of(max_steps=max_steps), train)

    assert found(128, 1000) == []  # 1 % and 20 epochs are not too much
    (cut,) = found(129, 1000)
    assert cut.startswith("129 of 12,800 training prompts (1.0%)") and "--max_length 4096" in cut
    (often,) = found(0, 1001)
    assert "12,800 training samples 20.0 times; --epochs 3 in place of --max_steps 1001" in often


def test_the_first_lines_say_how_steps_and_epochs_follow() -> None:
    assert steps_in_words(settings_of(max_steps=10), 512) == "10 steps, 5.00 passes over the 512 training samples"
    counted = with_counted_steps(settings_of(epochs=1.5), 512)
    assert steps_in_words(counted, 512) == "3 steps, for --epochs 1.5 of 512 training samples at 256 per step"


@pytest.fixture
def with_data(tmp_path: Path) -> dict[str, Any]:
    """The settings of a dry run of a tiny model on 20 rows."""
    model, rows = write_tiny_model(tmp_path / "model"), str(write_rows(tmp_path / "rows.jsonl", 20))
    data = {"train_file": rows, "validation_file": rows, "global_batch_size": 8}
    return {"model": str(model), **data, "dry_run": True}


def test_a_dry_run_counts_and_warns(with_data: dict[str, Any]) -> None:
    report = dry_run_report(make_settings({**with_data, "epochs": 30, "dtype": "fp32"})).text
    assert "  75 steps, 600 samples" in report and re.search(r"\n  custom +train +20 .* 30\.00\n", report)
    assert "  warning: the run sees each of the 20 training samples 30.0 times; a lower value of --epochs" in report
    preset = dry_run_report(settings_of(epochs=2)).text
    assert "(the steps of --epochs are counted from data, and none is read)" in preset and "2000 steps" not in preset


@pytest.mark.parametrize("method", [name for name in METHOD_NAMES if name != "vera"])
def test_a_rank_above_that_of_any_update_is_rejected(method: str) -> None:
    """The linear that allows the largest is named: with two targets a rank may be too large for one of them."""

    def planned(rank: int, targets: str) -> RunPlan:
        settings = settings_of(method=method, rank=rank, targets=targets)
        return plan_run(settings, rank=0, world_size=1, weights=False)

    for targets in ("qkv", "all", "down_proj"):
        sizes = "down_proj has 11,008 inputs" if targets == "down_proj" else "qkv has 4,096 inputs and 12,288 outputs"
        with pytest.raises(UserError, match=f"^--rank 4097: {sizes}.*, so its update has at most rank 4,096"):
            planned(4097, targets)
        assert planned(4096, targets).adapter.rank == 4096


def test_a_rank_above_that_of_any_update_is_said_with_vera(with_data: dict[str, Any]) -> None:
    """PEFT's users choose such ranks: its A and B are frozen, and u chooses among their r terms."""
    given = {**with_data, "method": "vera", "targets": "o_proj"}
    said = "  warning: --rank {}: o_proj has 32 inputs and 32 outputs, so its update has at most rank 32"
    no_data = {name: value for name, value in given.items() if not name.endswith("_file")}
    for settings in (given, no_data):
        assert said.format(33) in dry_run_report(make_settings({**settings, "rank": 33})).text
        assert "its update has at most" not in dry_run_report(make_settings({**settings, "rank": 32})).text


def test_the_rank_of_an_adapter_to_start_from_is_not_questioned(tmp_path: Path) -> None:
    """An imported LoRA of q, k and v has the sum of three ranks."""
    source, native, _ = with_adapter(write_tiny_model(tmp_path / "model"), "lora", targets=["o_proj"])
    wide = replace(native.config, rank=40)
    state = {name: torch.ones(wide.shape(name)) for name in wide.tensors}
    save_adapter(tmp_path / "wide", replace(native, config=wide, state=state))
    plan = plan_of_folder(tmp_path / "model", init_from=str(tmp_path / "wide"), dry_run=True)
    assert plan.adapter.rank == 40 and source.shape.hidden_size == 32 and not plan.rank_excess
