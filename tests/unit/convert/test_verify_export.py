"""The check of exports: what passes, what fails and how, what loads the exports, and the memory that it takes; and that
its logits, and a run's losses, of one layer at a time are those of the whole model with its adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.flipped_bits import flip_bit
from support.native_files import Inputs, native_adapter, with_adapter
from support.oracle import load_weights
from support.tiny_models import FAMILY_MODELS, write_tiny_model
from support.wide_models import Peak, peak_of, write_wide_adapter, write_wide_model

from megatron_tiedlora.base.output_folder import new_output
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint import load_model as blocks
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import Weights, layerwise_logits, layerwise_loss, load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.convert import verify
from megatron_tiedlora.convert.inputs import EXPORT_RECORD
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import open_adapter
from megatron_tiedlora.convert.verify import LogitComparison, Verification, format_comparisons, verify_export
from megatron_tiedlora.model import layer_specs
from megatron_tiedlora.model.batch import MicroBatch


def by_name(found: Verification) -> dict[str, LogitComparison]:
    """The rows of the table; each comparison with rounded weights under the name of the row that it belongs to."""
    rows: dict[str, LogitComparison] = {}
    for row in found.logits:
        rows[f"{[*rows][-1]}, rounded" if row.name.startswith(" ") else row.name] = row
    return rows


MERGED, PEFT = ("merged", "merged, in transformers"), ("PEFT adapter", "PEFT adapter, in peft")


def test_the_check_passes_what_is_right(inputs: Inputs, exported: Path) -> None:
    found = verify_export(*inputs, merged=exported / "merged", peft=exported / "peft")
    rows = by_name(found)
    assert found.passed and not any(bits.differences for bits in found.bits) and not found.notes
    assert len(found.bits) == 2
    assert tuple(rows) == ("base without adapter", *MERGED, *PEFT)
    plain = rows["base without adapter"]
    assert plain.largest > 0.02 and plain.agreement < 1 and plain.divergence > 1e-3
    for name in MERGED + PEFT:
        row = rows[name]
        assert row.largest < 1e-5 and row.mean <= row.largest and row.agreement == 1.0 and abs(row.divergence) < 1e-6
    table = found.report().splitlines()
    assert len(table) == 8 and table[0].startswith("merged files, bit by bit: 9 tensors with the adapter, 21 as in")
    assert table[4].startswith("merged  ") and all(line.endswith("ok") for line in (*table[:2], *table[4:]))


def test_the_check_takes_the_rounding_of_16_bits_out(inputs: Inputs, exported: Path) -> None:
    found = verify_export(*inputs, merged=exported / "merged16")
    rows = by_name(found)
    for name in MERGED:
        shown, judged = rows[name], rows[f"{name}, rounded"]
        assert shown.largest > 1e-3 and shown.passed and "information" in shown.verdict
        assert judged.largest < 1e-5 and judged.passed
    assert rows["base without adapter"].passed and found.passed


@pytest.mark.parametrize("which", ["merged", "merged16"])
@pytest.mark.parametrize("damage", ["plain", "swapped", "halved"])
def test_the_check_fails_a_merge_that_is_wrong(
    base: Path, inputs: Inputs, exported: Path, tmp_path: Path, which: str, damage: str
) -> None:
    broken = shutil.copytree(exported / which, tmp_path / "broken")
    weights, plain = load_weights(broken), load_weights(base)
    key, value = (f"model.layers.1.self_attn.{part}_proj.weight" for part in "kv")
    if damage == "plain":  # the update forgotten in one projection
        weights[key] = plain[key].to(weights[key].dtype)
    elif damage == "swapped":  # k's rows for v's
        change = weights[key].float() - plain[key]
        weights[value] = (plain[value] + change).to(weights[key].dtype)
    else:  # alpha / r forgotten
        weights[key] = ((weights[key].float() + plain[key]) / 2).to(weights[key].dtype)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    found = verify_export(*inputs, merged=broken)
    rows = by_name(found)
    judged = [rows[name if which == "merged" else f"{name}, rounded"] for name in MERGED]
    assert not found.passed and not any(row.passed for row in judged)  # each alone would have been enough
    named = value if damage == "swapped" else key
    (bits,) = found.bits
    assert len(bits.differences) == 1 and named in bits.differences[0]


def test_the_check_fails_a_peft_adapter_that_is_wrong(inputs: Inputs, exported: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(exported / "peft", tmp_path / "broken")
    content = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(content | {"lora_alpha": 6}))
    found = verify_export(*inputs, peft=broken)
    rows = by_name(found)
    assert [rows[name].passed for name in PEFT] == [False, False] and not found.passed
    assert len(found.bits) == 1 and found.report().count("FAILED") == 3


def test_one_flipped_bit_of_an_exported_peft_folder_fails(inputs: Inputs, exported: Path, tmp_path: Path) -> None:
    """Logits do not show it. In another's folder nothing says what the bits must be."""
    copy = shutil.copytree(exported / "peft", tmp_path / "peft")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    flip_bit(copy / "adapter_model.safetensors", name)
    found = verify_export(*inputs, peft=copy, inside="none")
    assert not found.passed and all(row.passed for row in found.logits)
    (bits,) = found.bits
    assert bits.differences == (f"{copy / 'adapter_model.safetensors'}: {name} differs from the adapter's export",)
    assert found.report().startswith("PEFT files, bit by bit: the adapter's export  FAILED: 1 differ\n  ")
    assert len(found.notes) == 1 and "they differ from the adapter in native/" in found.notes[0]
    (copy / EXPORT_RECORD).unlink()
    assert verify_export(*inputs, peft=copy, inside="none").passed


