"""Plans a cluster before it is booked: every layout that a run accepts, what it needs and how long it takes.

With --measure it plans nothing, and measures this machine on all ranks of a launcher.
"""

from __future__ import annotations

import gc
import json
import sys

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.base.output_folder import output_file, output_files
from megatron_tiedlora.config.plan_settings import PlanCommand
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size

_MINUTES = 10.0  # in which the ranks of --measure must meet


def main(command: PlanCommand) -> int:
    """Plan and print; returns 0 if a layout fits, else 1."""
    settings = command.settings
    if settings.measure is not None:
        require_extra("train", only=["deepspeed"])
        return _measure(command, settings.measure)
    prints = settings.json_file == "-"
    paths = output_files({"--json": None if prints else settings.json_file, "--yaml": settings.yaml})
    gc.disable()  # what follows makes a million objects and frees few: looking for garbage takes half a second
    try:
        # These import torch, which takes a second: --help and a wrong flag do not wait for it.
        from megatron_tiedlora.base.atomic import write_json
        from megatron_tiedlora.base.text_files import write_yaml
        from megatron_tiedlora.planning import cluster_report as report

        prepare_environment()
        plan = report.plan_cluster(command)
        lines, chosen = report.report_lines(plan, settings), report.chosen_layout(plan, settings)
    finally:
        gc.enable()
    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if "--json" in paths:
        write_json(paths["--json"], report.report_record(plan, settings))
    if "--yaml" in paths and chosen is not None:
        write_yaml(paths["--yaml"], report.chosen_settings(plan, chosen))
    show(*([json.dumps(report.report_record(plan, settings))] if prints else lines))
    if warnings := report.warning_lines(plan, settings):
        show(*warnings, file=sys.stderr)
    return 0 if plan.rows else 1


def _measure(command: PlanCommand, file: str) -> int:
    """Measure this machine, on all ranks of a launcher; rank 0 writes the file, or prints it for `-`."""
    path = None if file == "-" else output_file(file, flag="--measure")  # before a minute of work
    prepare_environment()
    rank, world_size = rank_and_world_size()
    from megatron_tiedlora.base.atomic import write_json
    from megatron_tiedlora.benchmark.machine import measure_machine
    from megatron_tiedlora.checkpoint.sources import find_model
    from megatron_tiedlora.runtime.process_group import join_process_group, leave_process_group

    source = find_model(command.train.model, weights=False)
    device = join_process_group(_MINUTES, expected_ranks=world_size)
    machine = measure_machine(source, device, seconds=command.settings.measure_seconds)
    if rank == 0 and path is None:
        show(json.dumps(machine.record()))
    elif rank == 0 and path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, machine.record())
        show(*machine.lines(), f"{path}: constants of {machine.title}, for --constants")
    leave_process_group()
    return 0
