"""What the cache of tokenised data reads, and what it does about broken rows, files and processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from task_files import refusal, write_rows
from token_rows import WORDS, chats, check, check_same, encoding, rows
from zoo_oracle import CHATML, write_zoo_tokenizer

from megatron_tiedlora.data import cache, encode, readers, sources
from megatron_tiedlora.data.cache import tokenised_once
from megatron_tiedlora.data.encode import Encoding
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import load_tokenizer

# What is read -----------------------------------------------------------------------------------------------------


def test_splits_of_one_folder_are_not_confused(tokenizer: Any, tmp_path: Path) -> None:
    import datasets

    parts = {"train": datasets.Dataset.from_list(rows(9)), "validation": datasets.Dataset.from_list(rows(4, first=50))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    files = {"train": f"{tmp_path}/saved", "validation": f"{tmp_path}/saved"}
    found = check(encoding(tokenizer), files, tmp_path)
    assert (len(found.train), len(found.validation)) == (9, 4)


def test_splits_of_the_hub_in_one_file_are_not_confused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    datasets.Dataset.from_list(rows(13)).save_to_disk(str(tmp_path / "saved"))
    whole = datasets.load_from_disk(str(tmp_path / "saved"))
    assert whole.cache_files
    parts = {"train": whole.select(range(9)), "validation": whole.select(range(9, 13))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, *, split: parts[split])
    found = tokenised_once(
        encoding(tokenizer), files={"train": "a/b", "validation": "a/b"}, seed=0, cache_dir=tmp_path
    )
    assert (len(found.train), len(found.validation)) == (9, 4)


def test_only_files_that_are_read_decide(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "runs").mkdir(parents=True)
    write_rows(folder / "a.jsonl", rows(9))
    how, files = encoding(tokenizer), {"train": str(folder), "validation": f"{folder}/a.jsonl"}
    first = tokenised_once(how, files=files, seed=0, cache_dir=tmp_path)
    num_folders = len(list((tmp_path / "tokens").glob("*/")))
    (folder / "runs" / "metrics.jsonl").write_text("{}")
    (folder / "notes.bin").write_bytes(b"x")
    (folder / "notes.bin").chmod(0)
    check_same(tokenised_once(how, files=files, seed=0, cache_dir=tmp_path).train, first.train)
    assert len(list((tmp_path / "tokens").glob("*/"))) == num_folders
    write_rows(folder / "a.jsonl", rows(8))
    assert len(tokenised_once(how, files=files, seed=0, cache_dir=tmp_path).train) == 8


def test_a_file_s_name_decides_how_it_is_read(tokenizer: Any, tmp_path: Path) -> None:
    for name in ("plain", "train.tags.de-en"):
        for language in ("de", "en"):
            lines = ["<url>http://a</url>", *(f"{language} {number}" for number in range(8))]
            (tmp_path / f"{name}.{language}").write_text("\n".join(lines) + "\n")
    sizes = []
    for name in ("plain", "train.tags.de-en"):
        pair = f"{tmp_path}/{name}.de,{tmp_path}/{name}.en"
        found = tokenised_once(
            encoding(tokenizer, "iwslt2017", max_length=200),
            files={"train": pair, "validation": pair},
            seed=0,
            cache_dir=tmp_path,
        )
        sizes.append(len(found.train))
    assert sizes == [9, 8]


def test_a_mix_names_the_files_that_were_given(tokenizer: Any, tmp_path: Path) -> None:
    for names in (("a", "b"), ("x", "y")):
        given = ",".join(f"{write_rows(tmp_path / f'{name}.jsonl', rows(4))}:0.5" for name in names)
        files = {"train": given, "validation": f"{tmp_path}/{names[0]}.jsonl"}
        mix = tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path).mix
        assert [line.partition(".jsonl")[0] for line in mix] == [f"{tmp_path}/{name}" for name in names]


def test_later_references_of_a_held_out_sample_may_be_long(tokenizer: Any, tmp_path: Path) -> None:
    talks = [{"dialogue": "talk", "summary": WORDS[0]}, {"dialogue": "talk", "summary": " ".join(WORDS * 30)}]
    merge_by = get_task("dialogsum").merge_by
    file = write_rows(tmp_path / "v.jsonl", [{**row, merge_by: "1"} for row in talks])
    train = write_rows(tmp_path / "a.jsonl", talks[:1])
    how = encoding(tokenizer, "dialogsum", max_length=200)
    found = tokenised_once(how, files={"train": train, "validation": file}, seed=0, cache_dir=tmp_path)
    assert len(found.validation) == 1


def test_chunks_of_long_rows_are_small(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_BYTES", 3000)
    sizes, original = [], cache.encoded_rows

    def counted(*arguments: Any) -> Iterator[Any]:
        for part in original(*arguments):
            sizes.append(int(part["facts"]["first"].sum()))
            yield part

    monkeypatch.setattr(cache, "encoded_rows", counted)
    long = [{"prompt": "x" * 1000, "completion": "y"}] * 9
    check(encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", [*rows(4), *long])}, tmp_path)
    assert sum(sizes) == 13 and max(sizes) < 9 and sizes[-2] == 3


# Faults -----------------------------------------------------------------------------------------------------------


def test_a_whole_folder_is_never_replaced(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host that did not see another's lock, nor at first its folder."""
    how, files = encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", rows(9))}
    first = tokenised_once(how, files=files, seed=0, cache_dir=tmp_path)
    inodes = {path: path.stat().st_ino for path in (tmp_path / "tokens").rglob("*")}
    read, calls = cache.mapped_arrays, []

    def late(path: Path, dtypes: Any) -> Any:
        calls.append(path)
        return None if calls.count(path) <= 2 else read(path, dtypes)  # the first look, and before writing

    monkeypatch.setattr(cache, "mapped_arrays", late)
    check_same(tokenised_once(how, files=files, seed=0, cache_dir=tmp_path).train, first.train)
    assert {path: path.stat().st_ino for path in (tmp_path / "tokens").rglob("*")} == inodes


