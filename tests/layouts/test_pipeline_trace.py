"""Real pipeline steps: which micro-batch runs on which stage when, and what DeepSpeed's engine keeps meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cases import Starts, grouped, marked
from support.forked_ranks import join_as_launched, run_on_ranks
from support.planned import Pass, all_cuts, cost_key, one_f_one_b, simulate, stage_memory
from support.run_helpers import write_rows
from support.tiny_models import write_tiny_model
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterSegment
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.weights import layer_costs
from megatron_tiedlora.planning.layout import MicroBatchShape
from megatron_tiedlora.planning.memory import engine_bytes_in_flight, micro_batches_in_flight
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.planning.step_time import Seconds, StepParts, pipeline_spans
from megatron_tiedlora.training.build import build_model

# On a rank ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Two equal steps: `num_micro_batches` of (rows, length), the last `supervised` labels of each row.

    Attributes:
        adapters: the settings that each of several adapters has of its own, which own the micro-batches in turn.
    """

    settings: dict[str, Any]
    num_micro_batches: int
    rows: int
    length: int
    supervised: int
    adapters: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Event:
    """A forward ("F") or backward ("B") pass of a micro-batch.

    Attributes:
        begin, end: seconds of a clock that all ranks share.
    """

    kind: str
    micro_batch: int
    begin: float
    end: float


@dataclass
class Held:
    """Bytes that the engine holds, of storages that autograd does not keep.

    Attributes:
        in_flight: micro-batches whose backward pass has not ended.
        floats: of hidden states and the like, of these micro-batches.
        integers: of tokens, positions and labels, of these.
        once: of hidden states and the like, of ended micro-batches and in the buffers that messages arrive in.
    """

    in_flight: tuple[int, ...]
    floats: int
    integers: int
    once: int


@dataclass
class Traced:
    """What a rank saw.

    Attributes:
        passes: of the second step, in order.
        parts: where the engine cut the flat list.
        held: after each forward pass of the first step, and before each backward pass.
    """

    passes: list[Event] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)


def trace_steps(cases: list[Case], folder: str) -> list[Traced]:
    """Every case on this rank. Steps go through the package's own road as far as the runner; micro-batches are made up,
    and told apart by their positions, which start at the micro-batch's number."""
    device = join_as_launched(folder)
    return [_trace(case, device) for case in cases]


def _trace(case: Case, device: torch.device) -> Traced:
    from deepspeed.runtime.pipe import schedule

    place = {"rank": distributed.get_rank(), "world_size": distributed.get_world_size()}
    all_settings = {str(number): {**case.settings, **own} for number, own in enumerate(case.adapters)}
    all_settings = all_settings or {ONLY: case.settings}
    plans = {name: plan_run(make_settings(settings), **place) for name, settings in all_settings.items()}
    (shared, *_), names = plans.values(), list(plans)
    runner = build_model(plans, device).runner
    engine, optimizers = runner.engine, runner.optimizers
    batches = list(_batches(case, names, shared.source.shape.vocab_size))
    of_each = case.num_micro_batches // len(plans)
    divisors = optimizers.divisors(case.rows * case.supervised * of_each, of_each * shared.grid.dp_size)
    held = [*runner.stage.parameters(), *(p for adapter in runner.adapters.values() for p in adapter.parameters())]
    traced = Traced(parts=list(engine.module.parts))
    passes = dict(engine._INSTRUCTION_MAP)  # without what is wrapped below
    for watch in (_Holding(held, engine, traced.held).run, partial(_time, traced.passes)):
        kinds = {schedule.ForwardPass: "F", schedule.BackwardPass: "B"}
        engine._INSTRUCTION_MAP = passes | {key: _watched(kind, passes[key], watch) for key, kind in kinds.items()}
        distributed.barrier()
        runner.accumulate(batches, dict.fromkeys(plans, divisors), lambda: None)
        assert not optimizers.sum_gradients(plans)
        norms = optimizers.norms(names)
        for name in names:
            optimizers.take(name, norms.get(name))
        optimizers.clear(names)
    engine.destroy()
    return traced


def _watched(kind: str, run: Any, watch: Any) -> Callable[[Any, int], None]:
    """A pass of the engine, which `watch` runs."""

    def watched(engine: Any, buffer_id: int) -> None:
        watch(kind, _number(engine.pipe_buffers["inputs"][buffer_id]), lambda: run(engine, buffer_id))

    return watched


