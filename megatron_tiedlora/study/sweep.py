"""Runs a study: scores the base model, trains the runs, scores the best runs, and writes tables and figures.

It starts tiedlora train and tiedlora evaluate with the launchers of tiedlora run. The files that these commands write
show how they ended, because a launcher may lose the exit status.
"""

import os
import re
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_tiedlora.base import files, ownership, progress
from megatron_tiedlora.base.messages import UserError, csv_text, os_errors, printable, show, user_path
from megatron_tiedlora.cluster import launchers, start
from megatron_tiedlora.config import adapter_settings, fields, job_settings
from megatron_tiedlora.evaluation.results import RESULTS_FILE
from megatron_tiedlora.planning.run_plan import with_models_length
from megatron_tiedlora.runtime import run_folder, stopping
from megatron_tiedlora.study import figures, record, slurm, tables
from megatron_tiedlora.study.plan import Group, SweepPlan, plan_sweep

LOG_MARK = "$ "  # precedes the command line of each launch in a log
_TERMINAL_CODE, _BAR_MARK = re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), "%|"
_SHOWN_FAILURES, _SHOWN_CHARACTERS = 3, 120

Begin = Callable[[launchers.Job, Path, int], start.RunningJob]


def begin_job(job: launchers.Job, log: Path, lock: int) -> start.RunningJob:
    """Start a job whose output is appended to a log file, and return the running job.

    Args:
        lock: the file descriptor of the folder's lock. The launcher keeps it open, so that the folder stays locked if
            the sweep is killed and the launcher still runs.

    Raises:
        UserError: the log cannot be written, or the launcher cannot be started.
    """
    plan = launchers.plan_start(job, os.environ)
    with os_errors(f"{log}: cannot be written"):
        log.parent.mkdir(parents=True, exist_ok=True)
        files.make_way_for_log(log)
        with log.open("a+b", buffering=0) as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 1))
            mark = LOG_MARK if stream.read(1) in (b"", b"\n") else f"\n{LOG_MARK}"  # a killed process may cut a line
            stream.write(f"{mark}{shlex.join(plan.words)}\n".encode())
            return start.RunningJob(job, plan, stdout=stream, stderr=stream, pass_fds=(lock,))


def sweep(command: job_settings.SweepCommand, *, scripts: Path, begin: Begin = begin_job) -> int:
    """Run or resume a study. Return 0 if everything finished, 1 after a failure, or 128 + signal number after a signal.

    Args:
        scripts: the folder of the scripts of tiedlora train and tiedlora evaluate.

    Raises:
        UserError: settings, model, task or folder are not valid, a file cannot be written, or a launcher cannot be
            started. Settings, model, task and folder are checked before anything is launched.
    """
    settings = command.settings
    if settings.tables_from is not None:
        return join_studies(settings.tables_from, user_path(settings.output_dir), take_over=settings.take_over)
    plan, part = plan_sweep(command), "" if settings.part in (None, record.SCORES) else str(settings.part)
    if settings.dry_run:
        show(*plan.dry_run_lines())
        if plan.options is not None:
            jobs = submission(plan)
            show("", f"{plan.folder.path / slurm.SCRIPT_FILE}:", *jobs.script.splitlines(), "")
            show(*(shlex.join(words) for words in jobs.commands(["JOB"])))
        return 0
    plan.source.weights_folder()  # rejects a preset, which has no weights
    if settings.part is None:
        slurm.check_queue(plan.folder)
    if plan.options is not None and (jobs := submission(plan)).parts:
        return submit_jobs(plan, jobs)
    with TemporaryDirectory(prefix="megatron_tiedlora-") as private:  # only this user can read it
        start.check_programs(plan.job)
        take = partial(lock_study, plan.folder.path, part=part, take_over=settings.take_over)
        # A killed task on another node keeps its lock until its token is stale.
        seconds = 0 if settings.part is None else ownership.STALE_SECONDS + 10
        with ownership.retried(take, seconds=seconds, pause=1) as lock, stopping.StopSignals() as stop:
            plan = replace(plan, folder=record.StudyFolder(plan.folder.path, lock.owner, part))
            if settings.part is None:
                record.write_record(plan.folder, command, plan.base)
            files.discard(plan.folder.status, guard=plan.folder.guard)
            work = Sweep(plan, Path(private), scripts, begin, lock.descriptor, stop)
            try:
                work.run()
            except BaseException as error:
                with suppress(UserError):  # the disk may be full
                    work.write_status("failed", reason=str(error) or type(error).__name__)
                raise
            return work.end()


