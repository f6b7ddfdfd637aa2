"""The loop of a run of several adapters: each turn every adapter that runs takes a step of its own, with the others.

Then come the evaluations and saves that are due, adapter by adapter. One that has ended or failed leaves with its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from megatron_tiedlora.base.errors import UserError, printable
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.resume import Progress
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.runtime.group_folder import GroupFolder
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training.group_evaluation import GroupEvaluation, of_start
from megatron_tiedlora.training.halving import find_behind
from megatron_tiedlora.training.member import Member
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.profiling import StepProfiler
from megatron_tiedlora.training.step import TrainStep


@dataclass(frozen=True)
class Finished:
    """An adapter that an earlier start has finished. Nothing of it is loaded; the table of all needs its row."""

    name: str
    plan: RunPlan
    folder: RunFolder
    progress: Progress
    reason: str

    state = "finished"
    failure = None
    recorded = True


@dataclass
class Group:
    """A run of several adapters on one rank, from a ready engine to the end of their training.

    Attributes:
        profile: turns that are recorded, as of --profile.
        finished: those that an earlier start has finished.
        names: of all, in the order of their file.
        rivals: with --halving, by each adapter's name those that it is compared with while they run.
        last_turn: the number of the last turn; the first one follows the most steps that an adapter has.
    """

    members: Mapping[str, Member]
    step: TrainStep
    folder: GroupFolder
    stop: StopRequests
    finished: Mapping[str, Finished]
    names: Sequence[str]
    profile: str | None = None
    rivals: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _told: set[str] = field(default_factory=set)
    _failure: UserError | None = None

    def __post_init__(self) -> None:
        self.evaluation = GroupEvaluation(self.step.runner, self.step.capacity, self.stop)
        self.last_turn = max(member.progress.step for member in self.members.values())
        rank = next(iter(self.members.values())).plan.grid.rank
        self._profiler = StepProfiler(self.profile, self.folder, rank=rank)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and shows progress."""
        return next(iter(self.members.values())).is_main

    @property
    def everyone(self) -> dict[str, Member | Finished]:
        """All adapters, in the order of their file."""
        return {name: self.finished[name] if name in self.finished else self.members[name] for name in self.names}

    @property
    def failed(self) -> list[str]:
        """The adapters that failed."""
        return [name for name, member in self.members.items() if member.failure is not None]

    def unrecorded(self) -> list[tuple[RunFolder, int]]:
        """The folders of adapters whose end is not recorded, each with its last step."""
        return [(member.folder, member.progress.step) for member in self.members.values() if not member.recorded]

    def run(self) -> None:
        """Train until every adapter has ended or failed.

        Raises:
            RunStopped: all ranks agreed to stop; finished steps are saved.
        """
        with self.stop.deferred(), self._bar() as bar:
            try:
                self._begin(bar)
                self._show(bar, tokens_per_second=None)
                while running := self._running():
                    self._turn(self._in_step(running), bar)
            except RunStopped:
                for member in self._running().values():
                    with member.failing_alone():
                        member.save()
                self.write_table()
                raise
            finally:
                self._profiler.finish(last_step=self.last_turn)
                for member in self.members.values():
                    member.close_log()

    def _running(self) -> dict[str, Member]:
        return {name: member for name, member in self.members.items() if member.state == "running"}

    def _begin(self, bar: Any) -> None:
        """Evaluate the adapters that begin, and what others had left to do after their last step."""
        for member in self.members.values():
            with member.failing_alone():
                member.recall()
        new = {name: member for name, member in self.members.items() if member.progress.step == 0}
        started = of_start(list(new.values()), self.evaluation.evaluated)
        for name, found in started.items():
            with new[name].failing_alone():
                new[name].begin(bar, found)
        moved = [
            member
            for member in new.values()
            if member.state == "running" and not member.plan.adapter.method_spec.starts_at_base
        ]
        with ExitStack() as zero:
            for member in moved:
                zero.enter_context(member.base_alone())
            base = self.evaluation.losses(moved)
        for member in moved:
            member.show_start(bar, base[member.name], started[member.name].loss)
        for member in new.values():
            if member.state == "running":
                with member.failing_alone():
                    member.end_if_trained()
        self._after_step({name: member for name, member in self.members.items() if name not in new}, bar)

    def _after_step(self, members: Mapping[str, Member], bar: Any) -> None:
        """The evaluations that are due, together, and then the saves of each."""
        found = self.evaluation.evaluated([member for member in members.values() if member.evaluation_is_due])
        for name, member in members.items():
            if member.state == "running":
                with member.failing_alone():
                    member.after_step(bar, found.get(name))
        self._stop_behind(bar)

    def _bar(self) -> Any:
        total = sum(member.plan.settings.max_steps for member in self.members.values())
        done = sum(member.progress.step for member in self.members.values())
        return progress_bar("training", "step", total=total, initial=done, shows=self.is_main, leave=True)

    def _turn(self, running: Mapping[str, Member], bar: Any) -> None:
        """One step of each; afterwards raise RunStopped if any rank should stop."""
        samples: dict[str, TrainingStep] = {}
        for name, member in running.items():
            with member.failing_alone():
                samples[name] = member.next_samples()
        if not samples:
            self._show(bar, tokens_per_second=None)
            return
        running = {name: running[name] for name in samples}
        saved = {name: member.saved_step for name, member in running.items()}
        with self._profiler.step(self.last_turn + 1):
            report = self.step.run(
                samples,
                save_due=lambda: any([member.wants_save for member in running.values()]),
                failure=self._failure,
                saved_steps={name: step for name, step in saved.items() if step is not None},
            )
        self.last_turn += 1
        for name, member in running.items():
            member.took(samples[name], report, bar)
        self.stop.stop_if_any(report.votes.stopping, report.votes.signals)
        self._after_step(self._running(), bar)
        self._show(bar, tokens_per_second=sum(step.num_tokens for step in samples.values()) / report.seconds)

    def _in_step(self, running: Mapping[str, Member]) -> dict[str, Member]:
        """Those that take a step: after a resume one may be ahead of its rivals, and waits for them."""

        def waits(name: str) -> bool:
            others = [running[other] for other in self.rivals.get(name, ()) if other in running]
            return any(other.progress.step < running[name].progress.step for other in others)

        return {name: member for name, member in running.items() if not waits(name)}

    def _stop_behind(self, bar: Any) -> None:
        """Stop the adapters that are behind a rival by more than noise, once their warm-up is over."""
        if not self.rivals:
            return
        evaluated = {
            name: member.evaluated
            for name, member in self.members.items()
            if member.failure is None
            and member.evaluated is not None
            and member.evaluated.step >= member.plan.settings.warmup_steps
        }
        running = self._running()
        for name, reason in find_behind(evaluated, self.rivals).items():
            if name in running:
                with running[name].failing_alone():
                    running[name].end_behind(reason)
                    bar.write(printable(f"{name}: stopped, {reason}"))

    def _show(self, bar: Any, *, tokens_per_second: float | None) -> None:
        """Show the progress, and who has failed; write the table, if more than steps have changed."""
        for name in self.failed:
            if name not in self._told:
                bar.write(printable(f"{name}: failed: {self.members[name].failure}"))
                self._told.add(name)
        states = [member.state for member in self.everyone.values()]
        shown = ("running", "ended", "failed", *(["finished"] if self.finished else []))
        counts = ", ".join(f"{states.count(state)} {state}" for state in shown)
        speed = "" if tokens_per_second is None else f"; {tokens_per_second:,.0f} tokens/s"
        bar.set_postfix_str(printable(counts + speed))
        try:
            self.write_table()
        except UserError as error:  # raised when all ranks agree, at the next step
            self._failure = self._failure or error

    def write_table(self) -> None:
        """Write table.csv on rank 0, if more than steps have changed. Raises UserError if it cannot be written."""
        rows = table_rows(self.everyone)
        if not self.is_main or [{**row, "step": 0} for row in rows] == [{**row, "step": 0} for row in self._rows]:
            return
        self.folder.write_table(rows)
        self._rows = rows


def table_rows(adapters: Mapping[str, Member | Finished]) -> list[dict[str, Any]]:
    """The rows of table.csv."""
    return [_row(member) for member in adapters.values()]


def _row(member: Member | Finished) -> dict[str, Any]:
    settings, progress = member.plan.settings, member.progress
    return {
        "name": member.name,
        "method": settings.method,
        "rank": settings.rank,
        "learning_rate": settings.learning_rate,
        "step": progress.step,
        "max_steps": settings.max_steps,
        "evaluated_step": progress.evaluated_step,
        "best_step": progress.best_step,
        "best": progress.best_metric,
        "metric": settings.eval_metric,
        "state": "finished" if member.recorded and member.failure is None else member.state,
        "reason": member.failure or member.reason,
    }
