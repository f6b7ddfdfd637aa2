"""Start a launcher for `tiedlora run`, wait until it ends, read run_status.json, and restart a failed job."""

import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from megatron_tiedlora.base import messages
from megatron_tiedlora.base.files import read_json_or_none, seen_late
from megatron_tiedlora.base.installation import require_extra
from megatron_tiedlora.base.messages import UserError, aligned_lines, count_text, os_errors, show
from megatron_tiedlora.base.ownership import OWNER_FILE, Token, owner_in_words, read_token
from megatron_tiedlora.checkpoint.resume import LATEST_FILE
from megatron_tiedlora.cluster.launchers import Job, Route, StartPlan, plan_start
from megatron_tiedlora.config.batch import plan_batches
from megatron_tiedlora.config.job_settings import LaunchCommand, LaunchSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime import launch_env
from megatron_tiedlora.runtime.launch_env import Host, expand_nodelist, started_program, visible_gpus
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder
from megatron_tiedlora.runtime.stopping import StopSignals, alive

_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ephemeral ports of most systems
POLL_SECONDS, _LOOK_SECONDS = 0.2, 5.0
_NOTICE_SECONDS = 0.5  # time for a launcher's processes on this machine to end by themselves
LINGER_SECONDS = 30.0  # time for a launcher and its processes here to end after the run
LATE_SECONDS = 3.0  # longest time until another host's status file is visible here
_SILENT_SECONDS = 25.0  # an owner renews its token every 10 seconds; after this time without renewal it is dead
_END_SECONDS = 10.0  # from SIGTERM to SIGKILL for remaining processes on this machine
_TELL_SECONDS = 60.0  # the longest time for the command of --on_end
_FORWARDS = ("srun", "mpirun", "prterun")  # these forward SIGUSR1 to their ranks; on SIGTERM ranks get no time to save


def launch(command: LaunchCommand, *, scripts: Path) -> int:
    """Start a job, wait until it ends, print the result, and return the exit status.

    Args:
        scripts: the folder with the script of `tiedlora train`.

    Raises:
        UserError: the settings, hosts, parallel configuration, batch size or folder are invalid. Nothing is started.
    """
    settings = command.settings
    job = make_job(settings, os.environ)
    check_num_ranks(command.train, job.size)
    folder = RunFolder(choose_run_folder(command.train).path.absolute())
    arguments = (*command.arguments, f"--output_dir={folder.path}")  # a later flag overrides an earlier one
    # Only this user can read the folder.
    with tempfile.TemporaryDirectory(prefix="megatron_tiedlora-", ignore_cleanup_errors=True) as private:
        job = replace(job, program=(str(scripts / "train.py"),), arguments=arguments, private=Path(private))
        if settings.show_command:
            lines = command_lines(plan_start(job, os.environ), job, folder, os.environ)
            show(*(part for line in lines for part in line.split("\n")))
            return 0
        check_programs(job)
        with StopSignals() as signals:
            return _run(job, command, folder, signals)


def _run(job: Job, command: LaunchCommand, folder: RunFolder, signals: StopSignals) -> int:
    settings, resume, arguments = command.settings, command.train.resume, job.arguments
    latest = folder.checkpoints / LATEST_FILE
    where, before = ", ".join(f"{host.name} x {host.slots}" for host in job.hosts), stamp(latest)
    verdicts = list[Verdict]()  # one of each attempt
    try:
        for restart in range(settings.max_restarts + 1):
            if restart:
                say(f"restart {restart} of {settings.max_restarts}, from the last checkpoint")
                resume = "auto" if resume == "none" or stamp(latest) != before else resume
                changed = (*arguments, "--take_over=false", f"--resume={resume}")
                job = replace(job, arguments=changed, master_port=new_port(settings))
            job = replace(job, start=secrets.token_hex(8))
            plan, status = plan_start(job, os.environ), StatusFile(folder, job.start)
            if signals.received:
                return 128 + signals.received[0]
            say(f"{count_text(job.size, 'rank')} on {where} by {job.launcher}, into {folder.path}")
            running = RunningJob(job, plan)
            wait_for_end(running, status, signals, grace=settings.grace_seconds)
            running.end(say)
            ended, passed_on = running.process.returncode, next(iter(signals.received), 0)
            verdicts.append(judge(status, launcher=job.launcher, launcher_status=ended, passed_on=passed_on))
            verdict = verdicts[-1]
            say(verdict.line)
            if not status.is_of_another and (not verdict.state or (ended < 0 and not passed_on)):
                _say_what_may_be_left(job, folder)
            # A stopped run must not continue, and a run that has not begun would fail again.
            if verdict.status == 0 or passed_on or verdict.state == "stopped" or not status.has_begun():
                break
            if not verdict.state and status.is_awaited():
                say(f"no restart: {owner_in_words(folder.path)} still has {folder.path}")
                break
    finally:
        if settings.on_end is not None and verdicts:
            _tell(settings.on_end, folder, verdicts[-1])
    return verdicts[-1].status


