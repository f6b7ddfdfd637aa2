"""The files of a merged folder are the base's own, but for the values that the adapter changes; and what of it is
written when a merge is ended or goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import with_adapter
from oracle import OracleConfig, delta_weights, load_weights, merged_weights
from run_files import files_of
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model
from wide_models import anonymous_bytes, write_wide_adapter, write_wide_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.convert import merged_file, merged_rows
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.merge_journal import JOURNAL
from megatron_tiedlora.convert.merged_file import MergedFile

INDEX = "model.safetensors.index.json"
STEPS, SCALE = "model.steps", "model.scale"  # tensors that are no weights of the model: five integers, three numbers


def odd_model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A model in several files, with another program's metadata, a copy of its tied head, and other tensors."""
    write_tiny_model(folder, dtype=dtype, max_shard_size="16KB", tied=True)
    index = json.loads((folder / INDEX).read_text())
    first = folder / min(index["weight_map"].values())
    tensors = load_file(first)
    embedding = load_weights(folder)["model.embed_tokens.weight"]
    others = {"lm_head.weight": embedding.clone(), STEPS: torch.arange(5), SCALE: torch.ones(3, dtype=dtype)}
    save_file(tensors | others, first, metadata={"format": "pt", "made": "by hand"})
    put_last(STEPS, first)
    index["weight_map"] |= dict.fromkeys(others, first.name)
    index["metadata"] = {"total_size": 1, "total_parameters": 2}
    (folder / INDEX).write_text(json.dumps(index, indent=7))
    return folder


def put_last(name: str, file: Path) -> None:
    """Move a tensor to the end of its file, where safetensors itself puts none of large items."""
    raw, found = file.read_bytes(), places(file)
    begin = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:begin])
    values = b""
    for key in sorted(found, key=lambda key: (key == name, found[key])):
        start = len(values)
        values += raw[slice(*found[key])]
        entries[key]["data_offsets"] = [start, len(values)]
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + values)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_model(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def inputs(base: Path) -> tuple[ModelSource, NativeAdapter]:
    return with_adapter(base, "tl6", targets=TARGET_NAMES)[:2]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, of which a weight has two or more; and blocks of a file system of 64 bytes."""
    monkeypatch.setattr(merged_rows, "BLOCK_ELEMENTS", 32 * 16)
    monkeypatch.setattr(merged_file, "_ALIGNED", 64)


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Where the values of each tensor begin and end, read without the package or safetensors."""
    raw = file.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:begin])
    del entries["__metadata__"]
    return {name: tuple(begin + offset for offset in entry["data_offsets"]) for name, entry in entries.items()}


