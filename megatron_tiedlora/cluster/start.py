"""tiedlora run: from settings to a job that has been watched to its end; the table of contents of a start."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.cluster.decide import Times
from megatron_tiedlora.cluster.job_hosts import JobHosts
from megatron_tiedlora.cluster.remote import Route
from megatron_tiedlora.cluster.routes import Job, StartPlan, plan_start
from megatron_tiedlora.cluster.signals import StopSignals
from megatron_tiedlora.cluster.verdict import StatusFile, judge
from megatron_tiedlora.cluster.watch import say, start_all, watch
from megatron_tiedlora.config.batch import plan_batches
from megatron_tiedlora.config.hosts import Host, expand_nodelist, num_ranks, read_hostfile, slurm_hosts
from megatron_tiedlora.config.launch_settings import LaunchCommand, LaunchSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder, run_name

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ephemeral ports of most systems
_PROGRAMS = {"pdsh": ("pdsh", "pgrep"), "openmpi": ("mpirun", "pgrep"), "mpirun": ("mpirun",), "srun": ("srun",)}
_SRUN_SOON_SECONDS = 10.0  # each look is a job step, which costs Slurm's controller work
_TIMES = Times()


def launch(command: LaunchCommand, *, scripts: Path, times: Times = _TIMES) -> int:
    """Start a job, watch it to its end and report it; returns the exit status.

    Args:
        scripts: the folder of the script of `tiedlora train`.
        times: time limits; the settings override two of them.

    Raises:
        UserError: settings, hosts, layout, batch or folder do not fit; nothing has been started then.
    """
    settings, environment = command.settings, dict(os.environ)
    launcher, route, hosts = choose_hosts(settings, environment)
    check_num_ranks(command.train, num_ranks(hosts))
    chosen = choose_run_folder(command.train.output_dir, name=run_name(command.train), resume=command.train.resume)
    folder = RunFolder(chosen.path.absolute())
    private = Path(tempfile.mkdtemp(prefix="megatron_tiedlora-"))  # only this user can read it
    try:
        job = make_job(command, launcher, route, hosts, scripts=scripts, private=private, folder=folder)
        if settings.show_command:
            lines = command_lines(plan_start(job, environment), job, folder, environment)
            show(*(part for line in lines for part in line.split("\n")))
            return 0
        _check_programs(job)
        return _run(job, settings, environment, folder, times)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _run(job: Job, settings: LaunchSettings, environment: Mapping[str, str], folder: RunFolder, times: Times) -> int:
    with StopSignals(more=(signal.SIGUSR1,)) as signals:
        hosts = JobHosts(job, environment, limit=settings.host_seconds)
        if job.route == "ssh":
            job = _with_master_addr(job, hosts)
        plan = plan_start(job, environment)
        for note in plan.notes:
            say(note)
        for path, text in plan.files.items():
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8")
        status = StatusFile(folder)
        if signals.received:
            return 128 + signals.received[0]
        where = ", ".join(f"{host.name} x {host.slots}" for host in job.hosts)
        say(f"{count_text(job.size, 'rank')} on {where} by {job.launcher}, into {folder.path}")
        times = replace(times, look=settings.look_seconds, grace=settings.grace_seconds)
        if job.route == "srun":  # Slurm watches its steps itself
            times = replace(times, look=float("inf"), soon=_SRUN_SOON_SECONDS)
        ended = watch(start_all(plan, job.folder), hosts, signals, times, status.is_new)
    verdict = judge(status, launcher=ended.name, launcher_status=ended.status, passed_on=ended.passed_on)
    say(verdict.line)
    return verdict.status


def choose_hosts(settings: LaunchSettings, environment: Mapping[str, str]) -> tuple[str, Route, tuple[Host, ...]]:
    """Launcher, route and hosts, from a hostfile, a Slurm allocation or this machine.

    Raises:
        UserError: the hostfile or allocation does not exist, or has fewer slots than --num_gpus.
    """
    in_slurm = "SLURM_JOB_ID" in environment
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("srun has started this command in every task; start it once, without srun; it calls srun")
    auto = "pdsh" if settings.hostfile is not None else "srun" if in_slurm else "local"
    launcher = auto if settings.launcher == "auto" else settings.launcher
    if settings.hostfile is not None:
        hosts = read_hostfile(settings.hostfile)
        if (wanted := settings.num_gpus) is not None:
            if short := [host for host in hosts if host.slots < wanted]:
                slots = count_text(short[0].slots, "slot")
                raise UserError(f"--num_gpus {wanted}: {short[0].name} has {slots} in the hostfile")
            hosts = tuple(replace(host, slots=wanted) for host in hosts)
        return launcher, "ssh", hosts
    if launcher == "srun" or (in_slurm and launcher != "local"):
        if not in_slurm:
            raise UserError("--launcher srun: not in a Slurm allocation; start with sbatch or salloc")
        return launcher, "srun", _allocation(settings, environment)
    return launcher, "local", (Host("localhost", settings.num_gpus or len(visible_gpus()) or 1),)


def _allocation(settings: LaunchSettings, environment: Mapping[str, str]) -> tuple[Host, ...]:
    if settings.num_gpus is not None and (nodes := environment.get("SLURM_JOB_NODELIST")):
        return tuple(Host(name, settings.num_gpus) for name in expand_nodelist(nodes))
    return slurm_hosts({name: value for name, value in environment.items() if name != "SLURM_PROCID"})


def check_num_ranks(train: Settings, ranks: int) -> None:
    """Raise UserError if layout or batch do not divide the number of ranks; called before anything is started."""
    grid = Grid(0, ranks, tp_size=train.tensor_parallel, pp_size=train.pipeline_parallel)
    plan_batches(train.global_batch_size, train.micro_batch_size, grid.dp_size)


def make_job(
    command: LaunchCommand,
    launcher: str,
    route: Route,
    hosts: tuple[Host, ...],
    *,
    scripts: Path,
    private: Path,
    folder: RunFolder,
) -> Job:
    """The job with a new run id and with --output_dir, so that all hosts and this command use the same run folder."""
    settings, run_id = command.settings, secrets.token_hex(8)
    # In an allocation the first host's name, as in the doctor; over ssh its address is looked up (`_with_master_addr`).
    first = {"local": "127.0.0.1", "srun": hosts[0].name, "ssh": ""}[route]
    gpus = visible_gpus() if launcher == "local" else ()
    if gpus and hosts[0].slots > len(gpus):
        raise UserError(f"--num_gpus {hosts[0].slots}: this machine has only {count_text(len(gpus), 'visible GPU')}")
    return Job(
        launcher=launcher,
        route=route,
        hosts=hosts,
        script=str(scripts / "train.py"),
        arguments=(*_without_output_dir(command.arguments), f"--output_dir={folder.path}"),
        python=sys.executable,
        folder=Path.cwd(),
        private=private,
        run_id=run_id,
        master_addr=settings.master_addr or first,
        master_port=settings.master_port or _FIRST_PORT + int(run_id, 16) % _NUM_PORTS,
        ssh_port=settings.ssh_port,
        gpus=gpus[: hosts[0].slots],
        launcher_args=tuple(shlex.split(settings.launcher_args or "")),
        max_restarts=settings.max_restarts,
        stop_seconds=_stop_seconds(settings) if launcher == "torchrun" else None,
    )


def _without_output_dir(arguments: Sequence[str]) -> tuple[str, ...]:
    kept, words = [], iter(arguments)
    for word in words:
        if word == "--output_dir":
            next(words, None)
        elif not word.startswith("--output_dir="):
            kept.append(word)
    return tuple(kept)


def _stop_seconds(settings: LaunchSettings) -> int | None:
    """Seconds that torchrun's agents give their ranks to save; None if this torch has no such flag (it uses 30 s)."""
    from torch.distributed.run import get_args_parser  # slow to import

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    return max(1, int(settings.grace_seconds)) if {"--shutdown-timeout", "--signals-to-handle"} <= known else None


