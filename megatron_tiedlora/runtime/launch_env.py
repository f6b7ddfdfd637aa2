"""Read the hosts of a job from a hostfile or a Slurm allocation, and the ranks from the launchers' variables.

This module also sets the variables that libraries read, and chooses the rank that reports a host's failure. It does not
contact any host. Only functions that need GPUs import torch, so that --help and a wrong flag respond quickly.
"""

import os
import re
import resource
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path

import psutil

from megatron_tiedlora.base.files import read_small_text
from megatron_tiedlora.base.messages import UserError, os_errors, shown, user_path

_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})")
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_TASKS = re.compile(r"([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?")
_MOST_HOSTS = 1_000_000
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # torch's launchers set these
EXPECTED_RANKS = "MEGATRON_TIEDLORA_EXPECTED_RANKS"  # a variable with the number of ranks that the job should start
_LAUNCH_FILE, _LAUNCH_SECONDS = "megatron_tiedlora-launch-", 600.0
_OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # the shell of a batch script lacks the first two
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_CHOOSING = ("-i", "-e", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators")  # deepspeed's
_DEFAULT_PORT = 29500  # the default of DeepSpeed and torch
# Defaults for CUDA's libraries that suit this training, unless the user has set them.
_CUDA_DEFAULTS = {
    # Without this setting, rows of varying lengths fragment the memory, and torch reserves twice as much.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # NCCL would register the memory of CUDA graphs, whose access fails in expandable segments (as Megatron-LM notes).
    "NCCL_GRAPH_REGISTER": "0",
    # For every new shape, cuDNN's attention makes a plan, which takes tens of milliseconds. Lengths often change here.
    "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
    # NCCL's watchdog would abort the process before it can report a reason. With this value it aborts only the
    # collective, and the next collective of the same process group raises. Messages over gloo show lost ranks.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    # With this value the watchdog does not abort the process on a GPU error, and Python gets the error.
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
}


@dataclass(frozen=True)
class Host:
    """A host and its number of ranks."""

    name: str
    slots: int


def rank_variables(*values: int | str) -> dict[str, str]:
    """Return the environment variables that torch's launchers set for a rank, with the values of RANK_VARIABLES."""
    return dict(zip(RANK_VARIABLES, map(str, values), strict=True))


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """Return the hosts in a hostfile of DeepSpeed or OpenMPI, with `NAME slots=N` lines, comments and blank lines.

    Raises:
        UserError: the file does not exist, has no host, has a malformed line, or lists a host twice or without slots.
    """
    file = user_path(path, flag="--hostfile")
    with os_errors(f"--hostfile {path}: cannot be read", fix="; write one `NAME slots=N` line per host"):
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe may never end, and DeepSpeed does not accept one
            raise OSError("not a regular file")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(read_small_text(file).splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None or int(match[2]) < 1 or match[1].startswith("-") or not match[1].isprintable():
            raise UserError(
                f"{file}:{number}: {shown(content)} does not have the form `NAME slots=N` with N from 1 to 999999;"
                " correct this line"
            )
        if match[1] in hosts:
            raise UserError(
                f"{file}:{number}: {shown(match[1])} appears twice; give each host one line with all its slots"
            )
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; write one `NAME slots=N` line per host")
    return tuple(hosts.values())


def slurm_hosts(environment: Mapping[str, str]) -> tuple[Host, ...]:
    """Return the hosts and the number of tasks per host of the Slurm step, or of the allocation outside a step.

    Raises:
        UserError: this process is not in an allocation, or Slurm's variables cannot be read.
    """
    step = all(name in environment for name in _SLURM[:2])
    names = environment.get("SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE" if step else "SLURM_TASKS_PER_NODE")
    if not names or not tasks:
        raise UserError("not in a Slurm allocation: SLURM_JOB_NODELIST is not set; start with sbatch or salloc")
    hosts, slots = expand_nodelist(names), _tasks_per_node(tasks)
    if len(hosts) != len(slots):
        counts = f"{len(hosts)} nodes ({names}), but numbers of tasks for {len(slots)} ({tasks})"
        raise UserError(f"Slurm's variables contradict each other: {counts}; start with sbatch or salloc")
    return tuple(Host(name, count) for name, count in zip(hosts, slots, strict=True))


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """Expand a Slurm node list such as `gpu[01-03,7],login` with `scontrol`, which supports all forms.

    Raises:
        UserError: there is no `scontrol`, or it rejects the list.
    """
    if re.fullmatch(r"\w[\w.-]*(,\w[\w.-]*)*", nodelist):  # plain names, as in small allocations: nothing to expand
        return tuple(nodelist.split(","))
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"scontrol cannot expand the node list {nodelist} ({error}); put scontrol on PATH, or set MASTER_ADDR to"
            " the first node's name"
        ) from None
    return tuple(done.stdout.split())


def _tasks_per_node(text: str) -> list[int]:
    """Return the number of tasks on each node from Slurm's text, such as [2, 2, 2, 1] for `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        match = _TASKS.fullmatch(part.strip())
        times = int(match[2] or 1) if match else 0
        if match is None or len(counts) + times > _MOST_HOSTS:
            raise UserError(
                f"SLURM_TASKS_PER_NODE={text} cannot be read: {shown(part)} is neither `N` nor `N(xHOSTS)`, or"
                f" there are more than {_MOST_HOSTS:,} hosts; start with sbatch or salloc"
            )
        counts += [int(match[1])] * times
    return counts


def started_program(words: Sequence[str]) -> str:
    """Return the script or module that a Python command line runs, or '' if there is none."""
    return next((word for word in words[1:] if word not in ("-u", "-P", "-m")), "")


def is_torchrun(words: Sequence[str]) -> bool:
    """Return whether a command line starts torchrun's agent, which starts and restarts ranks."""
    return Path(started_program(words)).name in _TORCHRUN


# The variables of ranks -----------------------------------------------------------------------------------------------


def prepare_environment() -> None:
    """Set environment variables for DeepSpeed and CUDA. Call this before importing DeepSpeed and initialising CUDA.

    Variables that are already set do not change. Without CUDA, DS_ACCELERATOR is set so that DeepSpeed does not search
    for an accelerator. For ranks of `srun`, the values come from Slurm's variables, and the step's first host is the
    master. For ranks of MPI, DeepSpeed sets the variables and gets the master's address from mpi4py, unless MASTER_ADDR
    is set. `tiedlora train` without a launcher runs as one rank on a free port. The limit of open files is raised.

    Raises:
        UserError: Slurm's variables cannot be read.
    """
    import torch

    with suppress(ValueError, OSError):  # gloo needs a descriptor for each rank
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    environment = os.environ
    defaults = _CUDA_DEFAULTS if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    for name, value in defaults.items():
        if name != "PYTORCH_CUDA_ALLOC_CONF" or "PYTORCH_ALLOC_CONF" not in environment:  # newer torch prefers this
            environment.setdefault(name, value)
    if all(name in environment for name in RANK_VARIABLES[:2]):
        return
    if all(name in environment for name in _OPENMPI):  # before Slurm, because mpirun may run inside a Slurm step
        if "MASTER_ADDR" in environment:
            _set_ranks(_OPENMPI, environment["MASTER_ADDR"], _DEFAULT_PORT)
    elif all(name in environment for name in _SLURM[:2]):
        master = environment.get("MASTER_ADDR") or slurm_hosts(environment)[0].name
        _set_ranks(_SLURM, master, slurm_port(environment))
    elif not all(name in environment for name in _PMI[:2]):
        environment.update(rank_variables(0, 1, 0, "127.0.0.1", free_port("127.0.0.1")))


def _set_ranks(names: tuple[str, str, str], master: str, port: int) -> None:
    """Set torch's variables from a launcher's variables for (rank, world size, local rank)."""
    values = (*(os.environ[name] for name in names), master, os.environ.get("MASTER_PORT", port))
    os.environ.update(rank_variables(*values))


def slurm_port(environment: Mapping[str, str]) -> int:
    """Return the rendezvous port of a Slurm step. It is unlikely that another step on these hosts has the same port.

    The port is below the range of ephemeral ports.
    """
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 15_000 + (16 * job + step % 16) % 15_000


def free_port(host: str = "") -> int:
    """Return a port of this machine that is free now, on the address `host` or on all addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the world size from its launcher's variables (torch, DeepSpeed or MPI).

    Raises:
        UserError: the variables are not set; MEGATRON_TIEDLORA_EXPECTED_RANKS is not a number or differs from the world
            size; the file of `deepspeed --hostfile` is missing, or its slots differ from the world size; the `torchrun`
            processes of a Slurm step are not connected, so that each would train alone; or `torchrun --max_restarts`
            cannot restart its ranks with the present store.
    """
    (rank, world_size), environment = _rank_and_world_size(), os.environ
    expected = environment.get(EXPECTED_RANKS, "").strip()
    if expected and re.fullmatch("[0-9]{1,9}", expected) is None:
        raise UserError(f"{EXPECTED_RANKS}={shown(expected)} is not a number of ranks; correct it, or unset it")
    if expected and int(expected) != world_size:
        raise UserError(
            f"the world size of this rank is {world_size}, but {expected} ranks should have started ({EXPECTED_RANKS});"
            " the launcher did not use all hosts and slots: see its first lines, or run `tiedlora doctor`"
        )
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and environment.get(_AGENT_STORE) == "True":
        # Restarted ranks would read the addresses of dead ranks from the agents' store (torch 2.13).
        raise UserError(
            "torchrun --max_restarts needs a new store for every restart: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            " before torchrun, on every host"
        )
    agents, tasks = environment.get("GROUP_WORLD_SIZE"), environment.get("SLURM_STEP_NUM_TASKS", "1")
    if agents == "1" and environment.get("TORCHELASTIC_RUN_ID") == "none" and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} tasks, but their torchruns are not connected; give torchrun --nnodes, --rdzv_backend"
            " c10d, --rdzv_id and --rdzv_endpoint (launch/README.md), or let srun start the ranks themselves"
        )
    runner = deepspeed_runner()
    if runner is not None:
        _check_hostfile(runner, world_size)
    return rank, world_size


