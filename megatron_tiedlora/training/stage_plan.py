"""What each pipeline stage of a plan holds, and where its backward pass runs: arithmetic on shapes alone.

Ranks of one stage are alike, so a stage is described once, by what each of its ranks holds. Leaves bytes in flight to
memory_plan and messages to traffic_plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.partition import layer_costs
from megatron_tiedlora.model.weights import WeightRule, stage_weight_rules
from megatron_tiedlora.training.plan import RunPlan


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        layers: its part of the flat list (embedding 0, blocks from 1, head last).
        blocks: the blocks among them.
        first_adapted: the first adapted layer of the whole model.
        part: what a rank holds of the adapter (the first tensor-parallel rank's; all have the same sizes).
        local_base: numbers in each base parameter of a rank, vocabulary padding and a copied head included.
        full_base: the same of the whole stage, without padding.
        cost_share: of the work of all stages.
    """

    index: int
    layers: range
    blocks: tuple[int, ...]
    first_adapted: int
    part: AdapterPart
    local_base: tuple[int, ...]
    full_base: int
    cost_share: float
    is_first: bool
    is_last: bool

    @property
    def backward_blocks(self) -> tuple[int, ...]:
        """Blocks with a backward pass: nothing below the first adapted layer has one."""
        return tuple(block for block in self.blocks if block >= self.first_adapted)

    @property
    def starts_backward_chain(self) -> bool:
        """Whether the model's first adapted layer is here: its QKV's input needs no gradient."""
        return self.first_adapted in self.blocks

    @property
    def trained(self) -> tuple[int, ...]:
        """Numbers in each trained tensor of a rank, in the engine's order; a stage without one has its anchor."""
        names = [name for name in self.part.config.num_trained() if self.part.exists(name)]
        anchor = () if self.part.layers else (1,)
        return (*anchor, *(self.local_size(name) for name in names))

    @property
    def trained_tied(self) -> int:
        """Numbers in the trained tied tensors of a rank: what is summed over the stages."""
        config = self.part.config
        return sum(self.local_size(name) for name in config.num_trained() if config.factor(name).tied)

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers in each tensor beside the base of a rank: `trained`, and frozen factors."""
        config = self.part.config
        frozen = [name for name in config.tensors if self.part.exists(name) and not config.factor(name).trained]
        return (*self.trained, *(self.local_size(name) for name in frozen))

    def local_size(self, name: str) -> int:
        """Numbers in a rank's part of one of the adapter's tensors."""
        return torch.Size(self.part.local_shape(name)).numel()


def _rules_by_layer(shape: ModelShape, *, has_embedding: bool) -> dict[int, list[WeightRule]]:
    """The name table of a stage by layer of the flat list."""
    by_layer: dict[int, list[WeightRule]] = {layer: [] for layer in range(shape.num_layers + 2)}
    for rule in stage_weight_rules(shape, has_embedding=has_embedding):
        by_layer[rule.layer].append(rule)
    return by_layer


def plan_stages(plan: RunPlan) -> tuple[StagePlan, ...]:
    """Every stage of the plan, in order."""
    shape, tp_size = plan.source.shape, plan.grid.tp_size
    first_adapted = plan.adapter.layers[0]
    costs = layer_costs(shape, length=plan.settings.max_length, first_adapted=first_adapted)
    tables = {first: _rules_by_layer(shape, has_embedding=first) for first in (True, False)}
    stages = []
    for index, layers in enumerate(plan.stages):
        rules = [rule for layer in layers for rule in tables[0 in layers][layer]]
        stages.append(
            StagePlan(
                index=index,
                layers=layers,
                blocks=tuple(layer for layer in layers if 1 <= layer <= shape.num_layers),
                first_adapted=first_adapted,
                part=AdapterPart(plan.adapter, plan.stage_layers[index], 0, tp_size),
                local_base=tuple(torch.Size(rule.spec.local_shape(rule.shape, tp_size)).numel() for rule in rules),
                full_base=sum(rule.num_elements for rule in rules),
                cost_share=sum(costs[layer] for layer in layers) / sum(costs),
                is_first=index == 0,
                is_last=index == len(plan.stages) - 1,
            )
        )
    return tuple(stages)
