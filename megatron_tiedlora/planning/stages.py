"""Arithmetic for what each pipeline stage of a layout holds, and for the blocks that have a backward pass.

The ranks of a stage hold equal amounts, so one `StagePlan` describes all of them. `memory` predicts the bytes that a
stage needs, and `traffic` the messages that it sends.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.base.base_formats import BASE_FORMATS, SCALE_BYTES
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.weights import WeightRule, stage_weight_rules
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.trace import Kind


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
    if layout.base_format is None or not rule.is_quantised(shape):
        return (StoredTensor(math.prod(local_shape), layout.dtype.itemsize),)
    rows, width = local_shape
    storage, shards_rows = BASE_FORMATS[layout.base_format], rule.spec.dim == 1 and tp_size > 1
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
        if layout.base_format is None:
            return 0
        largest = max(linear.num_weights for linear in self.shape.block.linears) // layout.tp_size
        if layout.products is None or not layout.on_gpu:
            return largest * layout.dtype.itemsize
        return 0 if layout.keep_transposed else largest

    @cached_property
    def trained(self) -> tuple[int, ...]:
        """The numbers in each trained tensor of a rank.

        A stage has an anchor of one number too, unless an engine finds adapted layers in it.
        """
        anchor = () if self.layout.engine_steps and self.part.layers else (1,)
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
    """The blocks of a stage that do the same work.

    Attributes:
        traced: what they do.
        goes_back: whether they have a backward pass.
    """

    traced: Kind
    blocks: tuple[int, ...]
    goes_back: bool

    @property
    def number(self) -> int:
        """How many they are."""
        return len(self.blocks)


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
    def kinds(self) -> tuple[BlockKind, ...]:
        """The stage's blocks by what they do, in the order of their first ones.

        Blocks below the first adapted layer have no backward pass.
        """
        stage, everywhere = self.stage, self.stage.needs_input_gradient
        adapters = [(frozenset(part.layers), part.config.of_one_layer) for part in self.parts]
        first = min((part.layers[0] for part in self.parts if part.layers), default=math.inf)
        found: dict[Kind, list[int]] = {}
        for block in stage.blocks:
            owners = tuple(config if block in layers else None for layers, config in adapters)
            kind = Kind(
                owners,
                earlier=everywhere or first < block,
                ends=stage.ends_in(block),
                rotates=stage.shape.rope_of(block) is not None,
            )
            found.setdefault(kind, []).append(block)
        return tuple(
            BlockKind(kind, tuple(blocks), goes_back=kind.earlier or any(kind.owners)) for kind, blocks in found.items()
        )


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


# The partition --------------------------------------------------------------------------------------------------------


Stages = tuple[range, ...]


def layer_costs(shape: ModelShape, *, length: int, first_adapted: int | None) -> list[float]:
    """The multiplications per token of every layer of the flat list (embedding, blocks, head), both passes together.

    A block has P = the numbers in its matrices, for matmuls, and A = s h for causal attention over s tokens (h: width
    of the queries). Its forward pass costs P + A, its backward pass P + 2A from the first adapted layer on. The head
    costs V d each way, as if every position were supervised. The embedding costs nothing.

    Args:
        first_adapted: 1-based; None: nothing is trained, and no layer has a backward pass.
    """
    matmuls = shape.block.num_weights
    attention = length * shape.heads.rows[0]
    costs = [0.0]
    for index in range(1, shape.num_layers + 1):
        backward = matmuls + 2 * attention if first_adapted is not None and index >= first_adapted else 0.0
        costs.append(float(matmuls + attention + backward))
    costs.append(float((1 if first_adapted is None else 2) * shape.head.num_weights))
    return costs


def partition(costs: Sequence[float], num_stages: int) -> Stages:
    """Partition layers 0 to len(costs) - 1 into `num_stages` ranges, each with a block (no stage is the head alone).

    It minimises the largest cost of a stage and, among the partitions that do, the sum of squares.

    Raises:
        ValueError: fewer blocks than stages.
    """
    return _partition(tuple(costs), num_stages)


@cache
def _partition(costs: tuple[float, ...], num_stages: int) -> Stages:
    num_blocks = len(costs) - 2
    if num_stages > num_blocks:
        raise ValueError(f"{num_blocks} layers cannot be partitioned into {num_stages} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # Two passes: the smallest largest cost, then the smallest sum of squares that does not exceed it.
    least, _ = _best_cuts(total, num_stages, lambda before, cost: max(before, cost))
    _, cuts = _best_cuts(total, num_stages, lambda before, cost: before + cost * cost, largest=least)
    return tuple(range(start, stop) for start, stop in zip((0, *cuts), cuts, strict=False))


def _best_cuts(
    total: Sequence[float], num_stages: int, add: Callable[[float, float], float], *, largest: float = math.inf
) -> tuple[float, tuple[int, ...]]:
    """The cuts with the least value, and the value: `add` takes a stage's cost into the value of those before it.

    Args:
        total: cost of the layers before each.
        largest: no stage may cost more.
    """
    num_layers = len(total) - 1
    # best[stop]: (value, cuts) of layers 0 to stop - 1 in the stages so far; a cut lies after a block.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        left = num_stages - stage - 1
        stops = [num_layers] if left == 0 else range(stage + 2, num_layers - left)
        following = {}
        for stop in stops:
            choices = []
            for start, (value, cuts) in best.items():
                cost = total[stop] - total[start]
                if stop - start >= (2 if start == 0 or stop == num_layers else 1) and cost <= largest:
                    choices.append((add(value, cost), (*cuts, stop)))
            if choices:
                following[stop] = min(choices)
        best = following
    return best[num_layers]