# The bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_all_bytes_but_those_of_adapted_tensors_are_the_bases(tmp_path: Path, dtype: torch.dtype) -> None:
    base = odd_model(tmp_path / "base", dtype)
    source, adapter, oracle = with_adapter(base, "tl6", (1, 3), targets=TARGET_NAMES)
    merge_adapter(source, adapter, tmp_path / "merged")
    stored, merged = load_weights(base), load_weights(tmp_path / "merged")
    config, changed = OracleConfig.from_folder(base), set()
    wanted = merged_weights(stored, config, oracle)
    for file in base.glob("*.safetensors"):
        before, after = bytearray(file.read_bytes()), bytearray((tmp_path / "merged" / file.name).read_bytes())
        assert len(before) == len(after)
        for name, (start, stop) in places(file).items():
            if name in wanted and not torch.equal(wanted[name], stored[name]):
                assert before[start:stop] != after[start:stop]
                torch.testing.assert_close(merged[name], wanted[name], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                close = merged[name] == wanted[name]
                assert close.double().mean() > (0.995 if dtype.itemsize == 2 else 0.3), name  # sums end in other bits
                before[start:stop] = after[start:stop]
                changed.add(name)
        assert before == after  # header, order, gaps, and all other tensors
    assert len(changed) == 2 * 7 and {name.split(".")[2] for name in changed} == {"0", "2"}
    assert (tmp_path / "merged" / INDEX).read_bytes() == (base / INDEX).read_bytes()


@pytest.mark.parametrize(("kept", "dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float16)])
def test_with_a_dtype_all_weights_are_cast_once(tmp_path: Path, kept: torch.dtype, dtype: torch.dtype) -> None:
    base = odd_model(tmp_path / "base", kept)
    source, adapter, oracle = with_adapter(base, "tl6", (2,), targets=("o_proj", "down_proj"))
    merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    stored, merged = load_weights(base), load_weights(tmp_path / "merged")
    deltas = delta_weights(oracle, OracleConfig.from_folder(base), 2) or {}
    assert merged.keys() == stored.keys() and len(deltas) == 2
    for name, tensor in merged.items():
        part = name.rpartition("_proj")[0].rpartition(".")[2] if "layers.1." in name else ""
        if part in deltas:
            once = (stored[name].to(torch.promote_types(kept, torch.float32)) + deltas[part]).to(dtype)
            torch.testing.assert_close(tensor, once, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
            assert (tensor == once).float().mean() > (0.995 if dtype.itemsize == 2 else 0.3), name
        else:
            assert torch.equal(tensor, stored[name] if name == STEPS else stored[name].to(dtype)), name
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (base, tmp_path / "merged"))
    assert after["weight_map"] == before["weight_map"]
    total = sum(tensor.nbytes for tensor in merged.values())
    assert after["metadata"] == {"total_size": total, "total_parameters": 2}
    file = tmp_path / "merged" / after["weight_map"][STEPS]
    assert places(file)[STEPS][0] % 8 == 0  # as readers need it


def refusing(number: int) -> Any:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


def shortly(reader: int, writer: int, size: int, start: int, target: int, copy: Any = os.copy_file_range) -> int:
    return int(copy(reader, writer, min(size, 1001), start, target))


COPIES = {
    "another file system": refusing(errno.EXDEV),
    "no system call": refusing(errno.ENOSYS),
    "not supported": refusing(errno.EOPNOTSUPP),
    "nothing is copied": lambda *_: 0,
    "a few bytes at a time": shortly,
    "unknown to Python": None,
}


@pytest.mark.parametrize("way", COPIES)
def test_where_the_kernel_does_not_copy(
    inputs: tuple[ModelSource, NativeAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    merge_adapter(*inputs, tmp_path / "merged")
    if COPIES[way] is None:
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", COPIES[way])
    merge_adapter(*inputs, tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "merged")


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite"])
def test_a_disk_that_fails_is_one_line_and_leaves_nothing(
    inputs: tuple[ModelSource, NativeAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, refusing(errno.ENOSPC))
    with pytest.raises(UserError, match=r"merged: cannot be written \(No space left on device\); nothing was changed"):
        merge_adapter(*inputs, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_second_copy_of_an_adapted_tensor_is_refused(base: Path, tmp_path: Path) -> None:
    """Some programs would read it, although the index names the other."""
    twice = Path(shutil.copytree(base, tmp_path / "base"))
    name = "model.layers.1.self_attn.o_proj.weight"
    file = json.loads((twice / INDEX).read_text())["weight_map"][name]
    other = next(path for path in sorted(twice.glob("*.safetensors")) if path.name != file)
    save_file(load_file(other) | {name: torch.zeros(2)}, other, metadata={"format": "pt"})
    source, adapter, _ = with_adapter(twice, "tl6", targets=("o_proj",))
    with pytest.raises(UserError, match=rf"{other.name}: holds {name} too, beside {file}; remove one of them"):
        merge_adapter(source, adapter, tmp_path / "merged")
    assert {item.name for item in tmp_path.iterdir()} == {"base"}


# The disk's room, and the memory -----------------------------------------------------------------------------------


def test_a_full_disk_is_foretold(
    inputs: tuple[ModelSource, NativeAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapter(*inputs, tmp_path / "merged")
    weights = sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))
    real, written = shutil.disk_usage, []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=weights))
    monkeypatch.setattr(MergedFile, "write", lambda *_: written.append(_))
    says = r"--output \S*/more: needs \d+\.\d\d kB, but only \d+\.\d\d kB are free in its folder's file system"
    with pytest.raises(UserError, match=says):
        merge_adapter(*inputs, tmp_path / "more")
    assert not written and {item.name for item in tmp_path.iterdir()} == {"merged"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in one file of 200 MB, and an adapter of all its linears."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 4096, "intermediate_size": 4096, "num_attention_heads": 32, "vocab_size": 256}
    write_wide_model(root / "model", file_bytes=10**9, num_hidden_layers=1, **sizes)
    write_wide_adapter(root / "adapter", root / "model", TARGET_NAMES)
    return root


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_large_file_takes_the_memory_of_some_rows(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None
) -> None:
    monkeypatch.undo()  # blocks as they are
    source, adapter = find_model(str(wide / "model")), load_native_adapter(wide / "adapter")
    start = anonymous_bytes("self")
    seen, done = [start], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes("self"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    finally:
        done.set()
        watcher.join()
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 180e6
    assert len(seen) > 20 and max(seen) - start < 40e6


# A merge that was ended ----------------------------------------------------------------------------------------------


class Ended(Exception):
    """Where a kill would end the merge."""


@pytest.fixture
def killed(inputs: tuple[ModelSource, NativeAdapter], tmp_path: Path) -> Iterator[Path]:
    """The hidden folder of a merge that was killed in its fourth file. The third may not be on the disk yet."""
    folder, files = tmp_path / "work", []
    folder.mkdir()

    def look() -> None:
        if len(list(folder.glob("*.safetensors"))) == 4:
            raise Ended

    with pytest.raises(Ended):
        merge_adapter(*inputs, tmp_path / "merged", new=lambda _: nullcontext(folder), between=look)
    files = sorted(file.name for file in folder.iterdir())
    assert files[0] == JOURNAL and len(files) == 5 and 2 <= len(whole_files(folder)) <= 3
    yield folder


def whole_files(folder: Path) -> set[str]:
    """The files that a merge has noted as whole."""
    return set(json.loads((folder / JOURNAL).read_text())["whole"])


def go_on(inputs: tuple[ModelSource, NativeAdapter], folder: Path, **keywords: Any) -> set[str]:
    """Merge in `folder`, which holds what a killed merge has left; returns the names of the files that it kept."""
    before = {file.name: file.lstat().st_ino for file in folder.iterdir()}
    opened = [os.open(file, os.O_RDONLY) for file in folder.iterdir()]  # so that no inode is used again
    merge_adapter(*inputs, folder.parent / "merged", new=lambda _: nullcontext(folder), **keywords)
    for descriptor in opened:
        os.close(descriptor)
    return {file.name for file in folder.iterdir() if file.lstat().st_ino == before.get(file.name)}


def test_whole_files_are_kept(inputs: tuple[ModelSource, NativeAdapter], killed: Path, tmp_path: Path) -> None:
    whole = whole_files(killed)
    assert go_on(inputs, killed) == whole
    merge_adapter(*inputs, tmp_path / "alone")
    assert files_of(killed) == files_of(tmp_path / "alone")


def test_the_room_for_whole_files_is_not_asked_again(
    inputs: tuple[ModelSource, NativeAdapter], killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_adapter(*inputs, tmp_path / "alone")
    whole = whole_files(killed)
    needed = sum(file.stat().st_size for file in (tmp_path / "alone").iterdir())
    needed -= sum((killed / name).stat().st_size for name in whole)
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=needed))
    assert go_on(inputs, killed) == whole


def flip(file: Path) -> None:
    """Change a byte, and hide it as well as a program can."""
    found, raw = file.stat(), bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def cut(file: Path) -> None:
    os.truncate(file, 100)


def link(file: Path) -> None:
    file.rename(file.parent.parent / "moved")
    file.symlink_to(file.parent.parent / "moved")


@pytest.mark.parametrize("damage", [flip, cut, link, Path.unlink])
def test_files_that_were_changed_are_written_again(
    inputs: tuple[ModelSource, NativeAdapter], killed: Path, tmp_path: Path, damage: Any
) -> None:
    whole = whole_files(killed)
    first = killed / min(whole)
    damage(first)
    assert go_on(inputs, killed) == whole - {first.name} and not first.is_symlink()
    merge_adapter(*inputs, tmp_path / "alone")
    assert files_of(killed) == files_of(tmp_path / "alone")


CHANGES = ["adapter", "alpha", "dtype", "base", "no journal", "broken journal", "strange journal"]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_kept_of_another_merge(
    inputs: tuple[ModelSource, NativeAdapter], killed: Path, tmp_path: Path, base: Path, change: str
) -> None:
    source, adapter = inputs
    dtype = torch.float16 if change == "dtype" else None
    if change == "adapter":
        source, adapter, _ = with_adapter(base, "tl6", targets=TARGET_NAMES, seed=1)
    elif change == "alpha":
        adapter = replace(adapter, config=replace(adapter.config, alpha=7.0))
    elif change == "base":
        file = min(base.glob("*.safetensors"))
        file.write_bytes(file.read_bytes())
    elif change == "no journal":
        (killed / JOURNAL).unlink()
    elif change == "broken journal":
        (killed / JOURNAL).write_text("{")
    elif change == "strange journal":
        content = json.loads((killed / JOURNAL).read_text())
        (killed / JOURNAL).write_text(json.dumps({**content, "whole": {"../merged": None, "x\0": [1, 2], "y": None}}))
    assert go_on((source, adapter), killed, dtype=dtype) == set()
    merge_adapter(source, adapter, tmp_path / "alone", dtype=dtype)
    assert files_of(killed) == files_of(tmp_path / "alone")
