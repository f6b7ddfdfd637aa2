"""Runs a study from its settings to its tables: the steps of plan.py one after another, and the tables at the end."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.atomic import Guard, unguarded, write_text
from megatron_tiedlora.base.errors import UserError, printable, show
from megatron_tiedlora.base.ownership import FolderLock, take_folder
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.cluster.running import StopSignals
from megatron_tiedlora.config.sweep_settings import SweepCommand
from megatron_tiedlora.study.figures import draw_figure2, draw_figure3
from megatron_tiedlora.study.plan import PointScore, Step, SweepPlan, plan_sweep
from megatron_tiedlora.study.record import Failure, StudyFolder, write_record, write_status
from megatron_tiedlora.study.scores import Study, read_study
from megatron_tiedlora.study.starts import Start, last_lines, wait_for_end
from megatron_tiedlora.study.tables import table3
from megatron_tiedlora.study.text import table2_csv, table2_markdown, table3_csv, table3_markdown

SHOW_SECONDS = 1.0
_SHOWN_FAILURES = 3


@dataclass
class Outcome:
    """How the steps ended: the failed runs and scores by name; the signal that stopped the others (0: none); and
    whether they were given up because the base model could not be scored."""

    failures: dict[str, Failure] = field(default_factory=dict)
    stopped_by: int = 0
    given_up: bool = False


def sweep(command: SweepCommand, starter: Callable[[], Start]) -> int:
    """Run or resume a study. Returns the exit status: 0 all finished, 1 something failed, 130 or 143 stopped.

    Args:
        starter: makes the function that starts commands; raises UserError if it cannot.

    Raises:
        UserError: settings, model, task or folder do not fit, before anything is started; or a file or launcher cannot
            be written or started. In that case the running command has been stopped and has ended.
    """
    settings = command.settings
    if settings.tables_from is not None:
        return join_studies(settings.tables_from, user_path(settings.output_dir), take_over=settings.take_over)
    plan = plan_sweep(command)
    if settings.dry_run:
        show(*plan.dry_run_lines())
        return 0
    plan.source.weights_folder()  # rejects a preset, which has no weights
    start = starter()
    with lock_study(plan.folder.path, take_over=settings.take_over) as lock, StopSignals() as stop:
        folder = StudyFolder(plan.folder.path, lock.owner)
        plan = replace(plan, folder=folder)
        write_record(folder, command, plan.base)
        try:
            outcome = run_steps(plan, lock.descriptor, start, stop)
        except BaseException as error:
            with suppress(UserError):  # the disk may be full
                write_status(folder, "failed", {}, reason=str(error) or type(error).__name__)
            raise
        return _end(plan, outcome)


def lock_study(folder: Path, *, take_over: bool = False) -> FolderLock:
    """Become the owner of a study's folder, which is created if it does not exist. Launchers inherit the descriptor, so
    that one that outlives a killed sweep still holds the folder.

    Raises:
        UserError: another sweep, or a launcher of a killed one, is writing here.
    """
    hint = (
        "it is another sweep, or a run of a killed sweep; wait until it ends, or end it (--take_over takes the folder"
        " anyway)"
    )
    return take_folder(folder, take_over=take_over, hint=hint)


def run_steps(plan: SweepPlan, lock: int, start: Start, stop: StopSignals) -> Outcome:
    """Run the unfinished steps in order. After a signal, or without the base model's score, no more are started."""
    steps, total, outcome = plan.steps(), plan.num_items, Outcome()
    left = sum(len(step.items) for step in steps)
    with _bar(total - left, total) as bar:
        for step in steps:
            command = None if stop.received else plan.start(step, lock)
            if command is not None:
                began = time.monotonic()
                say, state = (lambda text: bar.write(printable(text))), (bar, plan, step, total - left)
                wait_for_end(start(command), step.name, stop=stop, show=partial(_show, *state), say=say)
            if stop.received:
                outcome.stopped_by = stop.received[0]
                break
            if command is not None:
                _note_ends(plan, step, outcome, bar, seconds=time.monotonic() - began)
            left -= len(step.items)
            bar.update(total - left - bar.n)
            if PointScore(None).name in outcome.failures:
                outcome.given_up = True
                break
    return outcome


