"""Checks while a run goes on: that trained tensors get gradients, and that copies of one tensor stay equal."""

from __future__ import annotations

import math

from megatron_tiedlora.adapters.tying import GradientGuard, find_mismatch
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.engine.engine import all_open
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import first_message, max_over_ranks

# With v = 0 or B = 0 at the start the partner's gradient is zero at the first step, so it must show by the second.
GUARDED_STEPS = 2


class RunFailed(UserError):
    """Training cannot go on; the last good checkpoint stands."""


def require_finite(what: str, value: float, *, step: int, saved_step: int | None) -> None:
    """Raise RunFailed where a number of `step` is nan or inf; `saved_step` is that of the last checkpoint."""
    if not math.isfinite(value):
        last = f"checkpoint of step {saved_step} stands" if saved_step else "no checkpoint was written yet"
        raise RunFailed(
            f"the {what} is {value} at step {step}; {last}. Lower --learning_rate, or look at the samples of this step"
        )


class StepChecks:
    """The checks of one run, or of one start of it; every rank calls each method at the same moment."""

    def __init__(self, runner: Runner, *, check_steps: int) -> None:
        """Watch from here on. Replicas are compared after the first `check_steps` steps and at saves (0: never)."""
        self._runner = runner
        self._check_steps = check_steps
        self._steps = 0
        self._guard: GradientGuard | None = GradientGuard(runner.adapter)

    def before_step(self, step: int, *, ranks_missing: float = 0.0) -> None:
        """With the gradients of `step` in place and before anything moves.

        Args:
            ranks_missing: how many ranks missed a gradient in the tied sum (`Runner.missing_gradients`).

        Raises:
            RunFailed: a trained tensor without a gradient, or with one that is still zero, by name; on every rank.
        """
        self._steps += 1
        if self._guard is not None or ranks_missing:
            self._stop_where_missing(step)
        if self._guard is None or self._steps < GUARDED_STEPS:
            return
        largest = max_over_ranks(self._guard.largest())
        zero = [label for label, value in zip(self._guard.labels(), largest, strict=True) if value == 0]
        self._guard.remove()
        self._guard = None
        if zero:
            raise RunFailed(
                f"step {step}: the gradient of {', '.join(zero)} is exactly zero since the run's start; it would never"
                " be trained"
            )

    def _stop_where_missing(self, step: int) -> None:
        names = [*self._runner.missing_gradients, *(self._guard.missing() if self._guard else [])]
        layers = ", ".join(map(str, self._runner.adapter.part.layers))
        text = f"no gradient reaches {', '.join(dict.fromkeys(names))} from the stage with adapted layers {layers}"
        if found := first_message(text if names else None):
            raise RunFailed(f"step {step}: {found}; nothing was changed by this step")

    def after_step(self, step: int) -> None:
        """With the tensors as `step` has left them. Raises RunFailed where copies differ, on every rank."""
        if self._steps <= self._check_steps:
            self._compare(step)

    def before_save(self, step: int) -> None:
        """Before a checkpoint of `step` is written. Raises RunFailed where copies differ, on every rank."""
        if self._check_steps > 0 and self._steps > self._check_steps:  # else it was compared after the step
            self._compare(step)

    def _compare(self, step: int) -> None:
        with all_open(self._runner.adapter, self._runner.config):  # under ZeRO-3 data ranks have parts and no copies
            mismatch = find_mismatch(self._runner.adapter, self._runner.groups)
        if found := first_message(str(mismatch) if mismatch else None):
            raise RunFailed(
                f"after step {step} {found}; the ranks no longer train one adapter; this step was not saved"
            )
