"""The hosts of a job from a hostfile or a Slurm allocation: names and slots. Nothing here contacts a host."""

import re
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tiedlora.base.messages import UserError, shown, user_path
from megatron_tiedlora.base.text_files import read_small_text

_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,6})")
_TORCHRUN = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
_TASKS = re.compile(r"([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?")
_MOST_HOSTS = 1_000_000
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # that torch's launchers set


@dataclass(frozen=True)
class Host:
    """A host and how many ranks it runs."""

    name: str
    slots: int


def rank_variables(*values: int | str) -> dict[str, str]:
    """The environment of a rank, as torch's launchers set it, from the values of RANK_VARIABLES."""
    return dict(zip(RANK_VARIABLES, map(str, values), strict=True))


def read_hostfile(path: str | Path) -> tuple[Host, ...]:
    """The hosts of a hostfile as DeepSpeed and OpenMPI read it: `NAME slots=N` lines, comments and blank lines.

    Raises:
        UserError: the file does not exist, has no host or a malformed line, or a host twice or without slots.
    """
    file = user_path(path, flag="--hostfile")
    try:  # a pipe or a device may never end; DeepSpeed treats one as no hostfile
        reason = None if stat.S_ISREG(file.stat().st_mode) else "not a regular file"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise UserError(f"--hostfile {path}: cannot be read ({reason}); write one `NAME slots=N` line per host")
    hosts: dict[str, Host] = {}
    for number, line in enumerate(read_small_text(file).splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None or int(match[2]) < 1 or match[1].startswith("-") or not match[1].isprintable():
            raise UserError(
                f"{file}:{number}: {shown(content)} does not have the form `NAME slots=N` with N from 1 to 999999"
            )
        if match[1] in hosts:
            raise UserError(
                f"{file}:{number}: {shown(match[1])} appears twice; give each host one line with all its slots"
            )
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; write one `NAME slots=N` line per host")
    return tuple(hosts.values())


def in_slurm_step(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process. The shell of a batch script is not in a step of tasks."""
    return "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment


def slurm_hosts(environment: Mapping[str, str]) -> tuple[Host, ...]:
    """The hosts of this process's Slurm step, or else of its allocation, with their numbers of tasks.

    Raises:
        UserError: this process is not in an allocation, or its variables cannot be read.
    """
    step = in_slurm_step(environment)
    names = environment.get("SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE" if step else "SLURM_TASKS_PER_NODE")
    if not names or not tasks:
        raise UserError("not in a Slurm allocation: SLURM_JOB_NODELIST is not set; start with sbatch or salloc")
    hosts, slots = expand_nodelist(names), _tasks_per_node(tasks)
    if len(hosts) != len(slots):
        raise UserError(f"Slurm names {len(hosts)} nodes ({names}), but tasks for {len(slots)} ({tasks})")
    return tuple(Host(name, count) for name, count in zip(hosts, slots, strict=True))


def expand_nodelist(nodelist: str) -> tuple[str, ...]:
    """Expand a Slurm node list such as `gpu[01-03,7],login` with `scontrol`, which knows all of its forms.

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
    """Expand Slurm's `2(x3),1` to 2, 2, 2, 1."""
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
    """The script or module that a Python command line runs, or ''."""
    return next((word for word in words[1:] if word not in ("-u", "-P", "-m")), "")


def is_torchrun(words: Sequence[str]) -> bool:
    """Whether a command line is that of torchrun's agent, which starts and restarts ranks."""
    return Path(started_program(words)).name in _TORCHRUN


def num_ranks(hosts: Sequence[Host]) -> int:
    """The number of ranks on all hosts together."""
    return sum(host.slots for host in hosts)
