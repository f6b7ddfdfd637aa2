"""What a host reports about itself, asked by the first rank there. It writes no files."""

from __future__ import annotations

import hashlib
import ipaddress
import itertools
import os
import resource
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from glob import has_magic
from pathlib import Path

import psutil

from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.version import PACKAGE_FOLDER, installed_versions
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.checkpoint.sources import is_model_on_hub
from megatron_tiedlora.cluster.doctor.records import (
    UNREADABLE,
    Gpu,
    HubRepo,
    Order,
    OutputFolder,
    PathContent,
    Probe,
)
from megatron_tiedlora.data.demo import prepared_model
from megatron_tiedlora.data.readers import is_rows_file, may_be_hub_id, split_hub_name
from megatron_tiedlora.data.sources import parse_sources, without_weight

LIBRARIES = ("torch", "deepspeed", "transformers", "safetensors", "numpy", "bitsandbytes")
SOCKET_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
_SMALL_FILE = 1 << 20  # bytes; smaller files are compared by content: configs and tokenizers
_MOST_FILES = 10_000


def examine(order: Order, peer: str | None) -> Probe:
    """Collect everything about this host that the order asks for, and the address on the route to `peer`."""
    torch_error, cuda, nccl, gpus = _examine_torch()
    addresses = addresses_by_interface()
    memory, hostname = psutil.virtual_memory(), socket.gethostname()
    return Probe(
        hostname=hostname,
        machine=f"{hostname} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}",
        executable=sys.executable,
        versions=installed_versions(*LIBRARIES),
        source_hash=source_hash(PACKAGE_FOLDER),
        torch_error=torch_error,
        cuda=cuda,
        nccl=nccl,
        gpus=gpus,
        infiniband=_names_in("/sys/class/infiniband"),
        num_cores=len(os.sched_getaffinity(0)),
        memory_bytes=memory.total,
        free_memory_bytes=memory.available,
        shm_bytes=shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0,
        nofile=_limit(resource.RLIMIT_NOFILE),
        memlock=_limit(resource.RLIMIT_MEMLOCK),
        name_addresses=resolve(hostname),
        master_addresses=resolve(order.first_host),
        peer_address=None if peer is None else address_towards(peer),
        interfaces=addresses,
        socket_names={name: os.environ[name] for name in SOCKET_NAMES if os.environ.get(name)},
        paths={flag: job_content(path, order.hub.get(flag)) for flag, path in order.paths.items()},
        output=None if order.output_dir is None else output_folder(order.output_dir),
    )


# Software and GPUs -------------------------------------------------------------------------------------------------


def source_hash(folder: Path) -> str:
    """A hash of the names and contents of the Python files below `folder`."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _examine_torch() -> tuple[str | None, str | None, str | None, list[Gpu]]:
    """(why it cannot be imported, CUDA version, NCCL version, GPUs)."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None, torch.version.cuda, None, []
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        gpus = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            gpus.append(Gpu(name=name, total_bytes=total, free_bytes=free, capability=capability))
        return None, torch.version.cuda, nccl, gpus
    except Exception as error:  # a missing library, a driver that is too old: the report shows any reason
        return first_line(error), None, None, []


def _names_in(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def _limit(kind: int) -> int | None:
    soft = resource.getrlimit(kind)[0]
    return None if soft == resource.RLIM_INFINITY else soft


# Network -----------------------------------------------------------------------------------------------------------


def addresses_by_interface() -> dict[str, list[str]]:
    """The IP addresses of each interface that has any."""
    families = (socket.AF_INET, socket.AF_INET6)
    found = {
        name: [address.address.partition("%")[0] for address in addresses if address.family in families]
        for name, addresses in sorted(psutil.net_if_addrs().items())
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def resolve(name: str) -> list[str]:
    """The addresses that a host's name resolves to here, in the resolver's order; empty if it does not resolve."""
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(address[0]).partition("%")[0] for *_, address in answers))


def is_loopback(address: str) -> bool:
    """Whether an address is only valid within its host, like Debian's 127.0.1.1 for the host's own name."""
    return ipaddress.ip_address(address).is_loopback


def address_towards(name: str) -> str | None:
    """This host's own address on the route to another one; sends nothing."""
    with suppress(OSError):
        family, kind, protocol, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]).partition("%")[0]
    return None


# Files -------------------------------------------------------------------------------------------------------------


