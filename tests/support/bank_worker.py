"""One rank's forward and backward passes of a bank in fp64 at a layout, by hand: no engine, no optimizer.

Owns the case and what a rank does with its micro-batches. Leaves the answer and the comparison to the test.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from forked_ranks import groups_of
from gradient_worker import ALPHA, DTYPE, fill_stage
from oracle import OracleConfig
from shared_batches import Member, SharedBatch, rounds
from tiny_models import random_adapter
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.adapters.tying import sum_gradients_
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.partition import Stages, layer_costs, partition
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import (
    Grid,
    ParallelGroups,
    TensorParallel,
    Traffic,
    TrafficCounter,
    named_handles,
)


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
    def stages(self) -> Stages:
        """Which layers of the flat list stand in which stage."""
        first = min(self.of(member).adapter.layers[0] for member in self.members)
        return partition(layer_costs(self.shape, length=24, first_adapted=first), self.layout[1])

    def of(self, member: Member) -> Any:
        """What `gradient_worker.joined_gradients` asks of the case of one adapter."""
        adapter = random_adapter(
            config=OracleConfig.from_folder(self.folder), alpha=ALPHA, seed=member.seed, dtype=DTYPE, **member.adapter
        )
        config = make_adapter_config(
            adapter.method,
            rank=adapter.rank,
            alpha=ALPHA,
            layers=adapter.layers,
            targets=targets_of(self.shape, adapter.targets),
            seed=0,
        )

        def part(grid: Grid) -> AdapterPart:
            layers = tuple(layer for layer in config.layers if layer in self.stages[grid.pp_rank])
            return AdapterPart(config, layers, grid.tp_rank, grid.tp_size)

        return SimpleNamespace(layout=self.layout, adapter=adapter, adapter_config=config, part=part)


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
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    layouts: dict[tuple[int, int, int], tuple[Grid, ParallelGroups]] = {}
    outcomes = []
    for case in cases:
        if case.layout not in layouts:
            grid = Grid(rank, world_size, tp_size=case.layout[0], pp_size=case.layout[1])
            layouts[case.layout] = grid, groups_of(grid)
        outcomes.append(run_bank_case(case, *layouts[case.layout]))
    return outcomes


def run_bank_case(case: BankCase, grid: Grid, groups: ParallelGroups) -> BankOutcome:
    """Forward and backward passes over this rank's micro-batches, then the sums over ranks."""
    bank, stage = _build(case, grid, groups)
    weights = {member.name: sum(s.num_supervised for s in member.samples) for member in case.members}
    losses = dict.fromkeys(weights, 0.0)
    counter, sum_counter = (TrafficCounter(named_handles(groups)) for _ in range(2))
    batches = case.batches[grid.dp_rank :: grid.dp_size]
    with counter:
        for batch in batches:
            for name, loss in _train(case, stage, grid, batch, weights).items():
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


def _build(case: BankCase, grid: Grid, groups: ParallelGroups) -> tuple[AdapterBank, Stage]:
    adapters = {}
    for member in case.members:
        of_member = case.of(member)
        adapters[member.name] = TiedAdapter(of_member.part(grid), dtype=DTYPE)
        adapters[member.name].load_full(of_member.adapter.tensors)
    bank = AdapterBank(adapters)
    specs = layer_specs(
        case.shape, dtype=DTYPE, tp_size=grid.tp_size, recomputes_gate=case.recompute == "selective"
    )
    stage = Stage(
        [specs[index] for index in case.stages[grid.pp_rank]],
        bank,
        tensor_parallel=TensorParallel(groups.tensor, case.sequence_parallel),
        recompute=case.recompute,
    )
    with BaseWeights(case.folder, case.shape) as weights:
        fill_stage(stage, weights, case.shape, grid, groups)
    return bank, stage


def _train(
    case: BankCase, stage: Stage, grid: Grid, batch: SharedBatch, weights: dict[str, int]
) -> dict[str, float]:
    """A micro-batch through the stages, one at a time; the losses by adapter, on the last stage."""
    before, after = (
        grid.rank_of(pp_rank=grid.pp_rank + step, dp_rank=grid.dp_rank, tp_rank=grid.tp_rank) for step in (-1, 1)
    )
    inputs = batch.tokens
    if grid.pp_rank:
        inputs = stage.empty_hidden(*batch.tokens.shape)
        distributed.recv(inputs, src=before)
        inputs.requires_grad_()
    output = stage(inputs, batch.positions, documents=batch.documents, shares=batch.shares)
    found: dict[str, float] = {}
    if grid.pp_rank == grid.pp_size - 1:
        losses = stage.tail.loss(output, batch.supervised(stage.tensor_parallel.sequence_parts), stage.tensor_parallel)
        names = [share.adapter for share in batch.shares]
        losses = losses / torch.tensor([weights[name] for name in names], dtype=DTYPE)
        losses.sum().backward()
        found = dict(zip(names, losses.tolist(), strict=True))
    else:
        distributed.send(output.detach().contiguous(), dst=after)
        gradient = torch.empty_like(output)
        distributed.recv(gradient, src=after)
        output.backward(gradient)
    if grid.pp_rank:
        assert inputs.grad is not None
        distributed.send(inputs.grad.contiguous(), dst=before)
    return found
