"""How the gradients of a step become a step of each adapter: sums over ranks, norm, clipping, AdamW.

Usually each adapter has an optimizer of its own, and the engine takes no part. ZeRO-1 to 3 shard the optimizer of a
single adapter; DeepSpeed then sums, clips and steps.

The moments of an adapter are read by name from any ZeRO stage and written into any other: fp32 tensors of the rank's
parameters, gathered over its data-parallel ranks. Without an engine's optimizer they are in torch's, else this module
knows where DeepSpeed's stores them; adapters/tying joins the shards of tensor and pipeline parallelism.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from megatron_tiedlora.adapters.adapter_bank import ONLY, AdapterBank
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import MOMENTS, sum_gradients_
from megatron_tiedlora.engine.engine import (
    gradient_norms,
    parameter_access,
    reported_norm,
    scale_gradients_,
    trained_parameters,
)
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.groups import ParallelGroups

Missing = Mapping[str, Sequence[str]]  # by adapter, the tensors whose gradient is missing on this rank
Moments = Mapping[str, Mapping[str, torch.Tensor]]  # by moment and tensor, in the shapes of this rank's tensors


class Optimizers(ABC):
    """The optimizers of a run's adapters on one rank. All ranks call each method together, for the same adapters."""

    engine_steps: bool  # whether the engine holds the optimizer

    @abstractmethod
    def optimizer(self, name: str) -> Any:
        """The optimizer of an adapter."""

    def begin(self, num_micro_batches: int) -> None:  # noqa: B027
        """Begin a step of so many backward passes on this rank."""

    def sum_tied(self) -> None:  # noqa: B027
        """In a pipeline whose engine sums over data-parallel ranks: what comes before that."""

    @abstractmethod
    def divisors(self, num_supervised: int, *, accumulation_steps: int, dp_size: int) -> tuple[float, ...]:
        """What the summed loss of a micro-batch is divided by, one after the other, before its backward pass.

        Args:
            num_supervised: supervised tokens of the adapter's global batch.
        """

    @abstractmethod
    def sum_gradients(self, taking: Collection[str]) -> Missing:
        """Sum the gradients of the adapters that take a step over the ranks, unless the engine does."""

    @abstractmethod
    def norms(self, taking: Sequence[str]) -> dict[str, float]:
        """The norm of each adapter's gradients before clipping; there is none if only the engine's step finds it."""

    @abstractmethod
    def take(self, name: str, norm: float | None) -> float:
        """Clip the gradients of one adapter and take its step. Returns the norm before clipping (`reported_norm`)."""

    def learning_rate(self, name: str) -> float:
        """The learning rate of the next step."""
        rate: float = self.optimizer(name).param_groups[0]["lr"]
        return rate

    @abstractmethod
    def clear(self) -> None:
        """Drop all gradients, also of adapters that took no step."""

    @abstractmethod
    def opened(self, name: str) -> AbstractContextManager[None]:
        """Inside, the tensors of an adapter are whole on this rank, for reading or writing."""

    @abstractmethod
    def moments(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """The moments of an adapter that has taken a step, by moment and tensor: fp32 copies, this rank's part."""

    @abstractmethod
    def restore(self, name: str, moments: Moments, *, step: int) -> None:
        """Set the optimizer of an adapter, which has taken no step yet, to its state after `step`.

        torch's AdamW creates its state at the first step, so it is created here, in the layout of its tensors.
        """


@dataclass(frozen=True)
class OwnOptimizer:
    """What one adapter takes its steps with.

    Attributes:
        optimizer: of `trained_or_stand_in` of its part on this rank.
        max_norm: of its gradients; 0: they are not clipped.
    """

    optimizer: Optimizer
    scheduler: LambdaLR
    max_norm: float


@dataclass(frozen=True)
class OwnOptimizers(Optimizers):
    """An optimizer for each adapter, of which an engine knows nothing.

    The sums and the norms of all adapters are one message per group. From there on nothing of an adapter meets
    another's.
    """

    bank: AdapterBank
    groups: ParallelGroups
    own: Mapping[str, OwnOptimizer]
    device: torch.device

    engine_steps = False

    def optimizer(self, name: str) -> Optimizer:
        """See Optimizers."""
        return self.own[name].optimizer

    def divisors(self, num_supervised: int, *, accumulation_steps: int, dp_size: int) -> tuple[float, ...]:
        """See Optimizers. Divided twice, as by DeepSpeed, which gives the same bits."""
        share = accumulation_steps * dp_size
        return num_supervised / share, share

    def sum_gradients(self, taking: Collection[str]) -> Missing:
        """See Optimizers."""
        adapters = {name: adapter for name, adapter in self.bank.adapters.items() if name in taking}
        return sum_gradients_(adapters, self.groups)

    def norms(self, taking: Sequence[str]) -> dict[str, float]:
        """See Optimizers."""
        found = gradient_norms([self.bank.adapters[name] for name in taking], self.groups, self.device)
        return {name: reported_norm(norm) for name, norm in zip(taking, found, strict=True)}

    def take(self, name: str, norm: float | None) -> float:
        """See Optimizers."""
        assert norm is not None, "the norms are found before the steps"
        own = self.own[name]
        scale_gradients_(self.bank.adapters[name], norm, own.max_norm)
        own.optimizer.step()
        own.scheduler.step()
        return norm

    def clear(self) -> None:
        """See Optimizers."""
        for _, parameter in self.bank.named_parameters():
            parameter.grad = None

    def opened(self, name: str) -> AbstractContextManager[None]:
        """See Optimizers."""
        return nullcontext()

    def moments(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """See Optimizers."""
        state, parameters = self.optimizer(name).state, trained_parameters(self.bank.adapters[name])
        return _by_moment(parameters, lambda parameter, moment: state[parameter][moment])

    def restore(self, name: str, moments: Moments, *, step: int) -> None:
        """See Optimizers."""
        state = self.optimizer(name).state
        for tensor, parameter in trained_parameters(self.bank.adapters[name]).items():
            state[parameter] = _fresh_state(parameter, step)
            for moment in MOMENTS:
                state[parameter][moment].copy_(moments[moment][tensor])


class EngineOptimizer(Optimizers):
    """The sharded optimizer of ZeRO-1 to 3 for one adapter, which is a part of the engine's module."""

    engine_steps = True

    def __init__(self, engine: Any, adapter: TiedAdapter, groups: ParallelGroups, config: EngineConfig) -> None:
        self._engine, self._adapter, self._groups, self._config = engine, adapter, groups, config
        self._missing: Missing = {}
        pipelined = groups.pipeline.size > 1
        self._step = engine._exec_optimizer_step if pipelined else engine.step

    def optimizer(self, name: str) -> Any:
        """See Optimizers."""
        return self._engine.optimizer

    def begin(self, num_micro_batches: int) -> None:
        """See Optimizers."""
        if self._adapter.u_sum is not None:
            self._adapter.u_sum.start(num_micro_batches)

    def sum_tied(self) -> None:
        """Sum the tied gradients over stages and data-parallel ranks, before the engine averages over the latter."""
        self._missing = sum_gradients_({ONLY: self._adapter}, self._groups, engine_averages=True)

    def divisors(self, num_supervised: int, *, accumulation_steps: int, dp_size: int) -> tuple[float, ...]:
        """See Optimizers. DeepSpeed divides by the rest: accumulation steps x data-parallel ranks."""
        return (num_supervised / (accumulation_steps * dp_size),)

    def sum_gradients(self, taking: Collection[str]) -> Missing:
        """See Optimizers."""
        return self._missing

    def norms(self, taking: Sequence[str]) -> dict[str, float]:
        """See Optimizers."""
        return {}

    def take(self, name: str, norm: float | None) -> float:
        """See Optimizers. ZeRO-1 and 2 skip a step whose norm is not finite in fp32; ZeRO-3 takes it."""
        self._step()
        return reported_norm(float(self._engine.get_global_grad_norm()))

    def clear(self) -> None:
        """See Optimizers. The engine has dropped them."""

    def opened(self, name: str) -> AbstractContextManager[None]:
        """See Optimizers. Under ZeRO-3 data-parallel ranks hold shards."""
        return parameter_access(self._config)(list(self._adapter.parameters()))

    def moments(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """See Optimizers."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return _by_moment(trained_parameters(self._adapter), safe_get_full_optimizer_state)

    def restore(self, name: str, moments: Moments, *, step: int) -> None:
        """See Optimizers."""
        from deepspeed.utils import safe_set_full_optimizer_state

        optimizer, sharded = self._engine.optimizer, self._config.zero_stage == 3
        flat_masters = optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
        for flat in flat_masters:
            optimizer.optimizer.state[flat] = _fresh_state(flat, step)
        if not sharded:
            optimizer._lazy_init_hp_params_optimizer_state()
        for tensor, parameter in trained_parameters(self._adapter).items():
            for moment in MOMENTS:
                value = moments[moment][tensor]
                if not sharded:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
                    continue
                # DeepSpeed's setter fails if the ranks do not divide a parameter, whose last partition is then padded.
                partition, _ = optimizer._get_fp32_opt_state_partition(
                    parameter, release_swap_buffers=False, optim_state_key=moment
                )
                start = partition.numel() * self._groups.data.rank
                piece = value.flatten()[start : start + partition.numel()]
                partition.zero_()
                partition[: piece.numel()].copy_(piece)


def trained_or_stand_in(adapter: TiedAdapter) -> list[nn.Parameter]:
    """The trained tensors of an adapter's part; if it has none, one number, since an optimizer wants a tensor."""
    return list(trained_parameters(adapter).values()) or [nn.Parameter(torch.zeros(1))]


def _by_moment(
    parameters: Mapping[str, nn.Parameter], full: Callable[[nn.Parameter, str], torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """fp32 copies of what `full` returns for each moment of each parameter."""
    return {
        moment: {name: full(one, moment).detach().to(torch.float32, copy=True) for name, one in parameters.items()}
        for moment in MOMENTS
    }


def _fresh_state(parameter: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    zeros = {moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS}
    return {"step": torch.tensor(float(step)), **zeros}
