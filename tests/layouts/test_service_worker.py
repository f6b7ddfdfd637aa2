"""Models of a training service on DeepSpeed's engines: each has the bits of a service of its own, whatever others do in
between, and those of `tiedlora train`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import join_as_launched, run_on_ranks
from support.oracle_training import SETTINGS
from support.service_steps import TARGETS, VOCABULARY, full_passes, plan_of, train_five_steps
from support.tiny_models import write_tiny_model
from torch import distributed

from megatron_tiedlora.adapters.tied_adapter import initial_values
from megatron_tiedlora.config.settings import DEFAULT_TASK, make_settings
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.service.batches import Division
from megatron_tiedlora.service.operations import Create, Failure, Load, Pass, PassResult, Save, Step, StepResult
from megatron_tiedlora.service.worker import Worker, WorkerCommand
from megatron_tiedlora.training.build import build_model

MODELS = {
    "one": Create("tl6", 3, 6.0, ("qkv",), seed=1),
    "two": Create("lora", 2, 4.0, ("qkv", "o_proj", "gate_up", "down_proj"), seed=2),
    "three": Create("tl5", 4, 4.0, ("qkv", "down_proj"), seed=3),
}
NUMBERS = {
    "one": Step(1e-2, 0.9, 0.95, 1e-12, 0.0, 0.0),
    "two": Step(2e-2, 0.8, 0.99, 1e-8, 0.1, 0.0),
    "three": Step(3e-2, 0.9, 0.999, 1e-8, 0.01, 0.25),  # its gradients are clipped
}
OBJECTIVES = {"one": "cross_entropy", "two": "ppo", "three": "dro"}
LAYOUTS = {1: [(1, 1, 1)], 2: [(2, 1, 1), (1, 2, 1), (1, 1, 2)], 4: [(2, 2, 1), (1, 2, 2)]}


def a_pass(model: str, number: int, *, backward: bool = True, count: int = 5) -> Pass:
    """A pass of some rows of different lengths, the same for the same arguments."""
    drawn = torch.Generator().manual_seed(100 * list(MODELS).index(model) + number)
    lengths = tuple(torch.randint(1, 14, (count,), generator=drawn).tolist())
    size, objective = sum(lengths), OBJECTIVES[model]
    tokens, targets = torch.randint(3, VOCABULARY, (2, size), generator=drawn)
    inputs = torch.randn(2, size, generator=drawn)
    if objective != "cross_entropy":
        inputs[0] = 0.5 * inputs[0] - 5.5
    return Pass(lengths, tokens, targets, inputs, objective, SETTINGS[objective], backward)


def script(model: str, folder: str) -> list[Any]:
    """The operations of a model: two passes a step, a forward pass, and a checkpoint that is loaded again later."""
    step, saved = NUMBERS[model], f"{folder}/{model}"
    first = [MODELS[model], a_pass(model, 1), a_pass(model, 2), step, Save(saved, optimizer=True)]
    again = [a_pass(model, 3, count=2), step, Load(saved, optimizer=True), a_pass(model, 4), step]
    return [*first, *again, a_pass(model, 5, backward=False), Save(f"{saved}-adapter", optimizer=False)]


@dataclass(frozen=True)
class Case:
    """A layout, and the operations of models in order, each with its model; several in a list run in one command."""

    layout: tuple[int, int, int]
    settings: Mapping[str, Any]
    commands: Sequence[Sequence[tuple[str, Any]]]
    shares: bool


@dataclass(frozen=True)
class Found:
    """The results of each model on rank 0, and the full tensors of each at the end."""

    results: dict[str, list[Any]]
    states: dict[str, dict[str, torch.Tensor]]


def run_services(cases: list[Case], folder: str) -> list[Found]:
    """Every case on this rank, one after another."""
    device = join_as_launched(folder)
    return [_serve(case, device) for case in cases]


def _serve(case: Case, device: torch.device) -> Found:
    tp_size, pp_size, _ = case.layout
    own = {**case.settings, "tensor_parallel": tp_size, "pipeline_parallel": pp_size}
    plan = plan_run(make_settings(own), rank=distributed.get_rank(), world_size=distributed.get_world_size())
    sizes = {"dp_size": plan.grid.dp_size, "multiple": plan.layout.pad_multiple}
    division = Division(capacity=48, shares=case.shares, **sizes)
    worker = Worker(plan, build_model({"largest": plan}, device, empty=True), division, lambda _: [])
    results: dict[str, list[Any]] = {}
    for some in case.commands:
        passes = tuple(one for one in some if isinstance(one[1], Pass))
        creates = tuple(one for one in some if isinstance(one[1], Create))
        others = tuple(one for one in some if not isinstance(one[1], Create | Pass))
        operations = (*creates, *passes, *others)
        for (model, _), result in zip(operations, worker.run(WorkerCommand(operations=operations)), strict=True):
            results.setdefault(model, []).append(result)
    runner = worker.runner
    states = {name: runner.full_state(name, plan.layout_of(own.config)) for name, own in runner.adapters.items()}
    return Found(results, states)


def run_trained(layouts: list[tuple[int, int, int]], settings: dict[str, Any], folder: str) -> list[bool]:
    """For each layout, whether five steps of a model end with the bits of `tiedlora train` on the same tokens."""
    device, found = join_as_launched(folder), []
    for layout in layouts:
        expected, (plan, division) = train_five_steps(settings, layout, device), plan_of(settings, layout)
        worker = Worker(plan, build_model({"largest": plan}, device, empty=True), division, lambda _: [])
        adapter = plan.adapter
        create = Create(adapter.method, adapter.rank, adapter.alpha, TARGETS, seed=5)
        worker.run(WorkerCommand(operations=(("it", create),)))
        for of_step in full_passes():
            worker.run(WorkerCommand(operations=tuple(("it", one) for one in of_step)))
            worker.run(WorkerCommand(operations=(("it", Step(1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5)),)))
        state, initial = worker.runner.full_state("it", plan.layout_of(adapter)), initial_values(adapter)
        found.append(all(torch.equal(value, expected[name]) for name, value in state.items()))
        assert plan.grid.rank or any(not torch.equal(value, initial[name]) for name, value in state.items())
    return found


def alone(model: str, folder: Path) -> list[list[tuple[str, Any]]]:
    """The commands of a service with one model, one operation each."""
    return [[(model, operation)] for operation in script(model, str(folder))]


def together(folder: Path, seed: int) -> Iterator[list[tuple[str, Any]]]:
    """The operations of all models in a random order, some of them in one command."""
    left = {model: script(model, str(folder)) for model in MODELS}
    drawn = random.Random(seed)
    while left:
        some: list[tuple[str, Any]] = []
        for model in drawn.sample(sorted(left), k=drawn.randint(1, len(left))):
            operation = left[model][0]
            kinds = {one.backward for _, one in some if isinstance(one, Pass)}
            if not isinstance(operation, Pass) or not kinds or kinds == {operation.backward}:
                some.append((model, left[model].pop(0)))
        left = {model: own for model, own in left.items() if own}
        yield some


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("model")
    model = write_tiny_model(folder / "base", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    of_base = {"model": str(model), "task": DEFAULT_TASK, "dtype": "fp32", "ds_config": "zero0.json"}
    return {**of_base, "method": "lora", "rank": 8}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_model_has_the_bits_of_a_service_alone(settings: dict[str, Any], tmp_path: Path, ranks: int) -> None:
    """Also where micro-batches are shared in one process. At other layouts the bits of rows depend on their number."""
    cases = list[Case]()
    sharded = [((1, 1, 2), {**settings, "ds_config": "zero3.json"})] if ranks == 2 else []
    for number, (layout, given) in enumerate([*((layout, settings) for layout in LAYOUTS[ranks]), *sharded]):
        for name in ("alone", "together"):
            (tmp_path / f"{number}-{name}").mkdir()
        cases += [Case(layout, given, alone(model, tmp_path / f"{number}-alone"), False) for model in MODELS]
        cases.append(Case(layout, given, list(together(tmp_path / f"{number}-together", seed=ranks)), ranks == 1))
    found, *_ = run_on_ranks(run_services, cases, str(tmp_path), ranks=ranks, folder=tmp_path)
    for start in range(0, len(cases), len(MODELS) + 1):
        *single, shared = found[start : start + len(MODELS) + 1]
        for model, own in zip(MODELS, single, strict=True):
            assert not any(isinstance(result, Failure) for result in own.results[model]), own.results[model]
            for result, other in zip(own.results[model], shared.results[model], strict=True):
                if isinstance(result, PassResult):
                    assert torch.equal(result.logprobs, other.logprobs) and result.loss == other.loss, model
                else:
                    assert result == other, model
            for tensor, value in own.states[model].items():
                assert torch.equal(value, shared.states[model][tensor]), (model, tensor, cases[start].layout)
            assert [result.step for result in own.results[model] if isinstance(result, StepResult)] == [1, 2, 2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_five_steps_have_the_bits_of_train(settings: dict[str, Any], tmp_path: Path, ranks: int) -> None:
    given = {**settings, "method": "tl6", "rank": 3}
    found = run_on_ranks(run_trained, LAYOUTS[ranks], given, str(tmp_path), ranks=ranks, folder=tmp_path)
    assert found[0] == [True] * len(LAYOUTS[ranks])
