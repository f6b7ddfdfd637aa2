"""The report as text: a row for each host and each kind of group, the findings with their fixes, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.wording import aligned_lines, bytes_in_words, count_text, enumerate_names, time_text
from megatron_tiedlora.cluster.doctor.compare import NO_GPU, hosts_by, interface_in_use, odd_ones
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    GroupResult,
    HostReport,
    answering,
)
from megatron_tiedlora.runtime.machine import Gpu, MachineRecord

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
