"""Take one training step on all ranks: run the backward passes, check the gradients, and update the adapters.

A step trains one or more adapters, which share the backward passes. An adapter fails if its loss or gradient norm is
not finite, or if a check fails. The other adapters are still updated, since no adapter uses the gradients of another
adapter. This module uses no run folder, log or progress bar. `training/loop.py` runs all steps of a run. Benchmarks and
tests run single steps on their own samples.

There are two checks: each trained tensor must receive a gradient, and the replicas of a tensor must stay equal.

    loss = (sum over all ranks of the losses of supervised tokens) / (supervised tokens of the global batch)
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice

from megatron_tiedlora.adapters.tying import GradientGuard, find_mismatches
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.data.loader import TrainingStep, shared_micro_batch, shared_rounds
from megatron_tiedlora.engine.optimizers import Missing
from megatron_tiedlora.engine.runner import Divisors, Runner
from megatron_tiedlora.parallel.agreement import first_messages, max_over_ranks, raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.planning.adapter_plans import Plans
from megatron_tiedlora.runtime.stopping import LONG_STEP_SECONDS, StepVotes, StopRequests

# Checks ---------------------------------------------------------------------------------------------------------------


# If v or B is initialised to zero, the other factors have zero gradients at the first step, but not at the second.
GUARDED_STEPS = 2


class RunFailed(UserError):
    """The error raised if training cannot continue. The last checkpoint stays valid."""


def require_finite(what: str, value: float, *, step: int, saved_step: int | None) -> None:
    """Raise RunFailed if a value of `step` is nan or inf. `saved_step` is the step of the last checkpoint."""
    if not math.isfinite(value):
        last = f"the last checkpoint is from step {saved_step}" if saved_step else "no checkpoint was written yet"
        raise RunFailed(
            f"the {what} is {value} at step {step}; {last}. Lower --learning_rate, or check the samples of this step"
        )


class StepChecks:
    """The checks of one adapter in one launch of a run."""

    def __init__(self, runner: Runner, name: str, *, check_steps: int, guards: bool = True) -> None:
        """Create the checks of adapter `name`. Replicas are compared after each of the first `check_steps` steps and
        before each save. They are never compared if `check_steps` is 0. `guards` is false if gradients may be zero."""
        self._runner, self._name, self._adapter = runner, name, runner.adapters[name]
        self._check_steps = check_steps
        self._steps = 0
        self._guard = GradientGuard(self._adapter) if guards else None

    def before_save(self, step: int) -> None:
        """Compare replicas before the checkpoint of `step` is saved. Raise RunFailed on every rank if they differ."""
        if self._check_steps > 0 and self._steps > self._check_steps:  # earlier steps were already compared
            for failure in _compare({self._name: (self, step)}).values():
                raise failure


Checks = Mapping[str, tuple[StepChecks, int]]  # by adapter name: its checks and the number of its step


def before_steps(checks: Checks, *, missing: Missing, ranks_missing: Mapping[str, float]) -> dict[str, RunFailed]:
    """Check the gradients of a step before any parameter changes. All ranks must call this function.

    An adapter fails if a trained tensor has no gradient, or if all gradients of a tensor so far were zero. It also
    fails if all gradients of the adapter become zero. This happens if a very large update has made the loss constant.

    Args:
        missing: the tensors without a gradient on this rank, by adapter name.
        ranks_missing: the number of ranks on which a gradient is missing, by adapter name.

    Returns:
        the failures by adapter name, the same on every rank. Each message names the tensors.
    """
    for own, _ in checks.values():
        own._steps += 1
    asked = [name for name, (own, _) in checks.items() if own._guard is not None or ranks_missing[name]]
    mine: list[str | None] = []
    for name in asked:
        own, _ = checks[name]
        names = ", ".join(dict.fromkeys([*missing.get(name, ()), *(own._guard.missing() if own._guard else [])]))
        layers = ", ".join(map(str, own._adapter.part.layers))
        text = f"no gradient reaches {names} from the stage with adapted layers {layers}"
        mine.append(text if names else None)
    texts = first_messages(mine)
    failed = {
        name: RunFailed(f"step {checks[name][1]}: {text}; this step changed no weights. Please report this error")
        for name, text in zip(asked, texts, strict=True)
        if text
    }
    ending = {
        name: own._guard
        for name, (own, _) in checks.items()
        if name not in failed and own._guard is not None and own._steps >= GUARDED_STEPS
    }
    for name, (own, _) in checks.items():
        if own._guard is not None and name not in ending:
            own._guard.begin_step()
    if not ending:
        return failed
    largest = {name: guard.largest() for name, guard in ending.items()}
    values = [value for name, guard in ending.items() for value in (*guard.sizes(), *largest[name].values())]
    found = iter(max_over_ranks(values))
    for name, guard in ending.items():
        own, step = checks[name]
        labels, of_step, of_values = list(largest[name]), next(found), next(found)
        zero = [label for label, value in zip(labels, islice(found, len(labels)), strict=True) if value == 0]
        guard.remove()
        own._guard = None
        if zero and of_step == 0 and len(zero) < len(labels):
            grown = f" to {of_values:.3g}" if of_values else ""  # unknown where other ranks hold the tensors
            failed[name] = RunFailed(
                f"step {step}: every gradient is exactly zero, because adapter values have grown{grown};"
                " this step changed no weights. Lower --learning_rate"
            )
        elif zero:
            failed[name] = RunFailed(
                f"step {step}: the gradient of {', '.join(zero)} has been exactly zero since the run's start, so"
                " training cannot change it. Check the values of the --init_from adapter, if any, or report this error"
            )
    return failed


def after_steps(checks: Checks) -> dict[str, RunFailed]:
    """Compare replicas after a step. Return the failures by adapter name, the same on every rank.

    All ranks must call this."""
    return _compare({name: (own, step) for name, (own, step) in checks.items() if own._steps <= own._check_steps})


def _compare(checks: Checks) -> dict[str, RunFailed]:
    if not checks:
        return {}
    runner = next(iter(checks.values()))[0]._runner
    with ExitStack() as opened:
        for name in checks:
            opened.enter_context(runner.optimizers.opened(name))
        texts = find_mismatches([own._adapter for own, _ in checks.values()], runner.groups)
    texts = first_messages(texts)
    return {
        name: RunFailed(f"after step {step} {text}; the step was not saved. Start again, from a checkpoint if any")
        for (name, (_, step)), text in zip(checks.items(), texts, strict=True)
        if text
    }


@dataclass(frozen=True)
class AdapterStep:
    """The result of a step for one adapter, the same on every rank. The step does not count if `failure` is set."""

    number: int
    loss: float  # mean over the supervised tokens of the adapter's global batch
    learning_rate: float  # used in this step
    grad_norm: float = math.nan  # before clipping
    failure: UserError | None = None


@dataclass(frozen=True)
class StepReport:
    """The results of a step by adapter name. All ranks have the same values except for `seconds`."""

    adapters: Mapping[str, AdapterStep]
    seconds: float  # from the first forward pass to the end of the checks
    votes: StepVotes  # summed over all ranks

    @property
    def only(self) -> AdapterStep:
        """The result of the only adapter. Raises UserError if the adapter failed."""
        (found,) = self.adapters.values()
        if found.failure is not None:
            raise found.failure
        return found


def take_steps(
    runner: Runner,
    checks: Mapping[str, StepChecks],
    reports: Mapping[str, AdapterStep],
    missing: Missing,
    ranks_missing: Mapping[str, float],
    saved_steps: Mapping[str, int],
    failed: dict[str, UserError],
) -> dict[str, AdapterStep]:
    """Update each adapter that passes its checks. Return the reports with gradient norms and failures.

    All ranks must call this function, after the gradients of these adapters were summed.

    Args:
        reports: the results so far, by adapter name.
        missing, ranks_missing: see `before_steps`.
        saved_steps: the step of each adapter's last checkpoint, for error messages.
        failed: the adapters that have failed already, which are not updated.
    """

    def healthy() -> dict[str, tuple[StepChecks, int]]:
        return {name: (checks[name], own.number) for name, own in reports.items() if name not in failed}

    def must_be_finite(what: str, values: Mapping[str, float]) -> None:
        for name, (_, number) in healthy().items():
            try:
                require_finite(what, values.get(name, 0.0), step=number, saved_step=saved_steps.get(name))
            except RunFailed as failure:
                failed[name] = failure

    must_be_finite("loss", {name: own.loss for name, own in reports.items()})
    norms = runner.optimizers.norms(list(reports))
    failed |= before_steps(healthy(), missing=missing, ranks_missing=ranks_missing)
    must_be_finite("gradient norm", norms)
    norms |= {name: runner.optimizers.take(name, norms.get(name)) for name in healthy()}
    must_be_finite("gradient norm", norms)  # an engine's norm is only known after its step
    failed |= after_steps(healthy())
    return {
        name: replace(own, grad_norm=norms.get(name, math.nan), failure=failed.get(name))
        for name, own in reports.items()
    }


@dataclass
class TrainStep:
    """Runs the training steps of one launch of a run.

    Attributes:
        finished: the number of the last finished step of each adapter; 0 by default.
        capacity: the maximum number of tokens in a micro-batch with samples of several adapters, including padding.
            If it is 0, each micro-batch has the samples of one adapter.
    """

    plans: Plans
    runner: Runner
    stop: StopRequests
    finished: dict[str, int] = field(default_factory=dict)
    capacity: int = 0
    long_seconds: float = LONG_STEP_SECONDS
    _seconds: float = math.inf  # mean over ranks for the previous step; the first step is treated as long

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
        """Train each adapter in `steps` for one step on this rank's micro-batches, and return the report.

        All ranks must call this method. The votes in the report include requests to stop that arrived during the step.
        The caller saves the step before it stops.

        Args:
            steps: this rank's samples of the global batch, for each running adapter.
            save_due: a function that returns whether rank 0 requests a checkpoint; called after the backward passes.
            failure: an error on rank 0 since the previous step. It is raised before any weight changes.
            failures: errors on rank 0 since the previous step, by adapter name. These adapters are not updated.
            saved_steps: the step of each adapter's last checkpoint, for error messages.

        Raises on every rank:
            RunStopped: ranks agreed to stop between the micro-batches of a long step.
            UserError: rank 0 passed a `failure`.
        """
        started, optimizers, ranks = time.monotonic(), self.runner.optimizers, self._grid.world_size
        inputs = [shared_micro_batch(some) for some in shared_rounds(steps, capacity=self.capacity)]
        divisors: dict[str, Divisors] = {}
        for name, step in steps.items():
            num_passes = self.plans[name].batches.accumulation_steps * self._grid.dp_size
            divisors[name] = optimizers.divisors(step.num_supervised, num_passes)
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
        # The message with the votes also has each adapter's missing gradients, failure and loss.
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
        checks = {name: self.checks[name] for name in reports}
        reports = take_steps(self.runner, checks, reports, missing, ranks_missing, saved_steps or {}, failed)
        self.finished |= {name: own.number for name, own in reports.items() if own.failure is None}
        optimizers.clear(self.plans)
        self._seconds = votes.seconds / ranks
        return StepReport(reports, time.monotonic() - started, votes)

    def _between_micro_batches(self) -> None:
        if self._seconds > self.long_seconds:
            self.stop.agree(True)
