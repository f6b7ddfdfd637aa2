"""The process group: the ranks meet, each with a GPU of its own or all on CPUs, and DeepSpeed takes the group over.

    CPU tensors  -> gloo   what ranks agree on (parallel/agreement.py), the adapter at a save
    GPU tensors  -> NCCL   what the model sends

No device is bound to the group. DeepSpeed's own start binds cuda:LOCAL_RANK, which a rank that sees one GPU alone does
not have. Torch would then split the world's communicator for every group of the job, on every rank: 633 times at 512
ranks. Without it each group's communicator is made by its own ranks, at its first message.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.parallel.agreement import first_message, gather_on_rank_0
from megatron_tiedlora.runtime.heartbeat import is_lost_exchange
from megatron_tiedlora.runtime.launch_env import local_rank, uses_gpu

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_UNIQUE = ("GPU-", "MIG-")  # begin names that no other GPU anywhere has
_SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"  # NCCL's own, from 2.30 on


def choose_device() -> torch.device:
    """This rank's GPU, or the CPU. Raises UserError where the host has fewer GPUs than ranks."""
    if not uses_gpu():
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), local_rank()
    if count == 1:  # `srun --gpus-per-task=1` and containers show each rank its own GPU alone
        index = 0
    if index >= count:
        raise UserError(
            f"rank {index} of host {socket.gethostname()} has no GPU, it has {count}; start one rank a GPU (slots in"
            " the hostfile, --ntasks-per-node, --nproc_per_node)"
        )
    return torch.device("cuda", index)


def meet(device: torch.device, timeout: timedelta) -> None:
    """Make torch's process group of all ranks, and check that each has a GPU of its own, or none has.

    Raises:
        UserError: two ranks on one GPU, or one without; on every rank.
        RuntimeError: the ranks do not come together.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
    here = (socket.gethostname(), gpu_name(device))
    places = gather_on_rank_0(here, kind=tuple[str, str])
    if problem := first_message(None if places is None else _shared_gpus(places)):
        raise UserError(problem)


def group_backend(device: torch.device) -> str:
    """What carries the tensors of a group of `device`'s kind: "nccl" or "gloo"."""
    return "nccl" if device.type == "cuda" else "gloo"


def gpu_name(device: torch.device) -> str:
    """Which GPU of its host a device is, so that no other is called the same; "" for a CPU.

    Its UUID, a MIG part's own one; where there is none, as CUDA_VISIBLE_DEVICES or its place among them calls it.
    """
    if device.type != "cuda":
        return ""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[device.index] if device.index < len(visible) and visible[device.index] else str(device.index)
    if name.startswith("MIG-"):  # older drivers give its parts the UUID of the whole GPU
        return name
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return f"GPU-{uuid}" if uuid.strip("0-") else name


def own_gpu() -> str:
    """This process's GPU in words, for an error that it met; "" where it has none."""
    if not torch.cuda.is_initialized():
        return ""
    device = torch.device("cuda", torch.cuda.current_device())
    return f"{device} ({gpu_name(device)})"


def _shared_gpus(places: Sequence[tuple[str, str]]) -> str | None:
    """What is wrong with (host, GPU) of each rank, in one line; None where each has its own, or all are on CPUs.

    NCCL would end the first exchange with "Duplicate GPU detected", or hang.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, (host, gpu) in enumerate(places):  # two containers of a host may call it by two names
        ranks.setdefault(("", gpu) if gpu.startswith(_UNIQUE) else (host, gpu), []).append(rank)
    if not any(gpu for _, gpu in places):
        return None
    for (_, gpu), there in ranks.items():
        host = " and ".join(dict.fromkeys(places[rank][0] for rank in there))
        named = f"{'ranks' if len(there) > 1 else 'rank'} {', '.join(map(str, there[:8]))} on host {host}"
        if not gpu:
            return f"{named}: no GPU, but other ranks have one; see what `nvidia-smi` says there, or leave the host out"
        if len(there) > 1 and os.environ.get(_SHARED_GPUS) != "1":
            return (
                f"{named} share one GPU, {gpu}; start one rank a GPU (slots in the hostfile, --ntasks-per-node,"
                " --nproc_per_node), and let CUDA_VISIBLE_DEVICES show each rank all GPUs of its host or its own"
            )
    return None


def join_process_group(timeout_minutes: float, *, expected_ranks: int) -> torch.device:
    """Make the process group, and let DeepSpeed take it over; returns this rank's device.

    Every group that DeepSpeed makes later has the same time limit.

    Raises:
        UserError: ranks that do not come in time, a port that is taken, a group of another size than the launcher
            said, or two ranks on one GPU.
    """
    import deepspeed

    device, timeout = choose_device(), timedelta(minutes=timeout_minutes)
    os.environ.setdefault("LOCAL_RANK", str(local_rank()))
    if device.type == "cuda":
        # Gradients of the adapter are products over all tokens, which cuBLAS sums in parts: in fp32, not in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    else:
        # DeepSpeed would compile its shared-memory operator here: a minute, and a rank that dies meanwhile leaves a
        # lock on which every later run hangs in silence. gloo serves the few small messages of a CPU run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _discover_ranks()
    try:
        meet(device, timeout)
    except RuntimeError as error:
        if not is_lost_exchange(error):
            raise
        raise UserError(_no_meeting(error, expected_ranks, timeout_minutes)) from error
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else local_rank())  # DeepSpeed's device
    deepspeed.init_distributed(dist_backend=group_backend(device), timeout=timeout, verbose=False)  # takes it over
    found = distributed.get_world_size()
    if found != expected_ranks:
        raise UserError(f"the process group has {found} ranks, but the launcher started {expected_ranks}")
    # DeepSpeed makes its groups without a time limit, so torch's own of 10 (NCCL) or 30 minutes would hold for them;
    # and they carry the model's tensors alone, so a second group of gloo's connections is not made.
    backend: Any = deepspeed.comm.comm.cdb
    backend.new_group = partial(distributed.new_group, timeout=timeout, backend=group_backend(device))
    return device


def _discover_ranks() -> None:
    """Ask MPI for what the environment does not say, as DeepSpeed does where it makes the group itself."""
    from deepspeed.comm import comm

    if distributed.is_initialized() or all(name in os.environ for name in _RANK_VARIABLES):
        return
    if comm.in_aml() and not comm.in_dlts():
        comm.patch_aml_env_for_torch_nccl_backend(verbose=False)
    elif comm.in_aws_sm():
        comm.patch_aws_sm_env_for_torch_nccl_backend(verbose=False)
    else:
        comm.mpi_discovery(verbose=False)


def _no_meeting(error: Exception, expected_ranks: int, timeout_minutes: float) -> str:
    """Why the ranks did not come together, in one line."""
    master = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = first_line(error)
    if "EADDRINUSE" in reason or "in use" in reason:
        return f"port {master} is in use; end what holds it, or give another (--master_port, MASTER_PORT)"
    return (
        f"the {expected_ranks} ranks did not meet at {master} within {timeout_minutes:g} minutes (rank"
        f" {os.environ.get('RANK')} on {socket.gethostname()}: {reason}); look which hosts started, and at `python"
        " launch/doctor.py`"
    )


def leave_process_group() -> None:
    """Destroy the process group, where there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
