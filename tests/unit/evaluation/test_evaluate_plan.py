"""What an evaluation plans before it decodes: how long prompts may be, how many rows, what it takes from its adapter's
run, what it warns of, and the names of its adapters."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.native_files import with_adapter, write_native
from support.run_helpers import write_rows as write_random_rows
from support.task_files import refusal, write, write_rows
from support.tiny_models import write_tiny_model
from support.zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.cli import TEMPLATE_HASH, read_yaml
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.answering import read_scored
from megatron_tiedlora.evaluation.plan import EvaluationPlan, named_adapters, output_name, plan_evaluations
from megatron_tiedlora.evaluation.results import headline
from megatron_tiedlora.model.fused_attention import choose_attention
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.training.start import write_run_settings

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
    return Models(base, folder / "native", folder / "peft", write_random_rows(folder / "rows.jsonl", NUM_ROWS))


def planned(**chosen: Any) -> dict[str, EvaluationPlan]:
    """The plans of an evaluation in one process, by adapter."""
    return plan_evaluations(validate_settings(chosen, EvaluateSettings), rank=0, world_size=1)


def test_a_prompt_leaves_room_for_its_answer_and_the_demo_decodes_a_few_rows(models: Models) -> None:
    plans = planned(model=str(models.base), max_new_tokens=246, test_file=str(models.rows))
    plan, sets = plans[""], read_scored(plans)
    scored = sets[""]
    lengths = [min(1 + len(example.prompt), 256 - 246) for example in scored.examples]  # one token a letter, and BOS
    assert [len(prompt) for prompt in scored.prompts] == lengths and plan.limit is None
    num_cut = sum(len(example.prompt) >= 256 - 246 for example in scored.examples)
    assert 0 < num_cut == scored.num_truncated < NUM_ROWS
    lines = headline(plans, sets, ROUTE)
    assert f"{num_cut} of them without their middle" in lines[1]
    assert lines[-1] == "attention  tiles of queries (a CPU)"

    plans = planned(model=str(models.base), task="demo")
    assert (plans[""].limit, plans[""].max_new_tokens, output_name(plans)) == (24, 128, "model-demo-base")


@pytest.mark.parametrize("lengths", [{"max_length": 15}, {"max_length": 256, "max_new_tokens": 246}])
def test_prompts_are_as_long_as_in_a_training_run(models: Models, lengths: dict[str, int], tmp_path: Path) -> None:
    """Whatever cuts them: --max_length, or the model's positions less those of an answer."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    shared = {"model": str(models.base), "test_file": str(models.rows), **lengths}
    plans = planned(**shared)
    own = {"train_file": str(short), "validation_file": str(short), "global_batch_size": 1}
    training = plan_run(make_settings({**shared, **own}), rank=0, world_size=1)
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
    notes = {}
    for name, chosen in {
        "same": {"adapter": str(models.native)},
        "template": {"adapter": str(tmp_path / "run" / "adapter")},
        "given": {"adapter": str(tmp_path / "run" / "adapter"), "prompt_template": "Q: {prompt}"},
        "peft": {"adapter": str(tmp_path / "peft"), "model": str(models.base)},
        "peft_same": {"adapter": str(models.peft), "model": str(models.base)},
    }.items():
        plans = planned(test_file=str(models.rows), **chosen)
        notes[name] = plans[""].notes
        lines = headline(plans, read_scored(plans), ROUTE)
        assert sum(line.startswith("note") for line in lines) == len(notes[name])
    assert notes["same"] == notes["given"] == ()
    assert "native/, the exported adapter, is missing" in notes["peft_same"][0] and len(notes["peft_same"]) == 1
    assert "--prompt_template Q: {prompt}" in notes["template"][0] and len(notes["template"]) == 1
    assert "someone/other" in notes["peft"][0] and len(notes["peft"]) == 1


