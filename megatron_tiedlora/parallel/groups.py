"""Which ranks send each other messages. Groups are made elsewhere and passed as arguments, never read from globals."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class RankGroup:
    """Some ranks, and this rank's index among them. A group of one rank has no handle and sends nothing."""

    handle: ProcessGroup | None = None
    rank: int = 0
    size: int = 1


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
        tied: pipeline x data: ranks that hold the same shard of A and B.
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
