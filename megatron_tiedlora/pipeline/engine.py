"""The model as a DeepSpeed engine: built in place under ZeRO-3, initialised with our optimizer, read for its norm.

The engine's JSON has no precision section, so DeepSpeed treats the model as fp32: the frozen base keeps its own dtype,
and the adapter's gradients, their sums and the optimizer stay fp32 at every ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.config.engine_json import EngineConfig


@contextmanager
def base_construction(config: EngineConfig, *, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Build the frozen base inside: its weights come up empty on `device`, partitioned at once under ZeRO-3."""
    if config.zero_stage < 3:
        with device:
            yield
        return
    import deepspeed

    # Without a precision section zero.Init makes fp32 weights, so bf16 is said. fp32 must be left unsaid: where fp16 is
    # not supported (CPUs), zero.Init takes any dtype that it is given for bf16 (seen in 0.19.8).
    with deepspeed.zero.Init(config_dict_or_path=dict(config.values), dtype=None if dtype == torch.float32 else dtype):
        yield


def parameter_access(config: EngineConfig) -> Callable[[nn.Parameter], AbstractContextManager[Any]]:
    """How to open one parameter for writing: whole and shared by all ranks under ZeRO-3, else as it is.

    Under ZeRO-3 every rank must open the same parameters in the same order; what rank 0 writes is kept.
    """
    if config.zero_stage < 3:
        return lambda parameter: nullcontext(parameter)
    import deepspeed

    def gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
        return context

    return gathered


@contextmanager
def all_open(module: nn.Module, config: EngineConfig) -> Iterator[None]:
    """Every parameter of `module` whole inside the block, for reading or for rank 0's writing; all ranks enter it."""
    access = parameter_access(config)
    with ExitStack() as stack:
        for parameter in module.parameters():
            stack.enter_context(access(parameter))
        yield


def initialize_engine(
    model: nn.Module,
    config: EngineConfig,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> Any:
    """`deepspeed.initialize` with a client optimizer and schedule; the trained parameters are the optimizer's."""
    import deepspeed

    engine, _, _, _ = deepspeed.initialize(
        model=model, config=dict(config.values), optimizer=optimizer, lr_scheduler=scheduler
    )
    return engine


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters with a gradient, by name; a shared one once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def local_gradient_norm(model: nn.Module) -> torch.Tensor:
    """2-norm over the trained parameters' gradients as they stand on this rank, each counted once, fp32."""
    gradients = [p.grad.detach().float() for p in trained_parameters(model).values() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))


def step_with_norm(engine: Any, zero_stage: int) -> float:
    """Take the optimizer step and return the gradient norm before clipping.

    DeepSpeed reports no norm at ZeRO-0, so there it is read from the gradients, already averaged over the ranks, before
    the step clips them. Where the norm is not finite, ZeRO 1 to 3 skip the step and report inf (0.19.8) or -1 (earlier
    versions); here it is never negative.
    """
    local = local_gradient_norm(engine.module) if zero_stage == 0 else None
    engine.step()
    norm = float(engine.get_global_grad_norm() if local is None else local)
    return norm if norm >= 0 else math.nan
