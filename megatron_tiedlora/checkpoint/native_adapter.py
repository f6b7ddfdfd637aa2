"""The native adapter: a folder with full fp32 A, B, u, v and what they belong to, independent of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_tiedlora import __version__
from megatron_tiedlora.adapters.methods import FACTORS, METHODS
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.checkpoint.atomic import new_folder, write_json
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.errors import UserError, shown
from megatron_tiedlora.config.json_files import Count, Real, Size, Text, read_fields, read_json_object

FORMAT_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MERGE_RECORD = "tiedlora_merge.json"  # in a model folder: which adapter is merged into it
_SHAPE_FIELDS = ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model an adapter was trained on.

    Attributes:
        name: as the user gave it to --model.
        config_hash: of the shape.
        weights_hash: of the final norm's weight in bf16, which tells models of one shape apart, and of the record of a
            merge, since merging leaves the norm alone.
        shape: the fields of the config that the format writes out.
        dtype: precision of the base in training.
    """

    name: str
    config_hash: str
    weights_hash: str
    shape: Mapping[str, int]
    dtype: str


def identify_base(source: ModelSource, weights: BaseWeights, dtype: str) -> BaseIdentity:
    """The identity of a base model; reads one small tensor."""
    # bf16, because the same model is stored in fp32, fp16 and bf16: rounding to bf16 makes those equal.
    digest = hashlib.sha256(weights.read("model.norm.weight").to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    record = weights.folder / MERGE_RECORD
    if record.is_file():
        digest.update(record.read_bytes())
    return identify_shape(source, dtype, weights_hash=digest.hexdigest())


def identify_shape(source: ModelSource, dtype: str, *, weights_hash: str) -> BaseIdentity:
    """The identity of a base model whose weights have a hash already."""
    config = source.config
    shape = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
    }
    return BaseIdentity(source.name, source.base_hash, weights_hash, shape, dtype)


@dataclass(frozen=True)
class NativeAdapter:
    """A loaded adapter: its config, its base, and full fp32 A, B, u, v."""

    config: AdapterConfig
    base: BaseIdentity
    state: Mapping[str, torch.Tensor]

    def check_base(self, other: BaseIdentity, *, source: str) -> None:
        """Raise UserError where `other` is not the base that this adapter was trained on."""
        for field, value in self.base.shape.items():
            if other.shape[field] != value:
                raise UserError(
                    f"{source}: trained on {self.base.name} with {field} {value}, but {other.name} has"
                    f" {other.shape[field]}; give its own base with --model"
                )
        if (self.base.config_hash, self.base.weights_hash) != (other.config_hash, other.weights_hash):
            what = "config" if self.base.config_hash != other.config_hash else "weights"
            raise UserError(
                f"{source}: trained on {self.base.name}, whose {what} differ from {other.name}'s;"
                " give its own base with --model"
            )


def write_adapter_files(
    folder: Path, config: AdapterConfig, base: BaseIdentity, state: Mapping[str, torch.Tensor]
) -> None:
    """Write the two files of the format into `folder`, which exists; see `save_adapter` for an atomic folder."""
    save_file({name: state[name].contiguous() for name in FACTORS}, folder / WEIGHTS_FILE)
    content = {
        "format_version": FORMAT_VERSION,
        "method": config.method,
        "rank": config.rank,
        "alpha": config.alpha,
        **base.shape,
        "qkv_layout": "q|k|v",
        "layers": list(config.layers),
        "base_model": base.name,
        "base_hash": base.config_hash,
        "base_weights_hash": base.weights_hash,
        "seed": config.seed,
        "init_std_a": config.init_std_a,
        "init_std_b": config.init_std_b,
        "dtype": base.dtype,
        "version": __version__,
    }
    write_json(folder / CONFIG_FILE, content)


def save_adapter(folder: Path, config: AdapterConfig, base: BaseIdentity, state: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter folder at once, replacing the one that was there. Raises UserError where it cannot."""
    with new_folder(folder) as temporary:
        write_adapter_files(temporary, config, base, state)


def read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file. Raises UserError where it is missing or not whole."""
    if not file.is_file():
        raise UserError(f"{file}: not a whole safetensors file (no such file)")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None


def fp32_values(file: Path, name: str, stored: torch.Tensor) -> torch.Tensor:
    """A tensor of `file` in fp32. Raises UserError where it is not floating point, or not finite in fp32."""
    if stored.dtype not in _FLOATS:
        raise UserError(f"{file}: {name} is {str(stored.dtype).removeprefix('torch.')}, not floating point")
    values = stored.to(torch.float32, copy=True)  # what was read maps the file, which may be replaced or cut
    if not values.isfinite().all():
        raise UserError(f"{file}: {name} holds numbers that are not finite")
    return values


@dataclass(frozen=True)
class _StoredConfig:
    """The fields of adapter_config.json, but for format_version and version."""

    method: Text
    qkv_layout: Text
    rank: Size
    alpha: Real
    num_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    layers: list[Any]
    base_model: Text
    base_hash: Text
    base_weights_hash: Text
    seed: Count
    init_std_a: Real
    init_std_b: Real
    dtype: Literal["bf16", "fp32"]


def load_adapter(folder: Path) -> NativeAdapter:
    """Read an adapter folder (a checkpoint of a run is one too).

    Raises:
        UserError: not a native adapter, another format version, a field that is missing or of another kind, or a tensor
            that is missing, of the wrong shape, not floating point or not finite.
    """
    config, base = _read_config(folder)
    file = folder / WEIGHTS_FILE
    stored = read_safetensors(file)
    state = {}
    for name in FACTORS:
        if name not in stored:
            raise UserError(f"{file}: tensor {name} is missing")
        if tuple(stored[name].shape) != config.shape(name):
            raise UserError(f"{file}: {name} has shape {tuple(stored[name].shape)}, expected {config.shape(name)}")
        state[name] = fp32_values(file, name, stored[name])
    return NativeAdapter(config, base, state)


def _read_config(folder: Path) -> tuple[AdapterConfig, BaseIdentity]:
    file = folder / CONFIG_FILE
    content = read_json_object(file, kind="a native Tied-LoRA adapter folder")
    if "peft_type" in content:
        raise UserError(f"{folder}: this is a PEFT adapter; give the native one (the run's adapter/ folder)")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{file}: format_version {shown(content.get('format_version'))} is not {FORMAT_VERSION}")
    stored = read_fields(file, content, _StoredConfig)
    if stored.method not in METHODS or stored.qkv_layout != "q|k|v":
        raise UserError(f"{file}: method {stored.method!r} with layout {stored.qkv_layout!r} is unknown")
    layers, last = stored.layers, stored.num_layers
    if not layers or any(type(layer) is not int or not 1 <= layer <= last for layer in layers):
        raise UserError(f"{file}: layers {shown(layers)} are not among 1 to {last}")
    if layers != sorted(set(layers)):
        raise UserError(f"{file}: layers {shown(layers)} are not in ascending order")
    kv_rows = stored.num_key_value_heads * stored.head_dim
    config = AdapterConfig(
        method=stored.method,
        rank=stored.rank,
        alpha=stored.alpha,
        layers=tuple(layers),
        hidden_size=stored.hidden_size,
        qkv_rows=(stored.num_attention_heads * stored.head_dim, kv_rows, kv_rows),
        seed=stored.seed,
        init_std_a=stored.init_std_a,
        init_std_b=stored.init_std_b,
    )
    shape = {name: getattr(stored, name) for name in _SHAPE_FIELDS}
    return config, BaseIdentity(stored.base_model, stored.base_hash, stored.base_weights_hash, shape, stored.dtype)
