"""Reads a PEFT LoRA adapter as the exactly equal native `lora` adapter: nothing is rounded or fitted.

PEFT adds s B_p A_p to module p, with s = lora_alpha / r (/ sqrt(r) with use_rslora). If all modules that are fused in
one linear here have the same A, the native adapter has that A and the stacked rows of B. Otherwise it stacks the A_p,
B is block-diagonal, and the rank is the sum. Modules without an adapter get zero rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.functional import pad

from megatron_tiedlora.adapters.targets import targets_of
from megatron_tiedlora.adapters.tied_adapter import make_adapter_config
from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.json_files import read_fields, read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.shapes import BlockShape, LinearShape
from megatron_tiedlora.checkpoint.base_identity import OPTIONAL_FIELDS, SHAPE_FIELDS, BaseIdentity, identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, NativeAdapter, check_update
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import read_header, read_tensors
from megatron_tiedlora.config.settings import LARGEST_ALPHA, SMALLEST_ALPHA
from megatron_tiedlora.convert.export_peft import target_modules
from megatron_tiedlora.convert.inputs import EXPORT_RECORD
from megatron_tiedlora.convert.module_names import name_matcher

_LARGEST_RANK = 2**20
# Fields of PEFT's config that do not change what a LoRA of linear layers computes, or that are read below. Any other
# field that is set changes the computation, or may change it in a future version of PEFT.
_HARMLESS = {
    *("peft_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "task_type"),
    *("inference_mode", "runtime_config", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("megatron_core", "qalora_group_size", "ensure_weight_tying"),
    "fan_in_fan_out",  # PEFT itself drops it for linear layers
}
# With the others (pissa, olora, corda, loftq, lora_ga) PEFT changes the base weights when it loads the adapter.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class _Pair(NamedTuple):
    """The fp32 lora_A (r, in) and lora_B (rows, r) of one module."""

    a: torch.Tensor
    b: torch.Tensor


def _modules(block: BlockShape) -> dict[str, tuple[int, int]]:
    """(in, out) of the stored modules that are adaptable linears or parts of one, by their names below the block."""
    return {
        stored.module: (linear.in_size, stored.of or size)
        for linear in block.adaptable.values()
        for stored, size in zip(linear.sources, linear.blocks, strict=True)
    }


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
        UserError: it is not a PEFT LoRA adapter of adaptable linears; it has a feature beyond plain LoRA; or
            tensors are missing, unknown, not finite, or do not have the shapes of `source`.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file, kind="a PEFT adapter folder")
    _reject_features(file, content)
    rank, scale = _rank_and_scale(file, content)
    chosen = _chosen(file, content, source)
    pairs = _read_pairs(folder, chosen, rank=rank, source=source)
    layers, adaptable = tuple(sorted({layer for layer, _ in pairs})), source.shape.block.adaptable
    joined = {
        target: _joined(pairs, layers, rank=rank, linear=adaptable[target.name]) for target in targets_of(source.shape)
    }
    full_rank = max(a.shape[1] for a, _ in joined.values())
    config = make_adapter_config(
        "lora", rank=full_rank, alpha=scale * full_rank, layers=layers, targets=tuple(joined), seed=0
    )
    with BaseWeights(source.weights_folder(), source.shape) as weights:
        base = identify_base(source, weights, "fp32", tokenizer=tokenizer)
    state = {name: torch.ones(config.shape(name)) for name in config.tensors}
    for target, (a, b) in joined.items():
        state[f"{target.prefix}A"] = pad(a, (0, 0, 0, full_rank - a.shape[1]))
        state[f"{target.prefix}B"] = pad(b, (0, full_rank - a.shape[1]))
    check_update(config, state, source=folder / WEIGHTS_FILE)
    return NativeAdapter(config, base, state)


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
    content = read_json_object(file, kind="the record of an export")
    not_recorded = {name: getattr(like, name) for name in (*SHAPE_FIELDS, "dtype")}
    return read_fields(file, {**content, **not_recorded}, BaseIdentity, optional=OPTIONAL_FIELDS)


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


def _chosen(file: Path, content: Mapping[str, Any], source: ModelSource) -> dict[str, tuple[int, str]]:
    """The modules that the config adapts, by PEFT's own rules: 1-based layer and name below it, by whole name."""
    block, modules = source.shape.block, _modules(source.shape.block)
    words = target_modules(block, block.adaptable)
    targets, layers = content.get("target_modules"), content.get("layers_to_transform")
    if isinstance(targets, list) and targets:
        for name in targets:
            if not isinstance(name, str) or name.rpartition(".")[2] not in words:
                raise UserError(f"{file}: target module {as_given(name)} is not supported; {', '.join(words)} are")
    elif not isinstance(targets, str) or targets == "all-linear":
        raise UserError(f"{file}: target_modules = {shown(targets)} is not supported; list {', '.join(words)}")
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
    whole_names, of_chosen = frozenset(targets if isinstance(targets, list) else ()), frozenset(chosen)
    found = {
        name: (layer + 1, module)
        for layer in range(source.shape.num_layers)
        for module in modules
        if is_target(name := f"{block.source.format(index=layer)}.{module}")
        and not is_excluded(name)
        # layers_to_transform does not apply to a module that is named in full.
        and (name in whole_names or layer in of_chosen)
    }
    if not found:
        raise UserError(f"{file}: target_modules {shown(targets)} match no {', '.join(words)} of {source.name}")
    return found


