"""Folders that are quantised already: their values at every tensor-parallel size, and what is rejected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantised_models import KINDS, SHAPE, dequantised, quantised_folder
from support.run_files import edit_tensors
from support.task_files import refusal
from support.tiny_models import tiny_config, write_tiny_model

from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import coded_shapes
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import RankGroup
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight, weight_maker

DOWN = "model.layers.1.mlp.down_proj.weight"
Folders = dict[str, tuple[Path, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """By kind: the quantised folder and a folder of its values."""
    root = tmp_path_factory.mktemp("quantised")
    shape = {**SHAPE, "num_layers": 2}
    plain = write_tiny_model(root / "plain", dtype=torch.bfloat16, tokenizer=False, **shape)
    odd = write_tiny_model(root / "odd", dtype=torch.bfloat16, tokenizer=False, **{**shape, "intermediate_size": 256})
    return {kind: quantised_folder(odd if "128" in kind else plain, root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_have_the_values_of_the_file(folders: Folders, kind: str, size: int) -> None:
    quantised, plain = folders[kind]
    source = find_model(str(quantised))
    expected = kind.split()[0].replace("fbgemm", "fp8")
    assert source.stored is not None and source.base_format(None) == source.stored.base_format == expected
    with BaseWeights(quantised, source.shape, source.stored) as weights, BaseWeights(plain, source.shape) as values:
        compared = 0
        for rule in weights.rules:
            full = torch.cat([values.read(part.name)[part.start : part.start + part.size] for part in rule.parts])
            found = []
            for rank in range(size):
                local = rule.spec.split(full, rank, size).shape
                if rule.hf_names[0] in coded_shapes(source.shape):
                    make = weight_maker(source.stored.base_format)
                    target: FrozenWeight = make(*local, dtype=torch.float32, shards_rows=rule.spec.dim == 1)
                    compared += 1
                else:
                    target = FrozenWeight.empty(*local, dtype=torch.float32)
                weights.fill(rule, target, RankGroup(None, rank, size))
                found.append(dequantised(target) if isinstance(target, QuantisedWeight) else target.tensor.detach())
            if rule.spec.dim is None:
                assert all(torch.equal(one, full) for one in found)
            else:
                assert torch.equal(rule.spec.join(found), full), rule.name
        assert compared == 4 * 2 * size and weights.bytes_read > 0


@pytest.mark.parametrize("kind", ["nf4 nested", "fp8 by row"])
def test_a_model_is_that_of_the_values(folders: Folders, kind: str) -> None:
    """With the folder's format, and dequantised at load."""
    quantised, plain = (find_model(str(folder)) for folder in folders[kind])
    tokens, positions = torch.arange(3, 60)[None], torch.arange(57)[None]
    expected = load_model(plain, None, dtype=torch.bfloat16).predict(tokens, positions)
    for base in (quantised.base_format(None), None):
        found = load_model(quantised, None, dtype=torch.bfloat16, base_format=base).predict(tokens, positions)
        assert torch.equal(found, expected), base


def test_its_identity_is_that_of_codes_and_scales(folders: Folders, tmp_path: Path) -> None:
    for kind in ("nf4 nested", "fp8 by row"):
        quantised, _ = folders[kind]
        identity = identify_model(find_model(str(quantised)), "bf16")
        for part in (DOWN, DOWN + (".nested_absmax" if "nf4" in kind else "_scale")):
            copy = changed(quantised, tmp_path / part / kind, part, lambda value: value.flip(0))
            assert identify_model(find_model(str(copy)), "bf16").base_sample != identity.base_sample, part
            assert identify_model(find_model(str(copy)), "bf16").base_hash == identity.base_hash


