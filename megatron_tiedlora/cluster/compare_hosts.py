"""Find what is wrong with a set of hosts from their answers; all functions are pure.

A value is wrong if it differs from that of most hosts (the first host decides a tie). So the odd host is named, and
not all the others.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from megatron_tiedlora.base.messages import (
    aligned_lines,
    bytes_in_words,
    count_text,
    enumerate_names,
    printable,
    time_text,
)
from megatron_tiedlora.cluster import doctor_rank
from megatron_tiedlora.runtime.machine import Finding, MachineRecord, error, judge_machine, warning

_PACKAGE = "megatron_tiedlora"
# A different version of these is an error, because every rank computes with them; of the others it is a warning.
_STRICT = ("python", "torch", "deepspeed", "transformers", _PACKAGE)
_COMPARED = (*_STRICT, "safetensors", "numpy", "bitsandbytes")
NO_GPU = "none"
_LEAST_SHM = 1 << 30  # for NCCL and data loaders
_FILES_PER_RANK, _FILES_BESIDE = 4, 256  # connections to every other rank in a few groups, and other files
_LITTLE_SPACE = 1 << 30  # a checkpoint of a tied adapter is far smaller; logs and an exported model are not


def compare_hosts(hosts: Sequence[doctor_rank.HostReport], *, max_skew: float) -> list[Finding]:
    """All findings about the answers. max_skew: seconds that a clock may be off."""
    return [
        *compare_machines(hosts),
        *(finding for host, answer in doctor_rank.answering(hosts) for finding in _look_at(host, answer, hosts)),
        *compare_clocks(hosts, max_skew=max_skew),
    ]


# What most hosts have --------------------------------------------------------------------------------------------


def odd_hosts(
    hosts: Sequence[doctor_rank.HostReport], value_of: Callable[[MachineRecord], str]
) -> Iterator[tuple[str, list[str], str, list[str]]]:
    """(a value, the hosts that have it, the value of most hosts, and those hosts) for each value that is not the usual
    one. Of two that are equally frequent the first one is usual."""
    names: dict[str, list[str]] = {}
    for host, answer in doctor_rank.answering(hosts):
        names.setdefault(value_of(answer.machine), []).append(host.name)
    usual = max(names, key=lambda value: len(names[value]), default="")
    return ((value, where, usual, names[usual]) for value, where in names.items() if value != usual)


def compare_machines(hosts: Sequence[doctor_rank.HostReport]) -> Iterator[Finding]:
    """What differs between hosts: versions of Python, packages and torch's build, other code of the same version, the
    kind of GPU; and names of one machine, by which it would be used twice."""

    def differs(
        kind: Callable[..., Finding],
        code: str,
        title: str,
        value_of: Callable[[MachineRecord], str],
        fix: str,
        among: Sequence[doctor_rank.HostReport] = hosts,
    ) -> Iterator[Finding]:
        for value, where, usual, others in odd_hosts(among, value_of):
            here, there = enumerate_names(where), enumerate_names(others)
            yield kind(code, where, f"{title} is {value} on {here}", fix, f"{usual} on {there}")

    for name in _COMPARED:
        kind, fix = error if name in _STRICT else warning, f"install the same {name} on every host"
        yield from differs(kind, "version", name, lambda machine, name=name: machine.versions.get(name, "none"), fix)  # type: ignore[misc]
    other = [where for _, where, *_ in odd_hosts(hosts, lambda machine: machine.versions.get(_PACKAGE, "none"))]
    same = [host for host in hosts if not any(host.name in where for where in other)]
    code, fix = f"the code of {_PACKAGE} (hash of its files)", "update its checkout or installation there"
    yield from differs(error, "source", code, lambda machine: machine.source_hash, fix, same)
    on_gpus = [host for host, answer in doctor_rank.answering(hosts) if answer.machine.gpus]
    fix = "install the same build of torch on every host"
    yield from differs(error, "cuda_version", "torch's CUDA", lambda machine: str(machine.cuda), fix, on_gpus)
    yield from differs(error, "nccl_version", "NCCL", lambda machine: str(machine.nccl), fix, on_gpus)
    kind = error if len(on_gpus) < len(doctor_rank.answering(hosts)) else warning
    fix = "keep the hosts of one kind; where torch sees no GPU, look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    yield from differs(kind, "gpus_differ", "the kind of GPU", kind_of_gpus, fix)
    machines: dict[str, list[str]] = {}
    for host, answer in doctor_rank.answering(hosts):
        machines.setdefault(answer.machine.id, []).append(host.name)
    for twice in (names for names in machines.values() if len(names) > 1):
        fix = "keep one line for it in the hostfile, with all its slots"
        yield error("same_machine", twice, f"{enumerate_names(twice)} are one machine", fix)


def count_gpus(machine: MachineRecord) -> str:
    """How many it has of each kind."""
    counts = Counter(gpu.name for gpu in machine.gpus)
    return ", ".join(f"{number} x {name}" for name, number in sorted(counts.items())) or NO_GPU


def kind_of_gpus(machine: MachineRecord) -> str:
    """The names of its kinds of GPUs."""
    return " and ".join(sorted({gpu.name for gpu in machine.gpus})) or NO_GPU


def compare_clocks(hosts: Sequence[doctor_rank.HostReport], *, max_skew: float) -> Iterator[Finding]:
    """Clocks that are certainly off by more than `max_skew` seconds."""
    for host in hosts:
        if host.clock is not None and abs(host.clock.skew) - host.clock.margin > max_skew:
            direction = "ahead of" if host.clock.skew > 0 else "behind"
            value = f"{host.name}: its clock is {abs(host.clock.skew):.1f} s {direction} this machine's"
            fix = "let chrony or systemd-timesyncd set it; until then, times in logs and of files mislead"
            yield warning("clock", [host.name], value, fix)


def _look_at(
    host: doctor_rank.HostReport, answer: doctor_rank.HostAnswer, hosts: Sequence[doctor_rank.HostReport]
) -> Iterator[Finding]:
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
    if answer.output_free_bytes is not None and answer.output_free_bytes < _LITTLE_SPACE:
        value = f"{name}: {bytes_in_words(answer.output_free_bytes)} free where --output_dir is"
        yield warning("disk", here, value, "free some space: a save that does not fit ends the run")
    # gloo listens on the address that the host's own name resolves to. NCCL looks for an interface itself.
    is_named = len(hosts) == 1 or machine.variables.get("GLOO_SOCKET_IFNAME")
    if not is_named and all(map(is_loopback, machine.name_addresses)):
        addresses = ", ".join(machine.name_addresses)
        found = f"resolves to {addresses}, which other hosts cannot reach" if addresses else "does not resolve there"
        fix = f"give {machine.host} its real address in its /etc/hosts, or set GLOO_SOCKET_IFNAME"
        kind = warning if machine.gpus else error
        yield kind("loopback_name", here, f"{name}: its own name, {machine.host}, {found}", fix)


def is_loopback(address: str) -> bool:
    """Whether an address is only valid within its host, like Debian's 127.0.1.1 for the host's own name."""
    return ipaddress.ip_address(address).is_loopback


# As text --------------------------------------------------------------------------------------------------------------


ODD_MARK = "*"


def report_text(report: doctor_rank.DoctorReport) -> str:
    """The whole report, to print."""
    layout, num_hosts = report.layout, count_text(len(report.hosts), "host")
    sizes = f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}"
    ranks = f"{count_text(layout.num_ranks, 'rank')} = {sizes}"
    meeting = f"{f'{layout.backend}, ' if layout.backend else ''}meeting at {layout.master_host}:{layout.master_port}"
    findings = [line for one in report.findings for line in (f"{one.status}: {one.message}", f"  fix: {one.fix}")]
    warnings = count_text(report.num_warnings, "warning") if report.num_warnings else ""
    if report.verdict == "ready":
        verdict = f"ready, {num_hosts}, {count_text(layout.num_ranks, 'rank')}{f' ({warnings})' if warnings else ''}"
    else:
        verdict = f"not ready: {count_text(report.num_errors, 'error')}{f', {warnings}' if warnings else ''}"
    tables = (host_table(report.hosts), group_table(report.groups))
    parts = ([f"{num_hosts} (by {report.launcher}), {ranks}, {meeting}"], *tables, [report.skipped or ""], findings)
    return "\n\n".join("\n".join(map(printable, lines)) for lines in (*parts, [f"verdict: {verdict}"]) if any(lines))


_SAME: tuple[tuple[str, Callable[[MachineRecord], str]], ...] = (  # values that should be the same on all hosts
    ("python", lambda machine: machine.versions.get("python", "-")),
    ("torch", lambda machine: "broken" if machine.torch_error else machine.versions.get("torch", "-")),
    ("deepspeed", lambda machine: machine.versions.get("deepspeed", "-")),
    ("transformers", lambda machine: machine.versions.get("transformers", "-")),
    ("tiedlora", lambda machine: f"{machine.versions.get('megatron_tiedlora', '-')} {machine.source_hash[:6]}"),
    ("GPUs", count_gpus),
    ("cores", lambda machine: str(machine.num_cores)),
)


def host_table(hosts: Sequence[doctor_rank.HostReport]) -> list[str]:
    """A row for each host; a value that differs from that of most hosts is marked."""
    odd = {title: {name for _, where, *_ in odd_hosts(hosts, value) for name in where} for title, value in _SAME}
    rows = [["host", "ranks", *odd, "memory free", "clock"]]
    for host in hosts:
        row = [host.name, str(host.slots)]
        if host.answer is None:
            rows.append([*row, "no answer"])
            continue
        machine, clock = host.answer.machine, "-"
        row += [value(machine) + (ODD_MARK if host.name in odd[title] else "") for title, value in _SAME]
        row.append(f"{bytes_in_words(machine.free_memory_bytes)} of {bytes_in_words(machine.memory_bytes)}")
        if host.clock is not None:
            sign = "-" if host.clock.skew < 0 else "+"
            clock = f"{sign}{time_text(abs(host.clock.skew))} +-{time_text(host.clock.margin)}"
        rows.append([*row, clock])
    return [*aligned_lines(rows, align="<"), *([f"{ODD_MARK} differs from most hosts"] if any(odd.values()) else [])]


def group_table(groups: Sequence[doctor_rank.GroupResult]) -> list[str]:
    """A row for each kind of group, with its slowest group and that group's hosts."""
    rows = [["all-reduce", "groups x ranks", "bytes", "time", "bus bandwidth", "slowest group"]]
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        slowest = min(of_kind, key=lambda group: group.bus_bytes_per_second)
        ranks = ", ".join(map(str, slowest.ranks[:8])) + (" ..." if len(slowest.ranks) > 8 else "")
        rows.append(
            [
                kind,
                f"{len(of_kind)} x {len(slowest.ranks)}",
                f"{slowest.num_bytes / 1e6:.3g} MB",
                time_text(slowest.seconds),
                f"{slowest.bus_bytes_per_second / 1e9:.3g} GB/s",
                f"ranks {ranks} on {enumerate_names(slowest.hosts)}",
            ]
        )
    return aligned_lines(rows, align="<") if groups else []
