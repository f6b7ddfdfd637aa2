"""Which ranks send each other messages. Groups are made elsewhere and passed as arguments, never read from globals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import distributed
from torch.distributed import ProcessGroup

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
