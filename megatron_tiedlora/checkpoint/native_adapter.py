"""Read and write native adapters. A native adapter is a folder with the full A, B, u and v in fp32, and the adapter
record with the adapter's config and its base identity.

The format does not depend on the parallel layout. The PEFT method TIED_LORA (`megatron_tiedlora.peft`) uses the same
format, so the record also has the fields that PEFT's loaders need for every method.
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, Target, lora_factors
from megatron_tiedlora.base import files
from megatron_tiedlora.base.files import Count, Guard, Real, Size, Text, new_folder, unguarded, with_checksums
from megatron_tiedlora.base.installation import __version__
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.base.shapes import TARGET_NAMES, ModelShape, linear_sizes
from megatron_tiedlora.checkpoint.base_identity import HASH_FIELDS, OPTIONAL_FIELDS, SHAPE_FIELDS, BaseIdentity
from megatron_tiedlora.checkpoint.tensor_files import read_tensors
from megatron_tiedlora.config.settings import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.model.weights import WeightRule, weight_rules
from megatron_tiedlora.parallel.agreement import SentTensor

FORMAT_VERSION = 2
PEFT_TYPE = "TIED_LORA"  # the value of peft_type in a native adapter
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_LARGEST_UPDATE = 1e30  # maximum absolute value; larger updates, and sums with them, may not be finite in fp32
_LARGEST_STD = 1e3  # maximum init std

StateDict = Mapping[str, Tensor]  # tensors by name


@dataclass(frozen=True)
class NativeAdapter:
    """A loaded adapter with its config, its base identity and its full fp32 tensors. `has_checksums` tells whether its
    files have checksums."""

    config: AdapterConfig
    base_identity: BaseIdentity
    state: Mapping[str, SentTensor]
    has_checksums: bool = True

    def updates(self, shape: ModelShape) -> Iterator[tuple[WeightRule, Tensor, Tensor]]:
        """Yield each weight W that the adapter changes, with A' (r, in) and B' (out, r) for W' = W + B' A'."""
        for rule, target in changed_weights(self.config, shape):
            yield rule, *lora_factors(self.config, self.state, target, rule.layer)

    def equals(self, other: "NativeAdapter") -> bool:
        """Return whether both adapters have the same config, base identity and tensor values."""
        same = (self.config, self.base_identity) == (other.config, other.base_identity)
        return same and all(torch.equal(self.state[name], other.state[name]) for name in self.config.tensors)

    @property
    def sha256(self) -> str:
        """Return the SHA-256 of the tensors' values, in hexadecimal."""
        digest = hashlib.sha256()
        for name in self.config.tensors:
            digest.update(self.state[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """Return the fields about this adapter that are written into adapters and models converted from it."""
        return {**self.config.facts, "base_model": self.base_identity.base_model, "adapter_sha256": self.sha256}


def changed_weights(config: AdapterConfig, shape: ModelShape) -> Iterator[tuple[WeightRule, Target]]:
    """Yield the rule and the target of each base weight that an adapter with `config` changes, layer by layer."""
    targets = {shape.block.adaptable[target.name].name: target for target in config.targets}
    for rule in weight_rules(shape):
        if rule.linear in targets and rule.layer in config.layers:
            yield rule, targets[rule.linear]


class AdaptedTensor(NamedTuple):
    """A stored tensor that an adapter changes: a base weight, or some rows of a weight that this package fuses.

    Attributes:
        rule: the rule of the weight in the name table (`weight_rules`).
        stored: the name of the stored tensor.
    """

    target: Target
    rule: WeightRule
    stored: str

    def factors(self, config: AdapterConfig, state: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Return A' (r, in) and the rows of B' for this tensor, (rows, r), both from `lora_factors`."""
        a, b = lora_factors(config, state, self.target, self.rule.layer)
        return a, self.rule.by_stored_tensor(b)[self.stored]


def changed_tensors(config: AdapterConfig, shape: ModelShape) -> dict[str, AdaptedTensor]:
    """Return the stored tensors that an adapter with `config` changes, by name."""
    changed = changed_weights(config, shape)
    return {name: AdaptedTensor(target, rule, name) for rule, target in changed for name in rule.hf_names}


def write_adapter_files(folder: Path, adapter: NativeAdapter) -> None:
    """Write the two files of an adapter into an existing folder. `save_adapter` writes a new folder atomically."""
    save_file({name: adapter.state[name].contiguous() for name in adapter.config.tensors}, folder / WEIGHTS_FILE)
    content = {**StoredAdapter.of(adapter.config, adapter.base_identity).fields(), "version": __version__}
    files.write_json(folder / CONFIG_FILE, with_checksums(content, files=[folder / WEIGHTS_FILE]))


def tensor_file_sha256(config: AdapterConfig, state: StateDict) -> str:
    """Return the SHA-256 of the tensor file that `write_adapter_files` writes for these tensors, in hexadecimal."""
    return hashlib.sha256(save({name: state[name].contiguous() for name in config.tensors})).hexdigest()


def save_adapter(folder: Path, adapter: NativeAdapter, *, guard: Guard = unguarded) -> None:
    """Write or replace an adapter folder atomically. Raise UserError if the folder cannot be written."""
    with new_folder(folder, guard=guard) as temporary:
        write_adapter_files(temporary, adapter)


def copy_adapter_files(source: Path, target: Path, adapter: NativeAdapter) -> None:
    """Copy the two files of `adapter` from the folder `source` to the existing folder `target`. Raise UserError if the
    files have changed since `adapter` was read from them."""
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(source / name, target / name)
    try:
        copy = load_native_adapter(target)
    except UserError:  # one of the files belongs to a different adapter
        copy = None
    if copy is None or not copy.equals(adapter):
        raise UserError(f"{source}: was replaced while it was read; run the command again")


@dataclass(frozen=True, kw_only=True)
class StoredAdapter(BaseIdentity):
    """The content of `adapter_config.json`: an adapter's config and its base identity."""

    method: Text
    rank: Size
    alpha: Real
    qkv_layout: Text
    layers: list[Any]
    seed: Count
    init_std_a: Real
    init_std_b: Real
    dtype: Literal["bf16", "fp32"]
    targets: list[Text]

    @staticmethod
    def of(config: AdapterConfig, base_identity: BaseIdentity) -> "StoredAdapter":
        """Return the content of `adapter_config.json` for an adapter with this config and base identity."""
        own = {name: getattr(config, name) for name in ("seed", "init_std_a", "init_std_b")}
        return StoredAdapter(**asdict(base_identity), **config.facts, **own, qkv_layout=_LAYOUT)

    def fields(self) -> dict[str, Any]:
        """Return the fields that are written to the file. Fields that are None are omitted."""
        values = {name: value for name in _ORDER if (value := getattr(self, name)) is not None}
        for_peft = {"peft_type": PEFT_TYPE, "task_type": "CAUSAL_LM", "base_model_name_or_path": self.base_model}
        return {"format_version": FORMAT_VERSION, **for_peft, "inference_mode": True, **values}

    @property
    def config(self) -> AdapterConfig:
        """Return the adapter's config."""
        query, kv = (number * self.head_dim for number in (self.num_attention_heads, self.num_key_value_heads))
        known = linear_sizes(self.hidden_size, (query, kv, kv), self.intermediate_size)
        targets = tuple(Target(name, *sizes) for name, sizes in known.items() if name in self.targets)
        start = self.seed, self.init_std_a, self.init_std_b
        return AdapterConfig(self.method, self.rank, self.alpha, tuple(self.layers), targets, *start)

    @property
    def base_identity(self) -> BaseIdentity:
        """Return the adapter's base identity."""
        return BaseIdentity(**{field.name: getattr(self, field.name) for field in fields(BaseIdentity)})

    def check(self, file: Path) -> None:
        """Raise UserError with the name of `file` if a value is invalid."""
        check_ranges(self, source=f"{file}: ")
        for name in ("base_model", "base_hash", "base_weights_hash", *OPTIONAL_FIELDS):
            if not (getattr(self, name) or "").isprintable():
                raise UserError(f"{file}: {name} = {shown(getattr(self, name))} holds control characters; remove them")
        self.check_formats(file)
        if self.method not in METHODS or self.qkv_layout != _LAYOUT:
            said = f"method {self.method!r} with layout {self.qkv_layout!r} is unknown"
            raise UserError(f"{file}: {said}; copy the file again, or install a later version of this package")
        check_layers(self.layers, self.num_layers, source=f"{file}: ")
        if not self.targets or self.targets != [name for name in TARGET_NAMES if name in self.targets]:
            known = f"{', '.join(TARGET_NAMES)}, each at most once and in this order"
            raise UserError(f"{file}: targets = {shown(self.targets)} is invalid; list one or more of {known}")


def check_layers(layers: list[Any], num_layers: int, *, source: str = "") -> None:
    """Raise UserError unless `layers` are ascending layer numbers of a model. The message begins with `source`."""
    numbers = all(type(layer) is int and 1 <= layer <= num_layers for layer in layers)
    if not layers or not numbers or layers != sorted({*layers}):
        raise UserError(f"{source}layers {shown(layers)} are not ascending numbers from 1 to {num_layers}; fix them")


def check_ranges(values: Any, *, source: str = "") -> None:
    """Raise UserError if `values.alpha` or an init std of `values` is outside its range. None is always allowed. The
    message begins with `source`."""
    std = (0, _LARGEST_STD)
    bounds = {"alpha": (SMALLEST_ALPHA, LARGEST_ALPHA), "init_std_a": std, "init_std_b": std}
    for name, (smallest, largest) in bounds.items():
        value = getattr(values, name)
        if value is not None and not smallest <= value <= largest:
            raise UserError(f"{source}{name} = {value:g} is not between {smallest:g} and {largest:g}; correct it")


_LAYOUT = "q|k|v"
_ORDER = (  # order of the fields in the file
    *("method", "rank", "alpha", *SHAPE_FIELDS, "qkv_layout", "targets", "layers", "base_model", *HASH_FIELDS),
    *("seed", "init_std_a", "init_std_b", "dtype", "base_format", "base_stored"),
)


def load_native_adapter(folder: Path) -> NativeAdapter:
    """Return the native adapter in a folder. A checkpoint of a run is also such a folder.

    Raises:
        UserError: the folder has no native adapter, or one of a different format version; a field is missing or has the
            wrong type; a tensor is missing, has the wrong shape, or is not floating point or not finite; values are too
            large; or a checksum does not match.
    """
    config, base, sums = read_config(folder)
    file = folder / WEIGHTS_FILE
    try:
        state = read_tensors(file, {name: config.shape(name) for name in config.tensors}, sums=sums)
    except UserError:
        again = read_config(folder)
        if again == (config, base, sums):
            raise
        config, base, sums = again  # a run has replaced the adapter in the meantime
        state = read_tensors(file, {name: config.shape(name) for name in config.tensors}, sums=sums)
    check_values(config, state, source=file)
    return NativeAdapter(config, base, state, has_checksums=bool(sums))


def check_values(config: AdapterConfig, state: StateDict, *, source: Path | str) -> None:
    """Raise UserError if a factor that is frozen at one has other values, or if values are too large."""
    for name in config.tensors:
        factor = config.factor(name)
        if factor.start == "one" and not factor.trained and not bool((state[name] == 1).all()):
            said = f"{source}: {name} is not all ones, but method {config.method} does not train it"
            raise UserError(f"{said}; give an intact copy")
    check_update(config, state, source=source)


def check_update(config: AdapterConfig, state: StateDict, *, source: Path | str) -> None:
    """Raise UserError if values are so large that the update may not be finite in fp32."""
    for target in config.targets:
        largest = {name: float(state[name].abs().max()) for name, (of, _) in config.tensors.items() if of is target}
        check_bound(config.alpha, largest, source=source)


def check_bound(alpha: float, largest: Mapping[str, float], *, source: Path | str) -> None:
    """Raise UserError if an update may not be finite in fp32: alpha times the largest value of each factor, by name."""
    if (bound := abs(alpha) * math.prod(largest.values())) > _LARGEST_UPDATE:
        name = max(largest, key=lambda name: largest[name])
        said = f"{source}: its update may reach {bound:.1e} (the largest value of {name} is {largest[name]:.1e})"
        raise UserError(f"{said}, so the file is damaged; copy it again")


def read_config(folder: Path) -> tuple[AdapterConfig, BaseIdentity, dict[str, str]]:
    """Return the config, the base identity and the checksums of the adapter in `folder`, without reading its tensors.
    Raise UserError if `adapter_config.json` is not valid (see `load_native_adapter`)."""
    file = folder / CONFIG_FILE
    content = files.read_json_object(file, kind="a native Tied-LoRA adapter folder")
    if content.get("peft_type", PEFT_TYPE) != PEFT_TYPE:
        raise UserError(f"{folder}: this is a PEFT adapter; give the native one (the run's adapter/ folder)")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        said = f"{file}: format_version {shown(version)}, of version {shown(content.get('version'))} of this package"
        raise UserError(f"{said}, is not {FORMAT_VERSION}, which this version reads; train the adapter again")
    sums = files.check_checksums(file, content)
    stored = files.read_fields(file, content, StoredAdapter, optional=OPTIONAL_FIELDS)
    stored.check(file)
    return stored.config, stored.base_identity, sums
