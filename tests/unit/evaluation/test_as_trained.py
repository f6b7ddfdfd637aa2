"""What an evaluation takes from its adapter's run: its chat template by content, and answers whatever their flags."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from native_files import with_adapter, write_native
from task_files import refusal, write, write_rows
from tiny_models import write_tiny_model
from zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.config.cli import TEMPLATE_HASH, read_yaml
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.training.start import write_run_settings

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
OTHER = CHATML.replace("user", "human") + "{# other #}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model")


def run_of(base: Path, folder: Path, template: Path, **more: Any) -> Path:
    """A run folder with its adapter, and the run.yaml that training writes."""
    rows = write_rows(folder.parent / "rows.jsonl", [ROW, ROW])
    values = {"model": str(base), "train_file": rows, "chat_template": str(template), "output_dir": str(folder), **more}
    folder.mkdir()
    write_run_settings(plan_run(make_settings(values), rank=0, world_size=1), RunFolder(folder))
    _, _, oracle = with_adapter(base, "tl6", layers=(1, 3), seed=3)
    write_native(folder / "adapter", base, oracle)
    return folder


def evaluated(run: Path, **more: Any) -> Any:
    values = {"adapter": str(run / "adapter"), "test_file": str(run.parent / "rows.jsonl"), **more}
    return plan_evaluations(validate_settings(values, EvaluateSettings), rank=0, world_size=1)[""]


def test_a_chat_template_is_compared_by_its_content(base: Path, tmp_path: Path) -> None:
    template = Path(write(tmp_path / "mine.jinja", CHATML))
    run = run_of(base, tmp_path / "run", template)
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert recorded[TEMPLATE_HASH] == hashlib.sha256(CHATML.encode()).hexdigest()
    assert TEMPLATE_HASH not in read_yaml(str(run / "run.yaml"), Settings)  # it may be given to --config
    assert evaluated(run).settings.chat_template == str(template)
    copy = write(tmp_path / "copy.jinja", CHATML)
    assert evaluated(run).notes == evaluated(run, chat_template=copy).notes == ()

    template.write_text(OTHER)
    message = refusal(lambda: evaluated(run))
    assert message.startswith(f"--chat_template {template}, of the adapter's run, has changed since (sha256 ")
    assert "with --chat_template, or this one to use it as it is" in message
    plan = evaluated(run, chat_template=str(template))
    assert plan.notes[0] == f"--chat_template {template} has other content than that of the adapter's run"
    template.unlink()
    assert "is not on this host; give the file" in refusal(lambda: evaluated(run))
    assert evaluated(run, chat_template=copy).notes == ()


def test_the_run_s_reading_is_that_of_the_evaluation(base: Path, tmp_path: Path) -> None:
    """Where the command gives none; a setting in run.yaml that is unknown here is no obstacle."""
    run = run_of(base, tmp_path / "run", Path(write(tmp_path / "mine.jinja", CHATML)), add_bos="false")
    (run / "run.yaml").write_text((run / "run.yaml").read_text() + "later_setting: 3\n")
    found = evaluated(run).settings
    assert (found.add_bos, found.special_tokens_in_text) == ("false", "refuse")
    assert evaluated(run, add_bos="true").settings.add_bos == "true"
    (run / "run.yaml").unlink()
    assert evaluated(run).settings.add_bos is evaluated(run).settings.special_tokens_in_text is None


def test_a_run_that_recorded_no_content_is_compared_by_name(base: Path, tmp_path: Path) -> None:
    template = Path(write(tmp_path / "mine.jinja", CHATML))
    run = run_of(base, tmp_path / "run", template)
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
    for train_on, words in (("all_turns", "let an answer be trained"), ("last_turn", "")):
        chosen = Reading.of(make_settings({**train, "train_on": train_on}))
        assert words in refusal(lambda chosen=chosen: load_split("custom", "test", reading=chosen, **options))
    one = write_rows(tmp_path / "one.jsonl", [{"messages": [*ROW["messages"], ROW["messages"][0], untrained]}])
    options["files"] = {"test": one}
    last = Reading.of(make_settings({**train, "train_on": "last_turn"}))
    message = refusal(lambda: load_split("custom", "test", reading=last, **options))
    assert message.startswith(f"{one}:1, message 4: is not to be trained") and "--train_on all_turns" in message
    assert len(load_split("custom", "test", reading=reading, **options)) == 1