def _say_what_may_be_left(job: Job, folder: RunFolder) -> None:
    """Print commands that end ranks which may still run on other hosts."""
    if job.route == "srun":
        say(f"ranks that still run end with: scancel {os.environ.get('SLURM_JOB_ID', 'JOB')}")
    if job.route == "ssh":
        path = re.sub(r"[][\\.^$*+?(){}|]", r"\\\g<0>", str(folder.path))
        remote = shlex.quote(f"pkill -f {shlex.quote(f'[-]-output_dir={path}( |$)')}".replace("%", "%%"))
        say(f"ranks that still run end with: pdsh -R ssh -w {job.names} {remote}")
        say("ranks that hang end with the same command and pkill -KILL -f")


def choose_hosts(settings: LaunchSettings, environment: Mapping[str, str]) -> tuple[str, Route, tuple[Host, ...]]:
    """Return the launcher, the route, and the hosts of a hostfile or a Slurm allocation, or else this machine.

    Raises:
        UserError: the hostfile or allocation does not exist, or has fewer slots than --num_gpus.
    """
    in_slurm = "SLURM_JOB_ID" in environment
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UserError("srun has started this command in every task. Start it once, without srun, as it calls srun")
    auto = "srun" if in_slurm and settings.hostfile is None else "deepspeed"
    launcher = auto if settings.launcher == "auto" else settings.launcher
    if settings.hostfile is not None:
        hosts = launch_env.read_hostfile(settings.hostfile)
        if (wanted := settings.num_gpus) is not None:
            if short := [host for host in hosts if host.slots < wanted]:
                slots = count_text(short[0].slots, "slot")
                raise UserError(f"--num_gpus {wanted}: {short[0].name} has {slots} in the hostfile. Lower --num_gpus")
            hosts = tuple(replace(host, slots=wanted) for host in hosts)
        return launcher, "ssh", hosts
    if launcher == "srun" or (in_slurm and launcher == "mpirun"):
        if not in_slurm:
            raise UserError("--launcher srun: this shell is not in a Slurm allocation. Start with sbatch or salloc")
        if settings.num_gpus is not None and (nodes := environment.get("SLURM_JOB_NODELIST")):
            return launcher, "srun", tuple(Host(name, settings.num_gpus) for name in expand_nodelist(nodes))
        own = {name: value for name, value in environment.items() if name != "SLURM_PROCID"}
        return launcher, "srun", launch_env.slurm_hosts(own)
    return launcher, "local", (Host("localhost", settings.num_gpus or len(visible_gpus()) or 1),)


def check_num_ranks(train: Settings, ranks: int) -> None:
    """Raise UserError if the parallel configuration or the batch does not fit the number of ranks."""
    grid = Grid(0, ranks, tp_size=train.tensor_parallel, pp_size=train.pipeline_parallel)
    plan_batches(train.global_batch_size, train.micro_batch_size, grid.dp_size)


