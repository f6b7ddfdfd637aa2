"""Arithmetic for what each pipeline stage of a layout holds, and for the blocks that have a backward pass.

The ranks of a stage hold equal amounts, so one `StagePlan` describes all of them. `memory` predicts the bytes that a
stage needs, and `traffic` the messages that it sends.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.base.base_formats import BASE_FORMATS, SCALE_BYTES
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, TARGET_NAMES, ModelShape
from megatron_tiedlora.model.weights import WeightRule, stage_weight_rules
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.partition import layer_costs, partition


class StoredTensor(NamedTuple):
    """A parameter of a base: its elements, the bytes of each, and whether it belongs to a quantised weight."""

    size: int
    itemsize: int
    quantised: bool = False

    @property
    def num_bytes(self) -> int:
        """All of its bytes."""
        return self.size * self.itemsize


def stored_tensors(
    rule: WeightRule, shape: ModelShape, layout: Layout, tp_size: int = 1
) -> tuple[StoredTensor, ...]:
    """The parameters that store a rank's shard of a weight: one, or codes and scales if it is quantised."""
    local_shape = rule.spec.local_shape(rule.shape, tp_size)
    if layout.base is None or not rule.is_quantised(shape):
        return (StoredTensor(math.prod(local_shape), layout.dtype.itemsize),)
    rows, width = local_shape
    storage, shards_rows = BASE_FORMATS[layout.base], rule.spec.dim == 1 and tp_size > 1
    scales = rows * storage.row_scales(width, shards_rows=shards_rows)
    codes = StoredTensor(rows * storage.row_bytes(width), 1, True)
    copies = (codes,) if layout.keep_transposed else ()
    return (codes, StoredTensor(scales, SCALE_BYTES, True), *copies)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a model under a layout.

    Attributes:
        layers: the stage's entries of the flat list (embedding 0, blocks from 1, head last).
        parts: the part of each adapter that tensor-parallel rank 0 holds; the others hold as many numbers.
        local_base: the base parameters of a rank, with padding of the vocabulary and a copied head: how many there are
            of each size.
        full_base_bytes: the bytes of the base parameters of all ranks of the stage together, without padding.
        cost_share: the stage's share of the work of all stages.
    """

    shape: ModelShape
    layout: Layout
    index: int
    layers: range
    parts: tuple[AdapterPart, ...]
    local_base: Mapping[StoredTensor, int]
    full_base_bytes: int
    cost_share: float

    @property
    def part(self) -> AdapterPart:
        """The part of the only adapter."""
        (part,) = self.parts
        return part

    @property
    def adapted(self) -> tuple[int, ...]:
        """The layers that an adapter adapts."""
        return tuple(layer for layer in self.layers if any(layer in part.layers for part in self.parts))

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.index == self.layout.pp_size - 1

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The blocks among its layers."""
        return tuple(layer for layer in self.layers if 1 <= layer <= self.shape.num_layers)

    @property
    def needs_input_gradient(self) -> bool:
        """Whether an earlier stage has an adapted layer."""
        return self.layout.first_adapted < self.blocks[0]

    @cached_property
    def base_bytes(self) -> int:
        """The bytes of a rank's base parameters."""
        return sum(number * tensor.num_bytes for tensor, number in self.local_base.items())

    @property
    def quantised_bytes(self) -> int:
        """Those of them that store quantised weights."""
        return sum(number * tensor.num_bytes for tensor, number in self.local_base.items() if tensor.quantised)

    @property
    def dequantised_bytes(self) -> int:
        """The bytes of the memory into which a rank dequantises one weight after another; 0 for a plain base.

        GPUs that multiply in fp8 transpose codes there, unless transposed copies are kept.
        """
        layout = self.layout
        if layout.base is None:
            return 0
        largest = max(linear.num_weights for linear in self.shape.block.linears) // layout.tp_size
        if layout.products is None or not layout.on_gpu:
            return largest * layout.dtype.itemsize
        return 0 if layout.keep_transposed else largest

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """The numbers in each trained tensor of a rank.

        A stage without adapted layers has an anchor of one number, and so has every stage that has a bank.
        """
        anchor = (1,) if self.layout.is_bank or not self.part.layers else ()
        return (*anchor, *(part.local_size(name) for part in self.parts for name in trained_tensors(part)))

    @property
    def held(self) -> tuple[int, ...]:
        """The numbers in each tensor of a rank outside the base: trained ones, then frozen factors."""
        return (*self.trained, *(part.local_size(name) for part in self.parts for name in frozen_tensors(part)))

    def ends_in(self, block: int) -> bool:
        """Whether the head follows a block."""
        return self.is_last and block == self.blocks[-1]

    def owned_by(self, adapters: Sequence[int] = (0,)) -> StageOwners:
        """What the stage does with a micro-batch whose tokens belong to these adapters of the layout."""
        return StageOwners(self, tuple(adapters))


