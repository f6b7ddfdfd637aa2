"""The cache of tokenised data: its samples are those of the rows, it is read by nobody twice, and it is mapped."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_files import write_rows
from token_rows import WORDS, TokenStore, chats, check_same, rows
from zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.data import cache, encode
from megatron_tiedlora.data.cache import cache_key
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import load_tokenizer

# What is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_from_which_validation_rows_are_taken(
    store: TokenStore, tmp_path: Path, processes: str, seed: int
) -> None:
    found = store.check(write_rows(tmp_path / "a.jsonl", rows(40)), seed=seed)
    assert (len(found.train), len(found.validation)) == (38, 2) and not found.chats and not found.mix
    assert len(list(store.tokens.glob("*/content.json"))) == 2


def test_several_files_with_weights(store: TokenStore, tmp_path: Path, processes: str) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", rows(20)), write_rows(tmp_path / "b.json", rows(7, first=50))
    given = f"{a}:0.25,{b}:0.75"
    found = store.check({"train": given, "validation": a})
    assert found.mix == (f"{a}: 20 rows make 20 samples, 1.00 of each", f"{b}: 7 rows make 60 samples, 8.57 of each")
    store.check(given)
    c, d = write_rows(tmp_path / "c.jsonl", rows(20)), write_rows(tmp_path / "d.json", rows(7, first=50))
    mix = store.start({"train": f"{c}:0.25,{d}:0.75", "validation": c}).mix
    assert [line.partition(":")[0] for line in mix] == [c, d], "a mix names the files that were given"


def test_chats_that_lose_turns(store: TokenStore, tmp_path: Path, processes: str) -> None:
    long, file = store.encoding(max_length=400), write_rows(tmp_path / "a.jsonl", chats(30))
    found = store.check(file, store.encoding(max_length=26))
    assert found.chats and not found.unended and found.train.shortened_chats > 0 and found.train.lost_turns > 0
    assert store.check(file, long).train.prompt_lengths is None
    single = [row for row in chats(40) if len(row["messages"]) == 2]  # a block of them has nothing but last answers
    store.check({"train": write_rows(tmp_path / "b.jsonl", [*single, *chats(9)]), "validation": file}, long)


def test_a_template_that_never_ends_an_answer_is_noticed(store: TokenStore, tmp_path: Path, processes: str) -> None:
    never = replace(store.encoding(), end_ids=frozenset([store.tokenizer.bos_token_id]))
    assert store.start(write_rows(tmp_path / "a.jsonl", chats(8)), never).unended
    assert not store.start(write_rows(tmp_path / "b.jsonl", rows(8)), never).unended


def test_long_texts_become_several_samples(store: TokenStore, tmp_path: Path, processes: str) -> None:
    texts, how = [{"text": " ".join(WORDS * (1 + number % 5))} for number in range(30)], store.encoding(max_length=16)
    a, b = write_rows(tmp_path / "a.jsonl", texts), write_rows(tmp_path / "b.jsonl", texts[:3])
    found = store.check(a, how)
    assert len(found.train) + len(found.validation) > 60
    store.check(f"{a}:0.5,{b}:0.5", how)


def test_rows_of_one_sample_stay_together(store: TokenStore, tmp_path: Path, processes: str) -> None:
    merge_by, how = str(get_task("dialogsum").merge_by), store.encoding("dialogsum", max_length=200)
    talks: list[dict[str, Any]] = [
        {"dialogue": f"talk {number // 2}", "summary": WORDS[number % 10], merge_by: f"{number // 2}"}
        for number in range(40)
    ]
    file = write_rows(tmp_path / "a.jsonl", talks)
    for files in ({"train": file}, {"train": file, "validation": file}):
        found = store.check(files, how)
    assert (len(found.train), len(found.validation)) == (40, 20)
    # Later references of a held-out sample may be longer than samples are.
    long = [{"dialogue": "talk", "summary": text, merge_by: "1"} for text in (WORDS[0], " ".join(WORDS * 30))]
    assert len(store.start({"train": file, "validation": write_rows(tmp_path / "v.jsonl", long)}, how).validation) == 1


def test_aligned_texts(store: TokenStore, tmp_path: Path, processes: str) -> None:
    """Other sentences in one of two files are other data, and a file's name decides how it is read."""
    how, german = store.encoding("iwslt2017", max_length=200), tmp_path / "t.de"
    german.write_text("".join(f"Satz {number}\n" for number in range(25)))
    for word in ("sentence", "phrase"):
        (tmp_path / "t.en").write_text("".join(f"{word} {number}\n" for number in range(25)))
        store.check(f"{german},{tmp_path}/t.en", how)
    sizes = []
    for name in ("plain", "train.tags.de-en"):
        for language in ("de", "en"):
            lines = ["<url>http://a</url>", *(f"{language} {number}" for number in range(8))]
            (tmp_path / f"{name}.{language}").write_text("\n".join(lines) + "\n")
        pair = f"{tmp_path}/{name}.de,{tmp_path}/{name}.en"
        sizes.append(len(store.start({"train": pair, "validation": pair}, how).train))
    assert sizes == [9, 8]


