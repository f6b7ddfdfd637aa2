"""PEFT VeRA adapters read as native ones: the same update as PEFT's own, and a rejection of all that is not a VeRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_folders import CONFIG, WEIGHTS, rejection, with_fields, with_tensors
from peft_models import logits_of, peft_model, share
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import read_peft


@pytest.fixture(scope="module")
def separate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q, k and v apart, with 48, 24 and 24 rows of 32; gate and up have 40 each."""
    folder = tmp_path_factory.mktemp("separate")
    return write_tiny_model(folder, head_dim=12, intermediate_size=40, tokenizer=False)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One qkv_proj of 32 + 16 + 16 rows."""
    return write_tiny_model(tmp_path_factory.mktemp("fused"), family="phi3", tokenizer=False)


def vera_model(base: Path, **options: Any) -> Any:
    from peft import VeraConfig

    return peft_model(base, VeraConfig(task_type="CAUSAL_LM", **options))


def imported(peft: Any, base: Path, folder: Path) -> tuple[ModelSource, NativeAdapter]:
    """PEFT's adapter, written and read, with logits like PEFT's."""
    peft.save_pretrained(folder)
    source = find_model(str(base))
    adapter = read_peft(folder, source).adapter
    ours = logits_of(load_model(source, adapter, dtype=torch.float32).predict, torch.arange(24).expand(2, 24))
    assert share(ours, logits_of(peft)) <= 1e-5
    with peft.disable_adapter():
        assert share(ours, logits_of(peft)) > 0.01  # the update is there
    return source, adapter


# --------------------------------------------------------------------------------------------- the same update


@pytest.mark.parametrize(
    ("options", "layers"),
    [({}, (1, 2, 3)), ({"layers_to_transform": [2, 0], "vera_dropout": 0.1, "d_initial": 0.5}, (1, 3))],
)
def test_on_a_fused_projection_it_is_a_native_vera(
    fused: Path, tmp_path: Path, options: dict[str, Any], layers: tuple[int, ...]
) -> None:
    peft = vera_model(fused, r=3, target_modules=["qkv_proj"], **options)
    _, adapter = imported(peft, fused, tmp_path / "peft")
    config, stored = adapter.config, load_file(tmp_path / "peft" / WEIGHTS)
    assert (config.method, config.rank, config.scale, config.layers) == ("vera", 3, 1.0, layers)
    modules = [f"base_model.model.model.layers.{layer - 1}.self_attn.qkv_proj.vera_lambda" for layer in layers]
    expected = {
        "A": stored["base_model.vera_A"],
        "B": stored["base_model.vera_B"],
        "u": torch.stack([stored[f"{module}_d"] for module in modules]),
        "v": torch.stack([stored[f"{module}_b"] for module in modules]),
    }
    save_adapter(tmp_path / "native", config, adapter.base, adapter.state)
    for native in (adapter, load_native_adapter(tmp_path / "native")):
        assert native.state.keys() == expected.keys()
        assert all(torch.equal(native.state[name], tensor) for name, tensor in expected.items())


# name: options of PEFT's VeraConfig, adapted layers
PARTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "q_k_v": ({"target_modules": ["v_proj", "k_proj", "q_proj"]}, (1, 2, 3)),
    "q_v": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": 1}, (2,)),
    "k": ({"target_modules": ["k_proj"]}, (1, 2, 3)),
    "pattern": ({"target_modules": r".*layers\.(0\..*q_proj|2\..*(k|v)_proj)"}, (1, 3)),
    "o_in_one_layer": ({"target_modules": r".*layers\.(0\..*o_proj|2\..*down_proj)"}, (1, 3)),
    "all": ({"target_modules": ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}, (1, 2, 3)),
}


@pytest.mark.parametrize(
    ("family", "modules", "targets"),
    [
        ("separate", ["down_proj", "o_proj"], ["o_proj", "down_proj"]),
        ("fused", "all-linear", [*TARGET_NAMES]),
        ("fused", ["qkv_proj", "o_proj"], ["qkv", "o_proj"]),  # equally wide: each has a whole copy of A
    ],
)
def test_every_linear_that_is_one_module_has_its_part_of_a_and_b(
    separate: Path, fused: Path, tmp_path: Path, family: str, modules: Any, targets: list[str]
) -> None:
    base = {"separate": separate, "fused": fused}[family]
    peft = vera_model(base, r=3, target_modules=modules)
    source, adapter = imported(peft, base, tmp_path / "peft")
    stored = load_file(tmp_path / "peft" / WEIGHTS)
    assert (adapter.config.method, [target.name for target in adapter.config.targets]) == ("vera", targets)
    assert read_peft(tmp_path / "peft", source).apart is None
    for target in adapter.config.targets:
        a, b = (adapter.state[target.prefix + factor] for factor in "AB")
        assert torch.equal(a, stored["base_model.vera_A"][:, : target.in_size])
        assert torch.equal(b, stored["base_model.vera_B"][: target.out_size])
    save_adapter(tmp_path / "native", adapter.config, adapter.base, adapter.state)
    assert load_native_adapter(tmp_path / "native").equals(adapter)


@pytest.mark.parametrize("name", PARTS)
def test_on_parts_it_is_a_native_lora(separate: Path, tmp_path: Path, name: str) -> None:
    """A and B are as large as the largest module needs; a smaller one uses the first rows of B."""
    options, layers = PARTS[name]
    peft = vera_model(separate, r=3, **options)
    source, adapter = imported(peft, separate, tmp_path / "peft")
    assert (adapter.config.method, adapter.config.rank, adapter.config.layers) == ("lora", 3, layers)
    assert read_peft(tmp_path / "peft", source).apart is not None
    merge_adapter(source, adapter, tmp_path / "merged")
    expected = peft.merge_and_unload().state_dict()
    for weight, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[weight], rtol=1e-6, atol=1e-6, msg=weight)


# --------------------------------------------------------------------------------------------- what is rejected


@pytest.fixture(scope="module")
def plain(separate: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of k and v as PEFT writes it."""
    folder = tmp_path_factory.mktemp("plain")
    vera_model(separate, r=3, target_modules=["k_proj", "v_proj"]).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"save_projection": False}, "save_projection = False leaves vera_A and vera_B out of the file; save the"),
        ({"bias": "vera_only"}, "bias = 'vera_only' trains biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] is not a plain VeRA; only that is"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules = .* is not a plain VeRA"),  # PEFT's VeRA has no such field
        ({"lora_alpha": 8}, "lora_alpha = 8 is not a plain VeRA"),
        ({"a_field_to_come": 1}, "a_field_to_come = 1 is not a plain VeRA"),
        ({"r": None}, "r = None is not an integer from 1 to"),
        ({"target_modules": ["k_proj", "lm_head"]}, "target module lm_head is not supported. Supported: q_proj, k"),
        ({"layers_to_transform": [3]}, "layers_to_transform has 3, but .* has layers 0 to 2"),
    ],
)
def test_what_is_not_a_plain_vera_is_rejected_by_name(
    separate: Path, plain: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    folder = with_fields(plain, tmp_path / "adapter", changes)
    assert re.match(rf"{re.escape(CONFIG)}: {said}", rejection(separate, folder))


K1, A, B = "base_model.model.model.layers.1.self_attn.k_proj", "base_model.vera_A", "base_model.vera_B"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({A: None}, f"{A} is missing, but every module uses it"),
        ({B: None}, f"{B} is missing, but every module uses it"),
        ({f"{K1}.vera_lambda_d": None}, f"{K1}.vera_lambda_d is missing, but {CONFIG} targets its module"),
        ({A: torch.ones(2, 32)}, r"\S* has shape \(2, 32\), but .* it must be \(3, 32\)"),
        ({B: torch.ones(48, 3)}, r"\S* has shape \(48, 3\), but .* it must be \(24, 3\)"),  # q's rows
        ({f"{K1}.vera_lambda_b": torch.ones(3)}, r"\S* has shape \(3,\), but .* it must be \(24,\)"),
        ({f"{K1}.vera_lambda_d": torch.ones(24)}, r"\S* has shape \(24,\), but .* it must be \(3,\)"),
        ({f"{K1}.vera_lambda_d": torch.full((3,), torch.nan)}, r"\S* holds numbers that are not finite"),
        ({f"{K1}.vera_lambda_b": torch.full((24,), 1e38)}, "its update may reach .* so the file is damaged"),
        ({f"{K1}.lora_A.weight": torch.ones(3, 32)}, r"\S* is not a VeRA factor of q_proj, .*, down_proj; only"),
        ({f"{K1.replace('k_', 'q_')}.vera_lambda_d": torch.ones(3)}, r"\S* is present, but \S* does not target"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(
    separate: Path, plain: Path, tmp_path: Path, changes: dict[str, torch.Tensor | None], said: str
) -> None:
    folder = with_tensors(plain, tmp_path / "adapter", changes)
    assert re.match(rf"{re.escape(WEIGHTS)}: {said}", rejection(separate, folder))
