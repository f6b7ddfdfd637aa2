"""Load a base model with an adapter without an engine, whole or one rank's part, to check exports and to generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter
from megatron_tiedlora.base.errors import UserError, count_text
from megatron_tiedlora.checkpoint.base_weights import load_base_weights
from megatron_tiedlora.checkpoint.merged_weights import MergedWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.data.task import Task
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import stage_weight_rules
from megatron_tiedlora.parallel.agreement import num_differing
from megatron_tiedlora.parallel.fp8_products import weight_maker
from megatron_tiedlora.parallel.frozen_weight import WeightMaker, frozen_weights
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, TensorParallel, largest_of_all
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.runtime.launch_env import has_bf16_instructions


def resolve_dtype(given: str | None, task: Task, *, on_gpu: bool) -> str:
    """The value of --dtype, or its default for the task on this host: bf16 or fp32."""
    slow = task.fp32_on_slow_cpus and not on_gpu and not has_bf16_instructions()
    return given or ("fp32" if slow else "bf16")


def describe_dtype(given: str | None, resolved: str) -> str:
    """The precision for a log line, with the reason if fp32 is the default on this CPU."""
    by_default = given is None and resolved == "fp32"
    return f"{resolved} (this CPU has no bf16 instructions)" if by_default else resolved


def check_same_dtype(resolved: str) -> None:
    """Raise UserError on every rank if the default of --dtype differs between hosts."""
    if differing := num_differing(resolved):
        raise UserError(
            f"--dtype: the default of {count_text(differing, 'rank')} is not that of rank 0, because their CPUs differ;"
            " give --dtype fp32"
        )


def load_model(
    source: ModelSource,
    adapter: NativeAdapter | Mapping[str, NativeAdapter] | None,
    *,
    dtype: torch.dtype,
    base_format: str | None = None,
    device: torch.device | str = "cpu",
    grid: Grid | None = None,
    make_weight: WeightMaker | None = None,
    groups: ParallelGroups | None = None,
    stages: Sequence[range] | None = None,
    merged: bool = False,
    kernels: Kernels = EAGER,
    progress: bool = False,
) -> Stage:
    """This rank's part of the model in evaluation mode, base in `dtype` and adapter in fp32.

    It does not check whether the adapter belongs to the base; `convert.inputs.check_base` does.

    Args:
        adapter: one, or several by name; the stage then has a bank.
        base_format: the storage format of the blocks' linears; None for `dtype`.
        make_weight: makes the weights of the blocks' linears, in place of `base_format`.
        grid, groups, stages: the layout, its groups and the layers of each stage; without them, one process.
        merged: merge the adapter into the weights (added in fp32, cast once) instead of keeping it separate.
        kernels: of the layers, eager or compiled.
        progress: show a bar.

    Raises:
        UserError: weights are missing or do not fit.
    """
    grid, groups = grid or Grid(0, 1), groups or ParallelGroups()
    shape = source.shape
    into_weights = adapter if merged else None
    assert not isinstance(into_weights, Mapping), "only one adapter can be merged"
    assert into_weights is None or base_format is None, "a merged weight would be quantised again"
    with MergedWeights(source, into_weights) as weights:
        layers = range(shape.num_layers + 2) if stages is None else stages[grid.pp_rank]
        part: TiedAdapter | AdapterBank | None = None
        if isinstance(adapter, Mapping):
            part = AdapterBank({name: adapter_part(own, layers, grid, device) for name, own in adapter.items()})
        elif adapter is not None and not merged:
            part = adapter_part(adapter, layers, grid, device)
        make_weight = make_weight or weight_maker(base_format)
        specs = layer_specs(shape, dtype=dtype, tp_size=grid.tp_size, kernels=kernels, make_weight=make_weight)
        with torch.device(device):
            model = Stage(specs[layers.start : layers.stop], part, tensor_parallel=TensorParallel(groups.tensor, False))
        load_base_weights(
            weights,
            frozen_weights(model),
            stage_weight_rules(shape, has_embedding=model.embedding is not None),
            tp_rank=grid.tp_rank,
            tp_size=grid.tp_size,
            largest=partial(largest_of_all, group=groups.tensor),
            progress=progress,
        )
    return model.eval()


def adapter_part(adapter: NativeAdapter, layers: range, grid: Grid, device: torch.device | str) -> TiedAdapter:
    """This rank's part of an adapter, for a stage with these layers."""
    adapted = tuple(layer for layer in adapter.config.layers if layer in layers)
    part = TiedAdapter(AdapterPart(adapter.config, adapted, grid.tp_rank, grid.tp_size)).to(device)
    part.load_full(adapter.state)
    return part
