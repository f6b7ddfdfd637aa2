"""The examination from hosts to report: start a job on them that reports and all-reduces, compare, measure."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.cluster.doctor import compare
from megatron_tiedlora.cluster.doctor.probe import absolute_path, job_files
from megatron_tiedlora.cluster.doctor.records import (
    Backend,
    DoctorReport,
    Finding,
    GroupResult,
    HostReport,
    Order,
    ParallelConfig,
)
from megatron_tiedlora.cluster.doctor.trial import (
    explain_shared,
    explain_silence,
    explain_trial,
    group_results,
    heard_hosts,
    judge_groups,
    measure_hosts,
    start_ranks,
)
from megatron_tiedlora.cluster.launchers import Job
from megatron_tiedlora.cluster.start import check_programs, choose_hosts, make_job
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.launch_settings import LaunchSettings
from megatron_tiedlora.model.stored_formats import format_in_use, stored_format
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.runtime.launch_env import visible_gpus

# These errors explain no failure of the ranks, and so are no reason to leave that out.
_NOT_IN_THE_WAY = frozenset({"path_missing", "path_unreadable", "path_differs", "output_not_writable"})

Say = Callable[[str], None]


def examine(settings: DoctorSettings, environment: Mapping[str, str], say: Say) -> DoctorReport:
    """Examine the hosts that the settings or the allocation name.

    Args:
        environment: variables of this shell: they describe the allocation, and launchers send some to the hosts.
        say: called with a line of progress at each step.

    Raises:
        UserError: a hostfile that names no host, a layout that does not divide the ranks, a storage format that a run
            would reject, an invalid path, or a launcher that is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_tiedlora-") as private:
        return _examine(settings, environment, say, find_job(settings, environment, Path(private)))


