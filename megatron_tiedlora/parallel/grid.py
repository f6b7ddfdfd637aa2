"""The coordinates of a rank in the (pipeline, data, tensor) grid: pure arithmetic, without process groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import count_text

Key = TypeVar("Key")


@dataclass(frozen=True)
class Grid:
    """The grid over (pp, dp, tp); the ranks of a tensor-parallel group are adjacent.

    rank = (pp_rank * dp_size + dp_rank) * tp_size + tp_rank
    """

    rank: int
    world_size: int
    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        unit = self.tp_size * self.pp_size
        if self.world_size % unit:
            below = self.world_size // unit * unit
            raise UserError(
                f"{count_text(self.world_size, 'rank')} {'is' if self.world_size == 1 else 'are'} not a multiple of"
                f" --tensor_parallel {self.tp_size} x --pipeline_parallel {self.pp_size}."
                f" Start {f'{below} or ' if below else ''}{below + unit} ranks, or change the two"
            )

    @property
    def dp_size(self) -> int:
        """Data-parallel size = world size / (tensor x pipeline)."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def tp_rank(self) -> int:
        """Index in the tensor-parallel group, whose ranks share each layer."""
        return self.rank % self.tp_size

    @property
    def dp_rank(self) -> int:
        """Index in the data-parallel group, whose ranks see different samples."""
        return self.rank // self.tp_size % self.dp_size

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        return self.rank // (self.tp_size * self.dp_size)

    def rank_of(self, *, pp_rank: int = 0, dp_rank: int = 0, tp_rank: int = 0) -> int:
        """The rank with these coordinates."""
        return (pp_rank * self.dp_size + dp_rank) * self.tp_size + tp_rank

    def at(self, rank: int) -> Grid:
        """The same grid for another rank."""
        return replace(self, rank=rank)

    def groups(self, key: Callable[[Grid], Key]) -> dict[Key, list[int]]:
        """The ranks whose coordinates have the same `key`, by its value."""
        members: dict[Key, list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(key(self.at(rank)), []).append(rank)
        return members
