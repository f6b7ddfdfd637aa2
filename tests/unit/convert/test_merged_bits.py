"""The files of a merged folder against base and adapter, bit by bit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.flipped_bits import file_of, flip_bit
from support.native_files import Inputs, with_adapter
from support.quantised_models import SHAPE, quantised_folder
from support.run_files import edit_tensors
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint import load_model as blocks
from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.checkpoint.load_model import row_blocks
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import compare_merged

WITH_ZERO = "model.layers.1.mlp.gate_proj.weight"
DTYPES = {"stored": None, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="module", autouse=True)
def small_blocks() -> Iterator[None]:
    """Blocks of 64 rows, so that the tiny model's larger tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_ELEMENTS", 64 * 32)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16, in several files, with more rows in some tensors than a block has, and one zero."""
    folder = tmp_path_factory.mktemp("base")
    shape = {"intermediate_size": 150, "vocab_size": 330}
    write_tiny_model(folder, dtype=torch.bfloat16, max_shard_size="20KB", tokenizer=False, **shape)
    weight = load_file(file_of(folder, WITH_ZERO))[WITH_ZERO]
    weight[1, 0] = 0.0
    rewrite(file_of(folder, WITH_ZERO), WITH_ZERO, weight)
    return folder


@pytest.fixture(scope="module")
def inputs(base: Path) -> Inputs:
    """The base, and an adapter of all four targets in the first and the last of its three layers."""
    return with_adapter(base, "tl6", layers=(1, 3), targets=TARGET_NAMES)[:2]


