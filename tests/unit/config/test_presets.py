"""Presets have as many parameters as the models that they are named after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.presets import PRESETS, is_preset
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


def test_a_folder_of_a_preset_s_name_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_preset("gpt-2b-001") and find_model("gpt-2b-001").folder is None
    folder = write_tiny_model(tmp_path / "gpt-2b-001", num_layers=1, tokenizer=False)
    assert not is_preset("gpt-2b-001")
    found = find_model("gpt-2b-001")
    assert found.folder is not None and found.folder.resolve() == folder and found.shape.num_layers == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_counts_as_many(preset: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(PRESETS[preset])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert sum(p.numel() for p in model.parameters()) == num_base_parameters(shape_from_hf(PRESETS[preset]))
