"""Find what is wrong with a set of hosts from their answers: one pure function per subject.

A value is wrong if it differs from that of most hosts (the first host decides a tie). So the odd host is named, and
not all the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatron_tiedlora.base.base_formats import FP8_CAPABILITY
from megatron_tiedlora.base.wording import bytes_in_words, count_text, enumerate_names
from megatron_tiedlora.cluster.doctor.probe import is_loopback
from megatron_tiedlora.cluster.doctor.rank import group_members, hosts_of_ranks
from megatron_tiedlora.cluster.doctor.records import UNREADABLE, Finding, HostReport, ParallelConfig, PathContent, Probe

Value = TypeVar("Value", bound=Hashable)

_PACKAGE = "megatron_tiedlora"
# A different version of these is an error, because every rank computes with them; of other packages it is a warning.
_STRICT = ("python", "torch", "deepspeed", "transformers", _PACKAGE)
NO_GPU = "none"
_LEAST_SHM = 1 << 30  # for NCCL and data loaders
_FILES_PER_RANK, _FILES_BESIDE = 4, 256  # connections to every other rank in a few groups, and other files


def error(code: str, hosts: Sequence[str], message: str, fix: str) -> Finding:
    """A finding with which no job should start."""
    return Finding(level="error", code=code, hosts=list(hosts), message=message, fix=fix)


def warning(code: str, hosts: Sequence[str], message: str, fix: str) -> Finding:
    """A finding that need not stop a job."""
    return Finding(level="warning", code=code, hosts=list(hosts), message=message, fix=fix)


def answering(hosts: Sequence[HostReport]) -> list[tuple[HostReport, Probe]]:
    """The hosts that answered, with their answers."""
    return [(host, host.probe) for host in hosts if host.probe is not None]


def usual_value(values: Sequence[Value]) -> Value:
    """The most frequent value; the first one decides a tie."""
    counts = Counter(values)
    return max(values, key=lambda value: counts[value])


@dataclass(frozen=True)
class Odd(Generic[Value]):
    """Hosts whose value differs from that of most hosts, and those hosts."""

    value: Value
    hosts: list[str]
    usual: Value
    others: list[str]

    def text(self, title: str) -> str:
        """Say which hosts have which value."""
        here, there = enumerate_names(self.hosts), enumerate_names(self.others)
        return f"{title} is {self.value} on {here}, but {self.usual} on {there}"


def odd_ones(hosts: Sequence[HostReport], value_of: Callable[[Probe], Value]) -> list[Odd[Value]]:
    """The hosts whose value differs from that of most hosts, grouped by value."""
    names: dict[Value, list[str]] = {}
    for host, probe in answering(hosts):
        names.setdefault(value_of(probe), []).append(host.name)
    if not names:
        return []
    usual = usual_value([value for value, where in names.items() for _ in where])
    return [Odd(value, where, usual, names[usual]) for value, where in names.items() if value != usual]


# Software ----------------------------------------------------------------------------------------------------------


def compare_versions(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Versions of Python and packages that differ between hosts."""
    names = {name: None for _, probe in answering(hosts) for name in probe.versions}
    for name in names:
        for odd in odd_ones(hosts, lambda probe, name=name: probe.versions.get(name, "none")):  # type: ignore[misc]
            pip = "" if name == "python" or odd.usual == "none" else f": pip install {name}=={odd.usual}"
            yield (error if name in _STRICT else warning)(
                "version", odd.hosts, odd.text(name), f"install the same {name} on every host{pip}"
            )
    on_gpus = [host for host, probe in answering(hosts) if probe.gpus]
    for code, title, odds in (
        ("cuda_version", "torch's CUDA", odd_ones(on_gpus, lambda probe: probe.cuda)),
        ("nccl_version", "NCCL", odd_ones(on_gpus, lambda probe: probe.nccl)),
    ):
        for build in odds:
            yield error(code, build.hosts, build.text(title), "install the same build of torch on every host")


