"""Submits the parts of a study as jobs of Slurm: the base score, an array with one task per group, and the scores.

Each job runs `tiedlora sweep --part PART` in its allocation. The array starts if the base was scored, and the last job
when all tasks have ended. The first job is held until all jobs are recorded in `slurm.json`.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_tiedlora.base import files
from megatron_tiedlora.base.messages import UserError, naming, one_line
from megatron_tiedlora.config import fields
from megatron_tiedlora.study.record import BASE_NAME, SCORES, StudyFolder

SCRIPT_FILE, JOBS_FILE = "slurm.sbatch", "slurm.json"  # in the folder of the study
_LONGEST_SECONDS = 120  # for an answer of slurmctld
_SHORT = "-[AaBbCcDdeFGiJLMmNnopqStwx]"  # the short options of sbatch with a value
_OPTION = rf"(?s)--\w[\w-]*(=.*)?|{_SHORT}.+|-[HhkOQsVvW]"
_SAME = {"-a": "--array", "-d": "--dependency", "-e": "--error", "-G": "--gpus", "-H": "--hold", "-M": "--clusters"}
_SAME |= {"-N": "--nodes", "-n": "--ntasks", "-o": "--output", "-W": "--wait", "--tasks-per-node": "--ntasks-per-node"}
_READ = ("--nodes", "--ntasks-per-node", "--gpus-per-node", "--gres", "--array", "--signal")
# The sweep sets these options itself, needs the numbers of jobs in this queue, or cannot count ranks with them.
_OWN = ["--dependency", "--output", "--error", "--hold", "--wrap", "--wait", "--clusters", "--test-only", "--ntasks"]
_OWN += ["--ntasks-per-gpu", "--ntasks-per-tres", "--gpus", "--gpus-per-task", "--gpus-per-socket", "--tres-per-task"]
_INSTEAD = "it orders jobs and writes logs itself, and ranks follow from --nodes, --ntasks-per-node and --gpus-per-node"
_NUMBER = (r"(?:[\w.-]+:)?([1-9]\d{0,5})", "one number")
_FORMS = {"--array": (r"%([1-9]\d*)", "only a limit such as %4, as each group is a task")}
_FORMS |= {"--signal": (r"USR1@(\d+)", "USR1@SECONDS, on which ranks save")}
_FORMS |= {"--gres": (rf"gpu:{_NUMBER[0]}|(?!.*gpu).*", "gpu:N or gpu:TYPE:N, else --gpus-per-node=N")}
_SCRIPT = Path(__file__).with_name("job.sbatch")


class JobOptions(NamedTuple):
    """The options of sbatch for every job of a study."""

    words: tuple[str, ...]
    allocation: Mapping[str, str]  # the variables of an allocation with these options
    limit: str  # `%M` if at most M tasks of the array may run at once, else ''


@dataclass(frozen=True)
class Submitted:
    """The jobs that were submitted last, and the names of the runs of each group by the name of its first run."""

    jobs: list[files.Text]
    groups: dict[files.Text, list[files.Text]]


def job_options(text: str, *, num_gpus: int | None) -> JobOptions:
    """Return the options of sbatch in --slurm. A node has --num_gpus ranks, else one per task, else one per GPU.

    Raise UserError if a word is no option, an option is not for a sweep or abbreviated, or ranks cannot be counted."""
    given, counts, others = dict[str, str](), dict[str, int](), list[str]()
    with naming("--slurm"):
        words = iter(fields.launcher_words(text, flag="slurm"))
        for first in words:
            word = first + next(words, "") if re.fullmatch(_SHORT, first) else first
            name, _, value = word.partition("=") if word.startswith("--") else (word[:2], "", word[2:])
            name = _SAME.get(name, name)
            if not re.fullmatch(_OPTION, word):
                raise UserError(f"{word or repr(word)}: no option; write options as --option=value or -x value")
            if name in _OWN:
                raise UserError(f"{name} is not for a sweep; {_INSTEAD}")
            if name in _READ:
                pattern, fix = _FORMS.get(name, _NUMBER)
                if (found := re.fullmatch(pattern, value)) is None:
                    raise UserError(f"{name}={value}: give {fix}")
                given[name], counts[name] = value, int(found[1] or 0)
            elif full := next((each for each in (*_READ, *_OWN, *_SAME) if each.startswith(name)), ""):
                raise UserError(f"{name}: write the name in full, such as {full}")  # sbatch accepts abbreviations
            else:
                others.append(word)
    nodes, limit = counts.get("--nodes", 1), given.pop("--array", "")
    ranks = num_gpus or next(filter(None, map(counts.get, ("--ntasks-per-node", "--gpus-per-node", "--gres"))), 1)
    settings = {"--signal": "USR1@180", **given, "--nodes": nodes, "--ntasks-per-node": ranks}
    own = [f"{name}={value}" for name, value in settings.items()]
    names = ",".join(f"node{number}" for number in range(1, nodes + 1))
    allocation = {"SLURM_JOB_ID": "0", "SLURM_JOB_NODELIST": names, "SLURM_TASKS_PER_NODE": f"{ranks}(x{nodes})"}
    return JobOptions(("--job-name=tiedlora-sweep", *others, *own), allocation, limit)


@dataclass(frozen=True)
class Submission:
    """The jobs of the parts of a study that are left."""

    folder: StudyFolder
    options: JobOptions
    command: Sequence[str]  # of a job; `--part` is added
    groups: Mapping[str, list[str]]  # the names of the runs of each group, by the name of its first run
    unscored: Sequence[str]  # names without a score: the base model and the best runs

    @property
    def parts(self) -> list[list[str]]:
        """The parts of each job; [] if nothing is left."""
        jobs = [[BASE_NAME] * (BASE_NAME in self.unscored), [*self.groups], [SCORES]]
        return [names for names in jobs if names] if self.groups or self.unscored else []

    @property
    def script(self) -> str:
        """The batch script, whose arguments are parts of the study. It runs in the current folder."""
        return _SCRIPT.read_text().format(cwd=shlex.quote(str(Path.cwd())), command=shlex.join(self.command))

    def commands(self, numbers: Sequence[str]) -> Iterator[list[str]]:
        """Yield the sbatch command of each job. Before the next one, the caller appends its number to `numbers`."""
        folder = self.folder.path.absolute()
        logs = str(self.folder.logs.absolute()).replace("%", "%%")
        for index, names in enumerate(self.parts):
            is_array = names == [*self.groups]
            words = [*self.options.words, f"--output={logs}/slurm-{'%A_%a' if is_array else '%j'}.out"]
            words += [f"--array=0-{len(names) - 1}{self.options.limit}"] if is_array else []
            # A failed base score cancels the array, and then the last job reports the failure.
            after = f"--dependency=after{'ok' if is_array else 'any'}:{numbers[-1] if index else ''}"
            words += ["--kill-on-invalid-dep=yes", after] if index else ["--hold"]
            yield ["sbatch", "--parsable", *words, str(folder / SCRIPT_FILE), *names]

    def submit(self) -> list[str]:
        """Submit the jobs, write `slurm.json` and return the numbers of the jobs. The first job is held.

        Raise UserError if Slurm rejects a job, or if a file cannot be written. Then no job is left in the queue."""
        folder, jobs = self.folder, list[str]()
        files.write_text(folder.path / SCRIPT_FILE, self.script, guard=folder.guard)
        folder.logs.mkdir(exist_ok=True)
        try:
            for words in self.commands(jobs):
                jobs.append(call_slurm(*words).strip().partition(";")[0])  # a federation adds its cluster
            files.write_json(folder.path / JOBS_FILE, asdict(Submitted(jobs, {**self.groups})), guard=folder.guard)
        except BaseException:
            with suppress(UserError):
                call_slurm("scancel", *jobs)
            raise
        return jobs


def read_submitted(folder: StudyFolder) -> Submitted:
    """Return the jobs and groups that were submitted last. Raise UserError if `slurm.json` is not valid."""
    file = folder.path / JOBS_FILE
    content = files.read_json_object(file, kind="jobs") if file.is_file() else {"jobs": [], "groups": {}}
    return files.read_fields(file, content, Submitted)


def check_queue(folder: StudyFolder) -> None:
    """Raise UserError if jobs of the study are queued or run. Without squeue here, only the locks of folders count."""
    jobs = read_submitted(folder).jobs
    if not jobs or shutil.which("squeue") is None:
        return
    shown = call_slurm("squeue", "--noheader", "--format=%i", f"--jobs={','.join(jobs)}", unless="Invalid job id")
    if left := ", ".join(shown.split()):
        fix = f"wait until they end, or cancel them: scancel {' '.join(jobs)}"
        raise UserError(f"{folder.path}: jobs of this study are queued or run ({left}); {fix}")


def call_slurm(*words: str, unless: str = "") -> str:
    """Run a program of Slurm and return its output. Raise UserError if it fails, except with the message `unless`."""
    try:
        own = outside(os.environ)
        done = subprocess.run(words, env=own, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        why = one_line(getattr(error, "strerror", None) or str(error))
        raise UserError(f"--slurm: {words[0]} fails ({why}); submit on a login node of the cluster") from None
    if done.returncode and not (unless and unless in done.stderr):
        raise UserError(f"{words[0]} fails: {one_line(done.stderr.strip()) or f'status {done.returncode}'}")
    return done.stdout


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of an allocation, which would also describe it to new jobs."""
    return {name: value for name, value in environment.items() if name[:6] != "SLURM_" or name == "SLURM_CONF"}
