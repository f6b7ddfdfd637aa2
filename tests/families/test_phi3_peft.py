"""Phi-3 trained by PEFT is the reference: its LoRA and VeRA on the fused `qkv_proj` are this package's methods.

PEFT's side uses transformers, PEFT and torch alone, with a schedule and samples of its own (`peft_training`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import EngineRun, relative_distance, relative_errors, run_engine, save_start
from oracle import OracleAdapter, OracleConfig
from peft_training import RANK, peft_losses, settings_for_peft
from tiny_models import random_adapter, write_tiny_model

SCALES = {"lora": 2.0, "vera": 1.0}  # alpha / r; PEFT's VeRA has none
# The trained tensors by PEFT's names for them.
TRAINED = {"lora": {"A": "lora_A", "B": "lora_B"}, "vera": {"u": "vera_lambda_d", "v": "vera_lambda_b"}}
PROJECTION = "base_model.model.model.layers.{}.self_attn.qkv_proj"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("phi3")
    model = write_tiny_model(folder / "model", family="phi3", rope={"partial_rotary_factor": 0.5})
    return settings_for_peft(model, folder)


@pytest.fixture(scope="module")
def starts(settings: dict[str, Any]) -> dict[str, OracleAdapter]:
    """Non-zero factors of each method."""
    config = OracleConfig.from_folder(Path(settings["model"]))
    return {
        method: random_adapter(method, config, rank=RANK, alpha=scale * RANK, seed=3, scale=0.2)
        for method, scale in SCALES.items()
    }


@pytest.fixture(scope="module")
def ours(
    settings: dict[str, Any], starts: dict[str, OracleAdapter], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, EngineRun]:
    """This package's runs from these factors, in one start of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    cases = [
        {
            "settings": {**settings, "method": method, "alpha": start.alpha},
            "start": str(save_start(start, folder / f"{method}.safetensors")),
        }
        for method, start in starts.items()
    ]
    return dict(zip(starts, run_engine(cases, folder, ranks=1), strict=True))


def peft_start(method: str, settings: dict[str, Any], start: OracleAdapter) -> tuple[Any, dict[str, list[Any]]]:
    """PEFT's model with the factors of `start`, and its trained parameters layer by layer."""
    from peft import LoraConfig, VeraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    common = {"task_type": "CAUSAL_LM", "r": RANK, "target_modules": ["qkv_proj"]}
    config = LoraConfig(**common, lora_alpha=start.alpha) if method == "lora" else VeraConfig(**common)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32), config)
    found = dict(model.named_parameters())
    suffix = ".default.weight" if method == "lora" else ".default"
    parameters = {
        name: [found[f"{PROJECTION.format(layer - 1)}.{theirs}{suffix}"] for layer in start.layers]
        for name, theirs in TRAINED[method].items()
    }
    with torch.no_grad():
        for name, of_layers in parameters.items():
            for parameter, value in zip(of_layers, start.tensors[name], strict=True):
                parameter.copy_(value)
        if method == "vera":
            model.base_model.vera_A["default"].copy_(start.tensors["A"])
            model.base_model.vera_B["default"].copy_(start.tensors["B"])
    assert sum(len(of_layers) for of_layers in parameters.values()) == sum(p.requires_grad for p in model.parameters())
    return model, parameters


@pytest.mark.distributed
@pytest.mark.parametrize("method", SCALES)
def test_training_is_peft_s(
    settings: dict[str, Any], starts: dict[str, OracleAdapter], ours: dict[str, EngineRun], method: str
) -> None:
    model, parameters = peft_start(method, settings, starts[method])
    losses = peft_losses(model, [parameter for of_layers in parameters.values() for parameter in of_layers], settings)
    assert max(relative_errors(ours[method].losses, losses)) <= 1e-6
    for name, of_layers in parameters.items():
        expected = torch.stack([parameter.detach() for parameter in of_layers])
        assert relative_distance(ours[method].adapter[name], expected) <= 5e-5, name
        assert relative_distance(starts[method].tensors[name], expected) > 1e-3, name  # it was trained
    assert losses[-1] < losses[0] - 0.01
