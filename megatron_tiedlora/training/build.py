"""From a plan to a running engine: process groups, this rank's stage, its base weights, adapter and optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.gathering import MOMENTS
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, TiedAdapter, initial_values
from megatron_tiedlora.adapters.tying import sum_of_u
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.base_identity import (
    BaseIdentity,
    check_same_base,
    identify_base,
    identify_shape,
    linears_dtype,
    quantised_otherwise,
)
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, draw_base_weights, load_base_weights
from megatron_tiedlora.checkpoint.load_model import check_same_dtype
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE
from megatron_tiedlora.checkpoint.resume import Checkpoint, moment_name
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.engine.engine import (
    base_construction,
    initialize_engine,
    mark_parameters,
    parameter_access,
    stored_bytes,
    trained_parameters,
)
from megatron_tiedlora.engine.optimizer_state import write_moments
from megatron_tiedlora.engine.runner import Runner, make_runner
from megatron_tiedlora.engine.topology import make_groups, make_process_grid
from megatron_tiedlora.model.layer_specs import LayerSpec, layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import stage_weight_rules
from megatron_tiedlora.parallel.agreement import gather_numbers, num_differing
from megatron_tiedlora.parallel.collectives import largest_of_all
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.groups import ParallelGroups, TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.training.init_from import load_start
from megatron_tiedlora.training.optimizer import make_optimizer, make_scheduler, resume_scheduler
from megatron_tiedlora.training.plan import RunPlan


@dataclass(frozen=True)
class BuiltModel:
    """This rank's model with the values of base and adapter, and the base's identity.

    Attributes:
        module: what DeepSpeed gets: the stage itself, or the PipelineModule around it.
        process_grid: DeepSpeed's grid of process groups.
        bytes_read, bytes_kept: bytes of base weights that were read and that are stored, by rank.
        notes: what a user should know of the adapter that it starts with, and how the base differs from that one's.
    """

    module: nn.Module
    stage: Stage
    groups: ParallelGroups
    process_grid: Any
    base_identity: BaseIdentity
    bytes_read: tuple[int, ...]
    bytes_kept: tuple[int, ...]
    notes: tuple[str, ...] = ()


def build_model(
    plan: RunPlan, device: torch.device, checkpoint: Checkpoint | None, *, kernels: Kernels = EAGER
) -> BuiltModel:
    """Build this rank's part of the flat list on `device`, load its shards of the base and its part of the adapter.

    Raises:
        UserError: weights are missing or do not fit, or the checkpoint or --init_from's adapter is of another base.
    """
    with BaseWeights(plan.source.weights_folder(), plan.source.shape, plan.source.stored) as weights:
        base = checked_base(plan, weights)
        state, notes = start_values(plan, base, checkpoint)
        module, stage, groups, process_grid = _build_stage(plan, device, kernels)
        _fill_adapter(plan, stage, groups, state)
        load_stage_weights(plan, weights, stage, groups)
        read, kept = gather_numbers(weights.bytes_read), gather_numbers(stored_bytes(stage.layers))
    return BuiltModel(module, stage, groups, process_grid, base, tuple(read), tuple(kept), notes)


def checked_base(plan: RunPlan, weights: BaseWeights) -> BaseIdentity:
    """What the base is. All ranks call it; raises UserError on every rank if theirs differ."""
    base = _identify(plan, weights)
    _check_same_base(base)
    check_same_dtype(plan.dtype_name)
    return base


def start_values(
    plan: RunPlan, base: BaseIdentity, checkpoint: Checkpoint | None
) -> tuple[Mapping[str, torch.Tensor] | None, tuple[str, ...]]:
    """(the adapter's full tensors, notes): of the checkpoint or --init_from; None for the initial values.

    Raises:
        UserError: the adapter there is of another base.
    """
    if checkpoint is None:
        return load_start(plan.settings, plan.source, plan.adapter, base)
    return checkpoint.adapter.state, _check_resumed(plan, base, checkpoint)


def load_stage_weights(plan: RunPlan, weights: BaseWeights, stage: Stage, groups: ParallelGroups) -> None:
    """Read this rank's slices of the base into its stage. All ranks call it."""
    grid = plan.grid
    load_base_weights(
        weights,
        frozen_weights(stage),
        stage_weight_rules(plan.source.shape, has_embedding=stage.embedding is not None),
        access=parameter_access(plan.engine),
        tp_rank=grid.tp_rank,
        tp_size=grid.tp_size,
        largest=partial(largest_of_all, group=groups.tensor),
        reads=plan.engine.zero_stage < 3 or grid.dp_rank == 0,
        progress=grid.rank == 0,
    )


def build_random_model(plan: RunPlan, device: torch.device, *, kernels: Kernels = EAGER) -> BuiltModel:
    """The same with random base weights of the model's shape, drawn in place, for benchmarks. Reads no files."""
    module, stage, groups, process_grid = _build_stage(plan, device, kernels)
    _fill_adapter(plan, stage, groups, None)
    draw_base_weights(
        frozen_weights(stage),
        stage_weight_rules(plan.source.shape, has_embedding=stage.embedding is not None),
        access=parameter_access(plan.engine),
        tp_rank=plan.grid.tp_rank,
        seed=plan.settings.seed,
        progress=plan.grid.rank == 0,
    )
    base = identify_shape(plan.source, plan.dtype_name, weights_hash="random")
    none = (0,) * plan.grid.world_size
    return BuiltModel(module, stage, groups, process_grid, base, none, none)


def _fill_adapter(
    plan: RunPlan, stage: Stage, groups: ParallelGroups, state: Mapping[str, torch.Tensor] | None
) -> None:
    """Mark the adapter's parameters for DeepSpeed, set up u's sum, and load `state` or the initial values."""
    adapter = stage.adapter
    assert adapter is not None
    mark_parameters(adapter, groups)
    adapter.u_sum = sum_of_u(groups)
    adapter.load_full(initial_values(plan.adapter) if state is None else state)


def _build_stage(plan: RunPlan, device: torch.device, kernels: Kernels) -> tuple[nn.Module, Stage, ParallelGroups, Any]:
    """(the module for DeepSpeed, the stage, its groups, DeepSpeed's grid)."""
    adapter = TiedAdapter(plan.part).to(device)  # outside DeepSpeed's construction, which would partition or mark it
    return build_stage(plan, adapter, device, kernels)


def build_stage(
    plan: RunPlan, adapter: TiedAdapter | AdapterBank, device: torch.device, kernels: Kernels
) -> tuple[nn.Module, Stage, ParallelGroups, Any]:
    """The same around an adapter or a bank, which is on `device` already."""
    grid = plan.grid
    specs = layer_specs(
        plan.source.shape,
        dtype=plan.dtype,
        tp_size=grid.tp_size,
        kernels=kernels,
        recomputes_gate=plan.settings.recompute == "selective",
        deterministic=plan.settings.deterministic,
        make_weight=plan.weight_maker(device),
    )

    def stage_of(groups: ParallelGroups, specs: Sequence[LayerSpec]) -> Stage:
        tensor_parallel = TensorParallel(groups.tensor, plan.layout.sequence_parallel)
        return Stage(
            specs,
            adapter,
            tensor_parallel=tensor_parallel,
            recompute=plan.settings.recompute,
            dropout=plan.settings.dropout,
            seed=plan.settings.seed,
        )

    if grid.pp_size == 1:
        process_grid = make_process_grid(grid)
        groups = make_groups(grid, process_grid)
        with base_construction(plan.engine, dtype=plan.dtype, device=device, process_grid=process_grid):
            stage = stage_of(groups, specs)
        return stage, stage, groups, process_grid

    from megatron_tiedlora.engine.pipelined import PipelinedModel

    with device:
        module = PipelinedModel(specs, [stage.layers for stage in plan.stages], grid=grid, build_stage=stage_of)
    return module, module.stage, module.groups, module.mpu()


def start_engine(plan: RunPlan, built: BuiltModel, device: torch.device, checkpoint: Checkpoint | None) -> Runner:
    """The DeepSpeed engine around the model, with optimizer and schedule in the state of the checkpoint."""
    adapter = built.stage.adapter
    assert adapter is not None
    trained = [parameter for parameter in built.stage.parameters() if parameter.requires_grad]  # the anchor too
    optimizer, scheduler = make_training(plan.settings, trained)
    engine = initialize_engine(
        built.module, plan.engine, optimizer=optimizer, scheduler=scheduler, process_grid=built.process_grid
    )
    if checkpoint is not None:
        restore_training(engine, plan, adapter, scheduler, checkpoint, zero_stage=plan.engine.zero_stage)
    return make_runner(engine, built.stage, built.groups, plan.engine, device)


def make_training(settings: Settings, trained: Iterable[nn.Parameter]) -> tuple[AdamW, LambdaLR]:
    """The optimizer of these parameters, and its schedule, set to step 0."""
    optimizer = make_optimizer(
        trained,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
    )
    steps = {"warmup_steps": settings.warmup_steps, "max_steps": settings.max_steps}
    return optimizer, make_scheduler(optimizer, **steps, schedule=settings.schedule)


def restore_training(
    engine: Any, plan: RunPlan, adapter: TiedAdapter, scheduler: LambdaLR, checkpoint: Checkpoint, *, zero_stage: int
) -> None:
    """Bring the optimizer of an adapter, which `engine` holds, and its schedule into the state of its checkpoint."""
    trained, step = trained_parameters(adapter), checkpoint.progress.step
    moments = {
        moment: {name: adapter.part.shard(name, checkpoint.moments[moment_name(moment, name)]) for name in trained}
        for moment in MOMENTS
    }
    write_moments(engine, trained, zero_stage, moments=moments, step=step, dp_rank=plan.grid.dp_rank)
    resume_scheduler(scheduler, step)


def _identify(plan: RunPlan, weights: BaseWeights) -> BaseIdentity:
    found = identify_base(plan.source, weights, plan.dtype_name, tokenizer=plan.settings.tokenizer)
    if plan.settings.base is None or plan.source.stored is not None:
        return replace(found, base_format=plan.settings.base)
    return replace(found, base_format=plan.settings.base, base_stored=linears_dtype(weights, plan.source.shape))


def check_resumed_base(plan: RunPlan, checkpoint: Checkpoint) -> None:
    """Raise UserError if a checkpoint is of another base or adapter than the plan's. Reads samples of the base."""
    with BaseWeights(plan.source.weights_folder(), plan.source.shape, plan.source.stored) as weights:
        base = _identify(plan, weights)
    _check_resumed(plan, base, checkpoint)


def _check_resumed(plan: RunPlan, base: BaseIdentity, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Notes on the base. Raises UserError as `check_resumed_base` does."""
    _check_same_adapter(plan.adapter, checkpoint)
    differs, trained = plan.settings.base_differs, checkpoint.adapter.base
    notes = check_same_base(trained, base, source=str(checkpoint.folder), differs=differs)
    if (otherwise := quantised_otherwise(trained, base)) and not differs:
        raise UserError(
            f"{checkpoint.folder}: {otherwise}; give the model in {trained.base_stored} with --model, or --base_differs"
            " to use this one anyway"
        )
    return notes


def _check_same_base(base: BaseIdentity) -> None:
    """Raise UserError, on every rank, if a host's copy of the model or tokenizer differs from rank 0's."""
    hashes = f"{base.base_hash} {base.base_weights_hash} {base.base_sample} {base.base_stored} {base.tokenizer_hash}"
    if differing := num_differing(hashes):
        raise UserError(
            f"{count_text(differing, 'rank')} read another base model or tokenizer than rank 0."
            " Give every host the same files"
        )


def _check_same_adapter(adapter: AdapterConfig, checkpoint: Checkpoint) -> None:
    """Compare the checkpoint's adapter with the plan's. (Its settings were compared when it was found.)"""
    stored = checkpoint.adapter.config.facts
    for name, expected in adapter.facts.items():
        found = stored[name]
        if found != expected:
            raise UserError(
                f"{checkpoint.folder / CONFIG_FILE}: {name} is {found}, but the checkpoint's settings say {expected}."
                " Resume from another checkpoint"
            )
