"""Adapters go to PEFT and come back: byte for byte where PEFT's files are what was exported, else as what they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.flipped_bits import flip_bit
from support.folders import ROOT
from support.native_files import Inputs, with_adapter, write_native
from support.peft_models import hf_model, logits_of, lora_model, our_logits, peft_logits, share
from support.run_files import edit_json, edit_tensors, files_of, truncate
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import EXPORT_RECORD
from megatron_tiedlora.convert.open_adapter import import_peft, open_adapter, read_peft

KEPT = ROOT / "tests" / "data" / "run_before_families"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SUBSETS: list[tuple[str, ...]] = [*((name,) for name in TARGET_NAMES), ("qkv", "down_proj"), TARGET_NAMES]


def write_other(folder: Path) -> Path:
    """A model with other weights."""
    return write_tiny_model(folder, seed=1, head_dim=12, intermediate_size=40, tokenizer=False)


def exported(
    base: Path, folder: Path, method: str = "tl6", *, pad_rank_to: int | None = None, **options: Any
) -> Inputs:
    """A native adapter in folder/adapter, alpha / r = 1.5, and its export in folder/peft."""
    source, native = written(base, folder, method, **{"targets": TARGET_NAMES, **options})
    export_peft(source, native, folder / "peft", native=folder / "adapter", pad_rank_to=pad_rank_to)
    return source, native


def written(base: Path, folder: Path, method: str = "tl6", **options: Any) -> Inputs:
    """A native adapter, and its folder folder/adapter."""
    source, _, oracle = with_adapter(base, method, **options)
    return source, write_native(folder / "adapter", base, oracle)


def imported(source: ModelSource, folder: Path, **options: Any) -> list[str]:
    """Import folder/peft to folder/back; returns the notes."""
    notes: list[str] = []
    import_peft(source, folder / "peft", folder / "back", say=notes.append, **options)
    return notes


# --------------------------------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_the_files_come_back_byte_for_byte(separate: Path, tmp_path: Path, method: str) -> None:
    for number, targets in enumerate(SUBSETS):
        folder = tmp_path / str(number)
        options = {"layers": (None, (1, 3), (2,))[number % 3], "pad_rank_to": 16 if number % 2 else None}
        source, native = exported(separate, folder, method, targets=targets, **options)
        assert imported(source, folder) == []
        assert files_of(folder / "back") == files_of(folder / "adapter")
        assert read_peft(folder / "peft", source).adapter.equals(native)


@pytest.mark.parametrize("family", ["phi3", "stablelm", "qwen3"])
def test_families_too(tmp_path: Path, family: str) -> None:
    """Phi-3 stores q, k and v in one tensor, and gate and up."""
    source, _ = exported(write_tiny_model(tmp_path / "base", family=family, tokenizer=False), tmp_path)
    assert imported(source, tmp_path) == []
    assert files_of(tmp_path / "back") == files_of(tmp_path / "adapter")


@pytest.mark.parametrize("adapter", ["adapter", "checkpoints/step_2"])
def test_files_of_an_earlier_version_are_not_written_anew(tmp_path: Path, adapter: str) -> None:
    source, folder = find_model(str(KEPT / "base")), tmp_path / "kept"
    shutil.copytree(KEPT / adapter, folder)
    edit_json(folder / CONFIG, version="0.0.9")
    export_peft(source, load_native_adapter(folder), tmp_path / "peft", native=folder)
    assert sorted(item.name for item in (tmp_path / "peft/native").iterdir()) == [CONFIG, WEIGHTS]
    assert imported(source, tmp_path) == []
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()


def test_what_this_version_exported_stays_the_same_bits() -> None:
    """A kept export of tl6 on all targets, at alpha / r = 1.5: a version that folds in another order would not see
    that its files are the adapter's."""
    opened = read_peft(ROOT / "tests/data/peft_with_native", find_model(str(KEPT / "base")))
    assert (opened.notes, opened.config.method, len(opened.config.targets)) == ((), "tl6", 4)


