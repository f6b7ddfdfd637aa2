"""Run the training loop: train all adapters in each step, and evaluate and save them between steps.

Adapters that have ended or failed are not trained further. All ranks agree on stopping before weights change.

The validation losses and scores of several adapters are computed together. Each adapter keeps its own batches and
weights. Only the matmuls of the base process tokens of several adapters at once. So the results are the same as in
separate evaluations, and a failure affects only its own adapter.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from megatron_tiedlora.base.messages import UserError, named, printable
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.resume import Progress
from megatron_tiedlora.data.loader import TrainingStep, fill_rounds, shared_micro_batch
from megatron_tiedlora.engine.runner import inputs_to_fill
from megatron_tiedlora.evaluation.answering import Answerer, ScoredSet, answer_all
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.results import Score, score_answers
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, sum_over_ranks
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training.adapter_run import AdapterRun, Evaluated, find_halved
from megatron_tiedlora.training.step import TrainStep
from megatron_tiedlora.training.throughput import StepProfiler

# Evaluations ----------------------------------------------------------------------------------------------------------


Runs = Sequence[AdapterRun]
Found = TypeVar("Found")

# The capacity of a shared evaluation batch, in micro-batches of a training step. Evaluation needs the activations of
# one layer, and a training step those of all layers. With recompute, a training step needs the inputs of all layers,
# and the activations and gradients of one layer.
STEPS_AT_ONCE = 4


@dataclass(frozen=True)
class Evaluation:
    """Evaluates adapters with the model that training uses.

    All ranks must make the same calls. Each call raises RunStopped if all ranks have agreed to stop.
    """

    step: TrainStep

    def evaluated(self, runs: Runs) -> dict[str, Evaluated]:
        """Return the evaluation of each adapter by name. An adapter whose scoring fails is not in the result."""
        losses = self.losses(runs)
        scores = self.scores(runs, lambda run: run.data.scored_validation)
        return {name: Evaluated(losses[name], found) for name, found in scores.items()}

    def losses(self, runs: Runs) -> dict[str, float]:
        """Return each adapter's mean loss over the supervised tokens of its validation split, the same on every rank.

        All ranks check for a stop request before each batch, or with pipeline parallelism before every few batches.
        """
        if not runs:
            return {}
        totals = dict.fromkeys((run.name for run in runs), 0.0)
        of_batches: dict[str, list[tuple[float, int]]] = {run.name: [] for run in runs}
        runner = self.step.runner
        sizes = {run.name: run.evaluation_sizes for run in runs}
        own, total = {run.name: run.evaluation_batches() for run in runs}, sum(map(len, sizes.values()))
        # Shared batches combine the first batches of all adapters, then their second batches, and so on.
        rounds = fill_rounds(sizes, capacity=STEPS_AT_ONCE * self.step.capacity)
        batches = ([(name, next(own[name])) for name, _ in some] for some in rounds)
        with progress_bar("validation", "batch", total=total, shows=runs[0].plan.grid.rank == 0) as bar:
            while some := list(islice(batches, inputs_to_fill(runner.groups.pipeline.size))):
                self.step.stop.agree(True)
                found = runner.evaluate([shared_micro_batch(owned) for owned in some])
                for owned, losses in zip(some, found, strict=True):
                    for name, batch in owned:
                        totals[name] += losses[name]
                        of_batches[name].append((losses[name], batch.num_supervised))
                bar.update(sum(map(len, some)))
        summed = sum_over_ranks(list(totals.values()))
        for run in runs:
            with run.failing_alone():
                run.keep_losses(of_batches[run.name])
        pairs = zip(runs, summed, strict=True)
        return {run.name: loss / run.data.validation.num_supervised for run, loss in pairs}

    def scores(self, runs: Runs, samples_of: Callable[[AdapterRun], ScoredSet | None]) -> dict[str, dict[str, Score]]:
        """Return the scores of each adapter by metric. An adapter is marked as failed if scoring raises an error."""
        asked = {run.name: scored for run in runs if (scored := samples_of(run)) is not None}
        answers = self._answers([run for run in runs if run.name in asked], asked) if asked else {}
        found: dict[str, dict[str, Score]] = {}
        for run in runs:
            with run.failing_alone():
                found[run.name] = {}
                if run.name in asked:
                    names, own = asked[run.name].encoding.task.metrics, answers.get(run.name, [])
                    score = partial(score_answers, names, own)
                    found[run.name] = decided_by_rank_0(score, kind=dict[str, Score])
        return {run.name: found[run.name] for run in runs if run.failure is None}

    def _answers(self, runs: Runs, asked: dict[str, ScoredSet]) -> dict[str, list[Answer]]:
        """Generate answers with each adapter, and return them on rank 0."""
        runner, plan, agree = self.step.runner, runs[0].plan, self.step.stop.agree
        runner.engine.module.eval()
        together = plan.engine.zero_stage == 3
        parts = [asked] if self.step.capacity else [{name: one} for name, one in asked.items()]
        answers: dict[str, list[Answer]] = {}
        decoder = Decoder(runner.stage, runner.groups, plan.source.shape, calls_together=together)
        with closing(Answerer(decoder)) as answerer:
            for part in parts:
                answers |= answer_all(answerer, part, grid=plan.grid, agree=agree, progress=plan.grid.rank == 0)
        return answers


def of_start(runs: Runs, evaluate: Callable[[Runs], dict[str, Found]]) -> dict[str, Found]:
    """Return the results of `evaluate` for adapters before their first step.

    An adapter with a zero update has the same results as the base. So only one of the adapters with a zero update and
    the same data is evaluated.
    """
    first: dict[tuple[object, ...], AdapterRun] = {}
    same = {run.name: first.setdefault(_start(run), run) for run in runs}
    found = evaluate(list(first.values()))
    left = [run for run in runs if run.failure is None]
    found |= evaluate([run for run in left if same[run.name].failure is not None])
    left = [run for run in left if run.failure is None]
    return {run.name: found[(run if run.name in found else same[run.name]).name] for run in left}


def _start(run: AdapterRun) -> tuple[object, ...]:
    """Return a key for an adapter before its first step. Adapters with the same key have the same results."""
    plan = run.plan
    if plan.settings.init_from is not None or not plan.adapter.method_spec.starts_at_base:
        return (run.name,)
    return id(run.data), plan.batches.micro_batch_size, plan.max_new_tokens, plan.settings.eval_batch_size


@dataclass(frozen=True)
class Finished:
    """An adapter that finished in an earlier launch. The adapter is listed in table.csv but is not loaded."""

    name: str
    plan: RunPlan
    folder: RunFolder
    progress: Progress
    reason: str

    state = "finished"
    failure = None


@dataclass
class Trainer:
    """Trains the adapters of a run on one rank, from the start of the engine to the end of training.

    Attributes:
        adapters: the adapters that are trained, by name.
        folder: the folder of the run.
        profile: the steps to record, as in --profile.
        everyone: all adapters of the run in order, including adapters that finished in an earlier launch.
        competitors: the names of the adapters with which --halving compares each adapter.
        last_step: the number of the last finished step. On resume it starts at the largest step number of all adapters.
    """

    adapters: Mapping[str, AdapterRun]
    step: TrainStep
    folder: RunFolder
    stop: StopRequests
    everyone: Mapping[str, AdapterRun | Finished]
    profile: str | None = None
    competitors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)
    _rates: list[str] = field(default_factory=list)  # texts about the last step: total speed, then each adapter
    _table_failure: UserError | None = None

    def __post_init__(self) -> None:
        self.evaluation = Evaluation(self.step)
        self.last_step = max(run.progress.step for run in self.adapters.values())
        self.rank = next(iter(self.adapters.values())).plan.grid.rank
        self._profiler = StepProfiler(self.profile, self.folder, rank=self.rank)

    @property
    def only(self) -> AdapterRun | None:
        """The only adapter of the run; None if the run has several."""
        return None if self.folder.of_several else next(iter(self.adapters.values()))

    @property
    def failed(self) -> list[str]:
        """The names of the adapters that failed."""
        return [name for name, run in self.adapters.items() if run.failure is not None]

    @property
    def trained(self) -> list[AdapterRun]:
        """The adapters whose training ended without failure and whose end is not yet recorded."""
        return [run for run in self.adapters.values() if run.state == "ended"]

    def run(self) -> None:
        """Train until every adapter has ended or failed.

        Raises:
            RunStopped: all ranks agreed to stop. Finished steps are saved.
            RunFailed: the only adapter of the run failed. Its loss or gradient norm is not finite, a trained tensor has
                no gradient, or replicas differ. Nothing was saved after the last successful step.
        """
        total = sum(run.plan.settings.max_steps for run in self.adapters.values())
        done = sum(run.progress.step for run in self.adapters.values())
        bar = progress_bar("training", "step", total=total, initial=done, shows=self.rank == 0, leave=True)
        with self.stop.deferred(), bar:
            try:
                self._begin(bar)
                self._show(bar)
                while running := self._running():
                    self._train_step(running, bar)
            except RunStopped:
                for run in self._running().values():
                    with run.failing_alone():
                        run.save()
                self.write_table()
                raise
            finally:
                self._profiler.finish(last_step=self.last_step)
                for run in self.adapters.values():
                    run.close_log()

    def _running(self) -> dict[str, AdapterRun]:
        return {name: run for name, run in self.adapters.items() if run.state == "running"}

    def _begin(self, bar: Any) -> None:
        """Evaluate new adapters, and run the pending evaluations and saves of resumed adapters."""
        for run in self.adapters.values():
            with run.failing_alone():
                run.recall()
        new = {name: run for name, run in self._running().items() if run.progress.step == 0}
        started = of_start(list(new.values()), self.evaluation.evaluated)
        for name, found in started.items():
            with new[name].failing_alone():
                new[name].log_validation(found, bar)
        moved = [
            run for run in new.values() if run.state == "running" and not run.plan.adapter.method_spec.starts_at_base
        ]
        with ExitStack() as zero:
            for run in moved:
                zero.enter_context(run.base_alone())
            base = self.evaluation.losses(moved)
        for run in moved:
            run.show_start(bar, base=base[run.name], started=started[run.name].loss)
        for run in new.values():
            if run.state == "running":
                with run.failing_alone():
                    run.end_if_trained()
        self._after_step({name: run for name, run in self.adapters.items() if name not in new}, bar)

    def _train_step(self, running: Mapping[str, AdapterRun], bar: Any) -> None:
        """Train each running adapter for one step. Raise RunStopped afterwards if any rank was asked to stop.

        After a resume with --halving, an adapter waits until all adapters compared with it have reached its step."""
        samples: dict[str, TrainingStep] = {}
        for name, run in running.items():
            others = [running[other] for other in self.competitors.get(name, ()) if other in running]
            if any(other.progress.step < run.progress.step for other in others):
                continue
            with run.failing_alone():
                samples[name] = next(run.loader)
        if not samples:
            self._show(bar)
            return
        running = {name: running[name] for name in samples}
        with self._profiler.step(self.last_step + 1):
            report = self.step.run(
                samples,
                save_due=lambda: any([run.wants_save for run in running.values()]),
                failure=self._table_failure,
                failures={name: run.log_failure for name, run in running.items() if run.log_failure is not None},
                saved_steps={name: run.saved_step for name, run in running.items() if run.saved_step is not None},
            )
        said = [f"{sum(step.num_tokens for step in samples.values()) / report.seconds:,.0f} tokens/s"]
        for name, run in running.items():
            with run.failing_alone():
                said.append(run.took(samples[name], report))
        self.last_step += 1
        self._rates = said
        bar.set_postfix_str(self._progress, refresh=False)  # before `update`, which draws the bar
        bar.update(len(said) - 1)
        self.stop.stop_if_any(report.votes.stopping, report.votes.signals)
        self._after_step(self._running(), bar)
        self._show(bar)

    def _after_step(self, runs: Mapping[str, AdapterRun], bar: Any) -> None:
        """Run all due evaluations together, and then save each adapter for which a checkpoint is due."""
        found = self.evaluation.evaluated([run for run in runs.values() if run.evaluation_is_due])
        for name, run in runs.items():
            if run.state == "running":
                with run.failing_alone():
                    run.after_step(bar, found.get(name))
        self._end_halved(bar)

    def _end_halved(self, bar: Any) -> None:
        """End the training of each adapter that --halving rejects. Only evaluations after the learning-rate warm-up are
        compared."""
        evaluated = {
            name: run.evaluated
            for name, run in self.adapters.items()
            if run.failure is None
            and run.evaluated is not None
            and run.evaluated.step >= run.plan.settings.warmup_steps
        }
        running = self._running()
        for name, reason in find_halved(evaluated, self.competitors).items():
            if name in running:
                with running[name].failing_alone():
                    running[name].end_behind(reason)
                    bar.write(printable(named(name, f"stopped, {reason}")))

    @property
    def _progress(self) -> str:
        """The text at the end of the progress bar."""
        if self.only is not None:
            return printable("".join(self._rates[-1:]))
        states = [run.state for run in self.everyone.values()]
        shown = ("running", "ended", "failed", *(["finished"] if "finished" in states else []))
        counts = ", ".join(f"{states.count(state)} {state}" for state in shown)
        return printable("; ".join((counts, *self._rates[:1])))

    def _show(self, bar: Any) -> None:
        """Show the progress and new failures, and write table.csv if more than the step numbers changed."""
        for name in self.failed:
            if name not in self._told:
                bar.write(printable(named(name, f"failed: {self.adapters[name].failure}")))
                self._told.add(name)
        bar.set_postfix_str(self._progress, refresh=False)
        try:
            self.write_table()
        except UserError as error:  # raised on all ranks together in the next step
            self._table_failure = self._table_failure or error

    def write_table(self) -> None:
        """Write table.csv on rank 0 if more than the step numbers changed. Raise UserError if the write fails."""
        rows = [table_row(run) for run in self.everyone.values()]
        if self.rank or [{**row, "step": 0} for row in rows] == [{**row, "step": 0} for row in self._rows]:
            return
        self.folder.write_table(rows)
        self._rows = rows


def table_row(run: AdapterRun | Finished) -> dict[str, Any]:
    """Return the row of an adapter in table.csv."""
    settings, progress = run.plan.settings, run.progress
    return {
        "name": run.name,
        "method": settings.method,
        "rank": settings.rank,
        "learning_rate": settings.learning_rate,
        "step": progress.step,
        "max_steps": settings.max_steps,
        "evaluated_step": progress.evaluated_step,
        "best_step": progress.best_step,
        "best": progress.best_metric,
        "metric": settings.eval_metric,
        "state": run.state,
        "reason": run.failure or run.reason,
    }
