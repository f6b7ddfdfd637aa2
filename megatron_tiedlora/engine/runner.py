"""One optimizer step and a forward pass on an engine, with one interface for one stage and for several.

Losses are sums over supervised tokens. Each is divided by N_global / (accumulation steps x dp) before its backward
pass, so that DeepSpeed's own division by the accumulation steps and its mean over the data-parallel ranks give the
mean over the supervised tokens of the global batch, whatever the split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tiedlora.adapters.adapter_bank import Shares
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import sum_tied_gradients_
from megatron_tiedlora.engine.engine import clip_gradients_
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.model.batch import MicroBatch, Supervised
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups

_LARGEST_SQUARE = torch.finfo(torch.float32).max


def reported_norm(norm: float) -> float:
    """A gradient norm as `Runner.take_step` reports it: inf or nan if its square is not finite in fp32."""
    if not norm >= 0:
        return math.nan
    return norm if norm * norm <= _LARGEST_SQUARE else math.inf


def inputs_to_fill(num_stages: int) -> int:
    """How many micro-batches keep the stages busy: with four per stage the pipeline bubble is a fifth of the time."""
    return 4 * num_stages if num_stages > 1 else 1


@dataclass
class Runner:
    """An engine with this rank's stage and groups. Its subclasses are `PlainRunner` and `PipelineRunner`."""

    engine: Any
    stage: Stage
    groups: ParallelGroups
    config: EngineConfig
    device: torch.device
    missing_gradients: list[str] = field(default_factory=list)  # tied tensors without a gradient in the step's sum
    each_forward: Callable[[], AbstractContextManager[None]] = nullcontext  # around each forward pass, for benchmarks

    @property
    def adapter(self) -> TiedAdapter:
        """The adapter's part on this rank."""
        assert self.stage.adapter is not None
        return self.stage.adapter

    @property
    def counts_loss(self) -> bool:
        """Whether a sum over all ranks includes this rank's loss, which is equal within a tensor-parallel group."""
        return self.stage.head is not None and self.groups.tensor.rank == 0

    @property
    def inputs_at_once(self) -> int:
        """The preferred number of micro-batches per call of `evaluate`."""
        return 1

    def accumulate(self, batches: Sequence[MicroBatch], denominator: float, between: Callable[[], None]) -> float:
        """Run a step's forward and backward passes: accumulates and averages gradients, and changes no parameter.

        Args:
            denominator: each micro-batch's summed loss is divided by it.
            between: called after a micro-batch if all ranks can stop together there; may raise.

        Returns:
            the summed loss of this rank's micro-batches; 0 if another rank counts it.
        """
        raise NotImplementedError

    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """The summed loss of some micro-batches without gradients; 0 if another rank counts it."""
        raise NotImplementedError

    def take_step(self) -> float:
        """Clip and take the optimizer step; returns the gradient norm before clipping.

        The norm is inf or nan if its square is not finite in fp32, the dtype of the second moments. Such a step must
        not be saved. This rule holds for all ZeRO stages. ZeRO 1 and 2 sum squares in fp32, skip the step and report
        inf (0.19.8) or -1 (earlier versions); ZeRO-0 and ZeRO-3 sum them in fp64 and take the step.
        """
        norm = None
        if self.config.zero_stage == 0:
            max_norm = float(self.config.values["gradient_clipping"])
            norm = clip_gradients_(self.adapter, self.groups, max_norm, self.device)
        self._step()
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        return reported_norm(norm)

    def _step(self) -> None:
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
        """Summed loss of a micro-batch, a scalar."""
        supervised = self._supervised(batch)
        tokens, positions = self._on_device(batch.tokens), self._on_device(batch.positions)
        numbers = None if batch.numbers is None else self._on_device(batch.numbers)
        # Document ids stay on the host, where their boundaries are computed.
        with self.each_forward():
            loss: torch.Tensor = self.engine(
                tokens, positions, supervised, documents=batch.documents, numbers=numbers, shares=batch.shares
            )
        return loss

    def accumulate(self, batches: Sequence[MicroBatch], denominator: float, between: Callable[[], None]) -> float:
        """See Runner."""
        self.engine.train()
        self.adapter.u_sum.start(len(batches))
        total = torch.zeros((), dtype=torch.float64, device=self.device)  # read once, after all micro-batches
        for index, batch in enumerate(batches, start=1):
            # The number of micro-batches varies between packed steps, so DeepSpeed cannot count them itself.
            self.engine.set_gradient_accumulation_boundary(index == len(batches))
            loss = self.forward(batch)
            self.engine.backward(loss / denominator)
            total += loss.detach()
            if index < len(batches):
                self.engine.step()  # changes no parameter before the last micro-batch
                between()
        return float(total) if self.counts_loss else 0.0

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """See Runner."""
        self.engine.eval()
        total = sum(float(self.forward(batch)) for batch in batches)
        return total if self.counts_loss else 0.0

    def _step(self) -> None:
        self.engine.step()


