"""Merged checkpoints and PEFT adapters compute what the native adapter computes, in the programs that read them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import with_adapter
from oracle import OracleAdapter, OracleConfig, delta_weights, load_weights, merged_weights
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.model.families import shape_from_hf

INDEX = "model.safetensors.index.json"
PLAIN = shape_from_hf(PRESETS["llama2-7b"])

# name: (model, sharded, adapted layers or all)
CASES: dict[str, tuple[dict[str, Any], bool, tuple[int, ...] | None]] = {
    "gqa": ({}, False, None),
    "mha_sharded": ({"num_kv_heads": 4}, True, None),
    "some_layers_sharded": ({"tied": True, "head_dim": 12}, True, (1, 3)),
    "one_layer_bias": ({"attention_bias": True, "llama3_rope": True}, False, (2,)),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {
        name: write_tiny_model(root / name, max_shard_size="30KB" if sharded else None, **shape)
        for name, (shape, sharded, _) in CASES.items()
    }


@pytest.fixture(scope="module")
def gqa(bases: dict[str, Path]) -> tuple[ModelSource, NativeAdapter, OracleAdapter]:
    """A base with kv heads < heads and a tl6 adapter of rank 4 and alpha 6."""
    return with_adapter(bases["gqa"], "tl6")


def tokens() -> torch.Tensor:
    return torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(11))


@torch.no_grad()
def native_logits(source: ModelSource, adapter: NativeAdapter | None) -> torch.Tensor:
    ids = tokens()
    return load_model(source, adapter, dtype=torch.float32).predict(ids, torch.arange(32).expand_as(ids))


@torch.no_grad()
def transformers_logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens()).logits
    return logits


@torch.no_grad()
def peft_logits(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits: torch.Tensor = PeftModel.from_pretrained(model, str(folder))(tokens()).logits
    return logits


def share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --------------------------------------------------------------------------------------------- both exports


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_exports_compute_what_the_adapter_computes(
    bases: dict[str, Path], tmp_path: Path, method: str, case: str
) -> None:
    base = bases[case]
    source, adapter, oracle = with_adapter(base, method, CASES[case][2])
    merge_adapter(source, adapter, tmp_path / "merged")
    export_peft(source, adapter, tmp_path / "peft")
    native, plain = native_logits(source, adapter), native_logits(source, None)
    assert share(plain, native) > 0.02  # the update is there
    assert share(transformers_logits(tmp_path / "merged"), native) <= 1e-4
    assert share(peft_logits(base, tmp_path / "peft"), native) <= 1e-4

    expected = merged_weights(load_weights(base), OracleConfig.from_folder(base), oracle)
    merged = load_weights(tmp_path / "merged")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)
    base_weights = load_weights(base)
    layers = CASES[case][2] or (1, 2, 3)
    changed = {f"model.layers.{i - 1}.self_attn.{part}_proj.weight" for i in layers for part in "qkv"}
    assert {name for name in merged if not torch.equal(merged[name], base_weights[name])} == changed


# --------------------------------------------------------------------------------------------- the merged folder


def test_a_merged_folder_holds_a_whole_model_and_nothing_else(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["mha_sharded"], tmp_path / "base")
    (base / "demo_manifest.json").write_text("{}")
    (base / "optimizer.json").write_text("{}")
    (base / "README.md").write_text("of the base")
    (base / "LICENSE.txt").write_text("terms")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    source, adapter, _ = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged")
    found = {file.name for file in (tmp_path / "merged").iterdir()}
    shards = {file.name for file in base.glob("*.safetensors")}
    assert len(shards) > 3
    assert found == shards | {
        INDEX,
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE.txt",
        MERGE_RECORD,
    }
    for file in (tmp_path / "merged").iterdir():
        assert file.stat().st_mode & 0o044 == (tmp_path / "merged").stat().st_mode & 0o044, file  # others may read it


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_config_states_the_dtype_that_is_stored(
    bases: dict[str, Path], tmp_path: Path, dtype: torch.dtype | None
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    source, adapter, _ = with_adapter(bases["gqa"], "tl6")
    merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    expected = dtype or torch.float32
    assert {tensor.dtype for tensor in load_weights(tmp_path / "merged").values()} == {expected}
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == expected
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == expected
    values = json.loads((tmp_path / "merged" / "config.json").read_text())
    original = json.loads((bases["gqa"] / "config.json").read_text())
    assert {**values, "dtype": None} == {**original, "dtype": None}  # nothing else changes


def test_config_of_transformers_4_states_the_dtype_in_its_own_field(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["gqa"], tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    (base / "config.json").write_text(json.dumps(values))
    source, adapter, _ = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    after = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert after["torch_dtype"] == "bfloat16" and "dtype" not in after


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_16_bit_merge_is_rounded_once(tmp_path: Path, stored: torch.dtype) -> None:
    """Casting the update first, or the base, rounds twice, which moves one weight in five or more."""
    base = write_tiny_model(tmp_path / "base", dtype=stored)
    source, adapter, oracle = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged", dtype=torch.bfloat16)
    weights, merged = load_weights(base), load_weights(tmp_path / "merged")
    same, twice = [], []
    for layer in (1, 2, 3):
        for part, delta in (delta_weights(oracle, OracleConfig.from_folder(base), layer) or {}).items():
            name = f"model.layers.{layer - 1}.self_attn.{part}_proj.weight"
            once = (weights[name].float() + delta).to(torch.bfloat16)
            same.append(merged[name] == once)
            twice.append((weights[name].to(torch.bfloat16) + delta.to(torch.bfloat16)) == once)
    assert torch.cat([part.flatten() for part in same]).float().mean() > 0.999  # fp32 sums may end in another last bit
    assert torch.cat([part.flatten() for part in twice]).float().mean() < 0.9  # the test can tell
    assert torch.equal(merged["model.norm.weight"], weights["model.norm.weight"].to(torch.bfloat16))


def test_a_copy_of_a_tied_head_stays_where_the_base_has_one(tmp_path: Path) -> None:
    """It is not adapted, so it stays right."""
    for name in ("tidy", "copied"):
        base = write_tiny_model(tmp_path / f"base_{name}", tied=True)
        tensors = load_file(base / "model.safetensors")
        extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if name == "copied" else {}
        save_file(tensors | extra, base / "model.safetensors", metadata={"format": "pt"})
        source, adapter, _ = with_adapter(base, "tl6")
        merge_adapter(source, adapter, tmp_path / name)
        assert ("lm_head.weight" in load_weights(tmp_path / name)) == (name == "copied")
        assert share(transformers_logits(tmp_path / name), native_logits(source, adapter)) <= 1e-4


def test_the_merged_tokenizer_is_the_one_of_training(bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = shutil.copytree(bases["gqa"], tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "GPT2Tokenizer"}))
    backend = json.loads((base / "tokenizer.json").read_text())
    backend["model"]["vocab"]["12"] = 259
    backend["model"]["merges"] = [["1", "2"]]
    digits = {"type": "Digits", "individual_digits": True}
    backend["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, backend["pre_tokenizer"]]}
    (base / "tokenizer.json").write_text(json.dumps(backend))
    source, adapter, _ = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged")
    ours, theirs = load_tokenizer(base), AutoTokenizer.from_pretrained(tmp_path / "merged")
    # The class name makes transformers rebuild the base's own and lose the splitting into digits.
    assert 259 in AutoTokenizer.from_pretrained(base)("12").input_ids and 259 not in ours("12").input_ids
    for text in ("Question: 12 + 30?", "  naïve\n\n日本", "</s> <s>x", ""):
        for special in (False, True):
            assert theirs(text, add_special_tokens=special).input_ids == (
                ours(text, add_special_tokens=special).input_ids
            )
    assert theirs.eos_token_id == ours.eos_token_id == 2
    content = (tmp_path / "merged" / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in content  # nothing of this machine


def test_another_tokenizer_replaces_the_base_s(bases: dict[str, Path], tmp_path: Path) -> None:
    base = shutil.copytree(bases["gqa"], tmp_path / "base")
    (base / "added_tokens.json").write_text("{}")
    other = load_tokenizer(shutil.copytree(bases["gqa"], tmp_path / "other"))
    other.add_tokens(["<only here>"])
    other.save_pretrained(tmp_path / "other")
    source, adapter, _ = with_adapter(base, "tl6")
    own = str(tmp_path / "other")
    with pytest.raises(UserError, match="trained with another tokenizer"):
        merge_adapter(source, adapter, tmp_path / "merged", tokenizer=own)
    notes: list[str] = []
    merge_adapter(source, adapter, tmp_path / "merged", tokenizer=own, base_differs=True, say=notes.append)
    assert len(notes) == 1 and "whose tokenizer differ" in notes[0]
    assert "<only here>" in load_tokenizer(tmp_path / "merged").get_vocab()
    assert not (tmp_path / "merged" / "added_tokens.json").exists()  # of the tokenizer that was replaced


def test_a_base_without_tokenizer_is_merged_without_one(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", tokenizer=False)
    source, adapter, _ = with_adapter(base, "tl6")
    merge_adapter(source, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("tokenizer*"))
    assert share(transformers_logits(tmp_path / "merged"), native_logits(source, adapter)) <= 1e-4


def test_merging_twice_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    source, adapter, _ = with_adapter(bases["gqa"], "tl6")
    merge_adapter(source, adapter, tmp_path / "merged")
    merged = find_model(str(tmp_path / "merged"))
    for action in (
        lambda: merge_adapter(merged, adapter, tmp_path / "twice"),
        lambda: export_peft(merged, adapter, tmp_path / "twice"),
    ):
        with pytest.raises(UserError, match=r"already; give the plain base with --model$"):
            action()
    assert {item.name for item in tmp_path.iterdir()} == {"merged"}


def test_an_adapter_that_was_trained_on_a_merged_model_is_merged_into_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    source, first, _ = with_adapter(bases["gqa"], "tl6")
    merge_adapter(source, first, tmp_path / "merged")
    merged, second, _ = with_adapter(tmp_path / "merged", "tl5", seed=3)
    merge_adapter(merged, second, tmp_path / "both")
    assert share(transformers_logits(tmp_path / "both"), native_logits(merged, second)) <= 1e-4
    with pytest.raises(UserError, match="weights differ"):
        merge_adapter(source, second, tmp_path / "wrong")


# --------------------------------------------------------------------------------------------- the PEFT adapter


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_peft_files_are_as_documented(bases: dict[str, Path], tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    base = bases["gqa"]
    source, adapter, oracle = with_adapter(base, "tl6", layers)
    assert export_peft(source, adapter, tmp_path / "peft").rank == 4
    files = {"adapter_config.json", "adapter_model.safetensors", "tiedlora_export.json"}
    assert {f.name for f in (tmp_path / "peft").iterdir()} == files
    content = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    expected = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,  # a path would not exist elsewhere; the record has it
        "r": 4,
        "lora_alpha": 4,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    if layers:
        expected |= {"layers_to_transform": [0, 2], "layers_pattern": "layers"}
    assert content == expected
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    rows = {"q": slice(0, 32), "k": slice(32, 48), "v": slice(48, 64)}
    names = {
        f"base_model.model.model.layers.{layer - 1}.self_attn.{part}_proj.lora_{side}.weight"
        for layer in layers or (1, 2, 3)
        for part in "qkv"
        for side in "AB"
    }
    assert tensors.keys() == names
    for index, layer in enumerate(layers or (1, 2, 3)):
        for part, cut in rows.items():
            prefix = f"base_model.model.model.layers.{layer - 1}.self_attn.{part}_proj."
            a, b = tensors[f"{prefix}lora_A.weight"], tensors[f"{prefix}lora_B.weight"]
            assert a.dtype == b.dtype == torch.float32
            torch.testing.assert_close(a, torch.diag(oracle.u[index]) @ oracle.A)
            torch.testing.assert_close(b, 6 / 4 * (torch.diag(oracle.v[index]) @ oracle.B)[cut])


def test_padding_the_rank_changes_nothing(
    gqa: tuple[ModelSource, NativeAdapter, OracleAdapter], bases: dict[str, Path], tmp_path: Path
) -> None:
    source, adapter, _ = gqa
    export_peft(source, adapter, tmp_path / "plain")
    assert export_peft(source, adapter, tmp_path / "padded", pad_rank_to=16).rank == 16
    content = json.loads((tmp_path / "padded" / "adapter_config.json").read_text())
    assert content["r"] == content["lora_alpha"] == 16
    plain, padded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "padded"))
    for name, tensor in padded.items():
        kept, filled = (tensor[:4], tensor[4:]) if "lora_A" in name else (tensor[:, :4], tensor[:, 4:])
        assert filled.numel() and torch.equal(kept, plain[name]) and not filled.any()
    assert share(peft_logits(bases["gqa"], tmp_path / "padded"), native_logits(source, adapter)) <= 1e-4


@pytest.mark.parametrize("rank", [3, 0, -8])
def test_a_padded_rank_below_the_adapter_s_is_refused(
    gqa: tuple[ModelSource, NativeAdapter, OracleAdapter], tmp_path: Path, rank: int
) -> None:
    with pytest.raises(UserError, match=f"--pad_rank_to {rank} is less than the adapter's rank 4"):
        export_peft(*gqa[:2], tmp_path / "peft", pad_rank_to=rank)
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_refused_by_tensor(bases: dict[str, Path], tmp_path: Path) -> None:
    """A NaN of the base in computed weights, an update that fp16 does not hold, factors that overflow."""
    broken = Path(shutil.copytree(bases["gqa"], tmp_path / "base"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(broken / "model.safetensors")
    tensors[name][2, 3] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    says = rf"{name} holds numbers that are not finite \(the base is broken\)"
    for targets, dtype in ((("gate_up",), None), (("qkv",), torch.float32)):
        source, adapter, _ = with_adapter(broken, "tl6", targets=targets)
        with pytest.raises(UserError, match=says):
            merge_adapter(source, adapter, tmp_path / "merged", dtype=dtype)
    source, adapter, _ = with_adapter(bases["gqa"], "tl6")
    large = replace(adapter, state={**adapter.state, "A": adapter.state["A"] * 1e5})
    with pytest.raises(UserError, match=r"[qkv]_proj\.weight holds .* does not fit float16; give --dtype bf16"):
        merge_adapter(source, large, tmp_path / "merged", dtype=torch.float16)
    wide = {**adapter.state, "B": adapter.state["B"] * 1e37}
    huge = replace(adapter, config=replace(adapter.config, alpha=1e6), state=wide)
    with pytest.raises(UserError, match=r"lora_B.weight of its export holds numbers that are not finite"):
        export_peft(source, huge, tmp_path / "peft")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}