def _examine(settings: DoctorSettings, environment: Mapping[str, str], say: Say, job: Job) -> DoctorReport:
    hosts = place_ranks(job)
    layout = _make_layout(hosts, settings, job)
    base_format = _base_format(settings)
    paths, hub = job_files(settings.paths())
    output_dir = None if settings.output_dir is None else absolute_path(settings.output_dir, flag="output_dir")
    check_programs(job)
    seconds: dict[str, float] = {}

    begin = time.monotonic()
    say(f"starting {count_text(job.size, 'rank')} on {count_text(len(hosts), 'host')} by {job.launcher} ...")
    large_bytes = max(4, round(settings.allreduce_mb * 1e6) // 4 * 4)
    order = Order(
        layout=layout,
        peers={one.first_rank: next((two.name for two in hosts if two is not one), None) for one in hosts},
        first_host=hosts[0].name,
        paths=paths,
        hub=hub,
        output_dir=output_dir,
        large_bytes=large_bytes,
        timeout=settings.timeout_seconds,
        seconds=2 * settings.timeout_seconds,
    )
    trial = start_ranks(job, order, environment, say)
    seconds["ranks"] = time.monotonic() - begin
    hosts = heard_hosts(hosts, trial)
    layout = _make_layout(hosts, settings, job)
    say(f"{len(compare.answering(hosts))} of {len(hosts)} hosts answered ({seconds['ranks']:.1f} s)")

    findings = explain_silence(hosts, trial, route=job.route)
    findings += compare_hosts(hosts, layout, max_skew=settings.max_clock_skew)
    findings += compare.look_at_formats(hosts, base_format=base_format, products=settings.products)
    if output_dir is not None:
        findings += explain_shared(hosts, trial, output_dir)
    groups, skipped = group_results(hosts, layout, trial, large_bytes=large_bytes), _why_no_trial(findings)
    if skipped is None:
        findings += [*explain_trial(hosts, layout, trial, limit=order.seconds), *judge_groups(groups)]
        skipped = "no all-reduce: a single rank has no communication to test" if layout.num_ranks == 1 else None
    machine = None
    if settings.measure is not None and not any(finding.level == "error" for finding in findings):
        begin = time.monotonic()
        model = str(settings.model) if "model" in hub else paths["model"]
        say(f"measuring with {count_text(layout.num_ranks, 'rank')}, for about {settings.measure_seconds:g} s ...")
        limit = 2 * settings.timeout_seconds + 4 * settings.measure_seconds
        machine, more = measure_hosts(job, environment, model=model, seconds=settings.measure_seconds, limit=limit)
        findings += more
        seconds["measure"] = time.monotonic() - begin
    return make_report(job, layout, hosts, groups, skipped, findings, seconds, machine)


def _base_format(settings: DoctorSettings) -> str | None:
    """The storage format of the base in the job: --base, or that of the folder if this machine can read it."""
    config = None if settings.model is None else user_path(settings.model, flag="--model") / "config.json"
    if config is None or not os.path.isfile(config):  # so too for a name that no file can have
        return settings.base
    stored = stored_format(read_json_object(config, kind="a Hugging Face model folder"), source=str(config))
    return format_in_use(stored, settings.base, settings.products, source=str(settings.model))


def find_job(settings: DoctorSettings, environment: Mapping[str, str], private: Path) -> Job:
    """A job on the hosts to examine, by the launcher that `tiedlora run` would use: those of the hostfile, else all of
    the allocation, else this machine, with a rank for each GPU, or without GPUs one for each part of the model."""
    of_job = ("launcher", "hostfile", "ssh_port", "launcher_args", "master_port")
    launch = LaunchSettings(**{name: getattr(settings, name) for name in of_job})
    # An interactive step of Slurm has one node: use the whole allocation.
    outside = {name: value for name, value in environment.items() if "_STEP_" not in name or name.endswith("NUM_TASKS")}
    if settings.hostfile is None and "SLURM_JOB_ID" not in environment:
        ranks = len(visible_gpus()) or settings.tensor_parallel * settings.pipeline_parallel
        launch = launch.model_copy(update={"num_gpus": ranks})
    launcher, route, hosts = choose_hosts(launch, outside)
    return make_job(launch, launcher, route, hosts, program=(), arguments=(), private=private)


def compare_hosts(hosts: Sequence[HostReport], layout: ParallelConfig, *, max_skew: float) -> list[Finding]:
    """All findings about the answers; a pure function."""
    return [
        *compare.look_at_torch(hosts),
        *compare.compare_versions(hosts),
        *compare.compare_sources(hosts),
        *compare.look_at_names(hosts),
        *compare.compare_paths(hosts),
        *compare.look_at_output(hosts),
        *compare.compare_gpus(hosts),
        *compare.look_at_limits(hosts),
        *compare.compare_clocks(hosts, max_skew=max_skew),
        *compare.look_at_layout(hosts, layout),
    ]


def make_report(
    job: Job,
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
        route=job.route,
        launcher=job.launcher,
        layout=layout,
        hosts=list(hosts),
        groups=list(groups),
        skipped=skipped,
        findings=[*errors, *warnings],
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        machine=machine,
    )


# Helpers -------------------------------------------------------------------------------------------------------------


def place_ranks(job: Job) -> list[HostReport]:
    """The hosts with the number of each one's first rank. torchrun sorts the hosts' names as text."""
    hosts = sorted(job.hosts, key=lambda host: host.name) if job.launcher == "torchrun" else job.hosts
    firsts = accumulate((host.slots for host in hosts), initial=0)
    return [HostReport(name=one.name, slots=one.slots, first_rank=at) for one, at in zip(hosts, firsts, strict=False)]


def _make_layout(hosts: Sequence[HostReport], settings: DoctorSettings, job: Job) -> ParallelConfig:
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
        master_port=job.master_port,
        backend=backend,
    )


def _why_no_trial(findings: Sequence[Finding]) -> str | None:
    """Why the ranks' trial says nothing; None if it does."""
    in_the_way = [finding for finding in findings if finding.level == "error" and finding.code not in _NOT_IN_THE_WAY]
    if not in_the_way:
        return None
    return f"the ranks' trial does not count: correct {count_text(len(in_the_way), 'error')} first"
