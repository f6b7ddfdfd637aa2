"""A step's forward and backward passes on an engine for several adapters, whose micro-batches have shares.

The engine trains the anchor alone, whose gradient is zero, and is never told that a step ends: it sums nothing over
ranks. `BankStep` does what follows the backward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.adapters.adapter_bank import Shares
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.engine.runner import PipelineRunner, PlainRunner, Runner
from megatron_tiedlora.model.batch import MicroBatch


class Weight(NamedTuple):
    """What a run of one adapter divides the summed loss of a micro-batch by, in this order.

    Attributes:
        denominator: supervised tokens of its global batch / (accumulation steps x data-parallel size).
        accumulation: accumulation steps x data-parallel size.
    """

    denominator: float
    accumulation: int


@dataclass
class ShareLosses:
    """The losses of a step, by adapter: what to differentiate of each micro-batch, and the sums so far."""

    weights: Mapping[str, Weight]
    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # fp64, read once, after all micro-batches

    def weighted(self, losses: torch.Tensor, shares: Shares) -> torch.Tensor:
        """The scalar whose gradient is each loss's own weight; the losses (shares,) are added to the sums."""
        total = losses.new_zeros(())
        for share, loss in zip(shares, losses.unbind(), strict=True):
            weight = self.weights[share.adapter]
            total = total + loss / weight.denominator / weight.accumulation
            before = self.sums.get(share.adapter, torch.zeros((), dtype=torch.float64, device=loss.device))
            self.sums[share.adapter] = before + loss.detach()
        return total

    def totals(self, *, counted: bool) -> dict[str, float]:
        """The summed loss of each adapter; 0 if another rank counts it."""
        found = {name: self.sums[name] for name in self.weights if name in self.sums and counted}
        return dict.fromkeys(self.weights, 0.0) | {name: float(total) for name, total in found.items()}


class BankPlainRunner(PlainRunner):
    """One stage: DeepSpeedEngine, ZeRO-0, or ZeRO-3 for the base."""

    def accumulate_shares(
        self, batches: Sequence[MicroBatch], weights: Mapping[str, Weight], between: Callable[[], None]
    ) -> dict[str, float]:
        """Run a step's forward and backward passes: accumulates gradients, and changes no parameter.

        Args:
            weights: of every adapter that takes a step.
            between: as in `Runner.accumulate`.

        Returns:
            the summed loss of each adapter on this rank; 0 if another rank counts it.
        """
        self.engine.train()
        losses = ShareLosses(weights)
        for index, batch in enumerate(batches, start=1):
            self.engine.set_gradient_accumulation_boundary(False)
            self.engine.backward(losses.weighted(self.forward(batch), batch.shares))
            self.engine.step()  # changes nothing
            if index < len(batches):
                between()
        return losses.totals(counted=self.counts_loss)

    @torch.no_grad()
    def evaluate_shares(self, batches: Sequence[MicroBatch]) -> list[dict[str, float]]:
        """The summed loss of each batch's adapters without gradients; 0 if another rank counts it."""
        self.engine.eval()
        losses = [_unweighted(batch) for batch in batches]
        for of_batch, batch in zip(losses, batches, strict=True):
            of_batch.weighted(self.forward(batch), batch.shares)
        return [of_batch.totals(counted=self.counts_loss) for of_batch in losses]


class BankPipelineRunner(PipelineRunner):
    """Several stages: the micro-batches of all adapters in one 1F1B schedule."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        from deepspeed.runtime.pipe import schedule

        self._losses: Iterator[ShareLosses] = iter(())  # where those of the next micro-batch that is loaded go
        self.engine._INSTRUCTION_MAP |= {
            schedule.ReduceTiedGrads: lambda _engine: None,
            schedule.ReduceGrads: lambda _engine: None,
        }

    def accumulate_shares(
        self, batches: Sequence[MicroBatch], weights: Mapping[str, Weight], between: Callable[[], None]
    ) -> dict[str, float]:
        """See BankPlainRunner; stages run different micro-batches at a time, so `between` is never called."""
        from deepspeed.runtime.pipe.schedule import TrainSchedule

        self.engine.module.train()
        losses = ShareLosses(weights)
        self._losses = repeat(losses)
        self._run(TrainSchedule, batches, 1.0)
        return losses.totals(counted=self.counts_loss)

    @torch.no_grad()
    def evaluate_shares(self, batches: Sequence[MicroBatch]) -> list[dict[str, float]]:
        """See BankPlainRunner."""
        from deepspeed.runtime.pipe.schedule import InferenceSchedule

        self.engine.module.eval()
        losses = [_unweighted(batch) for batch in batches]
        self._losses = iter(losses)
        self._run(InferenceSchedule, batches, 1.0)
        return [of_batch.totals(counted=self.counts_loss) for of_batch in losses]

    def _labels(self, batch: MicroBatch) -> tuple[Any, ...]:
        losses = next(self._losses)
        return *self._supervised(batch), lambda found: losses.weighted(found, batch.shares)


def _unweighted(batch: MicroBatch) -> ShareLosses:
    return ShareLosses({share.adapter: Weight(1.0, 1) for share in batch.shares})


class OwnRunner(Runner):
    """One adapter of a bank, as the runner of a run of its own has it, between steps. It takes none itself."""

    def __init__(self, shared: BankPlainRunner | BankPipelineRunner, name: str) -> None:
        super().__init__(shared.engine, shared.stage, shared.groups, shared.config, shared.device)
        assert shared.stage.bank is not None
        self._own = shared.stage.bank.adapters[name]

    @property
    def adapter(self) -> TiedAdapter:
        """See Runner."""
        return self._own
