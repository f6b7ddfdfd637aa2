"""The layout of a run over its ranks and the micro-batches of its step, as plain data.

Planners read nothing beside them and a ModelShape. A run makes one `Layout` from its settings (`RunPlan.layout`), a
comparison of layouts makes one for each. A micro-batch has tokens of one adapter, or of several, whose rows are then
end to end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.batch import PAD_MULTIPLE, padded_positions
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.grid import Grid

# On a GPU the allocator caches blocks of every requested size. Fewer sizes mean a smaller cache if expandable segments
# are off (docs/performance.md).
GPU_MULTIPLE = 128
# The layers of a rank process so many numbers in a run before compiling pays: a CPU compiles for half a minute at
# first, and saves about a quarter of each step.
LEAST_WORK = 5e9


@dataclass(frozen=True)
class Layout:
    """How a model and its adapters are trained over the ranks.

    Attributes:
        adapters: those that are trained.
        length: the most tokens in a row of a micro-batch.
        rows: the most rows in a micro-batch.
        micro_batches: the most micro-batches of a rank in one step.
        tp_size, pp_size, dp_size: the degrees of tensor, pipeline and data parallelism.
        shards_sequences: whether activations between layers are sharded along the sequence if tp_size is above 1.
        zero_stage: the ZeRO stage, 0 to 3.
        live_parameters: ZeRO-3 stops gathering base weights once it holds more numbers than this.
        overlaps_gathers: whether ZeRO-3 gathers weights while it computes with others.
        dtype: the dtype of the base, and of activations.
        base_format: the storage format of the blocks' linears, a name of `BASE_FORMATS`; None for `dtype`.
        products: "fp8" if what these linears multiply is rounded to fp8 too.
        keep_transposed: whether they keep a transposed copy of their codes, with `products`.
        recompute: "none", "selective" (gate and up) or "full" (whole blocks).
        on_gpu: whether the ranks run on GPUs, where rows are padded further and libraries need memory too.
        compiled: whether kernels are compiled.
        deterministic: whether every sum has a fixed order.
        named: whether the adapters have names, as with --adapters, where one may be alone too.
    """

    adapters: tuple[AdapterConfig, ...]
    length: int
    rows: int = 1
    micro_batches: int = 1
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    shards_sequences: bool = True
    zero_stage: int = 0
    live_parameters: int = 1_000_000_000
    overlaps_gathers: bool = False
    dtype: torch.dtype = torch.bfloat16
    base_format: str | None = None
    products: str | None = None
    keep_transposed: bool = False
    recompute: str = "none"
    on_gpu: bool = False
    compiled: bool = True
    deterministic: bool = False
    named: bool = False

    def __post_init__(self) -> None:
        assert self.named or len(self.adapters) == 1, "several adapters have names"

    @cached_property
    def first_adapted(self) -> int:
        """The first layer of the model that an adapter adapts."""
        return min(adapter.layers[0] for adapter in self.adapters)

    @property
    def engine_steps(self) -> bool:
        """Whether DeepSpeed sums, shards and steps the adapter (`build.steps_by_engine`)."""
        return self.zero_stage > 0 and not self.named

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between layers are sharded along the sequence."""
        return self.shards_sequences and self.tp_size > 1

    @property
    def sequence_parts(self) -> int:
        """The number of shards that activations between layers are cut into along the sequence."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def pad_multiple(self) -> int:
        """Lengths are padded to a multiple of this, so that sequence parallelism can divide them into equal shards.

        It is 8, or 128 on GPUs, for 1, 2, 4 and 8 shards; else the least common multiple. Padding does not change the
        loss.
        """
        return math.lcm(GPU_MULTIPLE if self.on_gpu else PAD_MULTIPLE, self.sequence_parts)


def pays_to_compile(shape: ModelShape, grid: Grid, *, num_tokens: int, least_work: float = LEAST_WORK) -> bool:
    """Whether a run over `num_tokens`, on all ranks together, is long enough to gain from compiled kernels."""
    widths = shape.num_layers * (shape.hidden_size + shape.intermediate_size) / (grid.tp_size * grid.pp_size)
    return num_tokens / grid.dp_size * widths >= least_work


# The micro-batches of a step ------------------------------------------------------------------------------------------


SampleRow = NDArray[np.bool_]
"""Whether each token of a row's samples, end to end, is supervised; never the first of a sample."""


