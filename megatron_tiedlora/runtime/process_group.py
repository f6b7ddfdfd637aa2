"""Create the process group and let DeepSpeed use it. Each rank has its own GPU, or all ranks are on CPUs.

    CPU tensors  -> gloo   agreement between ranks (parallel/agreement.py), the adapter when it is saved
    GPU tensors  -> NCCL   the model's communication

No device is bound to the process group. DeepSpeed's own initialisation binds cuda:LOCAL_RANK, which does not exist on a
rank that sees only one GPU. With a bound device, torch would also split the world's communicator on every rank for
every process group: 633 times at 512 ranks. Without a bound device, only the ranks of a process group create its
communicator, at their first message.
"""

import os
import socket
import zlib
from collections.abc import MutableMapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed

from megatron_tiedlora.base.messages import UserError, first_line, shown
from megatron_tiedlora.parallel.agreement import first_messages, gather_numbers, gather_on_rank_0
from megatron_tiedlora.runtime.heartbeat import is_lost_exchange
from megatron_tiedlora.runtime.launch_env import RANK_VARIABLES, rank_number, uses_gpu

_UNIQUE = ("GPU-", "MIG-")  # prefixes of globally unique names
_LAZY_RANKS = 512  # with more, gloo connects two ranks at their first message: N^2 connections would take minutes
_SHARED_GPUS = "NCCL_MULTI_RANK_GPU_ENABLE"  # a variable of NCCL since 2.30


def choose_device() -> torch.device:
    """Return this rank's GPU, or the CPU without GPUs. Raise UserError if the host has fewer GPUs than ranks."""
    if not uses_gpu():
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), rank_number(local=True)
    if count == 1:  # `srun --gpus-per-task=1` and containers show each rank only its own GPU
        index = 0
    if index >= count:
        raise UserError(
            f"local rank {index} has no GPU on host {socket.gethostname()} (number of GPUs: {count}); start one rank"
            " per GPU (slots in the hostfile, --ntasks-per-node, --nproc_per_node)"
        )
    return torch.device("cuda", index)


def meet(device: torch.device, timeout: timedelta) -> None:
    """Create torch's process group of all ranks. Check that each rank has its own GPU or that all are on CPUs.

    Raises:
        UserError: two ranks share a GPU, or only some ranks have one. All ranks raise this error.
        RuntimeError: the ranks cannot connect.
    """
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > _LAZY_RANKS:
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
    here = (socket.gethostname(), gpu_name(device))
    gpus = gather_on_rank_0(here, kind=tuple[str, str])
    if problem := first_messages([None if gpus is None else _shared_gpus(gpus)])[0]:
        raise UserError(problem)


def group_backend(device: torch.device) -> str:
    """Return the backend, "nccl" or "gloo", for tensors on this type of device."""
    return "nccl" if device.type == "cuda" else "gloo"


def gpu_name(device: torch.device) -> str:
    """Return a name of the GPU that is unique on its host, or "" for a CPU.

    The name is the UUID of the GPU or MIG device. Without a UUID, it is the entry in CUDA_VISIBLE_DEVICES or the index.
    """
    if device.type != "cuda":
        return ""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    name = visible[device.index] if device.index < len(visible) and visible[device.index] else str(device.index)
    if name.startswith("MIG-"):  # older drivers report the UUID of the physical GPU for a MIG device
        return name
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return f"GPU-{uuid}" if uuid.strip("0-") else name


def _shared_gpus(gpus: Sequence[tuple[str, str]]) -> str | None:
    """Return an error message if ranks share a GPU or only some ranks have a GPU, else None.

    `gpus` has the (host, GPU) pair of each rank. On a shared GPU, NCCL would fail in the first message with "Duplicate
    GPU detected", or hang.
    """
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, (host, gpu) in enumerate(gpus):  # two containers of one host may have different host names
        ranks.setdefault(("", gpu) if gpu.startswith(_UNIQUE) else (host, gpu), []).append(rank)
    if not any(gpu for _, gpu in gpus):
        return None
    for (_, gpu), there in ranks.items():
        host = " and ".join(dict.fromkeys(gpus[rank][0] for rank in there))
        named = f"{'ranks' if len(there) > 1 else 'rank'} {', '.join(map(str, there[:8]))} on host {host}"
        if not gpu:
            return f"{named}: torch sees no GPU, but other ranks have one; run `nvidia-smi` there, or omit this host"
        if len(there) > 1 and os.environ.get(_SHARED_GPUS) != "1":
            return (
                f"{named} share one GPU, {gpu}; start one rank per GPU (slots in the hostfile, --ntasks-per-node,"
                " --nproc_per_node), and let CUDA_VISIBLE_DEVICES show each rank all GPUs of its host or only its own"
            )
    return None


