"""Build the engine of a run, with process groups, this rank's pipeline stage, its weights, adapters and optimizers."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, Dropout
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterShard, TiedAdapter
from megatron_tiedlora.adapters.tying import MOMENTS, sum_of_u
from megatron_tiedlora.base.messages import UserError, count_text
from megatron_tiedlora.checkpoint import base_identity as identity
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, RandomWeights, load_base_weights
from megatron_tiedlora.checkpoint.load_model import check_same_dtype
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, tensor_file_sha256
from megatron_tiedlora.checkpoint.resume import Checkpoint, moment_name
from megatron_tiedlora.config.fields import parse_rate_factors
from megatron_tiedlora.config.settings import Schedule, Settings
from megatron_tiedlora.engine import engine as deepspeed_engine
from megatron_tiedlora.engine.optimizers import EngineOptimizer, Optimizers, OwnOptimizer
from megatron_tiedlora.engine.runner import PipelineRunner, Runner
from megatron_tiedlora.model.layer_specs import LayerSpec, layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import stage_weight_rules, weight_rules
from megatron_tiedlora.parallel.agreement import gather_numbers, num_differing
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.groups import ParallelGroups, TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.adapter_plans import Plans, shared_plan
from megatron_tiedlora.planning.run_plan import RunPlan, load_start


def steps_by_engine(plans: Plans) -> bool:
    """Return whether DeepSpeed's ZeRO optimizer updates the adapter. This requires a single adapter."""
    return set(plans) == {ONLY} and plans[ONLY].layout.engine_steps


@dataclass(frozen=True)
class BuiltModel:
    """This rank's pipeline stage with its weights and adapters, and an engine that is ready for the next step.

    Attributes:
        base_identity: the hashes that identify the base.
        bytes_read, bytes_kept: the bytes of base weights that each rank read, and the bytes that each rank stores.
        notes: notes for the user about each adapter: the initial values, and how the base differs from the recorded
            base.
        starts: on rank 0 the hash of the tensor file of --init_from, by the name of an adapter that starts with it.
    """

    runner: Runner
    base_identity: identity.BaseIdentity
    bytes_read: tuple[int, ...]
    bytes_kept: tuple[int, ...]
    notes: Mapping[str, tuple[str, ...]]
    starts: Mapping[str, str] = field(default_factory=dict)


def build_model(
    plans: Plans,
    device: torch.device,
    checkpoints: Mapping[str, Checkpoint | None] | None = None,
    *,
    kernels: Kernels = EAGER,
    empty: bool = False,
) -> BuiltModel:
    """Build this rank's pipeline stage with all adapters, load the base weights, and start and return the engine.

    Args:
        checkpoints: the checkpoint from which each adapter resumes, by adapter name. An adapter without a checkpoint
            starts at step 0.
        empty: whether the stage starts without adapters. Those of `make_adapter` can be added to the runner later.

    Raises:
        UserError: weights are missing or have wrong shapes, or a checkpoint or the adapter of --init_from was trained
            on a different base.
    """
    resumed = checkpoints or {}
    with checked_starts(plans, resumed) as (weights, base, states, notes):
        own = {n: s for n, s in states.items() if s is not None and resumed.get(n) is None and plans[n].grid.rank == 0}
        starts = {name: tensor_file_sha256(plans[name].adapter, state) for name, state in own.items()}
        stage, *_ = model = _build_stage(plans, device, kernels, {} if empty else states, weights)
        frozen = [parameter for parameter in stage.layers.parameters() if not parameter.requires_grad]
        stored = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in frozen)  # ZeRO-3's partitions
        read, kept = gather_numbers(weights.bytes_read), gather_numbers(stored)
    runner = _start_engine(plans, model, device, resumed)
    return BuiltModel(runner, base, tuple(read), tuple(kept), notes, starts)


States = dict[str, Mapping[str, torch.Tensor] | None]  # each adapter's full tensors by name; None: initial values


