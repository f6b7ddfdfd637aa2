"""The native adapter: a folder with full fp32 A, B, u, v and what they belong to, independent of any layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from megatron_tiedlora import __version__
from megatron_tiedlora.adapters.methods import FACTORS, METHODS
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.checkpoint.atomic import new_folder, write_json
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.config.json_files import read_json_object

FORMAT_VERSION = 1
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MERGE_RECORD = "tiedlora_merge.json"  # in a model folder: which adapter is merged into it


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
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None


def load_adapter(folder: Path) -> NativeAdapter:
    """Read an adapter folder (a checkpoint of a run is one too).

    Raises:
        UserError: not a native adapter, another format version, a missing field or a tensor of the wrong shape.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file, kind="a native Tied-LoRA adapter folder")
    if "peft_type" in content:
        raise UserError(f"{folder}: this is a PEFT adapter; give the native one (the run's adapter/ folder)")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{file}: format_version {content.get('format_version')} is not {FORMAT_VERSION}")
    try:
        if content["method"] not in METHODS or content["qkv_layout"] != "q|k|v":
            raise UserError(f"{file}: method {content['method']!r} with layout {content['qkv_layout']!r} is unknown")
        head_dim, kv_heads = content["head_dim"], content["num_key_value_heads"]
        config = AdapterConfig(
            method=content["method"],
            rank=content["rank"],
            alpha=float(content["alpha"]),
            layers=tuple(content["layers"]),
            hidden_size=content["hidden_size"],
            qkv_rows=(content["num_attention_heads"] * head_dim, kv_heads * head_dim, kv_heads * head_dim),
            seed=content["seed"],
            init_std_a=content["init_std_a"],
            init_std_b=content["init_std_b"],
        )
        names = ("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
        base = BaseIdentity(
            content["base_model"],
            content["base_hash"],
            content["base_weights_hash"],
            {name: content[name] for name in names},
            content["dtype"],
        )
    except KeyError as error:
        raise UserError(f"{file}: {error.args[0]} is missing") from None
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: a field is of the wrong kind ({error})") from None
    _check_fields(file, config, base)
    weights = folder / WEIGHTS_FILE
    state = read_safetensors(weights)
    for name in FACTORS:
        if name not in state:
            raise UserError(f"{weights}: tensor {name} is missing")
        if tuple(state[name].shape) != config.shape(name):
            raise UserError(f"{weights}: {name} has shape {tuple(state[name].shape)}, expected {config.shape(name)}")
        if not state[name].isfinite().all():
            raise UserError(f"{weights}: {name} holds numbers that are not finite")
    return NativeAdapter(config, base, {name: state[name].float() for name in FACTORS})


def _check_fields(file: Path, config: AdapterConfig, base: BaseIdentity) -> None:
    for name, value in {"rank": config.rank, **base.shape}.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{file}: {name} = {value!r} is not a whole number above 0")
    last = base.shape["num_layers"]
    if not config.layers or any(layer not in range(1, last + 1) for layer in config.layers):
        raise UserError(f"{file}: layers {list(config.layers)} are not among 1 to {last}")
    if list(config.layers) != sorted(set(config.layers)):
        raise UserError(f"{file}: layers {list(config.layers)} are not in ascending order")
