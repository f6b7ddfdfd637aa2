"""Process groups of the (pp, dp, tp) grid: DeepSpeed's topology makes most of them, this module a few more."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from torch import distributed

from megatron_tiedlora.parallel.groups import ALONE, Grid, ParallelGroups, RankGroup


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress stdout: DeepSpeed prints its topology, seeds and partition on rank 0, which our own report replaces."""
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
    """The groups of this rank: those of DeepSpeed's grid, and those for tied sums and choices; every rank calls it.

    A group is made only if no existing group has the same ranks.
    """
    choices = None
    if grid.pp_size > 1:
        tied = _new_groups(grid, lambda at: at.tp_rank)
        choices = _new_groups(grid, lambda at: (at.dp_rank, at.tp_rank))
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
    return _new_groups(grid, lambda at: at.pp_rank)


def _new_groups(grid: Grid, key: Callable[[Grid], Any]) -> Any:
    """Make a group of the ranks with the same `key`, for each value of it; returns this rank's group."""
    import deepspeed

    made = grid.groups(key).items()
    handles = {value: deepspeed.comm.new_group(ranks) for value, ranks in made}  # with the run's time limit
    return handles[key(grid)]


def _group(handle: Any) -> RankGroup:
    size = distributed.get_world_size(handle)
    return ALONE if size == 1 else RankGroup(handle, distributed.get_rank(handle), size)
