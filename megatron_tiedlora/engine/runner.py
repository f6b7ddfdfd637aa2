"""Run the forward and backward passes of a step on an engine with one or several stages.

A micro-batch has rows of one or more adapters. Each adapter has its own loss, a sum over supervised tokens, which is
divided before its backward pass. The sum of its gradients over micro-batches and data-parallel ranks is the
gradient of the mean over its supervised tokens in the global batch (`Optimizers.divisors`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from megatron_tiedlora.adapters.adapter_groups import AdapterSegments
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import AdapterLayout, gather_full, gather_state
from megatron_tiedlora.engine.optimizers import Optimizers
from megatron_tiedlora.model.batch import MicroBatch, Supervised, find_supervised
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups


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

    def full_moments(self, name: str, layout: AdapterLayout) -> dict[str, dict[str, Tensor]]:
        """Return the full fp32 moments of an adapter on rank 0's CPU, by moment and tensor, and no tensors on others.
        All ranks must call it."""
        names = list(layout.config.num_trained())
        return {moment: gather_full(names, local, layout) for moment, local in self.optimizers.moments(name).items()}

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

    def _loss(self, batch: MicroBatch, losses: Losses) -> Tensor:
        """Run the forward pass of a micro-batch, and record its losses. Return the sum of the divided losses."""
        supervised = self._supervised(batch, losses)
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        token_index = None if batch.token_index is None else self._on_device(batch.token_index)
        # Document ids stay on the host, where their boundaries are computed.
        with self.each_forward():
            more = {"documents": batch.documents, "token_index": token_index, "segments": batch.segments}
            summed: Tensor = self.engine(tokens, positions, supervised, **more)
        return losses.weighted(summed, batch.segments)

    def _train(self, batches: Sequence[MicroBatch], losses: Losses, between: Callable[[], None]) -> None:
        """Run the forward and backward passes of a step, and record their losses."""
        for index, batch in enumerate(batches, start=1):
            # An engine with an optimizer steps at the last micro-batch. The number of micro-batches varies between
            # packed steps, so DeepSpeed cannot count them itself.
            steps = self.optimizers.engine_steps and index == len(batches)
            self.engine.set_gradient_accumulation_boundary(steps)
            self.engine.backward(self._loss(batch, losses))
            if not steps:
                self.engine.step()  # changes no parameter
            if index < len(batches):
                between()
        if not self.optimizers.engine_steps:
            self.engine.global_steps += 1  # DeepSpeed's flops_profiler counts steps by it

    def _score(self, batches: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        """Run the forward pass of each micro-batch and record its losses in the matching element of `losses`."""
        for found, batch in zip(losses, batches, strict=True):
            self._loss(batch, found)


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