def changed(folder: Path, into: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy in which one tensor differs, or is missing."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        if (value := change(tensors.pop(name))) is not None:
            tensors[name] = value.contiguous()

    edit_tensors(shutil.copytree(folder, into) / "model.safetensors", edit)
    return into


def _state(**fields: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(value: torch.Tensor) -> torch.Tensor:
        state = json.loads(bytes(value.tolist())) | fields
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def _with(index: int, number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        flat = value.view(torch.uint8).view(-1) if value.dtype == torch.float8_e4m3fn else value.view(-1)
        flat[index] = number
        return value

    return change


STATE = f"{DOWN}.quant_state.bitsandbytes__nf4"
BROKEN: list[tuple[str, str, Callable[[torch.Tensor], torch.Tensor | None], str]] = [
    ("nf4", DOWN, lambda value: torch.zeros(128, 320), f"{DOWN} is F32, but other linears are nf4"),
    ("nf4", DOWN, lambda value: value[:-1], f"{DOWN} has 20,479 values of type U8, not 20,480 of type U8"),
    ("nf4", f"{DOWN}.absmax", lambda value: None, f"{DOWN} is quantised, but tensor {DOWN}.absmax is missing"),
    ("nf4", f"{DOWN}.absmax", lambda value: value[1:], "639 values of type F32, not 640 of type F32"),
    ("nf4", f"{DOWN}.absmax", _with(7, float("inf")), f"{DOWN} has numbers that are not finite"),
    ("nf4", f"{DOWN}.quant_map", lambda value: value * 2, "does not have the levels of nf4"),
    ("nf4", STATE, _state(quant_type="fp4"), "is 'fp4' of shape"),
    ("nf4", STATE, _state(shape=[320, 128]), "of shape [320, 128], not 'nf4' of shape [128, 320]"),
    ("nf4", STATE, _state(blocksize=32), "has blocks of 32 weights, which is not a multiple of 64"),
    ("nf4", STATE, _state(blocksize=128), "blocks of 128 that cross its rows of 320 weights, so it cannot be sharded"),
    ("nf4", STATE, _state(blocksize=0), "is not the state of an nf4 tensor"),
    ("nf4 nested", STATE, _state(nested_offset="1"), "its nested_offset is not a number"),
    ("nf4 nested", STATE, _state(nested_offset=10**400), "its nested_offset is not a number, or is too large"),
    ("nf4 nested", STATE, _state(nested_offset=float("nan")), "its nested_offset is not a number, or is too large"),
    ("nf4 nested", STATE, _state(nested_offset=float("-inf")), "its nested_offset is not a number, or is too large"),
    ("nf4 nested", f"{DOWN}.nested_absmax", _with(0, float("inf")), f"{DOWN} has numbers that are not finite"),
    ("nf4 nested", STATE, _state(nested_blocksize=10**30), "its block sizes are not integers from 1 to 1,"),
    ("nf4", STATE, lambda value: value[:-1], "is not the state of an nf4 tensor"),
    ("nf4", DOWN, lambda value: value.view(128, 160), f"{DOWN} has shape [128, 160], not [20480] or [20480, 1]"),
    ("nf4 nested", f"{DOWN}.absmax", lambda value: value.view(128, 5), f"{DOWN}.absmax has shape [128, 5], not [640]"),
    ("nf4 nested", f"{DOWN}.nested_quant_map", lambda value: value[1:], "255 values of type F32, not 256 of type F32"),
    ("fp8 by row", DOWN, lambda value: value.float(), f"{DOWN} is F32, but other linears are fp8"),
    ("fp8 by row", DOWN, lambda value: value[1:], f"{DOWN} has shape (127, 320), but config.json requires (128, 320)"),
    ("fp8 by row", DOWN, _with(5, 0xFF), f"{DOWN} has numbers that are not finite"),
    ("fp8 by row", f"{DOWN}_scale", lambda value: None, f"tensor {DOWN}_scale is missing"),
    ("fp8 by row", f"{DOWN}_scale", lambda value: value.t(), "(1, 128), not one value, or one per row"),
    ("fp8 by tensor", f"{DOWN}_scale", _with(0, float("nan")), f"{DOWN} has numbers that are not finite"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_broken_tensors_are_rejected_by_name(folders: Folders, case: int, tmp_path: Path) -> None:
    kind, name, change, message = BROKEN[case]
    source = find_model(str(changed(folders[kind][0], tmp_path / "copy", name, change)))
    for base in (source.base_format(None), None):
        said = refusal(load_model, source, None, dtype=torch.bfloat16, base_format=base)
        assert "model.safetensors: " in said and message in said


def test_an_offset_may_be_an_integer(folders: Folders, tmp_path: Path) -> None:
    tokens, positions = torch.arange(3, 60)[None], torch.arange(57)[None]
    logits = []
    for offset in (2**64, 2.0**64):
        copy = changed(folders["nf4 nested"][0], tmp_path / str(offset), STATE, _state(nested_offset=offset))
        model = load_model(find_model(str(copy)), None, dtype=torch.bfloat16)
        logits.append(model.predict(tokens, positions))
    assert torch.equal(*logits)


def test_another_format_is_rejected(folders: Folders) -> None:
    source = find_model(str(folders["nf4"][0]))
    assert source.base_format("nf4") == "nf4"
    said = refusal(source.base_format, "int8")
    assert said.startswith("--base int8: ") and "are already in nf4 (by bitsandbytes)" in said


def scheme(**fields: Any) -> dict[str, Any]:
    """Compressed-tensors' config of rows in FP8, with other fields of its one group."""
    config: dict[str, Any] = json.loads(json.dumps(KINDS["fp8 by row"][0]))
    config["config_groups"]["group_0"]["weights"] |= fields
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quantised by None cannot be read"),
        ("awq", "quantised by 'awq' cannot be read"),
        ({"quant_method": "gptq", "bits": 4}, "quantised by 'gptq' cannot be read. Use the model with"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantised by 'fp8' cannot be read"),
        ({"quant_method": ["x"]}, "cannot be read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "(load_in_4bit is not true)"),
        (KINDS["nf4"][0] | {"bnb_4bit_quant_type": "fp4"}, "(bnb_4bit_quant_type is 'fp4', not 'nf4')"),
        (KINDS["nf4"][0] | {"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
        ({"quant_method": "compressed-tensors"}, "it has no config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": None}}}, "'g' has no weights"),
        (scheme() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "its weights are sparse"),
        (scheme() | {"transform_config": {"a": 1}}, "it transforms weights"),
        (scheme(strategy="block"), "the strategy of 'group_0' is 'block', not 'channel' or 'tensor'"),
        (scheme(num_bits=4), "'group_0' has 4 bits of type 'float'"),
        (scheme(type="int"), "8 bits of type 'int', not 8 of 'float'"),
        (scheme(symmetric=False), "'group_0' is not symmetric"),
    ],
)
def test_other_configs_are_rejected_by_name(config: Any, message: str) -> None:
    values = tiny_config().to_dict() | {"quantization_config": config}
    said = refusal(shape_from_hf, values, source="the/config.json")
    assert "the/config.json: quantization_config: " in said and message in said and "--base" in said
