"""The check of exports: what passes, what fails and how, and what loads the exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from flipped_bits import flip_bit
from native_files import native_adapter, with_adapter, write_exports
from oracle import load_weights
from safetensors.torch import save_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.cli import build_parser
from megatron_tiedlora.config.tool_settings import VerifySettings
from megatron_tiedlora.convert import verify
from megatron_tiedlora.convert.inputs import EXPORT_RECORD
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import LogitComparison, Verification, format_comparisons, verify_export

ALL = ("qkv", "o_proj", "gate_up", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with kv heads < heads."""
    return write_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapter/, merged/, merged16/ and peft/ of one adapter."""
    return write_exports(tmp_path_factory.mktemp("exported"), base)


def test_the_help_says_what_is_compared_bit_by_bit() -> None:
    """See `BitComparison` in the report: merged files, and PEFT files of this package."""
    help_text = " ".join(build_parser(VerifySettings).format_help().split())
    assert "Every tensor of the merged files is compared bit by bit" in help_text
    assert "A PEFT folder that this package exported is compared bit by bit with the adapter's export" in help_text


def by_name(found: Verification) -> dict[str, LogitComparison]:
    """The rows of the table; each comparison with rounded weights under the name of the row that it belongs to."""
    rows: dict[str, LogitComparison] = {}
    for row in found.logits:
        rows[f"{[*rows][-1]}, rounded" if row.name.startswith(" ") else row.name] = row
    return rows


MERGED, PEFT = ("merged", "merged, in transformers"), ("PEFT adapter", "PEFT adapter, in peft")


def test_the_check_passes_what_is_right(base: Path, exported: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    found = verify_export(source, adapter, merged=exported / "merged", peft=exported / "peft")
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


def test_the_check_takes_the_rounding_of_16_bits_out(base: Path, exported: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    found = verify_export(source, adapter, merged=exported / "merged16")
    rows = by_name(found)
    for name in MERGED:
        shown, judged = rows[name], rows[f"{name}, rounded"]
        assert shown.largest > 1e-3 and shown.passed and "information" in shown.verdict
        assert judged.largest < 1e-5 and judged.passed
    assert rows["base without adapter"].passed and found.passed


@pytest.mark.parametrize("which", ["merged", "merged16"])
@pytest.mark.parametrize("damage", ["plain", "swapped", "halved"])
def test_the_check_fails_a_merge_that_is_wrong(
    base: Path, exported: Path, tmp_path: Path, which: str, damage: str
) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
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
    found = verify_export(source, adapter, merged=broken)
    rows = by_name(found)
    judged = [rows[name if which == "merged" else f"{name}, rounded"] for name in MERGED]
    assert not found.passed and not any(row.passed for row in judged)  # each alone would have been enough
    named = value if damage == "swapped" else key
    (bits,) = found.bits
    assert len(bits.differences) == 1 and named in bits.differences[0]


def test_the_check_fails_a_peft_adapter_that_is_wrong(base: Path, exported: Path, tmp_path: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    broken = shutil.copytree(exported / "peft", tmp_path / "broken")
    content = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(content | {"lora_alpha": 6}))
    found = verify_export(source, adapter, peft=broken)
    rows = by_name(found)
    assert [rows[name].passed for name in PEFT] == [False, False] and not found.passed
    assert len(found.bits) == 1 and found.report().count("FAILED") == 3


def test_one_flipped_bit_of_an_exported_peft_folder_fails(base: Path, exported: Path, tmp_path: Path) -> None:
    """Logits do not show it. In another's folder nothing says what the bits must be."""
    source, adapter, _ = with_adapter(base, "tl6")
    copy = shutil.copytree(exported / "peft", tmp_path / "peft")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    flip_bit(copy / "adapter_model.safetensors", name)
    found = verify_export(source, adapter, peft=copy, inside="none")
    assert not found.passed and all(row.passed for row in found.logits)
    (bits,) = found.bits
    assert bits.differences == (f"{copy / 'adapter_model.safetensors'}: {name} differs from the adapter's export",)
    assert found.report().startswith("PEFT files, bit by bit: the adapter's export  FAILED: 1 differ\n  ")
    assert len(found.notes) == 1 and "they are not what the adapter in native/ gives" in found.notes[0]
    (copy / EXPORT_RECORD).unlink()
    assert verify_export(source, adapter, peft=copy, inside="none").passed


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


