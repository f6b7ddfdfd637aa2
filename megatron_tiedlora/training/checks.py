"""Checks during a run: trained tensors must get gradients, and the replicas of a tensor must stay equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import islice

from megatron_tiedlora.adapters.tying import GradientGuard, find_mismatches
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.engine.optimizers import Missing
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import first_messages, max_over_ranks

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


class StepChecks:
    """The checks of one adapter in one start of a run."""

    def __init__(self, runner: Runner, name: str, *, check_steps: int, guarded_steps: int = GUARDED_STEPS) -> None:
        """Start watching. Replicas are compared after the first `check_steps` steps and at saves (0: never).

        Args:
            name: the adapter's.
            guarded_steps: the gradients of so many steps are watched (0: of none).
        """
        self._runner, self._name, self._adapter = runner, name, runner.adapters[name]
        self._check_steps = check_steps
        self._steps = 0
        self._guarded_steps = guarded_steps
        self._guard = GradientGuard(self._adapter) if guarded_steps else None

    def before_save(self, step: int) -> None:
        """Compare replicas before a checkpoint of `step`. Raises RunFailed on every rank if they differ."""
        if self._check_steps > 0 and self._steps > self._check_steps:  # earlier steps were compared after the step
            for failure in _compare({self._name: (self, step)}).values():
                raise failure

    def _missing(self, in_sums: Sequence[str]) -> str | None:
        """A text on the tensors without a gradient on this rank."""
        names = [*in_sums, *(self._guard.missing() if self._guard else [])]
        layers = ", ".join(map(str, self._adapter.part.layers))
        text = f"no gradient reaches {', '.join(dict.fromkeys(names))} from the stage with adapted layers {layers}"
        return text if names else None


Checks = Mapping[str, tuple[StepChecks, int]]  # of some adapters, by name, each with the number of its step


def before_steps(checks: Checks, *, missing: Missing, ranks_missing: Mapping[str, float]) -> dict[str, RunFailed]:
    """Check the gradients of a step, before any parameter changes. All ranks call it together.

    An adapter fails if a trained tensor has no gradient, or has only had zeros; or if all gradients are zero, since a
    huge step has left the loss without a slope.

    Args:
        missing: the tensors without a gradient in the sums over ranks, on this rank.
        ranks_missing: the number of ranks that miss one.

    Returns:
        the failures, the same on every rank, with the names of tensors.
    """
    for own, _ in checks.values():
        own._steps += 1
    asked = [name for name, (own, _) in checks.items() if own._guard is not None or ranks_missing[name]]
    texts = first_messages([checks[name][0]._missing(missing.get(name, ())) for name in asked])
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
    """Compare replicas after a step. All ranks call it together. Returns the failures, the same on every rank."""
    return _compare({name: (own, step) for name, (own, step) in checks.items() if own._steps <= own._check_steps})


def _compare(checks: Checks) -> dict[str, RunFailed]:
    if not checks:
        return {}
    runner = next(iter(checks.values()))[0]._runner
    with ExitStack() as opened:
        for name in checks:
            opened.enter_context(runner.optimizers.opened(name))
        mismatches = find_mismatches([own._adapter for own, _ in checks.values()], runner.groups)
    texts = first_messages([str(mismatch) if mismatch else None for mismatch in mismatches])
    return {
        name: RunFailed(f"after step {step} {text}; the ranks no longer train one adapter. This step was not saved")
        for (name, (_, step)), text in zip(checks.items(), texts, strict=True)
        if text
    }
