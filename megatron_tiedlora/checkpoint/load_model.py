"""A base model with an adapter, without an engine: for checks of exports and for decoding, whole or one rank's part."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_tiedlora.adapters.tied_adapter import TARGET, AdapterPart, TiedAdapter, delta_weight
from megatron_tiedlora.checkpoint.base_identity import identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import stage_weight_rules, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, frozen_weights
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.parallel.groups import ParallelGroups, TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.partition import Stages

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(
    source: ModelSource,
    adapter: NativeAdapter | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    grid: Grid | None = None,
    groups: ParallelGroups | None = None,
    stages: Stages | None = None,
    merged: bool = False,
    checks_base: bool = True,
    kernels: Kernels = EAGER,
    progress: bool = False,
) -> Stage:
    """This rank's part of the model in evaluation mode, base in `dtype` and adapter in fp32.

    Args:
        grid, groups, stages: the layout, its groups and the layers of each stage; without them, one process.
        merged: fold the adapter into the weights (added in fp32, cast once) instead of keeping it beside them.
        checks_base: False where the caller has compared the base with the adapter's.
        kernels: of the layers, as they stand or compiled.
        progress: show a bar.

    Raises:
        UserError: weights that are missing or do not fit, or an adapter of another base.
    """
    grid, groups = grid or Grid(0, 1), groups or ParallelGroups()
    shape = source.shape
    with BaseWeights(source.weights_folder(), weight_rules(shape)) as weights:
        if adapter is not None and checks_base:
            found = identify_base(source, weights, adapter.base.dtype)
            adapter.check_base(replace(found, tokenizer_hash=None), source="adapter")
        layers = range(shape.num_layers + 2) if stages is None else stages[grid.pp_rank]
        bank = None
        if adapter is not None and not merged:
            adapted = tuple(layer for layer in adapter.config.layers if layer in layers)
            bank = TiedAdapter(AdapterPart(adapter.config, adapted, grid.tp_rank, grid.tp_size)).to(device)
            bank.load_full(adapter.state)
        specs = layer_specs(shape, dtype=dtype, tp_size=grid.tp_size, kernels=kernels)
        with torch.device(device):
            model = Stage(
                specs[layers.start : layers.stop], bank, tensor_parallel=TensorParallel(groups.tensor, False)
            )
        load_base_weights(
            weights,
            frozen_weights(model),
            stage_weight_rules(shape, has_embedding=model.embedding is not None),
            tp_rank=grid.tp_rank,
            tp_size=grid.tp_size,
            progress=progress,
        )
        if adapter is not None and merged:
            _merge(model, adapter, weights, grid)
    return model.eval()


@torch.no_grad()
def _merge(model: Stage, adapter: NativeAdapter, weights: BaseWeights, grid: Grid) -> None:
    """W' = W + (alpha / r) diag(v) B diag(u) A in every adapted layer of the stage, from W as it is stored."""
    targets = frozen_weights(model)
    for rule in weights.rules:
        if rule.linear != TARGET or rule.layer not in adapter.config.layers or rule.name not in targets:
            continue
        target = targets[rule.name]
        wide = target.empty_values().float()
        weights.fill(rule, FrozenWeight(wide), tp_rank=grid.tp_rank, tp_size=grid.tp_size)
        delta = delta_weight(adapter.config, adapter.state, rule.layer)
        wide += rule.spec.split(delta, grid.tp_rank, grid.tp_size).to(wide.device)
        target.load(wide)
