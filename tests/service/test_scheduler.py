"""The scheduler: rounds, places in memory, saved states, and models that come back."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.desk_engine import BAD_TOKEN, CREATE, SAMPLE, HashEngine, digest, one_pass, step

from megatron_tiedlora.runtime.ending import End
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.service import scheduler as module
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.operations import (
    Create,
    Done,
    Failure,
    Load,
    OperationResult,
    Pass,
    PassResult,
    Sample,
    Save,
    Step,
    StepResult,
)
from megatron_tiedlora.service.records import Answered, Limits
from megatron_tiedlora.service.scheduler import IDLE_SECONDS, TURN_SECONDS, Scheduler
from megatron_tiedlora.service.worker import WorkerCommand


def passes_of(command: WorkerCommand) -> list[tuple[str, Pass]]:
    return [(model, one) for model, one in command.operations if isinstance(one, Pass)]


def samples_of(command: WorkerCommand) -> list[Sample]:
    return [one for _, one in command.operations if isinstance(one, Sample)]


class Worker:
    """Runs commands as the real one does, with hashes as weights."""

    def __init__(self, most: int) -> None:
        self.models: dict[str, dict[str, Any]] = {}
        self.most, self.num_loads = most, 0
        self.commands: list[WorkerCommand] = []

    def run(self, command: WorkerCommand) -> list[OperationResult]:
        self.commands.append(command)
        results: list[OperationResult] = []
        for model in command.unload:
            del self.models[model]
        for model in command.fresh:
            self.models.get(model, {})["gradients"] = []  # a model of this command has none
        assert len({one.backward for _, one in passes_of(command)}) <= 1
        kinds = [kind for kind, _ in itertools.groupby(type(one) for _, one in command.operations)]
        assert kinds.count(Create) <= 1 and kinds.count(Pass) <= 1 and kinds.count(Sample) <= 1
        for model, one in command.operations:
            if isinstance(one, Create):
                assert model not in self.models
                self.num_loads += 1
                results.append(self._create(model, one))
                assert len(self.models) <= self.most
            else:
                failed = Failure("not here", by_user=False)
                results.append(failed if isinstance(one, Sample) else self._run(model, one))
        return results

    def _create(self, model: str, given: Create) -> OperationResult:
        if given.method == "bad":
            return Failure("no such method", by_user=True)
        self.models[model] = {"weights": digest(given.seed), "gradients": []}
        return self._run(model, Load(given.folder, optimizer=given.optimizer)) if given.folder else Done()

    def _run(self, model: str, one: Any) -> OperationResult:
        if model not in self.models:
            return Failure("not in memory", by_user=False)
        engine = HashEngine.__new__(HashEngine)
        own = self.models[model]
        engine.weights, engine.gradients = {model: own["weights"]}, {model: own["gradients"]}
        result = engine._run(model, one)
        if isinstance(result, Failure):
            engine.gradients[model] = []
        self.models[model] = {"weights": engine.weights[model], "gradients": engine.gradients[model]}
        return result


class Service:
    """A desk, a scheduler and a worker, with a clock."""

    def __init__(self, folder: Path, most: int, *, state_steps: int = 2, round_tokens: int = 8) -> None:
        self.now = 0.0
        self.desk = Desk.open(folder, Limits(), clock=lambda: 1e9 + self.now)
        sizes = {"most_models": most, "state_steps": state_steps, "round_tokens": round_tokens}
        sizes |= {"round_rows": 4, "cache_tokens": 50}
        self.scheduler, self.worker = Scheduler(self.desk, clock=lambda: self.now, **sizes), Worker(most)
        self.session = self.desk.open_session("ann", metadata={})

    def create(self, number: int, create: Create = CREATE) -> tuple[str, str]:
        """A model and the request of its creation."""
        return f"{self.session}:train:{number}", self.desk.create("ann", self.session, number, create, info={})

    def turn(self) -> WorkerCommand:
        command = self.scheduler.next()
        self.scheduler.answer(self.worker.run(command))
        return command

    def result(self, request: str) -> Any:
        answer = self.desk.answer_of("ann", request)
        return answer.result if isinstance(answer, Answered) else None


def operations(seed: int) -> list[Any]:
    """Passes, steps, failing passes and forward passes of a model."""
    drawn, found = random.Random(seed), list[Any]()
    for index in range(12):
        tokens = [20 + 10 * seed + index] * drawn.randint(1, 4)
        backward = drawn.random() < 0.8
        found.append(one_pass(*(tokens if drawn.random() < 0.85 else [BAD_TOKEN]), backward=backward))
        found += [step()] if drawn.random() < 0.5 else []
    return found


def alone(folder: Path, seed: int) -> list[Any]:
    """The results of a model's operations in a service of its own."""
    service = Service(folder, 1)
    model, request = service.create(0, CREATE)
    requests = [request]
    for number, operation in enumerate(operations(seed), 1):
        requests.append(service.desk.submit("ann", model, number, operation))
    while any(service.result(request) is None for request in requests):
        service.turn()
    return [service.result(request) for request in requests]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_SECONDS", 0.0)
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_models_that_take_turns_in_memory_have_the_results_of_each_alone(tmp_path: Path, seed: int) -> None:
    expected = [same(alone(tmp_path / f"alone{number}", number)) for number in range(5)]
    service, drawn = Service(tmp_path / "service", 2), random.Random(seed)
    made = [service.create(number) for number in range(5)]
    left = [list(enumerate(operations(number), 1)) for number in range(5)]
    requests = [[request] for _, request in made]
    while any(left) or any(service.result(request) is None for own in requests for request in own):
        number = drawn.randrange(5)
        if left[number] and drawn.random() < 0.7:
            index, operation = left[number].pop(0)
            requests[number].append(service.desk.submit("ann", made[number][0], index, operation))
        service.now += drawn.choice((0.0, 0.0, IDLE_SECONDS))
        service.turn()
    for own, right in zip(requests, expected, strict=True):
        assert same([service.result(request) for request in own]) == right
    assert service.worker.num_loads > 8, "models came back"


