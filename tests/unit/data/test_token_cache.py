"""The cache of tokenised data: its samples are those of the rows, it is read by nobody twice, and it is mapped. What it
does about broken rows, files and processes."""

from __future__ import annotations

import hashlib
import json
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.task_files import refusal, write_rows
from support.token_rows import WORDS, TokenStore, chats, check_same, rows
from support.zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.data import cache, encode, sources, tables
from megatron_tiedlora.data.cache import cache_key
from megatron_tiedlora.data.splits import Encoding
from megatron_tiedlora.data.task import Reading
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import load_tokenizer

# What is in it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 5])
def test_a_file_from_which_validation_rows_are_taken(store: TokenStore, processes: str, seed: int) -> None:
    found = store.check(write_rows(store.folder / "a.jsonl", rows(40)), seed=seed)
    assert (len(found.train), len(found.validation)) == (38, 2) and not found.chats and not found.mix
    assert len(list(store.tokens.glob("*/content.json"))) == 2


def test_several_files_with_weights(store: TokenStore, processes: str) -> None:
    a, b = write_rows(store.folder / "a.jsonl", rows(20)), write_rows(store.folder / "b.json", rows(7, first=50))
    given = f"{a}:0.25,{b}:0.75"
    found = store.check({"train": given, "validation": a})
    assert found.mix == (f"{a}: 20 rows make 20 samples, 1.00 of each", f"{b}: 7 rows make 60 samples, 8.57 of each")
    store.check(given)
    c, d = write_rows(store.folder / "c.jsonl", rows(20)), write_rows(store.folder / "d.json", rows(7, first=50))
    mix = store.start({"train": f"{c}:0.25,{d}:0.75", "validation": c}).mix
    assert [line.partition(":")[0] for line in mix] == [c, d], "a mix names the files that were given"


def test_the_hash_of_each_source(store: TokenStore) -> None:
    """A file's is the one that other programs tell. Of a pattern or folder it is one, whatever the number of files."""
    a, b = write_rows(store.folder / "a.jsonl", rows(20)), write_rows(store.folder / "b.json", rows(7, first=50))
    (store.folder / "all").mkdir()
    c, d = (write_rows(store.folder / f"all/{name}.jsonl", rows(9, first=20)) for name in "cd")
    found = store.start({"train": f"{a}:0.25,{b}:0.25,{store.folder}/all:0.5", "validation": c}).sources
    own = {name: hashlib.sha256(Path(name).read_bytes()) for name in (a, b, c, d)}
    both = hashlib.sha256(own[c].digest() + own[d].digest()).hexdigest()
    assert found == {**{name: own[name].hexdigest() for name in (a, b, c)}, f"{store.folder}/all": both}
    same, more = (store.start(files).sources for files in (a, {"train": a, "validation": a}))
    assert same == more == {a: own[a].hexdigest()}
    (train, validation) = store.start({}, store.encoding("demo", max_length=2000)).sources.items()  # splits of one name
    assert validation[0] == f"{train[0]} (validation)" and validation[1] != train[1]


def test_chats_that_lose_turns(store: TokenStore, processes: str) -> None:
    long, file = store.encoding(max_length=400), write_rows(store.folder / "a.jsonl", chats(30))
    found = store.check(file, store.encoding(max_length=26))
    assert found.chats and not found.unended and found.train.shortened_chats > 0 and found.train.lost_turns > 0
    assert store.check(file, long).train.prompt_lengths is None
    single = [row for row in chats(40) if len(row["messages"]) == 2]  # a block of them has nothing but last answers
    store.check({"train": write_rows(store.folder / "b.jsonl", [*single, *chats(9)]), "validation": file}, long)


def test_a_template_that_never_ends_an_answer_is_noticed(store: TokenStore, processes: str) -> None:
    never = replace(store.encoding(), end_ids=frozenset([store.tokenizer.bos_token_id]))
    assert store.start(write_rows(store.folder / "a.jsonl", chats(8)), never).unended
    assert not store.start(write_rows(store.folder / "b.jsonl", rows(8)), never).unended


