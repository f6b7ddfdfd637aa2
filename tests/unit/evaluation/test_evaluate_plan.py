"""What an evaluation plans before it decodes: how long prompts may be, how many rows, and what it warns of."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from native_files import with_adapter, write_native
from run_helpers import write_rows
from tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.evaluation.answering import read_scored
from megatron_tiedlora.evaluation.plan import output_name, plan_evaluations
from megatron_tiedlora.evaluation.results import headline
from megatron_tiedlora.model.fused_attention import choose_attention
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.run_plan import plan_run

NUM_ROWS = 7
ROUTE = choose_attention(torch.device("cpu"), torch.float32, 8)


@dataclass(frozen=True)
class Models:
    """A base with one adapter in two of its forms, and rows to decode."""

    base: Path
    native: Path
    peft: Path
    rows: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("plans")
    base = write_tiny_model(folder / "model")
    source, adapter, oracle = with_adapter(base, "tl6", layers=(1, 3), seed=3)
    write_native(folder / "native", base, oracle)
    export_peft(source, adapter, folder / "peft")
    return Models(base, folder / "native", folder / "peft", write_rows(folder / "rows.jsonl", NUM_ROWS))


def test_a_prompt_leaves_room_for_its_answer_and_the_demo_decodes_a_few_rows(models: Models) -> None:
    chosen = {"model": str(models.base), "max_new_tokens": 246, "test_file": str(models.rows)}
    plans = plan_evaluations(validate_settings(chosen, EvaluateSettings), rank=0, world_size=1)
    plan, sets = plans[""], read_scored(plans)
    scored = sets[""]
    lengths = [min(1 + len(example.prompt), 256 - 246) for example in scored.examples]  # one token a letter, and BOS
    assert [len(prompt) for prompt in scored.prompts] == lengths and plan.limit is None
    num_cut = sum(len(example.prompt) >= 256 - 246 for example in scored.examples)
    assert 0 < num_cut == scored.num_truncated < NUM_ROWS
    lines = headline(plans, sets, ROUTE)
    assert f"{num_cut} of them without their middle" in lines[1]
    assert lines[-1] == "attention  tiles of queries (a CPU)"

    demo = validate_settings({"model": str(models.base), "task": "demo"}, EvaluateSettings)
    plans = plan_evaluations(demo, rank=0, world_size=1)
    assert (plans[""].limit, plans[""].max_new_tokens, output_name(plans)) == (24, 128, "model-demo-base")


@pytest.mark.parametrize("lengths", [{"max_length": 15}, {"max_length": 256, "max_new_tokens": 246}])
def test_prompts_are_as_long_as_in_a_training_run(models: Models, lengths: dict[str, int], tmp_path: Path) -> None:
    """Whatever cuts them: --max_length, or the model's positions less those of an answer."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    shared = {"model": str(models.base), "test_file": str(models.rows), **lengths}
    plans = plan_evaluations(validate_settings(shared, EvaluateSettings), rank=0, world_size=1)
    training = plan_run(
        make_settings({**shared, "train_file": str(short), "validation_file": str(short), "global_batch_size": 1}),
        rank=0,
        world_size=1,
    )
    here, there = read_scored(plans)[""], prepare_data(training).scored
    assert there is not None and plans[""].max_new_tokens == training.max_new_tokens
    assert [prompt.tolist() for prompt in here.prompts] == [prompt.tolist() for prompt in there.prompts]
    assert 0 < here.num_truncated == there.num_truncated < NUM_ROWS


def test_an_adapter_s_run_and_base_are_compared(models: Models, tmp_path: Path) -> None:
    """What the files beside it tell of other prompts or, for PEFT, of another base is noted before decoding."""
    (tmp_path / "run").mkdir()
    shutil.copytree(models.native, tmp_path / "run" / "adapter")
    template = {"task": "custom", "prompt_template": "Q: {prompt}", "versions": {}}
    (tmp_path / "run" / "run.yaml").write_text(yaml.safe_dump(template))
    shutil.copytree(models.peft, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "someone/other"}))
    (tmp_path / "peft" / "tiedlora_export.json").unlink()  # PEFT's own files tell less
    rows = {"test_file": str(models.rows)}
    notes = {}
    for name, chosen in {
        "same": {"adapter": str(models.native)},
        "template": {"adapter": str(tmp_path / "run" / "adapter")},
        "given": {"adapter": str(tmp_path / "run" / "adapter"), "prompt_template": "Q: {prompt}"},
        "peft": {"adapter": str(tmp_path / "peft"), "model": str(models.base)},
        "peft_same": {"adapter": str(models.peft), "model": str(models.base)},
    }.items():
        plans = plan_evaluations(validate_settings({**rows, **chosen}, EvaluateSettings), rank=0, world_size=1)
        notes[name] = plans[""].notes
        lines = headline(plans, read_scored(plans), ROUTE)
        assert sum(line.startswith("note") for line in lines) == len(notes[name])
    assert notes["same"] == notes["given"] == ()
    assert "native/, what was exported, is missing" in notes["peft_same"][0] and len(notes["peft_same"]) == 1
    assert "--prompt_template Q: {prompt}" in notes["template"][0] and len(notes["template"]) == 1
    assert "someone/other" in notes["peft"][0] and len(notes["peft"]) == 1


def test_an_export_is_evaluated_as_the_adapter_in_it_or_as_what_its_files_are(models: Models, tmp_path: Path) -> None:
    source, native = find_model(str(models.base)), load_native_adapter(models.native)
    export_peft(source, native, tmp_path / "peft", native=models.native)
    settings = {"adapter": str(tmp_path / "peft"), "test_file": str(models.rows)}
    plans = [plan_evaluations(validate_settings(settings, EvaluateSettings), rank=0, world_size=1)[""]]
    (tmp_path / "peft/native/adapter_model.safetensors").write_bytes(b"")
    plans.append(plan_evaluations(validate_settings(settings, EvaluateSettings), rank=0, world_size=1)[""])
    assert [plan.kind for plan in plans] == ["peft"] * 2
    assert [plan.adapter.config.method for plan in plans if plan.adapter] == ["tl6", "lora"]
    assert plans[0].notes == () and "only its PEFT files are used" in plans[1].notes[0]
