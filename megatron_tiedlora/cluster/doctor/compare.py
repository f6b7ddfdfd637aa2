"""Find what is wrong with a set of hosts from their answers: one pure function per subject.

A value is wrong if it differs from that of most hosts (the first host decides a tie). So the odd host is named, and
not all the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from megatron_tiedlora.base.base_formats import FP8_CAPABILITY
from megatron_tiedlora.base.wording import bytes_in_words, count_text, enumerate_names
from megatron_tiedlora.cluster.doctor.records import Finding, HostReport, Probe

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
