"""One step of each of several adapters: shared backward passes, one report, then each adapter's own checks and step.

An adapter whose loss, norm or checks fail takes no step; its failure is in the report. The others do not see it: its
tokens, factors, sums and norm are its own. Only what concerns a rank as such (a signal, a lost peer) ends all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.shared import shared_input, shared_rounds
from megatron_tiedlora.engine.bank_runner import Weight
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.agreement import raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.runtime.stopping import StepVotes, StopRequests
from megatron_tiedlora.training.adapter_plans import Plans, shared_plan
from megatron_tiedlora.training.build_bank import BuiltBank
from megatron_tiedlora.training.checks import RunFailed, StepChecks, after_steps, before_steps, require_finite
from megatron_tiedlora.training.step import LONG_STEP_SECONDS
from megatron_tiedlora.training.step_plan import micro_batch_capacity


@dataclass(frozen=True)
class OwnReport:
    """What one adapter's step was; equal on every rank. With a `failure` it took none."""

    number: int
    loss: float  # mean over the supervised tokens of its global batch
    learning_rate: float  # of this step
    grad_norm: float  # before clipping
    failure: str | None = None


@dataclass(frozen=True)
class GroupReport:
    """A step of all running adapters, by name; equal on every rank except for `seconds`."""

    adapters: Mapping[str, OwnReport]
    seconds: float  # from the first forward pass to the end of the checks
    votes: StepVotes  # summed over all ranks; their loss is 0, as each adapter has its own


@dataclass
class _One:
    """One adapter as `StepChecks` sees it."""

    adapter: TiedAdapter
    groups: ParallelGroups
    config: EngineConfig
    missing_gradients: list[str] = field(default_factory=list)


class GroupStep:
    """Takes the steps of several adapters in one start of a run."""

    def __init__(
        self,
        plans: Plans,
        built: BuiltBank,
        stop: StopRequests,
        *,
        finished: Mapping[str, int] | None = None,
        shares_micro_batches: bool = True,
        long_seconds: float = LONG_STEP_SECONDS,
    ) -> None:
        """Prepare the steps.

        Args:
            finished: the number of each adapter's last step; 0 if not given.
            shares_micro_batches: False to keep each micro-batch to one adapter.
        """
        self._plans, self._built, self._stop = plans, built, stop
        self._shared = shared_plan(plans)
        self.finished = {name: (finished or {}).get(name, 0) for name in plans}
        self.capacity = micro_batch_capacity(plans, shares=shares_micro_batches)
        self.runner = built.runner
        self._long_seconds = long_seconds
        self._seconds = math.inf  # of the last step, mean over ranks; unknown yet, so the first one counts as long
        runner = self.runner
        self._seen = {name: _One(a, runner.groups, runner.config) for name, a in built.step.bank.adapters.items()}
        self.checks = {
            name: StepChecks(one, check_steps=plans[name].settings.replica_check_steps)
            for name, one in self._seen.items()
        }

    def run(
        self,
        steps: Mapping[str, TrainingStep],
        *,
        save_due: Callable[[], bool] = bool,
        failure: UserError | None = None,
        saved_steps: Mapping[str, int] | None = None,
    ) -> GroupReport:
        """Take one step of each adapter in `steps`, on this rank's micro-batches; all ranks call this together.

        Args:
            steps: this rank's share of the global batch of each running adapter.
            save_due, failure: as in `TrainStep.run`.
            saved_steps: the step of each adapter's last checkpoint, for messages.

        Raises on every rank:
            RunStopped: between the micro-batches of a long step.
            UserError: `failure` of rank 0.
        """
        started, grid = time.monotonic(), self._shared.grid
        bank_step = self._built.step
        parts = shared_rounds(steps, capacity=self.capacity)
        weights = {name: self._weight(name, step) for name, step in steps.items()}
        inputs = [shared_input(some) for some in parts]
        summed = self.runner.accumulate_shares(inputs, weights, self._between_micro_batches)
        self._note_missing(bank_step.sum_gradients(steps))
        requested = self._stop.requested_signal()
        mine = StepVotes(
            loss=0.0,
            seconds=time.monotonic() - started,
            save_due=save_due(),
            failed=failure is not None,
            missing_gradients=0.0,
            stopping=requested > 0,
            signals=requested,
        )
        # Whether an adapter misses a gradient, and its loss: two numbers of each, in the message of the votes.
        missing = [float(bool(self._seen[name].missing_gradients)) for name in steps]
        agreed = sum_over_ranks([*mine, *missing, *(summed[name] for name in steps)])
        votes, own = StepVotes(*agreed[: len(mine)]), agreed[len(mine) :]
        if votes.failed:
            raise_on_every_rank(failure)
        norms = bank_step.norms(steps)
        reports = {
            name: OwnReport(
                self.finished[name] + 1,
                own[len(steps) + index] / step.num_supervised,
                bank_step.steps[name].learning_rate,
                norms[name],
            )
            for index, (name, step) in enumerate(steps.items())
        }
        failed = self._take(reports, dict(zip(steps, own[: len(steps)], strict=True)), saved_steps or {})
        reports |= {name: replace(reports[name], failure=str(failure)) for name, failure in failed.items()}
        bank_step.clear()
        self._seconds = votes.seconds / grid.world_size
        return GroupReport(reports, time.monotonic() - started, votes)

    def _take(
        self, reports: Mapping[str, OwnReport], ranks_missing: Mapping[str, float], saved_steps: Mapping[str, int]
    ) -> dict[str, RunFailed]:
        """Take the step of each adapter whose checks do not fail. Returns those that failed, which took none."""
        failed: dict[str, RunFailed] = {}

        def healthy() -> dict[str, tuple[StepChecks, int]]:
            return {name: (self.checks[name], own.number) for name, own in reports.items() if name not in failed}

        def must_be_finite(what: str, values: Mapping[str, float]) -> None:
            for name, (_, number) in healthy().items():
                try:
                    require_finite(what, values[name], step=number, saved_step=saved_steps.get(name))
                except RunFailed as failure:
                    failed[name] = failure

        must_be_finite("loss", {name: own.loss for name, own in reports.items()})
        failed |= before_steps(healthy(), ranks_missing=ranks_missing)
        must_be_finite("gradient norm", {name: own.grad_norm for name, own in reports.items()})
        for name in healthy():
            self._built.step.take(name, reports[name].grad_norm)
        failed |= after_steps(healthy())
        for name, (_, number) in healthy().items():
            self.finished[name] = number
        return failed

    def _weight(self, name: str, step: TrainingStep) -> Weight:
        share = self._plans[name].batches.accumulation_steps * self._shared.grid.dp_size
        return Weight(step.num_supervised / share, share)

    def _note_missing(self, missing: list[str]) -> None:
        for name, one in self._seen.items():
            prefix = f"{name}."
            one.missing_gradients = [found.removeprefix(prefix) for found in missing if found.startswith(prefix)]

    def _between_micro_batches(self) -> None:
        if self._seconds > self._long_seconds:
            self._stop.agree(True)
