"""Record the hardware and software of a machine. `tiedlora env` prints the record, `tiedlora doctor` compares the
records of all hosts, and `tiedlora check-gpu` checks the record for problems.

Only variables with the names and prefixes below are recorded, because their values are not secret. No file is written.
"""

import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field

from megatron_tiedlora.base.installation import EXTRAS, PACKAGE_FOLDER, installed_versions, missing_modules
from megatron_tiedlora.base.messages import bytes_in_words, first_line
from megatron_tiedlora.base.output_folder import user_cache

LIBRARIES = (
    *("torch", "deepspeed", "transformers", "tokenizers", "peft", "datasets", "accelerate", "safetensors"),
    *("huggingface_hub", "numpy", "bitsandbytes", "pydantic", "triton", "flash_attn", "flash_attn_3", "flash-attn-4"),
    *("mpi4py", "rouge-score", "sacrebleu"),
)
# Variables that affect a run: names, and prefixes that end with an underscore.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING", "NCCL_", "PYTORCH_", "TRITON_", "DS_ACCELERATOR", "DS_ENV_FILE"),
    *("GLOO_", "TORCH_NCCL_", "TORCH_CUDNN_", "TORCH_ALLOW_TF32_", "TORCH_LOGS", "TORCH_EXTENSIONS_DIR"),
    *("TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_", "TORCHELASTIC_"),
    *("OMP_NUM_THREADS", "LD_PRELOAD", "PYTHONPATH", "PYTHONSAFEPATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE"),
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    *("SLURM_JOB_", "SLURM_STEP_", "SLURM_PROCID", "SLURM_LOCALID"),
    *("OMPI_COMM_WORLD_", "PMI_RANK", "PMI_SIZE", "MEGATRON_TIEDLORA_"),
)
_PREFIXES = tuple(name for name in VARIABLES if name.endswith("_"))
_LONGEST = 200  # characters of a value
OLDEST_TORCH = (2, 10)  # as in pyproject.toml
_BF16_CAPABILITY = (8, 0)
_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_FREE_SHARE = 0.9  # fraction of a GPU's memory; if less is free, another process uses the GPU


class Record(BaseModel):
    """A frozen record. Unknown fields, from a host with a different version of this package, are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Finding(Record):
    """A problem that a check found, or a check that was skipped.

    Attributes:
        status: `error` (no job should start), `warning` (a job may start), or `skipped` (not checked).
        value: what was found, or why the check was skipped.
        expected: the correct value, or the value that `value` does not match; '' if `value` includes it.
        fix: what the user can do.
        code: an identifier of the kind of problem, for scripts.
        hosts: the affected hosts; empty for this machine.
    """

    status: Literal["error", "warning", "skipped"]
    value: str = ""
    expected: str = ""
    fix: str = ""
    code: str = ""
    hosts: list[str] = Field(default_factory=list)

    @property
    def message(self) -> str:
        """Return text with the value that was found and the expected value."""
        return f"{self.value}, but {self.expected}" if self.expected else self.value


class Gpu(Record):
    """The properties of a GPU as torch reports them."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int] = (0, 0)


class MachineRecord(Record):
    """The hardware and the installed software of a machine.

    Attributes:
        versions: versions of Python, installed packages and the system, by name.
        extras: `installed`, or the missing modules, for each extra of this package.
        variables: the environment variables of this process that affect a run.
        id: the host name and the id of the running kernel, which two records of one machine share.
        source_hash: hash of this package's source files, because two checkouts may have the same version number.
        torch_error: the reason why torch cannot be imported. The fields about CUDA and GPUs are then empty.
        nofile, memlock: limits of a process (open files, locked bytes); None if unlimited.
        name_addresses: the addresses to which the machine resolves its own name.
        interfaces: the IP addresses of each network interface.
    """

    versions: dict[str, str]
    paths: dict[str, str]
    extras: dict[str, str]
    variables: dict[str, str]
    host: str
    id: str
    source_hash: str
    torch_error: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    cudnn: int | None = None
    gpus: list[Gpu] = Field(default_factory=list)
    infiniband: list[str]
    num_cores: int
    memory_bytes: int
    free_memory_bytes: int
    shm_bytes: int
    nofile: int | None
    memlock: int | None
    name_addresses: list[str]
    interfaces: dict[str, list[str]]


def machine_record() -> MachineRecord:
    """Return the record of this machine."""
    memory, host, shm = psutil.virtual_memory(), socket.gethostname(), Path("/dev/shm")
    boot, infiniband = Path("/proc/sys/kernel/random/boot_id"), Path("/sys/class/infiniband")
    return MachineRecord(
        versions={**installed_versions(*LIBRARIES), "system": platform.platform()},
        paths={"package": str(PACKAGE_FOLDER), "python": sys.executable, "cache": str(user_cache())},
        extras={
            name: f"lacks {', '.join(missing)}" if missing else "installed"
            for name in EXTRAS
            for missing in [missing_modules(*(("train", "eval") if name == "demo" else ()), name)]
        },
        variables={
            name: value[:_LONGEST]
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith(_PREFIXES)
        },
        host=host,
        id=f"{host} {boot.read_text().strip() if boot.exists() else ''}",
        source_hash=source_hash(PACKAGE_FOLDER),
        **_devices(),
        infiniband=sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else [],
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        shm_bytes=shutil.disk_usage(shm).free if shm.is_dir() else 0,
        nofile=_limit("RLIMIT_NOFILE", hard=True),  # ranks raise the soft limit
        memlock=_limit("RLIMIT_MEMLOCK"),
        name_addresses=resolve(host),
        interfaces={
            name: own
            for name, addresses in sorted(psutil.net_if_addrs().items())
            if (own := [one.address.partition("%")[0] for one in addresses if one.family in _IP_FAMILIES])
        },
    )


