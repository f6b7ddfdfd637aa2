"""Reads adapter folders for a server. Nothing in this module imports vLLM.

A native adapter has one A and one B for all layers if its layers share them. A PEFT VeRA does too. Each of them also
equals a plain LoRA.
"""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, targets_of
from megatron_tiedlora.base.files import read_json_object, read_json_or_none
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.methods import FACTORS
from megatron_tiedlora.checkpoint.base_identity import check_same_base, identify_shape
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, NativeAdapter, load_native_adapter, read_config
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.export_peft import peft_tensors, target_modules
from megatron_tiedlora.convert.inputs import NATIVE_FOLDER, adapter_kind
from megatron_tiedlora.convert.open_adapter import read_peft
from megatron_tiedlora.convert.peft_files import read_rank
from megatron_tiedlora.convert.vera_files import TargetFactors, Vera, native_vera, read_vera, vera_factors

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM shows only what its own loggers write


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter as it is served with the model `source`.

    Attributes:
        adapter: the native adapter, or the config of a PEFT adapter (see `read_unloaded`).
        vera: the PEFT VeRA, if it is one.
    """

    source: ModelSource
    adapter: NativeAdapter
    vera: Vera | None = None

    @property
    def why_not_tied(self) -> str:
        """Return the reason why the layers do not share A and B, or "" if they do."""
        config = self.adapter.config
        shared = all(config.num_slots(name) == 1 for name, (_, factor) in config.tensors.items() if factor in "AB")
        return "" if shared else f"method {config.method}: its layers do not share A and B"

    @cached_property
    def tied(self) -> Mapping[str, TargetFactors] | None:
        """Return the factors of each adapted linear by target name, or None if the layers do not share A and B."""
        if self.vera is not None:
            return vera_factors(self.vera, self.source)
        return None if self.why_not_tied else _tied_factors(self.adapter, self.source.shape.num_layers)

    def lora_tensors(self) -> dict[str, Tensor]:
        """Return the equal plain LoRA of the same rank and scale 1 by the names of a PEFT file (see `peft_tensors`)."""
        adapter = self.adapter
        if self.vera is not None:
            config, state, _ = native_vera(self.vera, self.source)
            adapter = replace(adapter, config=config, state=state)
        return peft_tensors(self.source, adapter, rank=self.adapter.config.rank)


def _tied_factors(adapter: NativeAdapter, num_layers: int) -> dict[str, TargetFactors]:
    """Return the factors of each target of a native adapter whose layers share A and B, by target name."""
    config, found = adapter.config, {}
    for target in config.targets:
        u, v = torch.zeros(num_layers, 1, config.rank), torch.zeros(num_layers, target.out_size)
        for layer in config.layers:
            tensors = ((name, adapter.state[name]) for name in (target.prefix + factor for factor in FACTORS))
            a, b, u[layer - 1, 0], v[layer - 1] = (
                tensor[config.slot(name, layer)] if config.is_stacked(name) else tensor for name, tensor in tensors
            )
        found[target.name] = TargetFactors(a, b, u * config.scale, v)
    return found


def is_plain_lora(folder: Path) -> bool:
    """Return whether `folder` has only a PEFT LoRA, which may be of any model that the server has."""
    content = read_json_or_none(folder / CONFIG_FILE) or {}
    is_lora = content.get("peft_type", "LORA") == "LORA" and "format_version" not in content
    return bool(content) and is_lora and not os.path.lexists(folder / NATIVE_FOLDER)


def read_served(folder: Path, source: ModelSource) -> ServedAdapter | None:
    """Return the native adapter or PEFT VeRA in `folder`, or None for a PEFT LoRA, which vLLM reads itself.

    An export also contains its native adapter, which is returned if the PEFT files are equal to it. Raise UserError if
    the folder contains no adapter, another kind of adapter, or damaged files, or if its shapes do not fit `source`."""
    if is_plain_lora(folder):
        return None
    adapter: NativeAdapter | None
    content, notes, vera = read_json_or_none(folder / CONFIG_FILE) or {}, tuple[str, ...](), None
    if adapter_kind(folder, flag=str(folder)) == "native":
        adapter = load_native_adapter(folder)
    elif content.get("peft_type") == "VERA":
        vera = read_vera(folder, content, source)
        adapter, notes = read_unloaded(folder, source).adapter, vera.notes
    else:
        opened = read_peft(folder, source)
        adapter, notes = opened.native, opened.notes
    for note in notes:
        logger.warning(note)
    if adapter is None:
        return None
    here = identify_shape(source, "fp32", weights_hash="")
    check_same_base(adapter.base_identity, here, source=str(folder), differs=True)  # compares only the shapes
    return ServedAdapter(source, adapter, vera)


def read_unloaded(folder: Path, source: ModelSource) -> ServedAdapter:
    """Return the native or PEFT adapter in `folder` as its config describes it, without tensors. A PEFT adapter has the
    method lora or vera, and `source` as its base. Raise UserError if the config cannot be read."""
    content, shape = read_json_object(folder / CONFIG_FILE, kind="an adapter folder"), source.shape
    if "format_version" in content:
        config, base, _ = read_config(folder)
        return ServedAdapter(source, NativeAdapter(config, base, {}))
    names: Collection[str] = shape.block.adaptable
    if isinstance(given := content.get("target_modules"), list):  # not a pattern
        modules = {str(name).rpartition(".")[2] for name in given}
        names = [name for name in names if modules & {*target_modules(shape.block, [name])}]
    method, rank = "vera" if content.get("peft_type") == "VERA" else "lora", read_rank(content.get("r"), f"{folder}: r")
    targets, layers = targets_of(shape, tuple(names)), tuple(range(1, shape.num_layers + 1))
    config = AdapterConfig(method, rank, rank, layers, targets, seed=0, init_std_a=0, init_std_b=0)
    return ServedAdapter(source, NativeAdapter(config, identify_shape(source, "fp32", weights_hash=""), {}))


def check_served(
    folder: Path, served: ServedAdapter | None, source: ModelSource, *, max_rank: int | None, only_tied: bool
) -> None:
    """Raise UserError if a server with this --max-lora-rank, or with only tied slots, cannot serve an adapter, which
    `read_served` returned."""
    served = served or read_unloaded(folder, source)
    if max_rank is not None and (rank := served.adapter.config.rank) > max_rank:
        said = f"{folder}: rank {rank} is greater than --max-lora-rank {max_rank}"
        raise UserError(f"{said}; increase it, or serve the merged model")
    if only_tied and served.why_not_tied:
        fix = 'start the server with --additional-config \'{"tied_lora": "both"}\''
        raise UserError(f"{folder}: {served.why_not_tied}; {fix}")
