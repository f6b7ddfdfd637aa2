"""Folders whose linears are quantised as other programs write them, plain folders of their values, and their models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_tiedlora.base.shapes import BaseFormat
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
from support import quantised_oracle as oracle

FORMATS = ("nf4", "int8", "fp8")
# A tensor-parallel cut lies within a block of 64: at TP 2 it is at column 48 of the output's 96 and at 40 of down's 80.
CROSSING: dict[str, Any] = {"hidden_size": 96, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 80}


def bytes_of(row: BaseFormat, rows: int, width: int, *, shards_rows: bool = False) -> int:
    """The bytes of a weight (rows, width), or of a shard with some of the columns: codes, and fp32 scales."""
    return rows * (row.row_bytes(width) + 4 * row.row_scales(width, shards_rows=shards_rows))


def expected_values(name: str, values: torch.Tensor) -> torch.Tensor:
    """What a format makes of a weight: fp32 numbers, returned in fp64."""
    numbers = values.float().numpy()
    if name == "nf4":
        return torch.from_numpy(oracle.nf4_values(numbers)).double()
    levels, scales = oracle.row_values(numbers, name)
    return torch.from_numpy(levels * scales[:, None]).double()


def quantised(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face model with the values of a format, in fp64, where a base is quantised."""
    return {
        key: expected_values(name, value) if ".layers." in key and value.ndim == 2 else value.double()
        for key, value in weights.items()
    }


def with_tensors(folder: Path, into: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of a model's folder with other weights."""
    shutil.copytree(folder, into, ignore=shutil.ignore_patterns("*.safetensors"))
    found = {name: value.contiguous() for name, value in tensors.items()}
    save_file(found, into / "model.safetensors", metadata={"format": "pt"})
    return into


def with_values(folder: Path, into: Path, name: str) -> Path:
    """A copy of a model with the values of a format, in fp32."""
    tensors = quantised(load_file(folder / "model.safetensors"), name)
    return with_tensors(folder, into, {key: value.float() for key, value in tensors.items()})


Tensors = dict[str, torch.Tensor]
# Every width divides by 64, and cuts at TP 2 and 4 lie within blocks: 320 / 2 = 160, 128 / 4 = 32.
SHAPE: dict[str, Any] = {"hidden_size": 128, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 320}
_NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_quant_storage": "uint8",
}


def _compressed(strategy: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": {"channel": "compressed", "tensor": "frozen"}[strategy],  # both are in public folders
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def nf4_tensors(name: str, values: torch.Tensor, *, nested: bool, block: int = 64) -> tuple[Tensors, torch.Tensor]:
    """(tensors as bitsandbytes stores them, the values that they stand for)."""
    codes, scales = oracle.nf4_codes(values.float().numpy(), block)
    packed = torch.from_numpy((codes[:, ::2] << 4) | codes[:, 1::2]).reshape(-1, 1)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(values.shape)}
    found: Tensors = {name: packed.contiguous(), f"{name}.quant_map": torch.from_numpy(oracle.NF4.copy())}
    if nested:
        size, offset = 24, float(np.float32(scales.mean()))  # theirs is 256, larger than these tensors
        levels = np.linspace(-1, 1, 256, dtype=np.float32)
        groups = np.arange(scales.size) // size
        apart = scales.flatten() - np.float32(offset)
        largest = np.array([np.abs(apart[groups == group]).max() for group in range(groups[-1] + 1)], np.float32)
        indices = np.abs(apart[:, None] / largest[groups][:, None] - levels).argmin(1).astype(np.uint8)
        scales = (levels[indices] * largest[groups] + np.float32(offset)).reshape(scales.shape)
        found[f"{name}.absmax"] = torch.from_numpy(indices)
        found[f"{name}.nested_absmax"] = torch.from_numpy(largest)
        found[f"{name}.nested_quant_map"] = torch.from_numpy(levels)
        state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    else:
        found[f"{name}.absmax"] = torch.from_numpy(scales.flatten())
    state_bytes = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    found[f"{name}.quant_state.bitsandbytes__nf4"] = state_bytes
    columns = np.arange(values.shape[1])
    return found, torch.from_numpy(oracle.NF4[codes] * scales[:, columns // block])


def fp8_tensors(
    name: str, values: torch.Tensor, *, by_row: bool, scale_dtype: torch.dtype
) -> tuple[Tensors, torch.Tensor]:
    """(tensors as compressed-tensors and fbgemm_fp8 store them, the values that they stand for)."""
    largest = values.float().abs().amax(1, keepdim=True) if by_row else values.float().abs().amax().view(1)
    scale = (largest / 448).to(scale_dtype)  # rounded: the row's largest value is not on the largest level
    codes = (values.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale": scale}, codes.float() * scale.float()


KINDS: dict[str, tuple[dict[str, Any], Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]]] = {
    "nf4": (_NF4, partial(nf4_tensors, nested=False)),
    "nf4 nested": (_NF4, partial(nf4_tensors, nested=True)),
    "nf4 in 128": (_NF4, partial(nf4_tensors, nested=False, block=64 * 2)),
    "fp8 by row": (_compressed("channel"), partial(fp8_tensors, by_row=True, scale_dtype=torch.bfloat16)),
    "fp8 by tensor": (_compressed("tensor"), partial(fp8_tensors, by_row=False, scale_dtype=torch.bfloat16)),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        partial(fp8_tensors, by_row=True, scale_dtype=torch.float32),
    ),
}


def quantised_folder(plain: Path, into: Path, kind: str, chosen: Callable[[str], bool] = bool) -> tuple[Path, Path]:
    """(a copy of the folder `plain` quantised in the way `kind`, a folder of the copy's values in fp32), of the linears
    whose names are `chosen`, by default all."""
    config, made = KINDS[kind]
    stored, values = {}, {}
    for name, value in load_file(plain / "model.safetensors").items():
        if ".layers." in name and value.ndim == 2 and chosen(name):
            tensors, values[name] = made(name, value)
            stored |= tensors
        else:
            stored[name], values[name] = value, value.float()
    file = with_tensors(plain, into / "quantised", stored) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return file.parent, with_tensors(plain, into / "values", values)


def dequantised(weight: QuantisedWeight) -> torch.Tensor:
    """D(W) in fp32."""
    found = torch.empty(weight.local_shape, device=weight.tensor.device)
    weight._dequantise(found)
    return found
