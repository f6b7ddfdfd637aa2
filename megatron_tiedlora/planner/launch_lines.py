"""The command and the YAML file that start a layout of a plan, and its record as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.config.fields import flag_value, marked
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.planner.candidates import Candidate, Cluster
from megatron_tiedlora.planner.price import Priced, capacity
from megatron_tiedlora.planner.table import Plan


def chosen_settings(settings: Settings, candidate: Candidate) -> dict[str, Any]:
    """The settings of a run with this layout: those that were given to the plan, its defaults, and the layout's."""
    common = {"max_length": settings.max_length, "global_batch_size": settings.global_batch_size}
    values = {**settings.model_dump(mode="json", exclude_unset=True), **common, **candidate.flags}
    return {name: value for name, value in values.items() if name not in marked(Settings, of_dry_run=True)}


def command_lines(values: Mapping[str, Any], cluster: Cluster, *, yaml: str | None = None) -> list[str]:
    """The command that starts the run: here, or on the hosts of a hostfile.

    Args:
        yaml: the file that holds the settings, if there is one.
    """
    nodes = -(-cluster.world_size // cluster.per_node)
    hosts = f"--num_gpus {cluster.per_node}" if nodes == 1 else "--hostfile hostfile"
    words = [word for name, value in values.items() for word in (f"--{name}", flag_value(value))]
    words = ["--config", yaml] if yaml else words
    file = f"  (hostfile: {nodes} lines NAME slots={cluster.per_node}; in a Slurm allocation leave --hostfile out)"
    return [f"tiedlora run {hosts} {shlex.join(words)}", *([] if nodes == 1 else [file])]


def record_of(row: Priced, plan: Plan) -> dict[str, Any]:
    """A layout as JSON."""
    record: dict[str, Any] = {
        "layout": row.name,
        "settings": row.candidate.flags,
        "data_parallel": row.candidate.layout.dp_size,
        "fits": row.fits,
        "bytes": {"needed": row.needed, "of": capacity(row.cluster), "stage": row.stage},
    }
    if row.memory is not None:
        record["bytes"] |= row.memory._asdict()
    if row.seconds is not None:
        hours = plan.hours(row)
        record |= {
            "tokens_per_second_per_rank": row.tokens_per_second,
            "mfu": row.mfu,
            "seconds": {**row.seconds._asdict(), "step": row.seconds.total},
            "hours": hours,
            "rank_hours": hours * row.cluster.world_size,
        }
    return record
