"""PEFT LoRAs whose modules have a rank or an alpha of their own, by `rank_pattern` and `alpha_pattern`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import CONFIG, WEIGHTS, rejection, with_fields
from peft_models import logits_of, lora_model, share
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.import_peft import load_peft_adapter, read_peft
from megatron_tiedlora.convert.merge import merge_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, fewer key-value heads than heads, and q wider than the hidden size: rows 48, 24 and 24 of 32."""
    return write_tiny_model(tmp_path_factory.mktemp("base"), head_dim=12, intermediate_size=40, tokenizer=False)


QKV = ["q_proj", "k_proj", "v_proj"]
# The first pattern that matches decides: q_proj of layer 1 has rank 3, and those of the others 4.
PATTERNS: dict[str, Any] = {
    "target_modules": [*QKV, "down_proj"],
    "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "q_proj": 4, r"layers\.\d+\.mlp\.down_proj": 6, "v_proj": 2},
    "alpha_pattern": {"q_proj|v_proj": 11, r".*\.(0|2)\.mlp\..*": 0.7},
}
# name: options of PEFT's LoraConfig, rank of the native adapter. For q, k and v it is the sum of their ranks, for
# o_proj the largest rank of a layer.
OPTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "ranks": ({"r": 3, "rank_pattern": {"q_proj": 5, "k_proj": 1}, "target_modules": QKV}, 9),
    "alphas": ({"r": 3, "alpha_pattern": {"k_proj": 7, "v_proj": 0.1}, "target_modules": QKV}, 9),
    "ranks_and_alphas": ({"r": 2, "lora_alpha": 5, "use_rslora": False, **PATTERNS}, 8),
    "ranks_and_alphas_rslora": ({"r": 2, "lora_alpha": 5, "use_rslora": True, **PATTERNS}, 8),
    "rank_of_a_layer": ({"r": 2, "rank_pattern": {r"layers\.1\..*": 7}, "target_modules": ["o_proj"]}, 7),
    "whole_names": (
        {
            **{"r": 2, "target_modules": "all-linear"},
            "rank_pattern": {"model.layers.2.mlp.up_proj": 6, "mlp.down_proj": 1, "^q_proj": 9, "proj": 9},
            "alpha_pattern": {r".*\.0\.self_attn\.(k|v)_proj$": 3, "model.layers.0.self_attn.v_proj": 8},
        },
        8,
    ),
}
TARGETS = {
    **{"ranks_and_alphas": ["qkv", "down_proj"], "ranks_and_alphas_rslora": ["qkv", "down_proj"]},
    **{"rank_of_a_layer": ["o_proj"], "whole_names": [*TARGET_NAMES]},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_and_merged_weights_equal_peft_s(base: Path, tmp_path: Path, name: str) -> None:
    options, rank = OPTIONS[name]
    peft = lora_model(base, **options)
    peft.save_pretrained(tmp_path / "peft")
    source = find_model(str(base))
    adapter = load_peft_adapter(tmp_path / "peft", source)
    assert (adapter.config.method, adapter.config.layers, adapter.config.rank) == ("lora", (1, 2, 3), rank)
    assert [target.name for target in adapter.config.targets] == TARGETS.get(name, ["qkv"])
    ours = logits_of(load_model(source, adapter, dtype=torch.float32).predict, torch.arange(24).expand(2, 24))
    assert share(ours, logits_of(peft)) <= 1e-5
    with peft.disable_adapter():
        assert share(ours, logits_of(peft)) > 0.01  # the update is there
    merge_adapter(source, adapter, tmp_path / "merged")
    expected = peft.merge_and_unload().state_dict()
    for key, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(("alpha", "exact"), [(1, True), (3, False), (64, True)])
def test_a_scale_of_its_own_is_in_b(base: Path, tmp_path: Path, alpha: float, exact: bool) -> None:
    """It makes no B larger, is exact if it is another power of two, and off by half a bit of fp32 otherwise."""
    options: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": QKV, "alpha_pattern": {"k_proj": alpha}}
    lora_model(base, **options).save_pretrained(tmp_path)
    stored, adapter = load_file(tmp_path / WEIGHTS), load_peft_adapter(tmp_path, find_model(str(base)))
    assert adapter.config.alpha / adapter.config.rank == max(2, alpha / 2)
    rows = {"q_proj": (slice(0, 48), slice(0, 2), 2), "k_proj": (slice(48, 72), slice(2, 4), alpha / 2)}
    for module, (of_b, columns, scale) in rows.items():
        b = stored[f"base_model.model.model.layers.0.self_attn.{module}.lora_B.weight"].double() * scale
        found = adapter.state["B"][0, of_b, columns].double() * (adapter.config.alpha / adapter.config.rank)
        assert torch.equal(found, b) if exact or module == "q_proj" else ((found - b) / b).abs().max() <= 2**-24


@pytest.mark.parametrize("name", ["ranks_and_alphas", "whole_names"])
def test_patterns_come_back_from_their_export(base: Path, tmp_path: Path, name: str) -> None:
    """Export has one rank and alpha r, so the scales are in the factors; the update is the one that PEFT computed."""
    peft = lora_model(base, **OPTIONS[name][0])
    peft.save_pretrained(tmp_path / "peft")
    source = find_model(str(base))
    native = load_peft_adapter(tmp_path / "peft", source)
    export_peft(source, native, tmp_path / "exported")
    back = load_peft_adapter(tmp_path / "exported", source)
    assert back.config.rank == native.config.rank
    expected = {
        f"{key.removeprefix('base_model.model.')}.weight": module.get_delta_weight("default")
        for key, module in peft.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    found = {}
    for rule, a, b in back.updates(source.shape):
        found |= rule.by_stored_tensor(b @ a)
    assert {key for key, update in found.items() if update.any()} == set(expected)
    for key, update in expected.items():
        torch.testing.assert_close(found[key], update.detach(), rtol=1e-5, atol=1e-6, msg=key)


def test_training_goes_on_as_in_peft_with_one_scale(base: Path, tmp_path: Path) -> None:
    """Ranks of layers may differ, as padding has no gradient."""
    options: dict[str, Any] = {"r": 2, "target_modules": ["o_proj"], "rank_pattern": {r".*\.1\..*": 4}}
    lora_model(base, **options).save_pretrained(tmp_path / "scales")
    said = read_peft(tmp_path / "scales", find_model(str(base))).apart
    assert said == (
        f"{tmp_path}/scales: its modules have several scales alpha / r, and one here, so training continues differently"
        " from PEFT's"
    )
    lora_model(base, **options, lora_alpha=1, alpha_pattern={r".*\.1\..*": 2}).save_pretrained(tmp_path / "scale")
    assert read_peft(tmp_path / "scale", find_model(str(base))).apart is None


# --------------------------------------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of q and v as PEFT writes it."""
    folder = tmp_path_factory.mktemp("plain")
    lora_model(base, r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern = \['q_proj'\] is not an object {pattern: value}; leave it out"),
        ({"rank_pattern": {"q_proj": -8}}, "rank_pattern: 'q_proj' = -8 is not an integer from 1 to 1,048,576"),
        ({"rank_pattern": {"q_proj": 8.0}}, "rank_pattern: 'q_proj' = 8.0 is not an integer"),
        ({"rank_pattern": {"nothing": True}}, "rank_pattern: 'nothing' = True is not an integer"),
        ({"rank_pattern": {"(.*)*!": 8}}, r"rank_pattern: the pattern '\(\.\*\)\*!' is not read; .* Write endings"),
        ({"rank_pattern": {"q_proj)(": 8}}, r"rank_pattern: the pattern 'q_proj\)\(' is not read"),
        ({"rank_pattern": {f"{n}.{'q' * 900}": 8 for n in range(60)}}, "rank_pattern: its patterns have 54,"),
        ({"alpha_pattern": 8}, "alpha_pattern = 8 is not an object"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern: 'q_proj' = '8' is not a number"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern: 'q_proj' = 0 is not between"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern: 'q_proj' = nan is not between"),
    ],
)
def test_a_broken_pattern_or_value_is_one_line(
    base: Path, plain: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = with_fields(plain, tmp_path / "adapter", changes)
    assert re.match(rf"{re.escape(CONFIG)}: {said}", rejection(base, folder))


def test_patterns_that_do_not_fit_the_tensors(base: Path, plain: Path, tmp_path: Path) -> None:
    """A rank that the tensors do not have is an error; a pattern that matches no module has no effect, as in PEFT."""
    other = with_fields(plain, tmp_path / "other", {"rank_pattern": {"v_proj": 2}})
    said = r"\S*v_proj\.lora_A\.weight has shape \(3, 32\), but with its rank in \S* and .* it must be \(2, 32\); give"
    assert re.match(rf"{re.escape(WEIGHTS)}: {said}", rejection(base, other))
    unused = {"rank_pattern": {"q_pro": 2, "q_proj": 3}, "alpha_pattern": {"lm_head": 2, "v_proj": 5, r".*\.v_proj": 7}}
    folder, said_then = with_fields(plain, tmp_path / "unused", unused), list[str]()
    found = load_peft_adapter(folder, find_model(str(base)), say=said_then.append)
    assert said_then == [
        f"{folder / CONFIG}: rank_pattern: ['q_pro'] decides for no adapted module",
        f"{folder / CONFIG}: alpha_pattern: ['lm_head', '.*\\\\.v_proj'] decides for no adapted module",
    ]
    expected = load_peft_adapter(plain, find_model(str(base)))
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], tensor) for name, tensor in expected.state.items())
