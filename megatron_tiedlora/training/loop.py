"""The training loop: steps, and between them evaluations, checkpoints, early stopping and agreement on stopping."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.adapters.gathering import gather_full, gather_state
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity
from megatron_tiedlora.checkpoint.native_adapter import save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, moment_name, save_checkpoint
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.loader import TrainingStep, evaluation_batches, num_evaluation_batches
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.engine.engine import all_open, trained_parameters
from megatron_tiedlora.engine.optimizer_state import read_moments
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.evaluation.answering import answer_all
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.held_out import Questions, ScoredSet
from megatron_tiedlora.evaluation.scores import Score, score_answers
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training.checks import StepChecks, require_finite
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.profiling import StepProfiler
from megatron_tiedlora.training.run_data import RunData
from megatron_tiedlora.training.step import StepReport, TrainStep
from megatron_tiedlora.training.throughput import Meter, peak_memory_bytes


class Evaluated(NamedTuple):
    """What an evaluation found: the mean validation loss, and scores of answers to validation samples by metric."""

    loss: float
    scores: Mapping[str, Score]


@dataclass
class Trainer:
    """A run on one rank, from a ready engine to the end. `progress` holds the steps taken and the best score."""

    plan: RunPlan
    data: RunData
    runner: Runner
    base_identity: BaseIdentity
    folder: RunFolder
    stop: StopRequests
    log: MetricsLog | None  # rank 0's
    meter: Meter
    progress: Progress = field(default_factory=Progress)
    _saved_step: int | None = None
    _save_due: bool = False
    _log_failure: UserError | None = None
    _last_save: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._step = TrainStep(self.plan, self.runner, self.stop, finished=self.progress.step)
        self._profiler = StepProfiler(self.plan.settings.profile, self.folder, rank=self.plan.grid.rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return self.plan.grid.rank == 0

    def run(self) -> str:
        """Train to the last step or to early stopping; returns the reason for the end.

        Raises:
            RunStopped: all ranks agreed to stop; finished steps are saved.
            RunFailed: the loss or the gradient norm is not finite, a trained tensor gets no gradient, or replicas
                differ; nothing was saved after the last good step.
        """
        self._saved_step = self.progress.step if self.progress.step else None
        pad_id, consumed = padding_id(self.data.tokenizer), self.progress.consumed_samples
        loader = self.plan.training_loader(self.data.train, pad_id=pad_id, consumed_samples=consumed)
        with self.stop.deferred(), self._bar() as bar:
            try:
                if self.progress.step == 0:
                    self._evaluate_start(bar)
                else:
                    self._evaluate_and_save(bar)  # if the run was stopped between a step and its evaluation
                while not self.is_trained:
                    self._train_step(next(loader), bar)
                    self._evaluate_and_save(bar)
                raise_on_every_rank(self._log_failure)
                self.save()  # after early stopping there may be no checkpoint of the last evaluation
                return "early_stopping" if self._out_of_patience() else "max_steps"
            except RunStopped:
                self.save()
                raise
            finally:
                self._profiler.finish(last_step=self.progress.step)
                if self.log is not None:
                    self.log.close()

    @property
    def _checks(self) -> StepChecks:
        return self._step.checks

    @property
    def is_trained(self) -> bool:
        """Whether no step is left to take."""
        return is_trained(self.plan.settings, self.progress)

    def _out_of_patience(self) -> bool:
        return self.progress.evaluations_since_best >= self.plan.settings.patience

    def _bar(self) -> Any:
        total, done = self.plan.settings.max_steps, self.progress.step
        return progress_bar("training", "step", total=total, initial=done, shows=self.is_main, leave=True)

    def _train_step(self, step: TrainingStep, bar: Any) -> None:
        """Take one step on this rank's micro-batches; afterwards raise RunStopped if any rank should stop."""
        with self._profiler.step(self.progress.step + 1):
            report = self._step.run(
                step, save_due=self._save_is_due, failure=self._log_failure, saved_step=self._saved_step
            )
        self.progress = replace(self.progress, step=report.number, consumed_samples=step.consumed_samples)
        self._save_due = bool(report.votes.save_due)
        self._report(bar, report, step)
        self.stop.stop_if_any(report.votes.stopping, report.votes.signals)

    def _report(self, bar: Any, report: StepReport, step: TrainingStep) -> None:
        rates = self.meter.add(report.number, step, report.seconds)
        speed = f"{rates['tokens_per_second']:,.0f} tokens/s, MFU {rates['mfu']:.1%}"
        bar.set_postfix_str(f"loss {report.loss:.4f}, {speed}", refresh=False)
        bar.update(1)
        self._write_log(
            {
                "step": report.number,
                "split": "train",
                "loss": report.loss,
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
                "supervised_tokens": step.num_supervised,
                **rates,
                "peak_memory_bytes": peak_memory_bytes(self.runner.device),
            }
        )

    def _write_log(self, row: dict[str, Any]) -> None:
        """Write a row on rank 0. A failure is raised later, when all ranks agree, so that none waits for this one."""
        if self.log is not None and self._log_failure is None:
            try:
                self.log.write(row)
            except UserError as error:
                self._log_failure = error

    def evaluate(self) -> float:
        """Mean loss of the current adapter over all supervised tokens of the validation split, the same on every rank.

        Raises:
            RunStopped: all ranks agreed to stop before a batch (in a pipeline: before a few batches).
        """
        dataset, batches, loss = self.data.validation, self.evaluation_batches(), 0.0
        with self.evaluation_bar(self.num_evaluation_batches) as bar:
            while some := list(itertools.islice(batches, self.runner.inputs_at_once)):
                self.stop.agree(True)
                loss += self.runner.evaluate(some)
                bar.update(len(some))
        return sum_over_ranks([loss])[0] / dataset.num_supervised

    @property
    def num_evaluation_batches(self) -> int:
        """How many batches each rank evaluates."""
        size, dp_size = self.plan.batches.micro_batch_size, self.plan.grid.dp_size
        return num_evaluation_batches(self.data.validation, micro_batch_size=size, dp_size=dp_size)

    def evaluation_batches(self) -> Iterator[MicroBatch]:
        """This rank's batches of the validation split."""
        return evaluation_batches(
            self.data.validation,
            micro_batch_size=self.plan.batches.micro_batch_size,
            dp_rank=self.plan.grid.dp_rank,
            dp_size=self.plan.grid.dp_size,
            pad_id=padding_id(self.data.tokenizer),
            pad_multiple=self.plan.layout.pad_multiple,
        )

    def evaluation_bar(self, num_batches: int) -> Any:
        """A bar that counts batches."""
        return progress_bar("validation", "batch", total=num_batches, shows=self.is_main)

    def _evaluate_start(self, bar: Any) -> None:
        """Log the validation loss before the first step; also how far a non-zero initial update moves it."""
        started = self._evaluated()
        self._log_validation(started, bar)
        if not self.plan.adapter.method_spec.starts_at_base:
            with self.base_alone():
                base = self.evaluate()
            self._show_start(bar, base, started.loss)

    def _evaluated(self) -> Evaluated:
        return Evaluated(self.evaluate(), self.score(self.data.scored_validation))

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Inside, the update is zero."""
        adapter, tensors = self.runner.adapter, self.plan.adapter.tensors
        moved = [adapter.get_parameter(name) for name, (_, factor) in tensors.items() if factor == "B"]
        with all_open(adapter, self.plan.engine):
            saved = [parameter.detach().clone() for parameter in moved]
            for parameter in moved:
                parameter.data.zero_()
        yield
        with all_open(adapter, self.plan.engine):
            for parameter, values in zip(moved, saved, strict=True):
                parameter.data.copy_(values)

    def _show_start(self, bar: Any, base: float, started: float) -> None:
        if self.is_main:
            bar.write(
                f"{self.plan.adapter.method} starts with a non-zero update: it moves the validation loss from"
                f" {base:.4f} (base alone) to {started:.4f}; --init_std_b {self.plan.adapter.init_std_b:.3g} controls"
                " how far"
            )

    def score(self, scored: ScoredSet | None) -> dict[str, Score]:
        """Scores of the current adapter with greedy decoding, by metric, the same on every rank. All ranks call it.

        Raises:
            UserError: answers cannot be scored.
            RunStopped: all ranks agreed to stop.
        """
        if scored is None:
            return {}
        runner, plan = self.runner, self.plan
        runner.engine.module.eval()
        decoder = Decoder(runner.stage, runner.groups, plan.source.shape, calls_together=plan.engine.zero_stage == 3)
        asked = Questions(scored, self.data.tokenizer, plan.max_new_tokens, plan.settings.eval_batch_size)
        (answers,) = answer_all(decoder, [asked], grid=plan.grid, agree=self.stop.agree, progress=self.is_main)
        names = scored.task.metrics
        return decided_by_rank_0(lambda: score_answers(names, answers), kind=dict[str, Score])

    def _log_validation(self, found: Evaluated, bar: Any) -> None:
        loss, scores = found
        require_finite("validation loss", loss, step=self.progress.step, saved_step=self._saved_step)
        if self.log is not None:
            values = {name: score.value for name, score in scores.items()}
            self._write_log({"step": self.progress.step, "split": "validation", "loss": loss, **values})
            shown = "".join(f", {name} {value:.2f} %" for name, value in values.items())
            bar.write(f"step {self.progress.step}: validation loss {loss:.4f}{shown}")

    def _save_is_due(self) -> bool:
        minutes = self.plan.settings.save_interval_minutes
        return self.is_main and minutes is not None and time.monotonic() - self._last_save > 60 * minutes

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the adapter is to be evaluated after its last step, and was not."""
        settings, step = self.plan.settings, self.progress.step
        due = step % settings.eval_interval == 0 or step == settings.max_steps
        return due and self.progress.evaluated_step != step

    def _evaluate_and_save(self, bar: Any, evaluated: Evaluated | None = None) -> None:
        """Evaluate if that is due, and save.

        Args:
            evaluated: what the evaluation found, if it was made together with others.
        """
        settings, step = self.plan.settings, self.progress.step
        improved = False
        if self.evaluation_is_due:
            loss, scores = found = evaluated or self._evaluated()
            self._log_validation(found, bar)
            value = scores[settings.eval_metric].value if scores else loss
            best = self.progress.best_metric
            improved = best is None or (value > best if scores else value < best)
            since_best = 0 if improved else self.progress.evaluations_since_best + 1
            self.progress = replace(self.progress, evaluated_step=step, evaluations_since_best=since_best)
            if improved:
                self.progress = replace(self.progress, best_metric=value, best_step=step)
        if improved or step % settings.save_interval == 0 or step == settings.max_steps or self._save_due:
            self.save(best=improved)

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of the last finished step, and the adapter if it is the best. All ranks call it.

        Nothing is written before the first step. An existing checkpoint is not written again: `latest` names it.

        Raises:
            UserError: the checkpoint or an earlier row of the log cannot be written; on every rank.
            RunFailed: the adapter is not finite, or its replicas differ; nothing was written.
        """
        new = self._saved_step != self.progress.step
        if self.progress.step == 0 or not (new or best):
            return
        self._checks.before_save(self.progress.step)
        state = self._full_state()
        moments = self._full_moments() if new else {}
        decided_by_rank_0(lambda: self._write(state, moments, new=new, best=best))
        self._saved_step = self.progress.step
        self._last_save = time.monotonic()

    def _write(
        self, state: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], *, new: bool, best: bool
    ) -> None:
        if self._log_failure is not None:  # no checkpoint without its log rows, since a resumed run appends to them
            raise self._log_failure
        if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
            require_finite("adapter", math.nan, step=self.progress.step, saved_step=self._saved_step)
        if new:
            save_checkpoint(
                self.folder.checkpoints,
                progress=self.progress,
                config=self.plan.adapter,
                base_identity=self.base_identity,
                state=state,
                moments=moments,
                settings={**self.plan.resolved_settings(), "data_sha256": self.data.sha256},
                keep=self.plan.settings.keep_checkpoints,
                guard=self.folder.guard,
            )
        if best:
            save_adapter(self.folder.adapter, self.plan.adapter, self.base_identity, state, guard=self.folder.guard)

    def _full_state(self) -> dict[str, torch.Tensor]:
        return full_adapter_state(self.plan, self.runner)

    def _full_moments(self) -> dict[str, torch.Tensor]:
        trained = trained_parameters(self.runner.adapter)
        moments = read_moments(self.runner.engine, trained, self.plan.engine.zero_stage)
        names = list(self.plan.adapter.num_trained())
        return {
            moment_name(moment, name): tensor
            for moment, local in moments.items()
            for name, tensor in gather_full(names, local, self.plan.adapter_layout).items()
        }


def is_trained(settings: Settings, progress: Progress) -> bool:
    """Whether a run has no step left to take: by its number of steps, or as it is out of patience."""
    return progress.step >= settings.max_steps or progress.evaluations_since_best >= settings.patience


def full_adapter_state(plan: RunPlan, runner: Runner) -> dict[str, torch.Tensor]:
    """Full fp32 A, B, u, v on rank 0's CPU, nothing on the others. All ranks call it."""
    with all_open(runner.adapter, plan.engine):
        return gather_state(dict(runner.adapter.named_parameters()), plan.adapter_layout)
