"""What the cache of tokenised data does about broken rows, files and processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from task_files import refusal, write_rows
from token_rows import TokenStore, check_same, rows

from megatron_tiedlora.data import cache, encode, readers, sources
from megatron_tiedlora.data.encode import Encoding

# Rows and files ---------------------------------------------------------------------------------------------------


def test_a_broken_row_is_one_line(store: TokenStore, tmp_path: Path, processes: str) -> None:
    wrong = {"prompt": "x", "completion": 3}
    file = write_rows(tmp_path / "a.jsonl", [*rows(10), wrong, *rows(10)])
    assert refusal(lambda: store.start(file)).startswith(f"{file}:11: field 'completion' is 3 (int)")
    assert not list(store.tokens.glob("*/")) and not list(store.tokens.glob(".writing-*"))
    write_rows(tmp_path / "a.jsonl", [*rows(10), {"text": "x"}])
    message = refusal(lambda: store.start(file))
    assert message.startswith(f"{file}:11: a row of shape") and f"({file}:1)" in message


def test_parts_without_a_supervised_token_are_named(store: TokenStore, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    silent = write_rows(tmp_path / "b.jsonl", [{"messages": turns}])
    files = {"train": write_rows(tmp_path / "a.jsonl", rows(4)), "validation": silent}
    assert refusal(lambda: store.start(files, store.encoding(max_length=400))).startswith(silent)


def test_rows_that_cannot_be_passed_to_a_process(store: TokenStore) -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    rows = [(0, 0, ({"x": 1}, "a.jsonl:1")), (0, 1, ({"x": deep}, "a.jsonl:3"))]
    message = refusal(lambda: list(encode._in_processes([rows], store.encoding())))
    assert message == "a.jsonl:1 to a.jsonl:3: a row has values that are nested too deeply; remove it"


def test_a_file_that_cannot_be_read_is_named(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows(9))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", file)

    for module, name in ((readers, "names_and_contents"), (sources, "row_data")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, forbidden)
            assert refusal(lambda: store.start(file)) == f"{file}: cannot be read (Permission denied)"


def test_a_file_that_changes_while_it_is_read(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write_rows(tmp_path / "a.jsonl", rows(40)))
    original = cache.encoded_rows

    def changing(chunks: Any, how: Encoding) -> Iterator[Any]:
        for part in original(chunks, how):
            with file.open("a") as stream:
                stream.write(json.dumps(rows(1)[0]) + "\n")
            yield part

    monkeypatch.setattr(cache, "encoded_rows", changing)
    said = f"{file}: changed while it was read; start again when it is complete"
    assert refusal(lambda: store.start(str(file))) == said


def test_a_cache_that_cannot_be_written_is_one_line(store: TokenStore, tmp_path: Path) -> None:
    store.tokens.write_text("a file where the folder has to be")
    file = write_rows(tmp_path / "a.jsonl", rows(4))
    assert str(tmp_path) in refusal(lambda: store.start(file))


# Damage -----------------------------------------------------------------------------------------------------------


def test_damaged_files_are_written_again(store: TokenStore, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", rows(40))
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


def test_a_whole_folder_is_never_replaced(store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a host that did not see another's lock, nor at first its folder."""
    file = write_rows(tmp_path / "a.jsonl", rows(9))
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
def test_facts_have_a_checksum(store: TokenStore, tmp_path: Path, field: str, change: str) -> None:
    data = write_rows(tmp_path / "a.jsonl", rows(9))
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
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    data = write_rows(tmp_path / "a.jsonl", rows(9))
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


def test_a_process_that_is_killed_is_one_line(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK", 3)
    monkeypatch.setattr(encode, "_FEW_CHUNKS", 0)
    file, parent = write_rows(tmp_path / "a.jsonl", rows(40)), os.getpid()

    def killed(self: Any, chunk: Any) -> Any:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(encode.RowEncoder, "encode", killed)
    said = "a process that tokenises rows was ended; start again with more memory"
    assert refusal(lambda: store.start(file)) == said
    monkeypatch.setattr(encode.RowEncoder, "encode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as error:  # a bug, with the place where it was found
        store.start(file)
    assert "encode.py" in str(error.value.__cause__)
    assert not multiprocessing.active_children()


def test_processes_that_cannot_be_started_are_one_line(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    message = refusal(lambda: store.start(write_rows(tmp_path / "a.jsonl", rows(9))))
    assert message.startswith("no process to tokenise rows can be started ([Errno 11] Resource temporarily")
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_a_process_that_may_start_none_tokenises_by_itself(
    store: TokenStore, tmp_path: Path, processes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "daemon", True)  # as in a pool's workers
    store.check(write_rows(tmp_path / "a.jsonl", rows(40)))
