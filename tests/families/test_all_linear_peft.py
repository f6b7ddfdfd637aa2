"""PEFT's LoRA on `all-linear`, with one A for the modules that a target fuses, is `lora` with all targets: 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import relative_distance, relative_errors, run_engine, save_start
from oracle import OracleConfig
from oracle_adapter import ALL_TARGETS, TARGET_PARTS, tensor_name
from peft_training import ALPHA, RANK, all_linear_lora, peft_losses, settings_for_peft
from tiny_models import random_adapter, write_tiny_model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("all_linear")
    model = write_tiny_model(folder / "model", head_dim=12)
    return {**settings_for_peft(model, folder), "method": "lora", "targets": list(ALL_TARGETS)}


@pytest.mark.distributed
def test_training_is_that_of_peft_with_tied_a(settings: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sizes = OracleConfig.from_folder(settings["model"])
    start = random_adapter("lora", sizes, rank=RANK, alpha=ALPHA, seed=3, scale=0.2, targets=ALL_TARGETS)
    case = {"settings": settings, "start": str(save_start(start, tmp_path / "start.safetensors"))}
    (ours,) = run_engine([case], tmp_path, ranks=1)
    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model, factors = all_linear_lora(base, start, sizes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # a shared one is there once
    assert len(trained) == sizes.num_layers * (4 + 7)
    losses = peft_losses(model, trained, settings)
    assert max(relative_errors(ours.losses, losses)) <= 1e-6
    for target, parts in TARGET_PARTS.items():
        of_layers = [[factors[target, layer, part] for part in parts] for layer in start.layers]
        expected = {
            "A": torch.stack([of_parts[0][0].detach() for of_parts in of_layers]),
            "B": torch.stack([torch.cat([b.detach() for _, b in of_parts]) for of_parts in of_layers]),
        }
        for factor, tensor in expected.items():
            name = tensor_name(target, factor)
            assert relative_distance(ours.adapter[name], tensor) <= 5e-5, name
            assert relative_distance(start.tensors[name], tensor) > 1e-3, name  # it was trained
    assert losses[-1] < losses[0] - 0.01
