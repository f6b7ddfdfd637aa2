"""One training step on all ranks: backward passes, what the ranks agree on, checks, the optimizer's step, a report.

A step knows no run folder, log or progress bar. `training/loop.py` takes the steps of a run, with evaluations and saves
between them; benchmarks and tests take steps on samples of their own.

    loss = (sum over all ranks of the losses of supervised tokens) / (supervised tokens of the global batch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.runtime.stopping import StepVotes, StopRequests
from megatron_tiedlora.training.checks import StepChecks, require_finite
from megatron_tiedlora.training.plan import RunPlan

# After a longer step the ranks agree on stopping after every micro-batch: a signal is answered within its grace time.
LONG_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class StepReport:
    """A step that all ranks have taken; equal on every rank except for `seconds`."""

    number: int
    loss: float  # mean over the supervised tokens of the global batch
    learning_rate: float  # of this step
    grad_norm: float  # before clipping
    seconds: float  # from the first forward pass to the end of the checks
    votes: StepVotes  # summed over all ranks


@dataclass
class TrainStep:
    """Takes the steps of one start of a run. `finished` is the number of the last one."""

    plan: RunPlan
    runner: Runner
    stop: StopRequests
    finished: int = 0
    long_seconds: float = LONG_STEP_SECONDS
    _seconds: float = math.inf  # of the last step, mean over ranks; unknown yet, so the first one counts as long

    def __post_init__(self) -> None:
        self.checks = StepChecks(self.runner, check_steps=self.plan.settings.replica_check_steps)

    def run(
        self,
        step: TrainingStep,
        *,
        save_due: Callable[[], bool] = bool,
        failure: UserError | None = None,
        saved_step: int | None = None,
    ) -> StepReport:
        """Take one step on this rank's micro-batches; all ranks call this together.

        A request to stop during the step is in the report's votes; the caller stops once it has saved the step.

        Args:
            save_due: called after the backward passes; whether rank 0 wants a checkpoint.
            failure: an error on rank 0 since the last step; it is raised before weights change.
            saved_step: the step of the last checkpoint, for messages.

        Raises on every rank:
            RunStopped: between the micro-batches of a long step.
            RunFailed: the loss or the gradient norm is not finite, or one of StepChecks fails.
            UserError: `failure` of rank 0.
        """
        number, started, grid = self.finished + 1, time.monotonic(), self.plan.grid
        denominator = step.num_supervised / (self.plan.batches.accumulation_steps * grid.dp_size)
        loss_sum = self.runner.accumulate(step.micro_batches, denominator, self._between_micro_batches)
        requested = self.stop.requested_signal()
        mine = StepVotes(
            loss=loss_sum,
            seconds=time.monotonic() - started,
            save_due=save_due(),
            failed=failure is not None,
            missing_gradients=bool(self.runner.missing_gradients),
            stopping=requested > 0,
            signals=requested,
        )
        votes = StepVotes(*sum_over_ranks(mine))
        if votes.failed:
            raise_on_every_rank(failure)
        loss, rate = votes.loss / step.num_supervised, self.runner.engine.get_lr()[0]
        require_finite("loss", loss, step=number, saved_step=saved_step)
        self.checks.before_step(number, ranks_missing=votes.missing_gradients)
        norm = self.runner.take_step()
        require_finite("gradient norm", norm, step=number, saved_step=saved_step)
        self.checks.after_step(number)
        self.finished = number
        self._seconds = votes.seconds / grid.world_size
        return StepReport(number, loss, rate, norm, time.monotonic() - started, votes)

    def _between_micro_batches(self) -> None:
        if self._seconds > self.long_seconds:
            self.stop.agree(True)
