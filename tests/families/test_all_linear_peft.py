"""PEFT's LoRA on `all-linear`, with one A for the modules that a target fuses, is `lora` with all targets: 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import relative_distance, relative_errors, run_engine, save_start, write_uneven_data
from layout_runs import settings_of
from oracle import OracleAdapter, OracleConfig
from oracle_adapter import ALL_TARGETS, TARGET_PARTS, tensor_name
from peft_training import peft_losses
from tiny_models import random_adapter, write_tiny_model

STEPS, ROWS, RANK, ALPHA = 20, 8, 3, 6.0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose every step takes all rows, so that their order does not matter."""
    folder = tmp_path_factory.mktemp("all_linear")
    model = write_tiny_model(folder / "model", head_dim=12)
    return {
        **settings_of(model, folder),
        "train_file": str(write_uneven_data(folder / "all.jsonl", rows=ROWS)),
        "global_batch_size": ROWS,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "rank": RANK,
        "alpha": ALPHA,
        "learning_rate": 5e-3,
        "method": "lora",
        "targets": list(ALL_TARGETS),
    }


def peft_start(settings: dict[str, Any], start: OracleAdapter) -> tuple[Any, dict[tuple[str, int, str], Any]]:
    """PEFT's model with the factors of `start`, and its "A" of each target, layer and part ("q"), and its "B"."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    sizes = OracleConfig.from_folder(settings["model"])
    factors: dict[tuple[str, int, str], Any] = {}
    for target, parts in TARGET_PARTS.items():
        for index, layer in enumerate(start.layers):
            a, b = (start.tensor(target, factor)[index] for factor in "AB")
            shared = torch.nn.Parameter(a.clone())
            for (part, name), rows in zip(parts.items(), b.split(sizes.target_rows(target)), strict=True):
                module = model.get_submodule(f"base_model.model.model.layers.{layer - 1}.{name}")
                module.lora_A["default"].weight = shared
                with torch.no_grad():
                    module.lora_B["default"].weight.copy_(rows)
                factors[target, layer, part] = shared, module.lora_B["default"].weight
    return model, factors


@pytest.mark.distributed
def test_training_is_that_of_peft_with_tied_a(settings: dict[str, Any], tmp_path: Path) -> None:
    sizes = OracleConfig.from_folder(settings["model"])
    start = random_adapter("lora", sizes, rank=RANK, alpha=ALPHA, seed=3, scale=0.2, targets=ALL_TARGETS)
    case = {"settings": settings, "start": str(save_start(start, tmp_path / "start.safetensors"))}
    (ours,) = run_engine([case], tmp_path, ranks=1)
    model, factors = peft_start(settings, start)
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
