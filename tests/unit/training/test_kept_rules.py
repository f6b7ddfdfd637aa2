"""Runs and adapters of version 0.1 keep the rules by which it made tokens of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from task_files import refusal, write_rows
from zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.config.data_fields import FIRST_RULES
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data.encode import encode_dataset, encode_examples
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.plan import _as_trained
from megatron_tiedlora.training.kept_rules import with_kept_rules

NEW = {"train_on": "all_turns", "add_bos": "auto", "special_tokens_in_text": "refuse", "data_rules": 2}
OLD = {**FIRST_RULES, "data_rules": 1}


def rules(settings: Settings | EvaluateSettings) -> dict[str, Any]:
    return {name: value for name, value in settings.model_dump().items() if name in NEW}


def run_folder(folder: Path, **recorded: Any) -> Path:
    step = folder / "checkpoints" / "step_2"
    step.mkdir(parents=True)
    settings = {"task": "custom", "train_file": "a.jsonl", **recorded}
    (step / "trainer_state.json").write_text(json.dumps({"settings": settings}))
    (folder / "adapter").mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump({**settings, "versions": {}}))
    return folder


def given(folder: Path, **more: Any) -> Settings:
    return make_settings({"task": "custom", "train_file": "a.jsonl", "output_dir": str(folder), **more})


def test_a_resumed_run_keeps_its_rules(tmp_path: Path) -> None:
    old, new = run_folder(tmp_path / "old"), run_folder(tmp_path / "new", **NEW)
    assert rules(given(old)) == NEW and rules(with_kept_rules(given(old))) == NEW  # a new run
    for resume in ("auto", str(old / "checkpoints" / "step_2")):
        kept = with_kept_rules(given(old, resume=resume))
        assert rules(kept) == OLD and kept.resume == resume
        assert with_kept_rules(kept) == kept
    assert rules(with_kept_rules(given(new, resume="auto"))) == NEW
    assert rules(with_kept_rules(given(tmp_path / "none", resume="auto"))) == NEW
    assert rules(with_kept_rules(given(old, resume="auto", data_rules=2))) == NEW  # the resume itself rejects it
    assert with_kept_rules(given(old, resume="auto", epochs=2)).epochs == 2  # its steps are not counted yet
    message = refusal(lambda: with_kept_rules(given(old, resume="auto", add_bos="false")))
    assert message.startswith("--add_bos false contradicts --data_rules 1, which means true")


def test_without_output_dir_the_last_run_of_the_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As --resume auto chooses it: runs/NAME, or the last of NAME-2, NAME-3, ...; a run of another name is not read."""
    monkeypatch.chdir(tmp_path)

    def kept(**more: Any) -> dict[str, Any]:
        values = {"task": "custom", "train_file": "a.jsonl", "model": "m", "resume": "auto", **more}
        return rules(with_kept_rules(make_settings(values)))

    assert kept() == NEW
    run_folder(tmp_path / "runs" / "m-custom-tl6-r8")
    assert kept() == OLD and kept(rank=4) == kept(method="lora") == kept(resume="none") == NEW
    run_folder(tmp_path / "runs" / "m-custom-tl6-r8-2", **NEW)
    assert kept() == NEW


def test_an_adapter_of_a_run_keeps_its_rules(tmp_path: Path) -> None:
    def evaluated(folder: Path, **more: Any) -> dict[str, Any]:
        values = {"task": "custom", "test_file": "a.jsonl", "adapter": str(folder / "adapter"), **more}
        return rules(_as_trained(validate_settings(values, EvaluateSettings)))

    old, new = run_folder(tmp_path / "old"), run_folder(tmp_path / "new", **{**NEW, "add_bos": "false"})
    without = {name: value for name, value in OLD.items() if name != "train_on"}
    assert evaluated(old) == without
    assert evaluated(new) == {"add_bos": "false", "special_tokens_in_text": "refuse", "data_rules": 2}
    assert evaluated(new, add_bos="true")["add_bos"] == "true"
    (old / "run.yaml").unlink()
    assert evaluated(old) == {"add_bos": None, "special_tokens_in_text": None, "data_rules": None}


def test_the_first_rules_are_one_choice() -> None:
    assert rules(make_settings({"task": "gsm8k", "data_rules": 1})) == OLD
    assert rules(make_settings({"task": "gsm8k", **OLD})) == OLD
    for name, value in (("train_on", "all_turns"), ("add_bos", "auto"), ("special_tokens_in_text", "plain")):
        message = refusal(lambda name=name, value=value: make_settings({"task": "gsm8k", "data_rules": 1, name: value}))
        assert message.startswith(f"--{name} {value} contradicts --data_rules 1")
    assert make_settings({"task": "gsm8k", "add_bos": True}).add_bos == "true"  # as YAML has it
    assert "--data_rules" in refusal(lambda: make_settings({"task": "gsm8k", "data_rules": 3}))


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_first_rules_give_the_tokens_of_version_0_1(template: str | None, tmp_path: Path) -> None:
    """<s>, the prompt of the last answer, its content, EOS; and the hash of a resumed run's data is the same."""
    tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "tokenizer", template=template))
    turns = [
        {"role": "user", "content": "Hello <s>."}, {"role": "assistant", "content": "fine."},
        {"role": "user", "content": "thanks"}, {"role": "assistant", "content": "4"},
    ]  # fmt: skip
    rows = [
        {"messages": turns},
        {"instruction": "Add.", "output": "4", "system": "dropped", "history": [["a", "b"]]},
        {"prompt": "Question:", "completion": "4", "label": 3},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    reading = Reading.of(make_settings({"task": "custom", "train_file": file, "data_rules": 1}))
    files = {"train": file, "validation": file}
    examples = load_split("custom", "train", files=files, seed=0, tokenizer=tokenizer, reading=reading)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    alpaca = "### Instruction:\nAdd.\n\n### Response:"
    chat = "User: Hello <s>.\nAssistant: fine.\nUser: thanks\nAssistant:"
    if template is not None:
        chat = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    prompts = [chat, examples[1].prompt, "Question:"]
    assert examples[1].prompt.endswith(alpaca)
    answers = ["4" if template else " 4", " 4", " 4"]
    before = [[tokenizer.bos_token_id, *ids(prompt)] for prompt in prompts]
    after = [[*ids(answer), tokenizer.eos_token_id] for answer in answers]
    found = encode_examples(tokenizer, examples, max_length=300, reading=reading)
    expected = [[*first, *second] for first, second in zip(before, after, strict=True)]
    assert [sample.tokens.tolist() for sample in found] == expected
    assert [int(sample.supervised.argmax()) for sample in found] == [len(first) for first in before]
    dataset = encode_dataset(examples, tokenizer, max_length=300, reading=reading)
    assert dataset.prompt_lengths is not None and dataset.prompt_lengths.dtype == np.int32
    again = TokenDataset.after_prompts(dataset.tokens, dataset.offsets, dataset.prompt_lengths)
    assert np.array_equal(again.supervised, dataset.supervised)
