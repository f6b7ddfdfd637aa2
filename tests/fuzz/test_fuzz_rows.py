"""Rows in every format, tokenizers and the token cache: a broken file is one clear line, and what is read is text."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from fuzzing import broken_file, changed_fields, damaged, explore, json_text, outcome, sizes
from hypothesis import strategies as st
from task_files import HUB_ROWS, write_rows
from tiny_models import write_tiny_tokenizer

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.data.cache import tokenise_once
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer

CUSTOM = [
    {"prompt": "2 + 2 =", "completion": "4", "note": "n"},
    {"input": "2 + 3 =", "output": "5", "references": ["five"]},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
]
ROWS: dict[str, list[dict[str, Any]]] = {"custom": CUSTOM, **{name: [row, row] for name, row in HUB_ROWS.items()}}
TEMPLATES = [None, None, "{question}", "{prompt}\\n{note}", "{a.b}", "{0}", "{", "{prompt!r}", "{nothing}"]


@pytest.fixture
def area(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, and a working directory in it that nothing may be left in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def check_examples(examples: list[Example]) -> None:
    """There are some, and all that is in them can be tokenised."""
    assert examples
    for example in examples:
        assert example.prompt and example.references
        for text in (example.prompt, example.completion, *example.references, *example.choices):
            text.encode("utf-8")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@sizes(300, 8000)
def test_broken_rows(area: Path, suffix: str, examples: int) -> None:
    file = area / f"rows{suffix}"

    def body(draw):  # type: ignore[no-untyped-def]
        task = draw(st.sampled_from(sorted(ROWS)))
        rows = ROWS[task]
        if draw(st.booleans()):
            write_rows(file, rows)
            file.write_bytes(damaged(draw, file.read_bytes()))
        elif suffix == ".json":
            file.write_bytes(json_text(changed_fields(draw, rows)))
        else:
            file.write_bytes(b"\n".join(json_text(changed_fields(draw, row)) for row in rows))
        template = draw(st.sampled_from(TEMPLATES))
        names = (str(file), "--prompt_template")
        found = outcome(
            lambda: load_split(task, "test", files={"test": file}, seed=0, prompt_template=template),
            unchanged=area,
            names=names,
        )
        if isinstance(found, list):
            check_examples(found)
        outcome(lambda: load_split(task, "train", files={"train": file}, seed=0), unchanged=area, names=names)

    explore(examples, body)


@sizes(200, 6000)
def test_broken_aligned_texts(area: Path, examples: int) -> None:
    german, english = area / "a.de", area / "a.en"

    def body(draw):  # type: ignore[no-untyped-def]
        german.write_bytes("Guten Tag.\nJa, schön.\nNein.\n".encode())
        english.write_bytes(b"Good day.\nYes, nice.\nNo.\n")
        broken = draw(st.sampled_from([german, english]))
        broken.write_bytes(damaged(draw, broken.read_bytes()))
        found = outcome(
            lambda: load_split("iwslt2017", "test", files={"test": f"{german},{english}"}, seed=0),
            unchanged=area,
            names=(str(german), str(english)),
        )
        if isinstance(found, list):
            check_examples(found)

    explore(examples, body)


@sizes(300, 8000)
def test_a_broken_parquet_file(area: Path, examples: int) -> None:
    file = area / "rows.parquet"
    write_rows(file, [HUB_ROWS["squad"]] * 3)
    whole = file.read_bytes()
    assert read_rows(file)

    def body(draw):  # type: ignore[no-untyped-def]
        file.write_bytes(damaged(draw, whole))
        found = outcome(lambda: read_rows(file), unchanged=area, names=(str(file),))
        if isinstance(found, list):
            found = outcome(
                lambda: load_split("squad", "test", files={"test": file}, seed=0), unchanged=area, names=(str(file),)
            )
        if isinstance(found, list):
            check_examples(found)

    explore(examples, body)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.de"])
@pytest.mark.timeout(30, method="thread")  # a wait inside of a library is ended by no signal
def test_a_pipe_is_not_waited_for(area: Path, name: str) -> None:
    os.mkfifo(area / name)
    given = f"{area / name},{area / name}.en" if name.endswith(".de") else str(area / name)
    found = outcome(
        lambda: load_split("iwslt2017", "test", files={"test": given}, seed=0), unchanged=area, names=(name,)
    )
    assert isinstance(found, UserError) and "is no plain file" in str(found)


# Tokenizers -------------------------------------------------------------------------------------------------------


@sizes(80, 3000)
def test_a_broken_tokenizer(area: Path, examples: int) -> None:
    whole = write_tiny_tokenizer(area / "whole")
    (whole / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    folder = area / "tokenizer"
    files = sorted(path.name for path in whole.iterdir())

    def load() -> Any:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, 320)
        encode_prompts(tokenizer, ["Tom has 12 pens, naïve 日本語 😀</s>"], max_length=64)
        return tokenizer, end_ids(tokenizer, folder)

    def body(draw):  # type: ignore[no-untyped-def]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = draw(st.sampled_from(files))
        (folder / name).write_bytes(broken_file(draw, name, (whole / name).read_bytes()))
        found = outcome(load, unchanged=area, names=(str(folder), "--tokenizer"))
        if not isinstance(found, UserError):
            assert all(type(number) is int for number in found[1])

    explore(examples, body)


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
        encode_prompts(tokenizer, ["Tom has 12 pens.", "naïve 日本語"], max_length=64)
        return len(end_ids(tokenizer, folder))

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


# The cache --------------------------------------------------------------------------------------------------------


@sizes(100, 3000)
def test_a_broken_cache_file_is_made_again(area: Path, examples: int) -> None:
    tokenizer = load_tokenizer(write_tiny_tokenizer(area / "tokenizer"))
    rows = [Example("2 + 2 =", " 4", "rows:1"), Example("1 + 2 =", " 3", "rows:2")]

    def tokens() -> Any:
        return tokenise_once(rows, tokenizer, max_length=64, cache_dir=area / "cache")

    expected = tokens()
    (file,) = (area / "cache" / "tokens").glob("*.safetensors")
    whole = file.read_bytes()

    def body(draw):  # type: ignore[no-untyped-def]
        file.write_bytes(broken_file(draw, file.name, whole))
        found = tokens()
        for name in ("tokens", "offsets", "prompt_lengths"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        assert type(found.truncated_prompts) is int

    explore(examples, body)
