"""One rank's forward and backward pass in fp64 at a layout, by hand: no engine, no optimizer, sends between stages.

Owns the case, its micro-batches and what a rank does with them. Leaves the answer and the comparison to the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from megatron_tiedlora.adapters import tied_adapter
from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, Dropout
from megatron_tiedlora.adapters.tying import sum_gradients_, sum_of_u
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.data.loader import NUMBERS_OF_SAMPLE
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.tail import Attended
from megatron_tiedlora.model.weights import Stages, layer_costs, partition, stage_weight_rules
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.groups import (
    Grid,
    ParallelGroups,
    TensorParallel,
    Traffic,
    TrafficCounter,
    named_handles,
)
from megatron_tiedlora.parallel.objectives import Objective
from megatron_tiedlora.parallel.quantised_weight import weight_maker
from support.forked_ranks import groups_of
from support.oracle import OracleAdapter, OracleConfig
from support.oracle_training import SETTINGS, OracleBatch, with_objective
from support.shared_tensors import GROUPS, tl6_shares
from support.tiny_models import pack_samples, pad_samples, random_adapter, random_batches

C, T = TypeVar("C"), TypeVar("T")
DTYPE = torch.float64
SEED = 7  # of dropout
ALPHA = 6.0  # another number than any rank here, so that a forgotten alpha / r shows


@dataclass(frozen=True)
class Case:
    """What is run: a model in `folder` at a layout (tp, pp, dp).

    Attributes:
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
        seed: of the factors.
        first_adapted: of the model, if other adapters are trained beside this one.
        objective: the loss of tokens, with settings of the oracle's; None: the cross entropy.
    """

    folder: Path
    layout: tuple[int, int, int]
    method: str = "tl6"
    rank: int = 3
    layers: tuple[int, ...] | None = None
    targets: tuple[str, ...] = ("qkv",)
    sequence_parallel: bool = False
    overlap: bool = False
    recompute: str = "none"
    packed: bool = False
    dropout: float = 0.0
    base: str | None = None
    adapter_in_matmul: bool = False
    shares: str | None = None
    seed: int = 5
    first_adapted: int | None = None
    objective: str | None = None

    @property
    def way(self) -> tuple[tuple[int, int, int], bool]:
        """How ranks share the work."""
        return self.layout, self.sequence_parallel

    @property
    def counted(self) -> bool:
        """Whether messages are counted, which doubles the time."""
        return self.recompute == "none" or self.method in ("lora", "tl6")

    @property
    def gives_logits(self) -> bool:
        """Whether the last micro-batch goes through the stages once more, for its logits."""
        return self.method == "tl6" and self.recompute == "none"

    @cached_property
    def shape(self) -> ModelShape:
        """Shape of the model."""
        return find_model(str(self.folder)).shape

    @cached_property
    def adapter(self) -> OracleAdapter:
        """Random factors, none of them zero."""
        return random_adapter(
            self.method,
            OracleConfig.from_folder(self.folder),
            rank=self.rank,
            alpha=ALPHA,
            layers=self.layers,
            seed=self.seed,
            dtype=DTYPE,
            targets=self.targets,
            groups=GROUPS[self.shares] if self.shares else None,
        )

    @cached_property
    def adapter_config(self) -> tied_adapter.AdapterConfig:
        """The same adapter as the package describes it."""
        shape = self.shape
        return tied_adapter.make_adapter_config(
            self.method,
            rank=self.rank,
            alpha=ALPHA,
            layers=self.adapter.layers,
            targets=tied_adapter.targets_of(shape, self.targets),
            seed=0,
        )

    @cached_property
    def samples(self) -> list[OracleBatch]:
        """A global batch of samples whose lengths and numbers of supervised tokens differ, with `tokens_at_cuts`.

        Each of these is an input before a supervised token, and a label.
        """
        samples = random_batches(1, samples_per_step=6, vocab_size=self.shape.vocab_size, seed=18)[0]
        whole = [sample for sample in samples if sample.num_supervised == sample.labels.shape[1] - 1]
        places = [(sample, place) for sample in whole for place in range(1, sample.num_supervised)]
        tokens = tokens_at_cuts(self.shape.vocab_size)
        assert len(places) >= len(tokens)
        for token, (sample, place) in zip(tokens, places, strict=False):
            sample.input_ids[0, place] = sample.labels[0, place - 1] = token
        return [with_objective(sample, self.objective, seed) for seed, sample in enumerate(samples)]

    @cached_property
    def micro_batches(self) -> list[OracleBatch]:
        """The samples in micro-batches of one, two and three, the first without a supervised token.

        Packed: the same samples as documents, two or one to a row. In halves: in micro-batches of two and four.
        """
        samples = self.samples
        assert samples[2].num_supervised == 0 and all(samples[i].num_supervised for i in (0, 1, 3, 4, 5))
        return self.arranged(samples)

    @cached_property
    def numbers(self) -> list[list[int]]:
        """The number of each token of each sample: of places that are not next to each other, one beyond 32 bits."""
        places = [5, 6, 2**20, 8, 9, 17]
        return [
            [place * NUMBERS_OF_SAMPLE + t for t in range(sample.input_ids.shape[1])]
            for place, sample in zip(places, self.samples, strict=True)
        ]

    @cached_property
    def micro_batch_numbers(self) -> list[torch.Tensor]:
        """The same for the micro-batches, with anything for padding."""
        pairs = zip(self.samples, self.numbers, strict=True)
        return [
            batch.input_ids
            for batch in self.arranged([replace(sample, input_ids=torch.tensor([n])) for sample, n in pairs])
        ]

    def arranged(self, samples: list[OracleBatch]) -> list[OracleBatch]:
        """Six samples in micro-batches."""
        multiple = self.layout[0] if self.sequence_parallel else 1
        parts = [samples[2:3], samples[:2], samples[3:]]
        if self.overlap:  # halves of one row, the first without a supervised token, and of two
            parts = [samples[2:4], [*samples[:2], *samples[4:]]]
        if self.packed:
            rows = [[samples[2:3]], [samples[:2], samples[3:4]], [samples[4:]]]
            parts = [[pack_samples(row) for row in part] for part in rows]
        return [pad_samples(part, multiple=multiple) for part in parts]

    @cached_property
    def stages(self) -> Stages:
        """Which layers of the flat list stand in which stage."""
        first = self.first_adapted or self.adapter.layers[0]
        return partition(layer_costs(self.shape, length=24, first_adapted=first), self.layout[1])

    def part(self, grid: Grid) -> tied_adapter.AdapterShard:
        """What a rank holds of the adapter."""
        stage = self.stages[grid.pp_rank]
        return tied_adapter.AdapterShard.of_stage(self.adapter_config, stage, grid.tp_rank, grid.tp_size)


def labels_of(batch: OracleBatch, stage: Stage) -> Any:
    """The labels of a micro-batch as the stage takes them."""
    if batch.objective is None:
        return batch.labels
    number = stage.num_halves(len(batch.labels))
    objectives = (Objective(batch.objective, SETTINGS[batch.objective]),)
    halves = zip(batch.labels.chunk(number), batch.loss_inputs.chunk(number, 1), strict=True)
    parts = stage.tensor_parallel.sequence_parts
    return [find_supervised(labels, parts, (), objectives, inputs) for labels, inputs in halves]


def tokens_at_cuts(vocab_size: int) -> list[int]:
    """The last token before and the first after each cut of a vocabulary over 2, 3 and 4 ranks, and its last one."""
    cuts = {rank * -(-vocab_size // ranks) for ranks in (2, 3, 4) for rank in range(1, ranks)}
    return sorted({token for cut in cuts for token in (cut - 1, cut)} | {vocab_size - 1})


@dataclass(frozen=True)
class Outcome:
    """What a rank found.

    Attributes:
        loss: sum over supervised tokens of its micro-batches / number of those in all; of the last stage, else 0.
        gradients: local parts by factor, after all sums.
        parts: gradients of the tied factors before their sum over stages.
        frozen_gradients: names of frozen tensors with a gradient; must be none.
        input_gradients: largest entry of the gradients that went to the stage before, one a micro-batch.
        logits: of the last micro-batch, on the last stage, without labels, where the case gives them.
        traffic: of the forward and backward passes, where the case is counted.
        tied_traffic: of the sum over stages.
    """

    loss: float
    gradients: dict[str, torch.Tensor]
    parts: dict[str, torch.Tensor]
    frozen_gradients: list[str]
    input_gradients: list[float]
    logits: torch.Tensor | None
    traffic: Traffic
    tied_traffic: Traffic


def run_cases(cases: Sequence[C], run: Callable[[C, Grid, ParallelGroups], T]) -> list[T]:
    """What `run` finds of every case on this rank, one after another."""
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    layouts: dict[tuple[int, int, int], tuple[Grid, ParallelGroups]] = {}
    outcomes = []
    for case in cases:
        if case.layout not in layouts:
            grid = Grid(rank, world_size, tp_size=case.layout[0], pp_size=case.layout[1])
            assert grid.dp_size == case.layout[2]
            layouts[case.layout] = grid, groups_of(grid)
        with tl6_shares(getattr(case, "shares", None)):
            outcomes.append(run(case, *layouts[case.layout]))
    return outcomes


def run_gradients(cases: list[Case]) -> list[Outcome]:
    """Forward and backward pass of every case on this rank."""
    return run_cases(cases, run_case)


def build_adapter(case: Case, grid: Grid) -> tied_adapter.TiedAdapter:
    """This rank's parts of the factors."""
    adapter = tied_adapter.TiedAdapter(case.part(grid), dtype=DTYPE)
    adapter.load_full(case.adapter.tensors)
    return adapter


