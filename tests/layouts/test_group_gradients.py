"""Several adapters in shared micro-batches at layouts, in fp64: each has the dense oracle's gradients, and all of them
are summed in one message of each group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_runs import relative_distance
from support.forked_ranks import groups_of, run_on_ranks
from support.gradient_worker import DTYPE, Case, Walk, build_adapter, build_stage, joined, run_cases
from support.oracle import OracleConfig, cast_weights, load_weights
from support.oracle_adapter import ALL_TARGETS
from support.oracle_training import SETTINGS, oracle_gradients
from support.tiny_models import write_tiny_model
from support.token_rows import Member, SharedBatch, rounds
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import AdapterGroup
from megatron_tiedlora.adapters.tying import sum_gradients_, sum_of_u
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, StepSum, Traffic, TrafficCounter, named_handles

# On a rank ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GroupCase:
    """What is run: the members' adapters on the model in `folder` at a layout (tp, pp, dp)."""

    folder: Path
    layout: tuple[int, int, int]
    members: tuple[Member, ...]
    sequence_parallel: bool = False
    recompute: str = "none"
    shared: bool = True

    @cached_property
    def batches(self) -> list[SharedBatch]:
        """The micro-batches of all data-parallel ranks."""
        return rounds(self.members, shared=self.shared)

    def of(self, member: Member) -> Case:
        """The case of one adapter, beside the others."""
        first = min(min(one.adapter.get("layers", (1,))) for one in self.members)
        more: dict[str, Any] = {"sequence_parallel": self.sequence_parallel, "recompute": self.recompute}
        return Case(self.folder, self.layout, seed=member.seed, first_adapted=first, **more, **member.adapter)


@dataclass(frozen=True)
class GroupOutcome:
    """What a rank found, by the name of the adapter.

    Attributes:
        losses: sums over supervised tokens / number of them; of the last stage, else 0.
        gradients: local parts by tensor, after all sums.
        sum_traffic: messages of the sums of gradients.
    """

    losses: dict[str, float]
    gradients: dict[str, dict[str, torch.Tensor]]
    sum_traffic: Traffic


def run_group_case(case: GroupCase, grid: Grid, groups: ParallelGroups) -> GroupOutcome:
    """Forward and backward passes over this rank's micro-batches, then the sums over ranks."""
    adapter_group = AdapterGroup({member.name: build_adapter(case.of(member), grid) for member in case.members})
    stage = build_stage(case.of(case.members[0]), adapter_group, grid, groups, is_engines=False)
    weights = {member.name: sum(s.num_supervised for s in member.samples) for member in case.members}
    losses = dict.fromkeys(weights, 0.0)
    batches = case.batches[grid.dp_rank :: grid.dp_size]
    for batch in batches:
        names = [segment.adapter for segment in batch.segments]
        found, _ = Walk(stage, grid).train(
            batch.tokens,
            batch.positions,
            batch.supervised(stage.tensor_parallel.sequence_parts),
            torch.tensor([weights[name] for name in names], dtype=DTYPE),
            documents=batch.documents,
            segments=batch.segments,
        )
        for name, loss in zip(names, found.expand(len(names)).tolist(), strict=True):
            losses[name] += loss
    assert stage.anchor is not None and stage.anchor.grad is not None and not stage.anchor.grad.any()
    present = {segment.adapter for batch in batches for segment in batch.segments}
    absent = {
        name: [tensor for tensor, p in adapter.named_parameters() if p.requires_grad]
        for name, adapter in adapter_group.adapters.items()
        if name not in present and adapter.part.layers
    }
    with TrafficCounter(named_handles(groups)) as counter:
        assert sum_gradients_(adapter_group.adapters, groups) == absent, "another gradient is missing"
    gradients = {
        name: {tensor: p.grad for tensor, p in adapter.named_parameters() if p.grad is not None}
        for name, adapter in adapter_group.adapters.items()
    }
    return GroupOutcome(losses, gradients, counter.traffic)


