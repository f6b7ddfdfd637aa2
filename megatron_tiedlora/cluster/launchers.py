"""Build the command that starts a job's ranks by a launcher: words, environment and files. Starts nothing.

| launcher | what starts the ranks | what the other hosts get of the environment |
|---|---|---|
| local | `deepspeed` on this machine | |
| pdsh, openmpi | `deepspeed`, over pdsh and ssh or over mpirun | what DeepSpeed exports, and `.deepspeed_env` |
| mpirun | mpirun | the same, by -x NAME |
| torchrun | torchrun's agent on each host, over pdsh and ssh or by srun | the same, in its command; all by srun |
| srun | srun | all |
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
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
DEEPSPEED_EXPORTS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # names that begin so go to the other hosts
# All users of a host can read a command's arguments, and DeepSpeed puts what it exports there.
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|(?<!BY)(?<!BY_)(?<!COM)PASS(?!_?THR|ES$|IVE)|.PWD$|_PAT$|JWT|CREDENTIAL|API_?KEY"
    r"|ACCESS_?KEY|PRIVATE|_KEY$|KEYS|AUTH"
)
_LOGIN = re.compile(r"://[^/?#\s@]*:[^/?#\s]*@")  # user and password in an address
_QUOTED = re.compile(r"[^\w@%+=:,./-]")  # DeepSpeed puts values with such a character in double quotes
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MPI_AGENTS = ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")  # the ssh of mpirun: OpenMPI 5, and 4


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
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    python: str
    folder: Path
    private: Path
    master_addr: str
    master_port: int
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
    """A launcher's command, its environment, files to write first, and lines for the user."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[Path, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def plan_start(job: Job, environment: Mapping[str, str]) -> StartPlan:
    """The command that starts `job` from a shell with `environment`, whose own rank, if it has one, is left out.

    Raises:
        UserError: the launcher cannot pass on an argument, a file of variables cannot be read, or torchrun on several
            hosts would have a different number of ranks on each.
    """
    routes: Mapping[str, Callable[[Job, Mapping[str, str]], StartPlan]] = {
        "local": _local,
        "pdsh": _deepspeed_on_hosts,
        "openmpi": _deepspeed_on_hosts,
        "mpirun": _mpirun,
        "srun": _srun,
        "torchrun": _torchrun,
    }
    rankless = {name: value for name, value in environment.items() if name not in RANK_VARIABLES[:3]}
    return routes[job.launcher](job, rankless)


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


def is_secret(name: str) -> bool:
    """Whether a variable's name suggests that its value is a secret."""
    return _SECRET.search(name.upper()) is not None


