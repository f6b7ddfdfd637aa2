"""Reads a PEFT LoRA adapter of q, k and v as the exactly equal native `lora` adapter: nothing is rounded or fitted.

PEFT adds s B_p A_p to projection p, with s = lora_alpha / r (/ sqrt(r) with use_rslora). If all projections of a layer
have the same A, the native adapter has that A and the stacked rows of B. Otherwise it stacks the A_p, B is
block-diagonal, and the rank is the sum. Projections without an adapter get zero rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config
from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.json_files import Text, read_fields, read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity, identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, NativeAdapter, check_update
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import read_header, read_tensors
from megatron_tiedlora.config.settings import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.convert.inputs import EXPORT_RECORD
from megatron_tiedlora.convert.module_names import name_matcher
from megatron_tiedlora.model.weights import weight_rules

_LARGEST_RANK = 2**20
_PARTS = ("q_proj", "k_proj", "v_proj")
_MODULE = re.compile(r"model\.layers\.(\d+)\.self_attn\.(q_proj|k_proj|v_proj)")
_KEY = re.compile(rf"base_model\.model\.({_MODULE.pattern})\.lora_([AB])\.weight")
# Fields of PEFT's config that do not change what a LoRA of linear layers computes, or that are read below. Any other
# field that is set changes the computation, or may change it in a future version of PEFT.
_HARMLESS = {
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "task_type",
    "inference_mode",
    "runtime_config",
    "r",
    "lora_alpha",
    "use_rslora",
    "lora_dropout",
    "fan_in_fan_out",  # PEFT itself drops it for linear layers
    "bias",
    "init_lora_weights",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "ensure_weight_tying",
}
# With the others (pissa, olora, corda, loftq, lora_ga) PEFT changes the base weights when it loads the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class _Pair(NamedTuple):
    """The fp32 lora_A (r, d) and lora_B (rows, r) of one projection."""

    a: torch.Tensor
    b: torch.Tensor


def adapter_kind(folder: Path | str) -> Literal["native", "peft"]:
    """Which kind of adapter a folder holds.

    Raises:
        UserError: it holds no adapter; for a run or model folder the message says what to give instead.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise UserError(f"--adapter {folder}: no such folder")
    if not (path / CONFIG_FILE).is_file():
        if (path / "adapter" / CONFIG_FILE).is_file():
            raise UserError(f"--adapter {folder}: this is a run folder; give {Path(folder) / 'adapter'}")
        if (path / "config.json").is_file():
            raise UserError(f"--adapter {folder}: this is a model folder; give it with --model")
        raise UserError(f"--adapter {folder}: has no {CONFIG_FILE}; give the folder of a native or PEFT adapter")
    content = read_json_object(path / CONFIG_FILE, kind="an adapter folder")
    if "peft_type" in content:
        return "peft"
    if "format_version" in content:
        return "native"
    raise UserError(f"{path / CONFIG_FILE}: neither a native adapter (format_version) nor a PEFT one (peft_type)")


