"""PEFT's QLoRA, LoRA on bitsandbytes' nf4, as an outside witness of training on --base nf4: 20 steps in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import relative_distance, relative_errors, run_engine, save_start
from oracle import OracleAdapter, OracleConfig
from oracle_adapter import ALL_TARGETS, tensor_name
from peft_training import all_linear_lora, peft_losses, settings_for_peft
from quantised_models import with_values
from tiny_models import random_adapter, write_tiny_model

SHAPE: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 320}


def peft_run(
    settings: dict[str, Any], start: OracleAdapter, base: str | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of PEFT's run on a bf16 base that transformers loads, in nf4 or as it is; its factors at the end."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    how = {"quantization_config": nf4} if base else {}
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16, device_map="cpu", **how)
    model, factors = all_linear_lora(model, start, OracleConfig.from_folder(settings["model"]))
    losses = peft_losses(model, [value for value in model.parameters() if value.requires_grad], settings)
    found: dict[str, list[torch.Tensor]] = {}
    for target in ALL_TARGETS:
        for layer in start.layers:
            of_parts = [pair for (own, index, _), pair in factors.items() if (own, index) == (target, layer)]
            found.setdefault(tensor_name(target, "A"), []).append(of_parts[0][0].detach())
            found.setdefault(tensor_name(target, "B"), []).append(torch.cat([b.detach() for _, b in of_parts]))
    return losses, {name: torch.stack(of_layers) for name, of_layers in found.items()}


@pytest.mark.cpu_seconds(20, reason="three runs of PEFT beside two of ours")
@pytest.mark.distributed
def test_training_follows_qlora_as_closely_as_bf16_follows_lora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install 'megatron_tiedlora[quantised]'")
    model = write_tiny_model(tmp_path / "model", dtype=torch.bfloat16, **SHAPE)
    changes = {"method": "lora", "targets": list(ALL_TARGETS), "dtype": "bf16", "learning_rate": 1e-3}
    settings = {**settings_for_peft(model, tmp_path), **changes}
    start = random_adapter(
        *("lora", OracleConfig.from_folder(model)),
        **{"rank": settings["rank"], "alpha": settings["alpha"], "seed": 4, "scale": 0.2, "targets": ALL_TARGETS},
    )
    cases = [
        {"settings": {**settings, **changes}, "start": str(save_start(start, tmp_path / "start.safetensors"))}
        for changes in ({}, {"base": "nf4"})
    ]
    ours, ours_nf4 = ((run.losses, run.adapter) for run in run_engine(cases, tmp_path, ranks=1))
    lora, qlora = (peft_run(settings, start, base) for base in (None, "nf4"))
    dequantised = with_values(model, tmp_path / "dequantised", "nf4")
    lora_nf4 = peft_run({**settings, "model": str(dequantised)}, start, None)

    def distances(found: tuple[Any, Any], expected: tuple[Any, Any]) -> tuple[float, float]:
        """The largest relative one of the losses, and that of the changes of all factors."""
        changed, changed_there = (
            torch.cat([(adapter[name].float() - start.tensors[name]).flatten() for name in expected[1]])
            for adapter in (found[1], expected[1])
        )
        return max(relative_errors(found[0], expected[0])), relative_distance(changed, changed_there)

    # bitsandbytes' layer in PEFT rounds the base's output before the adapter's is added, so PEFT's two ways to the
    # same values differ more than bf16 alone makes them: losses 0.006, factors 0.10.
    rounded = distances(ours, lora)
    assert rounded[0] < 0.01 and rounded[1] < 0.1, rounded
    for found, allowed in (
        (distances(ours_nf4, lora_nf4), rounded),
        (distances(ours_nf4, qlora), distances(lora_nf4, qlora)),
    ):
        assert found[0] <= 0.01 and found[1] <= 1.5 * allowed[1], (found, allowed)
    assert distances(ours_nf4, lora)[1] > 0.5 and distances(ours, qlora)[1] > 0.5  # another base is another run
