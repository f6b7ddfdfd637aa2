"""Merging an adapter that was trained on a quantised base: onto the stored base, or onto what training saw."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.native_files import with_adapter
from support.quantised_models import CROSSING, FORMATS, quantised
from support.run_files import edit_json
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.inputs import check_base, stored_precision
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import verify_export

TARGETS = ("qkv", "down_proj")
LAYERS = (1, 3)


@dataclass(frozen=True)
class Trained:
    """A base in bf16, and an adapter of some of its linears."""

    folder: Path
    source: ModelSource
    adapter: NativeAdapter

    def on(self, name: str | None) -> NativeAdapter:
        """The adapter as of a run with --base NAME."""
        stored = None if name is None else "bf16"
        identity = replace(self.adapter.base_identity, base_format=name, base_stored=stored)
        return replace(self.adapter, base_identity=identity)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("merge")
    model = write_tiny_model(folder / "model", dtype=torch.bfloat16, tokenizer=False, num_layers=3, **CROSSING)
    source, adapter, _ = with_adapter(model, "tl6", LAYERS, targets=TARGETS)
    return Trained(model, source, adapter)


def check(trained: Trained, found: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> None:
    """It is base + update in fp32, cast once, but for the last bit of bf16: the update is summed here in one matmul."""
    wanted = {name: value.float() for name, value in base.items()}
    for rule, a, b in trained.adapter.updates(trained.source.shape):
        for name, rows in rule.by_stored_tensor(b @ a).items():
            wanted[name] = wanted[name] + rows
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.float(), wanted[name].bfloat16().float(), rtol=2**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", FORMATS)
def test_onto_the_stored_base_and_onto_what_training_saw(trained: Trained, name: str, tmp_path: Path) -> None:
    adapter, stored = trained.on(name), load_file(trained.folder / "model.safetensors")
    notes: list[str] = []
    merge_adapter(trained.source, adapter, tmp_path / "original", say=notes.append)
    assert [f"trained on its base in {name}, but this uses it in" in note for note in notes] == [True]
    merge_adapter(trained.source, adapter, tmp_path / "trained", onto_trained=True, say=notes.append)
    assert len(notes) == 1, "this one uses what training saw"
    original, onto = (load_file(tmp_path / kind / "model.safetensors") for kind in ("original", "trained"))
    check(trained, original, stored)
    check(trained, onto, quantised(stored, name))
    for key, value in quantised(stored, name).items():
        adapted = any(f".{layer - 1}." in key for layer in LAYERS) and ("_proj" in key) and "o_proj" not in key
        if not adapted or "gate" in key or "up_proj" in key:
            assert torch.equal(onto[key], value.bfloat16()), key
    assert not torch.equal(onto["model.layers.1.mlp.up_proj.weight"], stored["model.layers.1.mlp.up_proj.weight"])
    export_peft(trained.source, adapter, tmp_path / "peft")
    for kind, title in (("original", "merged "), ("trained", f"merged onto {name}")):
        found = verify_export(trained.source, adapter, merged=tmp_path / kind, peft=tmp_path / "peft")
        assert found.passed and f"\n{title}" in found.report(), found.report()
        (row,) = [row for row in found.logits if row.name == f"as trained, base in {name}"]
        assert row.verdict == "for information" and row.largest > 1e-4


def test_logits_of_a_merge_in_fp32_are_those_on_what_training_saw(trained: Trained, tmp_path: Path) -> None:
    adapter = trained.on("nf4")
    merge_adapter(trained.source, adapter, tmp_path / "trained", onto_trained=True, dtype=torch.float32)
    found = verify_export(trained.source, adapter, merged=tmp_path / "trained", inside="none")
    (row,) = [row for row in found.logits if row.name == "merged onto nf4"]
    assert found.passed and row.verdict == "ok"


def test_the_check_knows_onto_what_it_was_merged(trained: Trained, tmp_path: Path) -> None:
    adapter = trained.on("int8")
    merge_adapter(trained.source, adapter, tmp_path / "trained", onto_trained=True)
    file = tmp_path / "trained" / MERGE_RECORD
    assert json.loads(file.read_text())["merged_onto"] == "int8"
    for wrong in (None, "nf4"):
        edit_json(file, merged_onto=wrong)
        found = verify_export(trained.source, adapter, merged=tmp_path / "trained", inside="none")
        assert not found.passed and len(found.bits[0].differences) >= 7 * 3
    edit_json(file, merged_onto="int4")
    said = refusal(verify_export, trained.source, adapter, merged=tmp_path / "trained", inside="none")
    assert f"{MERGE_RECORD}: merged_onto = 'int4' is not one of int8, fp8, nf4" in said


def test_an_adapter_of_a_plain_base_has_no_other(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trained.on(None)
    said = refusal(merge_adapter, trained.source, adapter, tmp_path / "trained", onto_trained=True)
    assert said.startswith("--onto trained: the adapter was trained on its base in fp32, not on")
    merge_adapter(trained.source, adapter, tmp_path / "plain")
    assert "merged_onto" not in json.loads((tmp_path / "plain" / MERGE_RECORD).read_text())
    native = trained.on("fp8")
    save_adapter(tmp_path / "native", native)
    assert load_native_adapter(tmp_path / "native").base_identity == native.base_identity
    words = ["--adapter", str(tmp_path / "native"), "--output", str(tmp_path / "fp8"), "--onto", "trained"]
    assert call("merge", words) == 0 and "note" not in capsys.readouterr().out
    assert json.loads((tmp_path / "fp8" / MERGE_RECORD).read_text())["merged_onto"] == "fp8"


COPIES = ("fp32", "bf16", "fp16", "bf16 widened", "fp16 narrowed", "one linear in fp32", "norms in fp32")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSource]:
    """One model, whose weights need fp32, in several precisions; by the names of `COPIES`."""
    root = tmp_path_factory.mktemp("copies")
    first = write_tiny_model(root / "fp32", tokenizer=False, num_layers=2, **CROSSING)
    weights = load_file(first / "model.safetensors")
    for kind in COPIES[1:]:
        found = {name: value.to(DTYPES.get(kind, torch.bfloat16)) for name, value in weights.items()}
        if kind == "bf16 widened":
            found = {name: value.float() for name, value in found.items()}
        if kind == "fp16 narrowed":  # fp32 rounded to fp16 is no copy of fp32 rounded to bf16
            found = {name: value.half().bfloat16() for name, value in weights.items()}
        exact = {"one linear in fp32": "layers.1.mlp.down_proj", "norms in fp32": "norm"}.get(kind)
        found |= {name: value for name, value in weights.items() if exact is not None and exact in name}
        shutil.copytree(first, root / kind)
        save_file(found, root / kind / "model.safetensors", metadata={"format": "pt"})
    return {kind: find_model(str(root / kind)) for kind in COPIES}


def test_the_precision_is_that_of_the_values_of_the_linears(copies: dict[str, ModelSource]) -> None:
    expected = ("fp32", "bf16", "fp16", "bf16", "bf16", "fp32", "bf16")
    assert [stored_precision(copies[kind]) for kind in COPIES] == list(expected)


@pytest.mark.parametrize(
    ("trained_on", "given"),
    [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "fp16 narrowed"), ("fp32", "bf16 widened")],
)
def test_a_copy_that_is_quantised_to_other_values_is_rejected(
    copies: dict[str, ModelSource], tmp_path: Path, trained_on: str, given: str
) -> None:
    """By a merge onto what training saw, and by its check. Elsewhere it is a note."""
    own, other = copies[trained_on], copies[given]
    adapter = of_run(own, trained_on)
    merge_adapter(own, adapter, tmp_path / "own", onto_trained=True)
    found = "fp32" if given == "fp32" else "bf16"
    why = rf"quantised to nf4 from {trained_on}, but .*{given} has its linears in {found}, which is quantised to diff"
    fix = rf".*; give the model in {trained_on} with --model"
    with pytest.raises(UserError, match=f"--onto trained: trained on .*{why}{fix}"):
        merge_adapter(other, adapter, tmp_path / "other", onto_trained=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=f"--merged .*own: trained on .*{why}{fix}"):
        verify_export(other, adapter, merged=tmp_path / "own", inside="none")
    said: list[str] = []
    merge_adapter(other, adapter, tmp_path / "original", say=said.append)
    assert len(said) == 1 and "trained on its base in nf4, but this uses it in" in said[0]
    notes = verify_export(other, adapter, merged=tmp_path / "original", inside="none").notes
    assert [f"as trained, base in nf4: trained on {own.name}, quantised" in note for note in notes] == [True]
    _, (note,) = check_base(other, adapter, base_format="nf4")
    assert note.endswith("which is quantised to different values; the losses differ")
    assert check_base(own, adapter, base_format="nf4")[1] == ()


def of_run(source: ModelSource, stored: str | None) -> NativeAdapter:
    """An adapter as of a run with --base nf4."""
    _, adapter, _ = with_adapter(source.weights_folder(), "tl6", (1, 2), targets=TARGETS)
    return replace(adapter, base_identity=replace(adapter.base_identity, base_format="nf4", base_stored=stored))


def test_a_copy_in_a_wider_precision_has_the_same_values(copies: dict[str, ModelSource], tmp_path: Path) -> None:
    adapter, said = of_run(copies["bf16"], "bf16"), list[str]()
    for kind in ("bf16", "bf16 widened"):
        merge_adapter(copies[kind], adapter, tmp_path / kind, dtype=torch.float32, onto_trained=True, say=said.append)
        assert verify_export(copies[kind], adapter, merged=tmp_path / kind, inside="none").passed
    one, other = (load_file(tmp_path / kind / "model.safetensors") for kind in ("bf16", "bf16 widened"))
    assert all(torch.equal(one[name], other[name]) for name in one) and not said


def test_a_precision_that_was_not_recorded_is_said(copies: dict[str, ModelSource], tmp_path: Path) -> None:
    """Where it matters alone."""
    adapter, said = of_run(copies["fp32"], None), list[str]()
    merge_adapter(copies["bf16"], adapter, tmp_path / "onto", onto_trained=True, say=said.append)
    assert [note.startswith("--onto trained: the adapter does not record the precision from") for note in said] == [
        True
    ]
    assert verify_export(copies["bf16"], adapter, merged=tmp_path / "onto", inside="none").passed
    assert check_base(copies["bf16"], adapter, base_format="nf4")[1] == ()
