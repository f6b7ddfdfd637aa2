"""Which ranks share a tensor, pipeline or data parallel group, and on which hosts they are."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tiedlora.cluster.doctor.records import GroupKind, HostReport, ParallelConfig, TrialOrder
from megatron_tiedlora.parallel.grid import Grid


def group_members(layout: ParallelConfig | TrialOrder) -> dict[GroupKind, list[list[int]]]:
    """The ranks of each tensor, pipeline and data parallel group, without kinds whose groups have one rank."""
    grid = Grid(0, layout.num_ranks, layout.tensor_parallel, layout.pipeline_parallel)
    tensor: dict[tuple[int, int], list[int]] = {}
    pipeline: dict[tuple[int, int], list[int]] = {}
    data: dict[tuple[int, int], list[int]] = {}
    for at in map(grid.at, range(grid.world_size)):
        tensor.setdefault((at.pp_rank, at.dp_rank), []).append(at.rank)
        pipeline.setdefault((at.dp_rank, at.tp_rank), []).append(at.rank)
        data.setdefault((at.pp_rank, at.tp_rank), []).append(at.rank)
    members: dict[GroupKind, list[list[int]]] = {
        "tensor": list(tensor.values()),
        "pipeline": list(pipeline.values()),
        "data": list(data.values()),
    }
    return {kind: groups for kind, groups in members.items() if len(groups[0]) > 1}


def hosts_of_ranks(hosts: Sequence[HostReport], ranks: Sequence[int]) -> list[str]:
    """The names of the hosts on which `ranks` run, each once."""
    return [host.name for host in hosts if any(0 <= rank - host.first_rank < host.slots for rank in ranks)]
