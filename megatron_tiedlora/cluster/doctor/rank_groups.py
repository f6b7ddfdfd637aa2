"""Which ranks share a tensor, pipeline or data parallel group, and on which hosts they are."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tiedlora.cluster.doctor.records import GroupKind, HostReport, ParallelConfig
from megatron_tiedlora.parallel.grid import Grid


def group_members(layout: ParallelConfig) -> dict[GroupKind, list[list[int]]]:
    """The ranks of each tensor, pipeline and data parallel group, without kinds whose groups have one rank."""
    grid = Grid(0, layout.num_ranks, layout.tensor_parallel, layout.pipeline_parallel)
    members: dict[GroupKind, dict[tuple[int, int], list[int]]] = {"tensor": {}, "pipeline": {}, "data": {}}
    for at in map(grid.at, range(grid.world_size)):
        members["tensor"].setdefault((at.pp_rank, at.dp_rank), []).append(at.rank)
        members["pipeline"].setdefault((at.dp_rank, at.tp_rank), []).append(at.rank)
        members["data"].setdefault((at.pp_rank, at.tp_rank), []).append(at.rank)
    return {kind: list(groups.values()) for kind, groups in members.items() if len(groups[0, 0]) > 1}


def hosts_of_ranks(hosts: Sequence[HostReport], ranks: Sequence[int]) -> list[str]:
    """The names of the hosts on which `ranks` run, each once."""
    return [host.name for host in hosts if any(0 <= rank - host.first_rank < host.slots for rank in ranks)]