def same(results: Sequence[Any]) -> list[str]:
    """Results as texts."""
    return [repr(result) for result in results]


def test_the_longest_unserved_model_comes_first(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 3, round_tokens=4)
    models = [service.create(number)[0] for number in range(3)]
    service.turn()
    requests = {model: [] for model in models}
    for number in range(1, 7):  # one client sends much, and before the others
        requests[models[0]].append(service.desk.submit("ann", models[0], number, one_pass(30, 31, number)))
    for model in models[1:]:
        requests[model].append(service.desk.submit("ann", model, 1, one_pass(40, 41)))
    served = [[model for model, _ in passes_of(service.turn())] for _ in range(3)]
    assert served == [[models[0]], [models[1], models[2]], [models[0]]]


def test_a_larger_operation_is_alone_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 2, round_tokens=3)
    (one, _), (other, _) = service.create(0), service.create(1)
    service.turn()
    service.desk.submit("ann", one, 1, one_pass(*range(30, 39)))
    service.desk.submit("ann", other, 1, one_pass(50, backward=False))
    assert [[model for model, _ in passes_of(service.turn())] for _ in range(2)] == [[one], [other]]


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [
        ([SAMPLE] * 5, [2, 2, 1]),  # 2 sequences each, of 4 at once
        ([replace(SAMPLE, num_samples=9), SAMPLE, SAMPLE], [1, 2]),
        ([replace(SAMPLE, max_tokens=9), replace(SAMPLE, prompt=(1,) * 9), SAMPLE], [1, 2]),  # 4 x (9 + 9) tokens
    ],
)
def test_samples_share_a_command_up_to_its_limits(tmp_path: Path, samples: list[Any], sizes: list[int]) -> None:
    service = Service(tmp_path / "service", 1)
    sampler = service.desk.open_sampler("ann", service.session, 0, path=None)
    for number, sample in enumerate(samples):
        service.desk.sample("ann", sampler, number, sample)
    assert [len(samples_of(service.turn())) for _ in sizes] == sizes


def test_owners_take_turns_however_many_models_and_samples_one_has(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 6, round_tokens=2)
    bob = service.desk.open_session("bob", metadata={})
    sampler = service.desk.open_sampler("ann", service.session, 0, path=None)
    others = service.desk.open_sampler("bob", bob, 0, path=None)
    models = [service.create(number)[0] for number in range(4)]
    service.desk.create("bob", bob, 0, CREATE, info={})
    service.turn()
    for model in models:
        service.desk.submit("ann", model, 1, one_pass(30, 31))
    for number in range(1, 4):
        service.desk.submit("bob", f"{bob}:train:0", number, one_pass(40, 41))
    for number in range(5):
        service.desk.sample("ann", sampler, number, SAMPLE)
    service.desk.sample("bob", others, 0, replace(SAMPLE, seed=9))
    commands = [service.turn() for _ in range(6)]
    served = [model in models for command in commands for model, _ in passes_of(command)]
    assert served == [True, False, True, False, True, False]
    assert [sample.seed == 9 for sample in samples_of(commands[0])] == [False, True]


def test_an_operation_that_ends_the_server_again_and_again_fails(tmp_path: Path) -> None:
    """Operations that ran together with it fail too, and later ones do not."""
    for crashes in (4, 2):
        folder = tmp_path / str(crashes)
        service = Service(folder, 1)
        model, _ = service.create(0)
        service.turn()
        requests = [service.desk.submit("ann", model, 1, one_pass(30)), service.desk.submit("ann", model, 2, step())]
        for _ in range(crashes):
            service.scheduler.next()
            service.scheduler.crashed(End(0, 1, StopRequests()))
            service.desk.close()
            service = Service(folder, 1)
        for _ in range(4):
            service.turn()
        found = [type(service.result(request)) for request in requests]
        assert found == ([Failure, Failure] if crashes == 4 else [PassResult, StepResult])
        if crashes == 4:
            assert "ended 3 times" in service.result(requests[0]).message
        later = service.desk.submit("ann", model, 3, one_pass(31))
        service.turn()
        assert isinstance(service.result(later), PassResult), "what had been answered is not blamed"
        service.desk.close()


