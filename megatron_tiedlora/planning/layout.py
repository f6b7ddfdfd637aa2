"""Describe the layout of a run over its ranks: the micro-batches of a step, and the contents of each pipeline stage.

The planners read only a `Layout` and a `ModelShape`. A run makes one `Layout` from its settings (`RunPlan.layout`), and
`tiedlora plan` makes one for each layout that it compares. A micro-batch has tokens of one or several adapters, whose
rows are concatenated.

All ranks of a stage hold tensors of equal sizes, so one `StagePlan` describes these ranks. `memory` predicts the bytes
that they need. `passes` counts their computation and messages.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterShard
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import UNQUANTISED, ModelShape
from megatron_tiedlora.config.fields import parse_rate_factors
from megatron_tiedlora.model import batch, weights
from megatron_tiedlora.model.layer_specs import StoredTensor, stored_tensors
from megatron_tiedlora.parallel.frozen_weight import MESSAGE_MULTIPLE, padded
from megatron_tiedlora.planning.trace import Kind

# On a GPU the allocator caches blocks of every requested size. Fewer sizes mean a smaller cache if expandable segments
# are off (docs/performance.md).
GPU_MULTIPLE = 128


class Storage(NamedTuple):
    """The storage and matmul format of the linears of the blocks: --base, --products and others.

    Attributes:
        base: the storage format, a key of `BASE_FORMATS`; None for the dtype of the base.
        products: "fp8" if the inputs of these linears are rounded to fp8 too.
        keep_transposed: whether linears with `products` keep a transposed copy of their quantised weights.
        adapter_in_matmul: whether weights after a norm have columns for the adapter's update.
    """

    base: str | None = None
    products: str | None = None
    keep_transposed: bool = False
    adapter_in_matmul: bool = False

    @property
    def name(self) -> str:
        """The name of the format, one of `FORMAT_NAMES`."""
        if self.products is None:
            return self.base or UNQUANTISED
        return "fp8-transposed" if self.keep_transposed else "fp8-products"


PLAIN_STORAGE = Storage()


@dataclass(frozen=True)
class Layout:
    """The parallel configuration and the micro-batches of a training run.

    Attributes:
        adapters: the adapters that are trained.
        length: the maximum number of tokens in a row of a micro-batch.
        rows: the maximum number of rows in a micro-batch.
        micro_batches: the maximum number of micro-batches of a rank in one step.
        tp_size, pp_size, dp_size: the degrees of tensor, pipeline and data parallelism.
        shards_sequences: whether activations between layers are sharded along the sequence if tp_size is above 1.
        overlap: whether micro-batches are computed in two halves, so that messages overlap with computation.
        zero_stage: the ZeRO stage, 0 to 3.
        rate_factors: the text of --rate_factors.
        live_parameters: the number of gathered elements above which ZeRO-3 gathers no more base weights.
        overlaps_gathers: whether ZeRO-3 gathers weights during computation.
        dtype: the dtype of the base, and of activations.
        storage: the storage and matmul format of the linears of the blocks.
        recompute: "none", "selective" (gate and up) or "full" (complete blocks).
        on_gpu: whether the ranks run on GPUs. Rows then have more padding, and libraries also need memory.
        compiled: whether kernels are compiled.
        deterministic: whether every sum has a fixed order.
        named: whether the adapters have names, as with --adapters, even if there is only one.
    """

    adapters: tuple[AdapterConfig, ...]
    length: int
    rows: int = 1
    micro_batches: int = 1
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    shards_sequences: bool = True
    overlap: bool = False
    zero_stage: int = 0
    rate_factors: str | None = None
    live_parameters: int = 1_000_000_000
    overlaps_gathers: bool = False
    dtype: torch.dtype = torch.bfloat16
    storage: Storage = PLAIN_STORAGE
    recompute: str = "none"
    on_gpu: bool = False
    compiled: bool = True
    deterministic: bool = False
    named: bool = False

    def __post_init__(self) -> None:
        assert self.named or len(self.adapters) == 1, "several adapters have names"

    @cached_property
    def first_adapted(self) -> int:
        """The index of the first layer that has an adapter."""
        return min(adapter.layers[0] for adapter in self.adapters)

    @property
    def engine_steps(self) -> bool:
        """Whether DeepSpeed sums the adapter's gradients and updates its tensors (`build.steps_by_engine`)."""
        return self.zero_stage > 0 and not self.named

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def rounds(self) -> bool:
        """Whether compiled kernels also round their results to fp8, for the blocks' matmuls."""
        return self.storage.products is not None and self.compiled

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between layers are sharded along the sequence."""
        return self.shards_sequences and self.tp_size > 1

    @property
    def sequence_parts(self) -> int:
        """The number of shards of activations between layers along the sequence."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def pad_multiple(self) -> int:
        """The multiple to which lengths are padded, so that sequence parallelism can divide them into equal shards.

        It is the least common multiple of the number of shards and 8 (on GPUs 128). Padding does not change the loss.
        """
        return math.lcm(GPU_MULTIPLE if self.on_gpu else batch.PAD_MULTIPLE, self.sequence_parts)