def load_peft_adapter(folder: Path, source: ModelSource, *, tokenizer: str | None = None) -> NativeAdapter:
    """Read a PEFT LoRA adapter as a native adapter of `source`.

    PEFT's files do not record the weights they were trained on. So only shapes are checked, and the adapter's base is
    `source` itself with the given `tokenizer`. For our own exports, `exported_base` knows more.

    Raises:
        UserError: it is not a PEFT LoRA adapter of q_proj, k_proj and v_proj; it has a feature beyond plain LoRA; or
            tensors are missing, unknown, not finite, or do not have the shapes of `source`.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file, kind="a PEFT adapter folder")
    _reject_features(file, content)
    rank, scale = _rank_and_scale(file, content)
    modules = _targets(file, content, source)
    pairs = _read_pairs(folder, modules, rank=rank, source=source)
    layers = tuple(sorted({layer for layer, _ in pairs}))
    a, b = _joined(pairs, layers, rank=rank, shape=source.shape)
    config = make_adapter_config(
        "lora",
        rank=a.shape[1],
        alpha=scale * a.shape[1],
        layers=layers,
        hidden_size=source.shape.hidden_size,
        qkv_rows=source.shape.heads.rows,
        seed=0,
    )
    with BaseWeights(source.weights_folder(), weight_rules(source.shape)) as weights:
        base = identify_base(source, weights, "fp32", tokenizer=tokenizer)
    state = {"A": a, "B": b, "u": torch.ones(config.shape("u")), "v": torch.ones(config.shape("v"))}
    check_update(config, state, source=folder / WEIGHTS_FILE)
    return NativeAdapter(config, base, state)


@dataclass(frozen=True)
class _ExportRecord:
    """The base as EXPORT_RECORD describes it."""

    base_model: Text
    base_hash: Text
    base_weights_hash: Text
    base_sample: Text | None = None
    tokenizer: Text | None = None
    tokenizer_hash: Text | None = None


def exported_base(folder: Path, like: BaseIdentity) -> BaseIdentity | None:
    """The base that the PEFT adapter in `folder` was exported for; None if this package did not export it.

    Args:
        like: a base of the same shape.

    Raises:
        UserError: the record cannot be read.
    """
    file = folder / EXPORT_RECORD
    if not file.is_file():
        return None
    record = read_fields(
        file,
        read_json_object(file, kind="the record of an export"),
        _ExportRecord,
        optional=("base_sample", "tokenizer", "tokenizer_hash"),
    )
    return replace(
        like,
        name=record.base_model,
        config_hash=record.base_hash,
        weights_hash=record.base_weights_hash,
        sample=record.base_sample,
        tokenizer=record.tokenizer,
        tokenizer_hash=record.tokenizer_hash,
    )


def _reject_features(file: Path, content: Mapping[str, Any]) -> None:
    if "peft_type" not in content:
        raise UserError(f"{file}: not a PEFT adapter (it has no peft_type); give another folder")
    if content["peft_type"] != "LORA":
        raise UserError(f"{file}: peft_type {as_given(content['peft_type'])} is not supported; only LORA is")
    if content.get("bias") not in (None, "none"):
        raise UserError(f"{file}: bias = {shown(content['bias'])} trains biases; only 'none' is supported")
    start = content.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{file}: init_lora_weights = {shown(start)} changes the base weights too; convert it to a plain LoRA with"
            " PEFT (path_initial_model_for_weight_conversion) first"
        )
    for name, value in content.items():
        if name not in _HARMLESS and value:
            raise UserError(f"{file}: {as_given(name)} = {shown(value)} is not a plain LoRA; only that is supported")


def _rank_and_scale(file: Path, content: Mapping[str, Any]) -> tuple[int, float]:
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
        raise UserError(f"{file}: r = {shown(rank)} is not an integer from 1 to {_LARGEST_RANK:,}")
    if type(alpha) not in (int, float):
        raise UserError(f"{file}: lora_alpha = {shown(alpha)} is not a number")
    if not SMALLEST_ALPHA <= alpha <= LARGEST_ALPHA:
        bounds = f"{SMALLEST_ALPHA:g} and {LARGEST_ALPHA:g}"
        raise UserError(f"{file}: lora_alpha = {shown(alpha)} is not between {bounds}; scale lora_B instead")
    return rank, alpha / (math.sqrt(rank) if content.get("use_rslora") else rank)


def _targets(file: Path, content: Mapping[str, Any], source: ModelSource) -> set[str]:
    """Names of the q, k and v projections that the config adapts, by PEFT's own matching rules."""
    targets, layers = content.get("target_modules"), content.get("layers_to_transform")
    if isinstance(targets, list) and targets:
        for name in targets:
            if not isinstance(name, str) or name.rpartition(".")[2] not in _PARTS:
                raise UserError(f"{file}: target module {as_given(name)} is not supported; {', '.join(_PARTS)} are")
    elif not isinstance(targets, str) or targets == "all-linear":
        raise UserError(f"{file}: target_modules = {shown(targets)} is not supported; list {', '.join(_PARTS)}")
    if not (layers is None or type(layers) is int or isinstance(layers, list)):
        raise UserError(f"{file}: layers_to_transform = {shown(layers)} is neither a layer nor a list of layers")
    chosen = [layers] if isinstance(layers, int) else layers or range(source.shape.num_layers)
    for layer in chosen:
        if type(layer) is not int or not 0 <= layer < source.shape.num_layers:
            raise UserError(
                f"{file}: layers_to_transform has {shown(layer)}, but {source.name} has layers 0 to"
                f" {source.shape.num_layers - 1}; give the adapter's own base with --model"
            )
    is_target = name_matcher(targets, what=f"{file}: target_modules")
    is_excluded = name_matcher(content.get("exclude_modules") or [], what=f"{file}: exclude_modules")
    names = [f"model.layers.{layer}.self_attn.{part}" for layer in range(source.shape.num_layers) for part in _PARTS]
    whole_names = frozenset(targets if isinstance(targets, list) else ())
    of_chosen = frozenset(chosen)
    found = {
        name
        for name in names
        if is_target(name)
        and not is_excluded(name)
        # layers_to_transform does not apply to a module that is named in full.
        and (name in whole_names or _layer_and_part(name)[0] in of_chosen)
    }
    if not found:
        raise UserError(f"{file}: target_modules {shown(targets)} match no {', '.join(_PARTS)} of {source.name}")
    return found


