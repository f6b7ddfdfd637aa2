"""The optimizers of a run's adapters: sum gradients over ranks, compute their norms, clip them and run AdamW.

Usually each adapter has its own optimizer, and the engine does not step it (`Optimizers`). With ZeRO-1 to 3, DeepSpeed
shards the optimizer of a single adapter, and sums, clips and steps (`EngineOptimizer`).

The moments of an adapter are read by name at any ZeRO stage, and can be restored at a different stage. They are fp32
tensors of the rank's parameters, gathered over its data-parallel ranks, and come from torch's or DeepSpeed's optimizer.
`adapters/tying.py` joins the shards of tensor and pipeline parallelism.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup
from megatron_tiedlora.adapters.tying import MOMENTS, sum_gradients_
from megatron_tiedlora.engine.engine import gradient_norms, parameter_access, reported_norm, trained_parameters
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.groups import ParallelGroups

Missing = Mapping[str, Sequence[str]]  # the tensors whose gradient is missing on this rank, by adapter
Moments = Mapping[str, Mapping[str, Tensor]]  # in the shapes of this rank's tensors, by moment and tensor


@dataclass(frozen=True)
class OwnOptimizer:
    """The optimizer of one adapter, its schedule and its clipping.

    Attributes:
        optimizer: the optimizer of this rank's trained tensors, or of one unused tensor if the rank has none.
        max_norm: the norm to which the gradients are clipped; 0 if they are not clipped here.
    """

    optimizer: Any
    scheduler: LambdaLR
    max_norm: float


@dataclass
class Optimizers:
    """The optimizers of a run's adapters on one rank, one per adapter. The engine does not use them.

    All ranks must call each method together, for the same adapters. The gradients of all adapters are summed in one
    message per process group, and their norms in one message. Then each adapter is stepped separately.
    """

    adapter_group: AdapterGroup
    groups: ParallelGroups
    own: dict[str, OwnOptimizer]
    device: torch.device

    engine_steps: ClassVar[bool] = False  # whether the engine holds and steps the optimizer

    def begin(self, num_micro_batches: int) -> None:
        """Begin a step of `num_micro_batches` backward passes on this rank."""

    def sum_tied(self) -> None:
        """Do nothing. `EngineOptimizer` sums tied gradients here, before a pipeline engine averages gradients."""

    def divisors(self, num_supervised: int, num_passes: int) -> tuple[float, ...]:
        """Return the divisors of a micro-batch's summed loss. They are applied one by one before the backward pass.

        With ZeRO-1 to 3, DeepSpeed itself divides by the second one, so the results are bit-equal.

        Args:
            num_supervised: the number of supervised tokens in the adapter's global batch.
            num_passes: accumulation steps x data-parallel ranks.
        """
        return num_supervised / num_passes, num_passes

    def sum_gradients(self, taking: Collection[str]) -> Missing:
        """Sum gradients over ranks for adapters that take a step. Return this rank's tensors without a gradient."""
        adapters = {name: adapter for name, adapter in self.adapter_group.adapters.items() if name in taking}
        return sum_gradients_(adapters, self.groups)

    def norms(self, taking: Sequence[str]) -> dict[str, float]:
        """Return the gradient norm of each adapter before clipping, or {} if the engine computes it in its step."""
        found = gradient_norms([self.adapter_group.adapters[name] for name in taking], self.groups, self.device)
        return {name: reported_norm(norm) for name, norm in zip(taking, found, strict=True)}

    def take(self, name: str, norm: float | None) -> float:
        """Clip an adapter's gradients and step its optimizer. Return the norm before clipping (see `reported_norm`)."""
        assert norm is not None, "the norms are found before the steps"
        own = self.own[name]
        if own.max_norm and norm > own.max_norm:
            for parameter in trained_parameters(self.adapter_group.adapters[name]).values():
                if parameter.grad is not None:
                    parameter.grad.mul_(own.max_norm / (norm + 1e-6))
        own.optimizer.step()
        own.scheduler.step()
        return norm

    def set_numbers(self, name: str, *, max_norm: float, **numbers: Any) -> None:
        """Set the clipping and AdamW's `lr`, `betas`, `eps` and `weight_decay` for an adapter's next step."""
        self.own[name] = replace(self.own[name], max_norm=max_norm)
        for group in self.own[name].optimizer.param_groups:
            group.update(numbers)

    def learning_rate(self, name: str) -> float:
        """Return the learning rate of the adapter's next step, for factors that have no multiple of it."""
        rates = {group["factor"]: group["lr"] for group in self.own[name].optimizer.param_groups}
        return cast(float, rates[1.0] if 1.0 in rates else max(rates.values()) / max(rates))

    def clear(self, names: Iterable[str]) -> None:
        """Set the gradients of these adapters to None, whether they took a step or not."""
        for name in names:
            for parameter in self.adapter_group.adapters[name].parameters():
                parameter.grad = None

    def opened(self, name: str) -> AbstractContextManager[None]:
        """Return a context for reading or writing an adapter's tensors, which are gathered if they are partitioned."""
        return nullcontext()

    def moments(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Return fp32 copies of this rank's moments of an adapter, by moment and tensor. They start as zeros."""
        parameters = trained_parameters(self.adapter_group.adapters[name]).items()
        return {
            moment: {
                tensor: self._moment(name, parameter, moment).detach().to(torch.float32, copy=True)
                for tensor, parameter in parameters
            }
            for moment in MOMENTS
        }

    def _moment(self, name: str, parameter: nn.Parameter, moment: str) -> Tensor:
        state = self.own[name].optimizer.state
        return cast(Tensor, state[parameter][moment]) if parameter in state else torch.zeros_like(parameter)

    def restore(self, name: str, moments: Moments, *, step: int) -> None:
        """Set the optimizer of an adapter to the state after `step`, before the adapter takes a step in this launch.

        torch's AdamW creates its state at the first step, so the state is created here, with the parameters' layout.
        """
        state = self.own[name].optimizer.state
        for tensor, parameter in trained_parameters(self.adapter_group.adapters[name]).items():
            state[parameter] = _fresh_state(parameter, step)
            for moment in MOMENTS:
                state[parameter][moment].copy_(moments[moment][tensor])


class EngineOptimizer(Optimizers):
    """The sharded optimizer of ZeRO-1 to 3 for one adapter that is registered in the engine's module."""

    engine_steps = True

    def __init__(self, engine: Any, adapter_group: AdapterGroup, groups: ParallelGroups, config: EngineConfig) -> None:
        own = OwnOptimizer(engine.optimizer, engine.lr_scheduler, 0.0)
        super().__init__(adapter_group, groups, {ONLY: own}, engine.device)
        (self._adapter,) = adapter_group.adapters.values()
        self._engine, self._config = engine, config
        self._missing: Missing = {}
        pipelined = groups.pipeline.size > 1
        self._step = engine._exec_optimizer_step if pipelined else engine.step

    def begin(self, num_micro_batches: int) -> None:
        """See `Optimizers.begin`."""
        if self._adapter.u_sum is not None:
            self._adapter.u_sum.start(num_micro_batches)

    def sum_tied(self) -> None:
        """Sum the tied gradients over stages and data-parallel ranks, before the engine averages over the latter."""
        self._missing = sum_gradients_({ONLY: self._adapter}, self.groups, engine_averages=True)

    def divisors(self, num_supervised: int, num_passes: int) -> tuple[float, ...]:
        """See `Optimizers.divisors`. DeepSpeed itself divides by `num_passes`."""
        return (num_supervised / num_passes,)

    def sum_gradients(self, taking: Collection[str]) -> Missing:
        """See `Optimizers.sum_gradients`."""
        return self._missing

    def norms(self, taking: Sequence[str]) -> dict[str, float]:
        """See `Optimizers.norms`."""
        return {}

    def take(self, name: str, norm: float | None) -> float:
        """See `Optimizers.take`. ZeRO-1 and 2 skip a step whose norm is not finite in fp32; ZeRO-3 does not."""
        self._step()
        return reported_norm(float(self._engine.get_global_grad_norm()))

    def clear(self, names: Iterable[str]) -> None:
        """See `Optimizers.clear`. The engine has already dropped the gradients."""

    def opened(self, name: str) -> AbstractContextManager[None]:
        """See `Optimizers.opened`. Under ZeRO-3 the context gathers the partitions of the data-parallel ranks."""
        return parameter_access(self._config)(list(self._adapter.parameters()))

    def moments(self, name: str) -> dict[str, dict[str, Tensor]]:
        """See `Optimizers.moments`."""
        self._link_moments()
        return super().moments(name)

    def _link_moments(self) -> None:
        """Let DeepSpeed's functions find the moments of every parameter group at ZeRO-1 and 2.

        DeepSpeed does so once, after the first step of the first group, before other groups have any (in 0.19.8).
        """
        if self._config.zero_stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _moment(self, name: str, parameter: nn.Parameter, moment: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return cast(Tensor, safe_get_full_optimizer_state(parameter, moment))

    def restore(self, name: str, moments: Moments, *, step: int) -> None:
        """See `Optimizers.restore`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        optimizer, sharded = self._engine.optimizer, self._config.zero_stage == 3
        flat_masters = optimizer.fp32_partitioned_groups_flat if sharded else optimizer.single_partition_of_fp32_groups
        for flat in flat_masters:
            optimizer.optimizer.state[flat] = _fresh_state(flat, step)
        self._link_moments()
        for tensor, parameter in trained_parameters(self._adapter).items():
            for moment in MOMENTS:
                value = moments[moment][tensor]
                if not sharded:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
                    continue
                # DeepSpeed's setter fails if it has to pad a parameter's last partition, so partitions are set here.
                partition, _ = optimizer._get_fp32_opt_state_partition(
                    parameter, release_swap_buffers=False, optim_state_key=moment
                )
                start = partition.numel() * self.groups.data.rank
                mine = value.flatten()[start : start + partition.numel()]
                partition.zero_()
                partition[: mine.numel()].copy_(mine)


def _fresh_state(parameter: Tensor, step: int) -> dict[str, Tensor]:
    zeros = {moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS}
    return {"step": torch.tensor(float(step)), **zeros}
