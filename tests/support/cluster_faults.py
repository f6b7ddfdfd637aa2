"""What can happen to a job on several hosts in the middle of training, and what is left of the job then."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from support.cluster_routes import Job, is_watcher
from support.fake_hosts import FakeHost, wait_until
from support.run_files import has_step

# What serves a rank on its host (the last is torchrun's agent). When it has ended they tell their peers, and try to
# for long if a link is cut; a session of sshd may do so on either side of it, and is none of the job.
AGENT = "pt_elastic"
WAITERS = ("sshd", "prted", "slurmstepd", AGENT)
END_LIMIT = 90.0  # seconds after a fault, until the last process of the job has to be gone
QUICK_END = 5.0  # seconds in which the end is looked for often


# Faults ----------------------------------------------------------------------------------------------------------


def kill_launcher(job: Job) -> None:
    """SIGKILL to the launcher: deepspeed, mpirun, srun or the torchrun that serves the rendezvous."""
    if job.number:
        _kill_programs(job, "srun")
    elif any(Path(word).name == "torchrun" for launcher in job.launchers for word in launcher.command):
        _kill_programs(job, AGENT)
    elif any(is_watcher(launcher.command) for launcher in job.launchers):
        (launcher,) = psutil.Process(job.launchers[0].pid).children()
        launcher.kill()
    else:
        job.launchers[-1].signal(signal.SIGKILL)


def kill_node_launcher(job: Job) -> None:
    """SIGKILL to whatever started the rank on the last host."""
    parent = job.ranks()[_last(job).name].parent()
    assert parent is not None
    parent.kill()


def fill_disk(job: Job) -> None:
    """The file system of the run folder has room for a log line or two left, on the host of rank 0."""
    first, filler = job.task.cluster.first, run_folder(job).parent / "filler"
    first.run(["dd", "if=/dev/zero", f"of={filler}", "bs=4k"], check=False)
    first.run(["truncate", "-s", "-8K", filler])


def terminate(job: Job) -> None:
    """SIGTERM to the command that the user has started, as a shell or a service manager sends it."""
    if job.number:
        _signal_watcher(job, signal.SIGTERM)
    for launcher in job.launchers:
        launcher.signal(signal.SIGTERM)


# What is killed gets SIGKILL; ranks, hosts and links that are not named otherwise are those of the last host.
FAULTS: dict[str, Callable[[Job], object]] = {
    "none": lambda job: None,
    "rank": lambda job: job.ranks()[_last(job).name].kill(),
    "rank 0": lambda job: job.ranks()[job.task.cluster.first.name].kill(),  # which serves the others' store
    "launcher": kill_launcher,
    "run.py": lambda job: _signal_watcher(job, signal.SIGKILL),
    "pdsh": lambda job: _kill_programs(job, "pdsh"),  # which deepspeed has started
    "launcher on a host": kill_node_launcher,
    "host": lambda job: _last(job).kill(),
    "link": lambda job: _last(job).cut_link(),
    "disk full": fill_disk,
    "SIGTERM": terminate,
    "scancel": lambda job: job.task.cluster.first.run(["scancel", job.number]),
}


def _last(job: Job) -> FakeHost:
    return list(job.task.cluster.hosts.values())[-1]


def _signal_watcher(job: Job, number: int) -> None:
    """Signal launch/run.py, which may run in a batch script."""
    (watcher,) = [process for process in job.task.cluster.first.jobs() if is_watcher(process.cmdline()[:3])]
    watcher.send_signal(number)


def _kill_programs(job: Job, name: str) -> None:
    found = [process for process in job.task.cluster.first.jobs() if process.name() in (name, f"{name}.bin")]
    assert found, f"no {name} among {job.task.cluster.jobs()}"
    for process in found:
        process.kill()


# What becomes of the job -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How a job ended after a fault.

    Attributes:
        told: seconds until whoever started the job saw its end, on hosts that are not cut off; None where that took too
            long.
        over: seconds until no process of it was left on any host, but daemons that wait for a link; None likewise.
        exit_status: of the launcher, or of the batch job.
        state: and reason, of run_status.json; both empty where there is none.
        left: command lines of the processes that did not end; of those daemons, two minutes after the link was back.
    """

    told: float | None
    over: float | None
    exit_status: int | None
    state: str
    reason: str
    left: Mapping[str, Sequence[str]]

    def row(self, route: str, fault: str) -> str:
        """A row of the table of figures."""
        seconds = ["never" if value is None else f"{value:.1f}" for value in (self.told, self.over)]
        left = "; ".join(f"{host}: {len(lines)}" for host, lines in self.left.items()) or "none"
        cells = [route, fault, *seconds, self.exit_status, left, self.state or "no file", self.reason]
        return f"| {' | '.join(map(str, cells))} |"


