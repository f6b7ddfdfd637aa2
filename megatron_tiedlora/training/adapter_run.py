"""Manage one adapter of a run on one rank: its log, evaluations and checkpoints, and the end of its training.

All adapters of a run are trained together by `training/step.py` and evaluated together by `training/loop.py`.
"""

import math
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import AdapterLayout
from megatron_tiedlora.base.files import Count, Guard, Real, Text, read_fields, read_json_object, write_json
from megatron_tiedlora.base.messages import UserError, named, printable
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Progress, save_checkpoint, stored_moments
from megatron_tiedlora.config.cli import HALVING_REASON
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.loader import TrainingStep, evaluation_batches, evaluation_sizes
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.evaluation.results import Score, student
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, raise_on_every_rank, sum_over_ranks
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.planning.adapter_plans import RunData
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.heartbeat import rank_line
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder
from megatron_tiedlora.training.step import StepChecks, StepReport, require_finite
from megatron_tiedlora.training.throughput import Meter, peak_memory_bytes

# --halving ------------------------------------------------------------------------------------------------------------

# The training of an adapter ends if its validation loss exceeds another adapter's loss by more than noise. The two
# adapters differ only in the learning rate, and are evaluated on the same validation batches at the same step. Let a_j
# and b_j be their losses, summed over the t_j supervised tokens of batch j of n, and N = sum t_j. The difference of the
# losses is D = sum (a_j - b_j) / N. The noise is the half width of D's 95 % interval, t(n - 1) S, with Student's t and
# the standard error S of a ratio of sums over batches,
#
#     S^2 = n / (n - 1) sum (a_j - b_j - D t_j)^2 / N^2.

RECORD_FILE = "halving.json"  # in the run folder: the last evaluation, and why training stopped after it


@dataclass(frozen=True)
class BatchLosses:
    """The summed loss and the number of supervised tokens of each validation batch, over all ranks.

    Attributes:
        stopped: the reason why training ended after this evaluation; "" if training continued.
    """

    step: Count
    losses: tuple[Real, ...]
    tokens: tuple[Count, ...]
    stopped: Text = ""

    @property
    def loss(self) -> float:
        """The mean loss over all supervised tokens."""
        return math.fsum(self.losses) / sum(self.tokens)

    def behind(self, other: "BatchLosses") -> tuple[float, float]:
        """Return this loss per token minus the loss per token of `other`, and the half width of its 95 % interval.

        Both evaluations must use the same batches. The half width is inf if there is only one batch.
        """
        assert self.tokens == other.tokens, "evaluations of different batches"
        used = [(a - b, t) for a, b, t in zip(self.losses, other.losses, self.tokens, strict=True) if t]
        count, total = len(used), sum(self.tokens)
        mean = math.fsum(difference for difference, _ in used) / total
        if count < 2:
            return mean, math.inf
        squares = math.fsum((difference - mean * tokens) ** 2 for difference, tokens in used)
        error = math.sqrt(count / (count - 1) * squares) / total
        return mean, student(count - 1) * error

    def write(self, folder: Path, *, guard: Guard) -> None:
        """Write the evaluation to a run folder. Raise UserError if the file cannot be written."""
        write_json(folder / RECORD_FILE, asdict(self), guard=guard)


def read_record(folder: Path, *, step: int | None) -> BatchLosses | None:
    """Return the evaluation after `step` from a run folder. Return None if there is no valid file for this step."""
    file = folder / RECORD_FILE
    with suppress(OSError, UserError):
        found = read_fields(file, read_json_object(file, kind="an evaluation"), BatchLosses, optional=["stopped"])
        if found.step == step and len(found.losses) == len(found.tokens) and any(found.tokens):
            return found
    return None


