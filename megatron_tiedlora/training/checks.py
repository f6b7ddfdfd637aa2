"""Checks during a run: trained tensors must get gradients, and the replicas of a tensor must stay equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import GradientGuard, find_mismatch
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.engine.engine import all_open
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.parallel.agreement import first_message, max_over_ranks
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
            RunFailed: a trained tensor has no gradient, or has only had zeros; on every rank, with its name.
        """
        self._steps += 1
        if self._guard is not None or ranks_missing:
            self._stop_where_missing(step)
        if self._guard is None or self._steps < self._guarded_steps:
            return
        largest = max_over_ranks(self._guard.largest())
        zero = [label for label, value in zip(self._guard.labels(), largest, strict=True) if value == 0]
        self._guard.remove()
        self._guard = None
        if zero:
            raise RunFailed(
                f"step {step}: the gradient of {', '.join(zero)} has been exactly zero since the run's start, so it"
                " would never be trained"
            )

    def _stop_where_missing(self, step: int) -> None:
        names = [*self._runner.missing_gradients, *(self._guard.missing() if self._guard else [])]
        layers = ", ".join(map(str, self._runner.adapter.part.layers))
        text = f"no gradient reaches {', '.join(dict.fromkeys(names))} from the stage with adapted layers {layers}"
        if found := first_message(text if names else None):
            raise RunFailed(f"step {step}: {found}; this step changed nothing")

    def after_step(self, step: int) -> None:
        """Compare replicas after `step`. Raises RunFailed on every rank if they differ."""
        if self._steps <= self._check_steps:
            self._compare(step)

    def before_save(self, step: int) -> None:
        """Compare replicas before a checkpoint of `step`. Raises RunFailed on every rank if they differ."""
        if self._check_steps > 0 and self._steps > self._check_steps:  # earlier steps were compared after the step
            self._compare(step)

    def _compare(self, step: int) -> None:
        with all_open(self._runner.adapter, self._runner.config):  # under ZeRO-3 data-parallel ranks hold shards
            mismatch = find_mismatch(self._runner.adapter, self._runner.groups)
        if found := first_message(str(mismatch) if mismatch else None):
            raise RunFailed(
                f"after step {step} {found}; the ranks no longer train one adapter. This step was not saved"
            )
