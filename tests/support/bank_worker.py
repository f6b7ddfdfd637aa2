"""One rank's forward and backward passes of a bank in fp64 at a layout, by hand: no engine, no optimizer.

Owns the case and what a rank does with its micro-batches. Leaves the answer and the comparison to the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from gradient_worker import DTYPE, Case, Walk, at_layouts, loaded_adapter, stage_of
from shared_batches import Member, SharedBatch, rounds

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.tying import sum_gradients_
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.partition import Stages
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, Traffic, TrafficCounter, named_handles


@dataclass(frozen=True)
class BankCase:
    """What is run: the members' adapters on the model in `folder` at a layout (tp, pp, dp)."""

    folder: Path
    layout: tuple[int, int, int]
    members: tuple[Member, ...]
    sequence_parallel: bool = False
    recompute: str = "none"
    shared: bool = True

    @cached_property
    def shape(self) -> ModelShape:
        """Shape of the model."""
        return find_model(str(self.folder)).shape

    @cached_property
    def batches(self) -> list[SharedBatch]:
        """The micro-batches of all data-parallel ranks."""
        return rounds(self.members, shared=self.shared)

    @cached_property
    def first_adapted(self) -> int:
        """The first layer that has an adapter."""
        return min(Case(self.folder, self.layout, **member.adapter).adapter.layers[0] for member in self.members)

    @property
    def stages(self) -> Stages:
        """Which layers of the flat list stand in which stage."""
        return self.of(self.members[0]).stages

    def of(self, member: Member) -> Case:
        """The case of one adapter."""
        adapted = {"seed": member.seed, "first_adapted": self.first_adapted, **member.adapter}
        return Case(self.folder, self.layout, **adapted)


@dataclass(frozen=True)
class BankOutcome:
    """What a rank found, by the name of the adapter.

    Attributes:
        losses: sums over supervised tokens / number of them; of the last stage, else 0.
        gradients: local parts by tensor, after all sums.
        traffic: of the forward and backward passes.
        sum_traffic: of the sums of gradients.
    """

    losses: dict[str, float]
    gradients: dict[str, dict[str, torch.Tensor]]
    traffic: Traffic
    sum_traffic: Traffic


def run_bank_cases(cases: list[BankCase]) -> list[BankOutcome]:
    """Every case on this rank, one after another."""
    return at_layouts(cases, run_bank_case)


def run_bank_case(case: BankCase, grid: Grid, groups: ParallelGroups) -> BankOutcome:
    """Forward and backward passes over this rank's micro-batches, then the sums over ranks."""
    bank = AdapterBank({member.name: loaded_adapter(case.of(member), grid) for member in case.members})
    stage = stage_of(case, bank, grid, groups, is_engines=False)
    walk = Walk(case, stage, grid, groups)
    weights = {member.name: sum(s.num_supervised for s in member.samples) for member in case.members}
    losses = dict.fromkeys(weights, 0.0)
    counter, sum_counter = (TrafficCounter(named_handles(groups)) for _ in range(2))
    batches = case.batches[grid.dp_rank :: grid.dp_size]
    with counter:
        for batch in batches:
            for name, loss in _train(walk, batch, weights).items():
                losses[name] += loss
    assert stage.anchor is not None and stage.anchor.grad is not None and not stage.anchor.grad.any()
    present = {share.adapter for batch in batches for share in batch.shares}
    absent = {
        name: [tensor for tensor, p in adapter.named_parameters() if p.requires_grad]
        for name, adapter in bank.adapters.items()
        if name not in present and adapter.part.layers
    }
    with sum_counter:
        assert sum_gradients_(bank.adapters, groups) == absent, "another gradient is missing"
    gradients = {
        name: {tensor: p.grad for tensor, p in adapter.named_parameters() if p.grad is not None}
        for name, adapter in bank.adapters.items()
    }
    return BankOutcome(losses, gradients, counter.traffic, sum_counter.traffic)


def _train(walk: Walk, batch: SharedBatch, weights: dict[str, int]) -> dict[str, float]:
    """A micro-batch through the stages, one at a time; the losses by adapter, on the last stage."""
    inputs, stage = walk.inputs(batch.tokens), walk.stage
    output = stage(inputs, batch.positions, documents=batch.documents, shares=batch.shares)
    if not walk.is_last:
        walk.hand_on(output, inputs)
        return {}
    losses = stage.tail.loss(output, batch.supervised(stage.tensor_parallel.sequence_parts), stage.tensor_parallel)
    names = [share.adapter for share in batch.shares]
    losses = losses / torch.tensor([weights[name] for name in names], dtype=DTYPE)
    losses.sum().backward()
    walk.send_back(inputs)
    return dict(zip(names, losses.tolist(), strict=True))