def find_halved(evaluated: Mapping[str, BatchLosses], competitors: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return the names of the adapters whose training --halving ends, each with a reason.

    Training of an adapter ends if its loss is significantly higher than the lowest loss of its `competitors` (95 %
    confidence).

    Args:
        evaluated: the last evaluation of each adapter. Only evaluations with the same step and batches are compared.
            The batches may change on resume, since they depend on the micro-batch size and the parallel configuration.
        competitors: the names of the adapters with which each adapter is compared.
    """
    found = {}
    for name, own in evaluated.items():
        same = [(other, evaluated[other]) for other in competitors[name] if other in evaluated]
        beside = [other for other, its in same if (its.step, its.tokens) == (own.step, own.tokens)]
        if not beside:
            continue
        best = min(beside, key=lambda other: evaluated[other].loss)
        behind, noise = own.behind(evaluated[best])
        if behind > noise:
            found[name] = f"{HALVING_REASON}at step {own.step} it was behind {best} by {behind:.4f}, noise {noise:.4f}"
    return found


# An adapter of a run --------------------------------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """The result of an evaluation: the mean validation loss, and the score of the generated answers for each metric."""

    loss: float
    scores: Mapping[str, Score]


@dataclass(kw_only=True)
class AdapterRun:
    """The training state of one adapter, from the start of the engine to the end of training.

    Attributes:
        layout: the shard of the adapter on each rank.
        log: the metrics log on rank 0; None on the other ranks.
        progress: the number of finished steps and the best validation result.
        ends_apart: whether the adapter has its own status file. If so, its failure does not end the other adapters.
        keeps_losses: whether the last evaluation is stored, so that --halving can compare adapters.
        failure: the error message if the adapter failed, else None.
        reason: the reason why training ended; "" before the end.
        recorded: whether run_status.json already records the end of the adapter.
        evaluated: the last evaluation, if `keeps_losses` is set; None if none was stored since the first step.
        recorded_start: the hash of the adapter of --init_from, by its name in the settings of a checkpoint.
    """

    name: str
    plan: RunPlan
    data: RunData
    runner: Runner
    base_identity: BaseIdentity
    layout: AdapterLayout
    folder: RunFolder
    log: MetricsLog | None
    meter: Meter
    checks: StepChecks
    progress: Progress = field(default_factory=Progress)
    ends_apart: bool = False
    keeps_losses: bool = False
    failure: str | None = None
    reason: str = ""
    recorded: bool = False
    evaluated: BatchLosses | None = None
    recorded_start: Mapping[str, str] = field(default_factory=dict)
    _save_due: bool = False
    _last_save: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.log_failure: UserError | None = None
        self.saved_step = self.progress.step or None  # the step of the last checkpoint, or None
        plan, consumed = self.plan, self.progress.consumed_samples
        self._pad_id = padding_id(self.data.tokenizer)
        self._batch_sizes = {
            "micro_batch_size": plan.batches.micro_batch_size,
            "pad_multiple": plan.layout.pad_multiple,
        }
        self.loader = plan.training_loader(self.data.train, pad_id=self._pad_id, consumed_samples=consumed)

    @property
    def adapter(self) -> TiedAdapter:
        """The shard of the adapter on this rank."""
        return self.runner.adapters[self.name]

    @property
    def state(self) -> str:
        """The state shown in table.csv. It is "ended" after training until run_status.json records the end."""
        if self.failure is not None:
            return "failed"
        return "finished" if self.recorded else "ended" if self.reason else "running"

    # Its end ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def failing_alone(self) -> Iterator[None]:
        """Catch a UserError that is raised on every rank inside the block, and mark only this adapter as failed.

        The reason is written to the adapter's run_status.json, and its last checkpoint stays valid. The error is not
        caught if `ends_apart` is false.
        """
        try:
            yield
        except UserError as error:
            if not self.ends_apart:
                raise
            self.failure = str(error)
            self.close_log()
            if self.plan.grid.rank == 0:
                with suppress(UserError):  # its folder may be the cause
                    reason = rank_line(0, socket.gethostname(), self.progress.step, self.failure)
                    self.folder.write_status("failed", step=self.progress.step, reason=reason)
            self.recorded = True

    def finish(self) -> None:
        """Record that the adapter has finished. Only rank 0 calls this method. It writes no status file for the only
        adapter of a run, since the run writes that file."""
        if self.ends_apart:
            self.folder.write_status("finished", step=self.progress.step, reason=self.reason)
        self.recorded = True

    def close_log(self) -> None:
        """Close the adapter's metrics.jsonl."""
        if self.log is not None:
            self.log.close()

    def end_if_trained(self) -> None:
        """End training of the adapter if its last step is done or --patience is exhausted."""
        if is_trained(self.plan.settings, self.progress):
            out_of_patience = self.progress.evaluations_since_best >= self.plan.settings.patience
            self._end("early_stopping" if out_of_patience else "max_steps")

    def end_behind(self, reason: str) -> None:
        """End training of the adapter because --halving rejected it. The reason is stored for a resumed run."""
        assert self.evaluated is not None
        self._end(reason)
        self._keep(replace(self.evaluated, stopped=reason))

    def _end(self, reason: str) -> None:
        raise_on_every_rank(self.log_failure)
        self.save()  # the last evaluation may have no checkpoint
        self.reason = reason
        self.close_log()

    # Its steps -------------------------------------------------------------------------------------------------------

    def took(self, samples: TrainingStep, report: StepReport) -> str:
        """Record and log the adapter's result of a step. Return a text with the loss and the speed.

        Raises:
            UserError: the step of this adapter failed. Nothing was saved after the last successful step.
        """
        own = report.adapters[self.name]
        if own.failure is not None:
            raise own.failure
        self.progress = replace(self.progress, step=own.number, consumed_samples=samples.consumed_samples)
        self._save_due = bool(report.votes.save_due)
        rates = self.meter.add(own.number, samples, report.seconds)
        self._write_log(
            {
                "step": own.number,
                "split": "train",
                "loss": own.loss,
                "learning_rate": own.learning_rate,
                "grad_norm": own.grad_norm,
                "supervised_tokens": samples.num_supervised,
                **rates,
                "peak_memory_bytes": peak_memory_bytes(self.runner.device),
            }
        )
        return f"loss {own.loss:.4f}, {rates['tokens_per_second']:,.0f} tokens/s, MFU {rates['mfu']:.1%}"

    def _write_log(self, row: dict[str, Any]) -> None:
        """Write a log row on rank 0. A write error is stored and later raised on all ranks, so that no rank waits."""
        if self.log is not None and self.log_failure is None:
            try:
                self.log.write(row)
            except UserError as error:
                self.log_failure = error

    @property
    def wants_save(self) -> bool:
        """Whether --save_interval_minutes requires a checkpoint now. It is always false on ranks other than 0."""
        minutes = self.plan.settings.save_interval_minutes
        return self.plan.grid.rank == 0 and minutes is not None and time.monotonic() - self._last_save > 60 * minutes

    # Its evaluations -------------------------------------------------------------------------------------------------

    @property
    def evaluation_is_due(self) -> bool:
        """Whether an evaluation is due after the last step and has not been run yet."""
        settings, step = self.plan.settings, self.progress.step
        due = step % settings.eval_interval == 0 or step == settings.max_steps
        return due and self.progress.evaluated_step != step

    @property
    def evaluation_sizes(self) -> list[int]:
        """The maximum number of tokens on any rank, for each validation batch."""
        return list(evaluation_sizes(self.data.validation, **self._batch_sizes, dp_size=self.plan.grid.dp_size))

    def evaluation_batches(self, *, all_of_them: bool = False) -> Iterator[MicroBatch]:
        """Yield this rank's batches of the validation split, or the batches of all ranks if `all_of_them` is set."""
        grid = Grid(0, 1) if all_of_them else self.plan.grid
        ours = {"dp_rank": grid.dp_rank, "dp_size": grid.dp_size, "pad_id": self._pad_id}
        return evaluation_batches(self.data.validation, **self._batch_sizes, **ours)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Disable the adapter inside the block by setting its B to zero."""
        tensors, opened = self.plan.adapter.tensors, self.runner.optimizers.opened
        moved = [self.adapter.get_parameter(name) for name, (_, factor) in tensors.items() if factor == "B"]
        with opened(self.name):
            saved = [parameter.detach().clone() for parameter in moved]
            for parameter in moved:
                parameter.data.zero_()
        yield
        with opened(self.name):
            for parameter, values in zip(moved, saved, strict=True):
                parameter.data.copy_(values)

    def show_start(self, bar: Any, *, base: float, started: float) -> None:
        """Print the validation loss with and without the adapter's non-zero initial update."""
        if self.plan.grid.rank == 0:
            line = (
                f"{self.plan.adapter.method} starts with a non-zero update: it changes the validation loss from"
                f" {base:.4f} (base alone) to {started:.4f}; --init_std_b {self.plan.adapter.init_std_b:.3g} controls"
                " the size of the update"
            )
            bar.write(printable(named(self.name, line)))

    def log_validation(self, found: Evaluated, bar: Any) -> None:
        """Log an evaluation. Raise RunFailed if the loss is not finite."""
        loss, scores = found
        require_finite("validation loss", loss, step=self.progress.step, saved_step=self.saved_step)
        if self.log is not None:
            values = {name: score.value for name, score in scores.items()}
            self._write_log({"step": self.progress.step, "split": "validation", "loss": loss, **values})
            shown = "".join(f", {name} {value:.2f} %" for name, value in values.items())
            line = f"step {self.progress.step}: validation loss {loss:.4f}{shown}"
            bar.write(printable(named(self.name, line)))

    def after_step(self, bar: Any, found: Evaluated | None) -> None:
        """Log the evaluation `found` if one was due, save a due checkpoint, and end training after the last step."""
        settings, step = self.plan.settings, self.progress.step
        improved = False
        if self.evaluation_is_due:
            assert found is not None, "evaluations are made together"
            self.log_validation(found, bar)
            value = found.scores[settings.eval_metric].value if found.scores else found.loss
            best = self.progress.best_metric
            improved = best is None or (value > best if found.scores else value < best)
            since_best = 0 if improved else self.progress.evaluations_since_best + 1
            self.progress = replace(self.progress, evaluated_step=step, evaluations_since_best=since_best)
            if improved:
                self.progress = replace(self.progress, best_metric=value, best_step=step)
        if improved or step % settings.save_interval == 0 or step == settings.max_steps or self._save_due:
            self.save(best=improved)
        self.end_if_trained()

    def recall(self) -> None:
        """With --halving, load a resumed run's last evaluation. End training if --halving rejected the adapter then."""
        if self.keeps_losses:
            path, step = self.folder.path, self.progress.evaluated_step
            self.evaluated = decided_by_rank_0(lambda: read_record(path, step=step), kind=BatchLosses | None)
        if self.evaluated is not None and self.evaluated.stopped and self.progress.step == self.evaluated.step:
            self._end(self.evaluated.stopped)

    def keep_losses(self, batches: Sequence[tuple[float, int]]) -> None:
        """Sum the losses of an evaluation over ranks and write them to the run folder, if --halving needs them.

        Args:
            batches: the loss and the number of supervised tokens of each batch on this rank.
        """
        if self.keeps_losses and self.progress.step:
            losses, tokens = zip(*batches, strict=True)
            summed = sum_over_ranks([*losses, *map(float, tokens)])
            replicas = self.plan.grid.world_size // self.plan.grid.dp_size  # replicas count the same tokens
            counts = (round(count) // replicas for count in summed[len(losses) :])
            self._keep(BatchLosses(self.progress.step, tuple(summed[: len(losses)]), tuple(counts)))

    def _keep(self, evaluated: BatchLosses) -> None:
        decided_by_rank_0(lambda: evaluated.write(self.folder.path, guard=self.folder.guard))
        self.evaluated = evaluated

    # Its checkpoints -------------------------------------------------------------------------------------------------

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint of the last finished step, and also adapter/ if `best` is set.

        All ranks must call this method. Nothing is written before the first step. An existing checkpoint is not written
        again.

        Raises:
            UserError: on every rank, if the checkpoint or an earlier log row cannot be written.
            RunFailed: adapter values are not finite, or the replicas differ. Nothing was written.
        """
        new = self.saved_step != self.progress.step
        if self.progress.step == 0 or not (new or best):
            return
        self.checks.before_save(self.progress.step)
        state = self.runner.full_state(self.name, self.layout)
        adapter = NativeAdapter(self.plan.adapter, self.base_identity, state)
        moments = self.runner.full_moments(self.name, self.layout) if new else {}

        def write() -> None:
            if self.log_failure is not None:  # a resumed run appends to the log, so a checkpoint needs its rows
                raise self.log_failure
            if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
                require_finite("adapter", math.nan, step=self.progress.step, saved_step=self.saved_step)
            if new:
                save_checkpoint(
                    self.folder.checkpoints,
                    progress=self.progress,
                    adapter=adapter,
                    moments=stored_moments(moments),
                    settings={**self.plan.resolved_settings(), "data_sha256": self.data.sha256, **self.recorded_start},
                    keep=self.plan.settings.keep_checkpoints,
                    guard=self.folder.guard,
                )
            if best:
                save_adapter(self.folder.adapter, adapter, guard=self.folder.guard)

        decided_by_rank_0(write)
        self.saved_step = self.progress.step
        self._last_save = time.monotonic()


def is_trained(settings: Settings, progress: Progress) -> bool:
    """Return whether an adapter has no steps left or its --patience is exhausted."""
    return progress.step >= settings.max_steps or progress.evaluations_since_best >= settings.patience