def job_content(path: str, repo: HubRepo | None) -> PathContent:
    """What a path holds; if it does not exist, what this host has of `repo`. A data set of the hub is not looked for:
    its library stores it in a form that depends on how it was loaded."""
    content = path_content(path)
    if content.kind != "missing" or repo is None:
        return content
    if repo.kind == "dataset":
        return PathContent(path=repo.id, kind="unchecked")
    folder = cached_model(repo.id)
    if folder is None:
        return PathContent(path=repo.id, kind="not_cached")
    files = {name: value for name, value in path_content(folder).files.items() if is_read_of_a_model(name)}
    return PathContent(path=repo.id, kind="cached", files=files)


def path_content(path: str) -> PathContent:
    """The names and sizes of the files at a path, with hashes of the small ones."""
    if os.path.isfile(path):
        return PathContent(path=path, kind="file", files={os.path.basename(path): _file_content(path)})
    if not os.path.isdir(path):
        return PathContent(path=path, kind="missing")
    if not os.access(path, os.R_OK | os.X_OK):
        return PathContent(path=path, kind="folder", files={".": UNREADABLE})
    files = itertools.islice(_files_below(path), _MOST_FILES)
    return PathContent(
        path=path, kind="folder", files={os.path.relpath(file, path): _file_content(file) for file in files}
    )


def _files_below(folder: str) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(where, name) for name in sorted(names))


def _file_content(path: str) -> str:
    """`SIZE`, or `SIZE HASH` for a small file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = f" {hashlib.sha256(file.read()).hexdigest()[:12]}" if size <= _SMALL_FILE else ""
        return f"{size}{digest}"
    except OSError:
        return UNREADABLE


def output_folder(path: str) -> OutputFolder:
    """Where a run folder would be made: the nearest existing folder and the free space of its file system."""
    existing = Path(path)
    while not existing.is_dir() and existing != existing.parent:
        existing = existing.parent
    return OutputFolder(
        path=path,
        existing=str(existing),
        writable=os.access(existing, os.W_OK | os.X_OK),
        free_bytes=shutil.disk_usage(existing).free,
    )


# What the flags of a job name -----------------------------------------------------------------------------------------


_READ_OF_A_MODEL = (".json", ".jinja", ".safetensors", "tokenizer.model")  # the rest of a repository is not downloaded
_WEIGHTS = ".safetensors"


def job_files(given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, HubRepo]]:
    """(absolute paths, the hub repository that a path means if no host has it), both by flag.

    Two aligned texts, `A.de,A.en`, are two paths, under `FLAG:1` and `FLAG:2`, and so are several files.

    Args:
        given: the values by flag, as the user gave them.

    Raises:
        UserError: a value is not a valid path, or not a valid list of files.
    """
    paths: dict[str, str] = {}
    hub: dict[str, HubRepo] = {}
    for flag, value in given.items():
        if flag == "model":
            paths[flag] = absolute_path(prepared_model(value) or value, flag=flag)
            if is_model_on_hub(value):
                hub[flag] = HubRepo(kind="model", id=value)
            continue
        names, is_pair = _aligned_texts(value, flag), True
        if len(names) == 1:
            names, is_pair = [source.name for source in parse_sources(value, f"--{flag}")], False
        for number, name in enumerate(names, start=1):
            key = flag if len(names) == 1 else f"{flag}:{number}"
            if not has_magic(name):  # only a job's own start knows what a pattern stands for
                paths[key] = absolute_path(name, flag=flag)
            if not is_pair and may_be_hub_id(hub_id := split_hub_name(name)[0]):
                hub[key] = HubRepo(kind="dataset", id=hub_id)
    return paths, hub


def absolute_path(path: str | Path, *, flag: str) -> str:
    """The absolute path that the hosts are asked for, from this folder and this user's home.

    Raises:
        UserError: it is not a valid path; the message names the flag.
    """
    return os.path.abspath(user_path(path, flag=f"--{flag}"))


def _aligned_texts(value: str, flag: str) -> list[str]:
    """The two names of `A.de,A.en`; any other value is one name."""
    names = [name.strip() for name in value.split(",")]
    is_pair = len(names) == 2 and all(names) and not any(is_rows_file(without_weight(name)) for name in names)
    return names if is_pair and not os.path.exists(absolute_path(value, flag=flag)) else [value]


def cached_model(hub_id: str) -> str | None:
    """The folder of a model in this host's hub cache (under HF_HOME); None if its weights are not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    folder = os.path.dirname(config) if isinstance(config, str) else None
    return folder if folder and any(name.endswith(_WEIGHTS) for name in os.listdir(folder)) else None


def is_read_of_a_model(name: str) -> bool:
    """Whether a job reads this file of a model's repository."""
    return name.endswith(_READ_OF_A_MODEL)
