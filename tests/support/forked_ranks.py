"""Runs a function on some ranks that are joined by gloo, without a launcher. The function may use an engine or not.

Ranks are forked from the clean process of ranks.py. They meet in a file, every start in one of its own; a hang, or a
rank that fails, fails the test with what the ranks printed.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, RankGroup
from support.ranks import fork_server, redirect_output
from support.run_helpers import World


def run_on_ranks(work: Callable[..., Any], *arguments: Any, ranks: int, folder: Path) -> list[Any]:
    """What `work(*arguments)`, a function that can be pickled, returns on each of `ranks` ranks, in rank order."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [(folder / f"rank{rank}.out", folder / f"rank{rank}.err") for rank in range(ranks)]
    given = str(folder), ranks, work, arguments
    processes = [
        fork_server().Process(target=_be_rank, args=(rank, files[rank], *given), daemon=True) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    World(processes, files).wait().expect(0)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def _be_rank(
    rank: int, files: tuple[Path, Path], folder: str, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    redirect_output(*files)
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=120)
        )
        torch.save(work(*arguments), f"{folder}/rank{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: another rank may wait for this one, and then so would the end of the group
    distributed.destroy_process_group()


def group_of(ranks: list[int]) -> RankGroup:
    """A group of these ranks; every rank of the world makes every group, and ranks outside get an empty answer."""
    handle = distributed.new_group(ranks)
    here = distributed.get_rank()
    return RankGroup(handle, ranks.index(here), len(ranks)) if here in ranks else RankGroup(None, -1, len(ranks))


def groups_of(grid: Grid) -> ParallelGroups:
    """All groups of this rank, by their definitions: ranks that agree in every coordinate but those named."""

    def group(*free: str) -> RankGroup:
        def fixed(there: Grid) -> tuple[int, ...]:
            coordinates = {"pipeline": there.pp_rank, "data": there.dp_rank, "tensor": there.tp_rank}
            return tuple(value for name, value in coordinates.items() if name not in free)

        return {key: group_of(ranks) for key, ranks in grid.groups(fixed).items()}[fixed(grid)]

    return ParallelGroups(
        tensor=group("tensor"),
        pipeline=group("pipeline"),
        choices=group("pipeline"),
        data=group("data"),
        tied=group("pipeline", "data"),
        stage=group("tensor", "data"),
        model=group("tensor", "pipeline"),
    )


def join_as_launched(folder: str) -> torch.device:
    """On such a rank: what a launcher would have set, a cache of its own, and the device to train on."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["MEGATRON_TIEDLORA_CACHE"] = f"{folder}/cache"
    from megatron_tiedlora.runtime.process_group import join_process_group

    return join_process_group(2.0, expected_ranks=world_size)  # finds the group that is there