def test_long_texts_become_several_samples(store: TokenStore, processes: str) -> None:
    texts, how = [{"text": " ".join(WORDS * (1 + number % 5))} for number in range(30)], store.encoding(max_length=16)
    a, b = write_rows(store.folder / "a.jsonl", texts), write_rows(store.folder / "b.jsonl", texts[:3])
    found = store.check(a, how)
    assert len(found.train) + len(found.validation) > 60
    store.check(f"{a}:0.5,{b}:0.5", how)


def test_rows_of_one_sample_stay_together(store: TokenStore, processes: str) -> None:
    merge_by, how = str(get_task("dialogsum").merge_by), store.encoding("dialogsum", max_length=200)
    talks: list[dict[str, Any]] = [
        {"dialogue": f"talk {number // 2}", "summary": WORDS[number % 10], merge_by: f"{number // 2}"}
        for number in range(40)
    ]
    file = write_rows(store.folder / "a.jsonl", talks)
    for files in ({"train": file}, {"train": file, "validation": file}):
        found = store.check(files, how)
    assert (len(found.train), len(found.validation)) == (40, 20)
    # Later references of a held-out sample may be longer than samples are.
    long = [{"dialogue": "talk", "summary": text, merge_by: "1"} for text in (WORDS[0], " ".join(WORDS * 30))]
    files = {"train": file, "validation": write_rows(store.folder / "v.jsonl", long)}
    assert len(store.start(files, how).validation) == 1


def test_aligned_texts(store: TokenStore, processes: str) -> None:
    """Other sentences in one of two files are other data, and a file's name decides how it is read."""
    how, german = store.encoding("iwslt2017", max_length=200), store.folder / "t.de"
    german.write_text("".join(f"Satz {number}\n" for number in range(25)))
    for word in ("sentence", "phrase"):
        (store.folder / "t.en").write_text("".join(f"{word} {number}\n" for number in range(25)))
        store.check(f"{german},{store.folder}/t.en", how)
    sizes = []
    for name in ("plain", "train.tags.de-en"):
        for language in ("de", "en"):
            lines = ["<url>http://a</url>", *(f"{language} {number}" for number in range(8))]
            (store.folder / f"{name}.{language}").write_text("\n".join(lines) + "\n")
        pair = f"{store.folder}/{name}.de,{store.folder}/{name}.en"
        sizes.append(len(store.start({"train": pair, "validation": pair}, how).train))
    assert sizes == [9, 8]


def test_a_prompt_template(store: TokenStore, processes: str) -> None:
    how = store.encoding(template="Q: {prompt}", max_length=400)
    found = store.check(write_rows(store.folder / "c.jsonl", rows(9)), how).train
    texts = [store.tokenizer.decode(found.sample(index), skip_special_tokens=True) for index in range(len(found))]
    assert all(text.startswith("Q: one") for text in texts)