def _check_programs(job: Job) -> None:
    require_extra("train", only=["deepspeed"])
    deepspeed = Path(job.python).with_name("deepspeed")
    if job.launcher in ("local", "pdsh", "openmpi") and not deepspeed.is_file():
        raise UserError(f"{deepspeed}: no such launcher; start this with the Python in which DeepSpeed is installed")
    for program in _PROGRAMS.get(job.launcher, ()):
        if shutil.which(program) is None:
            raise UserError(f"--launcher {job.launcher}: there is no {program} on PATH; install it or choose another")
    if job.route == "ssh" and shutil.which("ssh") is None:
        raise UserError("--hostfile: there is no ssh on PATH, which is needed to reach the hosts; install it")


def _with_master_addr(job: Job, hosts: JobHosts) -> Job:
    """Reach every host, then return the job with its master address. Raises UserError if a host cannot be used."""
    answers = hosts.check()
    if answers.unreached:
        lines = "; ".join(f"{name}: {reason}" for name, reason in answers.unreached.items())
        raise UserError(f"{len(answers.unreached)} of {len(job.hosts)} hosts cannot be used ({lines})")
    if job.master_addr or job.launcher == "torchrun":
        return job
    return replace(job, master_addr=answers.addresses.get(job.hosts[0].name, ""))


def command_lines(plan: StartPlan, job: Job, folder: RunFolder, environment: Mapping[str, str]) -> list[str]:
    """The lines of --show_command: what would be started."""
    lines = [f"run folder  {folder.path}", f"ranks       {job.size}"]
    lines += [f"host        {host.name} slots={host.slots}" for host in job.hosts]
    if job.route == "ssh" and not job.master_addr:
        lines.append("master      the first host's first address, looked up at the start")
    for path, text in plan.files.items():
        lines += [f"file        {path.name}", *(f"            {line}" for line in text.splitlines())]
    changed = {name: value for name, value in plan.environment.items() if environment.get(name) != value}
    lines += [f"environment {name}={shlex.quote(value)}" for name, value in sorted(changed.items())]
    lines += [f"note        {note}" for note in plan.notes]
    lines += [f"command     {shlex.join(command.words)}" for command in plan.commands]
    return lines