@pytest.fixture(scope="module")
def exported(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a merged folder for each of DTYPES."""
    root = tmp_path_factory.mktemp("exported")
    for name, dtype in DTYPES.items():
        merge_adapter(*inputs, root / name, dtype=dtype)
    return root


def differences(inputs: Inputs, merged: Path) -> tuple[str, ...]:
    return compare_merged(*inputs, merged).differences


def rewrite(file: Path, name: str, tensor: torch.Tensor | None) -> None:
    """Put another tensor, or none, in the place of one in a file."""
    edit_tensors(file, lambda held: held.pop(name, None) if tensor is None else held.update({name: tensor}))


@pytest.mark.parametrize("kind", DTYPES)
def test_a_merge_has_the_bits_that_it_must_have(inputs: Inputs, exported: Path, kind: str) -> None:
    found = compare_merged(*inputs, exported / kind)
    assert found.lines() == ["merged files, bit by bit: 14 tensors with the adapter, 16 as in the base  ok"]


@pytest.mark.parametrize("kind", DTYPES)
def test_bits_are_those_of_whole_matrices(
    inputs: Inputs, base: Path, exported: Path, tmp_path: Path, kind: str
) -> None:
    """The same folder, written here with no loop over rows: W in fp32 plus B' A', cast once."""
    source, adapter = inputs
    folder = shutil.copytree(exported / kind, tmp_path / "merged")
    updates = {
        part.name: b[start : start + part.size] @ a
        for rule, a, b in adapter.updates(source.shape)
        for part, start in zip(rule.parts, (0, rule.parts[0].size, sum(p.size for p in rule.parts[:2])), strict=False)
    }
    assert len(updates) == 14
    for file in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            weight = load_file(file_of(base, name))[name]
            tensors[name] = (weight.float() + updates.get(name, 0.0)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    assert differences(inputs, folder) == ()


ONE_BIT = {  # a tensor, and a row in it
    "touched": ("model.layers.0.self_attn.k_proj.weight", 15),
    "touched, second block": ("model.layers.2.mlp.up_proj.weight", 149),
    "touched, a row target": ("model.layers.2.mlp.down_proj.weight", 3),
    "a layer without the adapter": ("model.layers.1.self_attn.q_proj.weight", 31),
    "embedding": ("model.embed_tokens.weight", 200),
    "head": ("lm_head.weight", 329),
    "norm": ("model.layers.0.input_layernorm.weight", 7),
}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", ONE_BIT)
def test_one_flipped_bit_is_found_and_its_tensor_named(
    inputs: Inputs, exported: Path, tmp_path: Path, kind: str, case: str
) -> None:
    folder = shutil.copytree(exported / kind, tmp_path / "merged")
    name, row = ONE_BIT[case]
    file = file_of(folder, name)
    flip_bit(file, name, row=row, column=0 if case == "norm" else 5)
    like = "base + adapter" if case.startswith("touched") else "the base"
    wanted = f"differs from {like} in 1 value, first in row {row}, by up to 1 unit in the last place"
    assert differences(inputs, folder) == (f"{file}: {name} {wanted}",)


def test_the_highest_bit_counts_too(inputs: Inputs, exported: Path, tmp_path: Path) -> None:
    """0 and -0 are equal as numbers."""
    folder = shutil.copytree(exported / "stored", tmp_path / "merged")
    flip_bit(file_of(folder, WITH_ZERO), WITH_ZERO, row=1, bit=15)
    (found,) = differences(inputs, folder)
    assert f"{WITH_ZERO} differs from the base in 1 value, first in row 1, " in found


V = "model.layers.0.self_attn.v_proj.weight"
WRONG = f"{V} differs from base + adapter in "
DAMAGE: dict[str, tuple[str, Callable[[Path, Path], object], str]] = {  # of a merge, with files of it and of the base
    "no update": ("stored", lambda f, base: rewrite(f, V, load_file(base)[V]), WRONG),
    "heads swapped": ("stored", lambda f, _: rewrite(f, V, load_file(f)[V].roll(8, 0)), WRONG),
    "dtype": ("stored", lambda f, _: rewrite(f, V, load_file(f)[V].float()), f"{V} is F32, not BF16"),
    "not cast": ("fp32", lambda f, base: rewrite(f, V, load_file(base)[V]), f"{V} is BF16, not F32"),
    "another": ("stored", lambda f, _: rewrite(f, "extra\n\x1b", torch.ones(3)), r"extra\n\x1b is not in the base"),
    "stale file": ("stored", lambda f, base: shutil.copyfile(base, f), "differs from base + adapter"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_else_is_found(inputs: Inputs, base: Path, exported: Path, tmp_path: Path, damage: str) -> None:
    kind, change, wanted = DAMAGE[damage]
    file = file_of(shutil.copytree(exported / kind, tmp_path / "merged"), V)
    change(file, file_of(base, V))
    found = differences(inputs, tmp_path / "merged")
    assert found and all(line.startswith(f"{file}: ") and wanted in line for line in found), found


def test_a_copy_of_a_tied_head_is_compared_where_there_is_one(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", tied=True, tokenizer=False)
    file = base / "model.safetensors"
    rewrite(file, "lm_head.weight", load_file(file)["model.embed_tokens.weight"].clone())
    inputs = with_adapter(base, "tl5")[:2]
    merge_adapter(*inputs, tmp_path / "merged", dtype=torch.bfloat16)
    head = load_file(file)["lm_head.weight"]
    for copy in (None, head, head.bfloat16()):  # left out, as in the base, or cast with the others
        rewrite(tmp_path / "merged/model.safetensors", "lm_head.weight", copy)
        assert differences(inputs, tmp_path / "merged") == ()
    rewrite(tmp_path / "merged/model.safetensors", "lm_head.weight", head.half())
    (found,) = differences(inputs, tmp_path / "merged")
    assert "lm_head.weight is F16, not BF16" in found


def test_a_number_beside_the_weights(tmp_path: Path) -> None:
    """Some programs store one, as a tensor without dimensions."""
    base = write_tiny_model(tmp_path / "base", tokenizer=False)
    rewrite(base / "model.safetensors", "scale", torch.tensor(3.0))
    inputs = with_adapter(base, "tl5")[:2]
    merge_adapter(*inputs, tmp_path / "merged")
    assert differences(inputs, tmp_path / "merged") == ()
    rewrite(tmp_path / "merged/model.safetensors", "scale", torch.tensor(3.5))
    (found,) = differences(inputs, tmp_path / "merged")
    assert "scale differs from the base in 1 value, first in row 0, by up to 2,097,152 units" in found


def test_a_fused_stored_tensor(fused: Path, tmp_path: Path) -> None:
    """Phi-3 stores q, k and v as one tensor, and gate and up as one."""
    inputs = with_adapter(fused, "lora", targets=("qkv", "gate_up"))[:2]
    merge_adapter(*inputs, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("tokenizer*")), "the base has none"
    found = compare_merged(*inputs, tmp_path / "merged")
    assert ": 6 tensors with the adapter" in found.compared and not found.differences
    name = "model.layers.1.self_attn.qkv_proj.weight"
    flip_bit(tmp_path / "merged/model.safetensors", name, row=50)
    (found,) = differences(inputs, tmp_path / "merged")
    assert f"{name} differs from base + adapter in 1 value, first in row 50, " in found


def test_many_differences_are_cut_short(inputs: Inputs, base: Path, exported: Path) -> None:
    """The base itself in the place of the merged folder: every touched tensor differs."""
    found = compare_merged(*inputs, base)
    assert len(found.differences) == 14
    lines = found.lines()
    assert lines[0].endswith("FAILED: 14 differ") and len(lines) == 10 and lines[-1] == "  and 6 more"


@pytest.mark.parametrize(
    "shape", [(1,), (64,), (65, 32), (127, 32), (128, 32), (129, 32), (330, 32), (300, 7, 2), (0, 4)]
)
def test_blocks_cover_all_rows_and_none_is_small(shape: tuple[int, ...]) -> None:
    blocks = list(row_blocks(shape))
    assert [row for block in blocks for row in range(shape[0])[block]] == list(range(shape[0]))
    assert all(block.stop - block.start >= min(16, shape[0]) for block in blocks)
    assert len(blocks) > 1 or shape[0] < 80


def test_the_bar_counts_bytes(
    inputs: Inputs, exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # elsewhere a bar that ends so soon writes nothing
    compare_merged(*inputs, exported / "fp32", progress=True)
    shown = capsys.readouterr().err
    assert "merged files" in shown and "/295k" in shown and "B/s" in shown  # the size of the tensors


@pytest.mark.parametrize("kind", ["fp8 by row", "fp8 by tensor"])
def test_a_merge_onto_a_folder_that_is_quantised(tmp_path: Path, kind: str) -> None:
    """Every tensor is compared with the folder's values, and one that the model does not have is named. Rows that
    share a scale would have other values if they were quantised again."""
    plain = write_tiny_model(tmp_path / "plain", dtype=torch.bfloat16, tokenizer=False, **SHAPE)
    quantised, _ = quantised_folder(plain, tmp_path / "folders", kind)
    source, adapter = find_model(str(quantised)), with_adapter(plain, "tl6", layers=(1, 3), targets=TARGET_NAMES)[1]
    inputs = source, replace(adapter, base_identity=identify_model(source, "bf16"))
    merged = tmp_path / "merged"
    merge_adapter(*inputs, merged, onto_trained=True)
    assert find_model(str(merged)).stored is None
    found = compare_merged(*inputs, merged)
    assert ": 14 tensors with the adapter" in found.compared and not found.differences
    (file,) = merged.glob("*.safetensors")
    rewrite(file, "model.layers.0.other.weight", torch.ones(2))
    assert [line.partition(": ")[2] for line in differences(inputs, merged)] == [
        "model.layers.0.other.weight is not in the base"
    ]
    flip_bit(file, "model.layers.1.mlp.down_proj.weight", row=3, column=5)
    assert len(differences(inputs, merged)) == 2