TABLE_HEAD = (
    "| route | fault | launcher back, s | all over, s | exit status | processes left | run_status.json | its reason |\n"
    "|---|---|---|---|---|---|---|---|"
)


def wait_for_step(job: Job, step: int, *, limit: float = 200.0) -> None:
    """Wait until the job has finished a training step."""
    started, looked = time.monotonic(), 0.0
    while not has_step(seen_by_first(job, run_folder(job)), step):
        now = time.monotonic()
        if now - looked > 2.0:  # a look at Slurm is a command
            assert not job.is_over() and now - started < limit, f"no step {step}\n{job.output()[-6000:]}"
            looked = time.monotonic()
        time.sleep(0.1)


def suffer(job: Job, fault: str, *, limit: float = END_LIMIT) -> Outcome:
    """Let `fault` happen now, and watch the job's end; then whatever is left of it is killed."""
    started, told, over = time.monotonic(), None, None
    try:
        FAULTS[fault](job)
        while (now := time.monotonic() - started) < limit and (told is None or over is None):
            told = now if told is None and _is_told(job, cut=fault == "link") else told
            over = now if over is None and not _left(job, cut=fault == "link") else over
            # Each look at Slurm is a command, and one at the hosts a look at all processes.
            time.sleep(0.1 if now < QUICK_END and not job.number else 0.5)
        if fault == "link" and over is not None:
            _last(job).restore_link()
            with suppress(AssertionError):
                wait_until(lambda: not _left(job), "the daemons' end", limit=120)
        left = _left(job)
    finally:
        heal(job)
        for launcher in job.launchers:
            launcher.kill()
    exit_status = job.wait()
    status = read_status(job)
    return Outcome(told, over, exit_status, status.get("state", ""), status.get("reason", ""), left)


def heal(job: Job) -> None:
    """Undo what a fault has done to the hosts, and end what it has left of the job."""
    for host in job.task.cluster.hosts.values():
        if not host.is_up:  # once its daemon is there, Slurm may start the job anew on it
            host.boot()
            host.start_sshd()
            if job.task.slurm is not None:
                job.task.slurm.start_node(host.name)
            continue
        host.restore_link()
        for process in host.jobs():
            with suppress(psutil.NoSuchProcess):
                process.kill()
    (seen_by_first(job, run_folder(job).parent) / "filler").unlink(missing_ok=True)


def _is_told(job: Job, *, cut: bool) -> bool:
    """Whether the job's user sees its end; at a last host that is cut off nobody does."""
    seen = [launcher for launcher in job.launchers if not cut or launcher.host != _last(job).name]
    return all(launcher.poll() is not None for launcher in seen) if seen else job.is_over()


def _left(job: Job, *, cut: bool = False) -> dict[str, list[str]]:
    """Processes of the job by host, launchers included.

    Args:
        cut: the last host is: there what only waits for the network is not counted.
    """
    found: dict[str, list[str]] = {}
    for name, host in job.task.cluster.hosts.items():
        for process in host.jobs():
            with suppress(psutil.NoSuchProcess):
                waits = process.name().startswith(WAITERS if cut and host is _last(job) else WAITERS[:1])
                below = [child for child in process.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
                if not waits or any(not child.name().startswith(WAITERS) for child in below):
                    found.setdefault(name, []).append(" ".join(process.cmdline()) or process.name())
    return found


def run_folder(job: Job) -> Path:
    """The job's run folder, as the hosts see it."""
    prefix = "--output_dir="
    return Path(next(word for word in job.task.arguments if word.startswith(prefix)).removeprefix(prefix))


def seen_by_first(job: Job, path: Path) -> Path:
    """A path as the first host sees it, which may have a file system of its own there."""
    return job.task.cluster.first.outside(path)


def read_status(job: Job) -> dict[str, Any]:
    """run_status.json; empty where there is none."""
    file = seen_by_first(job, run_folder(job) / "run_status.json")
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return content