def make_job(settings: LaunchSettings, environment: Mapping[str, str]) -> Job:
    """Return the job that the settings describe, without its program and with a new port. Raise UserError as
    `choose_hosts` does, or if this machine has fewer GPUs than --num_gpus."""
    launcher, route, hosts = choose_hosts(settings, environment)
    gpus = visible_gpus() if (launcher, route) == ("deepspeed", "local") else ()
    if gpus and hosts[0].slots > len(gpus):
        raise UserError(
            f"--num_gpus {hosts[0].slots}: this machine has only {count_text(len(gpus), 'visible GPU')}."
            f" Give at most {len(gpus)}"
        )
    return Job(
        launcher=launcher,
        route=route,
        hosts=hosts,
        python=sys.executable,
        folder=Path.cwd(),
        master_addr=settings.master_addr or ("127.0.0.1" if route == "local" else hosts[0].name),
        master_port=new_port(settings),
        gpus=gpus[: hosts[0].slots],
        launcher_args=tuple(shlex.split(settings.launcher_args or "")),
    )


def new_port(settings: LaunchSettings) -> int:
    """Return the next rendezvous port: --master_port, or a random port because the last port may still be in use."""
    return settings.master_port or _FIRST_PORT + secrets.randbelow(_NUM_PORTS)


def check_programs(job: Job) -> None:
    """Raise UserError if the launcher, or the program with which it reaches other hosts, is not installed here."""
    require_extra("train", only=["deepspeed"])
    own = [word.partition("=")[0] for word in job.launcher_args]
    by_pdsh = (job.launcher, job.route) == ("deepspeed", "ssh") and "--launcher" not in own
    for program in (job.launcher_program, *["pdsh"] * by_pdsh, *["ssh"] * (job.route == "ssh")):
        if shutil.which(program) is None:
            raise UserError(f"{program}: this program is not installed. Install it, or choose a different --launcher")


def command_lines(plan: StartPlan, job: Job, folder: RunFolder, environment: Mapping[str, str]) -> list[str]:
    """Return the lines that --show_command prints: the hosts, the files, the environment and the command."""
    rows = [("run folder", str(folder.path)), ("ranks", str(job.size))]
    rows += [("host", f"{host.name} slots={host.slots}") for host in job.hosts]
    for path, text in plan.files.items():
        rows += [("file", path.name), *(("", line) for line in text.splitlines())]
    changed = {name: value for name, value in plan.environment.items() if environment.get(name) != value}
    rows += [("environment", f"{name}={shlex.quote(value)}") for name, value in sorted(changed.items())]
    return aligned_lines([*rows, ("command", shlex.join(plan.words))], align="<")


# A launcher that has been started ------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Print a line on stderr, preceded by the name of this command."""
    with suppress(OSError):
        show(f"tiedlora run: {line}", file=sys.stderr)