pytestmark = pytest.mark.distributed

TOLERANCE = 1e-10
A = Member("a", {"method": "tl6", "rank": 3}, ((1, 1), (1, 1)), seed=1)
FOUR = (
    A,
    Member("b", {"method": "lora", "rank": 2, "layers": (2, 4)}, ((1, 1, 1), (1,)), seed=2),
    Member("c", {"method": "tl2", "rank": 8, "targets": ALL_TARGETS}, ((1,), (1, 1)), seed=3),
    Member("d", {"method": "tl4", "rank": 1, "layers": (4, 5), "targets": ("o_proj", "gate_up")}, ((1, 1, 1),), seed=4),
)
TWO = (FOUR[1], Member("e", {"method": "tl5", "rank": 4, "layers": (5,), "targets": ("down_proj",)}, ((1, 1),), seed=5))
PACKED = tuple(
    Member(m.name, m.adapter, rows, seed=m.seed, packed=True)
    for m, rows in zip(FOUR, (((3, 2),), ((4,), (2,)), ((1, 1),), ((2, 2),)), strict=True)
)
LOSSES = tuple(replace(m, name=f"{m.name}{o}", objective=o) for m, o in zip((*FOUR, TWO[1]), SETTINGS, strict=True))
LAYOUTS = {2: ((2, 1, 1), (1, 2, 1), (1, 1, 2)), 4: ((2, 2, 1), (1, 2, 2), (2, 1, 2))}