def build_stage(
    case: Case, adapter_group: AdapterGroup, grid: Grid, groups: ParallelGroups, *, is_engines: bool = True
) -> Stage:
    """This rank's stage of a case, or of several whose stages are the same, with base weights in place, all fp64."""
    specs = layer_specs(
        case.shape,
        dtype=DTYPE,
        tp_size=grid.tp_size,
        make_weight=weight_maker(case.base, adapter_in_matmul=case.adapter_in_matmul),
    )
    stage = Stage(
        [specs[index] for index in case.stages[grid.pp_rank]],
        adapter_group,
        tensor_parallel=TensorParallel(groups.tensor, case.sequence_parallel, case.overlap),
        recompute=case.recompute,
        is_engines=is_engines,
    )
    with torch.no_grad():  # a weight that nobody reads must not go unseen
        for name, parameter in stage.named_parameters():
            if name.startswith("layers."):
                parameter.view(torch.uint8).fill_(255)  # NaN, and as bits of scales too
    with BaseWeights(case.folder, case.shape) as weights:
        load_base_weights(
            weights,
            frozen_weights(stage),
            stage_weight_rules(case.shape, has_embedding=stage.embedding is not None),
            group=groups.tensor,
        )
    return stage


def run_case(case: Case, grid: Grid, groups: ParallelGroups) -> Outcome:
    """Forward and backward over this rank's micro-batches, then the sums over stages and data-parallel ranks."""
    adapter: Any = build_adapter(case, grid)
    adapter.u_sum = sum_of_u(groups) if grid.tp_size > 1 else None  # as for an engine that steps it
    adapter_group = AdapterGroup({ONLY: adapter}, {ONLY: Dropout(case.dropout, SEED)} if case.dropout else None)
    stage = build_stage(case, adapter_group, grid, groups)
    walk = Walk(stage, grid)
    num_supervised = sum(sample.num_supervised for sample in case.samples)
    counter, tied_counter = (TrafficCounter(named_handles(groups)) for _ in range(2))
    batches = case.micro_batches[grid.dp_rank :: grid.dp_size]
    numbers = case.micro_batch_numbers[grid.dp_rank :: grid.dp_size]
    loss, input_gradients = 0.0, []
    if adapter.u_sum is not None:
        adapter.u_sum.start(len(batches))
    with counter if case.counted else nullcontext():
        for batch, drawn in zip(batches, numbers, strict=True):
            value, gradient = walk.train(
                batch.input_ids,
                _position_ids(batch),
                labels_of(batch, stage),
                num_supervised,
                in_stage=grid.pp_size == 1 and not case.packed,  # as an engine of one stage calls it
                documents=batch.documents,
                token_index=drawn if case.dropout else None,
            )
            loss += float(value)
            input_gradients += [] if gradient is None else [float(gradient.abs().max())]
    if stage.anchor is not None:  # what an engine needs of a stage without a trained tensor
        assert stage.anchor.grad is not None and not stage.anchor.grad.any()
    factors = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    tied = [name for name in factors if adapter.config.is_tied(name)]
    before = {name: factors[name].grad.clone() for name in tied if factors[name].grad is not None}
    with tied_counter:
        if grid.pp_size > 1:
            assert not sum_gradients_({ONLY: adapter}, groups, engine_averages=True), "a gradient is missing"
    if grid.dp_size > 1:  # the engine's part: the sum over data-parallel ranks
        for parameter in factors.values():
            distributed.all_reduce(parameter.grad, group=groups.data.handle)
    return Outcome(
        loss=loss,
        gradients={name: p.grad for name, p in factors.items() if p.grad is not None},
        parts=before,
        frozen_gradients=[name for name, p in stage.named_parameters() if not p.requires_grad and p.grad is not None],
        input_gradients=input_gradients,
        logits=walk.logits(batches[-1]) if case.gives_logits else None,
        traffic=counter.traffic,
        tied_traffic=tied_counter.traffic,
    )