@contextmanager
def checked_starts(
    plans: Plans, checkpoints: Mapping[str, Checkpoint | None]
) -> Iterator[tuple[BaseWeights, identity.BaseIdentity, States, dict[str, tuple[str, ...]]]]:
    """Yield the opened base weights, the identity of the base, the initial tensors of each adapter, and notes.

    All ranks must call this function. It raises UserError in the same cases as `build_model`, and if the bases of the
    ranks differ.
    """
    shared, states, notes = shared_plan(plans), States(), dict[str, tuple[str, ...]]()
    with BaseWeights(shared.source.weights_folder(), shared.source.shape, shared.source.stored) as weights:
        base = _identify(shared, weights)
        own = (base.base_hash, base.base_weights_hash, base.base_sample, base.base_stored, base.tokenizer_hash)
        if differing := num_differing(" ".join(map(str, own))):
            raise UserError(
                f"{count_text(differing, 'rank')} read a base model or tokenizer that differs from rank 0's."
                " Give every host the same files"
            )
        check_same_dtype(shared.dtype_name)
        for name, plan in plans.items():
            if (checkpoint := checkpoints.get(name)) is None:
                states[name], notes[name] = load_start(plan.settings, plan.source, plan.adapter, base)
            else:
                states[name], notes[name] = checkpoint.adapter.state, _check_resumed(plan, base, checkpoint)
        yield weights, base, states, notes


def build_random_model(plans: Plans, device: torch.device, *, kernels: Kernels = EAGER) -> BuiltModel:
    """Build a model with random base weights for benchmarks, without reading files. Return it as `build_model` does."""
    shared = shared_plan(plans)
    weights = RandomWeights(weight_rules(shared.source.shape), shared.settings.seed)
    model = _build_stage(plans, device, kernels, dict.fromkeys(plans), weights)
    base = identity.identify_shape(shared.source, shared.dtype_name, weights_hash="random")
    none = (0,) * shared.grid.world_size
    runner = _start_engine(plans, model, device, {})
    return BuiltModel(runner, base, none, none, dict.fromkeys(plans, ()))


# The stage, its process groups, and a function that initialises DeepSpeed's engine for the stage.
_Model = tuple[Stage, ParallelGroups, Callable[..., Any]]


def _build_stage(
    plans: Plans, device: torch.device, kernels: Kernels, states: States, weights: BaseWeights | RandomWeights
) -> _Model:
    """Return the stage with the adapters that are in `states`, and this rank's slices of `weights`. Adapters whose
    state is None get initial values. All ranks must call this function."""
    plan = shared_plan(plans)
    grid, engine_steps = plan.grid, steps_by_engine(plans)
    # Adapters are created outside DeepSpeed's construction context, which would partition or mark them.
    adapters = {name: make_adapter(plan, plans[name].adapter, state, device) for name, state in states.items()}
    rates = {name: own.settings for name, own in plans.items() if own.settings.dropout}
    adapter_group = AdapterGroup(adapters, {name: Dropout(own.dropout, own.seed) for name, own in rates.items()})
    specs = layer_specs(
        plan.source.shape,
        dtype=plan.dtype,
        tp_size=grid.tp_size,
        kernels=kernels,
        deterministic=plan.settings.deterministic,
        make_weight=plan.weight_maker(device, kernels),
    )

    def stage_of(groups: ParallelGroups, specs: Sequence[LayerSpec]) -> Stage:
        tensor_parallel = TensorParallel(groups.tensor, plan.layout.sequence_parallel, plan.layout.overlap)
        recompute = plan.settings.recompute
        return Stage(
            specs, adapter_group, tensor_parallel=tensor_parallel, recompute=recompute, is_engines=engine_steps
        )

    if grid.pp_size == 1:
        process_grid = deepspeed_engine.make_process_grid(grid)
        groups = deepspeed_engine.make_groups(grid, process_grid)
        on: dict[str, Any] = {"dtype": plan.dtype, "device": device, "process_grid": process_grid}
        with deepspeed_engine.base_construction(plan.engine, **on):
            stage = stage_of(groups, specs)
        module: Any = stage
    else:
        from megatron_tiedlora.engine.pipelined import PipelinedModel

        with device:
            module = PipelinedModel(specs, [stage.layers for stage in plan.stages], grid=grid, build_stage=stage_of)
        stage, groups, process_grid = module.stage, module.groups, module.mpu()
    for adapter in adapters.values():
        if engine_steps:
            deepspeed_engine.mark_parameters(adapter, groups)
            adapter.u_sum = sum_of_u(groups) if grid.tp_size > 1 else None
    load_base_weights(
        weights,
        frozen_weights(stage),
        stage_weight_rules(plan.source.shape, has_embedding=stage.embedding is not None),
        access=deepspeed_engine.parameter_access(plan.engine),
        group=groups.tensor,
        reads=grid.dp_rank == 0,  # the engine broadcasts all parameters from this rank to its replicas
        progress=grid.rank == 0,
    )
    return stage, groups, partial(deepspeed_engine.initialize_engine, module, process_grid=process_grid)


