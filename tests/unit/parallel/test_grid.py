"""The grid of ranks, beside DeepSpeed's topology."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.engine.engine import make_topology
from megatron_tiedlora.parallel.groups import Grid


def grids() -> Iterator[Grid]:
    for tp_size, pp_size, dp_size in product((1, 2, 3, 4, 8), (1, 2, 3, 5), (1, 2, 3, 4)):
        yield Grid(0, tp_size * pp_size * dp_size, tp_size=tp_size, pp_size=pp_size)


def test_the_grid_is_deepspeeds() -> None:
    """Ranks, coordinates and groups of the topology that the pipeline engine runs on."""
    for grid in grids():
        topology = make_topology(grid)
        assert topology.world_size() == grid.world_size
        places = [grid.at(rank) for rank in range(grid.world_size)]
        for here in places:
            place = {"pp_rank": here.pp_rank, "dp_rank": here.dp_rank, "tp_rank": here.tp_rank}
            coordinates = topology.get_coord(here.rank)
            assert (coordinates.pipe, coordinates.data, coordinates.model) == tuple(place.values())
            assert topology.get_rank(pipe=here.pp_rank, data=here.dp_rank, model=here.tp_rank) == here.rank
            assert grid.rank_of(**place) == here.rank
        for axis, names in (("pipe", ("dp", "tp")), ("data", ("pp", "tp")), ("model", ("pp", "dp"))):
            ours: dict[Any, list[int]] = {}
            for here in places:
                ours.setdefault(tuple(getattr(here, f"{name}_rank") for name in names), []).append(here.rank)
            assert sorted(map(sorted, topology.get_axis_comm_lists(axis))) == sorted(
                ranks for ranks in ours.values() if len(ranks) > 1 or topology.get_dim(axis) == 1
            )


@pytest.mark.parametrize(
    ("world_size", "tp_size", "pp_size", "fix"),
    [(6, 4, 1, "4 or 8"), (3, 2, 2, "Start 4 ranks"), (10, 2, 2, "8 or 12")],
)
def test_a_world_that_does_not_divide_is_refused(world_size: int, tp_size: int, pp_size: int, fix: str) -> None:
    with pytest.raises(UserError, match=fix):
        Grid(0, world_size, tp_size=tp_size, pp_size=pp_size)