def source_hash(folder: Path) -> str:
    """Return a hash of the names and contents of the Python files below `folder`."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _devices() -> dict[str, Any]:
    """Return the record's fields about CUDA, NCCL, cuDNN and the GPUs, as torch reports them."""
    try:
        import torch

        if not torch.cuda.is_available():
            return {"cuda": torch.version.cuda}
        gpus = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            gpus.append(Gpu(name=name, total_bytes=total, free_bytes=free, capability=capability))
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        return {"cuda": torch.version.cuda, "nccl": nccl, "cudnn": torch.backends.cudnn.version(), "gpus": gpus}
    except Exception as error:  # for example a missing library or an old driver
        return {"torch_error": f"{type(error).__name__}: {first_line(error)}"}


def _limit(name: str, *, hard: bool = False) -> int | None:
    limit = resource.getrlimit(getattr(resource, name))[hard]
    return None if limit == resource.RLIM_INFINITY else limit


def resolve(name: str) -> list[str]:
    """Return the addresses of a host's name in the resolver's order, or [] if the name does not resolve."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in answers))


def in_words(machine: MachineRecord) -> dict[str, dict[str, str]]:
    """Return the values of a record as text, by section and name."""
    limits = {"open files": machine.nofile, "locked bytes": machine.memlock}
    hardware = {
        "host": machine.host,
        "CPU cores": str(machine.num_cores),
        "memory": bytes_in_words(machine.memory_bytes),
        "free memory": bytes_in_words(machine.free_memory_bytes),
        "free in /dev/shm": bytes_in_words(machine.shm_bytes),
        **{name: "unlimited" if limit is None else f"{limit:,}" for name, limit in limits.items()},
        "interfaces": "; ".join(f"{name} {', '.join(found)}" for name, found in machine.interfaces.items()),
        "InfiniBand": ", ".join(machine.infiniband) or "none",
        "hash of the package": machine.source_hash,
    }
    if machine.torch_error is not None:
        hardware["torch"] = machine.torch_error
    else:
        hardware["CUDA of torch"] = machine.cuda or "none"
        hardware |= {"NCCL of torch": str(machine.nccl), "cuDNN": str(machine.cudnn)} if machine.gpus else {}
        hardware |= {} if machine.gpus else {"GPUs": "none that torch sees"}
    for index, gpu in enumerate(machine.gpus):
        generation, memory = "".join(map(str, gpu.capability)), bytes_in_words(gpu.total_bytes)
        hardware[f"GPU {index}"] = f"{gpu.name}, sm_{generation}, {memory}, {bytes_in_words(gpu.free_bytes)} free"
    return {
        "versions": machine.versions,
        "paths": machine.paths,
        "extras": machine.extras,
        "machine": hardware,
        "variables": machine.variables,
    }


def _finding(
    status: Literal["error", "warning"], code: str, hosts: Sequence[str], value: str, fix: str, expected: str = ""
) -> Finding:
    return Finding(status=status, code=code, hosts=list(hosts), value=value, expected=expected, fix=fix)


error = partial(_finding, "error")  # no job should start
warning = partial(_finding, "warning")  # a job may start


def judge_machine(machine: MachineRecord) -> Iterator[Finding]:
    """Yield the problems of a machine that do not depend on the job."""
    if machine.torch_error is not None:
        fix = f"run `{machine.paths['python']} -c 'import torch'` there and fix the error that it prints"
        yield error("torch_broken", [], f"torch cannot be imported ({machine.torch_error})", fix)
    used = [index for index, gpu in enumerate(machine.gpus) if gpu.free_bytes < _FREE_SHARE * gpu.total_bytes]
    if used:
        least = bytes_in_words(min(machine.gpus[index].free_bytes for index in used))
        value = f"memory of GPU {', '.join(map(str, used))} is in use, {least} free"
        fix = "find the process with nvidia-smi and end it; speeds on a shared GPU are misleading"
        yield warning("gpu_memory_used", [], value, fix)
    if old := sorted({gpu.name for gpu in machine.gpus if gpu.capability < _BF16_CAPABILITY}):
        value = f"{' and '.join(old)}: GPUs before Ampere have no fast bf16"
        yield warning("old_gpu", [], value, "give --dtype fp32, and expect a slow run")
    torch = machine.versions.get("torch", "")
    number = re.match(r"(\d+)\.(\d+)", torch)
    if number and tuple(map(int, number.groups())) < OLDEST_TORCH:
        expected = f"this package needs {'.'.join(map(str, OLDEST_TORCH))} or later"
        fix = "install a later torch for the driver's CUDA version: https://pytorch.org/get-started/locally"
        yield error("old_torch", [], f"torch is {torch}", fix, expected)
