"""Run the forward and backward passes of a step on an engine with one or several stages, and then step each adapter.

A step of an adapter sums its gradients over ranks, computes their norm, clips them and runs AdamW.

A micro-batch has rows of one or more adapters. Each adapter has its own loss, a sum over supervised tokens, which is
divided before its backward pass. The sum of its gradients over micro-batches and data-parallel ranks is the
gradient of the mean over its supervised tokens in the global batch (`Optimizers.divisors`).

Usually each adapter has its own optimizer, and the engine does not step it (`Optimizers`). With ZeRO-1 to 3, DeepSpeed
shards the optimizer of a single adapter, and sums, clips and steps (`EngineOptimizer`).

The moments of an adapter are read by name at any ZeRO stage, and can be restored at a different stage. They are fp32
tensors of the rank's parameters, gathered over its data-parallel ranks, and come from torch's or DeepSpeed's optimizer.
`adapters/tying.py` joins the shards of tensor and pipeline parallelism.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, AdapterSegments
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import MOMENTS, AdapterLayout, gather_state, sum_gradients_
from megatron_tiedlora.engine.engine import gradient_norms, parameter_access, reported_norm, trained_parameters
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.model.batch import MicroBatch, Supervised, find_supervised
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups

Missing = Mapping[str, Sequence[str]]  # the tensors whose gradient is missing on this rank, by adapter
Moments = Mapping[str, Mapping[str, Tensor]]  # in the shapes of this rank's tensors, by moment and tensor


@dataclass(frozen=True)
class OwnOptimizer:
    """The optimizer of one adapter, its schedule and its clipping.

    Attributes:
        optimizer: the optimizer of this rank's trained tensors, or of one unused tensor if the rank has none.
        max_norm: the norm to which the gradients are clipped; 0 if they are not clipped.
    """

    optimizer: Optimizer
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
    own: Mapping[str, OwnOptimizer]
    device: torch.device

    engine_steps: ClassVar[bool] = False  # whether the engine holds and steps the optimizer

    def optimizer(self, name: str) -> Any:
        """Return the optimizer of the adapter `name`."""
        return self.own[name].optimizer

    def begin(self, num_micro_batches: int) -> None:
        """Begin a step of `num_micro_batches` backward passes on this rank."""

    def sum_tied(self) -> None:
        """Do nothing. `EngineOptimizer` sums tied gradients here, before a pipeline engine averages gradients."""

    def divisors(self, num_supervised: int, *, accumulation_steps: int, dp_size: int) -> tuple[float, ...]:
        """Return the divisors of a micro-batch's summed loss. They are applied one by one before the backward pass.

        With ZeRO-1 to 3, DeepSpeed itself divides by the second one, so the results are bit-equal.

        Args:
            num_supervised: the number of supervised tokens in the adapter's global batch.
        """
        count = accumulation_steps * dp_size
        return num_supervised / count, count

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

    def learning_rate(self, name: str) -> float:
        """Return the learning rate of the adapter's next step, for factors that have no multiple of it."""
        rates = {group["factor"]: group["lr"] for group in self.optimizer(name).param_groups}
        return cast(float, rates[1.0] if 1.0 in rates else max(rates.values()) / max(rates))

    def clear(self) -> None:
        """Set all gradients to None, including those of adapters that took no step."""
        for _, parameter in self.adapter_group.named_parameters():
            parameter.grad = None

    def opened(self, name: str) -> AbstractContextManager[None]:
        """Return a context for reading or writing an adapter's tensors, which are gathered if they are partitioned."""
        return nullcontext()

    def moments(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Return fp32 copies of this rank's moments of an adapter that has taken a step, by moment and tensor."""
        parameters = trained_parameters(self.adapter_group.adapters[name]).items()
        return {
            moment: {
                tensor: self._moment(name, parameter, moment).detach().to(torch.float32, copy=True)
                for tensor, parameter in parameters
            }
            for moment in MOMENTS
        }

    def _moment(self, name: str, parameter: nn.Parameter, moment: str) -> Tensor:
        return cast(Tensor, self.optimizer(name).state[parameter][moment])

    def restore(self, name: str, moments: Moments, *, step: int) -> None:
        """Set the optimizer of an adapter to the state after `step`, before the adapter takes a step in this launch.

        torch's AdamW creates its state at the first step, so the state is created here, with the parameters' layout.
        """
        state = self.optimizer(name).state
        for tensor, parameter in trained_parameters(self.adapter_group.adapters[name]).items():
            state[parameter] = _fresh_state(parameter, step)
            for moment in MOMENTS:
                state[parameter][moment].copy_(moments[moment][tensor])


class EngineOptimizer(Optimizers):
    """The sharded optimizer of ZeRO-1 to 3 for one adapter that is registered in the engine's module."""

    engine_steps = True

    def __init__(self, engine: Any, adapter_group: AdapterGroup, groups: ParallelGroups, config: EngineConfig) -> None:
        super().__init__(adapter_group, groups, {}, engine.device)
        (self._adapter,) = adapter_group.adapters.values()
        self._engine, self._config = engine, config
        self._missing: Missing = {}
        pipelined = groups.pipeline.size > 1
        self._step = engine._exec_optimizer_step if pipelined else engine.step

    def optimizer(self, name: str) -> Any:
        """See `Optimizers.optimizer`."""
        return self._engine.optimizer

    def begin(self, num_micro_batches: int) -> None:
        """See `Optimizers.begin`."""
        if self._adapter.u_sum is not None:
            self._adapter.u_sum.start(num_micro_batches)

    def sum_tied(self) -> None:
        """Sum the tied gradients over stages and data-parallel ranks, before the engine averages over the latter."""
        self._missing = sum_gradients_({ONLY: self._adapter}, self.groups, engine_averages=True)

    def divisors(self, num_supervised: int, *, accumulation_steps: int, dp_size: int) -> tuple[float, ...]:
        """See `Optimizers.divisors`. DeepSpeed itself divides by accumulation steps x data-parallel ranks."""
        return (num_supervised / (accumulation_steps * dp_size),)

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

    def clear(self) -> None:
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


# The passes -----------------------------------------------------------------------------------------------------------


def inputs_to_fill(num_stages: int) -> int:
    """Return how many micro-batches keep the stages busy. With four per stage, at most a fifth of the time is idle."""
    return 4 * num_stages if num_stages > 1 else 1


Divisors = tuple[float, ...]  # the summed loss of a micro-batch is divided by these, one after the other


@dataclass
class Losses:
    """The losses of several micro-batches, recorded by adapter, and the divisors that are applied to them.

    Attributes:
        divisors: the divisors of every adapter that has a loss.
        tokens: a list to which the cross entropy of each label is appended, (n,), in the order of the micro-batches, in
            one or more parts; or None.
    """

    divisors: Mapping[str, Divisors]
    found: list[tuple[str, Tensor]] = field(default_factory=list)
    tokens: list[Tensor] | None = None

    def weighted(self, losses: Tensor, segments: AdapterSegments) -> Tensor:
        """Record the losses, (segments,) or () for one segment, and return the sum of the divided losses."""
        total: Tensor | None = None
        for segment, loss in zip(segments, losses.unbind() if losses.ndim else (losses,), strict=True):
            self.found.append((segment.adapter, loss.detach()))
            for divisor in self.divisors[segment.adapter]:
                loss = loss / divisor
            total = loss if total is None else total + loss
        assert total is not None, "a micro-batch has at least one adapter"
        return total

    def sums(self, *, counted: bool) -> dict[str, float]:
        """Return the summed loss of each adapter, in fp64; 0 if another rank counts it. This waits for the device."""
        sums = dict.fromkeys(self.divisors, 0.0)
        if counted and self.found:
            values = torch.stack([loss for _, loss in self.found]).tolist()
            for (name, _), value in zip(self.found, values, strict=True):
                sums[name] += value
        return sums


@dataclass
class Runner:
    """Runs an engine without pipeline parallelism, at any ZeRO stage. `PipelineRunner` supports several stages."""

    engine: Any
    stage: Stage
    groups: ParallelGroups
    optimizers: Optimizers
    device: torch.device
    each_forward: Callable[[], AbstractContextManager[None]] = nullcontext  # around each forward pass, for benchmarks

    @property
    def adapters(self) -> dict[str, TiedAdapter]:
        """Return this rank's shards of the adapters, by name."""
        assert self.stage.adapter_group is not None
        return self.stage.adapter_group.adapters

    @property
    def counts_loss(self) -> bool:
        """Return whether a sum over all ranks includes this rank's loss. Tensor-parallel ranks have the same loss."""
        return self.stage.head is not None and self.groups.tensor.rank == 0

    def full_state(self, name: str, layout: AdapterLayout) -> dict[str, Tensor]:
        """Return full fp32 A, B, u and v of an adapter on rank 0's CPU, and {} on others. All ranks must call it."""
        with self.optimizers.opened(name):
            return gather_state(dict(self.adapters[name].named_parameters()), layout)

    def accumulate(
        self,
        batches: Sequence[MicroBatch],
        divisors: Mapping[str, Divisors],
        between: Callable[[], None],
        *,
        tokens: list[Tensor] | None = None,
    ) -> dict[str, float]:
        """Run the forward and backward passes of a step. Gradients are accumulated, and no parameter changes.

        Args:
            divisors: the divisors of every adapter that takes a step.
            between: a function that is called after a micro-batch if all ranks can stop there. It may raise an error.
            tokens: see `Losses.tokens`. It is only filled on stages that have the head.

        Returns:
            the summed loss of each adapter on this rank; 0 if another rank counts it.
        """
        self.engine.train()
        self.optimizers.begin(len(batches))
        losses = Losses(divisors, tokens=tokens)
        self._train(batches, losses, between)
        return losses.sums(counted=self.counts_loss)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch], *, tokens: list[Tensor] | None = None) -> list[dict[str, float]]:
        """Return the summed loss of each adapter, per micro-batch, without gradients; 0 if another rank counts it.

        For `tokens`, see `accumulate`.
        """
        self.engine.eval()
        none: list[dict[str, Divisors]] = [{segment.adapter: () for segment in batch.segments} for batch in batches]
        found = [Losses(divisors, tokens=tokens) for divisors in none]
        self._score(batches, found)
        return [losses.sums(counted=self.counts_loss) for losses in found]

    def _supervised(self, batch: MicroBatch, losses: Losses) -> list[Supervised]:
        """Return the supervised positions of a micro-batch, or of its halves, computed on the host."""
        parts, segments = self.stage.tensor_parallel.sequence_parts, batch.segments
        number = self.stage.num_halves(len(batch.labels), segments)
        inputs = (None,) * number if batch.loss_inputs is None else batch.loss_inputs.chunk(number, 1)
        report = None if losses.tokens is None else losses.tokens.append
        halves = [
            find_supervised(labels, parts, segments, batch.objectives, own)
            for labels, own in zip(batch.labels.chunk(number), inputs, strict=True)
        ]
        return [half.moved(self._on_device)._replace(report=report) for half in halves]

    def _on_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # from unpinned memory a copy blocks

    def forward(self, batch: MicroBatch, losses: Losses | None = None) -> Tensor:
        """Return the summed loss of a micro-batch: a scalar, or one loss per adapter, (segments,), for several.

        Args:
            losses: records the losses of tokens, if wanted.
        """
        supervised = self._supervised(batch, losses or Losses({}))
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        token_index = None if batch.token_index is None else self._on_device(batch.token_index)
        # Document ids stay on the host, where their boundaries are computed.
        with self.each_forward():
            more = {"documents": batch.documents, "token_index": token_index, "segments": batch.segments}
            loss: Tensor = self.engine(tokens, positions, supervised, **more)
        return loss

    def _train(self, batches: Sequence[MicroBatch], losses: Losses, between: Callable[[], None]) -> None:
        """Run the forward and backward passes of a step, and record their losses."""
        for index, batch in enumerate(batches, start=1):
            # An engine with an optimizer steps at the last micro-batch. The number of micro-batches varies between
            # packed steps, so DeepSpeed cannot count them itself.
            steps = self.optimizers.engine_steps and index == len(batches)
            self.engine.set_gradient_accumulation_boundary(steps)
            self.engine.backward(losses.weighted(self.forward(batch, losses), batch.segments))
            if not steps:
                self.engine.step()  # changes no parameter
            if index < len(batches):
                between()
        if not self.optimizers.engine_steps:
            self.engine.global_steps += 1  # DeepSpeed's flops_profiler counts steps by it

    def _score(self, batches: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        """Run the forward pass of each micro-batch and record its losses in the matching element of `losses`."""
        for found, batch in zip(losses, batches, strict=True):
            found.weighted(self.forward(batch, found), batch.segments)


class PipelineRunner(Runner):
    """A runner for several stages that uses DeepSpeed's PipelineEngine and 1F1B schedule, and sums tied gradients.

    The schedule's optimizer step is deferred to `Optimizers.take`, so that all ranks can agree on the loss before
    weights change. Every rank of a pipeline has the micro-batches, so stages exchange only hidden states and know their
    shapes. (DeepSpeed 0.19.8 would send the shapes first and wait for them.) The engine looks up its instructions in a
    map, and this class replaces entries of this map.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        from deepspeed.runtime.pipe import p2p, schedule

        self._messages, self._schedule = p2p, schedule
        self._losses: Iterator[Losses] = iter(())  # where the losses of the next loaded micro-batches are recorded
        self.engine._INSTRUCTION_MAP = {
            **type(self.engine)._INSTRUCTION_MAP,
            schedule.LoadMicroBatch: lambda _engine, buffer_id: self._load(buffer_id),
            schedule.ForwardPass: lambda _engine, buffer_id: self._forward(buffer_id),
            schedule.RecvActivation: lambda _engine, buffer_id: self._receive(buffer_id),
            schedule.SendActivation: lambda engine, buffer_id: p2p.send(
                engine.pipe_buffers["outputs"][buffer_id], engine.next_stage
            ),
            schedule.ReduceTiedGrads: lambda _engine: self.optimizers.sum_tied(),
            schedule.OptimizerStep: lambda _engine: None,
        }
        if not self.optimizers.engine_steps:
            self.engine._INSTRUCTION_MAP[schedule.ReduceGrads] = lambda _engine: None

    def _train(self, batches: Sequence[MicroBatch], losses: Losses, between: Callable[[], None]) -> None:
        """See `Runner._train`. Stages run different micro-batches at the same time, so `between` is never called."""
        self._run(self._schedule.TrainSchedule, batches, repeat(losses))

    def _score(self, batches: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        self._run(self._schedule.InferenceSchedule, batches, iter(losses))

    def _run(self, schedule: Any, batches: Sequence[MicroBatch], losses: Iterator[Losses]) -> None:
        self.engine.total_loss = None
        self.engine._compute_loss = True
        self._to_load, self._to_receive, self._losses = iter(batches), iter(batches), losses
        self._segments: dict[int, AdapterSegments] = {}
        self.engine._exec_schedule(
            schedule(micro_batches=len(batches), stages=self.groups.pipeline.size, stage_id=self.groups.pipeline.rank)
        )

    def _load(self, buffer_id: int) -> None:
        """Load the tensors of the next micro-batch that the first and the last stage need besides hidden states."""
        batch = next(self._to_load)
        self._segments[buffer_id] = batch.segments
        if self.stage.embedding is not None:
            self.engine.pipe_buffers["inputs"][buffer_id] = (self._on_device(batch.tokens), *self._positions(batch))
        if self.stage.head is not None:
            losses = next(self._losses)
            labels = self._supervised(batch, losses), lambda found: losses.weighted(found, batch.segments)
            self.engine.pipe_buffers["labels"][buffer_id] = labels

    def _positions(self, batch: MicroBatch) -> tuple[Tensor, ...]:
        """Return position ids, and document ids if rows are packed. Document ids stay on the host.

        With dropout, position ids (b, s) and token indices are one tensor, (2, b, s). The engine's inputs must be
        tensors, and only the last input may be missing.
        """
        positions = batch.positions
        if batch.token_index is not None:
            positions = torch.stack((positions, batch.token_index))
        positions = self._on_device(positions)
        return (positions,) if batch.documents is None else (positions, batch.documents)

    def _forward(self, buffer_id: int) -> None:
        self.engine.module.segments = self._segments[buffer_id]
        with self.each_forward():
            self.engine._exec_forward_pass(buffer_id)

    def _receive(self, buffer_id: int) -> None:
        """Receive the hidden states of the next micro-batch. Their shape follows from the shape of its tokens."""
        batch = next(self._to_receive)
        self._segments[buffer_id] = batch.segments
        hidden = self.stage.empty_hidden(*batch.tokens.shape)
        self._messages.recv(hidden, self.engine.prev_stage)
        self.engine.pipe_buffers["inputs"][buffer_id] = (hidden.requires_grad_(), *self._positions(batch))