def _rank_and_world_size() -> tuple[int, int]:
    for rank, size, *_ in (RANK_VARIABLES, _OPENMPI, _PMI):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    raise UserError(
        "no environment variable contains the rank of this process; start with `deepspeed`, `torchrun`, `srun` or"
        " `mpirun`, or with plain python for one rank"
    )


def deepspeed_runner() -> psutil.Process | None:
    """Return the `deepspeed` process that started this rank's launcher on this host, or None if there is none."""
    try:
        launcher = psutil.Process().parent()
        if launcher is None or "deepspeed.launcher.launch" not in " ".join(launcher.cmdline()):
            return None
        runner = launcher.parent()
        is_runner = runner is not None and any(Path(word).name == "deepspeed" for word in runner.cmdline()[:3])
        return runner if is_runner else None
    except psutil.Error:  # the process has just died
        return None


def _check_hostfile(runner: psutil.Process, world_size: int) -> None:
    """Raise UserError if the hostfile given to `deepspeed` is missing, or its slots differ from the number of ranks.

    Without the file, DeepSpeed only warns and trains on this host alone (seen in 0.19.8).
    """
    try:
        words, folder = runner.cmdline(), Path(runner.cwd())
    except psutil.Error:
        return
    started = ("megatron_tiedlora", "tiedlora")  # all later words belong to the program
    words = list(takewhile(lambda word: not (word.endswith(".py") or Path(word).name in started), words))
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("-H", "--hostfile"):
            given = value or following
            slots = sum(host.slots for host in read_hostfile(folder / user_path(given, flag="--hostfile")))
            if slots != world_size and not any(word.startswith(_CHOOSING) for word in words):
                raise UserError(f"--hostfile {given} has {slots} slots, but {world_size} ranks started; correct it")