class PipelineRunner(Runner):
    """Several stages: DeepSpeed's PipelineEngine, its 1F1B schedule with our tied sum.

    The schedule's optimizer step is deferred to `take_step`, so that all ranks can agree on the loss before weights
    change. Every rank of a pipeline has the micro-batches, so stages exchange only hidden states and know their shapes;
    the engine would send the shapes first and wait for them (0.19.8). The engine looks up its instructions in a map, in
    which they are replaced.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        from deepspeed.runtime.pipe import schedule

        self.engine._INSTRUCTION_MAP = {
            **type(self.engine)._INSTRUCTION_MAP,
            schedule.LoadMicroBatch: lambda _engine, buffer_id: self._load(buffer_id),
            schedule.ForwardPass: lambda _engine, buffer_id: self._forward(buffer_id),
            schedule.RecvActivation: lambda _engine, buffer_id: self._receive(buffer_id),
            schedule.SendActivation: lambda _engine, buffer_id: self._send(buffer_id),
            schedule.ReduceTiedGrads: lambda _engine: self._sum_tied_gradients(),
            schedule.OptimizerStep: lambda _engine: None,
        }

    def _sum_tied_gradients(self) -> None:
        self.missing_gradients = sum_tied_gradients_(self.adapter, self.groups)

    @property
    def inputs_at_once(self) -> int:
        """See Runner."""
        return inputs_to_fill(self.groups.pipeline.size)

    def accumulate(self, batches: Sequence[MicroBatch], denominator: float, between: Callable[[], None]) -> float:
        """See Runner; stages run different micro-batches at a time, so `between` is never called."""
        from deepspeed.runtime.pipe.schedule import TrainSchedule

        self.engine.module.train()
        self.adapter.u_sum.start(len(batches))
        return self._run(TrainSchedule, batches, denominator)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> float:
        """See Runner."""
        from deepspeed.runtime.pipe.schedule import InferenceSchedule

        self.engine.module.eval()
        return self._run(InferenceSchedule, batches, 1.0)

    def _run(self, schedule: Any, batches: Sequence[MicroBatch], denominator: float) -> float:
        self.engine.total_loss = None
        self.engine._compute_loss = True
        self._to_load, self._to_receive, self._denominator = iter(batches), iter(batches), denominator
        self._shares: dict[int, Shares] = {}
        self.engine._exec_schedule(
            schedule(micro_batches=len(batches), stages=self.groups.pipeline.size, stage_id=self.groups.pipeline.rank)
        )
        return float(self.engine.total_loss) * denominator if self.counts_loss else 0.0

    def _load(self, buffer_id: int) -> None:
        """Load what the first and the last stage need of the next micro-batch besides hidden states."""
        batch = next(self._to_load)
        self._shares[buffer_id] = batch.shares
        if self.stage.embedding is not None:
            self.engine.pipe_buffers["inputs"][buffer_id] = (self._on_device(batch.tokens), *self._positions(batch))
        if self.stage.head is not None:
            self.engine.pipe_buffers["labels"][buffer_id] = self._labels(batch)

    def _labels(self, batch: MicroBatch) -> tuple[Any, ...]:
        denominator = self._denominator
        return *self._supervised(batch), lambda loss: loss / denominator

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

    def _step(self) -> None:
        self.engine._exec_optimizer_step()


def make_runner(
    engine: Any, stage: Stage, groups: ParallelGroups, config: EngineConfig, device: torch.device
) -> Runner:
    """The runner for an engine of one or of several stages."""
    kind = PlainRunner if groups.pipeline.size == 1 else PipelineRunner
    return kind(engine, stage, groups, config, device)