def _start_engine(
    plans: Plans, model: _Model, device: torch.device, checkpoints: Mapping[str, Checkpoint | None]
) -> Runner:
    """Start the engine, restore the optimizers and schedules from the checkpoints, and return the runner."""
    stage, groups, start = model
    plan, adapter_group = shared_plan(plans), stage.adapter_group
    assert adapter_group is not None
    optimizers: Optimizers
    if steps_by_engine(plans):
        trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]  # includes the anchor
        optimizer, schedule = make_training(plan.settings, trained, *adapter_group.adapters.values())
        engine = start(plan.engine, optimizer=optimizer, scheduler=schedule)
        optimizers = EngineOptimizer(engine, adapter_group, groups, plan.engine)
    else:
        assert stage.anchor is not None
        of_nothing = AdamW([stage.anchor], lr=0.0, weight_decay=0.0)  # an engine requires an optimizer
        # The engine neither divides losses nor clips gradients, because each adapter has its own divisor and clipping.
        ours = {
            "train_batch_size": plan.grid.dp_size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
        }
        config = replace(plan.engine, values={**plan.engine.values, **ours})
        engine = start(config, optimizer=of_nothing, scheduler=None)
        own = {name: own_optimizer(plans[name].settings, one) for name, one in adapter_group.adapters.items()}
        optimizers = Optimizers(adapter_group, groups, own, device)
    for name, checkpoint in checkpoints.items():
        if checkpoint is not None and name in plans:
            restore_moments(optimizers, name, checkpoint)
            resume_scheduler(optimizers.own[name].scheduler, checkpoint.progress.step)
    kind = Runner if plan.grid.pp_size == 1 else PipelineRunner
    return kind(engine, stage, groups, optimizers, device)


def make_adapter(
    plan: RunPlan, config: AdapterConfig, state: Mapping[str, torch.Tensor] | None, device: torch.device
) -> TiedAdapter:
    """Return this rank's shard of an adapter, with the stages of `plan`. Without full tensors in `state` it gets its
    initial values."""
    part = AdapterShard.of_stage(config, plan.stage.layers, plan.grid.tp_rank, plan.grid.tp_size)
    return TiedAdapter(part).to(device).load_full(state)


def own_optimizer(settings: Settings, adapter: TiedAdapter) -> OwnOptimizer:
    """Return the optimizer of an adapter's tensors on this rank, its schedule at step 0 and its clipping."""
    trained = list(deepspeed_engine.trained_parameters(adapter).values())
    trained = trained or [nn.Parameter(torch.zeros(1))]  # AdamW requires a tensor
    return OwnOptimizer(*make_training(settings, trained, adapter), settings.gradient_clipping)


def restore_moments(optimizers: Optimizers, name: str, checkpoint: Checkpoint) -> None:
    """Set the optimizer of an adapter that has taken no step to the state in its checkpoint."""
    adapter = optimizers.adapter_group.adapters[name]
    moments = {
        moment: {
            tensor: adapter.part.shard(tensor, checkpoint.moments[moment_name(moment, tensor)])
            for tensor in deepspeed_engine.trained_parameters(adapter)
        }
        for moment in MOMENTS
    }
    optimizers.restore(name, moments, step=checkpoint.progress.step)


