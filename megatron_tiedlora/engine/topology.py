"""Process groups of the (pp, dp, tp) grid, made by DeepSpeed's own topology, and a few more of our own."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from torch import distributed

from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.parallel.groups import ALONE, ParallelGroups, RankGroup


@contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed prints its topology, seeds and partition from rank 0; our own report says what a run is."""
    with redirect_stdout(io.StringIO()):
        yield


def make_topology(grid: Grid) -> Any:
    """DeepSpeed's topology of the same axes and sizes: rank = (pp * dp_size + dp) * tp_size + tp in both."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=grid.pp_size, num_mp=grid.tp_size, num_dp=grid.dp_size)
    here = topology.get_coord(grid.rank)
    assert (here.pipe, here.data, here.model) == (grid.pp_rank, grid.dp_rank, grid.tp_rank), (here, grid)
    return topology


def make_process_grid(grid: Grid) -> Any:
    """DeepSpeed's grid of process groups (its `mpu`); every rank calls it."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with quiet():
        return PipelineParallelGrid(topology=make_topology(grid))


def make_groups(grid: Grid, process_grid: Any) -> ParallelGroups:
    """The groups of this rank, out of DeepSpeed's grid, with those for sums and for choices; every rank calls it.

    A group is made only where none that is there has its ranks.
    """
    choices = None
    if grid.pp_size > 1:
        tied = _new_groups(grid, lambda place: place.tp_rank)
        choices = _new_groups(grid, lambda place: (place.dp_rank, place.tp_rank))
    else:
        tied = process_grid.get_data_parallel_group()
    return ParallelGroups(
        tensor=_group(process_grid.get_slice_parallel_group()),
        pipeline=_group(process_grid.get_pipe_parallel_group()),
        choices=ALONE if choices is None else _group(choices),
        data=_group(process_grid.get_data_parallel_group()),
        tied=_group(tied),
        stage=_group(_stage_ranks(grid, process_grid)),
        model=_group(process_grid.get_model_parallel_group()),
    )


def _stage_ranks(grid: Grid, process_grid: Any) -> Any:
    if grid.tp_size == 1:
        return process_grid.get_data_parallel_group()
    if grid.dp_size == 1:
        return process_grid.get_slice_parallel_group()
    if grid.pp_size == 1:
        return distributed.group.WORLD
    return _new_groups(grid, lambda place: place.pp_rank)


def _new_groups(grid: Grid, alike: Callable[[Grid], Any]) -> Any:
    """Make a group of all ranks whose places are `alike`, for each kind of place; returns this rank's."""
    import deepspeed

    members: dict[Any, list[int]] = {}
    for rank in range(grid.world_size):
        members.setdefault(alike(grid.at(rank)), []).append(rank)
    handles = {kind: deepspeed.comm.new_group(ranks) for kind, ranks in members.items()}  # with the run's time limit
    return handles[alike(grid)]


def _group(handle: Any) -> RankGroup:
    size = distributed.get_world_size(handle)
    return ALONE if size == 1 else RankGroup(handle, distributed.get_rank(handle), size)
