"""An engine for tests of the desk, whose weights are a hash of what happened to them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch

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
    Sampled,
    SampleResult,
    Save,
    Step,
    StepResult,
    Ticket,
)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


BAD_TOKEN = 13  # a pass with it fails
BAD_RATE = 0.5  # a step with it fails

CREATE = Create("tl6", 4, 8.0, ("qkv",), 1)
SAMPLE = Sample("", (1, 2), 2, 3, 5, 1.0, 0, 1.0, (), (), 0, 0, False, None)


def one_pass(*tokens: int, backward: bool = True) -> Pass:
    """A pass of one row."""
    values = torch.tensor(tokens)
    inputs = torch.zeros(2, len(tokens))
    return Pass((len(tokens),), values, values + 1, inputs, "cross_entropy", {}, backward)


def step(rate: float = 0.1) -> Step:
    """A step of AdamW."""
    return Step(rate, 0.9, 0.95, 1e-12, 0.0, 0.0)


def digest(*values: object) -> str:
    """A hash of values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


class HashEngine:
    """Runs what the desk hands out. `weights`, `gradients` and `last` (the last operation) are by model."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.weights: dict[str, str] = {}
        self.gradients: dict[str, list[str]] = {}
        self.last: dict[str, int] = {}
        self.ran: list[Ticket] = []

    def turn(self) -> bool:
        """Run and answer all that is ready; whether there was any."""
        tickets = self.desk.ready(0)
        for ticket in tickets:
            self.desk.answer(ticket.request, self.run(ticket))
        return bool(tickets)

    def run(self, ticket: Ticket) -> OperationResult:
        """The result of one operation."""
        self.ran.append(ticket)
        model, operation = ticket.model, ticket.operation
        if isinstance(operation, Sample):
            seen = _read(operation.folder)["weights"] if operation.folder else "base"
            number = int(digest(seen, replace(operation, folder="")), 16)
            return SampleResult((Sampled((number % 1000,), (-0.5,), True, ()),), None, None)
        if model not in self.weights and not isinstance(operation, Create):
            origin = self.desk.origin(model)
            assert isinstance(origin, str), "a model without a saved state begins with its creation"
            state = _read(origin)
            self.weights[model], self.gradients[model] = state["weights"], state["gradients"]
            self.last[model] = int(Path(origin).name)
        assert ticket.number > self.last.get(model, -1), "an operation ran twice"
        self.last[model] = ticket.number
        if ticket.fresh:
            self.gradients[model] = []
        return self._run(model, operation)

    def _run(self, model: str, operation: object) -> OperationResult:
        weights = self.weights.get(model, "")
        if isinstance(operation, Create):
            if operation.method == "bad":
                return Failure("no such method", by_user=True)
            begin = _read(operation.folder)["weights"] if operation.folder else ""
            self.weights[model], self.gradients[model] = digest(begin, operation.seed), []
        elif isinstance(operation, Pass):
            if BAD_TOKEN in operation.tokens.tolist():
                return Failure("an unlucky token", by_user=True)
            mark = digest(weights, operation.tokens.tolist())
            if operation.backward:
                self.gradients[model].append(mark)
            return PassResult(float(int(mark, 16)), operation.lengths, operation.tokens.float())
        elif isinstance(operation, Step):
            if operation.learning_rate == BAD_RATE:
                return Failure("the loss is nan", by_user=True)
            self.weights[model] = digest(weights, self.gradients[model], operation.learning_rate)
            self.gradients[model] = []
            return StepResult(1, float(int(self.weights[model], 16)))
        elif isinstance(operation, Save):
            _write(operation.folder, {"weights": weights})
        elif isinstance(operation, Load):
            self.weights[model], self.gradients[model] = _read(operation.folder)["weights"], []
        return Done()

    def save(self, model: str) -> None:
        """Save the state of a model."""
        folder = self.desk.state_folder(model, self.last[model])
        _write(str(folder), {"weights": self.weights[model], "gradients": self.gradients[model]})
        self.desk.saved(model, self.last[model], str(folder))

    def unload(self) -> None:
        """Save and drop the models whose sessions have ended."""
        for model in self.desk.lapsed(list(self.weights)):
            if model in self.weights:
                self.save(model)
                self.drop(model)

    def drop(self, model: str) -> None:
        """Drop a model as it is, for want of memory."""
        del self.weights[model], self.gradients[model], self.last[model]
        self.desk.rewind(model)


def _write(folder: str, content: object) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "adapter.json").write_text(json.dumps(content))


def _read(folder: str) -> dict:
    return json.loads(Path(folder, "adapter.json").read_text())
