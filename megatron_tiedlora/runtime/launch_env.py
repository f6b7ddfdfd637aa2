"""Ranks from whichever launcher started us, what libraries read from the environment, and who says why a host fails."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path

import psutil
import torch

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.config.hosts import in_slurm_step, num_ranks, read_hostfile, slurm_hosts

EXPECTED_RANKS = "MEGATRON_TIEDLORA_EXPECTED_RANKS"  # how many ranks whoever started the job meant to start
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED, _FAILED_SECONDS = "megatron_tiedlora-failed-", 600.0
_OPENMPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
_AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"
_CHOOSING = ("-i", "-e", "--include", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators")  # deepspeed's
_DEFAULT_PORT = 29500  # DeepSpeed's and torch's


def prepare_environment() -> None:
    """Set what DeepSpeed reads when it is imported, and torch when it starts CUDA; call before either happens.

    What is set already stays. Without CUDA the accelerator is named, so that DeepSpeed does not probe for one. Ranks
    that `srun` started get their variables from Slurm's, with the step's first host as master. Under MPI they are left
    for DeepSpeed's discovery, which asks mpi4py for the master's address, unless MASTER_ADDR says it already. A plain
    `python launch/train.py` becomes a world of one rank on a free port.

    Raises:
        UserError: Slurm's variables cannot be read.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        prepare_cuda()
    environment = os.environ
    if all(name in environment for name in _RANK_VARIABLES[:2]):
        return
    if all(name in environment for name in _OPENMPI):  # before Slurm's, in which mpirun starts its own daemons
        if "MASTER_ADDR" in environment:
            _set_ranks(_OPENMPI, environment["MASTER_ADDR"], _DEFAULT_PORT)
    elif in_slurm_step(environment):
        master = environment.get("MASTER_ADDR") or slurm_hosts(environment)[0].name
        _set_ranks(_SLURM, master, slurm_port(environment))
    elif all(name in environment for name in _PMI[:2]):
        pass
    else:
        values = ("0", "1", "0", "127.0.0.1", str(free_port("127.0.0.1")))
        environment.update(zip(_RANK_VARIABLES, values, strict=True))


def prepare_cuda() -> None:
    """Defaults of CUDA's libraries that suit this training, where the user has set none."""
    environment = os.environ
    if "PYTORCH_ALLOC_CONF" not in environment:  # which comes first where a torch knows it
        # Rows of other lengths leave holes of other sizes: without it they double the memory that torch holds.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # cuDNN's attention makes a plan for every new shape, for tens of milliseconds; lengths change here all the time.
    environment.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    # NCCL's watchdog would abort the process, in which nobody could then say why. Let it abort the exchange alone, so
    # that the next one over the same group raises; that peers are there is known from the agreements over gloo.
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    # Nor is it to abort over an error of the GPU, which it meets where it looks how far an exchange is: Python gets it.
    environment.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")