def trained_tensors(part: AdapterPart) -> list[str]:
    """The trained tensors of a rank's part."""
    return [name for name in part.config.num_trained() if part.exists(name)]


def frozen_tensors(part: AdapterPart) -> list[str]:
    """Its frozen factors."""
    return [name for name in part.config.tensors if part.exists(name) and not part.config.factor(name).trained]


def gathered_numbers(part: AdapterPart) -> int:
    """The numbers of a rank's part that it gathers for each micro-batch."""
    return sum(part.local_size(name) for name in part.config.tensors if part.is_gathered(name))


class BlockKind(NamedTuple):
    """The blocks of a stage that do the same work: one of them, and how many they are.

    Attributes:
        ends_here: whether the head follows it.
        goes_back: whether it has a backward pass.
    """

    example: int
    number: int
    ends_here: bool
    goes_back: bool


@dataclass(frozen=True)
class StageOwners:
    """A stage for a micro-batch whose tokens belong to some of the adapters: what is adapted, and what has a gradient.

    Attributes:
        adapters: their numbers in the layout.
    """

    stage: StagePlan
    adapters: tuple[int, ...]

    @cached_property
    def parts(self) -> tuple[AdapterPart, ...]:
        """Their parts."""
        return tuple(self.stage.parts[number] for number in self.adapters)

    @cached_property
    def backward_blocks(self) -> tuple[int, ...]:
        """The blocks that have a backward pass. Blocks below the first adapted layer have none."""
        everywhere = self.stage.needs_input_gradient
        return tuple(block for block in self.stage.blocks if everywhere or block >= self._first)

    @cached_property
    def kinds(self) -> tuple[BlockKind, ...]:
        """The stage's blocks by what they do, in the order of their first ones."""
        stage, adapted = self.stage, [frozenset(part.layers) for part in self.parts]
        everywhere, last = stage.needs_input_gradient, stage.blocks[-1] if stage.is_last else None
        found: dict[tuple[tuple[bool, ...], bool, bool], list[int]] = {}
        for block in stage.blocks:  # what is adapted, and whether its input needs a gradient, decide the rest
            earlier = everywhere or self._first < block
            own = tuple(block in layers for layers in adapted)
            found.setdefault((own, earlier, block == last), []).append(block)
        return tuple(
            BlockKind(blocks[0], len(blocks), ends_here, goes_back=earlier or any(own))
            for (own, earlier, ends_here), blocks in found.items()
        )

    @cached_property
    def _first(self) -> float:
        return min((part.layers[0] for part in self.parts if part.layers), default=math.inf)

    @cached_property
    def _adapting(self) -> dict[tuple[int, str], list[AdapterPart]]:
        found: dict[tuple[int, str], list[AdapterPart]] = {}
        for part in self.parts:
            for layer in part.layers:
                for target in part.config.targets:
                    found.setdefault((layer, target.name), []).append(part)
        return found

    def adapting(self, block: int, name: str) -> Sequence[AdapterPart]:
        """The parts that adapt a linear in one of the stage's blocks."""
        return self._adapting.get((block, name), ())

    def adapts(self, block: int, name: str) -> bool:
        """Whether one of them does."""
        return (block, name) in self._adapting

    def trains_a(self, block: int, name: str) -> bool:
        """Whether A of one of them is trained there."""
        return any(part.config.method_spec.A.trained for part in self.adapting(block, name))

    def trains_f(self, block: int, name: str) -> bool:
        """Whether F of one of them is trained there."""
        return any(part.config.method_spec.trains_f for part in self.adapting(block, name))

    def ax_columns(self, block: int, name: str) -> int:
        """The columns of A x beside the input of a linear, those of the widest rank; 0 if it is not adapted there."""
        return max((part.config.rank for part in self.adapting(block, name)), default=0)

    def needs(self, block: int) -> dict[str, bool]:
        """See `needs_gradient`."""
        earlier = self.stage.needs_input_gradient or self._first < block
        return needs_gradient([name for name in TARGET_NAMES if self.adapts(block, name)], earlier=earlier)

    def reads_mlp_input(self, block: int) -> bool:
        """Whether the backward pass of a block's MLP computes something from gate and up."""
        return self.trains_a(block, DOWN) or self.adapts(block, GATE_UP) or self.needs(block)[GATE_UP]


