"""Models whose weights are what a format makes of another model's, by the oracle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import quantised_oracle as oracle
import torch
from safetensors.torch import load_file, save_file

from megatron_tiedlora.base.shapes import BaseFormat
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight

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


def dequantised(weight: QuantisedWeight) -> torch.Tensor:
    """D(W) in fp32."""
    found = torch.empty(weight.local_shape, device=weight.tensor.device)
    weight._dequantise(found)
    return found