def _time(events: list[Event], kind: str, micro_batch: int, work: Callable[[], None]) -> None:
    """Note when a pass begins and ends."""
    begin = time.monotonic()
    work()
    events.append(Event(kind, micro_batch, begin, time.monotonic()))


def _batches(case: Case, names: Sequence[str], vocab_size: int) -> Iterator[MicroBatch]:
    generator = torch.Generator().manual_seed(7)
    for index in range(case.num_micro_batches):
        tokens = torch.randint(3, vocab_size, (case.rows, case.length), generator=generator)
        labels = tokens.roll(-1, dims=1)
        labels[:, : case.length - case.supervised] = -100
        yield MicroBatch(
            tokens=tokens,
            positions=torch.arange(index, index + case.length).expand_as(tokens).contiguous(),
            labels=labels,
            lengths=torch.full((case.rows,), case.length),
            num_samples=case.rows,
            segments=(AdapterSegment(names[index % len(names)], case.rows, case.length),),
        )


class _Holding:
    """Notes what the engine holds after each forward pass and before each backward pass."""

    def __init__(self, parameters: list[torch.Tensor], engine: Any, held: list[Held]) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._engine = engine
        self._held = held
        self._saved: dict[int, list[torch.Tensor]] = {}  # by micro-batch in flight

    def run(self, kind: str, micro_batch: int, work: Callable[[], None]) -> None:
        if kind == "B":
            self._held.append(self._count())
            work()
            del self._saved[micro_batch]
            return
        saved = self._saved[micro_batch] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
        self._held.append(self._count())

    def _count(self) -> Held:
        counted = self._own | {t.untyped_storage().data_ptr() for kept in self._saved.values() for t in kept}
        buffers = self._engine.pipe_buffers
        found = Held(tuple(sorted(self._saved)), 0, 0, 0)
        for index in range(self._engine.num_pipe_buffers):
            tensors = [t for name in ("inputs", "outputs", "labels") for t in _tensors(buffers[name][index])]
            # The last stage gives up what came in before what went out.
            inputs = buffers["inputs"][index]
            if inputs is not None and _number(inputs) in self._saved:
                found.floats += _bytes(tensors, counted, floating=True)
                found.integers += _bytes(tensors, counted, floating=False)
            else:
                found.once += _bytes(tensors, counted, floating=True)
        found.once += _bytes(_tensors(self._engine.grad_layer), counted, floating=True)
        return found


def _number(inputs: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Of a micro-batch, by its first position, from (tokens or hidden states, positions)."""
    return int(inputs[1].flatten()[0])


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int], *, floating: bool) -> int:
    """Of storages that are not in `counted`, which they enter."""
    size = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() == floating and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            size += storage.nbytes()
    return size


pytestmark = pytest.mark.distributed

ROWS, LENGTH, SUPERVISED = 2, 48, 20
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "recompute": {"recompute": "full"},
    "tensor 2": {"tensor_parallel": 2},
    "tensor 2, sequences whole": {"tensor_parallel": 2, "sequence_parallel": False},
    "one layer": {"method": "lora", "layers": (5,)},
    "bf16": {"dtype": "bf16", "method": "vera"},
    "four adapters": {"ds_config": "zero0.json"},
}
FOUR = (
    {"method": "tl6"},
    {"method": "lora", "rank": 2, "layers": (2, 5)},
    {"method": "vera", "rank": 8, "targets": "gate_up"},
    {"method": "tl5", "rank": 1},
)
# (name, stages, micro-batches)
TRACED = [("plain", p, m) for p in (2, 4) for m in (1, 4, 8)]
TRACED += [("four adapters", p, len(FOUR) * m) for p in (2, 4) for m in (1, 2, 4)]  # m micro-batches of each
CASES = [*TRACED, ("recompute", 4, 6), ("one layer", 4, 6), ("bf16", 4, 6)]
CASES += [("tensor 2", 2, 3), ("tensor 2, sequences whole", 2, 3)]
# Fewer micro-batches than stages, as many, and more are left with one adapter and with four.
SLOW = [("plain", 2, 8), ("plain", 4, 4), *(("four adapters", *sizes) for sizes in ((2, 8), (2, 16), (4, 4), (4, 16)))]


@dataclass(frozen=True)
class Ran:
    """A case and what its ranks saw."""

    case: Case
    traced: list[Traced]

    def plan(self, rank: int) -> RunPlan:
        return plan_run(make_settings(self.case.settings), rank=rank, world_size=len(self.traced))

    @property
    def stages(self) -> list[list[Event]]:
        """By stage, the passes of the step, seen by the stage's first rank."""
        grid = self.plan(0).grid
        return [self.traced[stage * grid.tp_size].passes for stage in range(grid.pp_size)]


def settings_of(folder: Path, num_stages: int, num_micro_batches: int, **changes: Any) -> dict[str, Any]:
    """With the head as dear as 2.6 blocks, so that the best cut is not the even one."""
    return {
        "model": str(folder / "model"),
        "train_file": str(folder / "rows.jsonl"),
        "validation_file": str(folder / "rows.jsonl"),
        "ds_config": "zero1.json",
        "dtype": "fp32",
        "rank": 3,
        "max_length": LENGTH,
        "micro_batch_size": ROWS,
        "global_batch_size": ROWS * num_micro_batches,
        "max_steps": 10,
        "replica_check_steps": 0,
        "pipeline_parallel": num_stages,
        **changes,
    }


def ranks_of(key: tuple[str, int, int]) -> int:
    return key[1] * CHANGES[key[0]].get("tensor_parallel", 1)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, int, int], Ran]:
    """What cases gave; the slow ones are started apart."""
    folder = tmp_path_factory.mktemp("trace")
    write_tiny_model(folder / "model", num_layers=6, num_heads=8, num_kv_heads=4, head_dim=6, vocab_size=1500)
    write_rows(folder / "rows.jsonl", 8)

    def run(keys: Sequence[tuple[str, int, int]]) -> Iterator[Ran]:
        cases = [
            Case(
                settings_of(folder, p, m, **CHANGES[name]),
                *(m, ROWS, LENGTH, SUPERVISED),
                adapters=FOUR if name == "four adapters" else (),
            )
            for name, p, m in keys
        ]
        start = tmp_path_factory.mktemp("ranks")
        by_rank = run_on_ranks(trace_steps, cases, str(folder), ranks=ranks_of(keys[0]), folder=start)
        return map(Ran, cases, map(list, zip(*by_rank, strict=True)))

    return Starts(grouped(CASES, lambda key: (ranks_of(key), key in SLOW)), run)


