"""Runs a study from its settings to its tables: starts the jobs of plan.py, and writes the tables at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megatron_tiedlora.base.atomic import Guard, unguarded, write_text
from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.cluster.signals import StopSignals
from megatron_tiedlora.config.sweep_settings import SweepCommand
from megatron_tiedlora.study.figures import draw_figure2, draw_figure3
from megatron_tiedlora.study.jobs import Outcome, run_jobs
from megatron_tiedlora.study.lock import lock_study, reject_left_behind
from megatron_tiedlora.study.plan import SweepPlan, plan_sweep
from megatron_tiedlora.study.processes import Start
from megatron_tiedlora.study.record import StudyFolder, last_lines, write_record, write_status
from megatron_tiedlora.study.scores import Study, read_study
from megatron_tiedlora.study.tables import table3
from megatron_tiedlora.study.text import table2_csv, table2_markdown, table3_csv, table3_markdown

_SHOWN_FAILURES = 3


def sweep(command: SweepCommand, starter: Callable[[], Start]) -> int:
    """Run or resume a study. Returns the exit status: 0 all finished, 1 something failed, 130 or 143 stopped.

    Args:
        starter: makes the function that starts commands; raises UserError if it cannot.

    Raises:
        UserError: settings, model, task or folder do not fit, before anything is started; or a file or launcher cannot
            be written or started. In that case the running commands have been stopped and have ended.
    """
    settings = command.settings
    if settings.tables_from is not None:
        return join_studies(settings.tables_from, user_path(settings.output_dir), take_over=settings.take_over)
    plan = plan_sweep(command)
    if settings.dry_run:
        show(*plan.dry_run_lines())
        return 0
    plan.source.weights_folder()  # rejects a preset, which has no weights
    start, slots = starter(), plan.slots()
    reject_left_behind(plan.folder.path)  # before the folder is taken over, and again afterwards
    with lock_study(plan.folder.path, take_over=settings.take_over) as lock, StopSignals() as stop:
        folder = StudyFolder(plan.folder.path, lock.owner)
        plan = replace(plan, folder=folder)
        reject_left_behind(folder.path)
        write_record(folder, command, plan.base)
        try:
            jobs = plan.jobs(lock.descriptor)
            num_to_do = sum(job.size for job in jobs)
            outcome = run_jobs(jobs, slots=slots, start=start, stop=stop, finished=plan.num_jobs - num_to_do)
        except BaseException as error:
            with suppress(UserError):  # the disk may be full
                write_status(folder, "failed", {}, reason=str(error) or type(error).__name__)
            raise
        return _end(plan, outcome)


def _end(plan: SweepPlan, outcome: Outcome) -> int:
    folder = plan.folder
    if outcome.stopped_by:
        write_status(folder, "stopped", outcome.failures, logs=outcome.logs)
        show(f"stopped; the same command, or --output_dir {shlex.quote(str(folder.path))} alone, resumes it")
        return 128 + outcome.stopped_by
    write_status(folder, "failed" if outcome.failures else "finished", outcome.failures, logs=outcome.logs)
    if not outcome.given_up:
        study = read_study(folder.path)
        written = write_tables([study], folder.path, guard=folder.guard)
        show("", *(folder.path / "table2.md").read_text(encoding="utf-8").split("\n"))
        show(*(f"written    {path}" for path in written))
    if not outcome.failures:
        return 0
    names = list(outcome.failures)
    for name in names[:_SHOWN_FAILURES]:
        log = folder.log(outcome.logs.get(name, name))
        show("", f"{name}: {outcome.failures[name]}; the end of {log}:")
        show(*(f"    {line}" for line in last_lines(log)))
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