def _read_pairs(
    folder: Path, chosen: Mapping[str, tuple[int, str]], *, rank: int, source: ModelSource
) -> dict[tuple[int, str], _Pair]:
    """The chosen modules by 1-based layer and name. Checks that every tensor is of one of them and fits in shape."""
    file = folder / WEIGHTS_FILE
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder / 'adapter_model.bin'}: pickled weights are not read; save them as {WEIGHTS_FILE}")
    num_layers, block, shapes = source.shape.num_layers, source.shape.block, {}
    modules = _modules(block)
    layers = re.escape(block.source).replace(re.escape("{index}"), r"(\d+)")
    names = "|".join(map(re.escape, modules))
    pattern = re.compile(rf"base_model\.model\.({layers}\.({names}))\.lora_([AB])\.weight")
    for key, found in read_header(file).shapes.items():
        match = pattern.fullmatch(key)
        if match is None:
            words = ", ".join(target_modules(block, block.adaptable))
            raise UserError(f"{file}: {as_given(key)} is not a LoRA factor of {words}; only these are supported")
        name, layer, module, side = match.groups()
        if int(layer) >= num_layers:
            raise UserError(
                f"{file}: {key} is for layer {int(layer)}, but {source.name} has layers 0 to {num_layers - 1};"
                " give the adapter's own base with --model"
            )
        if name not in chosen:
            raise UserError(f"{file}: {key} is present, but {CONFIG_FILE} does not target its module")
        in_size, out_size = modules[module]
        shapes[key] = (rank, in_size) if side == "A" else (out_size, rank)
        if found != shapes[key]:
            raise UserError(
                f"{file}: {key} has shape {shown(found)}, but with r and {source.name} it must be {shapes[key]}; give"
                " the adapter's own base with --model"
            )
    values = read_tensors(file, shapes)
    pairs = {}
    for name, place in chosen.items():
        keys = [f"base_model.model.{name}.lora_{side}.weight" for side in "AB"]
        for key in keys:
            if key not in values:
                raise UserError(
                    f"{file}: {key} is missing, but {CONFIG_FILE} targets its module; copy the adapter again, or give"
                    " its own base with --model"
                )
        pairs[place] = _Pair(*(values[key] for key in keys))
    return pairs


def _joined(
    pairs: Mapping[tuple[int, str], _Pair], layers: tuple[int, ...], *, rank: int, linear: LinearShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """The native A (n, R, in) and B (n, out, R) of a fused linear. R is `rank` if each layer has one A, else `rank`
    times the number of different modules that are adapted."""
    modules = list(dict.fromkeys(stored.module for stored in linear.sources))
    by_layer = [{module: pairs[layer, module] for module in modules if (layer, module) in pairs} for layer in layers]
    used = [module for module in modules if any(module in here for here in by_layer)]
    shared = all(torch.equal(pair.a, next(iter(here.values())).a) for here in by_layer for pair in here.values())
    full_rank = rank if shared else rank * len(used)
    blocks = list(zip(linear.sources, linear.blocks, accumulate((0, *linear.blocks[:-1])), strict=True))
    a = torch.zeros(len(layers), full_rank, linear.in_size)
    b = torch.zeros(len(layers), linear.out_size, full_rank)
    for index, here in enumerate(by_layer):
        for module, pair in here.items():
            column = 0 if shared else rank * used.index(module)
            a[index, column : column + rank] = pair.a
            for stored, size, start in blocks:
                if stored.module == module:
                    rows = pair.b[stored.start : stored.start + size]
                    b[index, start : start + size, column : column + rank] = rows
    return a, b
