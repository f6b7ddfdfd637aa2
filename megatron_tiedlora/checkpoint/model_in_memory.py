"""A transformers model in memory as the base of adapters: its shape and its identity; and the update of one of its
linear modules, unexpanded: A and B stay one pair for all adapted layers.

    z = W x + B' A' x    with    A' = diag(u) A,    B' = the module's rows of (alpha / r) diag(v) B

A module of a fused target (q, k and v; gate and up) uses its own rows of B and v. A' and B' are computed anew in each
forward pass, in the adapter's dtype, and so is the update: the numbers are those of the exported PEFT LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, TiedAdapter
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_identity import (
    BaseIdentity,
    identify_base,
    identify_shape,
    weights_hash,
)
from megatron_tiedlora.checkpoint.base_weights import RUN_LENGTH, SAMPLED_RUNS
from megatron_tiedlora.checkpoint.merged_weights import merged_rows, row_blocks
from megatron_tiedlora.checkpoint.native_adapter import AdaptedTensor, changed_tensors
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import run_starts
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import stored_format
from megatron_tiedlora.model.weights import WeightRule, stored_shapes, weight_rules


def model_source(model: Any) -> ModelSource:
    """A transformers model as a base model.

    Raises:
        UserError: it is no causal language model of an implemented family.
    """
    if not hasattr(getattr(model, "config", None), "to_json_string"):
        raise UserError(f"{type(model).__name__} is not a model of transformers: it has no config")
    fields = json.loads(model.config.to_json_string())  # as save_pretrained writes them
    stored = None
    with suppress(UserError):  # a format that is not read here
        stored = stored_format(fields, source="its config")
    fields.pop("quantization_config", None)  # of the frozen weights alone; an adapter is the same on them
    name = model.config.name_or_path or type(model).__name__
    folder = Path(name) if Path(name).is_dir() else None
    return ModelSource(name, folder, shape_from_hf(fields, source=f"the config of {name}"), stored=stored)


def base_layer_of(module: Any) -> Any:
    """The module that adapters of PEFT wrap; the module itself if there are none."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


@dataclass(frozen=True)
class WeightsInMemory:
    """The weights of a transformers model, for `identify_base`."""

    model: Any
    source: ModelSource

    @property
    def folder(self) -> Path | None:
        """The folder that the model was loaded from, if it is one."""
        return self.source.folder

    @cached_property
    def rules(self) -> tuple[WeightRule, ...]:
        """The model's name table."""
        return weight_rules(self.source.shape)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of this name, also if accelerate has offloaded it. Raises UserError if the model has none."""
        module, tensor = self.held(name)
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if tensor.is_meta and offloaded is not None:
            tensor = offloaded[name.rpartition(".")[2]]
        return tensor.detach()

    def held(self, name: str) -> tuple[Any, torch.Tensor]:
        """The module that has the tensor of this name, and the tensor; on the meta device if it is offloaded."""
        path, _, kind = name.rpartition(".")
        try:
            module = base_layer_of(self.model.get_submodule(path))
            return module, getattr(module, kind)
        except AttributeError:
            raise UserError(f"{self.source.name}: the model has no {name}; give the whole causal model") from None

    def sample(self, name: str) -> torch.Tensor:
        """The values that `BaseWeights.sample` takes."""
        flat = self.read(name).flatten()
        starts, length = run_starts(flat.numel(), count=SAMPLED_RUNS, length=RUN_LENGTH)
        return torch.cat([flat[start : start + length] for start in starts]).cpu()


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.is_meta


def identify_in_memory(model: Any, source: ModelSource) -> BaseIdentity:
    """The identity of a model as it is in memory. If some weights are quantised or offloaded, their sample is unknown.

    Raises:
        UserError: it lacks a module, or its final norm is not whole.
    """
    weights, norm = WeightsInMemory(model, source), source.shape.final_norm
    values = weights.read(f"{norm.source}.weight")
    if values.shape != (norm.size,) or not _is_plain(values):
        raise UserError(f"{source.name}: the weights of the model are sharded or offloaded; load it whole")
    dtype = "fp32" if values.dtype == torch.float32 else "bf16"
    held = ((weights.held(name)[1], shape) for name, shape in stored_shapes(weights.rules).items())
    if all(tuple(tensor.shape) == shape and _is_plain(tensor) for tensor, shape in held):  # as they were stored
        return identify_base(source, weights, dtype)
    found = identify_shape(source, dtype, weights_hash=weights_hash(source, weights))
    return replace(found, base_format=source.stored_base)


def find_places(shape: ModelShape, config: AdapterConfig) -> Mapping[str, AdaptedTensor]:
    """The tensors that an adapter changes, by the names of their modules in the causal model."""
    return {name.removesuffix(".weight"): tensor for name, tensor in changed_tensors(config, shape).items()}


def with_update(z: torch.Tensor, x: torch.Tensor, adapter: TiedAdapter, place: AdaptedTensor) -> torch.Tensor:
    """z + B' A' x in z's dtype, from z = W x, (..., out), and x (..., in)."""
    a, b = (factor.to(x.device) for factor in place.factors(adapter.config, adapter.factors()))
    return (z + linear(linear(x.to(a.dtype), a), b)).to(z.dtype)


def check_whole(weight: torch.Tensor, place: AdaptedTensor) -> None:
    """Raise UserError if a weight that is to be changed in place is quantised, offloaded or sharded."""
    shape = stored_shapes([place.rule])[place.stored]
    if not _is_plain(weight) or tuple(weight.shape) != tuple(shape):
        raise UserError(f"{place.stored} is quantised, offloaded or sharded; merge with tiedlora merge")


@torch.no_grad()
def merge_(weight: torch.Tensor, adapter: TiedAdapter, place: AdaptedTensor, *, sign: int = 1) -> None:
    """W += sign B' A' in place, with the bits of a merged checkpoint.

    Raises:
        UserError: the weight is quantised, offloaded or sharded.
    """
    check_whole(weight, place)
    a, b = (factor.to(weight.device) for factor in place.factors(adapter.config, adapter.factors()))
    for rows in row_blocks(tuple(weight.shape)):
        weight[rows] = merged_rows(weight[rows], a, sign * b[rows])
