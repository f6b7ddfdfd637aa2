"""Which ranks send each other messages. Groups are made elsewhere and passed as arguments, never read from globals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from megatron_tiedlora.base.errors import UserError, count_text

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


# Renamed in torch 2.13, where the old names warn.
_all_gather_into = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter_into = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


@dataclass(frozen=True)
class RankGroup:
    """Some ranks, and this rank's index among them. A group of one rank has no handle and sends nothing.

    The collectives of tensor parallelism are sent here. Code that only counts them has a group of its own class.
    """

    handle: ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def all_reduce_(
        self, tensor: torch.Tensor, op: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM
    ) -> None:
        """Replace a contiguous tensor by the sum over the group, or what `op` says."""
        distributed.all_reduce(tensor, op=op, group=self.handle)

    def all_gather_into(self, gathered: torch.Tensor, tensor: torch.Tensor) -> None:
        """Write the ranks' contiguous tensors to `gathered`, one after another along the first dimension."""
        _all_gather_into(gathered, tensor, group=self.handle)

    def reduce_scatter_into(self, mine: torch.Tensor, parts: torch.Tensor) -> None:
        """Write this rank's part of the sum of `parts` to `mine`; the parts follow each other along dimension 0."""
        _reduce_scatter_into(mine, parts, group=self.handle)


ALONE = RankGroup()


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share each layer, and whether activations between layers are sharded along the sequence.

    With sequence parallelism, norms and residual sums run on (1, b s / size, d): the b sequences are concatenated and
    each rank has an equal, contiguous part, so that messages need no copy. A layer gathers on entry and reduce-scatters
    on exit. Without it every rank holds (b, s, d), and a layer all-reduces on exit.
    """

    group: RankGroup = ALONE
    sequence_parallel: bool = False

    @property
    def sequence_parts(self) -> int:
        """The number of parts into which activations between layers are sharded along the sequence."""
        return self.group.size if self.sequence_parallel else 1

    def whole_sequences(self) -> TensorParallel:
        """The same ranks without sequence parallelism: for decoding, where a step is one token long."""
        return replace(self, sequence_parallel=False)


@dataclass(frozen=True)
class ParallelGroups:
    """Every group that this rank belongs to.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: ranks with the other stages of the same samples and the same part of each layer.
        choices: the same ranks, for the tokens that the last stage sends to all others while decoding. They need a
            queue of their own, since ranks send them and the messages between stages in different orders.
        data: ranks that hold the same tensors and see other samples.
        tied: pipeline x data: ranks that hold the same shard of a tied tensor.
        stage: tensor x data: ranks that hold the same u.
        model: tensor x pipeline: ranks that together hold the model once.
    """

    tensor: RankGroup = ALONE
    pipeline: RankGroup = ALONE
    choices: RankGroup = ALONE
    data: RankGroup = ALONE
    tied: RankGroup = ALONE
    stage: RankGroup = ALONE
    model: RankGroup = ALONE
