"""A desk that runs each operation when it is submitted, without an engine: what the HTTP part asks for, in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron_tiedlora.service.operations import (
    Create,
    Done,
    Failure,
    Operation,
    OperationResult,
    Pass,
    PassResult,
    Sample,
    Sampled,
    SampleResult,
    Step,
    StepResult,
)
from megatron_tiedlora.service.records import Answered, Refused, Unanswered


@dataclass
class FakeModel:
    """What is known of a model, as `ModelInfo`."""

    owner: str
    create: Create
    info: Mapping[str, str]
    created: float = 1e9


@dataclass
class FakeWeights:
    """A checkpoint, as `SavedWeights`, or with the key "" the base."""

    owner: str
    key: str
    create: Create
    created: float = 1e9
    size: int = 1234

    @property
    def path(self) -> str:
        """The name that samplers have for it."""
        return self.key


def logprobs_of(operation: Pass) -> torch.Tensor:
    """What this desk takes for the log-probabilities of the targets: -token / 100."""
    return -operation.targets.float() / 100


def result_of(operation: Operation) -> OperationResult:
    """The result of an operation."""
    if isinstance(operation, Pass):
        logprobs = logprobs_of(operation)
        return PassResult(float(-(operation.inputs[0] * logprobs).sum()), operation.lengths, logprobs)
    if isinstance(operation, Step):
        return StepResult(1, 0.5)
    if isinstance(operation, Sample):
        tokens = tuple((operation.seed + index) % 7 for index in range(operation.max_tokens))
        top = (((3, -0.5), (4, -1.5)),) * len(tokens) if operation.num_top else ((),) * len(tokens)
        one = Sampled(tokens, (-0.25,) * len(tokens), False, top)
        prompt = (float("nan"), *(-1.0 for _ in operation.prompt[1:])) if operation.prompt_logprobs else None
        return SampleResult((one,) * operation.num_samples, prompt, None)
    return Done()


@dataclass
class FakeDesk:
    """The desk. With `holds` no operation gets its result before `release`."""

    holds: bool = False
    models: dict[str, FakeModel] = field(default_factory=dict)
    weights: dict[str, FakeWeights] = field(default_factory=dict)
    samplers: dict[str, FakeWeights] = field(default_factory=dict)
    operations: list[tuple[str, int, Operation]] = field(default_factory=list)
    answers: dict[str, tuple[str, Answered | None, list[Callable[[], None]]]] = field(default_factory=dict)
    events: list[tuple[str, ...]] = field(default_factory=list)
    waiting: list[tuple[str, Answered]] = field(default_factory=list)
    numbers_: dict[str, float] = field(default_factory=lambda: {"models": 2.0, "operations_total": 12345678.0})
    _ids: Any = field(default_factory=itertools.count)

    def open_session(self, owner: str, *, metadata: Mapping[str, str]) -> str:
        self.events.append(("open", owner))
        return f"session{next(self._ids)}"

    def heartbeat(self, owner: str, session: str) -> None:
        self.events.append(("heartbeat", owner, session))
        if session == "finished":
            raise Refused(410, "the session finished was finished; open a new one")

    def finish_session(self, owner: str, session: str) -> None:
        self.events.append(("finish", owner, session))

    def create(self, owner: str, session: str, number: int, create: Create, *, info: Mapping[str, str]) -> str:
        model = f"{session}:train:{number}"
        self.models[model] = FakeModel(owner, create, info)
        return self._add(owner, model, 0, create, model_id=model)

    def submit(self, owner: str, model: str, number: int, operation: Operation, *, size: int = 0) -> str:
        self.model_of(owner, model)
        return self._add(owner, model, number, operation)

    def reject(self, owner: str, model: str, number: int, kind: type[Operation], message: str) -> str:
        self.model_of(owner, model)
        request = f"request{next(self._ids)}"
        self.events.append(("reject", owner, model, str(number), message))
        self.answers[request] = (owner, Answered(Failure(message, True), {}), [])
        return request

    def save(
        self, owner: str, model: str, number: int, name: str | None, *, kind: str, session_number: int | None = None,
        overwrite: bool = False, ttl_seconds: float | None = None,
    ) -> str:  # fmt: skip
        path = f"tinker://{model}/{kind}/{name or 'temporary'}"
        if path in self.weights and not overwrite:
            raise Refused(409, f"{path} exists; choose another name, or overwrite it")
        self.weights[path] = FakeWeights(owner, path, self.model_of(owner, model).create)
        sampler = f"sampler{next(self._ids)}"
        self.samplers[sampler] = self.weights[path]
        return self._add(owner, model, number, Step(0, 0, 0, 0, 0, 0), Done(), path=path, sampling_session_id=sampler)

    def load(self, owner: str, model: str, number: int, path: str, *, optimizer: bool) -> str:
        self.checkpoint_of(owner, path)
        return self._add(owner, model, number, Step(0, 0, 0, 0, 0, 0), Done(), path=path)

    def open_sampler(self, owner: str, session: str, number: int, *, path: str | None) -> str:
        sampler = f"sampler{next(self._ids)}"
        base = FakeWeights(owner, "", Create("lora", 1, 1.0, (), 0))
        self.samplers[sampler] = base if path is None else self.checkpoint_of(owner, path)
        return sampler

    def sample(self, owner: str, sampler: str, number: int, sample: Sample) -> tuple[str, list[str]]:
        folder = self.sampler_of(owner, sampler).key
        request = self._add(owner, "", number, replace(sample, folder=folder))
        return request, [f"{request}-{index}" for index in range(sample.num_samples)]

    def model_of(self, owner: str, model: str) -> FakeModel:
        return self._owned(self.models.get(model), owner)

    def sampler_of(self, owner: str, sampler: str) -> FakeWeights:
        return self._owned(self.samplers.get(sampler), owner)

    def checkpoints(self, owner: str, model: str | None = None) -> list[FakeWeights]:
        return [one for one in self.weights.values() if one.owner == owner and (model is None or model in one.key)]

    def checkpoint_of(self, owner: str, path: str) -> FakeWeights:
        return self._owned(self.weights.get(path), owner)

    def delete_checkpoint(self, owner: str, path: str) -> None:
        self.checkpoint_of(owner, path)
        del self.weights[path]

    def answer_of(self, owner: str, request: str) -> Answered | Unanswered:
        if request == "broken":
            raise RuntimeError("secret-of-the-request")
        found = self.answers.get(request)
        if found is None or found[0] != owner:
            raise Refused(404, f"the request '{request}' is unknown")
        return found[1] or Unanswered("paused_capacity")

    def when_done(self, request: str, call: Callable[[], None]) -> None:
        self.answers[request][2].append(call)
        if self.answers[request][1] is not None:
            call()

    def forget_call(self, request: str, call: Callable[[], None]) -> None:
        self.answers[request][2].remove(call)

    def taken(self, owner: str, request: str) -> None:
        self.events.append(("taken", owner, request))

    def numbers(self) -> dict[str, float]:
        return self.numbers_

    def release(self) -> None:
        """Give all operations that wait their results."""
        for request, answer in self.waiting:
            owner, _, calls = self.answers[request]
            self.answers[request] = (owner, answer, calls)
            for call in list(calls):
                call()
        self.waiting.clear()

    def _add(
        self,
        owner: str,
        model: str,
        number: int,
        operation: Operation,
        result: OperationResult | None = None,
        **extra: Any,
    ) -> str:
        request = f"request{next(self._ids)}"
        self.operations.append((model, number, operation))
        answer = Answered(result or result_of(operation), extra)
        self.answers[request] = (owner, None if self.holds else answer, [])
        if self.holds:
            self.waiting.append((request, answer))
        return request

    @staticmethod
    def _owned(found: Any, owner: str) -> Any:
        if found is None or found.owner != owner:
            raise Refused(404, "it is unknown")
        return found