def submission(plan: SweepPlan) -> slurm.Submission:
    """Return the jobs of the parts of the study that are left. They get the flags that no file may give."""
    settings, folder = plan.command.settings, plan.folder
    assert plan.options is not None
    words = [sys.executable, "-u", "-P", "-m", "megatron_tiedlora", "sweep", f"--output_dir={folder.path.absolute()}"]
    given = {"launcher_args": settings.launcher_args, "take_over": settings.take_over or None}
    words += [f"--{name}={fields.flag_value(value)}" for name, value in given.items() if value is not None]
    groups = {runs[0].name: [run.name for run in runs] for runs in plan.groups()}
    scored = (record.BASE_NAME, *chosen_runs(plan).values())
    unscored = [name for name in scored if record.read_score(folder.scores / name) is None]
    return slurm.Submission(folder, plan.options, words, groups, unscored)


def submit_jobs(plan: SweepPlan, jobs: slurm.Submission) -> int:
    """Submit the jobs of a study, and return the exit status 0. Raise UserError if Slurm or a folder rejects them."""
    slurm.call_slurm("sbatch", "--version")
    show(*plan.dry_run_lines())
    with lock_study(plan.folder.path, take_over=plan.command.settings.take_over) as lock:
        folder = replace(plan.folder, owner=lock.owner)
        slurm.check_queue(folder)  # another command may have submitted them meanwhile
        record.write_record(folder, plan.command, plan.base)
        files.discard(folder.status, guard=folder.guard)
        numbers = replace(jobs, folder=folder).submit()
    slurm.call_slurm("scontrol", "release", numbers[0])  # it could not lock its part before
    said = f"  submitted jobs {', '.join(numbers)}; cancel with: scancel {' '.join(numbers)}"
    show("", said, f"  logs in {folder.logs}")
    return 0


def lock_study(folder: Path, *, part: str = "", take_over: bool = False) -> ownership.FolderLock:
    """Lock a study's folder, or one part beside others, and return the lock. A missing folder is created.

    Raises:
        UserError: another sweep, or the launcher of a killed sweep, writes to the folder.
    """
    hint = "it is another sweep or a run of a killed sweep; wait until it ends, or stop it (--take_over takes the"
    study, hint = record.StudyFolder(folder, part=part), f"{hint} folder anyway)"
    lock = ownership.take_folder(study.status.parent, take_over=take_over, hint=hint)
    try:
        for other in [folder] if part else sorted(study.jobs.glob("*")):
            if take_over and not part:
                ownership.take_folder(other, take_over=True, hint=hint).release()
            else:
                ownership.reject_owner(other, now=os.fstat(lock.descriptor).st_mtime, hint=hint)
    except BaseException:
        lock.release()
        raise
    return lock


