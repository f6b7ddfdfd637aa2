"""What each pipeline stage of a layout holds, and where its backward pass runs: arithmetic on shapes alone.

Ranks of one stage are alike, so a stage is described once, by what each of its ranks holds. The bytes of a step are in
`memory`, its messages in `messages`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.base.methods import FACTORS
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.weights import stage_weight_rules
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.partition import layer_costs, partition


@dataclass(frozen=True)
class StagePlan:
    """One stage of a model under a layout.

    Attributes:
        layers: its part of the flat list (embedding 0, blocks from 1, head last).
        part: what a rank holds of the adapter (the first tensor-parallel rank's; all have the same sizes).
        local_base: numbers in each base parameter of a rank, vocabulary padding and a copied head included.
        full_base: the same of the whole stage, without padding.
        cost_share: of the work of all stages.
    """

    shape: ModelShape
    layout: Layout
    index: int
    layers: range
    part: AdapterPart
    local_base: tuple[int, ...]
    full_base: int
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
        """Blocks with a backward pass: nothing below the first adapted layer has one."""
        return tuple(block for block in self.blocks if block >= self.first_adapted)

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers in each trained tensor of a rank, in the engine's order; a stage without one has its anchor."""
        row = self.part.config.row
        names = [name for name in FACTORS if row.factor(name).trained and self.part.exists(name)]
        anchor = () if self.part.layers else (1,)
        return (*anchor, *(self.local_size(name) for name in names))

    @property
    def trained_tied(self) -> int:
        """Numbers in the trained tied tensors of a rank: what is summed over the stages."""
        row = self.part.config.row
        return sum(self.local_size(name) for name in FACTORS if row.factor(name).trained and row.factor(name).tied)

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers in each tensor beside the base of a rank: `trained`, and frozen factors."""
        row = self.part.config.row
        frozen = [name for name in FACTORS if self.part.exists(name) and not row.factor(name).trained]
        return (*self.trained, *(self.local_size(name) for name in frozen))

    def local_size(self, factor: str) -> int:
        """Numbers in a rank's part of a factor."""
        return math.prod(self.part.local_shape(factor))


def plan_stages(shape: ModelShape, layout: Layout) -> tuple[StagePlan, ...]:
    """Every stage of the model, in order; the layout must fit it (`check_layout`)."""
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
                local_base=tuple(math.prod(rule.spec.local_shape(rule.shape, tp_size)) for rule in rules),
                full_base=sum(rule.num_elements for rule in rules),
                cost_share=sum(costs[layer] for layer in layers) / sum(costs),
            )
        )
    return tuple(stages)
