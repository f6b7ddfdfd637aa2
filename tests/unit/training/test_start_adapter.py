"""--init_from at planning: what is taken over, which settings contradict it, and what is read when a run is resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.native_files import checkpoint_of, moments_of, with_adapter
from support.peft_models import lora_model
from support.run_files import edit_json
from support.run_helpers import write_rows
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint
from megatron_tiedlora.config.job_settings import parse_sweep
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run, read_start
from megatron_tiedlora.runtime.run_folder import run_name
from megatron_tiedlora.training.start import check_resumed_settings

TARGETS = ("o_proj", "gate_up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and adapters of it: native/ (tl5 of rank 4, alpha 6, on two targets of layers 1 and 3), its export peft/,
    lora/ of PEFT with an A for each of q and v, and one with o_proj alone."""
    root = tmp_path_factory.mktemp("init_from")
    model = write_tiny_model(root / "model")
    write_rows(root / "rows.jsonl", 8)
    source, native, _ = with_adapter(model, "tl5", (1, 3), targets=TARGETS)
    save_adapter(root / "native", native)
    export_peft(source, load_native_adapter(root / "native"), root / "peft", native=root / "native")
    for name, modules in {"lora": ["q_proj", "v_proj"], "o": ["o_proj"]}.items():
        lora_model(model, r=3, lora_alpha=5, target_modules=modules).save_pretrained(root / name)
    return root


def values(folder: Path, adapter: str | None = "native", **changes: Any) -> dict[str, Any]:
    given = {"model": folder / "model", "train_file": folder / "rows.jsonl", "max_length": 64, "dtype": "fp32"}
    if adapter is not None:
        given["init_from"] = folder / adapter
    return {name: str(value) if isinstance(value, Path) else value for name, value in {**given, **changes}.items()}


def plan_of(folder: Path, adapter: str | None = "native", **changes: Any) -> RunPlan:
    return plan_run(make_settings(values(folder, adapter, **changes)), rank=0, world_size=1)


def facts(plan: RunPlan) -> tuple[Any, ...]:
    return tuple(plan.adapter.facts.values())


# --------------------------------------------------------------------------------------------- what is taken over


def test_what_was_not_given_is_the_adapter_s(folder: Path) -> None:
    plan = plan_of(folder)
    native = load_native_adapter(folder / "native").config
    assert facts(plan) == ("tl5", 4, 6.0, [1, 3], [*TARGETS])
    assert (plan.adapter.init_std_a, plan.adapter.init_std_b) == (native.init_std_a, native.init_std_b)
    recorded = plan.resolved_settings()
    assert recorded["init_from"] == str(folder / "native")
    assert run_name(plan.settings) == "model-custom-tl5-r4-o_proj+gate_up"
    assert [recorded[name] for name in plan.adapter.facts] == list(facts(plan))
    again = {name: value for name, value in recorded.items() if value is not None}
    assert plan_run(make_settings(again), rank=0, world_size=1).resolved_settings() == recorded  # --config run.yaml


def test_every_kind_of_folder(folder: Path) -> None:
    assert facts(plan_of(folder, "peft")) == facts(plan_of(folder))
    assert facts(plan_of(folder, "lora")) == ("lora", 6, 10.0, [1, 2, 3], ["qkv"])
    assert facts(plan_of(folder, "o")) == ("lora", 3, 5.0, [1, 2, 3], ["o_proj"])
    assert facts(plan_of(folder, None)) == ("tl6", 8, 8.0, [1, 2, 3], ["qkv"])