def _note_ends(plan: SweepPlan, step: Step, outcome: Outcome, bar: Any, *, seconds: float) -> None:
    minutes = round(seconds) // 60
    took = f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
    for item in step.items:
        failure = plan.failure(item, step)
        if failure is not None:
            outcome.failures[item.name] = failure
        words = plan.done(item)[1] if failure is None else f"FAILED: {failure.reason}"
        bar.write(printable(f"{item.name:<28} {words}  [{took}]"))


def _bar(finished: int, total: int) -> Any:
    return progress_bar(
        "sweep",
        "run",
        total=total,
        leave=True,
        initial=finished,
        mininterval=SHOW_SECONDS,
        bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n:.1f} of {total} [{elapsed}, {remaining} left]{postfix}",
    )


def _show(bar: Any, plan: SweepPlan, step: Step, finished: int) -> None:
    """Show how far a step is, once in SHOW_SECONDS."""
    if time.monotonic() - getattr(bar, "shown_at", 0.0) < SHOW_SECONDS:
        return
    bar.shown_at = time.monotonic()
    parts, words = plan.progress(step)
    bar.set_postfix_str(printable(f"{step.name} {words}"), refresh=False)
    bar.update(finished + parts - bar.n)


def _end(plan: SweepPlan, outcome: Outcome) -> int:
    folder = plan.folder
    if outcome.stopped_by:
        write_status(folder, "stopped", outcome.failures)
        show(f"stopped; the same command, or --output_dir {shlex.quote(str(folder.path))} alone, resumes it")
        return 128 + outcome.stopped_by
    write_status(folder, "failed" if outcome.failures else "finished", outcome.failures)
    if not outcome.given_up:
        study = read_study(folder.path)
        written = write_tables([study], folder.path, guard=folder.guard)
        show("", *(folder.path / "table2.md").read_text(encoding="utf-8").split("\n"))
        show(*(f"written    {path}" for path in written))
    if not outcome.failures:
        return 0
    names = list(outcome.failures)
    for name in names[:_SHOWN_FAILURES]:
        found = outcome.failures[name]
        show("", f"{name}: {found.reason}; the end of {found.log}:")
        show(*(f"    {line}" for line in last_lines(found.log)))
    gave_up = "; nothing else was started" if outcome.given_up else ""
    line = f"error: {len(names)} failed: {', '.join(names)}{gave_up} (logs in {folder.log(names[0]).parent})"
    show(line, file=sys.stderr)
    return 1


def join_studies(folders: Sequence[str], target: Path, *, take_over: bool = False) -> int:
    """Write tables and figures of several studies, one per task, to the folder `target`. Returns exit status 0.

    Raises:
        UserError: a folder holds no study, a task appears twice, or the base models differ.
    """
    studies = [read_study(user_path(folder)) for folder in folders]
    for index, study in enumerate(studies):
        if any(study.base.task == other.base.task for other in studies[:index]):
            raise UserError(f"{study.folder}: task {study.base.task} appears twice; give one sweep for each task")
        if study.base.base_hash != studies[0].base.base_hash:
            raise UserError(
                f"{study.folder}: its base model {study.base.model} is not {studies[0].base.model} of"
                f" {studies[0].folder}; give sweeps of one model"
            )
    with lock_study(target, take_over=take_over) as lock:
        show(*(f"written    {path}" for path in write_tables(studies, target, guard=lock.owner.check)))
    return 0


def write_tables(studies: Sequence[Study], folder: Path, *, guard: Guard = unguarded) -> list[Path]:
    """Write Table 2, Table 3 (if single layers were trained) and the figures. Returns the files."""
    texts = {"table2.md": table2_markdown(studies), "table2.csv": table2_csv(studies)}
    if table3(studies):
        texts |= {"table3.md": table3_markdown(studies), "table3.csv": table3_csv(studies)}
    for name, text in texts.items():
        write_text(folder / name, text, guard=guard)
    draw_figure2(studies, folder / "figure2.png", guard=guard)
    draw_figure3(studies, folder / "figure3.png", guard=guard)
    return [folder / name for name in (*texts, "figure2.png", "figure3.png")]
