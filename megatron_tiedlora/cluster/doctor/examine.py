"""The examination from hosts to report: ask, compare, test the shared folder, start ranks if that can help, measure."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.cluster.doctor import compare, compare_network
from megatron_tiedlora.cluster.doctor.ask import ask_hosts, try_shared
from megatron_tiedlora.cluster.doctor.job_files import absolute_path, job_files
from megatron_tiedlora.cluster.doctor.measure import explain_trial, group_results, judge_groups, start_ranks
from megatron_tiedlora.cluster.doctor.measure_hosts import measure_hosts
from megatron_tiedlora.cluster.doctor.records import (
    Backend,
    DoctorReport,
    Finding,
    GroupResult,
    HostReport,
    ParallelConfig,
)
from megatron_tiedlora.cluster.launchers import DEEPSPEED_EXPORTS, is_secret, read_user_file
from megatron_tiedlora.cluster.remote import Route, Transport
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.hosts import Host, read_hostfile, slurm_hosts
from megatron_tiedlora.model.stored_formats import format_in_use, stored_format
from megatron_tiedlora.parallel.grid import Grid

# Errors about files do not prevent a trial of the ranks.
_NOT_IN_THE_WAY = frozenset({"path_missing", "path_unreadable", "path_differs", "output_not_writable"})

Say = Callable[[str], None]


def examine(settings: DoctorSettings, environment: Mapping[str, str], say: Say) -> DoctorReport:
    """Examine the hosts that the settings or the allocation name.

    Args:
        environment: variables of this shell: they describe the allocation, and some are forwarded to the hosts.
        say: called with a line of progress at each step.

    Raises:
        UserError: a hostfile that names no host, a layout that does not divide the ranks, a storage format that a run
            would reject, an invalid path, or a variable that cannot be read.
    """
    route, named = find_hosts(settings, environment)
    transport = Transport(route, settings.ssh_port, _variables(route, environment), Path.cwd())
    hosts = _place_ranks([HostReport(name=host.name, slots=host.slots, first_rank=0) for host in named])
    _make_layout(hosts, settings)
    base_format = _base_format(settings)
    paths, hub = job_files(settings.paths())
    output_dir = None if settings.output_dir is None else absolute_path(settings.output_dir, flag="output_dir")
    seconds: dict[str, float] = {}

    begin = time.monotonic()
    over = {"ssh": " over ssh", "srun": " by srun", "local": ""}[route]
    say(f"asking {count_text(len(hosts), 'host')}{over} ...")
    hosts, findings = ask_hosts(
        hosts,
        transport,
        paths=paths,
        hub=hub,
        output_dir=output_dir,
        master_port=settings.master_port,
        limit=settings.timeout_seconds,
    )
    if route == "local":
        hosts = _fit_to_gpus(hosts)
    layout = _make_layout(hosts, settings)
    findings += compare_hosts(hosts, layout, max_skew=settings.max_clock_skew)
    findings += compare.look_at_formats(hosts, base_format=base_format, products=settings.products)
    seconds["ask"] = time.monotonic() - begin
    say(f"{len(compare.answering(hosts))} of {len(hosts)} hosts answered ({seconds['ask']:.1f} s)")

    there = [host for host, _ in compare.answering(hosts)]
    if settings.output_dir is not None and hosts[0] in there and len(there) > 1:
        begin = time.monotonic()
        findings += try_shared(there, transport)
        seconds["shared"] = time.monotonic() - begin
        say(f"tested whether all hosts share --output_dir ({seconds['shared']:.1f} s)")

    groups: list[GroupResult] = []
    skipped = _why_no_ranks(findings, layout)
    if skipped is None:
        begin = time.monotonic()
        say(f"starting {count_text(layout.num_ranks, 'rank')} for an all-reduce over each group ...")
        large_bytes = max(4, round(settings.allreduce_mb * 1e6) // 4 * 4)
        trial, limit = start_ranks(
            hosts, layout, transport, large_bytes=large_bytes, timeout=settings.timeout_seconds, say=say
        )
        groups = group_results(hosts, layout, trial, large_bytes=large_bytes)
        findings += [*explain_trial(hosts, layout, trial, limit=limit), *judge_groups(groups)]
        seconds["ranks"] = time.monotonic() - begin
        say(f"the ranks have ended ({seconds['ranks']:.1f} s)")
    machine = None
    if settings.measure is not None and not any(finding.level == "error" for finding in findings):
        begin = time.monotonic()
        model = str(settings.model) if "model" in hub else paths["model"]
        say(f"measuring with {count_text(layout.num_ranks, 'rank')}, for about {settings.measure_seconds:g} s ...")
        limit = 2 * settings.timeout_seconds + 4 * settings.measure_seconds
        machine, more = measure_hosts(
            hosts, layout, transport, model=model, seconds=settings.measure_seconds, limit=limit
        )
        findings += more
        seconds["measure"] = time.monotonic() - begin
    return make_report(route, layout, hosts, groups, skipped, findings, seconds, machine)


def _base_format(settings: DoctorSettings) -> str | None:
    """The storage format of the base in the job: --base, or that of the folder if this machine can read it."""
    config = None if settings.model is None else user_path(settings.model, flag="--model") / "config.json"
    if config is None or not os.path.isfile(config):  # so too for a name that no file can have
        return settings.base
    stored = stored_format(read_json_object(config, kind="a Hugging Face model folder"), source=str(config))
    return format_in_use(stored, settings.base, settings.products, source=str(settings.model))


def find_hosts(settings: DoctorSettings, environment: Mapping[str, str]) -> tuple[Route, tuple[Host, ...]]:
    """The hosts to examine: those of the hostfile, else all of the allocation, else this machine."""
    if settings.hostfile is not None:
        return "ssh", read_hostfile(settings.hostfile)
    if "SLURM_JOB_NODELIST" in environment:
        if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
            raise UserError("srun has started several doctors; start one: it finds the allocation's nodes by itself")
        # An interactive step has one node: use the whole allocation.
        return "srun", slurm_hosts({name: value for name, value in environment.items() if "_STEP_" not in name})
    return "local", (Host(socket.gethostname(), settings.tensor_parallel * settings.pipeline_parallel),)


def compare_hosts(hosts: Sequence[HostReport], layout: ParallelConfig, *, max_skew: float) -> list[Finding]:
    """All findings about the answers; a pure function."""
    return [
        *compare.look_at_torch(hosts),
        *compare.compare_versions(hosts),
        *compare.compare_sources(hosts),
        *compare_network.look_at_names(hosts),
        *compare_network.look_at_port(hosts),
        *compare_network.compare_paths(hosts),
        *compare_network.look_at_output(hosts),
        *compare.compare_gpus(hosts),
        *compare.look_at_limits(hosts),
        *compare.compare_clocks(hosts, max_skew=max_skew),
        *compare_network.look_at_layout(hosts, layout),
    ]


def make_report(
    route: Route,
    layout: ParallelConfig,
    hosts: Sequence[HostReport],
    groups: Sequence[GroupResult],
    skipped: str | None,
    findings: Sequence[Finding],
    seconds: Mapping[str, float],
    machine: dict[str, Any] | None = None,
) -> DoctorReport:
    """Count the findings, errors first, and conclude."""
    errors = [finding for finding in findings if finding.level == "error"]
    warnings = [finding for finding in findings if finding.level == "warning"]
    return DoctorReport(
        verdict="not ready" if errors else "ready",
        num_errors=len(errors),
        num_warnings=len(warnings),
        route=route,
        layout=layout,
        hosts=list(hosts),
        groups=list(groups),
        skipped=skipped,
        findings=[*errors, *warnings],
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        machine=machine,
    )


# Helpers -------------------------------------------------------------------------------------------------------------


def _variables(route: Route, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set on the hosts: with srun and on this machine the shell's own are there already."""
    sent = {name: value for name, value in environment.items() if name.startswith(DEEPSPEED_EXPORTS)}
    named = read_user_file(environment)
    shown = {name: value for name, value in sent.items() if not is_secret(name)} if route == "ssh" else {}
    return {**shown, **named}