def _cases(folder: Path, ranks: int, family: str, whole: bool) -> list[GroupCase]:
    """In part, every way of sharding has two of four cases in turn."""
    cases = list[GroupCase]()
    if family == "olmo2":  # norms after the linears, and of all heads
        return [GroupCase(folder, (2, 2, 1), PACKED, cut, recompute="selective") for cut in (True, False)]
    for layout in LAYOUTS[ranks]:
        for sequence in (True, False) if layout[0] > 1 else (False,):
            some = [
                GroupCase(folder, layout, FOUR, sequence),
                GroupCase(folder, layout, FOUR, sequence, shared=False),
                GroupCase(folder, layout, TWO, sequence, recompute="full"),
                GroupCase(folder, layout, PACKED, sequence, recompute="selective"),
            ]
            cases += [GroupCase(folder, layout, LOSSES, sequence)]
            cases += some if whole else some[len(cases) // 3 % 2 :: 2]
    return cases


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path, shape = tmp_path_factory.mktemp("models"), {"num_layers": 5, "head_dim": 6, "vocab_size": 321}
    families = ("llama", "olmo2")
    return {name: write_tiny_model(path / name, tokenizer=False, family=name, **shape) for name in families}


@pytest.mark.parametrize(("ranks", "family"), [(2, "llama"), (4, "llama"), (4, "olmo2")])
def test_each_adapter_has_the_oracles_gradients(
    folders: dict[str, Path], tmp_path: Path, ranks: int, family: str, whole: bool
) -> None:
    folder = folders[family]
    cases = _cases(folder, ranks, family, whole)
    weights, config = cast_weights(load_weights(folder), DTYPE), OracleConfig.from_folder(folder)
    answers: dict[tuple[str, bool], tuple[float, dict[str, torch.Tensor]]] = {}
    by_rank = run_on_ranks(run_cases, cases, run_group_case, ranks=ranks, folder=tmp_path)
    for case, outcomes in zip(cases, zip(*by_rank, strict=True), strict=True):
        for member in case.members:
            key = member.name, member.packed
            if key not in answers:
                answers[key] = oracle_gradients(weights, config, case.of(member).adapter, member.samples)
            check(case, member, list(outcomes), *answers[key])
        check_sums(case, list(outcomes))


def check(
    case: GroupCase, member: Member, outcomes: list[GroupOutcome], loss: float, expected: dict[str, torch.Tensor]
) -> None:
    """The loss and all gradients of one adapter are the oracle's."""
    found_loss = sum(outcome.losses[member.name] for outcome in outcomes) / case.layout[0]
    assert abs(found_loss - loss) <= TOLERANCE * abs(loss), (found_loss, loss, member, case)
    gradients = joined(case.of(member), [outcome.gradients[member.name] for outcome in outcomes])
    assert gradients.keys() == expected.keys()
    for name, reference in expected.items():
        assert reference.abs().max() > 0, (name, member)
        assert relative_distance(gradients[name], reference) <= TOLERANCE, (name, member, case)


def check_sums(case: GroupCase, outcomes: list[GroupOutcome]) -> None:
    """Each group of several ranks has one message with the gradients of all adapters."""
    tp, pp, dp = case.layout
    most = (tp * dp > 1) + (pp * dp > 1) + (dp > 1)  # of u, of tied tensors, and of the others
    for outcome in outcomes:
        messages = outcome.sum_traffic.messages
        assert {kind for _, kind in messages} <= {"all-reduce"}, messages
        assert sum(messages.values()) == most or (case.members == TWO and sum(messages.values()) < most), case


# The sum of u: one message a step, and the same bits on every rank of a stage -----------------------------------------


NUM_PASSES, SIZE = 3, 1000


def part(rank: int, number: int) -> torch.Tensor:
    """Of magnitudes so different that another order of sums gives other bits."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    return torch.randn(SIZE, generator=generator) * 10.0 ** torch.randint(-3, 4, (SIZE,), generator=generator)


def take_step(step_sum: StepSum, numbers: range) -> list[torch.Tensor]:
    """What each backward pass gives to the tensor."""
    value, rank = torch.ones(SIZE, requires_grad=True), distributed.get_rank()
    return [torch.autograd.grad(step_sum.of(value), value, part(rank, number))[0] for number in numbers]


def sum_on_rank(layout: tuple[int, int]) -> dict[str, Any]:
    grid = Grid(distributed.get_rank(), distributed.get_world_size(), tp_size=layout[0], pp_size=layout[1])
    groups = groups_of(grid)
    step_sum = sum_of_u(groups)
    with TrafficCounter(named_handles(groups)) as counter:
        step_sum.start(5)
        take_step(step_sum, range(2))  # given up: a run that stops between micro-batches
        step_sum.start(NUM_PASSES)
        given = take_step(step_sum, range(NUM_PASSES))
    (alone,) = take_step(step_sum, range(1))  # a step of its own, as nobody has said how many
    mean = given[-1].clone()
    if groups.data.size > 1:  # the engine's, in a group for each tensor-parallel rank
        distributed.all_reduce(mean, group=groups.data.handle)
    return {"given": given, "mean": mean, "alone": alone, "messages": dict(counter.traffic.messages), "grid": grid}


@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (2, 2)], ids=str)
def test_u_is_summed_in_one_message_with_the_same_bits_on_every_rank(tmp_path: Path, layout: tuple[int, int]) -> None:
    found = run_on_ranks(sum_on_rank, layout, ranks=4, folder=tmp_path)
    for stage in range(layout[1]):
        ranks = [rank for rank in range(4) if found[rank]["grid"].pp_rank == stage]
        expected = sum(part(rank, number).double() for rank in ranks for number in range(NUM_PASSES))
        for rank in ranks:
            *before, last = found[rank]["given"]
            assert not any(gradient.any() for gradient in before)
            assert bool(last.any()) == bool(found[rank]["alone"].any()) == (found[rank]["grid"].dp_rank == 0)
            assert list(found[rank]["messages"].values()) == [1]
            assert torch.equal(found[rank]["mean"], found[ranks[0]]["mean"]), rank
        scale = sum(part(rank, number).abs() for rank in ranks for number in range(NUM_PASSES))
        assert bool(((found[ranks[0]]["mean"] - expected).abs() <= 1e-6 * scale).all())
