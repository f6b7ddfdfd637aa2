"""Presets have as many parameters as the models that they are named after."""

from __future__ import annotations

import pytest
import torch

from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import num_base_parameters


def test_base_parameters_of_the_presets() -> None:
    counts = {name: num_base_parameters(shape_from_hf(values)) for name, values in PRESETS.items()}
    assert counts == {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "qwen3-8b": 8_190_735_360,
        "qwen3-32b": 32_762_123_264,
        "gpt-2b-001": 2_253_590_528,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_counts_as_many(preset: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(PRESETS[preset])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert sum(p.numel() for p in model.parameters()) == num_base_parameters(shape_from_hf(PRESETS[preset]))
