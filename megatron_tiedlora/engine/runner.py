"""A step's forward and backward passes on an engine, with one interface for one stage and for several.

A micro-batch has shares of one or more adapters, and each share its own loss: a sum over supervised tokens, which is
divided before its backward pass so that the gradients that are summed over micro-batches and data-parallel ranks are
those of the mean over the supervised tokens of the adapter's global batch, whatever the split (`Optimizers.divisors`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch

from megatron_tiedlora.adapters.adapter_bank import Shares
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import AdapterLayout, gather_state
from megatron_tiedlora.engine.optimizers import Optimizers
from megatron_tiedlora.model.batch import MicroBatch, Supervised
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups


def inputs_to_fill(num_stages: int) -> int:
    """How many micro-batches keep the stages busy: with four per stage the pipeline bubble is a fifth of the time."""
    return 4 * num_stages if num_stages > 1 else 1


Divisors = tuple[float, ...]  # what the summed loss of a micro-batch is divided by, one after the other


@dataclass
class Losses:
    """The losses of some micro-batches, by adapter: what to differentiate of each, and the sums."""

    divisors: Mapping[str, Divisors]  # of every adapter that has a loss
    found: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    def weighted(self, losses: torch.Tensor, shares: Shares) -> torch.Tensor:
        """The scalar whose gradient is each loss's own weight; notes the losses, (shares,) or () of a single one."""
        total: torch.Tensor | None = None
        for share, loss in zip(shares, losses.unbind() if losses.ndim else (losses,), strict=True):
            self.found.append((share.adapter, loss.detach()))
            for divisor in self.divisors[share.adapter]:
                loss = loss / divisor
            total = loss if total is None else total + loss
        assert total is not None, "a micro-batch belongs to somebody"
        return total

    def sums(self, *, counted: bool) -> dict[str, float]:
        """The summed loss of each adapter, in fp64; 0 if another rank counts it. Waits for the device."""
        sums = dict.fromkeys(self.divisors, 0.0)
        if counted and self.found:
            values = torch.stack([loss for _, loss in self.found]).tolist()
            for (name, _), value in zip(self.found, values, strict=True):
                sums[name] += value
        return sums


