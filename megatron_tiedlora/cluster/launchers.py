"""Build the command that starts a job's ranks by a launcher: words, environment and files. Starts nothing.

| launcher | what starts the ranks | what the other hosts get of the environment |
|---|---|---|
| deepspeed | `deepspeed`, here or on the hosts of a hostfile | what DeepSpeed exports, and `.deepspeed_env` |
| mpirun | mpirun | the same, by -x NAME |
| torchrun | torchrun's agent on each host, over pdsh and ssh or by srun | the same, in its command; all by srun |
| srun | srun | all |
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import START_ID
from megatron_tiedlora.base.text_files import read_small_text
from megatron_tiedlora.config.hosts import RANK_VARIABLES, Host, num_ranks
from megatron_tiedlora.runtime.launch_env import EXPECTED_RANKS

Route = Literal["ssh", "srun", "local"]  # how a launcher reaches the hosts

# Ask nothing, give up a silent host, and share no connection, which would hide that a host is lost.
SSH_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
    " -o ControlMaster=no -o ControlPath=none"
)
EXPORTS = ("NCCL", "PYTHON", "UCX", "MV2")  # names that begin so go to the other hosts, as DeepSpeed does it
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """What to run, and where.

    Attributes:
        program: what Python runs in each rank: a script by its absolute path, or `-m` and a module.
        python, folder: the interpreter and the working folder, the same on every host.
        private: a folder for the files of this start only; no other user can read it.
        start: an id of this start, which its ranks write into the run folder; '' if they write none.
    """

    launcher: str
    route: Route
    hosts: tuple[Host, ...]
    master_addr: str
    master_port: int
    python: str
    folder: Path
    program: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    private: Path = Path()
    ssh_port: int | None = None
    gpus: tuple[str, ...] = ()
    launcher_args: tuple[str, ...] = ()
    stop_options: tuple[str, ...] = ()
    start: str = ""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return num_ranks(self.hosts)

    @property
    def names(self) -> str:
        """The hosts' names, as pdsh and srun take them."""
        return ",".join(host.name for host in self.hosts)

    @property
    def own_variables(self) -> dict[str, str]:
        """Variables of every process of the job. PYTHONSAFEPATH keeps Python from importing modules out of the current
        folder, where another user may have put some."""
        start = {START_ID: self.start} if self.start else {}
        return {EXPECTED_RANKS: str(self.size), "PYTHONSAFEPATH": "1", **start}

    @property
    def master_variables(self) -> dict[str, str]:
        """Where the ranks meet, for launchers that do not tell them."""
        return {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}

    @property
    def hostfile(self) -> Path:
        """A hostfile with exactly the ranks to start."""
        return self.private / "hostfile"

    @property
    def command(self) -> list[str]:
        """The command line of a rank."""
        return [self.python, "-u", *self.program, *self.arguments]


@dataclass(frozen=True)
class StartPlan:
    """A launcher's command, its environment, and files to write first."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[Path, str] = field(default_factory=dict)


def plan_start(job: Job, environment: Mapping[str, str]) -> StartPlan:
    """The command that starts `job` from a shell with `environment`, whose own rank, if it has one, is left out.

    Raises:
        UserError: the launcher cannot pass on an argument, a file of variables cannot be read, or torchrun on several
            hosts would have a different number of ranks on each.
    """
    by_launcher = {"deepspeed": _deepspeed, "mpirun": _mpirun, "srun": _srun, "torchrun": _torchrun}
    kept = {name: value for name, value in environment.items() if name not in RANK_VARIABLES[:3]}
    if job.route == "ssh":
        kept = _for_ssh(kept, job.ssh_port)
    return by_launcher[job.launcher](job, {**kept, **job.own_variables})


def _for_ssh(environment: Mapping[str, str], port: int | None) -> dict[str, str]:
    """The environment of a launcher that reaches hosts by ssh, with its options for pdsh and for mpirun 5 and 4.

    MLFLOW_* is left out: DeepSpeed would export it, and all users of a host could read its passwords there. ssh uses
    the first value of an option, so the user's own options stand first.
    """
    options = f"{SSH_OPTIONS} -p {port}" if port is not None else SSH_OPTIONS
    own = environment.get("PDSH_SSH_ARGS_APPEND", "")
    ssh = {"PDSH_SSH_ARGS_APPEND": f"{own} {options}".lstrip()}
    agents = ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")
    if not any(name in environment for name in agents):
        ssh |= dict.fromkeys(agents, f"ssh {options}")
    return {name: value for name, value in environment.items() if not name.startswith("MLFLOW")} | ssh


def read_user_file(environment: Mapping[str, str]) -> dict[str, str]:
    """Read `.deepspeed_env` (or the file that DS_ENV_FILE names) at home and in the current folder, which overrides.

    Blank lines and comments are skipped; DeepSpeed's launcher would fail on them.

    Raises:
        UserError: the file cannot be read, or a line is not NAME=VALUE.
    """
    name = environment.get("DS_ENV_FILE", ".deepspeed_env")
    found: dict[str, str] = {}
    for folder in (Path.home(), Path()):
        file = folder / name
        if not file.is_file():
            continue
        for number, line in enumerate(read_small_text(file).splitlines(), start=1):
            content = line.strip()
            if not content or content.startswith("#"):
                continue
            key, equals, value = content.partition("=")
            if not equals or not _NAME.fullmatch(key.strip()):
                raise UserError(f"{file}:{number}: not of the form NAME=VALUE; correct or remove the line")
            found[key.strip()] = value.strip()
    return found


def _sent(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What the ranks on other hosts get of the environment."""
    exported = {name: value for name, value in environment.items() if name.startswith(EXPORTS)}
    return {**exported, **read_user_file(environment), **job.own_variables}