def compare_sources(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Hosts with the same version of this package but different files: a checkout that was not updated."""
    other_versions = {name for odd in odd_ones(hosts, lambda probe: probe.versions.get(_PACKAGE)) for name in odd.hosts}
    same_version = [host for host in hosts if host.name not in other_versions]
    for odd in odd_ones(same_version, lambda probe: probe.source_hash):
        yield error(
            "source",
            odd.hosts,
            odd.text(f"the code of {_PACKAGE} (hash of its files)"),
            "update its checkout or installation there",
        )


def look_at_torch(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Hosts where torch cannot be imported, or is not installed."""
    for host, probe in answering(hosts):
        if probe.torch_error is not None:
            yield error(
                "torch_broken",
                [host.name],
                f"{host.name}: torch cannot be imported ({probe.torch_error})",
                f"run `{probe.executable} -c 'import torch'` there and correct what it reports",
            )


# GPUs and other hardware -------------------------------------------------------------------------------------------


def compare_gpus(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """GPUs of another kind, too few GPUs, or GPU memory that is in use."""
    if not any(probe.gpus for _, probe in answering(hosts)):
        return
    for odd in odd_ones(hosts, _kind_of_gpus):
        without = NO_GPU in (odd.value, odd.usual)
        yield (error if without else warning)(
            "gpus_differ",
            odd.hosts,
            odd.text("the kind of GPU"),
            "find out why torch sees no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES), or keep the hosts of one kind"
            if without
            else "expect the speed of the slowest one, or keep the hosts of one kind",
        )
    for host, probe in answering(hosts):
        if probe.gpus and host.slots > len(probe.gpus):
            yield error(
                "too_few_gpus",
                [host.name],
                f"{host.name}: {count_text(host.slots, 'rank')} for {count_text(len(probe.gpus), 'GPU')}",
                f"write slots={len(probe.gpus)} for it",
            )
        used = [index for index, gpu in enumerate(probe.gpus) if gpu.free_bytes < 0.9 * gpu.total_bytes]
        if used:
            least = min(probe.gpus[index].free_bytes for index in used)
            yield warning(
                "gpu_memory_used",
                [host.name],
                f"{host.name}: memory of GPU {', '.join(map(str, used))} is in use, {bytes_in_words(least)} free",
                "find the process with nvidia-smi",
            )


def _kind_of_gpus(probe: Probe) -> str:
    return " and ".join(sorted({gpu.name for gpu in probe.gpus})) or NO_GPU


def look_at_formats(hosts: Sequence[HostReport], *, base_format: str | None, products: str | None) -> Iterator[Finding]:
    """What a base of fewer bits, or products in fp8, need and a host has not."""
    for host, probe in answering(hosts):
        if base_format == "nf4" and probe.torch_error is None and "bitsandbytes" not in probe.versions:
            yield warning(
                "bitsandbytes",
                [host.name],
                f"{host.name}: bitsandbytes is not installed, so --base nf4 is dequantised ten times as slowly",
                "pip install 'megatron_tiedlora[quantised]'",
            )
        old = sorted({gpu.name for gpu in probe.gpus if gpu.capability < FP8_CAPABILITY})
        if products is not None and old:
            least = ".".join(map(str, FP8_CAPABILITY))
            yield error(
                "products",
                [host.name],
                f"{host.name}: {' and '.join(old)} cannot multiply in {products}: it needs compute capability {least}",
                "leave --products out, or keep the hosts of newer GPUs",
            )


def look_at_limits(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Limits on shared memory, open files, locked memory and cores that may be too low."""
    num_ranks = sum(host.slots for host in hosts)
    wanted_files = _FILES_PER_RANK * num_ranks + _FILES_BESIDE
    for host, probe in answering(hosts):
        if host.slots > 1 and probe.shm_bytes < _LEAST_SHM:
            yield warning(
                "shm",
                [host.name],
                f"{host.name}: /dev/shm has {bytes_in_words(probe.shm_bytes)} free",
                "ranks of one host share memory there; start a container with --shm-size=1g or --ipc=host",
            )
        if probe.nofile is not None and probe.nofile < wanted_files:
            yield warning(
                "nofile",
                [host.name],
                f"{host.name}: a process may open {probe.nofile} files, {num_ranks} ranks need {wanted_files}",
                f"ulimit -n {wanted_files}, or nofile in /etc/security/limits.conf",
            )
        if probe.infiniband and probe.memlock is not None:
            yield warning(
                "memlock",
                [host.name],
                f"{host.name}: a process may lock only {bytes_in_words(probe.memlock)} of memory, but InfiniBand"
                f" ({', '.join(probe.infiniband)}) locks its buffers",
                "ulimit -l unlimited, or memlock in /etc/security/limits.conf",
            )
        if not probe.gpus and host.slots > probe.num_cores:
            yield warning(
                "cores",
                [host.name],
                f"{host.name}: {count_text(host.slots, 'rank')} on {count_text(probe.num_cores, 'core')}",
                f"write slots={probe.num_cores} or less for it",
            )


def compare_clocks(hosts: Sequence[HostReport], *, max_skew: float) -> Iterator[Finding]:
    """Clocks that are certainly off by more than `max_skew` seconds."""
    for host in hosts:
        if host.clock is not None and abs(host.clock.skew) - host.clock.margin > max_skew:
            direction = "ahead of" if host.clock.skew > 0 else "behind"
            yield warning(
                "clock",
                [host.name],
                f"{host.name}: its clock is {abs(host.clock.skew):.1f} s {direction} this machine's",
                "let chrony or systemd-timesyncd set it; until then, times in logs and of files mislead",
            )


# The network ----------------------------------------------------------------------------------------------------------


_LITTLE_SPACE = 1 << 30  # a checkpoint of a tied adapter is far smaller; logs and an exported model are not
_MOST_NAMED = 3  # of the files that differ

# Names, addresses -------------------------------------------------------------------------------------------------


def look_at_names(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Names that do not resolve or resolve to the host itself, missing interfaces, a machine listed twice."""
    first = hosts[0].name
    names: dict[str, list[str]] = {}
    for host, probe in answering(hosts):
        names.setdefault(probe.machine, []).append(host.name)
        for variable, value in probe.socket_names.items():
            if not any(_matches(variable, value, name) for name in probe.interfaces):
                yield error(
                    "no_interface",
                    [host.name],
                    f"{host.name}: {variable}={value}, but its interfaces are {', '.join(probe.interfaces)}",
                    f"set {variable} to an interface that every host has, or unset it",
                )
        if len(hosts) == 1:
            continue
        if "GLOO_SOCKET_IFNAME" not in probe.socket_names:
            yield from _look_at_own_name(host, probe.hostname, probe.name_addresses, on_gpus=bool(probe.gpus))
        if not probe.master_addresses:
            yield error(
                "name_unknown",
                [host.name],
                f"{host.name} does not know the first host's name, {first}",
                f"add {first} to its /etc/hosts or name server",
            )
        elif host.name != first and all(map(is_loopback, probe.master_addresses)):
            yield error(
                "master_address",
                [host.name],
                f"on {host.name} the first host's name, {first}, resolves to {host.name} itself"
                f" ({', '.join(probe.master_addresses)})",
                f"correct {first} in its /etc/hosts",
            )
    for twice in names.values():
        if len(twice) > 1:
            yield error(
                "same_machine",
                twice,
                f"{enumerate_names(twice)} are one machine",
                "keep one line for it in the hostfile, with all its slots",
            )


def _look_at_own_name(host: HostReport, name: str, addresses: Sequence[str], *, on_gpus: bool) -> Iterator[Finding]:
    """gloo listens on the address that the host's own name resolves to. NCCL looks for an interface itself."""
    if addresses and not all(map(is_loopback, addresses)):
        return
    probe = host.probe
    interface = None if probe is None else interface_in_use(probe.interfaces, probe.peer_address)
    there = f"resolves to {', '.join(addresses)}, which other hosts cannot reach"
    found = there if addresses else "does not resolve there"
    yield (warning if on_gpus else error)(
        "loopback_name",
        [host.name],
        f"{host.name}: its own name, {name}, {found}",
        f"give {name} its real address in its /etc/hosts, or set GLOO_SOCKET_IFNAME={interface or 'INTERFACE'}",
    )


def interface_in_use(interfaces: Mapping[str, Sequence[str]], address: str | None) -> str | None:
    """The interface that has `address`."""
    return next((name for name, addresses in interfaces.items() if address in addresses), None)


def _matches(variable: str, value: str, interface: str) -> bool:
    """Match as the library does: gloo takes names; NCCL takes prefixes, `=eth0` for a name, `^eth0` for any other."""
    if variable == "GLOO_SOCKET_IFNAME":
        return interface in value.split(",")
    negated, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    wanted = [name.partition(":")[0] for name in value.lstrip("^=").split(",")]
    found = any(interface == name if exact else interface.startswith(name) for name in wanted)
    return found != negated


# Layout ------------------------------------------------------------------------------------------------------------


def look_at_layout(hosts: Sequence[HostReport], layout: ParallelConfig) -> Iterator[Finding]:
    """Tensor parallel groups that span hosts: they send the most messages."""
    groups = [hosts_of_ranks(hosts, ranks) for ranks in group_members(layout).get("tensor", ())]
    spread = [where for where in groups if len(where) > 1]
    if spread:
        yield warning(
            "tensor_parallel_across_hosts",
            list(dict.fromkeys(name for where in spread for name in where)),
            f"{len(spread)} tensor parallel group(s) span hosts, the first {enumerate_names(spread[0])}; every layer"
            " waits for their network",
            "choose a --tensor_parallel that divides the slots of every host, and use --pipeline_parallel across hosts",
        )


# Files -------------------------------------------------------------------------------------------------------------


def compare_paths(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Input files of a job that are missing, cannot be read or differ."""
    keys = {key: None for _, probe in answering(hosts) for key in probe.paths}
    for key in keys:
        contents = {host.name: probe.paths[key] for host, probe in answering(hosts)}
        flag = key.partition(":")[0]  # a flag that names two files has them as FLAG:1 and FLAG:2
        yield from _look_for_paths(flag, contents)
        there = {name: content for name, content in contents.items() if content.kind in ("file", "folder", "cached")}
        for name, content in there.items():
            path = content.path
            closed = [file for file, value in content.files.items() if value == UNREADABLE]
            if closed:
                yield error(
                    "path_unreadable", [name], f"{name}: --{flag} {path}: {closed[0]} cannot be read", "chmod a+r it"
                )
        yield from _compare_contents(flag, there)


def _look_for_paths(flag: str, contents: Mapping[str, PathContent]) -> Iterator[Finding]:
    """Paths that are missing, or were not checked."""
    local = next((content.path for content in contents.values() if content.kind in ("file", "folder")), None)
    by_kind: dict[str, list[str]] = {}
    for name, content in contents.items():
        # A path that exists on one host is not taken for a hub id on another.
        is_missing = local is not None and content.kind in ("not_cached", "unchecked")
        by_kind.setdefault("missing" if is_missing else content.kind, []).append(name)
    for kind, names in by_kind.items():
        everywhere = len(names) == len(contents)
        given = f"--{flag} {local if kind == 'missing' and local else contents[names[0]].path}"
        where = "every host" if everywhere else enumerate_names(names)
        if kind == "missing":
            fix = "correct the path, or download it first" if everywhere else "copy it there, or mount its file system"
            yield error("path_missing", names, f"{given} is missing on {where}", fix)
        elif kind == "not_cached":
            message = f"{given} is not a folder, and is not in the Hugging Face cache of {where}"
            fix = "`hf download` it, or set HF_HOME to a cache that has it; otherwise a job downloads it"
            yield warning("hub_not_cached", names, message, fix)
        elif kind == "unchecked":
            message = f"{given} is not a file on {where}; whether it is cached as a data set of the hub was not checked"
            fix = "make sure that the hosts reach the hub, or load the data set there first, or give files"
            yield warning("hub_not_checked", names, message, fix)


def _compare_contents(flag: str, contents: Mapping[str, PathContent]) -> Iterator[Finding]:
    if not contents:
        return
    keys = {name: tuple(sorted(content.files.items())) for name, content in contents.items()}
    usual = dict(usual_value(list(keys.values())))
    copy = "copy it again from a host where it is right"
    for name, content in contents.items():
        if content.files == usual or UNREADABLE in content.files.values():
            continue
        other = [file for file in sorted({*content.files, *usual}) if content.files.get(file) != usual.get(file)]
        more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        # The hub's client updates its cache itself if it has a network.
        yield (warning if content.kind == "cached" else error)(
            "path_differs",
            [name],
            f"{name}: --{flag} {content.path} differs from the other hosts': {', '.join(other[:_MOST_NAMED])}{more}",
            "`hf download` it again" if content.kind == "cached" else copy,
        )


def look_at_output(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Output folders that are not writable or have little space."""
    for host, probe in answering(hosts):
        if probe.output is None:
            continue
        if not probe.output.writable:
            yield error(
                "output_not_writable",
                [host.name],
                f"{host.name}: --output_dir {probe.output.path}: no right to write in {probe.output.existing}",
                "choose another folder, or get the permission",
            )
        if probe.output.free_bytes < _LITTLE_SPACE:
            yield warning(
                "disk",
                [host.name],
                f"{host.name}: --output_dir {probe.output.path}: {bytes_in_words(probe.output.free_bytes)} free",
                "free some space: a save that does not fit ends the run",
            )
