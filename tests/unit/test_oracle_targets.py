"""The oracle's adapters of any targets, against merged weights and PEFT's LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import FAMILY_MODELS
from oracle import OracleConfig, load_weights, merged_weights, oracle_logits
from oracle_adapter import ALL_TARGETS
from peft_models import share
from tiny_models import random_adapter, tiny_model, write_tiny_model

TOKENS = torch.randint(3, 320, (2, 40), generator=torch.Generator().manual_seed(3))
TARGETS = {**{name: (name,) for name in ALL_TARGETS[1:]}, "all": ALL_TARGETS}
MODULES = {
    "qkv": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "o_proj": {"self_attn.o_proj"},
    "gate_up": {"mlp.gate_proj", "mlp.up_proj"},
    "down_proj": {"mlp.down_proj"},
}


@pytest.mark.parametrize("shape", ["llama dynamic", "qwen2", "qwen3", "phi3", "stablelm", "smollm3", "olmo2"])
@pytest.mark.parametrize("targets", TARGETS)
@torch.no_grad()
def test_logits_are_those_of_the_merged_weights_for_every_target(tmp_path: Path, targets: str, shape: str) -> None:
    """In fp64, on the layers given; what is not a target keeps its bits."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, **FAMILY_MODELS[shape])
    weights, config = load_weights(folder, torch.float64), OracleConfig.from_folder(folder)
    assert len({config.hidden_size, config.intermediate_size, config.qkv_rows}) == 3
    layers = (1, config.num_layers)
    for method in ("lora", "tl6"):
        adapter = random_adapter(
            method, config, alpha=6.0, layers=layers, dtype=torch.float64, targets=TARGETS[targets]
        )
        merged = merged_weights(weights, config, adapter)
        names = {module for target in TARGETS[targets] for module in MODULES[target]}
        wanted = {f"model.layers.{layer - 1}.{module}.weight" for layer in layers for module in names}
        assert {name for name in weights if not torch.equal(weights[name], merged[name])} == wanted
        logits = oracle_logits(weights, config, adapter, TOKENS)
        assert share(logits, oracle_logits(weights, config, None, TOKENS)) > 0.05
        assert share(logits, oracle_logits(merged, config, None, TOKENS)) < 1e-12


@pytest.mark.parametrize("method", ["lora", "tl6"])
@torch.no_grad()
def test_logits_with_every_target_are_those_of_peft(method: str) -> None:
    """PEFT's LoRA of each module with A' = diag(u) A, which a target's modules share, and its rows of diag(v) B."""
    from peft import LoraConfig, get_peft_model

    model = tiny_model(head_dim=12)
    weights, config = dict(model.state_dict()), OracleConfig.from_hf(model.config.to_dict())
    adapter = random_adapter(method, config, alpha=6.0, targets=ALL_TARGETS)
    plain = oracle_logits(weights, config, None, TOKENS)
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=6.0, target_modules="all-linear", task_type="CAUSAL_LM"))
    q, kv, f = 4 * 12, 2 * 12, 48
    cuts = {  # of each module's rows among its target's
        "self_attn": {"q_proj": ("", 0, q), "k_proj": ("", q, kv), "v_proj": ("", q + kv, kv)}
        | {"o_proj": ("o_proj.", 0, 32)},
        "mlp": {"gate_proj": ("gate_up.", 0, f), "up_proj": ("gate_up.", f, f), "down_proj": ("down_proj.", 0, 32)},
    }
    filled = 0
    for i, layer in enumerate(theirs.base_model.model.model.layers):
        for part, modules in cuts.items():
            for name, (prefix, first, rows) in modules.items():
                a, b, u, v = (adapter.tensors[f"{prefix}{factor}"] for factor in "ABuv")
                a, b = (a[i], b[i]) if method == "lora" else (a, b)
                module = getattr(getattr(layer, part), name)
                module.lora_A["default"].weight.copy_(torch.diag(u[i]) @ a)
                module.lora_B["default"].weight.copy_((torch.diag(v[i]) @ b)[first : first + rows])
                filled += 2
    assert filled == sum("lora_" in name for name, _ in theirs.named_parameters()) == 7 * 2 * config.num_layers
    ours = oracle_logits(weights, config, adapter, TOKENS)
    assert share(ours, plain) > 0.05
    assert share(ours, theirs(TOKENS).logits) < 1e-5