def join_process_group(timeout_minutes: float, *, expected_ranks: int) -> torch.device:
    """Create the process group, initialise DeepSpeed with it, and return this rank's device.

    All process groups that DeepSpeed creates later have the same time limit.

    Raises:
        UserError: the ranks cannot connect in time, the port is in use, the group does not have `expected_ranks` ranks,
            or two ranks share a GPU.
    """
    import deepspeed

    device, timeout = choose_device(), timedelta(minutes=timeout_minutes)
    os.environ.setdefault("LOCAL_RANK", str(rank_number(local=True)))
    if device.type == "cuda":
        # The adapter's gradients are matmuls over all tokens, whose partial sums cuBLAS must add in fp32, not in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    else:
        # DeepSpeed would compile its shared-memory operator here, which takes a minute. If a rank dies during this
        # time, a lock file remains and every later run hangs. gloo suffices for the few small messages of a CPU run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _discover_ranks()
    try:
        meet(device, timeout)
    except RuntimeError as error:
        if not is_lost_exchange(error):
            raise
        master, reason = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", first_line(error)
        if "EADDRINUSE" in reason or "in use" in reason:
            why = f"port {master} is in use; end its process, or give another port (--master_port, MASTER_PORT)"
            raise UserError(why) from error
        raise UserError(
            f"the {expected_ranks} ranks did not connect to {master} within {timeout_minutes:g} minutes (rank"
            f" {os.environ.get('RANK')} on {socket.gethostname()}: {reason}); check which hosts started, and run"
            " `tiedlora doctor`"
        ) from error
    # DeepSpeed uses the device with this index
    os.environ["LOCAL_RANK"] = str(device.index if device.type == "cuda" else rank_number(local=True))
    deepspeed.init_distributed(dist_backend=group_backend(device), timeout=timeout, verbose=False)  # uses our group
    found = distributed.get_world_size()
    if found != expected_ranks:
        raise UserError(
            f"the process group has {found} ranks, but the launcher started {expected_ranks}; run `tiedlora doctor`"
        )
    # DeepSpeed gives its groups no time limit, so torch's default of 10 (NCCL) or 30 minutes would apply. The groups
    # carry only the model's tensors, so they need no second group of gloo connections.
    backend: Any = deepspeed.comm.comm.cdb
    backend.new_group = partial(distributed.new_group, timeout=timeout, backend=group_backend(device))
    return device


def _discover_ranks() -> None:
    """Set missing variables from MPI, as DeepSpeed does if it creates the process group itself."""
    from deepspeed.comm import comm

    if distributed.is_initialized() or all(name in os.environ for name in RANK_VARIABLES if name != "LOCAL_RANK"):
        return
    if comm.in_aml() and not comm.in_dlts():
        comm.patch_aml_env_for_torch_nccl_backend(verbose=False)
    elif comm.in_aws_sm():
        comm.patch_aws_sm_env_for_torch_nccl_backend(verbose=False)
    else:
        comm.mpi_discovery(verbose=False)


def ranks_by_host() -> list[list[int]]:
    """Return a list of ranks for each host of the job. All ranks must call this."""
    numbers = gather_numbers(zlib.crc32(socket.gethostname().encode()))
    return [[rank for rank, found in enumerate(numbers) if found == number] for number in dict.fromkeys(numbers)]


def leave_process_group() -> None:
    """Destroy the process group if it exists."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


# --deterministic ------------------------------------------------------------------------------------------------------


# The values of each variable with which sums are deterministic. The first value is the default.
VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # PyTorch then sets NCCL_ALGO=^NVLS, which does not disable NVLSTree. This variable disables both (from NCCL 2.17).
    "NCCL_NVLS_ENABLE": ("0",),
    "NCCL_COLLNET_ENABLE": ("0",),
}


def make_deterministic(environment: MutableMapping[str, str] = os.environ) -> None:
    """Make every operation of this process deterministic. Call this before CUDA is initialised.

    An operation without a deterministic implementation raises. PyTorch's attention kernels follow this mode, and
    kernels of flash_attn get an argument in `choose_attention`.

    Raises:
        UserError: an environment variable has a value with which sums are not deterministic.
    """
    for name, values in VARIABLES.items():
        given = environment.setdefault(name, values[0])
        if given not in values:
            raise UserError(
                f"--deterministic: {name} is {shown(given)}, so sums would differ between runs; unset it, or set"
                f" it to {' or '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    # No value is read before it is written, so filling memory would only cost time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