def _place_ranks(hosts: Sequence[HostReport]) -> list[HostReport]:
    """The hosts with the number of each one's first rank, in the order of the hosts. All launchers do that except
    torchrun, which sorts host names as text."""
    firsts = accumulate((host.slots for host in hosts), initial=0)
    return [host.model_copy(update={"first_rank": first}) for host, first in zip(hosts, firsts, strict=False)]


def _fit_to_gpus(hosts: Sequence[HostReport]) -> list[HostReport]:
    """A single machine has a rank for each GPU; without GPUs it has a rank for each part of the model."""
    return [
        host.model_copy(update={"slots": len(host.probe.gpus)}) if host.probe is not None and host.probe.gpus else host
        for host in hosts
    ]


def _make_layout(hosts: Sequence[HostReport], settings: DoctorSettings) -> ParallelConfig:
    num_ranks = sum(host.slots for host in hosts)
    grid = Grid(0, num_ranks, settings.tensor_parallel, settings.pipeline_parallel)
    probes = [host.probe for host in hosts if host.probe is not None]
    backend: Backend | None = None
    if probes:
        backend = "nccl" if all(probe.gpus for probe in probes) else "gloo"
    return ParallelConfig(
        num_ranks=num_ranks,
        tensor_parallel=grid.tp_size,
        pipeline_parallel=grid.pp_size,
        data_parallel=grid.dp_size,
        master_host="127.0.0.1" if len(hosts) == 1 else hosts[0].name,
        master_port=settings.master_port,
        backend=backend,
    )


def _why_no_ranks(findings: Sequence[Finding], layout: ParallelConfig) -> str | None:
    """Why no ranks are started; None if they are."""
    in_the_way = [finding for finding in findings if finding.level == "error" and finding.code not in _NOT_IN_THE_WAY]
    if in_the_way:
        return f"no ranks were started: correct {count_text(len(in_the_way), 'error')} first"
    return "no all-reduce: a single rank has no communication to test" if layout.num_ranks == 1 else None
