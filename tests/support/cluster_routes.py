"""The ways to start a training job on every host of a cluster, one rank on each, as users do it.

Each starts launch/train.py, or run_preludes.py, which is launch/train.py behind a prelude. What every rank must have
in its environment travels as the route allows: in .deepspeed_env, as options of mpirun, or with the allocation. Hosts
with a tiny model on them are made here too, and the runs on one host that runs on all of them must equal.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.fake_hosts import FakeCluster, Started, wait_until
from support.folders import ROOT
from support.host_needs import host_environment, why_not
from support.ranks import ENVIRONMENT
from support.run_helpers import PRELUDES, TRAIN, Base, run, write_base
from support.slurm_cluster import SlurmCluster

PORT = 29500  # hosts have all their ports to themselves
MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
# Without these a cut link would be noticed by TCP alone, which takes many minutes.
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=2"
SSH_ENVIRONMENT = {"PDSH_SSH_ARGS_APPEND": KEEP_ALIVE, "PRTE_MCA_plm_ssh_agent": f"ssh {KEEP_ALIVE}", **MPI_ENVIRONMENT}
RUN = ROOT / "launch" / "run.py"
# launch/run.py with other ranks than launch/train.py: the folder of train.py comes first.
RUN_WITH = """
import sys
from pathlib import Path
from megatron_tiedlora.cluster.start import launch
from megatron_tiedlora.config.cli import run_command
from megatron_tiedlora.config.job_settings import parse_launch
run_command(lambda argv: launch(parse_launch(argv[1:]), scripts=Path(argv[0])), sys.argv[1:])
"""


@dataclass(frozen=True)
class Task:
    """What a job runs.

    Attributes:
        folder: where the launcher is started; all hosts see it.
        cache: of encoded data; runs share it.
        prelude: a function of run_preludes.py, or none.
        options: of the launcher, or of sbatch.
    """

    cluster: FakeCluster
    arguments: Sequence[str]
    folder: Path
    cache: Path
    prelude: str = ""
    slurm: SlurmCluster | None = None
    options: Sequence[str] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def script(self) -> list[str]:
        """The command of a rank, without the interpreter."""
        script = [str(PRELUDES), f"--prelude={self.prelude}"] if self.prelude else [str(TRAIN)]
        return [*script, *self.arguments]

    @property
    def forwarded_env(self) -> dict[str, str]:
        """What every rank must have in its environment."""
        kept = {name: value for name, value in host_environment().items() if name.startswith(("PYTHON", "TORCH"))}
        return {**ENVIRONMENT, **kept, **self.environment, "MEGATRON_TIEDLORA_CACHE": str(self.cache)}


class Job:
    """A job that has been started: the launchers that its user sees, or a number in Slurm's queue."""

    def __init__(self, task: Task, launchers: Sequence[Started], number: str = "") -> None:
        self.task, self.launchers, self.number = task, list(launchers), number

    def is_over(self) -> bool:
        """Whether its user sees the end of it."""
        if self.number:
            return self._slurm.field(self.number, "JobState") not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        return all(launcher.poll() is not None for launcher in self.launchers)

    def wait(self, limit: float = 200.0) -> int:
        """The exit status: the launcher's, the first that is not 0 of several, or that of the batch job."""
        wait_until(self.is_over, lambda: f"the job's end\n{self.output()[-6000:]}", limit=limit, pause=0.5)
        if self.number:
            code, _, signal_number = self._slurm.field(self.number, "ExitCode").partition(":")
            return int(code) or -int(signal_number)
        return next((status for launcher in self.launchers if (status := launcher.wait())), 0)

    def output(self) -> str:
        """Everything that was printed."""
        if self.number:
            log = self.task.folder / f"slurm-{self.number}.out"
            return (log.read_text(errors="replace") if log.exists() else "no output\n") + self._slurm.logs()
        return "\n".join(f"--- {launcher.host}\n{launcher.output()}" for launcher in self.launchers)

    def ranks(self) -> dict[str, psutil.Process]:
        """The process of the rank on each host that runs one."""
        found = {}
        for name, host in self.task.cluster.hosts.items():
            for process in host.jobs():
                words = _command_line(process)
                scripts = {self.task.script[0], str(self.task.folder / "train.py"), "launch/train.py"}
                if words[:1] == [sys.executable] and scripts & set(words[1:3]):
                    found[name] = process
        return found

    @property
    def _slurm(self) -> SlurmCluster:
        assert self.task.slurm is not None
        return self.task.slurm


