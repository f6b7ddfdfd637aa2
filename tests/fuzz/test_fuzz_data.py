"""Rows in every format, tokenizers and the token cache, broken or made to harm: one clear line, or text that can be
trained on and scored.
"""

from __future__ import annotations

import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from damage import broken_file, changed_fields, clear, damaged, json_text, odd_place
from fuzzing import MAPPED, Draw, cases, explore, outcome, refused
from support.task_files import HUB_ROWS, write_rows
from support.tiny_models import NUM_TOKENIZER_TOKENS, write_tiny_tokenizer
from support.zoo_oracle import TOOLS

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.data.cache import tokenised_once
from megatron_tiedlora.data.encode import encode_dataset, encode_prompts
from megatron_tiedlora.data.splits import Encoding, load_split
from megatron_tiedlora.data.task import Example, Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.results import score_answers

CUSTOM = [
    {"prompt": "2 + 2 =", "completion": "4", "note": "n"},
    {"input": "2 + 3 =", "output": "5", "references": ["five"]},
    {"instruction": "Add.", "input": "1, 2", "output": "3"},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Add"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "3", "tool_call_id": "a"},
            {"role": "assistant", "content": "3", "weight": 1, "reasoning_content": ""},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    },
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}], "system": "s"},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"query": "Hello", "response": "Hi", "history": [["a", "b"]]},
    {"text": "Once upon a time."},
]
ROWS: dict[str, list[dict[str, Any]]] = {"custom": CUSTOM, **{name: [row, row] for name, row in HUB_ROWS.items()}}
TEMPLATES = [None, None, "{question}", "{prompt}\\n{note}", "{a.b}", "{0}", "{", "{prompt!r}", "{nothing}"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def check_examples(draw: Draw, task: str, examples: list[Example], tokenizer: Any) -> None:
    """There are some, all that is in them can be tokenised, and whatever is answered has a score in per cent."""
    assert examples
    for example in examples:
        assert (example.prompt or example.completion) and example.references
        for text in (example.prompt, example.completion, *example.references, *example.choices):
            text.encode("utf-8")
    try:
        encoded = encode_dataset(examples, tokenizer, max_length=512)
    except UserError as error:  # an answer that is too long
        assert str(error).isprintable() and "no supervised token" not in str(error)
    else:
        assert encoded.tokens.min() >= 0 and encoded.tokens.max() < NUM_TOKENIZER_TOKENS and encoded.longest <= 512
        assert all(encoded.supervised_of(index).argmax() > 0 for index in range(len(encoded)))
    answers = [
        Answer(draw.choice([*example.references, draw.text(20), ""]), example, tuple(-len(c) for c in example.choices))
        for example in examples
    ]
    try:
        scores = score_answers(get_task(task).metrics, answers, resamples=20)
    except UserError as error:
        assert str(error).isprintable()
        return
    for name, score in scores.items():
        for value in (score.value, score.low, score.high):
            assert 0 <= value <= 100 + 1e-9, f"{name} is {value}"  # sacrebleu rounds up to 100.00000000000004


@cases("rows")
def test_broken_rows(tokenizer: Any, area: Path, examples: int) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TOOLS
    tokenizers = (tokenizer, chat, None)

    def body(draw: Draw) -> object:
        task, suffix = draw.say(draw.choice(sorted(ROWS))), draw.say(draw.choice([".jsonl", ".json"]))
        file = area / f"rows{suffix}"
        rows = [draw.choice(CUSTOM)] * 2 if task == "custom" else ROWS[task]
        clear(file)
        write_rows(file, rows)
        match draw.randint(0, 9):
            case 0:
                odd_place(draw, file)
            case 1 | 2 | 3:
                file.write_bytes(damaged(draw, file.read_bytes()))
            case _ if suffix == ".json":
                file.write_bytes(json_text(changed_fields(draw, rows)))
            case _:
                file.write_bytes(b"\n".join(json_text(changed_fields(draw, row)) for row in rows))
        template = draw.choice(TEMPLATES)
        names = (str(file), "--prompt_template")
        found = outcome(
            lambda: load_split(
                task,
                "test",
                files={"test": file},
                seed=0,
                reading=Reading(template=template),
                tokenizer=draw.choice(tokenizers),
            ),
            unchanged=area,
            names=names,
        )
        if isinstance(found, list):
            check_examples(draw, task, found, tokenizers[0])
        outcome(lambda: load_split(task, "train", files={"train": file}, seed=0), unchanged=area, names=names)
        return found

    explore("rows", examples, body)


@cases("texts")
def test_broken_aligned_texts(tokenizer: Any, area: Path, examples: int) -> None:
    german, english = area / "a.de", area / "a.en"

    def body(draw: Draw) -> object:
        clear(german, english)
        german.write_bytes("Guten Tag.\nJa, schön.\nNein.\n".encode())
        english.write_bytes(b"Good day.\nYes, nice.\nNo.\n")
        broken = draw.choice([german, english])
        if draw.chance(0.2):
            odd_place(draw, broken)
        else:
            broken.write_bytes(damaged(draw, broken.read_bytes()))
        found = outcome(
            lambda: load_split("iwslt2017", "test", files={"test": f"{german},{english}"}, seed=0),
            unchanged=area,
            names=(str(german), str(english)),
        )
        if isinstance(found, list):
            check_examples(draw, "iwslt2017", found, tokenizer)
        return found

    explore("texts", examples, body)


@cases("parquet")
def test_a_broken_parquet_file(tokenizer: Any, area: Path, examples: int) -> None:
    file = area / "rows.parquet"

    def body(draw: Draw) -> object:
        task = draw.say(draw.choice(sorted(HUB_ROWS)))
        clear(file)
        rows = [dict(HUB_ROWS[task]) for _ in range(3)]
        kind = draw.say(draw.choice(["bytes", "bytes", "bytes", "column", "odd"]))
        if kind == "column":  # of another kind, in every row as parquet wants it
            name = draw.choice(sorted(rows[0]))
            value = draw.choice([None, 1, 0.5, True, "", "x", b"\xff", [], ["x"], {"x": 1}, "\x1b[2J"])
            draw.say(f"{name} = {value!a}")
            rows = [{**row, name: value} for row in rows]
        write_rows(file, rows)
        if kind == "bytes":
            file.write_bytes(damaged(draw, file.read_bytes()))
        elif kind == "odd":
            odd_place(draw, file)
        found = outcome(
            lambda: load_split(task, "test", files={"test": file}, seed=0), unchanged=area, names=(str(file),)
        )
        if isinstance(found, list):
            check_examples(draw, task, found, tokenizer)
        return found

    explore("parquet", examples, body)


@cases("cache")
def test_a_broken_cache_file_is_made_again(tokenizer: Any, area: Path, examples: int) -> None:
    rows = write_rows(area / "rows.jsonl", [{"prompt": f"{number} + 2 =", "completion": "4"} for number in range(5)])
    how = Encoding(get_task("custom"), tokenizer, Reading(), 64, frozenset([tokenizer.eos_token_id]), len(tokenizer))

    def tokens() -> Any:
        return tokenised_once(how, files={"train": rows}, seed=0, cache_dir=area / "cache").train

    expected = tokens()
    whole_files = {file: file.read_bytes() for file in (area / "cache" / "tokens").glob("*/*")}

    def body(draw: Draw) -> object:
        file, whole = draw.choice(sorted(whole_files.items()))
        draw.say(file.name)
        clear(file)
        file.write_bytes(whole)
        if draw.chance(0.2):
            odd_place(draw, file)
        else:
            file.write_bytes(broken_file(draw, file.name, whole) if file.suffix == ".json" else damaged(draw, whole))
        try:
            found = tokens()
        except UserError as error:
            assert str(error).isprintable() and str(file.parent) in str(error), error
            return error
        for name in ("tokens", "offsets", "supervised", "facts", "order"):
            assert getattr(found, name).tolist() == getattr(expected, name).tolist()
        assert type(found.truncated_prompts) is int
        return found

    explore("cache", examples, body, addresses=MAPPED)


# Made to harm, or failing late ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.de"])
@pytest.mark.timeout(30, method="thread")  # a wait inside of a library is ended by no signal
def test_a_pipe_is_not_waited_for(area: Path, name: str) -> None:
    os.mkfifo(area / name)
    given = f"{area / name},{area / name}.en" if name.endswith(".de") else str(area / name)
    load = partial(load_split, "iwslt2017", "test", files={"test": given}, seed=0)
    refused(area, load, name, said="is not a regular file")


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
    refused(area, lambda: load_tokenizer(folder), str(folder))