def test_adapters_of_one_folder_are_named_and_shown_as_they_are_laid_out(models: Models) -> None:
    """--adapters of one folder writes NAME/ beside a table, as of several; --adapter writes that adapter's files."""
    given = {"test_file": str(models.rows), "task": "custom"}
    one, alone = planned(adapters=[f"legal={models.native}"], **given), planned(adapter=str(models.native), **given)
    assert (output_name(one), output_name(alone)) == ("model-custom-1-adapter", "model-custom-tl6-r4")
    lines, of_alone = (headline(plans, read_scored(plans), ROUTE) for plans in (one, alone))
    assert "with 1 adapter" in lines[0] and lines[-1] == f"adapter    legal: tl6-r4, from {models.native}"
    assert f"with tl6-r4 on qkv, from {models.native}" in of_alone[0] and lines[1:-1] == of_alone[1:]


def test_an_export_is_evaluated_as_the_adapter_in_it_or_as_what_its_files_are(models: Models, tmp_path: Path) -> None:
    source, native = find_model(str(models.base)), load_native_adapter(models.native)
    export_peft(source, native, tmp_path / "peft", native=models.native)
    settings = {"adapter": str(tmp_path / "peft"), "test_file": str(models.rows)}
    plans = [planned(**settings)[""]]
    (tmp_path / "peft/native/adapter_model.safetensors").write_bytes(b"")
    plans.append(planned(**settings)[""])
    assert [plan.kind for plan in plans] == ["peft"] * 2
    assert [plan.adapter.config.method for plan in plans if plan.adapter] == ["tl6", "lora"]
    assert plans[0].notes == () and "only its PEFT files are used" in plans[1].notes[0]


# As trained ---------------------------------------------------------------------------------------------------------

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
OTHER = CHATML.replace("user", "human") + "{# other #}"


def run_of(models: Models, folder: Path, template: Path, **more: Any) -> Path:
    """A run folder with its adapter, and the run.yaml that training writes."""
    rows = write_rows(folder.parent / "rows.jsonl", [ROW, ROW])
    values = {"model": str(models.base), "train_file": rows, "chat_template": str(template), **more}
    folder.mkdir()
    settings = make_settings({**values, "output_dir": str(folder)})
    write_run_settings(plan_run(settings, rank=0, world_size=1), RunFolder(folder))
    shutil.copytree(models.native, folder / "adapter")
    return folder


def evaluated(run: Path, **more: Any) -> EvaluationPlan:
    return planned(**{"adapter": str(run / "adapter"), "test_file": str(run.parent / "rows.jsonl"), **more})[""]


def test_a_chat_template_is_compared_by_its_content(models: Models, tmp_path: Path) -> None:
    template = Path(write(tmp_path / "mine.jinja", CHATML))
    run = run_of(models, tmp_path / "run", template)
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert recorded[TEMPLATE_HASH] == hashlib.sha256(CHATML.encode()).hexdigest()
    assert TEMPLATE_HASH not in read_yaml(str(run / "run.yaml"), Settings)  # it may be given to --config
    assert evaluated(run).settings.chat_template == str(template)
    copy = write(tmp_path / "copy.jinja", CHATML)
    assert evaluated(run).notes == evaluated(run, chat_template=copy).notes == ()

    template.write_text(OTHER)
    message = refusal(lambda: evaluated(run))
    assert message.startswith(f"--chat_template {template} of the adapter's run has changed (its sha256 is ")
    assert " --chat_template, or give the changed file explicitly to use it" in message
    plan = evaluated(run, chat_template=str(template))
    assert plan.notes[0] == f"--chat_template {template} differs from the template of the adapter's run"
    template.unlink()
    assert "is not on this host; copy it here" in refusal(lambda: evaluated(run))
    assert evaluated(run, chat_template=copy).notes == ()


def test_the_run_s_reading_is_that_of_the_evaluation(models: Models, tmp_path: Path) -> None:
    """Where the command gives none; a setting in run.yaml that is unknown here is no obstacle."""
    run = run_of(models, tmp_path / "run", Path(write(tmp_path / "mine.jinja", CHATML)), add_bos="false")
    (run / "run.yaml").write_text((run / "run.yaml").read_text() + "later_setting: 3\n")
    found = evaluated(run).settings
    assert (found.add_bos, found.special_tokens_in_text) == ("false", "refuse")
    assert evaluated(run, add_bos="true").settings.add_bos == "true"
    (run / "run.yaml").unlink()
    assert evaluated(run).settings.add_bos is evaluated(run).settings.special_tokens_in_text is None