def first_to_fail() -> bool:
    """Return whether this rank is the first rank to fail on its host, which creates a file and reports the reason."""
    try:
        if (file := launch_file("failed")) is not None:
            file.touch(0o600, exist_ok=False)
    except OSError as error:  # a second report is better than none
        return not isinstance(error, FileExistsError)
    return True


def launch_file(name: str) -> Path | None:
    """Return the path of a temporary file of the ranks of this launch on this host. Remove old files of this kind.

    The path contains the launcher's process. Return None for a single rank, or if the path cannot be determined.
    """
    try:
        if _rank_and_world_size()[1] == 1:
            return None
        launcher, folder = psutil.Process(os.getppid()), Path(tempfile.gettempdir())
        mine = f"{_LAUNCH_FILE}{os.getuid()}-"
        for old in folder.glob(f"{mine}*"):
            with suppress(OSError):  # a peer has just removed it
                if time.time() - old.stat().st_mtime > _LAUNCH_SECONDS:
                    old.unlink()
        start = "-".join(os.environ.get(variable, "") for variable in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
        return folder / f"{mine}{launcher.pid}-{launcher.create_time():.2f}-{start}-{name}"
    except (UserError, OSError, psutil.Error):
        return None


def rank_number(*, local: bool = False) -> int:
    """Return this process's global or local rank from the variables of any launcher, or 0 if none is set."""
    names = (each[2 if local else 0] for each in (RANK_VARIABLES, _OPENMPI, _SLURM, _PMI))
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


@cache
def has_bf16_instructions(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this host's CPU has bf16 instructions, or True if this is unknown.

    On a CPU without them, a bf16 matmul took 70 times as long as an fp32 matmul.
    """
    try:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu_info.read_text()) is not None  # the last is Arm's
    except OSError:
        return True


def uses_gpu() -> bool:
    """Return whether ranks of this host run on GPUs: torch finds a GPU, and DS_ACCELERATOR is unset or cuda."""
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def visible_gpus() -> tuple[str, ...]:
    """Return the GPU indices in CUDA_VISIBLE_DEVICES, which `--include` would override, or the indices of all GPUs."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if named is None or not count:
        return tuple(str(index) for index in range(count))
    names = tuple(name.strip() for name in named.split(","))[:count]
    if not all(name.isdigit() for name in names):
        raise UserError(f"CUDA_VISIBLE_DEVICES={named}: only GPU numbers are supported; give numbers such as 0,1")
    return names