def test_splits_of_one_folder_or_hub_id_are_not_confused(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the hub's are parts of one file."""
    import datasets

    parts = {"train": datasets.Dataset.from_list(rows(9)), "validation": datasets.Dataset.from_list(rows(4, first=50))}
    datasets.DatasetDict(parts).save_to_disk(str(store.folder / "saved"))
    datasets.Dataset.from_list(rows(13)).save_to_disk(str(store.folder / "whole"))
    whole = datasets.load_from_disk(str(store.folder / "whole"))
    assert whole.cache_files
    parts = {"train": whole.select(range(9)), "validation": whole.select(range(9, 13))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: parts[split])
    for found in (store.check(dict.fromkeys(parts, f"{store.folder}/saved")), store.start(dict.fromkeys(parts, "a/b"))):
        assert (len(found.train), len(found.validation)) == (9, 4)


def test_only_files_that_are_read_decide(store: TokenStore) -> None:
    folder = store.folder / "in"
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


def test_chunks_of_long_rows_are_small(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_BYTES", 4000)  # three rows, as Python objects
    sizes, original = [], cache.encoded_rows

    def counted(*arguments: Any) -> Iterator[Any]:
        for part in original(*arguments):
            sizes.append(int(part["facts"]["first"].sum()))
            yield part

    monkeypatch.setattr(cache, "encoded_rows", counted)
    long = [{"prompt": "x" * 1000, "completion": "y"}] * 9
    store.check(write_rows(store.folder / "a.jsonl", [*rows(4), *long]))
    assert sum(sizes) == 13 and max(sizes) < 9 and sizes[-2] == 3


# Reading it -------------------------------------------------------------------------------------------------------


def test_a_second_start_reads_no_rows_and_maps_the_files(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(store.folder / "a.jsonl", rows(40))
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


def test_the_key_covers_what_the_ids_depend_on(store: TokenStore) -> None:
    base = store.encoding()
    other = replace(store, tokenizer=load_tokenizer(write_zoo_tokenizer(store.folder / "other", template=CHATML)))
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


# Rows and files ---------------------------------------------------------------------------------------------------


def test_a_broken_row_is_one_line(store: TokenStore, processes: str) -> None:
    wrong = {"prompt": "x", "completion": 3}
    file = write_rows(store.folder / "a.jsonl", [*rows(10), wrong, *rows(10)])
    assert refusal(lambda: store.start(file)).startswith(f"{file}:11: field 'completion' is 3 (int)")
    assert not list(store.tokens.glob("*/")) and not list(store.tokens.glob(".writing-*"))
    write_rows(store.folder / "a.jsonl", [*rows(10), {"text": "x"}])
    message = refusal(lambda: store.start(file))
    assert message.startswith(f"{file}:11: the row has shape") and f"({file}:1)" in message


def test_parts_without_a_supervised_token_are_named(store: TokenStore) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    silent = write_rows(store.folder / "b.jsonl", [{"messages": turns}])
    files = {"train": write_rows(store.folder / "a.jsonl", rows(4)), "validation": silent}
    assert refusal(lambda: store.start(files, store.encoding(max_length=400))).startswith(silent)


def test_rows_that_cannot_be_passed_to_a_process(store: TokenStore) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    rows = [(0, 0, ({"x": 1}, "a.jsonl:1")), (0, 1, ({"x": deep}, "a.jsonl:3"))]
    message = refusal(lambda: list(encode._in_processes([rows], store.encoding())))
    assert message == "a.jsonl:1 to a.jsonl:3: a row has values that are nested too deeply; remove it"


def test_a_file_that_cannot_be_read_is_named(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(store.folder / "a.jsonl", rows(9))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", file)

    for module, name in ((tables, "names_and_contents"), (sources, "row_data")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, forbidden)
            assert refusal(lambda: store.start(file)) == f"{file}: cannot be read (Permission denied); check it"


def test_a_file_that_changes_while_it_is_read(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(write_rows(store.folder / "a.jsonl", rows(40)))
    original = cache.encoded_rows

    def changing(chunks: Any, how: Encoding) -> Iterator[Any]:
        for part in original(chunks, how):
            with file.open("a") as stream:
                stream.write(json.dumps(rows(1)[0]) + "\n")
            yield part

    monkeypatch.setattr(cache, "encoded_rows", changing)
    said = f"{file}: the data changed while it was read; try again with complete files"
    assert refusal(lambda: store.start(str(file))) == said


def test_a_cache_that_cannot_be_written_is_one_line(store: TokenStore) -> None:
    store.tokens.write_text("a file where the folder has to be")
    file = write_rows(store.folder / "a.jsonl", rows(4))
    assert str(store.folder) in refusal(lambda: store.start(file))


# Damage -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_written_again(store: TokenStore) -> None:
    file = write_rows(store.folder / "a.jsonl", rows(40))
    first = store.start(file)
    paths = sorted(store.tokens.glob("*/*"))
    assert len(paths) == 4 + 1 + 2 + 1
    for path in paths:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]):
            path.write_bytes(damaged)
            check_same(store.start(file).train, first.train)
            assert path.read_bytes() == whole or path.name == "content.json"
        path.unlink()
        os.mkfifo(path)
        check_same(store.start(file).validation, first.validation)


def test_a_whole_folder_is_never_replaced(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host that did not see another's lock, nor at first its folder."""
    file = write_rows(store.folder / "a.jsonl", rows(9))
    first = store.start(file)
    inodes = {path: path.stat().st_ino for path in store.tokens.rglob("*")}
    read, calls = cache.mapped_arrays, list[Path]()

    def late(path: Path, dtypes: Any) -> Any:
        calls.append(path)
        return None if calls.count(path) <= 2 else read(path, dtypes)  # the first look, and before writing

    monkeypatch.setattr(cache, "mapped_arrays", late)
    check_same(store.start(file).train, first.train)
    assert {path: path.stat().st_ino for path in store.tokens.rglob("*")} == inodes


FACTS = {"sha256": "0" * 64, "mix": ["x"], "first_row": 7, "chats": True, "unended": True}  # none of them is so


@pytest.mark.parametrize("field", FACTS)
@pytest.mark.parametrize("change", ["another value", "missing"])
def test_facts_have_a_checksum(store: TokenStore, field: str, change: str) -> None:
    data = write_rows(store.folder / "a.jsonl", rows(9))
    first, changed = store.start(data), 0
    for file in store.tokens.glob("*/content.json"):
        content = json.loads(file.read_text())
        if field in content["facts"]:
            assert content["facts"].pop(field) != FACTS[field]
            content["facts"] |= {field: FACTS[field]} if change == "another value" else {}
            file.write_text(json.dumps(content))
            changed += 1
    again = store.start(data)
    assert changed == 1 and all(getattr(again, name) == getattr(first, name) for name in FACTS)


@pytest.mark.parametrize("name", ["tokens", "facts", "train", "content.json"])
def test_sizes_are_compared_before_anything_is_read(
    store: TokenStore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = write_rows(store.folder / "a.jsonl", rows(9))
    first = store.start(data)
    for grown in store.tokens.glob(f"*/{name}"):
        os.truncate(grown, 2**40)
        hashed, original = [], cache.mapped_arrays.__globals__["file_sha256"]

        def watched(file: Path) -> str:
            assert file.stat().st_size < 2**30
            hashed.append(file.parent)  # noqa: B023
            return str(original(file))  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setitem(cache.mapped_arrays.__globals__, "file_sha256", watched)
            assert cache.mapped_arrays(grown.parent, cache._STORE if name != "train" else cache._SPLITS) is None
        assert not hashed
    check_same(store.start(data).train, first.train)


# Processes --------------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_is_one_line(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK", 3)
    monkeypatch.setattr(encode, "_FEW_CHUNKS", 0)
    file, parent = write_rows(store.folder / "a.jsonl", rows(40)), os.getpid()

    def killed(self: Any, chunk: Any) -> Any:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode.RowEncoder, "encode", killed)
    said = "a process that tokenises rows was killed; start the run again with more memory"
    assert refusal(lambda: store.start(file)) == said
    monkeypatch.setattr(encode.RowEncoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:  # a bug, with the place where it was found
        store.start(file)
    assert "encode.py" in str(error.value.__cause__)
    assert not multiprocessing.active_children()


def test_processes_that_cannot_be_started_are_one_line(store: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is started, and the second is not."""
    monkeypatch.setattr(encode, "_FEW_CHUNKS", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    fork, started = os.fork, []

    def limited() -> int:
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(fork())
        return started[0]

    monkeypatch.setattr(os, "fork", limited)
    message = refusal(lambda: store.start(write_rows(store.folder / "a.jsonl", rows(9))))
    assert message.startswith("cannot start a process to tokenise rows ([Errno 11] Resource temporarily")
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_a_process_that_may_start_none_tokenises_by_itself(
    store: TokenStore, processes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "daemon", True)  # as in a pool's workers
    store.check(write_rows(store.folder / "a.jsonl", rows(40)))
