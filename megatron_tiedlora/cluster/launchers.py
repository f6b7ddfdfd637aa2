"""Build the command, the environment and the files with which a launcher starts the ranks. Nothing is started here.

| launcher | what starts the ranks | variables that remote hosts get |
|---|---|---|
| deepspeed | `deepspeed`, here or on the hosts of a hostfile | what DeepSpeed exports, and `.deepspeed_env` |
| mpirun | mpirun | what DeepSpeed exports, by -x NAME |
| torchrun | torchrun's agent, on this machine only | |
| srun | srun | all |
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_tiedlora.base.files import read_small_text
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import START_ID
from megatron_tiedlora.runtime.launch_env import EXPECTED_RANKS, RANK_VARIABLES, Host

Route = Literal["ssh", "srun", "local"]  # the way from a launcher to the hosts

# ssh never asks for input, and closes the connection to a host that does not respond. It shares no connection, because
# a shared connection would hide the loss of a host.
SSH_OPTIONS = (
    "-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=2"
    " -o ControlMaster=no -o ControlPath=none"
)
_AGENTS = ("PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")  # variables with the ssh command, for mpirun 5 and 4
EXPORTS = ("NCCL", "PYTHON", "UCX", "MV2")  # variables with these prefixes go to remote hosts, as in DeepSpeed


@dataclass(frozen=True)
class Job:
    """A program to run, with its hosts and its launcher.

    Attributes:
        program: the arguments of `python` in each rank: the absolute path of a script, or `-m` and a module.
        python, folder: the interpreter and the working folder, the same on every host.
        private: a folder for the files of this launch, which no other user can read.
        start: the id of this launch, which its ranks write into the run folder; '' if they write no id.
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
    gpus: tuple[str, ...] = ()
    launcher_args: tuple[str, ...] = ()
    start: str = ""

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return sum(host.slots for host in self.hosts)

    @property
    def names(self) -> str:
        """Return the names of the hosts in the format of pdsh and srun."""
        return ",".join(host.name for host in self.hosts)

    @property
    def variables(self) -> dict[str, str]:
        """Return the environment variables of every process of the job. With PYTHONSAFEPATH, Python imports no modules
        from the current folder, where another user may have put files. Not all launchers set MASTER_ADDR."""
        start = {START_ID: self.start} if self.start else {}
        meeting = {"MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}
        return {EXPECTED_RANKS: str(self.size), "PYTHONSAFEPATH": "1", **start, **meeting}

    @property
    def hostfile(self) -> Path:
        """Return the path of the hostfile that lists exactly the ranks to start."""
        return self.private / "hostfile"

    @property
    def launcher_program(self) -> str:
        """Return the launcher's program, which ranks recognise by its name. `deepspeed` is installed beside Python."""
        beside = {"deepspeed": str(Path(self.python).with_name("deepspeed")), "torchrun": self.python}
        return beside.get(self.launcher, self.launcher)

    @property
    def command(self) -> list[str]:
        """Return the command line of a rank."""
        return [self.python, "-u", *self.program, *self.arguments]


@dataclass(frozen=True)
class StartPlan:
    """The command of a launcher, its environment, and the files to write before it starts."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    files: Mapping[Path, str] = field(default_factory=dict)


def plan_start(job: Job, environment: Mapping[str, str]) -> StartPlan:
    """Return the command that starts `job` from a shell with `environment`. RANK and similar variables are removed.

    Raises:
        UserError: the launcher cannot pass an argument to the ranks, or `.deepspeed_env` cannot be read.
    """
    kept = {name: value for name, value in environment.items() if name not in RANK_VARIABLES[:3]}
    if job.route == "ssh":  # DeepSpeed would export MLFLOW_*, whose passwords all users of a host could read
        agents = {} if any(name in kept for name in _AGENTS) else dict.fromkeys(_AGENTS, f"ssh {SSH_OPTIONS}")
        own = {name: value for name, value in kept.items() if not name.startswith("MLFLOW")}
        kept = {"PDSH_SSH_ARGS_APPEND": SSH_OPTIONS, **agents, **own}
    kept |= job.variables
    match job.launcher:
        case "deepspeed":
            return _deepspeed(job, kept)
        case "mpirun":
            sent = {**{name: value for name, value in kept.items() if name.startswith(EXPORTS)}, **job.variables}
            words = ["-np", str(job.size), "--hostfile", str(job.hostfile), "--bind-to", "none", "--map-by", "slot"]
            words += [word for name in sent for word in ("-x", name)]
            return StartPlan(("mpirun", *words, *job.launcher_args, *job.command), kept, _hostfile(job))
        case "srun":
            slots = {host.slots for host in job.hosts}
            per_host = [f"--ntasks-per-node={slots.pop()}"] if len(slots) == 1 else []
            words = ["--kill-on-bad-exit=1", "--wait=60", "--export=ALL", f"--nodes={len(job.hosts)}"]
            words += [f"--nodelist={job.names}", f"--ntasks={job.size}", *per_host, "--distribution=block"]
            return StartPlan(("srun", *words, *job.launcher_args, *job.command), kept)
    agent = [job.python, "-P", "-m", "torch.distributed.run", f"--nproc-per-node={job.size}", "--rdzv-backend=c10d"]
    agent += [f"--rdzv-endpoint={job.master_addr}:{job.master_port}", *job.launcher_args]
    return StartPlan((*agent, *job.program, *job.arguments), kept)


def _hostfile(job: Job) -> dict[Path, str]:
    return {job.hostfile: "".join(f"{host.name} slots={host.slots}\n" for host in job.hosts)}


def _deepspeed(job: Job, environment: Mapping[str, str]) -> StartPlan:
    # DeepSpeed would ask the first host for its name through an ssh without time limits, and describe each process.
    where = ("--master_addr", job.master_addr, "--master_port", str(job.master_port), "--no_ssh_check")
    module = ("--module",) if job.program[0] == "-m" else ()
    ranks = ("--no_local_rank", *job.launcher_args, *module, job.program[-1], *job.arguments)
    words = (job.launcher_program, "--log_level=warning", "--hostfile", str(job.hostfile), *where)
    if job.route == "local":
        # With a hostfile for this machine the launcher does not read /job/hostfile. --include overrides
        # CUDA_VISIBLE_DEVICES, which --num_gpus would ignore.
        slots = max(map(int, job.gpus)) + 1 if job.gpus else job.size
        include = ("--include", f"localhost:{','.join(job.gpus)}") if job.gpus else ()
        return StartPlan((*words, *include, *ranks), environment, {job.hostfile: f"localhost slots={slots}\n"})
    for word in job.arguments:
        if re.search(r"[^\w@+=:,./-]|^$", word):
            why = "deepspeed does not quote it for other hosts. Put the setting into a YAML file for --config"
            raise UserError(f"{word!r}: {why}")
    # DeepSpeed adds the current folder to PYTHONPATH. Its file of variables is read later and overrides this.
    lines = [f"PYTHONPATH={environment.get('PYTHONPATH', '')}", *_users_lines(job, environment)]
    lines += [f"{name}={value}" for name, value in job.variables.items()]
    file = job.private / "deepspeed_env"
    files = {**_hostfile(job), file: "".join(f"{line}\n" for line in lines)}
    # With --force_multi, DeepSpeed uses its launcher for remote hosts even if the hostfile has only one host.
    return StartPlan((*words, "--force_multi", *ranks), {**environment, "DS_ENV_FILE": str(file)}, files)


def _users_lines(job: Job, environment: Mapping[str, str]) -> list[str]:
    """Return the lines of the `.deepspeed_env` files in the home folder and the job's folder. DeepSpeed reads only the
    file of this launch, so these lines are copied into it. DeepSpeed would crash on blank lines and comments."""
    found = []
    for file in (folder / environment.get("DS_ENV_FILE", ".deepspeed_env") for folder in (Path.home(), job.folder)):
        for number, line in enumerate(read_small_text(file).splitlines() if file.is_file() else (), start=1):
            if (content := line.strip()) and not content.startswith("#"):
                if not re.match(r"[A-Za-z_]\w*=", content):
                    raise UserError(f"{file}:{number}: the line is not of the form NAME=VALUE. Correct or remove it")
                found.append(content)
    return found
