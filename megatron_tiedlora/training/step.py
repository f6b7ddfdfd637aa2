"""One training step on all ranks: backward passes, what the ranks agree on, checks, the optimizers' steps, a report.

A step is of one or more adapters, which share the backward passes. One whose loss, norm or checks fail takes no step;
the others do not see it, as its tokens, factors, sums and norm are its own. A step knows no run folder, log or progress
bar. `training/loop.py` takes the steps of a run; benchmarks and tests take steps on samples of their own.

    loss = (sum over all ranks of the losses of supervised tokens) / (supervised tokens of the global batch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.loader import TrainingStep, shared_micro_batch, shared_rounds
from megatron_tiedlora.engine.optimizers import Missing
from megatron_tiedlora.engine.runner import Divisors, Runner
from megatron_tiedlora.parallel.agreement import raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.planning.adapter_plans import Plans
from megatron_tiedlora.runtime.stopping import LONG_STEP_SECONDS, StepVotes, StopRequests
from megatron_tiedlora.training.checks import RunFailed, StepChecks, after_steps, before_steps, require_finite


@dataclass(frozen=True)
class AdapterStep:
    """What one adapter's step was; equal on every rank. With a `failure` it took none."""

    number: int
    loss: float  # mean over the supervised tokens of its global batch
    learning_rate: float  # of this step
    grad_norm: float = math.nan  # before clipping
    failure: UserError | None = None


@dataclass(frozen=True)
class StepReport:
    """A step of all running adapters, by name; equal on every rank except for `seconds`."""

    adapters: Mapping[str, AdapterStep]
    seconds: float  # from the first forward pass to the end of the checks
    votes: StepVotes  # summed over all ranks

    @property
    def only(self) -> AdapterStep:
        """That of the only adapter. Raises UserError if it failed."""
        (found,) = self.adapters.values()
        if found.failure is not None:
            raise found.failure
        return found


@dataclass
class TrainStep:
    """Takes the steps of one start of a run.

    Attributes:
        finished: the number of each adapter's last step; 0 if not given.
        capacity: tokens of a micro-batch that adapters share, padding included; 0: none is shared.
    """

    plans: Plans
    runner: Runner
    stop: StopRequests
    finished: dict[str, int] = field(default_factory=dict)
    capacity: int = 0
    long_seconds: float = LONG_STEP_SECONDS
    _seconds: float = math.inf  # of the last step, mean over ranks; unknown yet, so the first one counts as long

    def __post_init__(self) -> None:
        self.finished = dict.fromkeys(self.plans, 0) | self.finished
        self.checks = {
            name: StepChecks(self.runner, name, check_steps=plan.settings.replica_check_steps)
            for name, plan in self.plans.items()
        }
        self._grid = next(iter(self.plans.values())).grid

    def run(
        self,
        steps: Mapping[str, TrainingStep],
        *,
        save_due: Callable[[], bool] = bool,
        failure: UserError | None = None,
        failures: Mapping[str, UserError] | None = None,
        saved_steps: Mapping[str, int] | None = None,
    ) -> StepReport:
        """Take one step of each adapter in `steps`, on this rank's micro-batches; all ranks call this together.

        A request to stop during the step is in the report's votes; the caller stops once it has saved the step.

        Args:
            steps: this rank's share of the global batch of each running adapter.
            save_due: called after the backward passes; whether rank 0 wants a checkpoint.
            failure: an error on rank 0 since the last step; it is raised before weights change.
            failures: errors on rank 0 since the last step by adapter; such an adapter takes no step.
            saved_steps: the step of each adapter's last checkpoint, for messages.

        Raises on every rank:
            RunStopped: between the micro-batches of a long step.
            UserError: `failure` of rank 0.
        """
        started, optimizers, ranks = time.monotonic(), self.runner.optimizers, self._grid.world_size
        inputs = [shared_micro_batch(some) for some in shared_rounds(steps, capacity=self.capacity)]
        divisors = {name: self._divisors(name, step) for name, step in steps.items()}
        summed = self.runner.accumulate(inputs, divisors, self._between_micro_batches)
        missing = optimizers.sum_gradients(steps)
        requested = self.stop.requested_signal()
        mine = StepVotes(
            seconds=time.monotonic() - started,
            save_due=save_due(),
            failed=failure is not None,
            stopping=requested > 0,
            signals=requested,
        )
        # Whether an adapter misses a gradient or has failed, and its loss, are in the message of the votes.
        failures = failures or {}
        states = [float(bool(missing.get(name)) + (ranks + 1) * (name in failures)) for name in steps]
        agreed = sum_over_ranks([*mine, *states, *(summed[name] for name in steps)])
        votes, own = StepVotes(*agreed[: len(mine)]), agreed[len(mine) :]
        if votes.failed:
            raise_on_every_rank(failure)
        rates = {name: optimizers.learning_rate(name) for name in steps}
        reports = {
            name: AdapterStep(self.finished[name] + 1, loss / step.num_supervised, rates[name])
            for (name, step), loss in zip(steps.items(), own[len(steps) :], strict=True)
        }
        failed, ranks_missing = dict[str, UserError](), dict[str, float]()
        for name, state in zip(steps, own, strict=False):
            has_failed, ranks_missing[name] = divmod(state, ranks + 1)
            if has_failed:
                try:
                    raise_on_every_rank(failures.get(name))
                except UserError as error:
                    failed[name] = error
        reports = self._take(reports, missing, ranks_missing, saved_steps or {}, failed)
        optimizers.clear()
        self._seconds = votes.seconds / ranks
        return StepReport(reports, time.monotonic() - started, votes)

    def _take(
        self,
        reports: dict[str, AdapterStep],
        missing: Missing,
        ranks_missing: Mapping[str, float],
        saved_steps: Mapping[str, int],
        failed: dict[str, UserError],
    ) -> dict[str, AdapterStep]:
        """Take the step of each adapter that has not `failed`, also by its checks. Returns the reports with norms and
        failures."""

        def healthy() -> dict[str, tuple[StepChecks, int]]:
            return {name: (self.checks[name], own.number) for name, own in reports.items() if name not in failed}

        def must_be_finite(what: str, values: Mapping[str, float]) -> None:
            for name, (_, number) in healthy().items():
                try:
                    require_finite(what, values.get(name, 0.0), step=number, saved_step=saved_steps.get(name))
                except RunFailed as failure:
                    failed[name] = failure

        must_be_finite("loss", {name: own.loss for name, own in reports.items()})
        norms = self.runner.optimizers.norms(list(reports))
        failed |= before_steps(healthy(), missing=missing, ranks_missing=ranks_missing)
        must_be_finite("gradient norm", norms)
        norms |= {name: self.runner.optimizers.take(name, norms.get(name)) for name in healthy()}
        must_be_finite("gradient norm", norms)  # of a step by an engine it is only known now
        failed |= after_steps(healthy())
        self.finished |= {name: number for name, (_, number) in healthy().items()}
        return {
            name: replace(own, grad_norm=norms.get(name, math.nan), failure=failed.get(name))
            for name, own in reports.items()
        }

    def _divisors(self, name: str, step: TrainingStep) -> Divisors:
        return self.runner.optimizers.divisors(
            step.num_supervised,
            accumulation_steps=self.plans[name].batches.accumulation_steps,
            dp_size=self._grid.dp_size,
        )

    def _between_micro_batches(self) -> None:
        if self._seconds > self.long_seconds:
            self.stop.agree(True)
