"""Identify the base model and the tokenizer of an adapter by hashes that are equal for all copies of a model.

A hash of the config identifies the shape and the computation. A hash of values at fixed positions of every tensor
identifies the weights. Values are hashed as bf16, so a copy in a different precision is the same base. A change below
the precision of bf16, or at other positions, is not detected. Very small values are also rounded to fp16.

A copy in a different precision is quantised to different values. So if a base was quantised while it was loaded, its
identity also has the precision of the unquantised weights. A transformers model in memory is identified the same way.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.files import Size, Text, read_small_text
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import BASE_FORMATS, ModelShape
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import run_starts
from megatron_tiedlora.data.tokenizer import tokenizer_hash
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import stored_format
from megatron_tiedlora.model.weights import WeightRule, coded_shapes, stored_shapes, weight_rules

MERGE_RECORD = "tiedlora_merge.json"  # a file in a model's folder that describes the merged adapter

SHAPE_FIELDS = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    "intermediate_size",
)
HASH_FIELDS = ("base_hash", "base_weights_hash", "base_sample", "tokenizer", "tokenizer_hash")
FORMAT_FIELDS = ("base_format", "base_stored")
# None is allowed for `base_sample` if weights in memory are quantised or offloaded, for `tokenizer` if it is the base's
# own, for `tokenizer_hash` if its files are unknown, and for `FORMAT_FIELDS` if the base is not quantised.
OPTIONAL_FIELDS = ("base_sample", "tokenizer", "tokenizer_hash", *FORMAT_FIELDS)
_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the possible dtypes of stored linears besides fp32


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """The identity of the base model on which an adapter was trained. The field names are those of the adapter record.

    Attributes:
        base_model: the value that the user gave to --model.
        base_hash: hash of the config, `ModelSource.base_hash`.
        base_weights_hash: hash of the final norm's weight in bf16 and of the merge record. (A merge does not change
            this norm.)
        base_sample: hash of `BaseWeights.sample` of every tensor; None if weights were quantised or offloaded.
        tokenizer: the value that the user gave to --tokenizer; None for the base's own tokenizer.
        tokenizer_hash: hash of the tokenizer's files; None if unknown.
        dtype: dtype of the base in training.
        base_format: storage format of the blocks' linears, a key of `BASE_FORMATS`; None if they are in `dtype`.
        base_stored: `linears_dtype` of the original weights if the linears were quantised while they were loaded; None
            in all other cases, or if the dtype is unknown.
    """

    num_layers: Size
    hidden_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    intermediate_size: Size
    base_model: Text
    base_hash: Text
    base_weights_hash: Text
    base_sample: Text | None = None
    tokenizer: Text | None = None
    tokenizer_hash: Text | None = None
    dtype: str
    base_format: Text | None = None
    base_stored: Text | None = None

    @property
    def precision(self) -> str:
        """Return the storage format of the blocks' linears, or `dtype` if they are not quantised."""
        return self.base_format or self.dtype

    def check_formats(self, file: Path) -> None:
        """Raise UserError with the name of `file` if a storage format or a dtype is unknown."""
        for name, known in (("base_format", (*BASE_FORMATS,)), ("base_stored", (*_NARROW, "fp32"))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{file}: {name} {shown(value)} is not one of {', '.join(known)}; correct it")


def identify_base(
    source: ModelSource, weights: "BaseWeights | WeightsInMemory", dtype: str, *, tokenizer: str | None = None
) -> BaseIdentity:
    """Return the identity of a base model, after reading a few KB of every tensor. `tokenizer` is the value of
    --tokenizer. Raise UserError if the tokenizer's files cannot be read."""
    tokens = tokenizer or source.folder
    return replace(
        identify_shape(source, dtype, weights_hash=weights_hash(source, weights)),
        base_sample=sample_hash(weights),
        tokenizer=tokenizer,
        tokenizer_hash=None if tokens is None else tokenizer_hash(tokens),
    )


def weights_hash(source: ModelSource, weights: "BaseWeights | WeightsInMemory") -> str:
    """Return a hash of the final norm's weight in bf16 and of the merge record, if there is one."""
    # The same model may be stored in fp32, fp16 or bf16. Rounding to bf16 makes these copies equal.
    digest = hashlib.sha256(_bits(weights.read(f"{source.shape.final_norm.source}.weight")))
    record = source.folder and source.folder / MERGE_RECORD
    if record and record.is_file():
        digest.update(read_small_text(record, kind="JSON").encode())
    return digest.hexdigest()


def identify_model(source: ModelSource, dtype: str, tokenizer: str | None = None) -> BaseIdentity:
    """Return the identity of a base model on disk (`identify_base`). Raise UserError if its files cannot be read."""
    with BaseWeights(source.weights_folder(), source.shape, source.stored) as weights:
        found = identify_base(source, weights, dtype, tokenizer=tokenizer)
    return replace(found, base_format=source.stored_base)


def sample_hash(weights: "BaseWeights | WeightsInMemory") -> str:
    """Return a hash of the names, the shapes and a sample of the values of all tensors in `weights`."""
    digest = hashlib.sha256()
    shapes = stored_shapes(weights.rules)
    # A text tower has other prefixes in some files and in memory. The names are hashed as those of a text model.
    tower = weights.rules[0].hf_names[0].removesuffix("embed_tokens.weight")
    hashed = {name.replace(tower, "model.", 1).removeprefix("language_model."): name for name in shapes}
    for as_text, name in sorted(hashed.items()):
        digest.update(f"{as_text} {list(shapes[name])}\n".encode())
        # Below 2^-17, fp16 is coarser than bf16. Values are also rounded to fp16, so that a copy in fp16 has this hash.
        digest.update(_bits(weights.sample(name).to(torch.bfloat16).to(torch.float16)))
    return digest.hexdigest()


def linears_dtype(weights: "BaseWeights | WeightsInMemory", shape: ModelShape) -> str:
    """Return the first of bf16, fp16 and fp32 that represents a sample of the values of the blocks' linears exactly.

    A copy in a wider dtype has the same values, so its result is the original dtype. Quantising either gives the same
    codes. For a folder with several dtypes, the result represents the values of all linears.
    """
    fitting = list(_NARROW)
    for name in coded_shapes(shape):
        values = weights.sample(name)
        fitting = [kind for kind in fitting if torch.equal(values.to(_NARROW[kind]).to(values.dtype), values)]
    return fitting[0] if fitting else "fp32"


def quantised_otherwise(trained: BaseIdentity, found: BaseIdentity) -> str:
    """Return a message if a base is quantised to different values from those in training, else ''.

    The result is also '' if the storage formats differ or if a dtype is unknown.
    """
    if trained.base_format != found.base_format or not _differ(trained.base_stored, found.base_stored):
        return ""
    return (
        f"trained on {trained.base_model}, quantised to {trained.base_format} from {trained.base_stored}, but"
        f" {found.base_model} has its linears in {found.base_stored}, which is quantised to different values"
    )


def _bits(values: torch.Tensor) -> bytes:
    return values.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def identify_shape(source: ModelSource, dtype: str, *, weights_hash: str) -> BaseIdentity:
    """Return the identity of a base model with a known hash of its weights, without the tokenizer's fields."""
    shape = source.shape
    return BaseIdentity(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads.num,
        num_key_value_heads=shape.heads.num_kv,
        head_dim=shape.heads.dim,
        intermediate_size=shape.intermediate_size,
        base_model=source.name,
        base_hash=source.base_hash,
        base_weights_hash=weights_hash,
        dtype=dtype,
    )


def base_differences(trained: BaseIdentity, found: BaseIdentity) -> tuple[str, ...]:
    """Return which of config, weights and tokenizer differ from training. An unknown hash is equal to any hash."""
    differ = {
        "config": _differ(trained.base_hash, found.base_hash),
        "weights": _differ(trained.base_weights_hash, found.base_weights_hash)
        or _differ(trained.base_sample, found.base_sample),
        "tokenizer": _differ(trained.tokenizer_hash, found.tokenizer_hash),
    }
    return tuple(what for what, differs in differ.items() if differs)


def _differ(one: str | int | None, other: str | int | None) -> bool:
    return None not in (one, other) and one != other


def check_same_base(
    trained: BaseIdentity, found: BaseIdentity, *, source: str, differs: bool = False, in_memory: bool = False
) -> tuple[str, ...]:
    """Compare the base in use with the base on which an adapter was trained. Return messages for the user. Raise
    UserError if the base or its tokenizer is different.

    Args:
        source: the adapter's name in messages.
        differs: the value of --base_differs; if true, only the shape must be the same.
        in_memory: whether the base in use is a model in memory, whose tokenizer is unknown.
    """
    own = "use its own base" if in_memory else "give its own base with --model"
    for field in SHAPE_FIELDS:
        value, other = getattr(trained, field), getattr(found, field)
        if value != other:
            said = f"{source}: trained on {trained.base_model} with {field} {value}, but {found.base_model} has {other}"
            raise UserError(f"{said}; {own}")
    notes: tuple[str, ...] = ()
    if trained.base_sample is None and found.base_sample is not None:
        why = "saved when its base's weights were quantised or offloaded"
        notes += (f"{source}: {why}, so the base is compared only by config and final norm",)
    if trained.base_format != found.base_format:
        kinds = f"in {trained.precision}, but this uses it in {found.precision}; the losses differ"
        notes += (f"{source}: trained on its base {kinds}",)
    differences = base_differences(replace(trained, tokenizer_hash=None) if in_memory else trained, found)
    if "weights" not in differences and (otherwise := quantised_otherwise(trained, found)):
        notes += (f"{source}: {otherwise}; the losses differ",)
    if not differences:
        return notes
    what = f"trained on {trained.base_model}, whose {' and '.join(differences)} differ from {found.base_model}'s"
    if differs:
        return (*notes, f"{source}: {what}{'' if in_memory else ' (--base_differs)'}")
    if differences == ("tokenizer",):
        own = "its base's tokenizer" if trained.tokenizer is None else trained.tokenizer
        used = f"the tokenizer of {found.base_model}" if found.tokenizer is None else found.tokenizer
        raise UserError(
            f"{source}: trained with a different tokenizer ({own}), not {used}; give that tokenizer with --tokenizer"
            " or with its model, or give --base_differs to use this one"
        )
    anyway = "base_differs=True" if in_memory else "--base_differs"
    raise UserError(f"{source}: {what}; {own}, or give {anyway} to use this one")


# A model in memory ----------------------------------------------------------------------------------------------------


def model_source(model: Any, name: str | None = None) -> ModelSource:
    """Return the `ModelSource` of a transformers model in memory, or of its config. `name` is the model's hub id or
    folder, if the config does not have it. Raise UserError if the model is not a causal language model of an
    implemented family."""
    config = getattr(model, "config", model)
    if not hasattr(config, "to_json_string"):
        raise UserError(f"{type(model).__name__} is not a transformers model: it has no config; give a causal model")
    fields = json.loads(config.to_json_string())  # the fields that save_pretrained writes
    stored = None
    with suppress(UserError):  # this package cannot read this storage format
        stored = stored_format(fields, source="its config")
    fields.pop("quantization_config", None)  # it affects only the frozen weights, and not the adapter
    name = name or config.name_or_path or type(model).__name__
    folder = Path(name) if Path(name).is_dir() else None
    head = dict(getattr(model, "named_parameters", dict)()).get("lm_head.weight")  # None if it is tied
    if "text_config" in fields and head is not None and not head.is_meta:
        fields["tie_word_embeddings"] = False  # transformers does not tie a head that is stored with other values
    return ModelSource(name, folder, shape_from_hf(fields, source=f"the config of {name}"), stored=stored)


def base_layer_of(module: Any) -> Any:
    """Return the module that PEFT adapters wrap, or the module itself if it has no adapter."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


@dataclass(frozen=True)
class WeightsInMemory:
    """The weights of a transformers model in memory, for `identify_base`."""

    model: Any
    source: ModelSource

    @cached_property
    def rules(self) -> tuple[WeightRule, ...]:
        """Return the model's name table (see `weight_rules`)."""
        return weight_rules(self.source.shape)

    def read(self, name: str) -> torch.Tensor:
        """Return the tensor `name`, even if accelerate has offloaded it. Raise UserError if it does not exist."""
        module, tensor = self.held(name)
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if tensor.is_meta and offloaded is not None:
            tensor = offloaded[name.rpartition(".")[2]]
        return tensor.detach()

    def held(self, name: str) -> tuple[Any, torch.Tensor]:
        """Return the module with the tensor `name`, and the tensor. An offloaded tensor is on the meta device."""
        path, _, kind = name.rpartition(".")
        try:
            module = base_layer_of(self.model.get_submodule(path))
            return module, getattr(module, kind)
        except AttributeError:
            raise UserError(f"{self.source.name}: the model has no {name}; give a complete causal model") from None

    def sample(self, name: str) -> torch.Tensor:
        """Return the same values as `BaseWeights.sample`."""
        flat = self.read(name).flatten()
        starts, length = run_starts(flat.numel())
        return torch.cat([flat[start : start + length] for start in starts]).cpu()


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a weight is neither quantised nor offloaded."""
    return tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta


def identify_in_memory(model: Any, source: ModelSource) -> BaseIdentity:
    """Return the identity of a model in memory. If weights are quantised or offloaded, `base_sample` is None. Raise
    UserError if the model lacks a module, or if its final norm is sharded or offloaded."""
    weights, norm = WeightsInMemory(model, source), source.shape.final_norm
    values = weights.read(f"{norm.source}.weight")
    if values.shape != (norm.size,) or not is_plain(values):
        raise UserError(f"{source.name}: the weights of the model are sharded or offloaded; load the full model")
    dtype = "fp32" if values.dtype == torch.float32 else "bf16"
    held = ((weights.held(name)[1], shape) for name, shape in stored_shapes(weights.rules).items())
    # If no weight is quantised, offloaded or sharded, all values in memory are equal to those of the files.
    if all(tuple(tensor.shape) == shape and is_plain(tensor) for tensor, shape in held):
        return identify_base(source, weights, dtype)
    found = identify_shape(source, dtype, weights_hash=weights_hash(source, weights))
    return replace(found, base_format=source.stored_base)
