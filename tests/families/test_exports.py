"""Merged folders and PEFT adapters of every family compute what the adapter computes, in transformers and in PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_models import FAMILY_MODELS
from native_files import write_native
from oracle import OracleConfig
from safetensors.torch import load_file, save_file
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import read_peft
from megatron_tiedlora.convert.verify import TOLERANCE, verify_export


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_exports_compute_what_the_adapter_computes(tmp_path: Path, name: str) -> None:
    base = write_tiny_model(tmp_path / "base", **FAMILY_MODELS[name])
    source = find_model(str(base))
    oracle = random_adapter("tl6", OracleConfig.from_folder(base), rank=4, alpha=6.0)
    adapter = write_native(tmp_path / "native", base, oracle)
    merge_adapter(source, adapter, tmp_path / "merged")
    export_peft(source, adapter, tmp_path / "peft")
    found = verify_export(source, adapter, merged=tmp_path / "merged", peft=tmp_path / "peft")
    assert TOLERANCE == 1e-4 and len(found.logits) == 5 and found.bits[0].compared.count("with the adapter") == 1
    assert int(found.bits[0].compared.split()[5]) >= 3
    assert found.passed and found.logits[0].largest > 0.02, found.report()
    assert json.loads((tmp_path / "merged/config.json").read_text()) == json.loads((base / "config.json").read_text())

    back = read_peft(tmp_path / "peft", source).adapter  # the same product as plain LoRA
    ids = torch.randint(3, 320, (1, 24), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(24).expand_as(ids)
    with torch.no_grad():
        mine, theirs = (load_model(source, a, dtype=torch.float32).predict(ids, positions) for a in (adapter, back))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["q", "k"])
def test_a_norm_of_heads_with_a_zero_is_rejected(tmp_path: Path, part: str) -> None:
    """The backward pass divides by it."""
    base = write_tiny_model(tmp_path / "base", tokenizer=False, **FAMILY_MODELS["qwen3"])
    tensors = load_file(base / "model.safetensors")
    name = f"model.layers.1.self_attn.{part}_norm.weight"
    tensors[name][3] = 0.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} has a zero, by which training would divide"):
        load_model(find_model(str(base)), None, dtype=torch.float32)