def _without_secrets(variables: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """(`variables` without secrets that would go to other hosts, a line for each of those)."""
    exported = _exported(variables)
    secret = {name: "its name looks like a secret's" for name in exported if is_secret(name)}
    logins = [name for name, value in exported.items() if name not in secret and _LOGIN.search(value)]
    secret |= dict.fromkeys(logins, "its value holds an address with a password")
    lines = tuple(f"{name} is not sent to the other hosts: {why}" for name, why in secret.items())
    return {name: value for name, value in variables.items() if name not in secret}, lines


def _exported(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(DEEPSPEED_EXPORTS)}


def _sent(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What launchers without exports of their own send to the other hosts: the same as DeepSpeed does."""
    return {**_exported(environment), **read_user_file(environment), **job.own_variables}


def _hostfile(job: Job) -> dict[Path, str]:
    return {job.hostfile: "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)}


# deepspeed -----------------------------------------------------------------------------------------------------------


def _deepspeed(job: Job, options: Sequence[str], arguments: Sequence[str]) -> tuple[str, ...]:
    program = str(Path(job.python).with_name("deepspeed"))  # ranks recognise their launcher by this name
    where = ["--hostfile", str(job.hostfile), "--master_port", str(job.master_port), "--no_local_rank"]
    module = ["--module"] if job.program[0] == "-m" else []
    return (program, *where, *options, *module, job.program[-1], *arguments)


def _local(job: Job, environment: Mapping[str, str]) -> StartPlan:
    # With a hostfile for this machine the launcher does not read /job/hostfile, if there is one; --include overrides
    # CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.
    slots = max(map(int, job.gpus)) + 1 if job.gpus else job.size
    include = ["--include", f"localhost:{','.join(job.gpus)}"] if job.gpus else []
    options = ["--no_ssh_check", "--master_addr", "127.0.0.1", *include, *job.launcher_args]
    words = _deepspeed(job, options, job.arguments)
    return StartPlan(words, {**environment, **job.own_variables}, {job.hostfile: f"localhost slots={slots}\n"})


def _deepspeed_on_hosts(job: Job, environment: Mapping[str, str]) -> StartPlan:
    kept, notes = _without_secrets(environment)
    file = job.private / "deepspeed_env"
    # DeepSpeed prepends the current folder to PYTHONPATH; the file is read after that and overrides it.
    named = {"PYTHONPATH": kept.get("PYTHONPATH", ""), **read_user_file(environment), **job.own_variables}
    # Also a single host of a hostfile is reached by ssh. DeepSpeed itself would ask the first host for its name and its
    # address, by an ssh without time limits.
    options = ["--launcher", job.launcher, "--force_multi", "--no_ssh_check", "--master_addr", job.master_addr]
    arguments, launcher_args, more = list(job.arguments), list(job.launcher_args), {}
    if job.launcher == "pdsh":
        options += ["--ssh_port", str(job.ssh_port)] if job.ssh_port is not None else []
        more = _pdsh_environment(environment)
        arguments = [_pdsh_word(word) for word in arguments]
    else:
        named |= job.master_variables
        for name, value in (_exported(kept) | named).items():
            if _QUOTED.search(value.strip()):
                why = "DeepSpeed would put its value in double quotes, which mpirun does not remove"
                raise UserError(f"{name}: {why}; use --launcher mpirun")
        more = _mpi_environment(job, environment)
        launcher_args = ["--bind-to", "none", "--map-by", "slot", *launcher_args]
    options += [f"--launcher_args={shlex.join(launcher_args)}"] if launcher_args else []
    text = "".join(f"{name}={value}\n" for name, value in named.items())
    return StartPlan(
        _deepspeed(job, options, arguments),
        {**kept, **job.own_variables, **more, "DS_ENV_FILE": str(file)},
        {**_hostfile(job), file: text},
        notes,
    )


def _pdsh_environment(environment: Mapping[str, str], port: int | None = None) -> dict[str, str]:
    """ssh uses the first value of an option, so the user's own options stand first."""
    words = [environment.get("PDSH_SSH_ARGS_APPEND", ""), SSH_OPTIONS, f"-p {port}" if port is not None else ""]
    return {"PDSH_SSH_ARGS_APPEND": " ".join(filter(None, words))}


def _pdsh_word(word: str) -> str:
    """An argument for DeepSpeed's pdsh launcher, which leaves one without a blank alone, and puts another one into
    double quotes and escapes only the double quotes in it. pdsh expands %h, %n and %u.

    Raises:
        UserError: it holds a line break or another control character.
    """
    _check_line(word)
    word = word.replace("%", "%%")
    return re.sub(r"([\\$`])", r"\\\1", word) if " " in word else shlex.quote(word)


def _check_line(word: str) -> None:
    if re.search(r"[\x00-\x1f\x7f]", word):
        raise UserError(f"{word!r}: pdsh does not pass on a line break; put the setting into a YAML file for --config")


# mpirun, srun and torchrun -------------------------------------------------------------------------------------------


def _mpirun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    kept, notes = _without_secrets(environment)
    sent = {**_sent(job, kept), **job.master_variables}
    words = ["mpirun", "-np", str(job.size), "--hostfile", str(job.hostfile), "--bind-to", "none", "--map-by", "slot"]
    passed = [word for name in sent for word in ("-x", name)]
    own = {**sent, **_mpi_environment(job, environment)}
    return StartPlan((*words, *passed, *job.launcher_args, *job.command), {**kept, **own}, _hostfile(job), notes)


def _mpi_environment(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that name mpirun's ssh; empty if the user has set one of them."""
    if job.route != "ssh" or any(name in environment for name in _MPI_AGENTS):
        return {}
    port = f" -p {job.ssh_port}" if job.ssh_port is not None else ""
    return dict.fromkeys(_MPI_AGENTS, f"ssh {SSH_OPTIONS}{port}")


def _srun(job: Job, environment: Mapping[str, str]) -> StartPlan:
    slots = {host.slots for host in job.hosts}
    per_host = [f"--ntasks-per-node={slots.pop()}"] if len(slots) == 1 else []
    words = [*_srun_words(job), f"--ntasks={job.size}", *per_host, "--distribution=block", *job.launcher_args]
    return StartPlan((*words, *job.command), {**environment, **job.own_variables, **job.master_variables})


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
        return StartPlan((*agent, *ranks), {**environment, **job.own_variables})
    if job.route == "ssh":
        kept, notes = _without_secrets(environment)
        values = [f"{name}={value}" for name, value in _sent(job, kept).items()]
        for word in (*values, *ranks):
            _check_line(word)
        before, after = (shlex.join(words).replace("%", "%%") for words in (["env", *values, *agent], ranks))
        line = f"cd {shlex.quote(str(job.folder)).replace('%', '%%')} && exec {before} --local-addr=%h {after}"
        words = ("pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", job.names, line)
        return StartPlan(words, {**kept, **_pdsh_environment(environment, job.ssh_port)}, notes=notes)
    # Only the node itself knows its own name. An agent gets the CPUs of all ranks that it starts.
    shell = ["sh", "-c", 'exec "$0" -P -m torch.distributed.run --local-addr="$SLURMD_NODENAME" "$@"', job.python]
    tasks, per_task = [f"--ntasks={len(job.hosts)}", "--ntasks-per-node=1"], environment.get("SLURM_CPUS_PER_TASK", "")
    tasks += [f"--cpus-per-task={int(per_task) * job.hosts[0].slots}"] if per_task.isdigit() else []
    return StartPlan((*_srun_words(job), *tasks, *shell, *ranks), {**environment, **job.own_variables})