def test_a_prompt_template(store: TokenStore, tmp_path: Path, processes: str) -> None:
    files, template = {"train": write_rows(tmp_path / "c.jsonl", rows(9))}, "Q: {prompt}"
    samples = load_split("custom", "train", files=files, seed=3, reading=Reading(template=template))
    found = store.start(files, store.encoding(template=template, max_length=400), seed=3).train
    texts = [store.tokenizer.decode(found.sample(index), skip_special_tokens=True) for index in range(len(found))]
    assert all(text.startswith(sample.prompt) for text, sample in zip(texts, samples, strict=True))


def test_splits_of_one_folder_or_hub_id_are_not_confused(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the hub's are parts of one file."""
    import datasets

    parts = {"train": datasets.Dataset.from_list(rows(9)), "validation": datasets.Dataset.from_list(rows(4, first=50))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows(13)).save_to_disk(str(tmp_path / "whole"))
    whole = datasets.load_from_disk(str(tmp_path / "whole"))
    assert whole.cache_files
    parts = {"train": whole.select(range(9)), "validation": whole.select(range(9, 13))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: parts[split])
    for found in (
        store.check(dict.fromkeys(parts, f"{tmp_path}/saved")),
        store.start(dict.fromkeys(parts, "a/b")),
    ):
        assert (len(found.train), len(found.validation)) == (9, 4)


def test_only_files_that_are_read_decide(store: TokenStore, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "runs").mkdir(parents=True)
    files = {"train": str(folder), "validation": write_rows(folder / "a.jsonl", rows(9))}
    first, num_folders = store.start(files), len(list(store.tokens.glob("*/")))
    (folder / "runs" / "metrics.jsonl").write_text("{}")
    (folder / "notes.bin").write_bytes(b"x")
    (folder / "notes.bin").chmod(0)
    check_same(store.start(files).train, first.train)
    assert len(list(store.tokens.glob("*/"))) == num_folders
    write_rows(folder / "a.jsonl", rows(8))
    assert len(store.start(files).train) == 8


def test_chunks_of_long_rows_are_small(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_BYTES", 3000)
    sizes, original = [], cache.encoded_rows

    def counted(*arguments: Any) -> Iterator[Any]:
        for part in original(*arguments):
            sizes.append(int(part["facts"]["first"].sum()))
            yield part

    monkeypatch.setattr(cache, "encoded_rows", counted)
    long = [{"prompt": "x" * 1000, "completion": "y"}] * 9
    store.check(write_rows(tmp_path / "a.jsonl", [*rows(4), *long]))
    assert sum(sizes) == 13 and max(sizes) < 9 and sizes[-2] == 3


# Reading it -------------------------------------------------------------------------------------------------------


def test_a_second_start_reads_no_rows_and_maps_the_files(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows(40))
    first, made = store.start(file), []
    assert not list(store.tokens.glob(".writing-*"))
    monkeypatch.setattr(cache, "encoded_rows", lambda *_: pytest.fail("tokenised twice"))
    monkeypatch.setattr(cache, "_write_splits", lambda path, *_, **__: made.append(path))
    again = store.start(file)
    check_same(again.train, first.train)
    assert again.sha256 == first.sha256 and again.first_row == first.first_row
    for array in (again.train.tokens, again.train.supervised, again.train.offsets, again.train.order):
        assert array is not None and _is_mapped(array)
    with pytest.raises(UserError, match="was damaged right after"):  # another seed shares the rows
        store.start(file, seed=4)
    assert len(made) == 1


def _is_mapped(array: np.ndarray[Any, Any]) -> bool:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = getattr(base, "base", None)
    return base is not None and not array.flags.writeable


CHANGES: list[dict[str, Any]] = [
    {"columns": {"prompt": "query"}},
    {"columns": {"prompt": "question"}},
    {"train_on": "last_turn"},
    {"add_bos": "true"},
    {"special_tokens": "plain"},
]


def test_the_key_covers_what_the_ids_depend_on(store: TokenStore, tmp_path: Path) -> None:
    base = store.encoding()
    other = replace(store, tokenizer=load_tokenizer(write_zoo_tokenizer(tmp_path / "other", template=CHATML)))
    assert cache_key(base, "x") == cache_key(other.encoding(), "x")
    other.tokenizer.chat_template = "{{ messages }}"
    others = [
        cache_key(base, "y"),
        cache_key(other.encoding(), "x"),
        cache_key(store.encoding("gsm8k"), "x"),
        cache_key(store.encoding(max_length=41), "x"),
        *(cache_key(store.encoding(template=template), "x") for template in ("{prompt}", "Q: {prompt}")),
        cache_key(replace(base, end_ids=frozenset([1, 2])), "x"),
        *(cache_key(replace(base, reading=replace(base.reading, **change)), "x") for change in CHANGES),
    ]
    assert len({cache_key(base, "x"), *others}) == len(others) + 1
    # The chat template's text is a part of the tokenizer's, another --prompt_template is another key, and only what is
    # trained on is stored.
    names = {name for change in CHANGES for name in change} | {"chat_template", "template", "trains"}
    assert names == set(Reading.__dataclass_fields__), "every choice of the user is in the key"
