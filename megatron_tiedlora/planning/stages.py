"""Arithmetic for what each pipeline stage of a layout holds, and for the blocks that have a backward pass.

The ranks of a stage hold equal amounts, so one `StagePlan` describes all of them. `memory` predicts the bytes that a
stage needs, and `traffic` the messages that it sends.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.partition import layer_costs, partition
from megatron_tiedlora.parallel.fp8_products import weight_maker
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
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


@cache
def stored_tensors(
    shape: ModelShape, dtype: torch.dtype, tp_size: int, base_format: str | None, products: str | None, transposed: bool
) -> Mapping[str, Counter[StoredTensor]]:
    """The parameters that a rank holds of the embedding, of a block and of the head: how many of each size.

    They are those of the modules, which are built without memory. All blocks have the same.
    """
    with torch.device("meta"):
        maker = weight_maker(base_format, products=products, keep_transposed=transposed)
        specs = layer_specs(shape, dtype=dtype, tp_size=tp_size, make_weight=maker)
        modules = {spec.kind: spec.build() for spec in (specs[0], specs[1], specs[-1])}
    found = {}
    for kind, module in modules.items():
        quantised = {
            id(parameter)
            for weight in frozen_weights(module).values()
            if isinstance(weight, QuantisedWeight)
            for parameter in weight.parameters.values()
        }
        found[kind] = Counter(
            StoredTensor(parameter.numel(), parameter.itemsize, id(parameter) in quantised)
            for parameter in module.parameters()
        )
    return found


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
    costs = layer_costs(shape, length=layout.length, first_adapted=layout.first_adapted)
    storage = layout.base_format, layout.products, layout.keep_transposed
    local, full = (stored_tensors(shape, layout.dtype, size, *storage) for size in (layout.tp_size, 1))
    stages = []
    for index, layers in enumerate(partition(costs, layout.pp_size)):
        is_first, is_last = index == 0, index == layout.pp_size - 1
        # With tied embeddings a head without the embedding has its own copy.
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
                parts=tuple(
                    AdapterPart(adapter, tuple(layer for layer in adapter.layers if layer in layers), 0, layout.tp_size)
                    for adapter in layout.adapters
                ),
                local_base=local_base,
                full_base_bytes=sum(number * tensor.num_bytes for tensor, number in full_base.items()),
                cost_share=sum(costs[layer] for layer in layers) / sum(costs),
            )
        )
    return tuple(stages)