def test_rows_that_cannot_be_passed_to_a_process(tokenizer: Any) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    rows = [(0, 0, ({"x": 1}, "a.jsonl:1")), (0, 1, ({"x": deep}, "a.jsonl:3"))]
    message = refusal(lambda: list(encode._in_processes([rows], encoding(tokenizer))))
    assert message == "a.jsonl:1 to a.jsonl:3: a row has values that are nested too deeply; remove it"


def test_a_file_that_cannot_be_read_is_named(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows(9))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", file)

    for module, name in ((readers, "names_and_contents"), (sources, "row_data")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, forbidden)
            message = refusal(
                lambda: tokenised_once(encoding(tokenizer), files={"train": file}, seed=0, cache_dir=tmp_path)
            )
        assert message == f"{file}: cannot be read (Permission denied)"


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
    monkeypatch.setattr(encode, "CHUNK", 3)
    monkeypatch.setattr(encode, "_FEW_CHUNKS", 0)
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(40))}
    parent = os.getpid()

    def killed(self: Any, chunk: Any) -> Any:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode.RowEncoder, "encode", killed)
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path))
    assert message == "a process that tokenises rows was ended; start again with more memory"
    monkeypatch.setattr(encode.RowEncoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:  # a bug, with the place where it was found
        tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path)
    assert "encode.py" in str(error.value.__cause__)
    assert not multiprocessing.active_children()


def test_processes_that_cannot_be_started_are_one_line(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(9))}
    message = refusal(lambda: tokenised_once(encoding(tokenizer), files=files, seed=0, cache_dir=tmp_path))
    assert message.startswith("no process to tokenise rows can be started ([Errno 11] Resource temporarily")
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_a_process_that_may_start_none_tokenises_by_itself(
    tokenizer: Any, tmp_path: Path, processes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "daemon", True)  # as in a pool's workers
    check(encoding(tokenizer), {"train": write_rows(tmp_path / "a.jsonl", rows(40))}, tmp_path)


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