# The micro-batches of a step ------------------------------------------------------------------------------------------


SampleRow = NDArray[np.bool_]
"""One boolean per token of a row, True for supervised tokens. The first token of a sample is never supervised."""


class MicroBatchShape(NamedTuple):
    """The sizes of a micro-batch that determine its messages and its work.

    Attributes:
        adapters: the indices, in the layout, of the adapters with tokens in the micro-batch.
        tokens: the number of positions of each of these adapters, padding included.
        after: for each of these adapters, the positions that are computed after the last attention; see `Supervised`.
        lengths: the number of tokens of each document, which determine the FLOPs of attention.
        halves: the two halves of its rows, if they are computed alternately.
    """

    adapters: tuple[int, ...]
    tokens: tuple[int, ...]
    after: tuple[int, ...]
    num_supervised: int
    lengths: tuple[int, ...] = ()
    halves: "tuple[MicroBatchShape, ...]" = ()

    @property
    def num_tokens(self) -> int:
        """The number of positions of all adapters, padding included."""
        return sum(self.tokens)


def shared_shape(
    layout: Layout, parts: Sequence[tuple[int, Sequence[SampleRow]]], *, longest: int = 1
) -> MicroBatchShape:
    """Return the shape of a micro-batch with rows of several adapters. The position before a token predicts the token.

    In each shard of the sequence, the supervised positions of each adapter are padded. Then the last adapter of each
    shard gets more positions, until all shards are as large as the largest shard.

    Args:
        parts: the index of each adapter in the layout, and its rows.
        longest: the least length of a row.
    """
    lengths = [padded(max(longest, *map(len, rows)), layout.pad_multiple) for _, rows in parts]
    (adapter, rows), half = parts[0], len(parts[0][1]) // 2
    if layout.overlap and len(parts) == 1 and len(rows) == 2 * half:
        plain = replace(layout, overlap=False)
        halves = [shared_shape(plain, [(adapter, own)], longest=lengths[0]) for own in (rows[:half], rows[half:])]
        tokens = (sum(own.num_tokens for own in halves),)
        later, supervised = (sum(own.after[0] for own in halves),), sum(own.num_supervised for own in halves)
        return MicroBatchShape((adapter,), tokens, later, supervised, halves=tuple(halves))
    sizes = [length * len(rows) for length, (_, rows) in zip(lengths, parts, strict=True)]
    starts = np.cumsum([0, *sizes])
    edges = np.arange(layout.sequence_parts + 1) * (starts[-1] // layout.sequence_parts)
    after = np.zeros((layout.sequence_parts, len(parts)), dtype=np.int64)
    total, last = 0, np.zeros(layout.sequence_parts, dtype=np.int64)
    for index, ((_, rows), length) in enumerate(zip(parts, lengths, strict=True)):
        places = [starts[index] + number * length + np.flatnonzero(row) - 1 for number, row in enumerate(rows)]
        counts = np.diff(np.searchsorted(np.concatenate(places), edges))
        here = (edges[:-1] < starts[index + 1]) & (edges[1:] > starts[index])
        after[here, index] = [batch.padded_positions(int(count)) for count in counts[here]]
        last[here], total = index, total + int(counts.sum())
    by_part = after.sum(axis=1)
    after[np.arange(len(last)), last] += by_part.max() - by_part
    adapters = tuple(adapter for adapter, _ in parts)
    return MicroBatchShape(adapters, tuple(sizes), tuple(after.sum(axis=0).tolist()), total)


# The stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePlan:
    """One pipeline stage of a model in a layout.

    Attributes:
        layers: the indices of the stage's layers in the flat list (embedding 0, blocks from 1, head last).
        parts: the shard of each adapter on tensor-parallel rank 0. The shards of the other ranks have the same size.
        local_base: the number of base tensors of each size on a rank, including vocabulary padding and a copy of tied
            embeddings.
        full_base_bytes: the bytes of the base parameters of all ranks of the stage together, without padding.
        cost_share: the fraction of the model's work that this stage does.
    """

    shape: ModelShape
    layout: Layout
    index: int
    layers: range
    parts: tuple[AdapterShard, ...]
    local_base: Mapping[StoredTensor, int]
    full_base_bytes: int
    cost_share: float

    @property
    def is_first(self) -> bool:
        """Whether the stage has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage has the head."""
        return self.index == self.layout.pp_size - 1

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The indices of the blocks among the stage's layers."""
        return tuple(layer for layer in self.layers if 1 <= layer <= self.shape.num_layers)

    @cached_property
    def base_bytes(self) -> int:
        """The bytes of a rank's base parameters."""
        return sum(number * tensor.num_bytes for tensor, number in self.local_base.items())

    @property
    def quantised_bytes(self) -> int:
        """The bytes of a rank's base parameters that store quantised weights."""
        return sum(number * tensor.num_bytes for tensor, number in self.local_base.items() if tensor.quantised)

    @property
    def dequantised_bytes(self) -> int:
        """The bytes of the buffer into which a rank dequantises one weight after another; 0 if none is quantised.

        For FP8 matmuls, GPUs transpose quantised weights in this buffer, unless transposed copies are kept.
        """
        layout, storage = self.layout, self.layout.storage
        if storage.base is None:
            return 0
        largest = max(linear.num_weights for linear in self.shape.block.linears) // layout.tp_size
        if storage.products is None or not layout.on_gpu:
            return largest * layout.dtype.itemsize
        return 0 if storage.keep_transposed else largest

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """The number of elements of each trained tensor on a rank.

        The first size is 1, of a dummy parameter, if DeepSpeed trains no adapted layer of the stage.
        """
        anchor = () if self.layout.engine_steps and self.parts[0].layers else (1,)
        return (*anchor, *(part.local_size(name) for part in self.parts for name in part.names(trained=True)))

    @property
    def parameter_groups(self) -> Mapping[float, int]:
        """The number of trained elements on a rank by their multiple of the learning rate."""
        factors, found = parse_rate_factors(self.layout.rate_factors), Counter[float]()
        for part in self.parts:
            for name in part.names(trained=True):
                found[factors.get(part.config.tensors[name][1], 1.0)] += part.local_size(name)
        found[1.0] += sum(self.trained) - found.total()  # a dummy parameter, if there is one
        return +found

    @property
    def num_norms(self) -> int:
        """The number of gradient norms that a step sums over ranks for an adapter; DeepSpeed has one per group."""
        return len(self.parameter_groups) if self.layout.engine_steps else 1

    @property
    def held(self) -> tuple[int, ...]:
        """The number of elements of each adapter tensor on a rank: first trained tensors, then frozen ones."""
        return (*self.trained, *(part.local_size(name) for part in self.parts for name in part.names(trained=False)))

    def for_adapters(self, adapters: Sequence[int]) -> "StagePlan":
        """Return a copy of the stage that has only some adapters, given by their indices in the layout."""
        return replace(self, parts=tuple(self.parts[number] for number in adapters))

    @cached_property
    def kinds(self) -> Mapping[Kind, Sequence[int]]:
        """The blocks of each kind, in the order in which kinds first occur. Blocks of one kind do the same work."""
        everywhere = self.layout.first_adapted < self.blocks[0]  # an earlier stage has an adapted layer
        adapters = [(frozenset(part.layers), part.config.of_one_layer) for part in self.parts]
        first = min((part.layers[0] for part in self.parts if part.layers), default=math.inf)
        found: dict[Kind, list[int]] = {}
        for block in self.blocks:
            adapting = tuple(config if block in layers else None for layers, config in adapters)
            rope, window = self.shape.kind_of(block)
            kind = Kind(
                adapting,
                earlier=everywhere or first < block,
                ends=self.is_last and block == self.blocks[-1],
                rotates=rope is not None,
                window=window,
            )
            found.setdefault(kind, []).append(block)
        return found


def check_adapters(shape: ModelShape, layout: Layout, *, several: bool) -> None:
    """Raise UserError if the layout cannot train the adapter with --adapter_in_matmul or --rate_factors.

    With --adapter_in_matmul, weights have columns for the update of one adapter. With --rate_factors, ZeRO-1 sums a
    norm over the stages for each rate, so a stage with fewer rates would let the others wait forever.
    """
    reasons = {
        "a base that is not quantised": layout.storage.base is not None,
        f"a --rank of at most {MESSAGE_MULTIPLE}": any(adapter.rank > MESSAGE_MULTIPLE for adapter in layout.adapters),
        "a ZeRO stage below 3 (--ds_config)": layout.zero_stage == 3,
        "a single adapter (no --adapters)": several,
    }
    missing = [reason for reason, found in reasons.items() if found]
    if layout.storage.adapter_in_matmul and missing:
        raise UserError(f"--adapter_in_matmul true needs {missing[0]}. Remove --adapter_in_matmul")
    if layout.rate_factors and len({stage.num_norms for stage in plan_stages(shape, layout)}) > 1:
        raise UserError("--rate_factors with ZeRO-1 needs --layers on every stage; else give --ds_config zero0.json")


def plan_stages(shape: ModelShape, layout: Layout) -> tuple[StagePlan, ...]:
    """Return all stages of the model in order. The layout must fit the model (see `check_layout`)."""
    costs = weights.layer_costs(shape, length=layout.length, first_adapted=layout.first_adapted)
    storage = layout.storage._asdict()
    local, full = (stored_tensors(shape, layout.dtype, size, **storage) for size in (layout.tp_size, 1))
    stages = []
    for index, layers in enumerate(weights.partition(costs, layout.pp_size)):
        is_first, is_last = index == 0, index == layout.pp_size - 1
        # With tied embeddings, a last stage without the embedding has its own copy.
        parts = {"embedding": is_first + (is_last and not is_first and shape.tied_embeddings), "head": int(is_last)}
        parts["block"] = len(layers) - is_first - is_last
        local_base, full_base = Counter[StoredTensor](), Counter[StoredTensor]()
        for kind, number in parts.items():
            for tensors, base in ((local, local_base), (full, full_base)):
                base.update({tensor: number * count for tensor, count in tensors[kind].items() if number})
        stages.append(
            StagePlan(
                shape,
                layout,
                index,
                layers,
                parts=tuple(AdapterShard.of_stage(adapter, layers, 0, layout.tp_size) for adapter in layout.adapters),
                local_base=local_base,
                full_base_bytes=sum(number * tensor.num_bytes for tensor, number in full_base.items()),
                cost_share=sum(costs[layer] for layer in layers) / sum(costs),
            )
        )
    return tuple(stages)