class ShareShape(NamedTuple):
    """The part of a micro-batch that one adapter owns.

    Attributes:
        adapter: its number in the layout.
        num_tokens: its positions, padding included.
        num_after: those of them that are computed after the last attention; see `Supervised`.
    """

    adapter: int
    num_tokens: int
    num_after: int


@dataclass(frozen=True)
class MicroBatchShape:
    """The sizes of a micro-batch that its messages and its work depend on.

    Attributes:
        num_rows, length: of its tokens; those of a bank's micro-batch are one row.
        shares: one for each adapter that it has tokens of.
        squared_lengths: the sum of s^2 over its documents of s tokens, for attention.
    """

    num_rows: int
    length: int
    num_supervised: int
    shares: tuple[ShareShape, ...]
    squared_lengths: int = 0

    @property
    def num_tokens(self) -> int:
        """The positions, padding included."""
        return self.num_rows * self.length

    @property
    def adapters(self) -> tuple[int, ...]:
        """The numbers of the adapters that it has tokens of."""
        return tuple(share.adapter for share in self.shares)


@dataclass(frozen=True)
class Batches:
    """The micro-batches of a step on a data-parallel rank.

    Attributes:
        kinds: the different ones.
        order: by micro-batch in the order in which they run, its index in `kinds`.
        numbers: by kind, how many there are.
    """

    kinds: tuple[MicroBatchShape, ...]
    order: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, shapes: Iterable[MicroBatchShape]) -> Batches:
        """Micro-batches in their order."""
        indices: dict[MicroBatchShape, int] = {}
        order = tuple(indices.setdefault(batch, len(indices)) for batch in shapes)
        numbers = Counter(order)
        return cls(tuple(indices), order, tuple(numbers[index] for index in range(len(indices))))

    def __len__(self) -> int:
        return len(self.order)

    @property
    def shapes(self) -> tuple[MicroBatchShape, ...]:
        """Their shapes, in order."""
        return tuple(self.kinds[index] for index in self.order)

    @property
    def adapters(self) -> list[int]:
        """The numbers of the adapters that take the step."""
        return sorted({adapter for batch in self.kinds for adapter in batch.adapters})


def assumed_row(layout: Layout) -> SampleRow:
    """A row of a run without data: one full sample, of which all tokens are supervised.

    No position predicts the first token of a sample.
    """
    row: SampleRow = np.arange(layout.length) > 0
    return row


def shared_shape(layout: Layout, parts: Sequence[tuple[int, Sequence[SampleRow]]]) -> MicroBatchShape:
    """The shape of a micro-batch of rows of several adapters. The position before a token predicts it.

    Args:
        parts: the number of each adapter in the layout, and its rows.
    """
    shares, num_supervised = _shares(layout, parts)
    num_tokens, num_rows = sum(share.num_tokens for share in shares), len(parts[0][1]) if len(parts) == 1 else 1
    return MicroBatchShape(num_rows, num_tokens // num_rows, num_supervised, shares)


def _shares(layout: Layout, parts: Sequence[tuple[int, Sequence[SampleRow]]]) -> tuple[tuple[ShareShape, ...], int]:
    """The shares, and the number of supervised positions.

    In each part of the sequence an adapter's supervised positions are padded, and then all of them, up to as many as
    the part with most has, with positions of the part's last adapter.
    """
    lengths = [padded(max(1, *map(len, rows)), layout.pad_multiple) for _, rows in parts]
    sizes = [length * len(rows) for length, (_, rows) in zip(lengths, parts, strict=True)]
    starts = np.cumsum([0, *sizes])
    edges = np.arange(layout.sequence_parts + 1) * (starts[-1] // layout.sequence_parts)
    after = np.zeros((layout.sequence_parts, len(parts)), dtype=np.int64)
    total, last = 0, np.zeros(layout.sequence_parts, dtype=np.int64)
    for index, ((_, rows), length) in enumerate(zip(parts, lengths, strict=True)):
        places = [starts[index] + number * length + np.flatnonzero(row) - 1 for number, row in enumerate(rows)]
        counts = np.diff(np.searchsorted(np.concatenate(places), edges))
        here = (edges[:-1] < starts[index + 1]) & (edges[1:] > starts[index])
        after[here, index] = [padded_positions(int(count)) for count in counts[here]]
        last[here], total = index, total + int(counts.sum())
    by_part = after.sum(axis=1)
    after[np.arange(len(last)), last] += by_part.max() - by_part
    found = zip(parts, sizes, after.sum(axis=0).tolist(), strict=True)
    return tuple(ShareShape(adapter, size, num_after) for (adapter, _), size, num_after in found), total