def test_a_model_that_has_fallen_out_of_step_shares_its_next_passes_with_the_others(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 3, round_tokens=20)
    models = [service.create(number)[0] for number in range(3)]
    service.turn()
    kinds = list[tuple[int, int]]()
    for model in models[1:]:
        service.desk.submit("ann", model, 1, one_pass(30))
    service.turn()
    for number in range(1, 7):  # the first model takes its steps while the others have passes
        for model in models:
            late = model == models[0]
            service.desk.submit("ann", model, number + (not late), one_pass(31) if number % 2 == late else step())
        command = service.turn()
        kinds.append((len(passes_of(command)), sum(isinstance(one, Step) for _, one in command.operations)))
    while (command := service.turn()).operations:
        kinds.append((len(passes_of(command)), sum(isinstance(one, Step) for _, one in command.operations)))
    assert kinds.count((3, 0)) >= 3 and all(not (passes and steps) for passes, steps in kinds), kinds


def test_nothing_is_asked_in_a_loop_while_a_model_waits_for_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(tmp_path / "service", 1)
    service.create(0), service.turn()
    service.create(1)
    waited = list[float]()
    ready = service.desk.ready
    monkeypatch.setattr(service.desk, "ready", lambda seconds: waited.append(seconds) or ready(0.0))
    monkeypatch.setattr(module, "TICK_SECONDS", 5.0)
    for _ in range(3):
        assert not service.turn().operations
    assert waited.count(5.0) >= 2


def test_the_first_sample_waits_for_those_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_SECONDS", 1.0)
    service = Service(tmp_path / "service", 1)
    sampler = service.desk.open_sampler("ann", service.session, 0, path=None)

    def send() -> None:
        for number in range(2):
            time.sleep(0.1 * number)
            service.desk.sample("ann", sampler, number, SAMPLE)

    monkeypatch.setattr(module, "TICK_SECONDS", 10.0)
    sender = threading.Thread(target=send)
    sender.start()
    assert len(samples_of(service.turn())) == 2
    sender.join()


def test_a_state_is_saved_after_some_steps(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 1)
    model, _ = service.create(0)
    for number in range(1, 9, 2):
        service.desk.submit("ann", model, number, one_pass(30 + number))
        service.desk.submit("ann", model, number + 1, step())
        for _ in range(3):
            service.turn()
    saves = [one for command in service.worker.commands for _, one in command.operations if isinstance(one, Save)]
    assert [Path(one.folder).name for one in saves] == ["4", "8"] and service.desk.origin(model) == saves[-1].folder


def test_a_state_is_saved_after_a_load(tmp_path: Path) -> None:
    """The weights that it read may be deleted."""
    service = Service(tmp_path / "service", 1, state_steps=100)
    model, _ = service.create(0)
    service.desk.save("ann", model, 1, "first", kind="weights")
    service.turn(), service.turn()
    service.desk.load("ann", model, 2, f"tinker://{model}/weights/first", optimizer=True)
    service.turn(), service.turn()
    *_, state = (one for command in service.worker.commands for _, one in command.operations)
    assert isinstance(state, Save) and Path(state.folder).name == "2" and service.desk.origin(model) == state.folder


def test_a_model_that_cannot_be_created_leaves_its_place(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 1)
    _, failing = service.create(0, Create("bad", 4, 8.0, ("qkv",), 1))
    service.turn()
    assert isinstance(service.result(failing), Failure) and service.desk.numbers()["models_in_memory"] == 0
    _, request = service.create(1)
    service.turn()
    assert not isinstance(service.result(request), Failure) and service.desk.numbers()["models_in_memory"] == 1


def test_a_place_is_given_up_by_an_idle_model_at_once_and_by_a_busy_one_later(tmp_path: Path) -> None:
    service = Service(tmp_path / "service", 1)
    (one, _) = service.create(0)
    service.turn()
    _, waiting = service.create(1)
    service.turn()
    assert service.result(waiting) is None
    number = 0
    while service.result(waiting) is None:  # the first model always has work
        number += 1
        service.desk.submit("ann", one, number, one_pass(30))
        service.now += IDLE_SECONDS / 2
        service.turn()
    assert service.now >= TURN_SECONDS
    _, third = service.create(2)
    service.now += IDLE_SECONDS
    service.turn()
    assert service.result(third) is not None or service.desk.numbers()["models_in_memory"] == 1