def make_training(settings: Settings, trained: Iterable[nn.Parameter], adapter: TiedAdapter) -> tuple[AdamW, LambdaLR]:
    """Return AdamW for the parameters `trained`, and its schedule at step 0. `resume_scheduler` sets a later step.

    Each multiple of the rate in --rate_factors (LoRA+, arXiv 2402.12354) has its own parameter group, which holds the
    multiple as `factor`. All trained tensors have weight decay, as in the paper.
    """
    factors, groups = parse_rate_factors(settings.rate_factors), dict[float, list[nn.Parameter]]()
    letters = {id(parameter): adapter.part.config.tensors[name][1] for name, parameter in adapter.named_parameters()}
    for parameter in trained:
        groups.setdefault(factors.get(letters.get(id(parameter), ""), 1.0), []).append(parameter)
    rate = float(settings.learning_rate)
    parts = [{"params": own, "lr": rate * factor, "factor": factor} for factor, own in groups.items()]
    optimizer = AdamW(parts, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay)
    return optimizer, LambdaLR(optimizer, partial(learning_rate_factor, settings))


def _identify(plan: RunPlan, weights: BaseWeights) -> identity.BaseIdentity:
    found = identity.identify_base(plan.source, weights, plan.dtype_name, tokenizer=plan.settings.tokenizer)
    found = replace(found, base_format=plan.settings.base)
    if plan.settings.base is None or plan.source.stored is not None:
        return found
    return replace(found, base_stored=identity.linears_dtype(weights, plan.source.shape))


def check_resumed_base(plan: RunPlan, checkpoint: Checkpoint) -> None:
    """Raise UserError if the checkpoint's base or adapter differs from the plan. Reads samples of the base weights."""
    with BaseWeights(plan.source.weights_folder(), plan.source.shape, plan.source.stored) as weights:
        base = _identify(plan, weights)
    _check_resumed(plan, base, checkpoint)


def _check_resumed(plan: RunPlan, base: identity.BaseIdentity, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return notes about the base of a resumed run. Raise UserError in the same cases as `check_resumed_base`."""
    stored = checkpoint.adapter.config.facts
    for name, expected in plan.adapter.facts.items():  # the settings were compared when the checkpoint was found
        if stored[name] != expected:
            raise UserError(
                f"{checkpoint.folder / CONFIG_FILE}: {name} is {stored[name]}, but the checkpoint's settings have"
                f" {expected}. Resume from a different checkpoint"
            )
    differs, trained = plan.settings.base_differs, checkpoint.adapter.base_identity
    notes = identity.check_same_base(trained, base, source=str(checkpoint.folder), differs=differs)
    if (otherwise := identity.quantised_otherwise(trained, base)) and not differs:
        raise UserError(
            f"{checkpoint.folder}: {otherwise}; give the model in {trained.base_stored} with --model, or give"
            " --base_differs to use this model anyway"
        )
    return notes


# The optimizer --------------------------------------------------------------------------------------------------------


# Functions of (done, span) that return the fraction of the peak rate if `done` of `span` steps after warm-up are done.
SCHEDULES: Mapping[Schedule, Callable[[int, int], float]] = {
    "cosine": lambda done, span: 0.5 * (1.0 + math.cos(math.pi * min(done, span) / span)),
    "linear": lambda done, span: max(0.0, (span - done) / span),
    "constant": lambda done, span: 1.0,
}
assert SCHEDULES.keys() == set(get_args(Schedule)), "--schedule offers the names of this table"


def learning_rate_factor(settings: Settings, step: int) -> float:
    """Return the learning rate at `step` (0-based) as a fraction of the peak learning rate.

    During warm-up the fraction is (step + 1) / warmup_steps. After warm-up the fraction follows --schedule: it is 1 at
    the first step and 0 at --max_steps. For the constant schedule it stays 1.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[settings.schedule](step - warmup, max(settings.max_steps - warmup, 1))


def resume_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Set the schedule and the learning rate of the optimizer to the next step, `step`.

    The learning rate depends only on the step, so the rate is computed and not read from the checkpoint.
    """
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