class RunningJob:
    """A job whose launcher runs on this machine in a new session.

    Args:
        options: arguments of `Popen`, such as stdout, stderr and the file descriptors that stay open.

    Raises:
        UserError: the launcher cannot be started.
    """

    def __init__(self, job: Job, plan: StartPlan, **options: Any) -> None:
        for path, text in plan.files.items():
            path.touch(mode=0o600)
            path.write_text(text, encoding="utf-8")
        with os_errors(f"{plan.words[0]}: cannot be started"):
            self.process = psutil.Popen(
                plan.words,
                cwd=job.folder,
                env=dict(plan.environment),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal reaches the ranks only once, through this process
                **options,
            )
        self._job = job
        self._told: set[int] = set()
        self._seen: set[psutil.Process] = set()

    def here(self) -> list[psutil.Process]:
        """Return the running processes on this machine: the launcher's process group and all its known descendants.

        pdsh starts ssh in a different process group. ssh is found as a child of pdsh, and stays known after pdsh ends.
        """
        for process in psutil.process_iter():
            with suppress(OSError):
                self._seen |= {process} if os.getpgid(process.pid) == self.process.pid else set()
        for process in (self.process, *self._seen):
            with suppress(psutil.Error):
                self._seen |= {process, *process.children(recursive=True)}
        self._seen = {process for process in self._seen if alive(process)}
        return list(self._seen)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the launcher and to all its processes on this machine."""
        for process in self.here():
            with suppress(psutil.Error):
                process.send_signal(number)

    def end(self, say: Callable[[str], None]) -> None:
        """End the remaining processes on this machine by SIGTERM, later by SIGKILL, and print their names."""
        if left := self.here():
            names = ", ".join(f"{process.pid} ({_read(process, 'name')})" for process in left)
            say(f"what is left of the job on this machine is ended: {names}")
            self.kill(signal.SIGTERM)
            psutil.wait_procs(left, timeout=_END_SECONDS)
            self.kill()

    def stop(self, number: int) -> None:
        """Tell the ranks to save and to stop. The caller repeats this call until all ranks have stopped, because some
        ranks may still be starting.

        srun and mpirun forward SIGUSR1. Otherwise ranks on this machine get the signal directly, without their child
        processes, which read data or compile. Ranks that were started by ssh end when their connection ends.
        """
        here = self.here()
        ranks = {one.pid for one in here if started_program(_read(one, "cmdline") or ()) == self._job.program[-1]}
        ranks -= {one.pid for one in here if _read(one, "ppid") in ranks}
        forwarders = {one.pid for one in here if _read(one, "name") in _FORWARDS}
        if forwarders or self._job.launcher in _FORWARDS:
            receivers, number = forwarders, signal.SIGUSR1
        elif ranks or self._told:
            receivers = ranks
        else:  # no rank has begun
            self.kill()
            return
        for pid in receivers - self._told:
            with suppress(OSError):
                os.kill(pid, number)
            self._told.add(pid)


def _read(process: psutil.Process, name: str) -> Any:
    """Call the method `name` of a process and return its result; None if the process has ended."""
    with suppress(psutil.Error):
        return getattr(process, name)()


def wait_for_end(
    running: RunningJob,
    status: "StatusFile",
    signals: StopSignals,
    *,
    grace: float,
    on_poll: Callable[[], None] = lambda: None,
    tell: Callable[[str], None] = say,
) -> None:
    """Wait until the launcher, its processes on this machine, and the owner of the run folder have ended.

    The first signal is forwarded. A later Ctrl-C kills the job. A later SIGTERM is ignored, as schedulers may send two.

    Args:
        status: the status file of the run. A job that writes no such file ends with its launcher.
        grace: the seconds that ranks have to save after their launcher has ended.
        on_poll: a function that is called repeatedly, to show the progress of the job.
        tell: a function that prints a line.
    """
    said: set[str] = set()
    run_ended = launcher_ended = float("inf")  # times of the monotonic clock
    looked = 0.0

    def say_once(line: str) -> None:
        if line not in said:
            said.add(line)
            tell(line)

    while True:
        now, received, is_new = time.monotonic(), signals.received, status.is_new()
        run_ended = min(run_ended, now) if is_new else run_ended
        if running.process.poll() is None:
            if now > run_ended + LINGER_SECONDS:
                say_once("the run has ended, but its launcher has not: killed")
                running.kill()
            if now > looked + _LOOK_SECONDS:  # find the launcher's processes, to know them after it has ended
                looked = now
                running.here()
        else:
            launcher_ended, is_left = min(launcher_ended, now), bool(running.here())
            is_awaited = status.is_awaited()  # checked each time, to see when the owner becomes silent
            is_late = now > min(launcher_ended + grace, run_ended + LINGER_SECONDS)
            if is_late or not (is_left or (is_awaited and not is_new)):
                return
            if is_left and not is_new and now > launcher_ended + _NOTICE_SECONDS:
                say_once("the launcher has ended, but the job has not; it is told to save and to stop")
                running.stop(signal.SIGTERM)
        if received:
            say_once(f"{signal.Signals(received[0]).name} is passed on; the job saves and ends (Ctrl-C again: kill)")
            running.stop(received[0])
        if signal.SIGINT in received[1:]:
            say_once("killing all")
            running.kill()
        on_poll()
        time.sleep(POLL_SECONDS)


# How it ended ---------------------------------------------------------------------------------------------------------


Stamp = tuple[int, int, int]


class Verdict(NamedTuple):
    """The exit status of `tiedlora run`, a line that explains the status, and the run's state ('' if unknown)."""

    status: int
    line: str
    state: str = ""


