"""Find what is wrong with a set of hosts from their answers; all functions are pure.

A value is wrong if it differs from that of most hosts (the first host decides a tie). So the odd host is named, and
not all the others.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import median
from typing import Generic, TypeVar

from megatron_tiedlora.base.errors import (
    UserError,
    aligned_lines,
    bytes_in_words,
    count_text,
    enumerate_names,
    printable,
    time_text,
)
from megatron_tiedlora.cluster.doctor.records import (
    UNREADABLE,
    DoctorReport,
    GroupResult,
    HostAnswer,
    HostReport,
    ParallelConfig,
    PathContent,
    answering,
    hosts_of_ranks,
)
from megatron_tiedlora.parallel.fp8_products import check_fp8_capability
from megatron_tiedlora.runtime.machine import Finding, Gpu, MachineRecord, error, judge_machine, warning

Value = TypeVar("Value", bound=Hashable)

_PACKAGE = "megatron_tiedlora"
# A different version of these is an error, because every rank computes with them; of the others it is a warning.
_STRICT = ("python", "torch", "deepspeed", "transformers", _PACKAGE)
_COMPARED = (*_STRICT, "safetensors", "numpy", "bitsandbytes")
NO_GPU = "none"
_LEAST_SHM = 1 << 30  # for NCCL and data loaders
_FILES_PER_RANK, _FILES_BESIDE = 4, 256  # connections to every other rank in a few groups, and other files
_LITTLE_SPACE = 1 << 30  # a checkpoint of a tied adapter is far smaller; logs and an exported model are not
_MOST_NAMED = 3  # of the files that differ
_SOCKET_NAMES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def compare_hosts(
    hosts: Sequence[HostReport],
    layout: ParallelConfig,
    *,
    max_skew: float,
    base_format: str | None = None,
    products: str | None = None,
) -> list[Finding]:
    """All findings about the answers.

    Args:
        max_skew: seconds that a clock may be off.
        base_format, products: the storage format of the job's base, and the format in which it multiplies.
    """
    alone = (
        [*_look_at(host, answer, hosts), *_look_at_formats(host, answer.machine, base_format, products)]
        for host, answer in answering(hosts)
    )
    return [
        *compare_machines(hosts),
        *compare_paths(hosts),
        *(finding for findings in alone for finding in findings),
        *compare_clocks(hosts, max_skew=max_skew),
        *look_at_layout(hosts, layout),
    ]


# What most hosts have --------------------------------------------------------------------------------------------


def hosts_by(hosts: Sequence[HostReport], value_of: Callable[[MachineRecord], Value]) -> dict[Value, list[str]]:
    """The names of the hosts that answered, by a value of their machines."""
    names: dict[Value, list[str]] = {}
    for host, answer in answering(hosts):
        names.setdefault(value_of(answer.machine), []).append(host.name)
    return names


@dataclass(frozen=True)
class Odd(Generic[Value]):
    """Hosts whose value differs from that of most hosts, and those hosts."""

    value: Value
    hosts: list[str]
    usual: Value
    others: list[str]

    def finding(self, kind: Callable[..., Finding], code: str, title: str, fix: str) -> Finding:
        """A finding that says which hosts have which value."""
        here, there = enumerate_names(self.hosts), enumerate_names(self.others)
        return kind(code, self.hosts, f"{title} is {self.value} on {here}", fix, f"{self.usual} on {there}")


def odd_ones(names: Mapping[Value, list[str]]) -> list[Odd[Value]]:
    """The values that are not that of most hosts; of two that are equally frequent the first one is usual."""
    if not names:
        return []
    usual = max(names, key=lambda value: len(names[value]))
    return [Odd(value, where, usual, names[usual]) for value, where in names.items() if value != usual]


def compare_machines(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """What differs between hosts: versions of Python, packages and torch's build, other code of the same version, the
    kind of GPU; and names of one machine, by which it would be used twice."""
    other_versions: set[str] = set()
    for name in _COMPARED:
        for odd in odd_ones(hosts_by(hosts, lambda machine, name=name: machine.versions.get(name, "none"))):  # type: ignore[misc]
            pip = "" if name == "python" or odd.usual == "none" else f": pip install {name}=={odd.usual}"
            kind, fix = error if name in _STRICT else warning, f"install the same {name} on every host{pip}"
            yield odd.finding(kind, "version", name, fix)
            other_versions |= set(odd.hosts) if name == _PACKAGE else set()
    on_gpus = [host for host, answer in answering(hosts) if answer.machine.gpus]
    same_version = [host for host in hosts if host.name not in other_versions]
    for other in odd_ones(hosts_by(same_version, lambda machine: machine.source_hash)):
        code = f"the code of {_PACKAGE} (hash of its files)"
        yield other.finding(error, "source", code, "update its checkout or installation there")
    for field, title in (("cuda", "torch's CUDA"), ("nccl", "NCCL")):
        for odd in odd_ones(hosts_by(on_gpus, attrgetter(field))):
            yield odd.finding(error, f"{field}_version", title, "install the same build of torch on every host")
    for twice in hosts_by(hosts, lambda machine: machine.id).values():
        if len(twice) > 1:
            fix = "keep one line for it in the hostfile, with all its slots"
            yield error("same_machine", twice, f"{enumerate_names(twice)} are one machine", fix)
    for gpus in odd_ones(hosts_by(hosts, kind_of_gpus)):
        if NO_GPU in (gpus.value, gpus.usual):
            fix = "find out why torch sees no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES), or keep the hosts of one kind"
            yield gpus.finding(error, "gpus_differ", "the kind of GPU", fix)
        else:
            fix = "expect the speed of the slowest one, or keep the hosts of one kind"
            yield gpus.finding(warning, "gpus_differ", "the kind of GPU", fix)


def kind_of_gpus(machine: MachineRecord) -> str:
    """The names of its kinds of GPUs."""
    return " and ".join(sorted({gpu.name for gpu in machine.gpus})) or NO_GPU


def compare_clocks(hosts: Sequence[HostReport], *, max_skew: float) -> Iterator[Finding]:
    """Clocks that are certainly off by more than `max_skew` seconds."""
    for host in hosts:
        if host.clock is not None and abs(host.clock.skew) - host.clock.margin > max_skew:
            direction = "ahead of" if host.clock.skew > 0 else "behind"
            value = f"{host.name}: its clock is {abs(host.clock.skew):.1f} s {direction} this machine's"
            fix = "let chrony or systemd-timesyncd set it; until then, times in logs and of files mislead"
            yield warning("clock", [host.name], value, fix)


def look_at_layout(hosts: Sequence[HostReport], layout: ParallelConfig) -> Iterator[Finding]:
    """Tensor parallel groups that span hosts: they send the most messages."""
    groups = [hosts_of_ranks(hosts, ranks) for ranks in layout.groups().get("tensor", ())]
    spread = [where for where in groups if len(where) > 1]
    if spread:
        yield warning(
            "tensor_parallel_across_hosts",
            list(dict.fromkeys(name for where in spread for name in where)),
            f"{len(spread)} tensor parallel group(s) span hosts, the first {enumerate_names(spread[0])}; every layer"
            " waits for their network",
            "choose a --tensor_parallel that divides the slots of every host, and use --pipeline_parallel across hosts",
        )


# One host ----------------------------------------------------------------------------------------------------------


def _look_at(host: HostReport, answer: HostAnswer, hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """What is wrong with a host by itself, or for the ranks that it runs."""
    machine, name, ranks = answer.machine, host.name, count_text(host.slots, "rank")
    num_ranks, here = sum(one.slots for one in hosts), [host.name]
    for finding in judge_machine(machine):
        yield finding.model_copy(update={"hosts": here, "value": f"{name}: {finding.value}"})
    if machine.gpus and host.slots > len(machine.gpus):
        value = f"{name}: {ranks} for {count_text(len(machine.gpus), 'GPU')}"
        yield error("too_few_gpus", here, value, f"write slots={len(machine.gpus)} for it")
    if not machine.gpus and host.slots > machine.num_cores:
        value = f"{name}: {ranks} on {count_text(machine.num_cores, 'core')}"
        yield warning("cores", here, value, f"write slots={machine.num_cores} or less for it")
    if host.slots > 1 and machine.shm_bytes < _LEAST_SHM:
        fix = "ranks of one host share memory there; start a container with --shm-size=1g or --ipc=host"
        yield warning("shm", here, f"{name}: /dev/shm has {bytes_in_words(machine.shm_bytes)} free", fix)
    wanted = _FILES_PER_RANK * num_ranks + _FILES_BESIDE
    if machine.nofile is not None and machine.nofile < wanted:
        value, expected = f"{name}: a process may open {machine.nofile} files", f"{num_ranks} ranks need {wanted}"
        yield warning("nofile", here, value, f"ulimit -n {wanted}, or nofile in /etc/security/limits.conf", expected)
    if machine.infiniband and machine.memlock is not None:
        value = f"{name}: a process may lock only {bytes_in_words(machine.memlock)} of memory"
        expected = f"InfiniBand ({', '.join(machine.infiniband)}) locks its buffers"
        yield warning("memlock", here, value, "ulimit -l unlimited, or memlock in /etc/security/limits.conf", expected)
    if answer.output is not None and not answer.output.writable:
        value = f"{name}: --output_dir {answer.output.path}: no right to write in {answer.output.existing}"
        yield error("output_not_writable", here, value, "choose another folder, or get the permission")
    if answer.output is not None and answer.output.free_bytes < _LITTLE_SPACE:
        value = f"{name}: --output_dir {answer.output.path}: {bytes_in_words(answer.output.free_bytes)} free"
        yield warning("disk", here, value, "free some space: a save that does not fit ends the run")
    yield from _look_at_names(host, answer, hosts)


def _look_at_formats(
    host: HostReport, machine: MachineRecord, base_format: str | None, products: str | None
) -> Iterator[Finding]:
    """What a base of fewer bits, or products in fp8, need and a host has not."""
    if base_format == "nf4" and machine.torch_error is None and "bitsandbytes" not in machine.versions:
        value = f"{host.name}: bitsandbytes is not installed, so --base nf4 is dequantised ten times as slowly"
        yield warning("bitsandbytes", [host.name], value, "pip install 'megatron_tiedlora[quantised]'")
    fix = "leave --products out, or keep the hosts of newer GPUs"
    for gpu in {gpu.name: gpu for gpu in machine.gpus if products is not None}.values():
        try:
            check_fp8_capability(gpu.name, gpu.capability)
        except UserError as wrong:
            yield error("products", [host.name], f"{host.name}: {wrong}", fix)


def _look_at_names(host: HostReport, answer: HostAnswer, hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Names that do not resolve or resolve to the host itself, and missing interfaces."""
    machine, name, here, first = answer.machine, host.name, [host.name], hosts[0].name
    for variable in _SOCKET_NAMES:
        value = machine.variables.get(variable)
        if value and not any(_matches(variable, value, interface) for interface in machine.interfaces):
            expected = f"its interfaces are {', '.join(machine.interfaces)}"
            fix = f"set {variable} to an interface that every host has, or unset it"
            yield error("no_interface", here, f"{name}: {variable}={value}", fix, expected)
    if len(hosts) == 1:
        return
    # gloo listens on the address that the host's own name resolves to. NCCL looks for an interface itself.
    if not machine.variables.get("GLOO_SOCKET_IFNAME") and all(map(is_loopback, machine.name_addresses)):
        addresses, interface = ", ".join(machine.name_addresses), interface_in_use(answer) or "INTERFACE"
        found = f"resolves to {addresses}, which other hosts cannot reach" if addresses else "does not resolve there"
        fix = f"give {machine.host} its real address in its /etc/hosts, or set GLOO_SOCKET_IFNAME={interface}"
        kind = warning if machine.gpus else error
        yield kind("loopback_name", here, f"{name}: its own name, {machine.host}, {found}", fix)
    if not answer.master_addresses:
        value, fix = f"{name} does not know the first host's name, {first}", f"add {first} to its /etc/hosts"
        yield error("name_unknown", here, value, f"{fix} or name server")
    elif name != first and all(map(is_loopback, answer.master_addresses)):
        itself = f"{name} itself ({', '.join(answer.master_addresses)})"
        value = f"on {name} the first host's name, {first}, resolves to {itself}"
        yield error("master_address", here, value, f"correct {first} in its /etc/hosts")