def test_the_same_values_may_be_given(folder: Path) -> None:
    given = {"method": "tl5", "rank": 4, "alpha": 6, "layers": "1,3", "targets": "gate_up,o_proj"}
    assert facts(plan_of(folder, **given)) == facts(plan_of(folder))
    assert facts(plan_of(folder, "o", layers="all")) == facts(plan_of(folder, "o"))


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "method": ("native", {"method": "tl6"}, "--method tl6", "method tl5"),
    "rank": ("native", {"rank": 8}, "--rank 8", "rank 4"),
    "alpha": ("native", {"alpha": 4}, "--alpha 4.0", "alpha 6.0"),
    "layers": ("native", {"layers": "all"}, "--layers 1,2,3", "layers 1,3"),
    "targets": ("native", {"targets": "all"}, "--targets qkv,o_proj,gate_up,down_proj", "targets o_proj,gate_up"),
    "the default": ("o", {"targets": "qkv"}, "--targets qkv", "targets o_proj"),
    "std": ("native", {"init_std_a": 0.5}, "--init_std_a 0.5", "init_std_a 0.1"),
    "stacked rank": ("lora", {"rank": 3}, "--rank 3", "rank 6"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_setting_that_contradicts_it_is_rejected_with_both_values(folder: Path, case: str) -> None:
    adapter, given, said, found = CONTRADICTIONS[case]
    message = refusal(plan_of, folder, adapter, **given)
    assert message.startswith(f"{said} contradicts --init_from {folder / adapter}, whose adapter has {found}"), message


def test_what_is_no_adapter_of_this_model_is_rejected(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", num_kv_heads=4, tokenizer=False)
    _, native, _ = with_adapter(other, "tl5")
    save_adapter(tmp_path / "native", native)
    lora_model(other, r=2, target_modules=["k_proj"]).save_pretrained(tmp_path / "peft")
    (tmp_path / "run").mkdir()
    shutil.copytree(folder / "native", tmp_path / "run" / "adapter")
    for name, said in {
        "none": r"--init_from .*none: no such folder; give a run's adapter/ or checkpoints/step_N, or a PEFT adapter",
        "run": r"--init_from .*run: this is a run folder; give .*run/adapter",
        "other": r"--init_from .*other: this is a model folder",
        "native": r"--init_from .*native: trained on .*other with num_key_value_heads 4, but .*model has 2",
        "peft": r"adapter_model.safetensors: \S* has shape \(32, 2\), but with its rank .*model it must be \(16, 2\)",
    }.items():
        with pytest.raises(UserError, match=said):
            plan_of(folder, init_from=tmp_path / name)


def test_the_settings_that_go_with_it(folder: Path) -> None:
    assert make_settings(values(folder, base_differs=True)).base_differs
    without = values(folder, None, base_differs=True)
    assert "--base_differs needs --resume or --init_from" in refusal(make_settings, without)
    assert "--take_over needs --resume" in refusal(make_settings, values(folder, take_over=True))
    words = [f"--{name}={value}" for name, value in values(folder, output_dir="sweep").items()]
    assert "--init_from cannot be given to a sweep" in refusal(parse_sweep, words)


# --------------------------------------------------------------------------------------------- notes


def test_notes_say_where_training_is_not_peft_s(folder: Path) -> None:
    def notes(adapter: str) -> tuple[str, ...]:
        return read_start(str(folder / adapter), plan_of(folder).source, differs=False).notes

    assert notes("native") == notes("peft") == notes("o") == ()
    (note,) = notes("lora")
    assert note.endswith("separate A matrices, or no adapter, so training continues differently from PEFT's")
    shutil.copytree(folder / "o", folder / "named")
    edit_json(folder / "named" / "adapter_config.json", base_model_name_or_path="someone/other")
    (note,) = notes("named")
    assert "names the base someone/other; PEFT files do not record whether" in note


def test_the_dry_run_says_what_it_starts_with(folder: Path) -> None:
    report = dry_run_report(make_settings(values(folder, "lora", dry_run=True))).text
    assert "trained parameters: lora, rank 6, 3 adapted layers (qkv)" in report
    assert f"  starts with the values of {folder / 'lora'}, a PEFT adapter\n  ({folder / 'lora'}: modules" in report
    report = dry_run_report(make_settings(values(folder, "peft", dry_run=True))).text
    assert "a PEFT folder with the native adapter" in report
    preset = {"model": "llama2-7b", "world_size": 4, "dry_run": True, "init_from": str(folder / "native")}
    said = refusal(dry_run_report, make_settings(preset))
    assert "trained on " in said and " with num_layers 3, but llama2-7b has 32" in said


# --------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run folder with a checkpoint of a run that started from a copy of native/, which is gone since."""
    shutil.copytree(folder / "native", tmp_path / "start")
    plan = plan_of(folder, init_from=tmp_path / "start")
    native = load_native_adapter(tmp_path / "start")
    save_checkpoint(
        tmp_path / "run" / "checkpoints",
        progress=Progress(step=1, consumed_samples=256),
        adapter=native,
        moments=moments_of(native, 0.0),
        settings={**plan.resolved_settings(), "data_sha256": "data"},
    )
    shutil.rmtree(tmp_path / "start")
    return tmp_path / "run"


def resumed(folder: Path, run: Path, **changes: Any) -> RunPlan:
    start = {"init_from": run.parent / "start", "output_dir": run, "resume": "auto", **changes}
    return plan_of(folder, **start)


def check(plan: RunPlan, run: Path) -> None:
    saved = json.loads((run / "checkpoints/step_1/trainer_state.json").read_text())["settings"]
    check_resumed_settings(plan, checkpoint_of(saved, step=0), data_sha256="data")


def test_a_resumed_run_does_not_read_the_adapter_again(folder: Path, run: Path) -> None:
    for changes in ({}, {"resume": run / "checkpoints/step_1"}, {"resume": run / "checkpoints/step_1", "rank": 4}):
        plan = resumed(folder, run, **changes)
        assert facts(plan) == ("tl5", 4, 6.0, [1, 3], [*TARGETS])
        check(plan, run)
    shutil.copytree(folder / "o", run.parent / "start")  # another adapter by now
    assert facts(resumed(folder, run)) == ("tl5", 4, 6.0, [1, 3], [*TARGETS])
    (run / "run.yaml").touch()  # a dry run refuses a folder without it, as a run does
    assert "starts with" not in dry_run_report(resumed(folder, run, dry_run=True).settings).text


def test_a_resumed_run_is_of_the_same_settings(folder: Path, run: Path) -> None:
    assert "trained with --rank 4, but now it is 2" in refusal(check, resumed(folder, run, rank=2), run)
    said, start = refusal(check, resumed(folder, run, init_from=folder / "native"), run), run.parent / "start"
    assert f"trained with --init_from {start}, but now it is {folder / 'native'}" in said
    given = {"method": "tl5", "rank": 4, "alpha": 6, "layers": "1,3", "targets": "o_proj,gate_up"}
    stds = load_native_adapter(folder / "native").config
    without = plan_of(folder, None, **given, init_std_a=stds.init_std_a, init_std_b=stds.init_std_b)
    assert f"trained with --init_from {start}, but now it is not set" in refusal(check, without, run)


def test_a_host_that_sees_neither_needs_the_run_s_settings(folder: Path, run: Path) -> None:
    whole = {name: value for name, value in resumed(folder, run).resolved_settings().items() if value is not None}
    shutil.rmtree(run)
    assert "start: no such folder" in refusal(resumed, folder, run)
    earlier = {name: value for name, value in whole.items() if name != "rslora"}  # of a run of version 0.2
    for given in (whole, earlier):
        plan = plan_run(make_settings(given), rank=0, world_size=1)
        assert facts(plan) == ("tl5", 4, 6.0, [1, 3], [*TARGETS])