def _layer_and_part(module: str) -> tuple[int, str]:
    """0-based layer and projection of a module's name."""
    match = _MODULE.fullmatch(module)
    assert match is not None, module
    return int(match[1]), match[2]


def _read_pairs(folder: Path, modules: set[str], *, rank: int, source: ModelSource) -> dict[tuple[int, str], _Pair]:
    """The adapted projections by 1-based layer and name. Checks that every tensor is of `modules` and fits in shape."""
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder / 'adapter_model.bin'}: pickled weights are not read; save them as {WEIGHTS_FILE}")
    model_shape, shapes = source.shape, {}
    for key, found in read_header(file).shapes.items():
        match = _KEY.fullmatch(key)
        if match is None:
            parts = ", ".join(_PARTS)
            raise UserError(f"{file}: {as_given(key)} is not a LoRA factor of {parts}; only these are supported")
        layer, part, side = int(match[2]), match[3], match[4]
        if layer >= model_shape.num_layers:
            raise UserError(
                f"{file}: {key} is for layer {layer}, but {source.name} has layers 0 to {model_shape.num_layers - 1};"
                " give the adapter's own base with --model"
            )
        if match[1] not in modules:
            raise UserError(f"{file}: {key} is present, but {CONFIG_FILE} does not target its module")
        rows = model_shape.heads.rows[_PARTS.index(part)]
        shapes[key] = (rank, model_shape.hidden_size) if side == "A" else (rows, rank)
        if found != shapes[key]:
            raise UserError(
                f"{file}: {key} has shape {shown(found)}, but with r and {source.name} it must be {shapes[key]}; give"
                " the adapter's own base with --model"
            )
    values = read_tensors(file, shapes)
    pairs = {}
    for module in modules:
        keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
        for key in keys:
            if key not in values:
                raise UserError(
                    f"{file}: {key} is missing, but {CONFIG_FILE} targets its module; copy the adapter again, or give"
                    " its own base with --model"
                )
        layer, part = _layer_and_part(module)
        pairs[layer + 1, part] = _Pair(*(values[key] for key in keys))
    return pairs


def _joined(
    pairs: Mapping[tuple[int, str], _Pair], layers: tuple[int, ...], *, rank: int, shape: ModelShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The native A (n, R, d) and B (n, o, R). R is `rank` if each layer has one A, else `rank` times the number of
    different projections that are adapted."""
    by_layer = [{part: pairs[layer, part] for part in _PARTS if (layer, part) in pairs} for layer in layers]
    parts = [part for part in _PARTS if any(part in here for here in by_layer)]
    shared = all(torch.equal(pair.a, next(iter(here.values())).a) for here in by_layer for pair in here.values())
    full_rank = rank if shared else rank * len(parts)
    starts = dict(zip(_PARTS, (0, shape.heads.rows[0], sum(shape.heads.rows[:2])), strict=True))
    a = torch.zeros(len(layers), full_rank, shape.hidden_size)
    b = torch.zeros(len(layers), sum(shape.heads.rows), full_rank)
    for index, here in enumerate(by_layer):
        for part, pair in here.items():
            column = 0 if shared else rank * parts.index(part)
            a[index, column : column + rank] = pair.a
            b[index, starts[part] : starts[part] + len(pair.b), column : column + rank] = pair.b
    return a, b