def test_a_run_that_recorded_no_content_is_compared_by_name(models: Models, tmp_path: Path) -> None:
    template = Path(write(tmp_path / "mine.jinja", CHATML))
    run = run_of(models, tmp_path / "run", template)
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    del recorded[TEMPLATE_HASH]
    (run / "run.yaml").write_text(yaml.safe_dump(recorded))
    template.write_text(OTHER)
    assert evaluated(run).notes == ()
    copy = write(tmp_path / "copy.jinja", CHATML)
    assert f"had --chat_template {template}" in evaluated(run, chat_template=copy).notes[0]


def test_an_answer_that_is_not_trained_is_scored(tmp_path: Path) -> None:
    """An evaluation has no --train_on, and a flag for training says nothing about scores."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "tokenizer", template=CHATML))
    untrained = {"role": "assistant", "content": "b", "weight": 0}
    row = {"messages": [{"role": "user", "content": "x" * 50}, untrained, ROW["messages"][0], untrained]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    reading = Reading.of(validate_settings({"test_file": path, "model": "x"}, EvaluateSettings))
    options: Any = {"files": {"test": path}, "seed": 0, "tokenizer": tokenizer}
    (example,) = load_split("custom", "test", reading=reading, **options)
    assert example.references == ("b",) and example.prompt.endswith("<|im_start|>assistant\n")
    (whole,), num_cut = encode_prompts(tokenizer, [example], max_length=400, reading=reading)
    (shorter,), num_shorter = encode_prompts(tokenizer, [example], max_length=len(whole) - 1, reading=reading)
    assert (num_cut, num_shorter) == (0, 1)
    kept = tokenizer.apply_chat_template(row["messages"][2:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(shorter.tolist()) == kept  # a whole exchange is left out
    train: dict[str, Any] = {"train_file": path}
    for train_on, words in (("all_turns", "set 'train' to true in an answer"), ("last_turn", "")):
        chosen = Reading.of(make_settings({**train, "train_on": train_on}))
        assert words in refusal(lambda chosen=chosen: load_split("custom", "test", reading=chosen, **options))
    one = write_rows(tmp_path / "one.jsonl", [{"messages": [*ROW["messages"], ROW["messages"][0], untrained]}])
    options["files"] = {"test": one}
    last = Reading.of(make_settings({**train, "train_on": "last_turn"}))
    message = refusal(lambda: load_split("custom", "test", reading=last, **options))
    assert message.startswith(f"{one}:1, message 4: is not supervised") and "--train_on all_turns" in message
    assert len(load_split("custom", "test", reading=reading, **options)) == 1


# Names of adapters --------------------------------------------------------------------------------------------------


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text("{}")
    return folder


def test_a_name_is_that_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (adapter(tmp_path / "runs" / name / "adapter") for name in ("one", "other"))
    (tmp_path / "runs" / "one" / "logs").mkdir()
    monkeypatch.chdir(tmp_path / "runs" / "one" / "logs")
    assert named_adapters([str(tmp_path / "runs")]) == {"one": one, "other": other}
    assert list(named_adapters(["../adapter"])) == ["one"]
    assert named_adapters([f"x={one}", f"y={one}", str(other)]) == {"x": one, "y": one, "other": other}


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "table.csv", "n" * 300])
def test_a_name_must_be_one_of_a_folder_in_the_output(tmp_path: Path, name: str) -> None:
    own = adapter(tmp_path / "adapter")
    assert "cannot be the name of a folder; give NAME=FOLDER" in refusal(lambda: named_adapters([f"{name}={own}"]))
    run = adapter(tmp_path / "table.csv")
    assert "'table.csv' cannot be the name of a folder" in refusal(lambda: named_adapters([str(run)]))
    assert named_adapters([f"mine={run}"]) == {"mine": run}
