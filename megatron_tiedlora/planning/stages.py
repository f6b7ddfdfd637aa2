"""Arithmetic for what each pipeline stage of a layout holds, and for the blocks that have a backward pass.

The ranks of a stage hold equal amounts, so one `StagePlan` describes all of them. `memory` predicts the bytes that a
stage needs, and `traffic` the messages that it sends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterPart
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
        part: the part of the adapter that tensor-parallel rank 0 holds; the others hold as many numbers.
        local_base: each base parameter of a rank, with padding of the vocabulary and a copied head.
        full_base_bytes: the bytes of the base parameters of all ranks of the stage together, without padding.
        cost_share: the stage's share of the work of all stages.
    """

    shape: ModelShape
    layout: Layout
    index: int
    layers: range
    part: AdapterPart
    local_base: tuple[StoredTensor, ...]
    full_base_bytes: int
    cost_share: float

    @property
    def is_first(self) -> bool:
        """Whether it has the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.index == self.layout.pp_size - 1

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks among its layers."""
        return tuple(layer for layer in self.layers if 1 <= layer <= self.shape.num_layers)

    @property
    def first_adapted(self) -> int:
        """The first adapted layer of the whole model."""
        return self.layout.adapter.layers[0]

    @property
    def backward_blocks(self) -> tuple[int, ...]:
        """The blocks that have a backward pass. Blocks below the first adapted layer have none."""
        return tuple(block for block in self.blocks if block >= self.first_adapted)

    @property
    def base_bytes(self) -> int:
        """The bytes of a rank's base parameters."""
        return sum(tensor.num_bytes for tensor in self.local_base)

    @property
    def quantised_bytes(self) -> int:
        """Those of them that store quantised weights."""
        return sum(tensor.num_bytes for tensor in self.local_base if tensor.quantised)

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

    @property
    def trained(self) -> tuple[int, ...]:
        """The numbers in each trained tensor of a rank; a stage without one has an anchor of one number."""
        names = [name for name in self.part.config.num_trained() if self.part.exists(name)]
        anchor = () if self.part.layers else (1,)
        return (*anchor, *(self.local_size(name) for name in names))

    @property
    def trained_tied(self) -> int:
        """The numbers in the trained tied tensors of a rank, whose gradients are summed over the stages."""
        config = self.part.config
        return sum(self.local_size(name) for name in config.num_trained() if config.factor(name).tied)

    @property
    def held(self) -> tuple[int, ...]:
        """The numbers in each tensor of a rank outside the base: trained ones, then frozen factors."""
        config = self.part.config
        frozen = [name for name in config.tensors if self.part.exists(name) and not config.factor(name).trained]
        return (*self.trained, *(self.local_size(name) for name in frozen))

    def ends_in(self, block: int) -> bool:
        """Whether the head follows a block."""
        return self.is_last and block == self.blocks[-1]

    def adapts(self, block: int, name: str) -> bool:
        """Whether a linear is adapted in one of its blocks."""
        return block in self.part.layers and name in [target.name for target in self.part.config.targets]

    def reads_mlp_input(self, block: int) -> bool:
        """Whether the backward pass of a block's MLP computes something from gate and up."""
        of_down = self.adapts(block, DOWN) and self.part.config.method_spec.A.trained
        return of_down or self.adapts(block, GATE_UP) or needs_gradient(self.part.config, block)[GATE_UP]

    def ax_columns(self, block: int, name: str) -> int:
        """The columns of A x beside the input of one of a block's linears; 0 if the linear is not adapted there."""
        return self.part.config.rank * self.adapts(block, name)

    def local_size(self, name: str) -> int:
        """The numbers in a rank's part of one of the adapter's tensors."""
        return math.prod(self.part.local_shape(name))


def needs_gradient(adapter: AdapterConfig, block: int) -> dict[str, bool]:
    """Whether the input of each linear of a block needs a gradient, by name, in the order of their computation.

    In the first adapted layer it is the inputs behind the first adapted linear that need one.
    """
    adapted = [target.name for target in adapter.targets] if block in adapter.layers else []
    first = block > adapter.layers[0]
    return {
        name: first or any(before in adapted for before in TARGET_NAMES[:number])
        for number, name in enumerate(TARGET_NAMES)
    }


def plan_stages(shape: ModelShape, layout: Layout) -> tuple[StagePlan, ...]:
    """All stages of the model, in order. The layout must fit the model (see `check_layout`)."""
    adapter, tp_size = layout.adapter, layout.tp_size
    costs = layer_costs(shape, length=layout.length, first_adapted=adapter.layers[0])
    tables = {first: stage_weight_rules(shape, has_embedding=first) for first in (True, False)}
    stages = []
    for index, layers in enumerate(partition(costs, layout.pp_size)):
        rules = [rule for rule in tables[index == 0] if rule.layer in layers]
        stages.append(
            StagePlan(
                shape,
                layout,
                index,
                layers,
                part=AdapterPart(adapter, tuple(layer for layer in adapter.layers if layer in layers), 0, tp_size),
                local_base=tuple(tensor for rule in rules for tensor in stored_tensors(rule, shape, layout, tp_size)),
                full_base_bytes=sum(t.num_bytes for rule in rules for t in stored_tensors(rule, shape, layout)),
                cost_share=sum(costs[layer] for layer in layers) / sum(costs),
            )
        )
    return tuple(stages)