def _set_ranks(names: tuple[str, str, str], master: str, port: int) -> None:
    """Fill in torch's variables from a launcher's own (rank, size, local rank)."""
    values = (*(os.environ[name] for name in names), master, os.environ.get("MASTER_PORT", str(port)))
    os.environ.update(zip(_RANK_VARIABLES, values, strict=True))


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port that all ranks of a Slurm step agree on without a word, and that other steps of these hosts hardly have.

    Below the range from which systems give ports to clients.
    """
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 15_000 + (16 * job + step % 16) % 15_000


def free_port(host: str = "") -> int:
    """A port of this machine that nothing uses now, on `host` or on all of its addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, as its launcher says (torch, DeepSpeed, MPI or Slurm variables).

    Raises:
        UserError: there are none, or they do not fit what the job was started for: another number of ranks than
            MEGATRON_TIEDLORA_EXPECTED_RANKS, which may hold none, a `deepspeed --hostfile` whose file is missing or
            has other slots, or `torchrun`s of one Slurm step that do not know of each other. Each would train apart,
            and end well. Or a `torchrun` that could not start its ranks again.
    """
    rank, world_size = _rank_and_world_size()
    _check_expected_ranks(world_size)
    return rank, world_size


def _rank_and_world_size() -> tuple[int, int]:
    for rank, size, *_ in (_RANK_VARIABLES, _OPENMPI, _PMI):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    raise UserError(
        "no rank in the environment; start with `deepspeed`, `torchrun`, `srun` or `mpirun`, or plain python for one"
    )


def _check_expected_ranks(world_size: int) -> None:
    environment = os.environ
    expected = environment.get(EXPECTED_RANKS, "").strip()
    if expected and re.fullmatch("[0-9]{1,9}", expected) is None:
        raise UserError(f"{EXPECTED_RANKS}={shown(expected)} is no number of ranks; set it to theirs, or unset it")
    if expected and int(expected) != world_size:
        raise UserError(
            f"this rank sees a world of {world_size}, but {expected} ranks were to be started ({EXPECTED_RANKS}); the"
            " launcher did not use all hosts and slots: look at its first lines, and at `python launch/doctor.py`"
        )
    if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and environment.get(_AGENT_STORE) == "True":
        # Ranks that start again would find the addresses of the dead in it (torch 2.13).
        raise UserError(
            "torchrun --max_restarts needs a new store for every start: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
            " before torchrun, on every host"
        )
    agents, tasks = environment.get("GROUP_WORLD_SIZE"), environment.get("SLURM_STEP_NUM_TASKS", "1")
    if agents == "1" and environment.get("TORCHELASTIC_RUN_ID") == "none" and int(tasks) > 1:
        raise UserError(
            f"srun started {tasks} tasks, but each torchrun is alone; give torchrun --nnodes, --rdzv_backend c10d,"
            " --rdzv_id and --rdzv_endpoint (launch/README.md), or let srun start the ranks themselves"
        )
    runner = deepspeed_runner()
    if runner is not None:
        _check_hostfile(runner, world_size)


def deepspeed_runner() -> psutil.Process | None:
    """The `deepspeed` command that started this rank through its launcher on this host; None where there is none."""
    try:
        launcher = psutil.Process().parent()
        if launcher is None or "deepspeed.launcher.launch" not in " ".join(launcher.cmdline()):
            return None
        runner = launcher.parent()
        is_runner = runner is not None and any(Path(word).name == "deepspeed" for word in runner.cmdline()[:3])
        return runner if is_runner else None
    except psutil.Error:  # it died between two looks
        return None


def _check_hostfile(runner: psutil.Process, world_size: int) -> None:
    """Refuse the hostfile that `deepspeed` was given where it is not there, or has other slots than there are ranks.

    Where it is missing DeepSpeed only warns, and trains on this host alone (seen in 0.19.8).
    """
    try:
        words, folder = runner.cmdline(), Path(runner.cwd())
    except psutil.Error:
        return
    words = list(takewhile(lambda word: not word.endswith(".py"), words))  # what follows the script is its own
    for word, following in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("-H", "--hostfile"):
            given = value or following
            slots = num_ranks(read_hostfile(folder / user_path(given, flag="--hostfile")))
            if slots != world_size and not any(word.startswith(_CHOOSING) for word in words):
                raise UserError(f"--hostfile {given} has {slots} slots, but {world_size} ranks were started")


def first_to_fail() -> bool:
    """Whether this rank is the first of its host to fail: it says why, and its peers need not say it again.

    The first one leaves an empty file in the temporary folder, named after its launcher; old ones are removed.
    """
    try:
        if _rank_and_world_size()[1] == 1:
            return True
        launcher, folder = psutil.Process(os.getppid()), Path(tempfile.gettempdir())
        mine = f"{_FAILED}{os.getuid()}-"
        for old in folder.glob(f"{mine}*"):
            with suppress(OSError):  # a peer has just removed it
                if time.time() - old.stat().st_mtime > _FAILED_SECONDS:
                    old.unlink()
        start = "-".join(os.environ.get(variable, "") for variable in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"))
        name = f"{mine}{launcher.pid}-{launcher.create_time():.2f}-{start}"
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except (UserError, OSError, psutil.Error):  # better twice than never
        return True
    return True


def local_rank() -> int:
    """This process's number among those of its host, by whichever launcher's variable is there."""
    for name in ("LOCAL_RANK", _OPENMPI[2], _SLURM[2], _PMI[2]):
        if name in os.environ:
            return int(os.environ[name])
    return 0


@cache
def has_bf16_instructions(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this host's CPU has instructions for bf16; a bf16 matmul without them took 70 times as long as in fp32.

    True where the system does not say.
    """
    try:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", cpu_info.read_text()) is not None  # the last is Arm's
    except OSError:
        return True


def uses_gpu() -> bool:
    """Whether ranks of this host run on GPUs: torch sees one, and DS_ACCELERATOR does not say otherwise."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
