"""What a rank of a stage does in the passes of a micro-batch, as counts without a machine.

Counts come from `flops`, `elementwise` and `traffic`. What follows the last attention runs its backward pass inside the
forward pass, and is counted there. Blocks that do the same are counted once and multiplied.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.traffic import Traffic
from megatron_tiedlora.planning import elementwise
from megatron_tiedlora.planning.flops import BlockFlops, block_flops, head_flops
from megatron_tiedlora.planning.micro_batches import MicroBatchShape
from megatron_tiedlora.planning.stages import BlockKind, StageOwners, StagePlan
from megatron_tiedlora.planning.traffic import pass_traffic


class Batch(NamedTuple):
    """A micro-batch: its shape, and the sum of s^2 over its documents of s tokens, for attention."""

    shape: MicroBatchShape
    squared_lengths: int


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step on a data-parallel rank.

    Attributes:
        kinds: the different ones.
        order: by micro-batch in the order in which they run, its index in `kinds`.
        numbers: by kind, how many there are.
    """

    kinds: tuple[Batch, ...]
    order: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Batches:
        """Those of an order."""
        indices: dict[Batch, int] = {}
        order = tuple(indices.setdefault(batch, len(indices)) for batch in batches)
        numbers = Counter(order)
        return cls(tuple(indices), order, tuple(numbers[index] for index in range(len(indices))))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def shapes(self) -> tuple[MicroBatchShape, ...]:
        """Their shapes, in order."""
        return tuple(self.kinds[index].shape for index in self.order)

    @property
    def adapters(self) -> list[int]:
        """The numbers of the adapters that take the step."""
        return sorted({adapter for batch in self.kinds for adapter in batch.shape.adapters})


@dataclass
class PassWork:
    """Counts of one pass, or of what a backward pass computes again, on a rank.

    Attributes:
        linears, head, low_rank, attention: FLOPs of the blocks' frozen matmuls, of the head's, of the adapter's, and of
            attention.
        queries: numbers of queries that attention reads; twice as many in a backward pass.
        moved: bytes of everything else; see `elementwise`.
        weights: numbers of the blocks' linears that matmuls read; a quantised base dequantises them.
        weights_back: the same of matmuls for gradients, which read them transposed.
        rounded, rounded_back: numbers of activations, and of gradients, that the blocks' linears multiply; FP8 matmuls
            round them first.
        head_weights: the same of the head's matmuls.
        blocks: passes through a block, which the host launches.
        sent: messages.
    """

    linears: float = 0.0
    head: float = 0.0
    low_rank: float = 0.0
    attention: float = 0.0
    queries: float = 0.0
    moved: float = 0.0
    weights: float = 0.0
    weights_back: float = 0.0
    rounded: float = 0.0
    rounded_back: float = 0.0
    head_weights: float = 0.0
    blocks: float = 0.0
    sent: Traffic = field(default_factory=Traffic)


class StageWork(NamedTuple):
    """A forward pass; a backward pass without what it computes again; and that."""

    forward: PassWork
    backward: PassWork
    again: PassWork


def stage_work(stage: StagePlan, batch: Batch) -> StageWork:
    """The work of a rank of a stage for a micro-batch."""
    owners, shares = stage.owned_by(batch.shape.adapters), batch.shape.shares
    alone = [owners] if len(shares) == 1 else [stage.owned_by((share.adapter,)) for share in shares]
    found = StageWork(PassWork(), PassWork(), PassWork())
    for kind in owners.kinds:
        _add_blocks(found, owners, kind, batch, alone)
    if stage.is_first:
        found.forward.moved += elementwise.embedding_bytes(owners, tokens=batch.shape.num_tokens).forward
    if stage.is_last:
        found.forward.head += head_flops(stage.shape, batch.shape.num_supervised) / stage.layout.tp_size
        pieces = -(-batch.shape.num_supervised // HEAD_ROWS)
        found.forward.head_weights += 2 * pieces * stage.shape.head.num_weights / stage.layout.tp_size
        found.forward.moved += elementwise.head_bytes(owners, batch.shape).forward
    sent = pass_traffic(stage, batch.shape)
    found.forward.sent, found.backward.sent, found.again.sent = sent
    return found


def _add_blocks(
    found: StageWork, owners: StageOwners, kind: BlockKind, batch: Batch, alone: Sequence[StageOwners]
) -> None:
    """Add the blocks of a kind.

    Args:
        alone: the owner of each share.
    """
    stage, block, number = owners.stage, kind.example, kind.number
    layout, needs, recompute = stage.layout, owners.needs(block), stage.layout.recompute
    flops, moved = _of_block(owners, kind, batch, alone)
    forward, backward, again = found
    share = number / layout.tp_size

    def add(work: PassWork, name: str, *, goes_back: bool = False) -> None:
        linear = flops.linears[name]
        matmul, low_rank = (linear.backward, linear.low_rank_backward) if goes_back else linear[:2]
        work.linears += matmul * share
        work.low_rank += low_rank * share
        shape = stage.shape.block.adaptable[name]
        read = shape.num_weights * share * (matmul > 0)
        work.weights += read * (not goes_back)
        work.weights_back += read * goes_back
        # A rank has all columns of what it multiplies, or its shard of them: by the side on which the weight is cut.
        others, cut = (shape.in_size, "column") if goes_back else (shape.out_size, "row")
        rounded = matmul / (2 * others) * (share if shape.cut == cut else number)
        work.rounded += rounded * (not goes_back)
        work.rounded_back += rounded * goes_back

    for name in flops.linears:
        add(forward, name)
    queries = batch.shape.num_tokens * stage.shape.heads.rows[0] * share
    forward.attention += flops.attention * share
    forward.queries += queries
    forward.moved += number * moved.forward
    forward.blocks += number
    if not kind.goes_back:
        return
    for name in flops.linears:
        early = kind.ends_here and name in (GATE_UP, DOWN)
        add(forward if early else backward, name, goes_back=True)
    backward.attention += flops.attention_backward * share
    backward.queries += 2 * queries * (flops.attention_backward > 0)
    backward.moved += number * moved.backward
    backward.blocks += number
    again.moved += number * moved.again
    if recompute == "full" and (not kind.ends_here or needs[OUTPUT]):
        again.attention += flops.attention * share
        again.queries += queries
        for name in (QKV,) if kind.ends_here else flops.linears:
            add(again, name)
        again.blocks += number
    elif recompute == "selective" and not kind.ends_here and owners.reads_mlp_input(block):
        add(again, GATE_UP)


def _of_block(
    owners: StageOwners, kind: BlockKind, batch: Batch, alone: Sequence[StageOwners]
) -> tuple[BlockFlops, elementwise.MovedBytes]:
    """The FLOPs of a block and what it moves, share by share: a token meets the factors of its own adapter."""
    block, needs = kind.example, owners.needs(kind.example)
    flops, moved = list[BlockFlops](), elementwise.MovedBytes()
    for share, own in zip(batch.shape.shares, alone, strict=True):
        after = share.num_after if kind.ends_here else share.num_tokens
        one = block_flops(
            owners.stage.shape,
            own.parts[0].config,
            [name for name in needs if own.adapts(block, name)],
            needs,
            num_tokens=share.num_tokens,
            squared_lengths=0 if flops else batch.squared_lengths,  # those of all shares, once
            num_after=after,
        )
        flops.append(one)
        moved = moved.plus(elementwise.block_bytes(owners, block, tokens=share.num_tokens, after=after, own=own))
    return functools.reduce(BlockFlops.plus, flops), moved
