"""The process group: ranks from whichever launcher started us, the accelerator, and DeepSpeed's quirks at start-up."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch

from megatron_tiedlora.config.errors import UserError

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED, _FAILED_SECONDS = "megatron_tiedlora-failed-", 600.0
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def prepare_environment() -> None:
    """Set what DeepSpeed reads when it is imported; call before anything imports it.

    Without CUDA the accelerator is named, so that DeepSpeed does not probe for one. A plain `python launch/train.py`
    becomes a world of one rank on a free port; under MPI the variables are left for DeepSpeed's discovery.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    started = any(name in os.environ for name in (*_RANK_VARIABLES[:2], *_MPI_VARIABLES))
    if not started:
        values = ("0", "1", "0", "127.0.0.1", str(free_port("127.0.0.1")))
        os.environ.update(zip(_RANK_VARIABLES, values, strict=True))


def free_port(host: str = "") -> int:
    """A port of this machine that nothing uses now, on `host` or on all of its addresses."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, as its launcher says (torch, DeepSpeed or MPI variables)."""
    for rank, size in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ):
        if rank in os.environ and size in os.environ:
            return int(os.environ[rank]), int(os.environ[size])
    raise UserError(
        "no rank in the environment; start with `deepspeed`, `torchrun` or `mpirun`, or plain python for one"
    )


def first_to_fail() -> bool:
    """Whether this rank is the first of its host to fail: it says why, and its peers need not say it again.

    The first one leaves an empty file in the temporary folder, named after its launcher; old ones are removed.
    """
    try:
        if rank_and_world_size()[1] == 1:
            return True
        launcher, folder = psutil.Process(os.getppid()), Path(tempfile.gettempdir())
        mine = f"{_FAILED}{os.getuid()}-"
        for old in folder.glob(f"{mine}*"):
            with suppress(OSError):  # a peer has just removed it
                if time.time() - old.stat().st_mtime > _FAILED_SECONDS:
                    old.unlink()
        name = f"{mine}{launcher.pid}-{launcher.create_time():.2f}-{os.environ.get('MASTER_PORT', '')}"
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except (UserError, OSError, psutil.Error):  # better twice than never
        return True
    return True


def local_rank() -> int:
    """This process's number among those of its host; MPI sets a variable of its own."""
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def join_process_group(timeout_minutes: float, *, expected_ranks: int) -> torch.device:
    """Initialise torch.distributed through DeepSpeed (NCCL on CUDA, gloo on CPU); returns this rank's device.

    Raises:
        UserError: the group has another size than the launcher said.
    """
    import deepspeed

    on_cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if not on_cuda:
        # DeepSpeed would compile its shared-memory operator here: a minute, and a rank that dies meanwhile leaves a
        # lock on which every later run hangs in silence. gloo serves the few small messages of a CPU run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))  # which DeepSpeed's PipelineModule reads, MPI or not
    device = torch.device("cuda", local_rank()) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
        # Gradients of the adapter are products over all tokens, which cuBLAS sums in parts: in fp32, not in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes), verbose=False
    )
    found = torch.distributed.get_world_size()
    if found != expected_ranks:
        raise UserError(f"the process group has {found} ranks, but the launcher started {expected_ranks}")
    return device


def leave_process_group() -> None:
    """Destroy the process group, where there is one."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