@dataclass
class Sweep:
    """A running study. Its commands are launched one after another.

    Attributes:
        private: a folder for files of the launchers, which other users cannot read.
        scripts: the folder of the scripts that are launched.
        lock: the file descriptor of the lock on the study's folder.
        failures: the reason and the log file of each failed run or score, by its name.
    """

    plan: SweepPlan
    private: Path
    scripts: Path
    begin: Begin
    lock: int
    stop: stopping.StopSignals
    failures: dict[str, tuple[str, Path]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder, self.command, self._began = self.plan.folder, self.plan.command, time.monotonic()
        self._done, self._training = 0, list[record.Run]()
        total = 1 + len(self.plan.runs) + len({(run.point, run.seed) for run in self.plan.runs})
        shown = "{desc} {percentage:3.0f}%|{bar:20}| {n:.1f} of {total} [{elapsed}, {remaining} left]{postfix}"
        self._bar = progress.progress_bar("sweep", "run", total=total, leave=True, bar_format=shown)

    @property
    def given_up(self) -> bool:
        """Whether training was skipped because the base model could not be scored."""
        return f"score {record.BASE_NAME}" in self.failures

    def run(self) -> None:
        """Score the base model, train the runs, and score the best runs, or do the part of --part. Launch nothing
        after a signal. The part `scores` trains nothing, so runs that are not finished count as failed.

        Raises:
            UserError: a file cannot be written, or a launcher cannot be started.
        """
        groups, part, base = self.plan.groups(), self.command.settings.part, f"score {record.BASE_NAME}"
        is_last = part == record.SCORES
        with self._bar:
            if part is None or is_last:
                self._take_scores()
            if part in (None, record.BASE_NAME):
                self._score({base: record.BASE_NAME})
            elif is_last and record.read_score(self.folder.scores / record.BASE_NAME) is None:
                self._note(base, None, base)
            for runs in () if self.given_up else groups:
                (self._note_runs if is_last else self._train)(runs)
            if (part is None or is_last) and not self.given_up:
                self._score(chosen_runs(self.plan))
            self._count()

    def _count(self) -> None:
        """Show the number of finished runs and scores in the progress bar."""
        done = sum(map(self.plan.is_finished, self.plan.runs))
        names = (record.BASE_NAME, *chosen_runs(self.plan).values())
        done += sum(record.read_score(self.folder.scores / name) is not None for name in names)
        self._done = done
        self._bar.update(done - self._bar.n)

    def _part(self, run: record.Run) -> float:
        """Return the fraction of the run's steps that are done, from 0 to 1."""
        steps = self.plan.runs[run].settings.max_steps
        row = last_row(run_folder.RunFolder(self.folder.runs / run.name).metrics)
        return 0.0 if row is None else min(row["step"] / steps, 1.0)

    def _train(self, runs: Group) -> None:
        """Train the runs together in one launch. Each run has its own folder."""
        if self.stop.received:
            return
        folder, first, several = self.folder, runs[0].name, len({(run.point, run.seed) for run in runs}) < len(runs)
        done = list(filter(self.plan.is_finished, runs))
        left = [run for run in runs if run not in done]
        for run in left:  # if this launch fails, an old status must not be read as its reason
            files.discard(run_folder.RunFolder(folder.runs / run.name).status, guard=folder.guard)
        file, output = folder.groups / f"{first}.yaml", folder.groups / first
        with suppress(OSError):  # writing the file then reports what is wrong
            file.parent.mkdir(exist_ok=True)
        entries = [{"name": run.name, **run.settings, "output_dir": str(folder.runs / run.name)} for run in runs]
        files.write_yaml(file, entries, guard=folder.guard)
        given = {name: value for name, value in self.command.shared.items() if name != "test_file"}
        given |= {"adapters": file, "output_dir": output, "resume": "auto"}
        given |= {"halving": True} if self.command.settings.halving and several else {}
        self._training = left
        ended = self._start(f"group {first}", "train", given)
        self._training = []
        if any(record.read_run(folder.runs / run.name).reason == signal.SIGUSR1.name for run in left):
            self.stop.received.append(signal.SIGUSR1)  # Slurm sends it to the ranks alone before the time limit
        elif ended:
            self._note_runs(runs, before=done)

    def _note_runs(self, runs: Group, before: Sequence[record.Run] = ()) -> None:
        """Print how the runs of a group ended. `before` are those that had finished before."""
        for run in runs:
            end = record.read_run(self.folder.runs / run.name)
            words = end.in_words(self.command.train.eval_metric) if end.state == "finished" else None
            if run not in before:
                self._note(run.name, words, f"group {runs[0].name}", end.reason)

    def _score(self, wanted: Mapping[str, str]) -> None:
        """Score the base model alone, or several runs together. `wanted` maps score names to run names."""
        folder, train, settings = self.folder, self.command.train, self.command.settings
        left = {item: name for item, name in wanted.items() if record.read_score(folder.scores / name) is None}
        if not left or self.stop.received:
            return
        is_base = record.BASE_NAME in left.values()
        output = folder.scores / record.BASE_NAME if is_base else folder.groups / record.SCORES
        files.discard(output, guard=folder.guard)  # the folder of an earlier launch has no result
        given = {n: getattr(train, n) for n in fields.marked(adapter_settings.EvaluateSettings, shared=True)}
        given |= {"max_length": with_models_length(train, self.plan.source).max_length, "output_dir": output}
        given |= {"batch_size": settings.test_batch_size, "limit": self.plan.test_limit}
        adapters = (f"{name}={folder.runs / name / 'adapter'}" for name in left.values())
        words = () if is_base else ("--adapters", *adapters)
        log = f"score {record.BASE_NAME}" if is_base else record.SCORES
        if not self._start(log, "evaluate", given, words):
            return
        self._take_scores()
        for item, name in left.items():
            score = record.read_score(folder.scores / name)
            words_of = None if score is None else f"{self.plan.base.metric} {score.value:.2f} % ({name})"
            self._note(item, words_of, log)

    def _take_scores(self) -> None:
        """Move the scores of a joint evaluation, or of a killed sweep, to the score folders of the runs."""
        made = self.folder.groups / record.SCORES
        for found in sorted(made.glob(f"*/{RESULTS_FILE}")):
            target = self.folder.scores / found.parent.name
            files.discard(target, guard=self.folder.guard)  # an earlier folder has no result, or the same one
            with os_errors(f"{target}: cannot be written"):
                target.parent.mkdir(exist_ok=True)
                found.parent.replace(target)
        files.discard(made, guard=self.folder.guard)

    # One launch -------------------------------------------------------------------------------------------------------

    def _start(self, name: str, script: str, settings: Mapping[str, Any], words: Sequence[str] = ()) -> bool:
        """Launch a script and wait until it ends. Return False if a signal was received in the meantime, else True.

        Args:
            name: the name of the log file.
            settings: the values of the script's flags by name. Flags with the value None are not passed.
            words: further arguments of the command line.
        """
        self.folder.guard()
        self._count()
        given = {**settings, "take_over": self.command.settings.take_over or None}
        flags = {flag: value for flag, value in given.items() if value is not None}
        arguments = (*(f"--{flag}={fields.flag_value(value)}" for flag, value in flags.items()), *words)
        program, private = (str(self.scripts / f"{script}.py"),), self.private
        job = replace(self.plan.job, program=program, arguments=arguments, private=private)
        job = replace(job, master_port=start.new_port(self.command.launcher), start=secrets.token_hex(8))
        status = start.StatusFile(run_folder.RunFolder(Path(settings["output_dir"])), job.start)
        self._log, self._began = self.folder.log(name), time.monotonic()
        running = self.begin(job, self._log, self.lock)
        try:
            grace = self.command.launcher.grace_seconds
            start.wait_for_end(running, status, self.stop, grace=grace, on_poll=self._show, tell=self._say)
            running.end(self._say)
        finally:
            running.kill()  # has an effect only if this sweep was interrupted
        return not self.stop.received

    def _note(self, item: str, words: str | None, log: str, recorded: str = "") -> None:
        """Print how a run or score ended, and store the reason if it failed.

        Args:
            words: a description of the result; None if the run or score failed.
            recorded: the reason in the run's folder, or ''. It is used first, as the log has the errors of all runs.
        """
        if words is None:
            lines = last_lines(self.folder.log(log), 40)
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            unknown = "it ended without a result" if self.folder.log(log).is_file() else "it was not started"
            reason = recorded or (errors or [unknown])[-1]
            self.failures[item] = reason, self.folder.log(log)
            words = f"FAILED: {reason}"
        seconds = time.monotonic() - self._began
        minutes = round(seconds) // 60
        took = f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
        self._bar.write(printable(f"{item:<28} {words}  [{took}]"))

    def _say(self, line: str) -> None:
        with suppress(OSError):
            self._bar.write(printable(f"tiedlora sweep: {line}"))

    def _show(self) -> None:
        """Show the progress of the running launch and its last line of output, usually its own progress bar."""
        with suppress(OSError):  # the sweep continues if the disk is full or the terminal is closed
            self._bar.update(self._done + sum(map(self._part, self._training)) - self._bar.n)
            line = "".join(last_lines(self._log, 1, bars=True))
            self._bar.set_postfix_str(printable(f"{self._log.stem}: {line}"[:_SHOWN_CHARACTERS]))

    # The end ----------------------------------------------------------------------------------------------------------

    def write_status(self, state: str, *, reason: str | None = None) -> None:
        """Write to sweep_status.json how this launch ended, and each failure with its reason and last log lines.

        Args:
            reason: why the sweep itself failed; None if it did not.
        """
        failed = [
            {"name": name, "reason": why, "log": str(log), "last_lines": last_lines(log)}
            for name, (why, log) in self.failures.items()
        ]
        own = {} if reason is None else {"reason": reason}
        files.write_json(self.folder.status, {"state": state, **own, "failed": failed}, guard=self.folder.guard)

    def end(self) -> int:
        """Write the status, tables and figures, show the failures, and return the exit status."""
        folder, failures = self.folder, self.failures
        if self.stop.received:
            self.write_status("stopped")
            show(f"stopped; to resume, repeat the command or give only --output_dir {shlex.quote(str(folder.path))}")
            return 128 + self.stop.received[0]
        self.write_status("failed" if failures else "finished")
        if not self.given_up and not folder.part:
            written = write_tables([record.read_study(folder.path)], folder.path, guard=folder.guard)
            show("", *(folder.path / "table2.md").read_text(encoding="utf-8").split("\n"))
            show(*(f"written    {path}" for path in written))
        for name, (reason, log) in list(failures.items())[:_SHOWN_FAILURES]:
            show("", f"{name}: {reason}; the end of {log}:")
            show(*(f"    {line}" for line in last_lines(log)))
        if failures:
            gave_up = "; nothing else was started" if self.given_up else ""
            line = f"error: {len(failures)} failed: {', '.join(failures)}{gave_up}"
            show(f"{line} (logs in {folder.logs})", file=sys.stderr)
        return 1 if failures else 0


def chosen_runs(plan: SweepPlan) -> dict[str, str]:
    """Return a dict from the score name of each method, rank and seed to the name of its best finished run."""
    grid, metric = plan.grid, plan.command.train.eval_metric
    found = (record.best_runs(plan.folder, grid.runs(point), metric=metric) for point in grid.points)
    return {f"score {run.point.name}{run.seed_part}": run.name for runs in found for run in runs}


def last_row(metrics: Path) -> dict[str, Any] | None:
    """Return the last complete row of a metrics.jsonl to which a run may still write; None if there is no row."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, metrics.stat().st_size - 4096))
            lines = stream.read().split(b"\n")[:-1]
    except OSError:
        return None
    return run_folder.metrics_row(lines[-1]) if lines else None


def last_lines(log: Path, count: int = 12, *, bars: bool = False) -> list[str]:
    """Return the last output lines of the latest launch in a log. If `bars`, progress bars are included."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20_000))
        lines = stream.read().decode(errors="replace").split("\n")
    starts = [index for index, line in enumerate(lines) if line.startswith(LOG_MARK)]
    last = lines[starts[-1] + 1 :] if starts else lines
    shown = (_TERMINAL_CODE.sub("", line.rstrip().rsplit("\r", 1)[-1]).rstrip() for line in last)
    return [line for line in shown if line and (bars or _BAR_MARK not in line)][-count:]


def join_studies(folders: Sequence[str], target: Path, *, take_over: bool = False) -> int:
    """Write the tables and figures of several studies, one per task, to `target`. Return the exit status 0.

    Raises:
        UserError: a folder has no study, a task appears twice, or the base models differ.
    """
    studies = [record.read_study(user_path(folder)) for folder in folders]
    for index, study in enumerate(studies):
        if any(study.base.task == other.base.task for other in studies[:index]):
            raise UserError(f"{study.folder}: task {study.base.task} appears twice; give one sweep for each task")
        if study.base.base_hash != studies[0].base.base_hash:
            other = f"{studies[0].base.model} of {studies[0].folder}; give sweeps of the same model"
            raise UserError(f"{study.folder}: its base model {study.base.model} differs from {other}")
    with lock_study(target, take_over=take_over) as lock:
        show(*(f"written    {path}" for path in write_tables(studies, target, guard=lock.owner.check)))
    return 0


def write_tables(studies: Sequence[record.Study], folder: Path, *, guard: files.Guard = files.unguarded) -> list[Path]:
    """Write Table 2, Table 3 (if single layers were trained) and the figures, and return the files."""
    made = {"table2": (tables.TABLE2_COLUMNS, tables.table2(studies), tables.table2_layout(studies))}
    if any(study.grid.table3 for study in studies):
        made["table3"] = (tables.TABLE3_COLUMNS, tables.table3(studies), tables.table3_layout(studies))
    texts = dict[str, str]()
    for name, (columns, records, table) in made.items():
        own = {"md": table.markdown(), "csv": csv_text(columns, records), "tex": table.latex()}
        texts |= {f"{name}.{ending}": text for ending, text in own.items()}
    for name, text in texts.items():
        files.write_text(folder / name, text, guard=guard)
    return [*(folder / name for name in texts), *figures.draw_figures(studies, folder, guard=guard)]