@pytest.mark.parametrize("key", marked(CASES, SLOW))
def test_each_stage_runs_1f1b(ran: Mapping[tuple[str, int, int], Ran], key: tuple[str, int, int]) -> None:
    """Every stage runs its passes in this order, with as many micro-batches in flight as the dry run says."""
    _, p, m = key
    found = ran[key]
    plan = found.plan(0)
    for rank, traced in enumerate(found.traced):
        stage = plan.stages[rank // plan.grid.tp_size]
        order = [Pass(event.kind, event.micro_batch, stage.index) for event in traced.passes]
        assert order == one_f_one_b(p, m)[stage.index]
        in_flight = max(len(held.in_flight) for held in traced.held)
        assert in_flight == min(p - stage.index, m) == micro_batches_in_flight(stage)


@pytest.mark.parametrize("key", marked(CASES, SLOW))
def test_passes_wait_for_each_other(ran: Mapping[tuple[str, int, int], Ran], key: tuple[str, int, int]) -> None:
    """By the clock: a pass begins after the one on the stage before (for a backward pass, behind) has ended."""
    stages = ran[key].stages
    ended = {(stage, e.kind, e.micro_batch): e.end for stage, events in enumerate(stages) for e in events}
    for stage, events in enumerate(stages):
        assert all(first.end <= then.begin for first, then in pairwise(events))
        for event in events:
            before = stage - 1 if event.kind == "F" else stage + 1
            if 0 <= before < len(stages):
                assert ended[before, event.kind, event.micro_batch] <= event.begin


@pytest.mark.parametrize("costs", [{"F": 1, "B": 1}, {"F": 1, "B": 2}, {"F": 3, "B": 2}], ids=str)
@pytest.mark.parametrize("key", marked(TRACED, SLOW))
def test_the_bubble_of_equal_stages(
    ran: Mapping[tuple[str, int, int], Ran], key: tuple[str, int, int], costs: dict[str, int]
) -> None:
    """In the order that was seen each stage works for m / (m + p - 1) of the time.

    Of several adapters, m are the micro-batches of all of them.
    """
    _, p, m = key
    stages = enumerate(ran[key].stages)
    order = [[Pass(event.kind, event.micro_batch, stage) for event in events] for stage, events in stages]
    assert simulate(order, lambda _, one: costs[one.kind]) == (m + p - 1) * sum(costs.values())


def test_the_simulation_tells_schedules_apart() -> None:
    """Forward and back one micro-batch after the other keeps one stage busy; what waits for itself is no schedule."""
    order = [[Pass(kind, index, stage) for index in range(4) for kind in "FB"] for stage in range(2)]
    assert simulate(order, lambda *_: 1) == 2 * 4 * 2
    with pytest.raises(ValueError, match="wait for each other"):
        simulate([[Pass("B", 0, 0), Pass("F", 0, 0)], [Pass("F", 0, 1), Pass("B", 0, 1)]], lambda *_: 1)


def test_a_dearer_stage_makes_the_others_wait() -> None:
    """Two stages of costs 1 and 2 a pass, two micro-batches, by hand: stage 1 works from 1 to 9 without a break, and
    stage 0 ends with B1, at 10."""
    assert simulate(one_f_one_b(2, 2), lambda stage, _: stage + 1) == 10


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(1, 3), (2, 1), (3, 4), (4, 2), (4, 11)])
def test_several_layouts_are_simulated_at_once(num_stages: int, num_micro_batches: int) -> None:
    """Each takes as long as its passes in the order of real steps, whatever a pass costs."""
    drawn = np.random.default_rng(0)
    layouts = []
    for number in range(3):
        kinds = [MicroBatchShape((0,), (8 * size,), (8,), 8) for size in range(1, 3)]
        batches = [kinds[kind] for kind in drawn.integers(0, 2, num_micro_batches)]
        seconds = drawn.random((num_stages, 3)) + number
        stages = [dict(zip(kinds, pairwise(map(Seconds, stage)), strict=True)) for stage in seconds]
        layouts.append(StepParts(batches, stages, sums=0.0, outside=0.0))
    for step, span in zip(layouts, pipeline_spans(layouts), strict=True):

        def cost(rank: int, one: Pass, step: StepParts = step) -> float:
            return step.stages[rank][step.batches[one.micro_batch]][one.kind == "B"].total

        order = one_f_one_b(num_stages, num_micro_batches)
        assert span == simulate(order, cost)
        worked = [sum(cost(rank, one) for one in passes) for rank, passes in enumerate(order)]
        index, spent = step.busiest()
        assert index == worked.index(max(worked)) and spent.total == pytest.approx(max(worked))