def test_one_flipped_bit_fails_where_logits_do_not_show_it(base: Path, exported: Path, tmp_path: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    broken = shutil.copytree(exported / "merged", tmp_path / "broken")
    name = "model.layers.2.mlp.down_proj.weight"
    flip_bit(broken / "model.safetensors", name, row=30)
    found = verify_export(source, adapter, merged=broken, inside="none")
    assert all(row.passed for row in found.logits) and not found.passed
    assert f"FAILED: 1 differ\n  {broken / 'model.safetensors'}: {name} differs from the base in" in found.report()


@pytest.mark.parametrize("method", ["tl6", "lora"])
def test_all_targets(base: Path, tmp_path: Path, method: str) -> None:
    """Also by transformers, which computes them from the merged folder."""
    source, adapter, _ = with_adapter(base, method, targets=ALL)
    merge_adapter(source, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    found = verify_export(source, adapter, merged=tmp_path / "merged")
    assert found.passed and ": 21 tensors with the adapter" in found.bits[0].compared
    rows = by_name(found)
    assert all(rows[f"{name}, rounded"].largest < 1e-5 for name in MERGED)


# --------------------------------------------------------------------------------------------- dtype, and what loads


def test_in_bf16_only_the_rounded_weights_are_judged(base: Path, exported: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    for merged in ("merged", "merged16"):
        found = verify_export(source, adapter, merged=exported / merged, dtype=torch.bfloat16)
        assert [row.name for row in found.logits] == ["base without adapter", "merged", "  against rounded weights"]
        assert found.passed and found.logits[1].largest > 1e-3 and found.logits[2].largest == 0
    with pytest.raises(UserError, match="--dtype bf16: a PEFT adapter is compared in fp32 only"):
        verify_export(source, adapter, peft=exported / "peft", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("inside", "names"),
    [("none", ()), ("transformers", MERGED[1:]), ("peft", PEFT[1:]), ("peft,transformers", (MERGED[1], PEFT[1]))],
)
def test_what_loads_the_exports_can_be_chosen(base: Path, exported: Path, inside: str, names: tuple[str, ...]) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    found = verify_export(source, adapter, merged=exported / "merged", peft=exported / "peft", inside=inside)
    assert tuple(name for name in by_name(found) if ", in " in name) == names and found.passed


def test_a_large_model_is_not_loaded_whole(base: Path, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    monkeypatch.setattr(verify, "LARGEST_WHOLE", 1000)
    exports = {"merged": exported / "merged", "peft": exported / "peft"}
    found = verify_export(source, adapter, **exports)
    assert tuple(by_name(found)) == ("base without adapter", "merged", "PEFT adapter") and found.passed

    assert found.report().splitlines()[-1].startswith(f"note: {base} takes ")
    assert found.notes[0].endswith("kB in fp32; --in transformers,peft loads all of it there too")
    assert verify_export(source, adapter).notes == ()
    asked = verify_export(source, adapter, merged=exports["merged"], inside="transformers")
    assert tuple(by_name(asked)) == ("base without adapter", *MERGED)


@pytest.mark.parametrize(
    ("inside", "exports", "message"),
    [
        ("vllm", {"merged"}, "--in vllm: 'vllm' is not one of transformers, peft, none"),
        ("transformers,", {"merged"}, "--in transformers,: '' is not one of"),
        ("peft", {"merged"}, "--in peft: peft has nothing to load; give --peft DIR"),
        ("transformers", {"peft"}, "--in transformers: transformers has nothing to load; give --merged DIR"),
    ],
)
def test_wrong_names_of_what_loads(base: Path, exported: Path, inside: str, exports: set[str], message: str) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    with pytest.raises(UserError) as error:
        verify_export(source, adapter, **{name: exported / name for name in exports}, inside=inside)
    assert message in str(error.value)


def test_transformers_computes_in_fp32_only(base: Path, exported: Path) -> None:
    source, adapter, _ = with_adapter(base, "tl6")
    with pytest.raises(UserError, match="transformers computes in fp32, so --dtype bf16 cannot"):
        verify_export(source, adapter, merged=exported / "merged", dtype=torch.bfloat16, inside="transformers")


def test_the_table_of_nan_fails() -> None:
    row = LogitComparison("merged", float("nan"), 0.0, 0.0, 1.0, "equal")
    assert not row.passed and "FAILED" in format_comparisons([row]) and not Verification((), (row,)).passed


def test_the_command_takes_a_peft_folder_as_the_adapter(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As merging does."""
    from megatron_tiedlora.commands.front import call

    peft, merged = str(exported / "peft"), str(exported / "merged")
    assert call("verify", ["--adapter", peft, "--merged", merged, "--in", "none", "--dtype", "bf16"]) == 0
    *_, judged = capsys.readouterr().out.splitlines()
    assert judged.startswith("  against rounded weights") and judged.split()[3] == "0.0e+00"
