"""From the plans of several adapters to one running engine: the stage with their bank, and each adapter's own step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.dropped_inputs import Dropout
from megatron_tiedlora.adapters.gathering import AdapterLayout
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, initial_values
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.engine.bank_runner import BankPipelineRunner, BankPlainRunner
from megatron_tiedlora.engine.bank_step import BankStep, OwnStep, trained_or_stand_in
from megatron_tiedlora.engine.engine import initialize_engine, stored_bytes
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.agreement import gather_numbers
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.training.adapter_plans import Plans, shared_plan
from megatron_tiedlora.training.build import (
    build_stage,
    checked_base,
    load_base,
    make_training,
    restore_training,
    start_values,
)
from megatron_tiedlora.training.optimizer import make_optimizer
from megatron_tiedlora.training.plan import RunPlan


@dataclass(frozen=True)
class BuiltBank:
    """This rank's part of a run of several adapters, ready for its next step.

    Attributes:
        stage_layers: layers by pipeline stage.
        bytes_read, bytes_kept: as of a `BuiltModel`.
        notes: on each adapter's start, by its name.
    """

    runner: BankPlainRunner | BankPipelineRunner
    step: BankStep
    base: BaseIdentity
    stage_layers: tuple[tuple[int, ...], ...]
    bytes_read: tuple[int, ...]
    bytes_kept: tuple[int, ...]
    notes: Mapping[str, tuple[str, ...]]

    def layout(self, plan: RunPlan) -> AdapterLayout:
        """Which rank holds which part of the adapter of one of the plans."""
        layers = (tuple(layer for layer in plan.adapter.layers if layer in stage) for stage in self.stage_layers)
        return AdapterLayout(plan.adapter, plan.grid, tuple(layers))


def build_bank(
    plans: Plans,
    device: torch.device,
    checkpoints: Mapping[str, Checkpoint | None] | None = None,
    *,
    kernels: Kernels = EAGER,
) -> BuiltBank:
    """Build this rank's stage with the parts of all adapters, load its shards of the base, and start the engine.

    Args:
        checkpoints: from which adapters go on, by name; others begin.

    Raises:
        UserError: weights are missing or do not fit, or an adapter is of another base.
    """
    shared, resumed = shared_plan(plans), checkpoints or {}
    layers = shared.stage.layers
    adapters, notes = {}, {}
    with BaseWeights(shared.source.weights_folder(), shared.source.shape, shared.source.stored) as weights:
        base = checked_base(shared, weights)
        for name, plan in plans.items():
            state, notes[name] = start_values(plan, base, resumed.get(name))
            own = tuple(layer for layer in plan.adapter.layers if layer in layers)
            part = AdapterPart(plan.adapter, own, shared.grid.tp_rank, shared.grid.tp_size)
            adapters[name] = TiedAdapter(part).to(device)
            adapters[name].load_full(initial_values(plan.adapter) if state is None else state)
        dropout = {
            name: Dropout(plan.settings.dropout, plan.settings.seed)
            for name, plan in plans.items()
            if plan.settings.dropout
        }
        bank = AdapterBank(adapters, dropout)
        module, stage, groups, process_grid = build_stage(shared, bank, device, kernels)
        load_base(shared, weights, stage, groups)
        read, kept = gather_numbers(weights.bytes_read), gather_numbers(stored_bytes(stage.layers))
    assert stage.anchor is not None
    config = _engine_config(shared)
    engine = initialize_engine(
        module,
        config,
        optimizer=make_optimizer([stage.anchor], learning_rate=0.0, weight_decay=0.0),
        scheduler=None,
        process_grid=process_grid,
    )
    kind = BankPlainRunner if groups.pipeline.size == 1 else BankPipelineRunner
    runner = kind(engine, stage, groups, config, device)
    steps = {name: _own_step(plan, adapters[name], resumed.get(name)) for name, plan in plans.items()}
    by_stage = tuple(tuple(stage.layers) for stage in shared.stages)
    step = BankStep(bank, groups, steps, device)
    return BuiltBank(runner, step, base, by_stage, tuple(read), tuple(kept), notes)


def _engine_config(plan: RunPlan) -> EngineConfig:
    """The engine's JSON: it neither divides a loss nor clips a gradient, as each adapter has numbers of its own."""
    ours = {
        "train_batch_size": plan.grid.dp_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
    }
    return replace(plan.engine, values={**plan.engine.values, **ours})


def _own_step(plan: RunPlan, adapter: TiedAdapter, checkpoint: Checkpoint | None) -> OwnStep:
    optimizer, scheduler = make_training(plan.settings, trained_or_stand_in(adapter))
    own = OwnStep(optimizer, scheduler, plan.settings.gradient_clipping)
    if checkpoint is not None:  # the optimizer is torch's own, as an engine's is under ZeRO-0
        restore_training(own, plan, adapter, scheduler, checkpoint, zero_stage=0)
    return own
