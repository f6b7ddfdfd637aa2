"""The cache of tokenised data: its samples are those of the rows, it is read by nobody twice, and it is mapped."""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_files import refusal, write_rows
from zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data import cache, encode_rows, token_dataset
from megatron_tiedlora.data.cache import TrainingData, cache_key, tokenised_once
from megatron_tiedlora.data.encode import encode_dataset
from megatron_tiedlora.data.encode_rows import Encoding
from megatron_tiedlora.data.example_maker import with_template
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.data.tokenizer import load_tokenizer

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(write_zoo_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=CHATML))


@pytest.fixture(params=["one process", "several"])
def processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Chunks of three rows, encoded by this process or by others; totals and hashes by blocks of seven samples."""
    monkeypatch.setattr(token_dataset, "_BLOCK", 7)
    monkeypatch.setattr(cache, "_BLOCK", 5)
    monkeypatch.setattr(cache, "CHUNK", 3)
    monkeypatch.setattr(encode_rows, "_FEW_CHUNKS", 10**6 if request.param == "one process" else 0)
    return str(request.param)


def rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": " ".join(WORDS[: 1 + number % 10]) + f" {number}", "completion": " ".join(WORDS[number % 7 :])}
        for number in range(first, first + count)
    ]


def chats(count: int) -> list[dict[str, Any]]:
    def turns(number: int) -> list[dict[str, Any]]:
        return [
            {"role": role, "content": WORDS[(number + index) % 10]}
            for index in range(1 + number % 4)
            for role in ("user", "assistant")
        ]

    return [{"messages": turns(number)} for number in range(count)]


def encoding(tokenizer: Any, task: str = "custom", *, max_length: int = 40, template: str | None = None) -> Encoding:
    reading, checked = with_template(Reading(), template)
    ends = frozenset([tokenizer.eos_token_id])
    return Encoding(get_task(task), tokenizer, reading, checked, max_length, ends)


def expected(how: Encoding, files: Mapping[str, str], seed: int) -> dict[str, TokenDataset]:
    """The same from lists of samples, in this process."""
    return {
        split: encode_dataset(
            load_split(how.task, split, files=files, seed=seed, tokenizer=how.tokenizer, reading=how.reading),
            how.tokenizer,
            max_length=how.max_length,
            reading=how.reading,
        )
        for split in ("train", "validation")
    }


def check_same(found: TokenDataset, right: TokenDataset) -> None:
    assert len(found) == len(right) > 0
    for index in range(len(right)):
        assert found.sample(index).tolist() == right.sample(index).tolist()
        assert found.supervised_of(index).tolist() == right.supervised_of(index).tolist()
    assert found.lengths.tolist() == right.lengths.tolist()
    assert found.num_supervised_of(slice(None)).tolist() == right.num_supervised_of(slice(None)).tolist()
    for name in ("num_tokens", "num_supervised", "longest", "truncated_prompts", "shortened_chats", "lost_turns"):
        assert getattr(found, name) == getattr(right, name), name
    prompts, of_right = found.prompt_lengths, right.prompt_lengths
    assert (prompts is None) == (of_right is None)
    assert prompts is None or of_right is None or prompts.tolist() == of_right.tolist()


def sha256_of_arrays(parts: Mapping[str, TokenDataset]) -> str:
    """As version 0.1 hashed the arrays of both parts."""
    digest = hashlib.sha256()
    for part in parts.values():
        prompts = part.prompt_lengths
        for array in (part.tokens, part.offsets, part.supervised if prompts is None else prompts):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check(how: Encoding, files: Mapping[str, str], folder: Path, *, seed: int = 3) -> TrainingData:
    found = tokenised_once(how, files=files, seed=seed, cache_dir=folder)
    right = expected(how, files, seed)
    check_same(found.train, right["train"])
    check_same(found.validation, right["validation"])
    assert found.sha256 == sha256_of_arrays(right)
    first = load_split(how.task, "train", files=files, seed=seed, reading=how.reading)[0]
    order = load_split(how.task, "train", files={**files, "validation": files["train"]}, seed=seed, reading=how.reading)
    assert order[found.first_row].prompt == first.prompt
    return found


# What is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_from_which_validation_rows_are_taken(tokenizer: Any, tmp_path: Path, processes: str, seed: int) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(40))}
    found = check(encoding(tokenizer), files, tmp_path, seed=seed)
    assert (len(found.train), len(found.validation)) == (38, 2) and not found.chats and not found.mix
    assert len(list((tmp_path / "tokens").glob("*/content.json"))) == 2


def test_several_files_with_weights(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows(20)), write_rows(tmp_path / "b.json", rows(7, first=50))
    given = f"{a}:0.25,{b}:0.75"
    found = check(encoding(tokenizer), {"train": given, "validation": a}, tmp_path)
    assert found.mix == (f"{a}: 20 rows make 20 samples, 1.00 of each", f"{b}: 7 rows make 60 samples, 8.57 of each")
    check(encoding(tokenizer), {"train": given}, tmp_path)


def test_chats_that_lose_turns(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", chats(30))}
    found = check(encoding(tokenizer, max_length=26), files, tmp_path)
    assert found.chats and not found.unended and found.train.shortened_chats > 0 and found.train.lost_turns > 0
    assert check(encoding(tokenizer, max_length=400), files, tmp_path).train.prompt_lengths is None
    single = [row for row in chats(40) if len(row["messages"]) == 2]  # a block of them has nothing but last answers
    files = {"train": write_rows(tmp_path / "b.jsonl", [*single, *chats(9)]), "validation": files["train"]}
    check(encoding(tokenizer, max_length=400), files, tmp_path)


def test_long_texts_become_several_samples(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    texts = [{"text": " ".join(WORDS * (1 + number % 5))} for number in range(30)]
    found = check(encoding(tokenizer, max_length=16), {"train": write_rows(tmp_path / "a.jsonl", texts)}, tmp_path)
    assert len(found.train) + len(found.validation) > 60
    a = write_rows(tmp_path / "b.jsonl", texts[:3])
    check(encoding(tokenizer, max_length=16), {"train": f"{tmp_path}/a.jsonl:0.5,{a}:0.5"}, tmp_path)


def test_rows_of_one_sample_stay_together(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    talks = [{"dialogue": f"talk {number // 2}", "summary": WORDS[number % 10]} for number in range(40)]
    merge_by = get_task("dialogsum").merge_by
    assert merge_by is not None
    talks = [{**row, merge_by: f"{number // 2}"} for number, row in enumerate(talks)]
    how = replace(encoding(tokenizer, "dialogsum", max_length=200))
    file = write_rows(tmp_path / "a.jsonl", talks)
    for files in ({"train": file}, {"train": file, "validation": file}):
        found = check(how, files, tmp_path)
    assert (len(found.train), len(found.validation)) == (40, 20)


def test_aligned_texts_and_a_prompt_template(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    (tmp_path / "t.de").write_text("".join(f"Satz {number}\n" for number in range(25)))
    (tmp_path / "t.en").write_text("".join(f"sentence {number}\n" for number in range(25)))
    files = {"train": f"{tmp_path}/t.de,{tmp_path}/t.en"}
    check(encoding(tokenizer, "iwslt2017", max_length=200), files, tmp_path)
    (tmp_path / "t.en").write_text("".join(f"phrase {number}\n" for number in range(25)))
    check(encoding(tokenizer, "iwslt2017", max_length=200), files, tmp_path)
    with_own = encoding(tokenizer, template="Q: {prompt}", max_length=400)
    files = {"train": write_rows(tmp_path / "c.jsonl", rows(9))}
    samples = load_split("custom", "train", files=files, seed=3, prompt_template="Q: {prompt}")
    found = tokenised_once(with_own, files=files, seed=3, cache_dir=tmp_path)
    texts = [tokenizer.decode(found.train.sample(index), skip_special_tokens=True) for index in range(len(found.train))]
    assert all(text.startswith(sample.prompt) for text, sample in zip(texts, samples, strict=True))


def test_a_template_that_never_ends_an_answer_is_noticed(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", chats(8))}
    never = replace(encoding(tokenizer), end_ids=frozenset([tokenizer.bos_token_id]))
    assert tokenised_once(never, files=files, seed=0, cache_dir=tmp_path).unended
    plain = {"train": write_rows(tmp_path / "b.jsonl", rows(8))}
    assert not tokenised_once(never, files=plain, seed=0, cache_dir=tmp_path).unended


# Reading it -------------------------------------------------------------------------------------------------------


def test_a_second_start_reads_no_rows_and_maps_the_files(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how, files = encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", rows(40))}
    first = tokenised_once(how, files=files, seed=3, cache_dir=tmp_path)
    assert not list((tmp_path / "tokens").glob(".writing-*"))
    made = []
    monkeypatch.setattr(cache, "encoded_rows", lambda *_: pytest.fail("tokenised twice"))
    monkeypatch.setattr(cache, "_write_splits", lambda path, **_: made.append(path))
    again = tokenised_once(how, files=files, seed=3, cache_dir=tmp_path)
    check_same(again.train, first.train)
    assert again.sha256 == first.sha256 and again.first_row == first.first_row
    for array in (again.train.tokens, again.train.supervised, again.train.offsets, again.train.order):
        assert array is not None and _is_mapped(array)
    with pytest.raises(UserError, match="was damaged right after"):  # another seed shares the rows
        tokenised_once(how, files=files, seed=4, cache_dir=tmp_path)
    assert len(made) == 1


def _is_mapped(array: np.ndarray[Any, Any]) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base is not None and not array.flags.writeable


def test_damaged_files_are_written_again(tokenizer: Any, tmp_path: Path) -> None:
    how, files = encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", rows(40))}

    def tokens() -> TrainingData:
        return tokenised_once(how, files=files, seed=3, cache_dir=tmp_path)

    first = tokens()
    paths = sorted((tmp_path / "tokens").glob("*/*"))
    assert len(paths) == 5 + 1 + 2 + 1
    for path in paths:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
            path.write_bytes(damaged)
            check_same(tokens().train, first.train)
            assert path.read_bytes() == whole or path.name == "content.json"
        path.unlink()
        os.mkfifo(path)
        check_same(tokens().validation, first.validation)


def test_the_key_covers_what_the_ids_depend_on(tokenizer: Any, tmp_path: Path) -> None:
    base = encoding(tokenizer)
    other_tokenizer = load_tokenizer(write_zoo_tokenizer(tmp_path / "other", template=CHATML))
    assert cache_key(base, "x") == cache_key(encoding(other_tokenizer), "x")
    other_tokenizer.chat_template = "{{ messages }}"
    others = [
        cache_key(base, "y"),
        cache_key(encoding(other_tokenizer), "x"),
        cache_key(encoding(tokenizer, "gsm8k"), "x"),
        cache_key(encoding(tokenizer, max_length=41), "x"),
        cache_key(encoding(tokenizer, template="{prompt}"), "x"),
        cache_key(replace(base, end_ids=frozenset([1, 2])), "x"),
        *(cache_key(replace(base, reading=replace(base.reading, **change)), "x") for change in CHANGES),
    ]
    assert len({cache_key(base, "x"), *others}) == len(others) + 1


CHANGES: list[dict[str, Any]] = [
    {"columns": {"prompt": "query"}},
    {"columns": {"prompt": "question"}},
    {"train_on": "last_turn"},
    {"add_bos": "true"},
    {"special_tokens": "plain"},
    {"first_rules": True},
]


def test_every_choice_of_the_user_is_in_the_key() -> None:
    names = {name for change in CHANGES for name in change}
    # The template's text is a part of the tokenizer's, the fields it names are those of --prompt_template, and only
    # what is trained on is stored.
    assert names | {"chat_template", "template_fields", "trains"} == set(Reading.__dataclass_fields__)


# Faults -----------------------------------------------------------------------------------------------------------


def test_a_broken_row_is_one_line(tokenizer: Any, tmp_path: Path, processes: str) -> None:
    broken = [*rows(10), {"prompt": "x", "completion": 3}, *rows(10)]
    files = {"train": write_rows(tmp_path / "a.jsonl", broken)}
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path))
    assert message.startswith(f"{tmp_path}/a.jsonl:11: field 'completion' is 3 (int)")
    assert not list((tmp_path / "tokens").glob("*/")) and not list((tmp_path / "tokens").glob(".writing-*"))
    mixed = [*rows(10), {"text": "x"}]
    files = {"train": write_rows(tmp_path / "a.jsonl", mixed)}
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path))
    assert message.startswith(f"{tmp_path}/a.jsonl:11: a row of shape") and f"({tmp_path}/a.jsonl:1)" in message


def test_a_file_that_changes_while_it_is_read(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write_rows(tmp_path / "a.jsonl", rows(40)))
    original = cache.encoded_rows

    def changing(chunks: Any, how: Encoding) -> Iterator[Any]:
        for part in original(chunks, how):
            with file.open("a") as stream:
                stream.write(json.dumps(rows(1)[0]) + "\n")
            yield part

    monkeypatch.setattr(cache, "encoded_rows", changing)
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files={"train": file}, seed=0, cache_dir=tmp_path))
    assert message == f"{file}: changed while it was read; start again when it is complete"


def test_a_cache_that_cannot_be_written_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(4))}
    (tmp_path / "tokens").write_text("a file where the folder has to be")
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path))
    assert str(tmp_path) in message


def test_parts_without_a_supervised_token_are_named(tokenizer: Any, tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows(4)), write_rows(tmp_path / "b.jsonl", chats(4))
    nothing = replace(encoding(tokenizer), max_length=400)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    write_rows(tmp_path / "b.jsonl", [{"messages": turns}])
    files = {"train": a, "validation": b}
    message = refusal(lambda: tokenised_once(nothing, files=files, seed=0, cache_dir=tmp_path))
    assert message.startswith(b), message


def test_a_process_that_is_killed_is_one_line(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "CHUNK", 3)
    monkeypatch.setattr(encode_rows, "_FEW_CHUNKS", 0)
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(40))}
    parent = os.getpid()

    def killed(self: Any, chunk: Any) -> Any:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode_rows.RowEncoder, "encode", killed)
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path))
    assert message == "a process that tokenises rows ended (-9); start again with more memory"
    monkeypatch.setattr(encode_rows.RowEncoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path)
    assert not multiprocessing.active_children()


def _tokenise_in_process(folder: str, file: str, cache_dir: str, results: Any) -> None:
    original = cache.encoded_rows

    def slow(*arguments: Any) -> Iterator[Any]:
        (Path(cache_dir) / f"made-{time.monotonic_ns()}").touch()
        time.sleep(1.0)  # long enough for the others to arrive
        return original(*arguments)

    cache.encoded_rows = slow
    found = tokenised_once(encoding(load_tokenizer(folder)), files={"train": file}, seed=0, cache_dir=cache_dir)
    results.put(found.train.sample(0).tolist())


def test_one_of_several_processes_tokenises(tmp_path: Path) -> None:
    folder = write_zoo_tokenizer(tmp_path / "tokenizer", template=CHATML)
    file = write_rows(tmp_path / "a.jsonl", rows(4))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (str(folder), str(file), str(tmp_path), results)
    processes = [context.Process(target=_tokenise_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=30)
        assert process.exitcode == 0
    assert outcomes[0] == outcomes[1] and len(list(tmp_path.glob("made-*"))) == 1
