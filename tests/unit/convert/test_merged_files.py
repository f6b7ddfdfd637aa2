"""The files of a merged folder are the base's own, but for the values that the adapter changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.native_files import Inputs, with_adapter
from support.oracle import OracleConfig, delta_weights, load_weights, merged_weights
from support.tiny_models import write_tiny_model
from support.wide_models import watched, write_wide_adapter, write_wide_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint import load_model as blocks
from megatron_tiedlora.checkpoint import tensor_files
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.merge import merge_adapter

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
def inputs(base: Path) -> Inputs:
    return with_adapter(base, "tl6", targets=TARGET_NAMES)[:2]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, of which a weight has two or more."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 32 * 16)


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


@pytest.mark.parametrize(("kept", "dtype"), [
    (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
    (torch.float64, torch.float16),
])  # fmt: skip
def test_with_a_dtype_all_weights_are_cast_once(tmp_path: Path, kept: torch.dtype, dtype: torch.dtype) -> None:
    """Casting the update first, or the base, rounds twice, which moves one weight in five or more."""
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


def test_a_disk_that_fails_is_one_line_and_leaves_nothing(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open
    full = Path("/dev/full")  # whatever is written to it does not fit
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *_: real(full if mode == "wb" else path, mode, *_))
    with pytest.raises(UserError, match=r"merged: cannot be written \(No space left on device\); nothing was changed"):
        merge_adapter(*inputs, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_base_that_becomes_shorter_is_one_line(inputs: Inputs, tmp_path: Path, base: Path) -> None:
    last = max(base.glob("*.safetensors"))
    raw = last.read_bytes()
    try:
        with pytest.raises(UserError, match=rf"{last.name}: the file was truncated while it was being read"):
            merge_adapter(*inputs, tmp_path / "merged", between=lambda: last.write_bytes(raw[:-2]))
    finally:
        last.write_bytes(raw)
    assert not list(tmp_path.iterdir())


def test_a_second_copy_of_an_adapted_tensor_is_refused(base: Path, tmp_path: Path) -> None:
    """Some programs would read it, although the index names the other."""
    twice = Path(shutil.copytree(base, tmp_path / "base"))
    name = "model.layers.1.self_attn.o_proj.weight"
    file = json.loads((twice / INDEX).read_text())["weight_map"][name]
    other = next(path for path in sorted(twice.glob("*.safetensors")) if path.name != file)
    save_file(load_file(other) | {name: torch.zeros(2)}, other, metadata={"format": "pt"})
    source, adapter, _ = with_adapter(twice, "tl6", targets=("o_proj",))
    with pytest.raises(UserError, match=rf"{other.name}: holds {name}, which is also in {file}; remove one of them"):
        merge_adapter(source, adapter, tmp_path / "merged")
    assert {item.name for item in tmp_path.iterdir()} == {"base"}


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_other_copies_of_tensors_are_kept_as_they_are(base: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """One that the index gives to another file, and one that it does not name."""
    twice = Path(shutil.copytree(base, tmp_path / "base"))
    name = "model.layers.1.mlp.up_proj.weight"
    file = json.loads((twice / INDEX).read_text())["weight_map"][name]
    other = next(path for path in sorted(twice.glob("*.safetensors")) if path.name != file)
    copies = {name: torch.full((3, 2), 7.0), "nowhere": torch.arange(4.0)}
    save_file(load_file(other) | copies, other, metadata={"format": "pt"})
    source, adapter, _ = with_adapter(twice, "tl6", targets=("o_proj",))
    merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    found = load_file(tmp_path / "merged" / other.name)
    assert all(torch.equal(found[key], tensor) for key, tensor in copies.items())
    whole = load_file(tmp_path / "merged" / file)[name]
    assert torch.equal(whole, load_file(twice / file)[name].to(whole.dtype))


# The disk's room, and the memory -----------------------------------------------------------------------------------


def test_a_full_disk_is_foretold(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merge_adapter(*inputs, tmp_path / "merged")
    weights = sum(file.stat().st_size for file in (tmp_path / "merged").glob("*.safetensors"))
    real, written = shutil.disk_usage, []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=weights))
    monkeypatch.setattr(tensor_files, "_write_file", lambda *_: written.append(_))
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
    with watched() as seen:
        merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_size > 180e6
    assert len(seen) > 20 and max(seen) - seen[0] < 40e6