@pytest.mark.parametrize("key", marked(CASES, SLOW))
def test_the_engine_cuts_where_the_dearest_stage_costs_least(
    ran: Mapping[tuple[str, int, int], Ran], key: tuple[str, int, int]
) -> None:
    """Of all contiguous cuts there are."""
    found, num_stages = ran[key], key[1]
    plan = found.plan(0)
    costs = layer_costs(plan.source.shape, length=LENGTH, first_adapted=plan.adapter.layers[0])
    for traced in found.traced:
        cut = [range(start, stop) for start, stop in pairwise(traced.parts)]
        best = min(cost_key(costs, other) for other in all_cuts(len(costs), num_stages))
        assert cost_key(costs, cut) == best
        assert len({len(stage) for stage in cut[1:-1]} | {len(cut[0]) - 1, len(cut[-1]) - 1}) > 1, "not the even cut"


@pytest.mark.parametrize("key", marked(CASES, SLOW))
def test_what_the_engine_keeps_beside_autograd(
    ran: Mapping[tuple[str, int, int], Ran], key: tuple[str, int, int]
) -> None:
    """Of each micro-batch in flight up to 2 d numbers a token, as the dry run counts them; and integers."""
    found, tokens = ran[key], ROWS * LENGTH
    for rank, traced in enumerate(found.traced):
        plan = found.plan(rank)
        stage = plan.stage
        each = engine_bytes_in_flight(stage, tokens=tokens)
        # Positions; on the first stage, tokens; and labels, see Supervised.
        integers = 8 * tokens * (2 if stage.is_first else 1)
        labels = 4 * 8 * ROWS * SUPERVISED * stage.is_last
        for held in traced.held:
            assert held.floats == len(held.in_flight) * each, (rank, held)
            beside = held.integers - len(held.in_flight) * integers
            assert 0 <= beside <= labels, (rank, held)  # autograd keeps some of the labels itself
        memory = stage_memory(stage, tokens=tokens)
        assert max(held.floats + held.once for held in traced.held) == memory.engine, rank
    if key[0] == "plain":
        d = found.plan(0).source.shape.hidden_size
        expected = [2 * d if 0 < stage < key[1] - 1 else d for stage in range(key[1])]
        assert [traced.held[0].floats / 4 / tokens for traced in found.traced] == expected