@dataclass
class Runner:
    """An engine with this rank's stage and groups. Its subclasses are `PlainRunner` and `PipelineRunner`."""

    engine: Any
    stage: Stage
    groups: ParallelGroups
    optimizers: Optimizers
    device: torch.device
    each_forward: Callable[[], AbstractContextManager[None]] = nullcontext  # around each forward pass, for benchmarks

    @property
    def adapters(self) -> dict[str, TiedAdapter]:
        """The adapters' parts on this rank, by name."""
        assert self.stage.bank is not None
        return self.stage.bank.adapters

    @property
    def counts_loss(self) -> bool:
        """Whether a sum over all ranks includes this rank's loss, which is equal within a tensor-parallel group."""
        return self.stage.head is not None and self.groups.tensor.rank == 0

    @property
    def inputs_at_once(self) -> int:
        """The preferred number of micro-batches per call of `evaluate`."""
        return 1

    def full_state(self, name: str, layout: AdapterLayout) -> dict[str, torch.Tensor]:
        """Full fp32 A, B, u, v of an adapter on rank 0's CPU, nothing on the others. All ranks call it."""
        with self.optimizers.opened(name):
            return gather_state(dict(self.adapters[name].named_parameters()), layout)

    def accumulate(
        self, batches: Sequence[MicroBatch], divisors: Mapping[str, Divisors], between: Callable[[], None]
    ) -> dict[str, float]:
        """Run a step's forward and backward passes: accumulates gradients, and changes no parameter.

        Args:
            divisors: of every adapter that takes a step.
            between: called after a micro-batch if all ranks can stop together there; may raise.

        Returns:
            the summed loss of each adapter on this rank; 0 if another rank counts it.
        """
        self.engine.train()
        self.optimizers.begin(len(batches))
        losses = Losses(divisors)
        self._train(batches, losses, between)
        return losses.sums(counted=self.counts_loss)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> list[dict[str, float]]:
        """The summed loss of each micro-batch's adapters without gradients; 0 if another rank counts it."""
        self.engine.eval()
        found = [Losses({share.adapter: () for share in batch.shares}) for batch in batches]  # not differentiated
        self._score(batches, found)
        return [losses.sums(counted=self.counts_loss) for losses in found]

    def _train(self, batches: Sequence[MicroBatch], losses: Losses, between: Callable[[], None]) -> None:
        """The forward and backward passes of a step, which note their losses."""
        raise NotImplementedError

    def _score(self, batches: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        """Forward passes, each of which notes its losses in its own place."""
        raise NotImplementedError

    def _supervised(self, batch: MicroBatch) -> Supervised:
        """The batch's supervised positions, computed on the host, for the last layers of this rank's stage."""
        return batch.supervised(self.stage.tensor_parallel.sequence_parts).moved(self._on_device)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # from unpinned memory a copy blocks


class PlainRunner(Runner):
    """One stage: DeepSpeedEngine, any ZeRO stage."""

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Summed loss of a micro-batch, a scalar; of one that several share that of each, (shares,)."""
        supervised = self._supervised(batch)
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        numbers = None if batch.numbers is None else self._on_device(batch.numbers)
        # Document ids stay on the host, where their boundaries are computed.
        with self.each_forward():
            loss: torch.Tensor = self.engine(
                tokens, positions, supervised, documents=batch.documents, numbers=numbers, shares=batch.shares
            )
        return loss

    def _train(self, batches: Sequence[MicroBatch], losses: Losses, between: Callable[[], None]) -> None:
        for index, batch in enumerate(batches, start=1):
            # An engine that steps does so at the last micro-batch. Their number varies between packed steps, so
            # DeepSpeed cannot count them itself.
            steps = self.optimizers.engine_steps and index == len(batches)
            self.engine.set_gradient_accumulation_boundary(steps)
            self.engine.backward(losses.weighted(self.forward(batch), batch.shares))
            if not steps:
                self.engine.step()  # changes no parameter
            if index < len(batches):
                between()
        if not self.optimizers.engine_steps:
            self.engine.global_steps += 1  # DeepSpeed's flops_profiler counts steps by it

    def _score(self, batches: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        for found, batch in zip(losses, batches, strict=True):
            found.weighted(self.forward(batch), batch.shares)


class PipelineRunner(Runner):
    """Several stages: DeepSpeed's PipelineEngine, its 1F1B schedule with our tied sum.

    The schedule's optimizer step is deferred to `Optimizers.take`, so that all ranks can agree on the loss before
    weights change. Every rank of a pipeline has the micro-batches, so stages exchange only hidden states and know their
    shapes; the engine would send the shapes first and wait for them (0.19.8). The engine looks up its instructions in a
    map, in which they are replaced.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        from deepspeed.runtime.pipe import schedule

        self._losses: Iterator[Losses] = iter(())  # where those of the next micro-batch that is loaded go
        self.engine._INSTRUCTION_MAP = {
            **type(self.engine)._INSTRUCTION_MAP,
            schedule.LoadMicroBatch: lambda _engine, buffer_id: self._load(buffer_id),
            schedule.ForwardPass: lambda _engine, buffer_id: self._forward(buffer_id),
            schedule.RecvActivation: lambda _engine, buffer_id: self._receive(buffer_id),
            schedule.SendActivation: lambda _engine, buffer_id: self._send(buffer_id),
            schedule.ReduceTiedGrads: lambda _engine: self.optimizers.sum_tied(),
            schedule.OptimizerStep: lambda _engine: None,
        }
        if not self.optimizers.engine_steps:
            self.engine._INSTRUCTION_MAP[schedule.ReduceGrads] = lambda _engine: None

    @property
    def inputs_at_once(self) -> int:
        """See Runner."""
        return inputs_to_fill(self.groups.pipeline.size)

    def _train(self, batches: Sequence[MicroBatch], losses: Losses, between: Callable[[], None]) -> None:
        """See Runner; stages run different micro-batches at a time, so `between` is never called."""
        from deepspeed.runtime.pipe.schedule import TrainSchedule

        self._run(TrainSchedule, batches, repeat(losses))

    def _score(self, batches: Sequence[MicroBatch], losses: Sequence[Losses]) -> None:
        from deepspeed.runtime.pipe.schedule import InferenceSchedule

        self._run(InferenceSchedule, batches, iter(losses))

    def _run(self, schedule: Any, batches: Sequence[MicroBatch], losses: Iterator[Losses]) -> None:
        self.engine.total_loss = None
        self.engine._compute_loss = True
        self._to_load, self._to_receive, self._losses = iter(batches), iter(batches), losses
        self._shares: dict[int, Shares] = {}
        self.engine._exec_schedule(
            schedule(micro_batches=len(batches), stages=self.groups.pipeline.size, stage_id=self.groups.pipeline.rank)
        )

    def _load(self, buffer_id: int) -> None:
        """Load what the first and the last stage need of the next micro-batch besides hidden states."""
        batch = next(self._to_load)
        self._shares[buffer_id] = batch.shares
        if self.stage.embedding is not None:
            self.engine.pipe_buffers["inputs"][buffer_id] = (self._on_device(batch.tokens), *self._positions(batch))
        if self.stage.head is not None:
            losses = next(self._losses)
            labels = *self._supervised(batch), lambda found: losses.weighted(found, batch.shares)
            self.engine.pipe_buffers["labels"][buffer_id] = labels

    def _positions(self, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
        """Position ids, and document ids if rows are packed; these stay on the host for computing their boundaries.

        With dropout position ids (b, s) and the tokens' numbers are one tensor, (2, b, s): an engine's inputs are
        tensors, of which only the last may be missing.
        """
        positions = batch.positions if batch.numbers is None else torch.stack((batch.positions, batch.numbers))
        positions = self._on_device(positions)
        return (positions,) if batch.documents is None else (positions, batch.documents)

    def _forward(self, buffer_id: int) -> None:
        self.engine.module.shares = self._shares[buffer_id]
        with self.each_forward():
            self.engine._exec_forward_pass(buffer_id)

    def _receive(self, buffer_id: int) -> None:
        """Receive the next micro-batch's hidden states, whose shape follows from that of its tokens."""
        from deepspeed.runtime.pipe import p2p

        batch = next(self._to_receive)
        self._shares[buffer_id] = batch.shares
        hidden = self.stage.empty_hidden(*batch.tokens.shape)
        p2p.recv(hidden, self.engine.prev_stage)
        self.engine.pipe_buffers["inputs"][buffer_id] = (hidden.requires_grad_(), *self._positions(batch))

    def _send(self, buffer_id: int) -> None:
        from deepspeed.runtime.pipe import p2p

        p2p.send(self.engine.pipe_buffers["outputs"][buffer_id], self.engine.next_stage)
