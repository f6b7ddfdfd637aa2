"""Build each launcher's command for a job: arguments and environment. Starts nothing and looks nothing up.

| launcher | what starts the ranks | how their environment is forwarded |
|---|---|---|
| local | `deepspeed` on this machine | inherited |
| pdsh | `deepspeed` over pdsh and ssh | a file in `.deepspeed_env` form |
| openmpi | `deepspeed` over mpirun | mpirun -x NAME |
| mpirun | mpirun | mpirun -x NAME |
| srun | srun | --export=ALL |
| torchrun | torchrun's agent on each host, over ssh or srun | in ssh's command line, or --export=ALL |
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.forwarded_env import (
    DEEPSPEED_EXPORTS,
    ForwardedEnv,
    check_plain,
    check_unquoted,
    forward_env,
    pdsh_word,
    read_user_file,
    without_bad_exports,
)
from megatron_tiedlora.cluster.job_processes import RUN_ID
from megatron_tiedlora.cluster.remote import CONNECT_SECONDS, SSH_SETTINGS, Route, Transport
from megatron_tiedlora.config.hosts import RANK_VARIABLES, Host, num_ranks
from megatron_tiedlora.runtime.launch_env import EXPECTED_RANKS

# On SIGTERM, `deepspeed` over pdsh ends every DeepSpeed job of this user on its hosts (with pkill). So this shell gets
# the signal when we die and kills deepspeed, pdsh and ssh instead; the ranks stop when their sshd session ends.
_PDSH_GUARD = """trap 'kill -s KILL $(pgrep -P "$(pgrep -d, -P $!)") 0' TERM; "$0" "$@" & wait $!"""
# `deepspeed` over OpenMPI would die alone: this shell sends the signal to mpirun, which passes it on to the ranks.
_OPENMPI_GUARD = """trap 'kill $(pgrep -P $!)' TERM; "$0" "$@" & wait $!"""
_USER_ONLY = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")


@dataclass(frozen=True)
class Job:
    """What to run, and where.

    Attributes:
        route: how commands reach the hosts.
        script: absolute path of the script of `tiedlora train`; the same on every host, as are `python` and `folder`.
        private: a folder for the files of this start only; no other user can read it.
        master_addr: '' lets the launcher choose; it is always set in a Slurm allocation.
        stop_seconds: seconds for ranks to save when torchrun's agent is told to stop; None if torchrun has neither this
            flag nor the one for the signals that it passes on.
    """

    launcher: str
    route: Route
    hosts: tuple[Host, ...]
    script: str
    arguments: tuple[str, ...]
    python: str
    folder: Path
    private: Path
    run_id: str
    master_addr: str
    master_port: int
    ssh_port: int | None = None
    gpus: tuple[str, ...] = ()
    launcher_args: tuple[str, ...] = ()
    max_restarts: int = 0
    stop_seconds: int | None = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return num_ranks(self.hosts)

    @property
    def job_env(self) -> dict[str, str]:
        """Variables of every process of the job. PYTHONSAFEPATH keeps Python from importing modules out of the current
        folder, where another user may have put some."""
        return {RUN_ID: self.run_id, EXPECTED_RANKS: str(self.size), "PYTHONSAFEPATH": "1"}

    @property
    def master_env(self) -> dict[str, str]:
        """The master's address and port, for launchers that do not set them."""
        return {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)} if self.master_addr else {}

    @property
    def hostfile(self) -> Path:
        """A hostfile with exactly the ranks to start."""
        return self.private / "hostfile"

    @property
    def command(self) -> list[str]:
        """The command line of a rank."""
        return [self.python, "-u", self.script, *self.arguments]

    def transport(self, environment: Mapping[str, str]) -> Transport:
        """How commands reach a host."""
        return Transport(self.route, ssh_port=self.ssh_port, environment=environment, folder=self.folder)


@dataclass(frozen=True)
class StartCommand:
    """A command that is started on this machine.

    Attributes:
        name: its name in messages.
        orphan_signal: the signal that it gets when its parent process dies.
    """

    name: str
    words: tuple[str, ...]
    orphan_signal: int = signal.SIGTERM


