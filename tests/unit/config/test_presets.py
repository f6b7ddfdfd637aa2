"""Presets have as many parameters as the models that they are named after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.presets import PRESETS, is_preset
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer, start_ids
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.planning.run_plan import plan_run

COUNTS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama2-70b-8k": 68_976_648_192,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-14b": 14_768_307_200,
    "gpt-2b-001": 2_253_590_528,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
    "olmo3-7b": 7_298_011_136,
    "olmo3-32b": 32_233_522_176,
    "mistral-small-24b": 23_572_403_200,
    "granite-8b": 8_170_864_640,
    "tiny": 213_568,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_parameters_of_the_models_that_they_are_named_after(preset: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(PRESETS[preset])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[preset]
    assert num_base_parameters(shape_from_hf(PRESETS[preset])) == COUNTS[preset]


def test_a_folder_of_a_preset_s_name_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_preset("gpt-2b-001") and find_model("gpt-2b-001").folder is None
    folder = write_tiny_model(tmp_path / "gpt-2b-001", num_layers=1, tokenizer=False)
    assert not is_preset("gpt-2b-001")
    found = find_model("gpt-2b-001")
    assert found.folder is not None and found.folder.resolve() == folder and found.shape.num_layers == 1


def test_tiny_has_a_tokenizer_of_bytes_that_transformers_reads_as_we_do(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    assert call("random-model", ["--model=Tiny", f"--output={folder}"]) == 0
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a b", "  naïve 日本語 😀\n\n\t", "</s>x", ""):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False) and ours.decode(ids) == text
        assert "<" in text or len(ids) == len(text.encode())
    assert start_ids(ours, "auto") == [1] == [PRESETS["tiny"]["bos_token_id"]]
    source = find_model(str(folder))
    check_vocabulary(ours, source.shape.vocab_size)
    assert end_ids(ours, folder, vocab_size=source.shape.vocab_size) == {PRESETS["tiny"]["eos_token_id"]}
    given = {"model": str(folder), "task": "gsm8k", "ds_config": "zero1.json"}
    for tp, pp in ((2, 2), (1, 4), (2, 1)):
        settings = make_settings({**given, "tensor_parallel": tp, "pipeline_parallel": pp})
        assert plan_run(settings, rank=0, world_size=tp * pp).grid.dp_size == 1