def is_loopback(address: str) -> bool:
    """Whether an address is only valid within its host, like Debian's 127.0.1.1 for the host's own name."""
    return ipaddress.ip_address(address).is_loopback


def interface_in_use(answer: HostAnswer) -> str | None:
    """The interface with the address on the route to another host."""
    interfaces = answer.machine.interfaces.items()
    return next((name for name, addresses in interfaces if answer.peer_address in addresses), None)


def _matches(variable: str, value: str, interface: str) -> bool:
    """Match as the library does: gloo takes names; NCCL takes prefixes, `=eth0` for a name, `^eth0` for any other."""
    if variable == "GLOO_SOCKET_IFNAME":
        return interface in value.split(",")
    negated, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    wanted = [name.partition(":")[0] for name in value.lstrip("^=").split(",")]
    found = any(interface == name if exact else interface.startswith(name) for name in wanted)
    return found != negated


# Files -------------------------------------------------------------------------------------------------------------


def compare_paths(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Input files of a job that are missing, cannot be read or differ."""
    keys = {key: None for _, answer in answering(hosts) for key in answer.paths}
    for key in keys:
        contents = {host.name: answer.paths[key] for host, answer in answering(hosts)}
        flag = key.partition(":")[0]  # a flag that names two files has them as FLAG:1 and FLAG:2
        yield from _look_for_paths(flag, contents)
        yield from _compare_contents(flag, {name: one for name, one in contents.items() if one.is_there})


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
    """Files that cannot be read, or are not as on most hosts."""
    counts = Counter(tuple(sorted(content.files.items())) for content in contents.values())
    usual = dict(counts.most_common(1)[0][0]) if counts else {}
    for name, content in contents.items():
        closed = [file for file, value in content.files.items() if value == UNREADABLE]
        other = [file for file in sorted({*content.files, *usual}) if content.files.get(file) != usual.get(file)]
        more = f" and {len(other) - _MOST_NAMED} more" if len(other) > _MOST_NAMED else ""
        given = f"{name}: --{flag} {content.path}"
        if closed:
            yield error("path_unreadable", [name], f"{given}: {closed[0]} cannot be read", "chmod a+r it")
        elif other:
            message = f"{given} differs from the other hosts': {', '.join(other[:_MOST_NAMED])}{more}"
            if content.kind == "cached":  # the hub's client updates its cache itself if it has a network
                yield warning("path_differs", [name], message, "`hf download` it again")
            else:
                yield error("path_differs", [name], message, "copy it again from a host where it is right")


# As text --------------------------------------------------------------------------------------------------------------


ODD_MARK = "*"


def report_text(report: DoctorReport) -> str:
    """The whole report, to print."""
    layout, num_hosts = report.layout, count_text(len(report.hosts), "host")
    sizes = f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}"
    ranks = f"{count_text(layout.num_ranks, 'rank')} = {sizes}"
    meeting = f"{f'{layout.backend}, ' if layout.backend else ''}meeting at {layout.master_host}:{layout.master_port}"
    parts = [[f"{num_hosts} (by {report.launcher}), {ranks}, {meeting}"], host_table(report.hosts)]
    if report.groups:
        parts.append(group_table(report.groups))
    if report.skipped is not None:
        parts.append([report.skipped])
    if report.findings:
        pairs = ((f"{one.status}: {one.message}", f"  fix: {one.fix}") for one in report.findings)
        parts.append([line for pair in pairs for line in pair])
    warnings = count_text(report.num_warnings, "warning") if report.num_warnings else ""
    if report.verdict == "ready":
        verdict = f"ready, {num_hosts}, {count_text(layout.num_ranks, 'rank')}{f' ({warnings})' if warnings else ''}"
    else:
        verdict = f"not ready: {count_text(report.num_errors, 'error')}{f', {warnings}' if warnings else ''}"
    return "\n\n".join("\n".join(map(printable, lines)) for lines in [*parts, [f"verdict: {verdict}"]])


# Hosts ---------------------------------------------------------------------------------------------------------------

_SAME: tuple[tuple[str, Callable[[MachineRecord], str]], ...] = (  # values that should be the same on all hosts
    ("python", lambda machine: machine.versions.get("python", "-")),
    ("torch", lambda machine: "broken" if machine.torch_error else machine.versions.get("torch", "-")),
    ("deepspeed", lambda machine: machine.versions.get("deepspeed", "-")),
    ("transformers", lambda machine: machine.versions.get("transformers", "-")),
    ("tiedlora", lambda machine: f"{machine.versions.get('megatron_tiedlora', '-')} {machine.source_hash[:6]}"),
    ("GPUs", lambda machine: _gpus_text(machine.gpus)),
    ("cores", lambda machine: str(machine.num_cores)),
)


def host_table(hosts: Sequence[HostReport]) -> list[str]:
    """A row for each host; a value that differs from that of most hosts is marked."""
    odd = {title: {name for one in odd_ones(hosts_by(hosts, value)) for name in one.hosts} for title, value in _SAME}
    on_gpus = any(answer.machine.gpus for _, answer in answering(hosts))
    free = ["memory free", *(["GPU memory free"] if on_gpus else [])]
    rows = [["host", "ranks", *odd, *free, "clock", "interface"]]
    for host in hosts:
        row = [host.name, str(host.slots)]
        if host.answer is None:
            rows.append([*row, "no answer"])
            continue
        machine, clock, address = host.answer.machine, "-", host.answer.peer_address
        row += [value(machine) + (ODD_MARK if host.name in odd[title] else "") for title, value in _SAME]
        row.append(f"{bytes_in_words(machine.free_memory_bytes)} of {bytes_in_words(machine.memory_bytes)}")
        row += [_gpu_memory_text(machine.gpus)] if on_gpus else []
        if host.clock is not None:
            sign = "-" if host.clock.skew < 0 else "+"
            clock = f"{sign}{time_text(abs(host.clock.skew))} +-{time_text(host.clock.margin)}"
        rows.append([*row, clock, "-" if address is None else f"{interface_in_use(host.answer) or '?'} {address}"])
    return [*aligned_lines(rows, align="<"), *([f"{ODD_MARK} differs from most hosts"] if any(odd.values()) else [])]


def _gpus_text(gpus: Sequence[Gpu]) -> str:
    kinds = Counter(gpu.name for gpu in gpus)
    return ", ".join(f"{number} x {name}" for name, number in kinds.items()) or NO_GPU


def _gpu_memory_text(gpus: Sequence[Gpu]) -> str:
    """The memory of the GPU with the least free memory: a job can use no more than that on each."""
    if not gpus:
        return "-"
    least = min(gpus, key=lambda gpu: gpu.free_bytes)
    return f"{bytes_in_words(least.free_bytes)} of {bytes_in_words(least.total_bytes)}"


# Groups --------------------------------------------------------------------------------------------------------------


def group_table(groups: Sequence[GroupResult]) -> list[str]:
    """A row for each kind of group, with its slowest group and that group's hosts."""
    rows = [["all-reduce", "groups x ranks", "latency", "bytes", "time", "bus bandwidth", "median", "slowest group"]]
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        slowest = min(of_kind, key=lambda group: group.bus_bytes_per_second)
        usual = median(group.bus_bytes_per_second for group in of_kind)
        ranks = ", ".join(map(str, slowest.ranks[:8])) + (" ..." if len(slowest.ranks) > 8 else "")
        rows.append(
            [
                kind,
                f"{len(of_kind)} x {len(slowest.ranks)}",
                time_text(max(group.latency_seconds for group in of_kind)),
                f"{slowest.num_bytes / 1e6:.3g} MB",
                time_text(slowest.seconds),
                f"{slowest.bus_bytes_per_second / 1e9:.3g} GB/s",
                f"{usual / 1e9:.3g} GB/s",
                f"ranks {ranks} on {enumerate_names(slowest.hosts)}",
            ]
        )
    return aligned_lines(rows, align="<")