def test_an_adapter_that_is_replaced_during_the_export_is_found(separate: Path, tmp_path: Path) -> None:
    source, native = written(separate, tmp_path)
    other = {name: -tensor for name, tensor in native.state.items()}
    save_adapter(tmp_path / "adapter", replace(native, state=other))
    said = refusal(export_peft, source, native, tmp_path / "peft", native=tmp_path / "adapter")
    assert "adapter: was replaced while it was read; run the command again" in said
    assert not (tmp_path / "peft").exists()


def test_peft_loads_the_folder_as_before(separate: Path, tmp_path: Path) -> None:
    source, native = exported(separate, tmp_path)
    peft = PeftModel.from_pretrained(hf_model(separate), tmp_path / "peft")
    assert share(our_logits(source, native), logits_of(peft)) <= 1e-5
    peft.save_pretrained(tmp_path / "saved")  # what PEFT saves has no native/ any more
    back = read_peft(tmp_path / "saved", source).adapter
    assert (back.config.method, back.config.rank) == ("lora", 4)


# --------------------------------------------------------------------------------------------- what was changed


LAYERS = "base_model.model.model.layers"
CHANGES: dict[str, Callable[[Path], None]] = {
    "one bit of A": lambda f: flip_bit(f / WEIGHTS, f"{LAYERS}.1.mlp.up_proj.lora_A.weight", row=3, column=2),
    "one bit of B": lambda f: flip_bit(f / WEIGHTS, f"{LAYERS}.2.mlp.down_proj.lora_B.weight", row=3, column=2),
    "padding": lambda f: edit_tensors(
        f / WEIGHTS, lambda tensors: tensors[f"{LAYERS}.0.self_attn.k_proj.lora_A.weight"][-1].fill_(0.1)
    ),
    "alpha": lambda f: edit_json(f / CONFIG, lora_alpha=16),
    "rslora": lambda f: edit_json(f / CONFIG, use_rslora=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_peft_files_count(separate: Path, tmp_path: Path, change: str) -> None:
    """They come back as what PEFT computes, which is not the adapter in native/."""
    source, native = exported(separate, tmp_path, pad_rank_to=8)
    CHANGES[change](tmp_path / "peft")
    note, *_ = imported(source, tmp_path)  # where A was changed, the second one is on further training
    assert note.startswith(f"{tmp_path}/peft: only its PEFT files are used, since they differ from the adapter in")
    back = load_native_adapter(tmp_path / "back")
    assert back.config.method == "lora" and back.base_identity == native.base_identity
    assert share(our_logits(source, back), peft_logits(separate, tmp_path / "peft")) <= 1e-4


def test_other_modules_and_layers_count_too(separate: Path, tmp_path: Path) -> None:
    """A module less is another adapter, although every tensor that is left is the export's."""
    source, _ = exported(separate, tmp_path)
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    left = {name: tensor for name, tensor in tensors.items() if "layers.2." in name and "down" not in name}
    save_file(left, tmp_path / "peft" / WEIGHTS, metadata={"format": "pt"})
    modules = sorted({name.split(".")[-3] for name in left})
    edit_json(tmp_path / "peft" / CONFIG, target_modules=modules, layers_to_transform=[2])
    assert len(imported(source, tmp_path)) == 1
    config = load_native_adapter(tmp_path / "back").config
    assert (config.method, config.layers) == ("lora", (3,))
    assert [target.name for target in config.targets] == ["qkv", "o_proj", "gate_up"]


# What is wrong with native/: the PEFT files are whole, so they are used, and the note says why.
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda f: truncate(f / WEIGHTS), "not a complete safetensors file"),
    "no config": (lambda f: (f / CONFIG).unlink(), "no such file"),
    "missing": (shutil.rmtree, "native/, the exported adapter, is missing"),
    "edited": (lambda f: edit_json(f / CONFIG, alpha=3.0, seals=False), "does not match its own checksum"),
    "empty": (lambda f: [item.unlink() for item in f.iterdir()], "no such file"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("")), "no such file"),
    "a link": (lambda f: (f.rename(f.parent.parent / "moved"), f.symlink_to(f.parent.parent / "moved")), "is a link"),
    "linked weights": (
        lambda f: ((f / WEIGHTS).rename(f.parent.parent / "w"), (f / WEIGHTS).symlink_to(f.parent.parent / "w")),
        "is a link",
    ),
    "other rank": (lambda f: edit_json(f / CONFIG, rank=5), "has shape"),
    "other alpha": (lambda f: edit_json(f / CONFIG, alpha=3.0), "changed after the export"),
    "other model": (lambda f: edit_json(f / CONFIG, layers=[1, 2, 9], num_layers=9), "changed after the export"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_native_folder_is_said_and_not_used(separate: Path, tmp_path: Path, damage: str) -> None:
    source, _ = exported(separate, tmp_path)
    shutil.copytree(tmp_path / "peft", tmp_path / "plain", ignore=shutil.ignore_patterns("native"))
    break_it, why = DAMAGES[damage]
    break_it(tmp_path / "peft/native")
    (note,) = imported(source, tmp_path)
    assert note.startswith(f"{tmp_path}/peft: only its PEFT files are used, since ") and why in note
    assert read_peft(tmp_path / "plain", source).adapter.equals(load_native_adapter(tmp_path / "back"))
    (tmp_path / "peft" / EXPORT_RECORD).unlink()
    if damage == "missing":  # so it is anybody's LoRA
        assert not read_peft(tmp_path / "peft", source).notes


# --------------------------------------------------------------------------------------------- which base


def test_another_base_than_the_export_s_is_rejected(separate: Path, tmp_path: Path) -> None:
    source, native = exported(separate, tmp_path)
    other = find_model(str(write_other(tmp_path / "other")))
    assert f"whose weights differ from {other.name}'s; give its own base" in refusal(imported, other, tmp_path)
    (note,) = imported(other, tmp_path, base_differs=True)
    assert "weights differ" in note
    assert load_native_adapter(tmp_path / "back").base_identity == native.base_identity  # a copy keeps its own
    opened = open_adapter(str(tmp_path / "peft"), str(separate))
    assert opened.adapter.equals(native) and (opened.kind, opened.source) == ("peft", source)
    assert "no such folder" in refusal(open_adapter, tmp_path / "none", str(separate))


def test_an_export_for_another_base_is_used_there_and_imported_where_it_was_trained(
    separate: Path, tmp_path: Path
) -> None:
    source, native = written(separate, tmp_path)
    other = find_model(str(write_other(tmp_path / "other")))
    export_peft(other, native, tmp_path / "peft", native=tmp_path / "adapter", base_differs=True)
    opened = open_adapter(str(tmp_path / "peft"), None)
    assert opened.source.name == str(tmp_path / "other")
    assert opened.adapter.base_identity.base_weights_hash != native.base_identity.base_weights_hash
    assert imported(source, tmp_path) == []
    assert files_of(tmp_path / "back") == files_of(tmp_path / "adapter")


# --------------------------------------------------------------------------------------------- the command


def test_the_commands_go_there_and_back(separate: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(separate, tmp_path, "tl5", targets=("qkv", "gate_up"))
    assert call("export", ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "peft")]) == 0
    capsys.readouterr()
    assert call("import", ["--peft", str(tmp_path / "peft"), "--output", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"imported {tmp_path}/peft as tl5 of rank 4 on qkv, gate_up of 3 layers of {separate}: {tmp_path}/back",
        f"train it further with: --init_from {tmp_path}/back",
    ]
    assert files_of(tmp_path / "back") == files_of(tmp_path / "adapter")
    lora_model(separate, r=2, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "lora")
    assert call("import", ["--peft", str(tmp_path / "lora"), "--output", str(tmp_path / "from_lora")]) == 0
    note, said, _ = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: {tmp_path}/lora: modules that share one A here (q, k and v; gate and up) have sep")
    assert note.endswith("so training continues differently from PEFT's")
    assert f"as lora of rank 4 on qkv of 3 layers of {separate}" in said