def _hostfile(job: Job) -> dict[Path, str]:
    return {job.hostfile: "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)}


def _check_words(words: tuple[str, ...], pattern: str, why: str) -> None:
    """Raise UserError if a word matches what a launcher does not pass on unchanged."""
    for word in words:
        if re.search(pattern, word):
            raise UserError(f"{word!r}: {why} put the setting into a YAML file for --config")


def _deepspeed(job: Job, environment: Mapping[str, str]) -> StartPlan:
    program = str(Path(job.python).with_name("deepspeed"))  # ranks recognise their launcher by this name
    # DeepSpeed itself would ask the first host for its name and its address, by an ssh without time limits.
    where = ("--master_addr", job.master_addr, "--master_port", str(job.master_port), "--no_ssh_check")
    module = ("--module",) if job.program[0] == "-m" else ()
    ranks = ("--no_local_rank", *job.launcher_args, *module, job.program[-1], *job.arguments)
    words = (program, "--hostfile", str(job.hostfile), *where)
    if job.route == "local":
        # With a hostfile for this machine the launcher does not read /job/hostfile, if there is one; --include
        # overrides CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.
        slots = max(map(int, job.gpus)) + 1 if job.gpus else job.size
        include = ("--include", f"localhost:{','.join(job.gpus)}") if job.gpus else ()
        return StartPlan((*words, *include, *ranks), environment, {job.hostfile: f"localhost slots={slots}\n"})
    why = "deepspeed does not quote it for other hosts; use --launcher torchrun, or"
    _check_words(job.arguments, r"[^\w@+=:,./-]|^$", why)
    # DeepSpeed puts the current folder into PYTHONPATH; its file is read after that and overrides it. Its OpenMPI
    # launcher tells the ranks no address.
    named = {"PYTHONPATH": environment.get("PYTHONPATH", ""), **read_user_file(environment)}
    named |= {**job.own_variables, **job.master_variables}
    file = job.private / "deepspeed_env"
    files = {**_hostfile(job), file: "".join(f"{name}={value}\n" for name, value in named.items())}
    # Also a single host of a hostfile is reached by its launcher.
    return StartPlan((*words, "--force_multi", *ranks), {**environment, "DS_ENV_FILE": str(file)}, files)


def _mpirun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    sent = {**_sent(job, environment), **job.master_variables}
    words = ["mpirun", "-np", str(job.size), "--hostfile", str(job.hostfile), "--bind-to", "none", "--map-by", "slot"]
    passed = [word for name in sent for word in ("-x", name)]
    return StartPlan((*words, *passed, *job.launcher_args, *job.command), {**environment, **sent}, _hostfile(job))


def _srun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    slots = {host.slots for host in job.hosts}
    per_host = [f"--ntasks-per-node={slots.pop()}"] if len(slots) == 1 else []
    words = [*_srun_words(job), f"--ntasks={job.size}", *per_host, "--distribution=block", *job.launcher_args]
    return StartPlan((*words, *job.command), {**environment, **job.master_variables})


def _srun_words(job: Job) -> list[str]:
    nodes = [f"--nodes={len(job.hosts)}", f"--nodelist={job.names}"]
    return ["srun", "--kill-on-bad-exit=1", "--wait=60", "--export=ALL", *nodes]


def _torchrun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    slots = {host.slots for host in job.hosts}
    if len(slots) != 1:
        raise UserError(f"--launcher torchrun needs the same number of ranks on every host, not {sorted(slots)}")
    meeting = f"{job.master_addr}:{job.master_port}"
    agent = [job.python, "-P", "-m", "torch.distributed.run"]
    options = [f"--nnodes={len(job.hosts)}", f"--nproc-per-node={slots.pop()}", "--rdzv-backend=c10d"]
    options.append("--rdzv-conf=join_timeout=120")  # for a host that does not come; ten minutes by default
    options += [f"--rdzv-endpoint={meeting}", f"--rdzv-id={job.master_port}", *job.stop_options, *job.launcher_args]
    ranks = [*options, *job.program, *job.arguments]
    if job.route == "local":
        return StartPlan((*agent, *ranks), environment)
    if job.route == "ssh":
        values = [f"{name}={value}" for name, value in _sent(job, environment).items()]
        _check_words((*values, *ranks), r"[\x00-\x1f\x7f]", "pdsh does not pass on a line break;")
        before, after = (shlex.join(words).replace("%", "%%") for words in (["env", *values, *agent], ranks))
        line = f"cd {shlex.quote(str(job.folder)).replace('%', '%%')} && exec {before} --local-addr=%h {after}"
        words = ("pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", job.names, line)
        return StartPlan(words, environment)
    # Only the node itself knows its own name. An agent gets the CPUs of all ranks that it starts.
    shell = ["sh", "-c", 'exec "$0" -P -m torch.distributed.run --local-addr="$SLURMD_NODENAME" "$@"', job.python]
    tasks, per_task = [f"--ntasks={len(job.hosts)}", "--ntasks-per-node=1"], environment.get("SLURM_CPUS_PER_TASK", "")
    tasks += [f"--cpus-per-task={int(per_task) * job.hosts[0].slots}"] if per_task.isdigit() else []
    return StartPlan((*_srun_words(job), *tasks, *shell, *ranks), environment)
