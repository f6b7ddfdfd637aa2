"""tiedlora run: starts the launcher that was asked for, waits, reads run_status.json, and restarts after a failure."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_tiedlora.base.errors import UserError, count_text, show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.base.ownership import owner_in_words
from megatron_tiedlora.checkpoint.resume import LATEST_FILE
from megatron_tiedlora.cluster.launchers import Job, Route, StartPlan, plan_start
from megatron_tiedlora.cluster.running import RunningJob, StatusFile, StopSignals, Times, Watch, judge, say, stamp
from megatron_tiedlora.config.batch import plan_batches
from megatron_tiedlora.config.hosts import Host, expand_nodelist, read_hostfile, slurm_hosts
from megatron_tiedlora.config.launch_settings import LaunchCommand, LaunchSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder, run_name

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ephemeral ports of most systems
_TIMES = Times()


def launch(command: LaunchCommand, *, scripts: Path, times: Times = _TIMES) -> int:
    """Start a job, wait for its end and report it; returns the exit status.

    Args:
        scripts: the folder of the script of `tiedlora train`.
        times: time limits; the settings override one of them.

    Raises:
        UserError: settings, hosts, layout, batch or folder do not fit; nothing has been started then.
    """
    settings = command.settings
    job = make_job(settings, os.environ)
    check_num_ranks(command.train, job.size)
    train, several = command.train, command.train.adapters is not None
    chosen = choose_run_folder(train.output_dir, name=run_name(train), resume=train.resume, of_several=several)
    folder = RunFolder(chosen.path.absolute())
    arguments = (*_without(command.arguments, "--output_dir"), f"--output_dir={folder.path}")
    # Only this user can read it.
    with tempfile.TemporaryDirectory(prefix="megatron_tiedlora-", ignore_cleanup_errors=True) as private:
        job = replace(job, program=(str(scripts / "train.py"),), arguments=arguments, private=Path(private))
        if settings.show_command:
            lines = command_lines(plan_start(job, os.environ), job, folder, os.environ)
            show(*(part for line in lines for part in line.split("\n")))
            return 0
        check_programs(job)
        times = replace(times, grace=settings.grace_seconds)
        with StopSignals(more=(signal.SIGUSR1,)) as signals:
            return _run(job, command, folder, signals, times)


def _run(job: Job, command: LaunchCommand, folder: RunFolder, signals: StopSignals, times: Times) -> int:
    settings, resume, latest = command.settings, command.train.resume, folder.checkpoints / LATEST_FILE
    where, before = ", ".join(f"{host.name} x {host.slots}" for host in job.hosts), stamp(latest)
    for restart in range(settings.max_restarts + 1):
        if restart:
            say(f"restart {restart} of {settings.max_restarts}, from the last checkpoint")
            resume = "auto" if resume == "none" or stamp(latest) != before else resume
            kept = _without(_without(job.arguments, "--resume"), "--take_over", is_flag=True)
            job = replace(job, arguments=(*kept, f"--resume={resume}"), master_port=new_port(settings))
        job = replace(job, start=secrets.token_hex(8))
        plan, status = plan_start(job, os.environ), StatusFile(folder, job.start)
        if signals.received:
            return 128 + signals.received[0]
        say(f"{count_text(job.size, 'rank')} on {where} by {job.launcher}, into {folder.path}")
        watch = Watch(RunningJob(job, plan), status, signals, times)
        watch.until_end()
        ended, passed_on = watch.running.process.returncode, next(iter(signals.received), 0)
        verdict = judge(status, launcher=job.launcher, launcher_status=ended, passed_on=passed_on)
        say(verdict.line)
        if not status.is_of_another and (watch.killed or not verdict.state):
            _say_what_may_be_left(job, folder)
        # A run that was stopped may not go on; one that has not begun would fail again.
        if verdict.status == 0 or passed_on or verdict.state == "stopped" or not status.has_begun():
            break
        if not verdict.state and status.is_awaited():
            say(f"no restart: {owner_in_words(folder.path)} still has {folder.path}")
            break
    return verdict.status


def _say_what_may_be_left(job: Job, folder: RunFolder) -> None:
    """How to end ranks that the launcher may have left on other hosts."""
    if job.route == "srun":
        say(f"ranks that still run end with: scancel {os.environ.get('SLURM_JOB_ID', 'JOB')}")
    if job.route == "ssh":
        path = re.sub(r"[][\\.^$*+?(){}|]", r"\\\g<0>", str(folder.path))
        by_port = "" if job.ssh_port is None else f'PDSH_SSH_ARGS_APPEND="-p {job.ssh_port}" '
        remote = shlex.quote(f"pkill -f {shlex.quote(f'[-]-output_dir={path}( |$)')}".replace("%", "%%"))
        say(f"ranks that still run end with: {by_port}pdsh -R ssh -w {job.names} {remote}")
        say("ranks that hang end with the same command and pkill -KILL -f")


def choose_hosts(settings: LaunchSettings, environment: Mapping[str, str]) -> tuple[str, Route, tuple[Host, ...]]:
    """Launcher, route and hosts, from a hostfile, a Slurm allocation or this machine.

    Raises:
        UserError: the hostfile or allocation does not exist, or has fewer slots than --num_gpus.
    """
    in_slurm = "SLURM_JOB_ID" in environment
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("srun has started this command in every task; start it once, without srun; it calls srun")
    auto = "srun" if in_slurm and settings.hostfile is None else "deepspeed"
    launcher = auto if settings.launcher == "auto" else settings.launcher
    if settings.hostfile is not None:
        hosts = read_hostfile(settings.hostfile)
        if (wanted := settings.num_gpus) is not None:
            if short := [host for host in hosts if host.slots < wanted]:
                slots = count_text(short[0].slots, "slot")
                raise UserError(f"--num_gpus {wanted}: {short[0].name} has {slots} in the hostfile")
            hosts = tuple(replace(host, slots=wanted) for host in hosts)
        return launcher, "ssh", hosts
    if launcher == "srun" or (in_slurm and launcher != "deepspeed"):
        if not in_slurm:
            raise UserError("--launcher srun: not in a Slurm allocation; start with sbatch or salloc")
        if settings.num_gpus is not None and (nodes := environment.get("SLURM_JOB_NODELIST")):
            return launcher, "srun", tuple(Host(name, settings.num_gpus) for name in expand_nodelist(nodes))
        own = {name: value for name, value in environment.items() if name != "SLURM_PROCID"}
        return launcher, "srun", slurm_hosts(own)
    return launcher, "local", (Host("localhost", settings.num_gpus or len(visible_gpus()) or 1),)


def check_num_ranks(train: Settings, ranks: int) -> None:
    """Raise UserError if layout or batch do not divide the number of ranks; called before anything is started."""
    grid = Grid(0, ranks, tp_size=train.tensor_parallel, pp_size=train.pipeline_parallel)
    plan_batches(train.global_batch_size, train.micro_batch_size, grid.dp_size)


def make_job(settings: LaunchSettings, environment: Mapping[str, str]) -> Job:
    """The job that the settings describe, without its program, on a new port. Raises UserError as `choose_hosts`, or if
    this machine has fewer GPUs than --num_gpus."""
    launcher, route, hosts = choose_hosts(settings, environment)
    gpus = visible_gpus() if (launcher, route) == ("deepspeed", "local") else ()
    if gpus and hosts[0].slots > len(gpus):
        raise UserError(f"--num_gpus {hosts[0].slots}: this machine has only {count_text(len(gpus), 'visible GPU')}")
    return Job(
        launcher=launcher,
        route=route,
        hosts=hosts,
        python=sys.executable,
        folder=Path.cwd(),
        master_addr=settings.master_addr or ("127.0.0.1" if route == "local" else hosts[0].name),
        master_port=new_port(settings),
        ssh_port=settings.ssh_port,
        gpus=gpus[: hosts[0].slots],
        launcher_args=tuple(shlex.split(settings.launcher_args or "")),
        stop_options=_stop_options(settings) if launcher == "torchrun" else (),
    )


def new_port(settings: LaunchSettings) -> int:
    """Where the ranks of the next start meet: --master_port, or a random one, as the last one may still be in use."""
    return settings.master_port or _FIRST_PORT + secrets.randbelow(_NUM_PORTS)


def _without(arguments: Sequence[str], flag: str, *, is_flag: bool = False) -> tuple[str, ...]:
    kept, words = [], iter(arguments)
    for word in words:
        if word == flag and not is_flag:
            next(words, None)
        elif word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
    return tuple(kept)


def _stop_options(settings: LaunchSettings) -> tuple[str, ...]:
    """Options for torchrun's agents, so that they give their ranks time to save; none if this torch has no such flags
    (it uses 30 s)."""
    from torch.distributed.run import get_args_parser  # slow to import

    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    if not {"--shutdown-timeout", "--signals-to-handle"} <= known:
        return ()
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    return (f"--shutdown-timeout={max(1, int(settings.grace_seconds))}", signals)


def check_programs(job: Job) -> None:
    """Raise UserError if a program that the launcher needs is not installed here."""
    require_extra("train", only=["deepspeed"])
    deepspeed = Path(job.python).with_name("deepspeed")
    if job.launcher == "deepspeed" and not deepspeed.is_file():
        raise UserError(f"{deepspeed}: no such launcher; start this with the Python in which DeepSpeed is installed")
    by_pdsh = job.route == "ssh" and "--launcher" not in [word.partition("=")[0] for word in job.launcher_args]
    own = {"deepspeed": ["pdsh"] * by_pdsh, "torchrun": ["pdsh"] * by_pdsh, "mpirun": ["mpirun"], "srun": ["srun"]}
    for program in [*own[job.launcher], *(["ssh"] if job.route == "ssh" else [])]:
        if shutil.which(program) is None:
            raise UserError(f"--launcher {job.launcher}: there is no {program} on PATH; install it or choose another")


def command_lines(plan: StartPlan, job: Job, folder: RunFolder, environment: Mapping[str, str]) -> list[str]:
    """The lines of --show_command: what would be started."""
    lines = [f"run folder  {folder.path}", f"ranks       {job.size}"]
    lines += [f"host        {host.name} slots={host.slots}" for host in job.hosts]
    for path, text in plan.files.items():
        lines += [f"file        {path.name}", *(f"            {line}" for line in text.splitlines())]
    changed = {name: value for name, value in plan.environment.items() if environment.get(name) != value}
    lines += [f"environment {name}={shlex.quote(value)}" for name, value in sorted(changed.items())]
    return [*lines, f"command     {shlex.join(plan.words)}"]
