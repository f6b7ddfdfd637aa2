"""Checks during a run: trained tensors must get gradients, and the replicas of a tensor must stay equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Protocol

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import GradientGuard, find_mismatches
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.engine.engine import all_open
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.agreement import first_messages, max_over_ranks
from megatron_tiedlora.parallel.groups import ParallelGroups

# If v or B starts at zero, the gradient of its partner is zero at the first step. It must be non-zero at the second.
GUARDED_STEPS = 2


class RunFailed(UserError):
    """Training cannot continue. The last checkpoint is valid."""


def require_finite(what: str, value: float, *, step: int, saved_step: int | None) -> None:
    """Raise RunFailed if a number of `step` is nan or inf; `saved_step` is the step of the last checkpoint."""
    if not math.isfinite(value):
        last = f"the last checkpoint is of step {saved_step}" if saved_step else "no checkpoint was written yet"
        raise RunFailed(
            f"the {what} is {value} at step {step}; {last}. Lower --learning_rate, or look at the samples of this step"
        )


class Checked(Protocol):
    """What is checked: a runner, or one adapter of several."""

    @property
    def adapter(self) -> TiedAdapter:
        """The adapter's part on this rank."""
        ...

    @property
    def groups(self) -> ParallelGroups:
        """This rank's groups."""
        ...

    @property
    def config(self) -> EngineConfig:
        """Of the engine, which may shard the adapter."""
        ...

    @property
    def missing_gradients(self) -> Sequence[str]:
        """Tied tensors without a gradient in the step's sum."""
        ...


class StepChecks:
    """The checks of one start of a run. All ranks call each method together."""

    def __init__(self, runner: Checked, *, check_steps: int, guarded_steps: int = GUARDED_STEPS) -> None:
        """Start watching. Replicas are compared after the first `check_steps` steps and at saves (0: never).

        Args:
            guarded_steps: the gradients of so many steps are watched (0: of none).
        """
        self._runner = runner
        self._check_steps = check_steps
        self._steps = 0
        self._guarded_steps = guarded_steps
        self._guard = GradientGuard(runner.adapter) if guarded_steps else None

    def before_step(self, step: int, *, ranks_missing: float = 0.0) -> None:
        """Check the gradients of `step`, before any parameter changes.

        Args:
            ranks_missing: the number of ranks that missed a gradient in the tied sum (`Runner.missing_gradients`).

        Raises:
            RunFailed: a trained tensor has no gradient, or has only had zeros; on every rank, with its name. Or all
                gradients are zero, since a huge step has left the loss without a slope.
        """
        _raise(before_steps({"": (self, step)}, ranks_missing={"": ranks_missing}))

    def after_step(self, step: int) -> None:
        """Compare replicas after `step`. Raises RunFailed on every rank if they differ."""
        _raise(after_steps({"": (self, step)}))

    def before_save(self, step: int) -> None:
        """Compare replicas before a checkpoint of `step`. Raises RunFailed on every rank if they differ."""
        if self._check_steps > 0 and self._steps > self._check_steps:  # earlier steps were compared after the step
            _raise(_compare({"": (self, step)}))

    def _missing(self) -> str | None:
        """A text on the tensors without a gradient on this rank."""
        names = [*self._runner.missing_gradients, *(self._guard.missing() if self._guard else [])]
        layers = ", ".join(map(str, self._runner.adapter.part.layers))
        text = f"no gradient reaches {', '.join(dict.fromkeys(names))} from the stage with adapted layers {layers}"
        return text if names else None


Checks = Mapping[str, tuple[StepChecks, int]]  # of some adapters, by name, each with the number of its step


def before_steps(checks: Checks, *, ranks_missing: Mapping[str, float]) -> dict[str, RunFailed]:
    """`StepChecks.before_step` of several adapters, in as many messages as of one. Returns what fails, by name."""
    for own, _ in checks.values():
        own._steps += 1
    asked = [name for name, (own, _) in checks.items() if own._guard is not None or ranks_missing[name]]
    texts = first_messages([checks[name][0]._missing() for name in asked])
    failed = {
        name: RunFailed(f"step {checks[name][1]}: {text}; this step changed nothing")
        for name, text in zip(asked, texts, strict=True)
        if text
    }
    ending = {
        name: own._guard
        for name, (own, _) in checks.items()
        if name not in failed and own._guard is not None and own._steps >= own._guarded_steps
    }
    for name, (own, _) in checks.items():
        if own._guard is not None and name not in ending:
            own._guard.begin_step()
    if not ending:
        return failed
    found = iter(max_over_ranks([value for guard in ending.values() for value in (*guard.sizes(), *guard.largest())]))
    for name, guard in ending.items():
        own, step = checks[name]
        labels, of_step, of_values = guard.labels(), next(found), next(found)
        zero = [label for label, value in zip(labels, islice(found, len(labels)), strict=True) if value == 0]
        guard.remove()
        own._guard = None
        if zero and of_step == 0 and len(zero) < len(labels):
            grown = f" to {of_values:.3g}" if of_values else ""  # unknown where other ranks hold the tensors
            failed[name] = RunFailed(
                f"step {step}: every gradient is exactly zero, as values of the adapter have grown{grown};"
                " this step changed nothing. Lower --learning_rate"
            )
        elif zero:
            failed[name] = RunFailed(
                f"step {step}: the gradient of {', '.join(zero)} has been exactly zero since the run's start, so it"
                " would never be trained"
            )
    return failed


def after_steps(checks: Checks) -> dict[str, RunFailed]:
    """`StepChecks.after_step` of several adapters, in as many messages as of one. Returns what fails, by name."""
    return _compare({name: (own, step) for name, (own, step) in checks.items() if own._steps <= own._check_steps})


def _compare(checks: Checks) -> dict[str, RunFailed]:
    if not checks:
        return {}
    runners = [own._runner for own, _ in checks.values()]
    with ExitStack() as opened:
        for runner in runners:  # under ZeRO-3 data-parallel ranks hold shards
            opened.enter_context(all_open(runner.adapter, runner.config))
        mismatches = find_mismatches([runner.adapter for runner in runners], runners[0].groups)
    texts = first_messages([str(mismatch) if mismatch else None for mismatch in mismatches])
    return {
        name: RunFailed(f"after step {step} {text}; the ranks no longer train one adapter. This step was not saved")
        for (name, (_, step)), text in zip(checks.items(), texts, strict=True)
        if text
    }


def _raise(failed: Mapping[str, RunFailed]) -> None:
    for failure in failed.values():
        raise failure