def is_watcher(command: Sequence[str]) -> bool:
    """Whether a command line is launch/run.py's."""
    return str(RUN) in command or RUN_WITH in command


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


# Routes --------------------------------------------------------------------------------------------------------------


def start_deepspeed(task: Task, *options: str) -> Job:
    """deepspeed --hostfile OPTIONS."""
    write_variables(task)
    command = [_beside_python("deepspeed"), "--hostfile", task.cluster.hostfile(), *options, *task.options]
    return Job(task, [task.cluster.first.start([*command, *task.script], cwd=task.folder, env=SSH_ENVIRONMENT)])


def start_mpirun(task: Task) -> Job:
    """Plain mpirun; ranks are found by DeepSpeed's discovery."""
    variables = [word for name, value in task.forwarded_env.items() for word in ("-x", f"{name}={value}")]
    ranks = ["-np", str(len(task.cluster.hosts)), "--hostfile", str(task.cluster.hostfile())]
    command = ["mpirun", *ranks, *task.options, *variables, sys.executable, *task.script]
    return Job(task, [task.cluster.first.start(command, cwd=task.folder, env=SSH_ENVIRONMENT)])


def start_torchrun(task: Task) -> Job:
    """torchrun on each host; they meet on the first one."""
    command = [_beside_python("torchrun"), f"--nnodes={len(task.cluster.hosts)}", "--nproc-per-node=1"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-id=job", f"--rdzv-endpoint={task.cluster.first.name}:{PORT}"]
    words = [*command, *meeting, *task.options, *task.script]
    hosts = task.cluster.hosts.values()
    return Job(task, [host.start(words, cwd=task.folder, env=task.forwarded_env) for host in hosts])


def start_slurm(task: Task, name: str = "slurm.sbatch") -> Job:
    """sbatch of a script in launch/ without its line of GPUs; it starts the train.py of where it is submitted."""
    assert task.slurm is not None
    lines = (ROOT / "launch" / name).read_text().splitlines(keepends=True)
    script = task.folder / name
    script.write_text("".join(line for line in lines if not line.startswith("#SBATCH --gpus")))
    write_script(task, task.folder / "launch")
    size = [f"--nodes={len(task.cluster.hosts)}", "--ntasks-per-node=1", "--cpus-per-task=1", "--output=slurm-%j.out"]
    environment = {**task.forwarded_env, "PYTHON": sys.executable}
    words = [*size, *task.options, str(script), *task.arguments]
    return Job(task, [], task.slurm.submit(words, cwd=task.folder, env=environment))


def start_watched(task: Task, launcher: str, *, in_batch: bool = False) -> Job:
    """launch/run.py with a launcher of its own or of DeepSpeed: with a hostfile, or in a batch script of Slurm."""
    command = [sys.executable, str(RUN)]
    if task.prelude:
        write_script(task, task.folder)
        command = [sys.executable, "-c", RUN_WITH, str(task.folder)]
    command += ["--launcher", "deepspeed" if launcher in ("pdsh", "openmpi") else launcher, *task.options]
    forwarded = " ".join(f"-x {name}" for name in task.forwarded_env)
    own = {"openmpi": ["--launcher_args=--launcher=openmpi"], "mpirun": [f"--launcher_args={forwarded}"]}
    command += own.get(launcher, [])
    if in_batch:
        assert task.slurm is not None
        wrapped = f"exec {shlex.join([*command, *task.arguments])}"
        size = [f"--nodes={len(task.cluster.hosts)}", "--ntasks-per-node=1", f"--wrap={wrapped}"]
        return Job(task, [], task.slurm.submit(size, cwd=task.folder, env=task.forwarded_env))
    command += ["--hostfile", str(task.cluster.hostfile()), *task.arguments]
    environment = {**task.forwarded_env, **MPI_ENVIRONMENT}
    write_variables(task)
    return Job(task, [task.cluster.first.start(command, cwd=task.folder, env=environment)])


def write_variables(task: Task) -> None:
    """The file of what DeepSpeed and launch/run.py send to the hosts."""
    lines = {**task.forwarded_env, **MPI_ENVIRONMENT}.items()
    (task.folder / ".deepspeed_env").write_text("\n".join(f"{name}={value}" for name, value in lines))


def write_script(task: Task, folder: Path) -> None:
    """A train.py in `folder` that is launch/train.py, behind the task's prelude."""
    script, *words = task.script[: 2 if task.prelude else 1]
    text = f"import runpy, sys\nsys.argv[1:1] = {words}\nrunpy.run_path({script!r}, run_name='__main__')\n"
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(text)


def needed(route: str) -> str:
    """What a route needs of the machine."""
    launcher = route.removeprefix("run.py ")
    return {"pdsh": "pdsh", "torchrun": "ssh", "slurm": "slurm", "srun": "slurm"}.get(launcher, "openmpi")


def _beside_python(program: str) -> str:
    return str(Path(sys.executable).with_name(program))


ROUTES: dict[str, Callable[[Task], Job]] = {
    "pdsh": lambda task: start_deepspeed(task, "--master_addr", task.cluster.first.name, "--master_port", str(PORT)),
    "openmpi": lambda task: start_deepspeed(task, "--launcher", "openmpi"),
    "mpirun": start_mpirun,
    "slurm": start_slurm,
    "torchrun": start_torchrun,
    **{f"run.py {name}": partial(start_watched, launcher=name) for name in ("pdsh", "openmpi", "mpirun")},
    "run.py srun": partial(start_watched, launcher="srun", in_batch=True),
}


LAYOUTS = {"tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}, "dp2": {}, "pp3": {"pipeline_parallel": 3}}


@dataclass(frozen=True)
class Site:
    """Hosts with what jobs on them need.

    Attributes:
        slurm: where it is installed.
        whole: a folder for the run of each layout on one host.
        changes: to the settings of a tiny run.
    """

    base: Base
    cluster: FakeCluster
    slurm: SlurmCluster | None
    whole: Path
    changes: dict[str, Any]

    def settings(self, layout: str) -> dict[str, Any]:
        """Of all runs of a layout."""
        return {"warmup_steps": 1, "ds_config": "zero1.json", **self.changes, **LAYOUTS[layout]}

    def whole_run(self, layout: str) -> Path:
        """The run folder of an undisturbed run on one host."""
        folder = self.whole / layout
        if not folder.exists():
            run(self.base, folder, ranks=len(self.cluster.hosts), **self.settings(layout))
        return folder

    def task(self, folder: Path, layout: str, *, work: Path, prelude: str = "", **changes: Any) -> Task:
        """A run with run folder `folder` whose launcher is started in `work`."""
        arguments = self.base.arguments(output_dir=folder, **{**self.settings(layout), **changes})
        return Task(self.cluster, arguments, work, self.base.cache, prelude=prelude, slurm=self.slurm)


@contextmanager
def opened_site(cluster: FakeCluster, folders: pytest.TempPathFactory, **changes: Any) -> Iterator[Site]:
    """The site of a test module."""
    base = write_base(folders.mktemp("base"))
    with nullcontext() if why_not("slurm") else SlurmCluster(cluster, kill_wait=5) as slurm:
        yield Site(base, cluster, slurm, folders.mktemp("whole"), changes)