def test_the_export_of_another_adapter_fails(base: Path, exported: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6", layers=(2,))
    found = verify_export(source, adapter, peft=exported / "peft", inside="none")
    (bits,) = found.bits
    assert not found.passed
    unknown = [difference for difference in bits.differences if difference.endswith("is not in the adapter's export")]
    assert len(unknown) == 2 * 3 * 2  # two layers' q, k and v


def test_the_check_fails_an_adapter_that_changes_nothing(base: Path) -> None:
    source, _, oracle = with_adapter(base, "tl6")
    adapter = native_adapter(source, oracle.with_tensors(v=torch.zeros_like(oracle.v)))
    found = verify_export(source, adapter)
    (row,) = found.logits
    assert not found.passed
    assert not row.passed and "changes nothing" in row.verdict


def test_one_flipped_bit_fails_where_logits_do_not_show_it(inputs: Inputs, exported: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(exported / "merged", tmp_path / "broken")
    name = "model.layers.2.mlp.down_proj.weight"
    flip_bit(broken / "model.safetensors", name, row=30)
    found = verify_export(*inputs, merged=broken, inside="none")
    assert all(row.passed for row in found.logits) and not found.passed
    assert f"FAILED: 1 differ\n  {broken / 'model.safetensors'}: {name} differs from the base in" in found.report()


@pytest.mark.parametrize("method", ["tl6", "lora"])
def test_all_targets(base: Path, tmp_path: Path, method: str) -> None:
    """Also by transformers, which computes them from the merged folder."""
    source, adapter, _ = with_adapter(base, method, targets=TARGET_NAMES)
    merge_adapter(source, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    found = verify_export(source, adapter, merged=tmp_path / "merged")
    assert found.passed and ": 21 tensors with the adapter" in found.bits[0].compared
    rows = by_name(found)
    assert all(rows[f"{name}, rounded"].largest < 1e-5 for name in MERGED)


# --------------------------------------------------------------------------------------------- dtype, and what loads


def test_in_bf16_only_the_rounded_weights_are_judged(inputs: Inputs, exported: Path) -> None:
    for merged in ("merged", "merged16"):
        found = verify_export(*inputs, merged=exported / merged, dtype=torch.bfloat16)
        assert [row.name for row in found.logits] == ["base without adapter", "merged", "  against rounded weights"]
        assert found.passed and found.logits[1].largest > 1e-3 and found.logits[2].largest == 0


@pytest.mark.parametrize(
    ("inside", "names"),
    [("none", ()), ("transformers", MERGED[1:]), ("peft", PEFT[1:]), ("peft,transformers", (MERGED[1], PEFT[1]))],
)
def test_what_loads_the_exports_can_be_chosen(
    inputs: Inputs, exported: Path, inside: str, names: tuple[str, ...]
) -> None:
    found = verify_export(*inputs, merged=exported / "merged", peft=exported / "peft", inside=inside)
    assert tuple(name for name in by_name(found) if ", in " in name) == names and found.passed


def test_a_large_model_is_not_loaded_whole(
    base: Path, inputs: Inputs, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "LARGEST_WHOLE", 1000)
    exports = {"merged": exported / "merged", "peft": exported / "peft"}
    found = verify_export(*inputs, **exports)
    assert tuple(by_name(found)) == ("base without adapter", "merged", "PEFT adapter") and found.passed

    assert found.report().splitlines()[-1].startswith(f"note: {base} takes ")
    assert found.notes[0].endswith("kB in fp32; give --in transformers,peft to load all of it there too")
    assert verify_export(*inputs).notes == ()
    asked = verify_export(*inputs, merged=exports["merged"], inside="transformers")
    assert tuple(by_name(asked)) == ("base without adapter", *MERGED)


def test_the_table_of_nan_fails() -> None:
    row = LogitComparison("merged", float("nan"), 0.0, 0.0, 1.0, "equal")
    assert not row.passed and "FAILED" in format_comparisons([row]) and not Verification((), (row,)).passed


def test_the_command_takes_a_peft_folder_as_the_adapter(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As merging does."""
    peft, merged = str(exported / "peft"), str(exported / "merged")
    assert call("verify", ["--adapter", peft, "--merged", merged, "--in", "none", "--dtype", "bf16"]) == 0
    *_, judged = capsys.readouterr().out.splitlines()
    assert judged.startswith("  against rounded weights") and judged.split()[3] == "0.0e+00"


# --------------------------------------------------------------------------------------------- memory

READS_PROC = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
IMPORTS = "from megatron_tiedlora.commands.front import call; from megatron_tiedlora.convert import inputs, verify"


def check(folder: Path, *flags: str) -> Peak:
    """Check the merged folder in `folder` by the command; its imports do not count."""
    exports = ["--adapter", folder / "adapter", "--merged", folder / "merged"]
    found = peak_of(IMPORTS, 'assert call("verify", sys.argv[1:]) == 0', *exports, *flags)
    assert found.samples > 10, found.printed
    return found


def write_merged(folder: Path, targets: tuple[str, ...]) -> None:
    """Merge an adapter of the model in `folder`."""
    write_wide_adapter(folder / "adapter", folder / "base", targets)
    opened = open_adapter(folder / "adapter", None)
    merge_adapter(opened.source, opened.adapter, folder / "merged", new=new_output)


def layer_bytes(base: Path, dtype: torch.dtype) -> int:
    """The size of a layer's matrices in `dtype`."""
    return find_model(str(base)).shape.block.num_weights * dtype.itemsize


@READS_PROC
def test_a_model_of_two_layers_takes_the_memory_of_one(tmp_path: Path) -> None:
    """A layer is small here beside the rest, which is 20 MB."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 2, "vocab_size": 500}
    write_wide_model(tmp_path / "base", file_bytes=10**8, **sizes, **heads)
    write_merged(tmp_path, TARGET_NAMES)
    report, start, peak, _ = check(tmp_path, "--in", "none")
    layer = layer_bytes(tmp_path / "base", torch.float32)
    assert layer > 80e6
    assert peak - start < 1.5 * layer, f"{(peak - start) / 1e6:.0f} MB, a layer is {layer / 1e6:.0f} MB\n{report}"


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed at once: pytest keeps those of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@READS_PROC
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("targets", [("qkv",), TARGET_NAMES], ids=["qkv", "all"])
def test_llama2_70b_shapes_take_the_memory_of_one_layer(large_folder: Path, targets: tuple[str, ...]) -> None:
    """Four layers: 7.9 GB for the base, and as much for the merged folder. Python and torch are in the peak."""
    write_wide_model(large_folder / "base", file_bytes=2 * 10**9, num_hidden_layers=4)
    write_merged(large_folder, targets)
    for dtype, flag in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        report, _, peak, _ = check(large_folder, "--dtype", flag)
        layer = layer_bytes(large_folder / "base", dtype)
        print(f"\n{flag}: peak of RssAnon {peak / 1e9:.2f} GB, a layer is {layer / 1e9:.2f} GB\n{report}")
        assert peak < 1.2 * layer
        (judged,) = (line for line in report.splitlines() if line.startswith("  against rounded weights"))
        assert judged.endswith("ok")


# --------------------------------------------------------------------------------------------- one layer at a time


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 100 rows at a time, which do not divide the vocabulary, and weights read by 64 rows."""
    monkeypatch.setattr(blocks, "_HEAD_ELEMENTS", 100 * 32)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64 * 32)


def logits(base: Path, dtype: torch.dtype, **adapter_fields: object) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of base + adapter and of the base: one layer at a time, and by whole models."""
    source, adapter, _ = with_adapter(base, "tl6", **adapter_fields)
    tokens = torch.randint(0, source.shape.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with BaseWeights(base, source.shape) as weights:
        models: list[Weights] = [(weights.read, {"native": adapter}), (weights.read, {"plain": None})]
        found = layerwise_logits(source.shape, models, tokens, dtype=dtype)
    positions = torch.arange(17).expand_as(tokens)
    whole = {"native": load_model(source, adapter, dtype=dtype), "plain": load_model(source, None, dtype=dtype)}
    with torch.no_grad():
        return {name: (found[name], model.predict(tokens, positions)) for name, model in whole.items()}


# Options of the model, and of its adapter.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (FAMILY_MODELS.get(name, {}), {"layers": (1, 3)}) for name in ("llama", *FAMILY_MODELS)},
    **{
        f"{'-'.join(targets)} {layers}": ({}, {"targets": targets, "layers": layers})
        for targets in (("o_proj",), ("gate_up",), ("down_proj",), TARGET_NAMES)
        for layers in ((3,), (1, 2))
    },
    "stored in fp16": ({"dtype": torch.float16}, {}),
    "stored in fp64": ({"dtype": torch.float64}, {}),
}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_whole_model(tmp_path: Path, case: str) -> None:
    model, adapter = CASES[case]
    found = logits(write_tiny_model(tmp_path, tokenizer=False, **model), torch.float32, **adapter)
    for by_layer, whole in found.values():
        torch.testing.assert_close(by_layer, whole, rtol=1e-5, atol=1e-5)
    native, plain = found["native"][0], found["plain"][0]
    assert (native - plain).abs().max() > 0.02 * native.abs().max()


@pytest.mark.usefixtures("small_parts")
def test_logits_in_bf16(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path, dtype=torch.bfloat16, tokenizer=False)
    for found, whole in logits(base, torch.bfloat16).values():
        assert found.dtype == torch.float32
        assert (found - whole.float()).abs().max() < 0.02 * whole.abs().max()


def batch(rows: int, length: int, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 320, (rows, length), generator=generator)
    labels = tokens.roll(-1, 1).masked_fill(torch.rand(rows, length, generator=generator) < 0.3, -100)
    labels[:, -1] = -100
    lengths = torch.full((rows,), length)
    positions = torch.arange(length).expand(rows, length)
    return MicroBatch(tokens=tokens, positions=positions, labels=labels, lengths=lengths, num_samples=rows)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_the_loss_is_that_of_the_whole_model(
    tied: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SHARE", share)
    monkeypatch.setattr(layer_specs, "HEAD_ROWS", 7)
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, tied=tied)
    source, adapter, _ = with_adapter(folder, "tl6", (1, 3), targets=("qkv", "down_proj"))
    batches = [batch(2, 11, 0), batch(3, 20, 1), batch(1, 8, 2)]
    model = load_model(source, adapter, dtype=torch.float32)
    plain = load_model(source, None, dtype=torch.float32)
    calls: list[None] = []
    with BaseWeights(folder, source.shape) as weights:
        options: Any = {"dtype": torch.float32, "device": torch.device("cpu"), "between": lambda: calls.append(None)}
        found = layerwise_loss(source.shape, weights.read, adapter, batches, **options)
    wanted, without = (
        sum(float(whole.predict(some.tokens, some.positions, some.labels).sum()) for some in batches)
        for whole in (model, plain)
    )
    assert found == pytest.approx(wanted, rel=1e-5) and abs(without - wanted) > 1e-2 * wanted
    assert len(calls) == 3 * (1 if share else 3)
