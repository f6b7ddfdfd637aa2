"""One of several adapters that train together: what a run of its own has, but for the steps, which are the group's.

Its folder, log, evaluations, checkpoints and early stopping are `Trainer`'s. What goes wrong with it ends it alone:
such errors are raised on every rank, so all ranks leave it out from then on.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.runtime.heartbeat import rank_line
from megatron_tiedlora.training.checks import StepChecks, require_finite
from megatron_tiedlora.training.halving import BatchLosses, read_record
from megatron_tiedlora.training.loop import Evaluated, Trainer
from megatron_tiedlora.training.step import StepReport


@dataclass
class NamedBar:
    """The group's progress bar, as one adapter sees it: its lines begin with its name."""

    bar: Any
    name: str

    def write(self, line: str) -> None:
        """Show a line above the bar."""
        self.bar.write(f"{self.name}: {line}")

    def update(self, steps: int) -> None:
        """Count steps."""
        self.bar.update(steps)

    def set_postfix_str(self, text: str, *, refresh: bool) -> None:
        """The bar says what concerns all adapters, so one adapter's numbers are in its metrics.jsonl alone."""


@dataclass(kw_only=True)
class Member(Trainer):
    """One adapter of a group on one rank, from a ready engine to its end.

    Attributes:
        failure: why it failed; None if it did not.
        reason: why its training ended; "" before that.
        recorded: whether its run_status.json says how it ended.
        keeps_losses: whether its last evaluation is kept to be compared with those of others (--halving).
        evaluated: that evaluation; None before the first step.
    """

    own_checks: StepChecks
    failure: str | None = None
    reason: str = ""
    recorded: bool = False
    keeps_losses: bool = False
    evaluated: BatchLosses | None = None

    def __post_init__(self) -> None:
        self._saved_step = self.progress.step or None
        self._loader = self.plan.training_loader(
            self.data.train, pad_id=padding_id(self.data.tokenizer), consumed_samples=self.progress.consumed_samples
        )

    @property
    def state(self) -> str:
        """In a word, for the table."""
        return "failed" if self.failure is not None else "ended" if self.reason else "running"

    @property
    def _checks(self) -> StepChecks:
        return self.own_checks

    @property
    def saved_step(self) -> int | None:
        """The step of its last checkpoint; None if there is none."""
        return self._saved_step

    @property
    def wants_save(self) -> bool:
        """Whether rank 0 wants a checkpoint by --save_interval_minutes."""
        return self._save_is_due()

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """Inside, an error of this adapter, raised on every rank, ends it and not the group."""
        try:
            yield
        except UserError as error:
            self.fail(str(error))

    def fail(self, why: str) -> None:
        """End it, with the reason in its run_status.json; its last checkpoint is valid."""
        self.failure = why
        self.close_log()
        if self.is_main:
            with suppress(UserError):  # its folder may be what failed
                reason = rank_line(0, socket.gethostname(), self.progress.step, why)
                self.folder.write_status("failed", step=self.progress.step, reason=reason)
        self.recorded = True

    def finish(self) -> None:
        """Record a good end, once all of its files are written; on rank 0."""
        self.folder.write_status("finished", step=self.progress.step, reason=self.reason)
        self.recorded = True

    def close_log(self) -> None:
        """Close its metrics.jsonl."""
        if self.log is not None:
            self.log.close()

    def next_samples(self) -> TrainingStep:
        """This rank's share of its next global batch."""
        return next(self._loader)

    def recall(self) -> None:
        """With --halving: the evaluation that it was resumed after. It has ended if it was stopped then."""
        if self.keeps_losses:
            path, step = self.folder.path, self.progress.evaluated_step
            self.evaluated = decided_by_rank_0(lambda: read_record(path, step=step), kind=BatchLosses | None)
        if self.evaluated is not None and self.evaluated.stopped and self.progress.step == self.evaluated.step:
            self._end(self.evaluated.stopped)

    def begin(self, bar: Any, started: Evaluated) -> None:
        """Log the evaluation before the first step."""
        self._log_validation(started, NamedBar(bar, self.name))

    def show_start(self, bar: Any, base: float, started: float) -> None:
        """Say how far the initial update moves the validation loss of the base."""
        self._show_start(NamedBar(bar, self.name), base, started)

    def took(self, samples: TrainingStep, report: StepReport, bar: Any) -> None:
        """Count and log the step that it took with the group, or fail with the reason why it took none."""
        with self.failing_alone():
            self._took(NamedBar(bar, self.name), report, samples)

    def after_step(self, bar: Any, evaluated: Evaluated | None) -> None:
        """Log an evaluation, which is there if it was due, and save if that is due. May end it."""
        assert evaluated is not None or not self.evaluation_is_due, "evaluations are made together"
        self._evaluate_and_save(NamedBar(bar, self.name), evaluated)
        self.end_if_trained()

    def end_if_trained(self) -> None:
        """End it after its last step, or if it is out of patience."""
        if not self.is_trained:
            return
        self._end("early_stopping" if self._out_of_patience() else "max_steps")

    def _end(self, reason: str) -> None:
        raise_on_every_rank(self._log_failure)
        self.save()  # there may be no checkpoint of the last evaluation
        self.reason = reason
        self.close_log()

    def end_behind(self, reason: str) -> None:
        """End it after its last evaluation. A resumed run ends it there too."""
        assert self.evaluated is not None
        self._end(reason)
        self._keep(replace(self.evaluated, stopped=reason))

    def keep_losses(self, batches: Sequence[tuple[float, int]]) -> None:
        """With --halving: keep an evaluation, of which this rank has the loss and supervised tokens of each batch.

        It is in the run folder before the checkpoint that follows it.
        """
        if self.keeps_losses and self.progress.step:
            losses, tokens = zip(*batches, strict=True)
            summed = sum_over_ranks([*losses, *map(float, tokens)])
            replicas = self.plan.grid.world_size // self.plan.grid.dp_size  # each rank of a model has counted them
            counts = (round(count) // replicas for count in summed[len(losses) :])
            self._keep(BatchLosses(self.progress.step, tuple(summed[: len(losses)]), tuple(counts)))

    def _keep(self, evaluated: BatchLosses) -> None:
        decided_by_rank_0(lambda: evaluated.write(self.folder.path, guard=self.folder.guard))
        self.evaluated = evaluated

    def _full_state(self) -> dict[str, torch.Tensor]:
        state = super()._full_state()
        finite = decided_by_rank_0(lambda: all(bool(tensor.isfinite().all()) for tensor in state.values()), kind=bool)
        if not finite:
            require_finite("adapter", math.nan, step=self.progress.step, saved_step=self._saved_step)
        return state
