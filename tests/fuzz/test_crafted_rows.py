"""Rows and tokenizers that are made to harm, or that fail late: each is one clear line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fuzzing import outcome
from tiny_models import write_tiny_tokenizer

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.de"])
@pytest.mark.timeout(30, method="thread")  # a wait inside of a library is ended by no signal
def test_a_pipe_is_not_waited_for(area: Path, name: str) -> None:
    os.mkfifo(area / name)
    given = f"{area / name},{area / name}.en" if name.endswith(".de") else str(area / name)
    found = outcome(
        lambda: load_split("iwslt2017", "test", files={"test": given}, seed=0), unchanged=area, names=(name,)
    )
    assert isinstance(found, UserError) and "is not a regular file" in str(found)


@pytest.mark.parametrize("changes", [
    {"model_max_length": ""}, {"model_max_length": None}, {"unk_token": ""}, {"bos_token": "", "unk_token": None},
    {"bos_token": "", "unk_token": "<gone>"}, {"eos_token": "\ud800"}, {"eos_token": 2}, {"pad_token": []},
])  # fmt: skip
def test_a_tokenizer_that_loads_and_fails_in_use(area: Path, changes: dict[str, Any]) -> None:
    """Found out where it is read, not in the middle of the data."""
    folder = write_tiny_tokenizer(area / "tokenizer")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def use() -> int:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, 1000)
        prompts = [Example(text, "", "here") for text in ("Tom has 12 pens.", "naïve 日本語")]
        encode_prompts(tokenizer, prompts, max_length=64)
        return len(end_ids(tokenizer, folder, vocab_size=320))

    found = outcome(use, unchanged=area, names=(str(folder),))
    assert isinstance(found, UserError | int)
    if changes == {"model_max_length": ""}:
        assert isinstance(found, UserError)


@pytest.mark.timeout(60)
def test_a_tokenizer_s_own_code_is_not_run_and_not_asked_about(area: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: Any) -> str:
        raise AssertionError("asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    folder = area / "tokenizer"
    folder.mkdir()
    auto_map = {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Mine", "auto_map": auto_map}))
    (folder / "mine.py").write_text(f"open({str(area / 'run')!r}, 'w')")
    (folder / "vocab.json").write_text("{}")
    found = outcome(lambda: load_tokenizer(folder), unchanged=area, names=(str(folder),))
    assert isinstance(found, UserError)