@dataclass(frozen=True)
class Walk:
    """A micro-batch through the stages, one at a time."""

    stage: Stage
    grid: Grid

    def train(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        labels: Any,
        weight: float | torch.Tensor,
        *,
        in_stage: bool = False,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Forward and back.

        Args:
            labels: as the stage takes them, which gets them itself where the loss is computed `in_stage`.
            weight: what the losses are divided by.
            more: for the stage.

        Returns:
            the losses, 0 before the last stage, and the gradient of what came from the stage before.
        """
        inputs, losses = self._inputs(tokens), torch.zeros(())
        output = self.stage(inputs, positions, labels if in_stage else None, **more)
        if self._is_last:
            summed = output if in_stage else self.stage.loss(output, labels)
            losses = summed / weight
            losses.sum().backward()
        else:
            distributed.send(output.detach().contiguous(), dst=self._neighbour(1))
            gradient = torch.empty_like(output)
            distributed.recv(gradient, src=self._neighbour(1))
            output.backward(gradient)
        if self.grid.pp_rank:
            assert inputs.grad is not None, "the stage before waits for a gradient"
            distributed.send(inputs.grad.contiguous(), dst=self._neighbour(-1))
        return losses.detach(), inputs.grad

    @torch.no_grad()
    def logits(self, batch: OracleBatch) -> torch.Tensor | None:
        """(b, s, V) on the last stage."""
        output = self.stage(self._inputs(batch.input_ids), _position_ids(batch), documents=batch.documents)
        if not self._is_last:
            distributed.send(output.contiguous(), dst=self._neighbour(1))
            return None
        outputs = [output] if isinstance(output, Attended) else output
        return torch.cat([self.stage.tail.logits(own) for own in outputs])

    @property
    def _is_last(self) -> bool:
        return self.grid.pp_rank == self.grid.pp_size - 1

    def _neighbour(self, step: int) -> int:
        """The rank with this rank's part of the stage behind (1) or before (-1)."""
        grid = self.grid
        return grid.rank_of(pp_rank=grid.pp_rank + step, dp_rank=grid.dp_rank, tp_rank=grid.tp_rank)

    def _inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.grid.pp_rank == 0:
            return tokens
        hidden = self.stage.empty_hidden(*tokens.shape)
        distributed.recv(hidden, src=self._neighbour(-1))
        return hidden.requires_grad_()


def _position_ids(batch: OracleBatch) -> torch.Tensor:
    """(b, s)."""
    if batch.documents is None:
        return torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    return batch.positions


def joined(case: Case, parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Full trained tensors out of all ranks' parts; every copy that should be equal must be so, bit for bit."""
    config, tp_size = case.adapter_config, case.layout[0]
    world = Grid(0, len(parts), tp_size=tp_size, pp_size=case.layout[1])
    full: dict[str, torch.Tensor] = {}
    for name in case.adapter.trained:
        spec, tied = config.spec(name), config.is_tied(name)
        by_stage: dict[int, torch.Tensor] = {}
        for first in range(0, len(parts), tp_size):  # of each tensor-parallel group
            grid = world.at(first)
            if not tied and not case.part(grid).layers:
                continue
            shards = [part[name] for part in parts[first : first + tp_size]]
            if spec.dim is None:
                assert all(torch.equal(shard, shards[0]) for shard in shards), f"{name} differs over TP: {case}"
            whole = spec.join(shards)
            known = by_stage.setdefault(0 if tied else grid.pp_rank, whole)
            assert torch.equal(known, whole), f"{name} differs between data-parallel ranks or stages: {case}"
        full[name] = by_stage[0] if tied else torch.cat(list(by_stage.values()))
    return full
