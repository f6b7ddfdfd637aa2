"""The model as a DeepSpeed engine: built in place under ZeRO-3, marked for its norm, initialised with our optimizer.

The engine's JSON has no precision section, so DeepSpeed treats the model as fp32: the frozen base keeps its own dtype,
and the adapter's gradients, their sums and the optimizer stay fp32 at every ZeRO stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import gradient_norm_counts
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.groups import ParallelGroups


@contextmanager
def base_construction(
    config: EngineConfig, *, dtype: torch.dtype, device: torch.device, process_grid: Any
) -> Iterator[None]:
    """Build the frozen base inside: its weights come up empty on `device`.

    Under ZeRO-3 they are partitioned at once, over the data-parallel ranks of DeepSpeed's grid.
    """
    if config.zero_stage < 3:
        with device:
            yield
        return
    import deepspeed

    # Without a precision section zero.Init makes fp32 weights, so bf16 is said. fp32 must be left unsaid: where fp16 is
    # not supported (CPUs), zero.Init takes any dtype that it is given for bf16 (seen in 0.19.8).
    with deepspeed.zero.Init(
        config_dict_or_path=dict(config.values),
        dtype=None if dtype == torch.float32 else dtype,
        mpu=process_grid,
        data_parallel_group=process_grid.get_data_parallel_group(),
    ):
        yield


def parameter_access(config: EngineConfig) -> Callable[[list[nn.Parameter]], AbstractContextManager[Any]]:
    """How to open parameters for writing: whole and shared by its data-parallel ranks under ZeRO-3, else as it is.

    Under ZeRO-3 these ranks must open the same parameters in the same order; what the first of them writes is kept.
    """
    if config.zero_stage < 3:
        return nullcontext
    import deepspeed

    def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)
        return context

    return gathered


@contextmanager
def all_open(module: nn.Module, config: EngineConfig) -> Iterator[None]:
    """Every parameter of `module` unpartitioned inside the block, for reading or for writing; all ranks enter it."""
    with parameter_access(config)(list(module.parameters())):
        yield


def mark_parameters(bank: TiedAdapter, groups: ParallelGroups) -> None:
    """Tell DeepSpeed's norm which parameters have copies (on later stages) and which are parts of a cut tensor.

    It then counts tied and replicated tensors once and each shard once. Constructing a PipelineModule resets the marks,
    so they are set after it; they are read off the declarations that cut the tensors.
    """
    config = bank.part.config
    for name, parameter in bank.named_parameters():
        parameter.ds_pipe_replicated = config.row.factor(name).tied and groups.pipeline.rank > 0  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = config.spec(name).dim is not None  # type: ignore[attr-defined]


def initialize_engine(
    model: nn.Module,
    config: EngineConfig,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    process_grid: Any,
) -> Any:
    """`deepspeed.initialize` with a client optimizer and schedule; the trained parameters are the optimizer's.

    At ZeRO-0 DeepSpeed's clipping is switched off and `clip_gradients_` takes its place: with several stages it would
    leave the later stages' own tensors out of the norm (seen in 0.19.8).
    """
    import deepspeed
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed_groups.mpu = None  # an earlier pipeline engine of the same process leaves its own here
    values = dict(config.values)
    if config.zero_stage == 0:
        values["gradient_clipping"] = 0.0
    pipelined = isinstance(model, PipelineModule)
    if pipelined:
        # Partitioned activations are wrong with sequence parallelism, without a word (seen in 0.19.8).
        values["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        config=values,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        mpu=None if pipelined else process_grid,  # a PipelineModule brings its own
    )
    return engine


def trained_parameters(bank: TiedAdapter) -> dict[str, nn.Parameter]:
    """The parameters with a gradient, by factor."""
    return {name: parameter for name, parameter in bank.named_parameters() if parameter.requires_grad}


def clip_gradients_(bank: TiedAdapter, groups: ParallelGroups, max_norm: float, device: torch.device) -> float:
    """Scale the gradients so that their norm over the whole model is at most `max_norm` (0: leave them).

    Returns:
        the 2-norm before, the same on every rank: each tied or replicated tensor counted once and each shard once.
    """
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for name in gradient_norm_counts(bank, groups):
        gradient = getattr(bank, name).grad
        if gradient is not None:
            squares += torch.linalg.vector_norm(gradient.detach().float()).double().square()
    if groups.model.size > 1:
        torch.distributed.all_reduce(squares, group=groups.model.handle)
    norm = float(squares.sqrt())
    if max_norm and norm > max_norm:
        for parameter in trained_parameters(bank).values():
            if parameter.grad is not None:
                parameter.grad.mul_(max_norm / (norm + 1e-6))
    return norm