class StatusFile:
    """The run_status.json file of this launch. Ranks remove an older file when they become the folder's owner.

    Args:
        start: the START_ID of the ranks. The file is ignored if another launch owns the folder.
    """

    def __init__(self, folder: RunFolder, start: str = "") -> None:
        self.folder, self._start = folder, start
        self._before, self.is_of_another = stamp(folder.status), False
        self._renewed: tuple[Stamp | None, float] = (None, 0.0)  # stamp of the owner file, and when it last changed
        self._token()

    def _token(self) -> Token | None:
        """Return the token in the folder's owner file if this launch has written it, else None."""
        token = read_token(self.folder.path / OWNER_FILE)
        if token is not None:  # the last owner counts: this launch may take a folder over or lose it
            self.is_of_another = token.job != self._start
        return None if self.is_of_another else token

    def is_new(self) -> bool:
        """Return whether this launch has written the file."""
        self._token()
        return not self.is_of_another and stamp(self.folder.status) not in (None, self._before)

    def has_begun(self) -> bool:
        """Return whether a rank of this launch has owned the folder. If so, settings, hosts and model were valid."""
        return self.is_new() or self._token() is not None

    def is_awaited(self) -> bool:
        """Return whether a rank may still write the file, because it owns the folder and still renews its token."""
        seen, now = stamp(self.folder.path / OWNER_FILE), time.monotonic()
        if seen != self._renewed[0]:
            self._renewed = seen, now
        is_owned = self._token() is not None and owner_in_words(self.folder.path) is not None
        return is_owned and now - self._renewed[1] < _SILENT_SECONDS

    def read(self) -> Mapping[str, Any] | None:
        """Return the file's content if this launch has written it, otherwise None."""
        return read_json_or_none(self.folder.status) if self.is_new() else None


def stamp(file: Path) -> Stamp | None:
    """Return values that change when a file is written or replaced; None if the file does not exist."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def judge(file: StatusFile, *, launcher: str, launcher_status: int, passed_on: int) -> Verdict:
    """Return the verdict on the launch. Its status is 0 only if the run finished or a forwarded signal stopped it.

    Args:
        launcher_status: the launcher's exit status; -N if signal N killed the launcher.
        passed_on: the signal that this command received and forwarded; 0 if there was none.
    """
    path = file.folder.path
    signals = {-number: number.name for number in signal.Signals}
    ended = f"{launcher} ended with {signals.get(launcher_status, f'status {launcher_status}')}"
    failed = launcher_status if launcher_status > 0 else 128 - launcher_status if launcher_status else 1
    content = file.read() if launcher_status else seen_late(file.read, path, seconds=LATE_SECONDS)
    if content is None:
        if not path.is_dir():
            why = f"{path} does not exist on this host: the ranks rejected it (see above), or it is not shared"
        elif file.is_of_another:
            why = f"{path} belongs to another launch"
        else:
            why = f"{path} does not state how this launch ended"
        return Verdict(failed, f"{why}; {ended}")
    state, step, reason = content.get("state"), content.get("step"), content.get("reason")
    line = messages.one_line(f"{path}: {state} at step {step} ({reason})")
    if state == "finished" or (state == "stopped" and passed_on):
        return Verdict(0, line, str(state))
    return Verdict(failed, f"{line}; {ended}", str(state))


def _tell(command: str, folder: RunFolder, verdict: Verdict) -> None:
    """Run the command of --on_end in a shell. Its failure or its time limit is reported, and changes nothing else."""
    facts = {"RUN": folder.path, "STATE": verdict.state or "unknown", "STATUS": verdict.status, "REASON": verdict.line}
    variables = {f"TIEDLORA_{name}": str(value) for name, value in facts.items()}
    try:
        words, around = ["sh", "-c", command], {**os.environ, **variables}
        ended = subprocess.run(words, env=around, timeout=_TELL_SECONDS, check=False)
        said = f"ended with status {ended.returncode}" if ended.returncode else ""
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        said = f"failed ({messages.first_line(error)})"
    if said:
        say(f"--on_end {command}: {said}")
