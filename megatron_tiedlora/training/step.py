"""One training step on all ranks: backward passes, what the ranks agree on, checks, the optimizer's step, a report.

A step knows no run folder, log or progress bar. `training/loop.py` takes the steps of a run, with evaluations and saves
between them; benchmarks and tests take steps on samples of their own.

    loss = (sum over all ranks of the losses of supervised tokens) / (supervised tokens of the global batch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.runtime.stopping import StopWatch
from megatron_tiedlora.training.checks import StepChecks, require_finite
from megatron_tiedlora.training.plan import RunPlan

# After a step longer than this the ranks agree on stopping after every micro-batch, so that a signal is answered within
# its grace time.
LONG_STEP_SECONDS = 10.0


@dataclass(frozen=True)
class StepVotes:
    """What a step sums over all ranks before weights move: an fp64 number for each attribute.

    Attributes:
        loss: summed over supervised tokens.
        seconds: of the forward and backward passes.
        save_due: whether rank 0 wants a checkpoint after this step.
        failed: whether rank 0 has a failure to raise.
        missing_gradients: how many ranks miss the gradient of a tied tensor.
        stopping: how many ranks wish to stop.
        signals: the sum of the signal numbers of these wishes.
    """

    loss: float
    seconds: float
    save_due: float
    failed: float
    missing_gradients: float
    stopping: float
    signals: float

    def summed(self) -> StepVotes:
        """The sums over all ranks, the same on each; all ranks call this together."""
        return StepVotes(*sum_over_ranks(astuple(self)))


@dataclass(frozen=True)
class StepReport:
    """A step that all ranks have taken; equal on every rank but for `seconds`.

    Attributes:
        loss: mean over the supervised tokens of the global batch.
        learning_rate: what the step was taken with.
        grad_norm: before clipping.
        seconds: from the first forward pass to the end of the checks.
        votes: summed over all ranks.
    """

    number: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    votes: StepVotes


class TrainStep:
    """The steps of one run, or of one start of it.

    Attributes:
        finished: the number of the last finished step.
        long_seconds: see LONG_STEP_SECONDS.
    """

    def __init__(
        self,
        plan: RunPlan,
        runner: Runner,
        stop: StopWatch,
        *,
        finished: int = 0,
        long_seconds: float = LONG_STEP_SECONDS,
    ) -> None:
        self.runner = runner
        self.finished = finished
        self.long_seconds = long_seconds
        self.checks = StepChecks(runner, check_steps=plan.settings.replica_check_steps)
        self._plan = plan
        self._stop = stop
        self._seconds = math.inf  # of the last step, mean over ranks; unknown yet, so the first one counts as long

    def run(
        self,
        step: TrainingStep,
        *,
        save_due: Callable[[], bool] = bool,
        failure: UserError | None = None,
        saved_step: int | None = None,
    ) -> StepReport:
        """Take one step on this rank's micro-batches; all ranks call this together.

        A wish to stop that comes during the step is in the votes of the report: the step is taken, and the caller stops
        when it has kept what it needs.

        Args:
            save_due: asked after the backward passes.
            failure: what went wrong on rank 0 since the last step; raised before weights move.
            saved_step: the step of the last checkpoint, for messages.

        Raises:
            RunStopped: in a long step, between micro-batches; on every rank.
            RunFailed: the loss or the gradient norm is not finite, a trained tensor gets no gradient, or copies of one
                differ; on every rank. Weights have moved where it is the norm or the copies.
            UserError: `failure` of rank 0; on every rank.
        """
        number, started, grid = self.finished + 1, time.monotonic(), self._plan.grid
        denominator = step.num_supervised / (self._plan.batches.accumulation_steps * grid.dp_size)
        inputs = [batch.model_input for batch in step.micro_batches]
        loss_sum = self.runner.accumulate(inputs, denominator, self._between_micro_batches)
        wish = self._stop.wish()
        votes = StepVotes(
            loss=loss_sum,
            seconds=time.monotonic() - started,
            save_due=save_due(),
            failed=failure is not None,
            missing_gradients=bool(self.runner.missing_gradients),
            stopping=wish > 0,
            signals=wish,
        ).summed()
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
            self._stop.agree(True)