@dataclass(frozen=True)
class StartPlan:
    """Everything about a start: commands, their environment, files to write first, and lines for the user."""

    commands: tuple[StartCommand, ...]
    environment: Mapping[str, str]
    files: Mapping[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_start(job: Job, environment: Mapping[str, str]) -> StartPlan:
    """The commands that start `job` from a shell with `environment`, whose own rank, if it has one, is left out.

    Raises:
        UserError: the launcher cannot send a path, an argument or a variable to the other hosts.
    """
    routes: Mapping[str, Callable[[Job, Mapping[str, str]], StartPlan]] = {
        "local": _local,
        "pdsh": _pdsh,
        "openmpi": _openmpi,
        "mpirun": _mpirun,
        "srun": _srun,
        "torchrun": _torchrun,
    }
    rankless = {name: value for name, value in environment.items() if name not in RANK_VARIABLES[:3]}
    return routes[job.launcher](job, rankless)


def _hostfile_text(job: Job) -> str:
    return "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)


def _deepspeed(job: Job, options: Sequence[str], arguments: Sequence[str]) -> StartCommand:
    program = str(Path(job.python).with_name("deepspeed"))  # ranks recognise their launcher by this name
    hosts = ["--hostfile", str(job.hostfile), "--no_ssh_check", "--master_port", str(job.master_port)]
    return StartCommand("deepspeed", (program, *hosts, *options, job.script, *arguments))


def _guarded(command: StartCommand, guard: str) -> StartCommand:
    return replace(command, words=("/bin/sh", "-c", guard, *command.words))


def _local(job: Job, environment: Mapping[str, str]) -> StartPlan:
    # With a hostfile for this machine the launcher does not read /job/hostfile, if there is one; --include overrides
    # CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.
    slots = max(map(int, job.gpus)) + 1 if job.gpus else job.size
    include = ["--include", f"localhost:{','.join(job.gpus)}"] if job.gpus else []
    options = ["--master_addr", "127.0.0.1", *include, *job.launcher_args]
    return StartPlan(
        (_deepspeed(job, options, job.arguments),),
        {**environment, **job.job_env},
        {job.hostfile: f"localhost slots={slots}\n"},
    )


def _pdsh(job: Job, environment: Mapping[str, str]) -> StartPlan:
    check_plain([("the current folder", str(job.folder)), ("the interpreter", job.python), ("script", job.script)])
    sent = _sent(job, environment)
    kept, dropped = without_bad_exports(environment)
    file = job.private / "deepspeed_env"
    options = ["--launcher", "pdsh", "--force_multi", *_address(job), *_ssh_port(job)]
    if job.launcher_args:
        options.append(f"--launcher_args={shlex.join(job.launcher_args)}")
    # DeepSpeed prepends the current folder to PYTHONPATH; the file is read after that and overrides it.
    text = f"PYTHONPATH=\n{sent.file_text()}"
    # ssh uses the first value of an option, so the user's own settings take precedence.
    words = [
        environment.get("PDSH_SSH_ARGS_APPEND", ""),
        *(f"-o {name}={value}" for name, value in SSH_SETTINGS.items()),
    ]
    own = {**job.job_env, "DS_ENV_FILE": str(file), "PDSH_SSH_ARGS_APPEND": " ".join(words).strip()}
    command = _deepspeed(job, options, [pdsh_word(word) for word in job.arguments])
    return StartPlan(
        (_guarded(command, _PDSH_GUARD),),
        {**kept, **own},
        {job.hostfile: _hostfile_text(job), file: text},
        tuple(dict.fromkeys([*sent.left, *dropped])),
    )


def _openmpi(job: Job, environment: Mapping[str, str]) -> StartPlan:
    sent = _sent(job, environment)
    kept, dropped = without_bad_exports(environment)
    file = job.private / "deepspeed_env"
    # DeepSpeed passes on the others itself, but NCCL's only if this host has GPUs.
    names = [name for name in sent.variables if not name.startswith(DEEPSPEED_EXPORTS) or name.startswith("NCCL_")]
    passed = [word for name in names for word in ("-x", name)]
    interface = environment.get("NCCL_SOCKET_IFNAME") or environment.get("GLOO_SOCKET_IFNAME")
    chosen = ["--mca", "btl_tcp_if_include", interface] if interface and interface[0] not in "^=" else []
    if "btl_tcp_if_include" in job.launcher_args:
        chosen = []
    launcher_args = shlex.join(["--bind-to", "none", "--map-by", "slot", *chosen, *job.launcher_args, *passed])
    options = ["--launcher", "openmpi", "--force_multi", *_address(job), f"--launcher_args={launcher_args}"]
    own = {**job.job_env, **sent.variables, **_mpi_agent(job, environment), "DS_ENV_FILE": str(file)}
    path = {**kept, **own}.get("PYTHONPATH", "")  # as in `_pdsh`
    check_unquoted({**kept, **own}, job.folder)
    return StartPlan(
        (_guarded(_deepspeed(job, options, job.arguments), _OPENMPI_GUARD),),
        {**kept, **own},
        {job.hostfile: _hostfile_text(job), file: f"PYTHONPATH={path}\n"},
        tuple(dict.fromkeys([*sent.left, *dropped])),
    )


def _mpirun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    sent = _sent(job, environment)
    passed = [word for name in sent.variables for word in ("-x", name)]
    words = ["mpirun", "-np", str(job.size), "--hostfile", str(job.hostfile), "--bind-to", "none", "--map-by", "slot"]
    own = {**job.job_env, **sent.variables, **_mpi_agent(job, environment)}
    return StartPlan(
        (StartCommand("mpirun", (*words, *passed, *job.launcher_args, *job.command)),),
        {**environment, **own},
        {job.hostfile: _hostfile_text(job)},
        sent.left,
    )


def _mpi_agent(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of OpenMPI 5 and 4 that name mpirun's ssh; empty if the user has set one of them."""
    names = ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")
    if job.route != "ssh" or any(name in environment for name in names):
        return {}
    words = ["ssh", *(word for name, value in SSH_SETTINGS.items() for word in ("-o", f"{name}={value}"))]
    agent = " ".join([*words, *(("-p", str(job.ssh_port)) if job.ssh_port is not None else ())])
    return dict.fromkeys(names, agent)


def _srun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    slots = {host.slots for host in job.hosts}
    per_host = [f"--ntasks-per-node={slots.pop()}"] if len(slots) == 1 else []
    words = [*_srun_words(job), f"--ntasks={job.size}", *per_host, "--distribution=block", *job.launcher_args]
    return StartPlan((_by_srun((*words, *job.command)),), {**environment, **job.job_env, **job.master_env})


def _by_srun(words: tuple[str, ...]) -> StartCommand:
    # On SIGTERM srun ends its tasks at once, but it passes SIGUSR1 on, on which they save and stop.
    return StartCommand("srun", words, orphan_signal=signal.SIGUSR1)


def _srun_words(job: Job) -> list[str]:
    nodes = ",".join(host.name for host in job.hosts)
    return ["srun", "--kill-on-bad-exit=1", "--export=ALL", f"--nodes={len(job.hosts)}", f"--nodelist={nodes}"]


def _torchrun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    # The ranks open their own store at a new port at each restart; in the agents' store they would find old keys.
    own = {**job.job_env, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    meeting = f"{job.master_addr or job.hosts[0].name}:{job.master_port}"
    options = [f"--nnodes={len(job.hosts)}", f"--max-restarts={job.max_restarts}", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint={meeting}", f"--rdzv-id={job.run_id}"]
    if job.stop_seconds is not None:
        options.append(f"--shutdown-timeout={job.stop_seconds}")
        options.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    options += job.launcher_args

    def agent(host: Host) -> list[str]:
        ranks = [f"--nproc-per-node={host.slots}", f"--local-addr={host.name}"]
        return [job.python, "-P", "-m", "torch.distributed.run", *options, *ranks, job.script, *job.arguments]

    if job.route == "local":
        return StartPlan((StartCommand("torchrun", tuple(agent(job.hosts[0]))),), {**environment, **own})
    if job.route == "ssh":
        sent = _sent(job, environment)
        transport = job.transport({**sent.variables, **own})
        starts = [
            StartCommand(f"torchrun on {h.name}", tuple(transport.words(h.name, agent(h), limit=CONNECT_SECONDS)))
            for h in job.hosts
        ]
        return StartPlan(tuple(starts), {**environment, **own}, notes=sent.left)
    slots = {host.slots for host in job.hosts}
    if len(slots) != 1:
        raise UserError(f"torchrun by srun needs the same number of ranks on every node, not {sorted(slots)}")
    # Only the node itself knows its own name.
    shell = ["sh", "-c", 'exec "$0" -P -m torch.distributed.run --local-addr="$SLURMD_NODENAME" "$@"', job.python]
    ranks = [*options, f"--nproc-per-node={slots.pop()}", job.script, *job.arguments]
    words = [*_srun_words(job), f"--ntasks={len(job.hosts)}", "--ntasks-per-node=1", *_cpus(job, environment)]
    return StartPlan((_by_srun((*words, *shell, *ranks)),), {**environment, **own})


def _cpus(job: Job, environment: Mapping[str, str]) -> list[str]:
    """An agent gets the CPUs of all ranks that it starts."""
    per_task = environment.get("SLURM_CPUS_PER_TASK", "")
    return [f"--cpus-per-task={int(per_task) * job.hosts[0].slots}"] if per_task.isdigit() else []


def _sent(job: Job, environment: Mapping[str, str]) -> ForwardedEnv:
    """The variables forwarded with the job; the permission to run mpirun as root only if the user gave it."""
    given = read_user_file(environment) | job.job_env
    if job.launcher in ("openmpi", "mpirun"):
        given |= {name: environment[name] for name in _USER_ONLY if name in environment} | job.master_env
    return forward_env(environment, given=given, in_words=job.launcher == "pdsh")


def _address(job: Job) -> list[str]:
    return ["--master_addr", job.master_addr] if job.master_addr else []


def _ssh_port(job: Job) -> list[str]:
    return ["--ssh_port", str(job.ssh_port)] if job.ssh_port is not None else []