def needs_gradient(adapted: Collection[str], *, earlier: bool) -> dict[str, bool]:
    """Whether the input of each linear of a block needs a gradient, by name, in the order of their computation.

    Args:
        adapted: the linears that are adapted in this block.
        earlier: whether an earlier layer is adapted.
    """
    return {
        name: earlier or any(before in adapted for before in TARGET_NAMES[:number])
        for number, name in enumerate(TARGET_NAMES)
    }


def plan_stages(shape: ModelShape, layout: Layout) -> tuple[StagePlan, ...]:
    """All stages of the model, in order. The layout must fit the model (see `check_layout`)."""
    tp_size = layout.tp_size
    costs = layer_costs(shape, length=layout.length, first_adapted=layout.first_adapted)
    sizes: dict[Hashable, tuple[tuple[StoredTensor, ...], int]] = {}  # blocks have weights of the same sizes
    stages = []
    for index, layers in enumerate(partition(costs, layout.pp_size)):
        local_base, full_base_bytes = Counter[StoredTensor](), 0
        weights = _weights(shape, has_embedding=index == 0)
        numbers = Counter(size for layer in layers for size in weights.by_layer.get(layer, ()))
        for size, number in numbers.items():
            rule, key = weights.sizes[size], (index == 0, size)
            if key not in sizes:
                full = sum(tensor.num_bytes for tensor in stored_tensors(rule, shape, layout))
                sizes[key] = stored_tensors(rule, shape, layout, tp_size), full
            local, full = sizes[key]
            full_base_bytes += number * full
            for tensor in local:
                local_base[tensor] += number
        stages.append(
            StagePlan(
                shape,
                layout,
                index,
                layers,
                parts=tuple(
                    AdapterPart(adapter, tuple(layer for layer in adapter.layers if layer in layers), 0, tp_size)
                    for adapter in layout.adapters
                ),
                local_base=local_base,
                full_base_bytes=full_base_bytes,
                cost_share=sum(costs[layer] for layer in layers) / sum(costs),
            )
        )
    return tuple(stages)


class _Weights(NamedTuple):
    """The weights of a stage: one of each size, and by entry of the flat list the indices of its weights among them."""

    sizes: Sequence[WeightRule]
    by_layer: Mapping[int, Sequence[int]]


@cache
def _weights(shape: ModelShape, *, has_embedding: bool) -> _Weights:
    found: dict[Hashable, tuple[int, WeightRule]] = {}
    by_layer: dict[int, list[int]] = {}
    for rule in stage_weight_rules(shape, has_embedding=has_embedding):
        index, _ = found.setdefault((rule.spec, rule.shape, rule.is_quantised(shape)), (len(found), rule))
        by_layer.setdefault(rule.layer, []).append(index)
    return _Weights([rule for _, rule in found.values()], by_layer)
