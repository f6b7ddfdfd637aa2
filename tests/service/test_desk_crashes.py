"""The desk after many crashes at any moments: two clients get what they get from a service that never ends."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.desk_crash import Mark, crashed, watched, written
from support.desk_engine import BAD_RATE, BAD_TOKEN, CREATE, SAMPLE, Clock, HashEngine, one_pass, step

from megatron_tiedlora.service import desk as desk_module
from megatron_tiedlora.service import weights as weights_module
from megatron_tiedlora.service.database import Database
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.operations import Pass, PassResult, Step
from megatron_tiedlora.service.records import Answered, Limits

OWNERS = ("ann", "bob")


class Crash(BaseException):
    """The end of the process at this point."""


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[Database, Mark]:
    return watched(monkeypatch)


@dataclass
class Client:
    """A client with some models, which sends its operations in phases, and remembers ids and results."""

    owner: str
    draw: random.Random
    plans: list[list[list[tuple]]]  # by model: phases of operations
    session: str = ""
    models: list[str] = field(default_factory=list)
    phase: list[int] = field(default_factory=list)
    requests: dict[tuple, str] = field(default_factory=dict)
    results: dict[tuple, Any] = field(default_factory=dict)
    samplers: dict[tuple, str] = field(default_factory=dict)

    def act(self, desk: Desk) -> None:
        """Send or fetch something, perhaps again."""
        if not self.session:
            self.session = desk.open_session(self.owner, metadata={})
        index = self.draw.randrange(len(self.plans))
        plan = self.plans[index]
        phase = self.current(index)
        if phase == len(plan):
            return
        key = self.draw.choice(plan[phase])
        name = (index, key[0])
        if name not in self.requests or self.draw.random() < 0.1:
            if name not in self.results:
                request = self.send(desk, index, key)
                assert self.requests.setdefault(name, request) == request, "a retry has a new future"
        elif name not in self.results:
            answer = desk.answer_of(self.owner, self.requests[name])
            if isinstance(answer, Answered):
                self.results[name] = plain(answer.result)
                if "sampling_session_id" in answer.extra:
                    self.samplers[index, key[0]] = answer.extra["sampling_session_id"]
                if self.draw.random() < 0.8:
                    desk.taken(self.owner, self.requests[name])

    def current(self, index: int) -> int:
        """The first phase of a model that has operations without results."""
        open_phases = (
            number for number, keys in enumerate(self.plans[index])
            if any((index, key[0]) not in self.results for key in keys)
        )  # fmt: skip
        return next(open_phases, len(self.plans[index]))

    def send(self, desk: Desk, index: int, key: tuple) -> str:
        number, kind, *rest = key
        model = f"{self.session}:train:{index}"
        where = (self.owner, model, number)
        if kind == "create":
            return desk.create(self.owner, self.session, index, replace(CREATE, seed=index), info={})
        if kind == "reject":
            return desk.reject(*where, rest[0], "no")
        if kind == "save":
            return desk.save(*where, "w", kind="weights", overwrite=True)
        if kind == "snapshot":
            return desk.save(*where, None, kind="sampler_weights", session_number=100 * index + number)
        if kind == "load":
            return desk.load(*where, f"tinker://{model}/weights/w", optimizer=True)
        if kind == "sample":
            return desk.sample(self.owner, self.samplers[index, rest[0]], number, replace(SAMPLE, seed=number))[0]
        return desk.submit(*where, rest[0])

    @property
    def done(self) -> bool:
        return all(self.current(index) == len(plan) for index, plan in enumerate(self.plans))


def plain(result: Any) -> Any:
    """A result that can be compared."""
    return (result.loss, result.logprobs.tolist()) if isinstance(result, PassResult) else result


def plans(draw: random.Random) -> list[list[list[tuple]]]:
    """The phases of two models: passes and steps, saves and loads, temporary weights and samples from them. The client
    waits for the answers of a phase."""
    made = []
    for _ in range(2):
        phases: list[list[tuple]] = [[(0, "create")]]
        numbers, saved = itertools.count(1), False
        for _ in range(draw.randint(2, 4)):
            phases.append([windowed(draw, next(numbers)) for _ in range(draw.randint(1, 5))])
            kind = draw.choice(("save", "load", "snapshot"))
            if kind == "load" and not saved:
                continue
            number = next(numbers)
            phases.append([(number, kind)])
            saved |= kind == "save"
            if kind == "snapshot":
                phases.append([(10000 * index + number, "sample", number) for index in (1, 2)])
        phases.append([(next(numbers), "submit", one_pass(3, backward=False))])  # shows the weights
        made.append(phases)
    return made


def windowed(draw: random.Random, number: int) -> tuple:
    """A pass or a step, of which some fail."""
    if draw.random() < 0.05:
        return number, "reject", draw.choice((Pass, Step))
    if draw.random() < 0.35:
        return number, "submit", step(BAD_RATE if draw.random() < 0.1 else 0.1)
    token = BAD_TOKEN if draw.random() < 0.1 else 20 + number
    return number, "submit", one_pass(token, backward=draw.random() < 0.85)


def played(
    folder: Path, seed: int, *, crashes: bool, patch: pytest.MonkeyPatch, synced: dict[Database, Mark]
) -> dict[tuple, Any]:
    """The results of two clients."""
    draw = random.Random(seed)
    clients = [Client(owner, draw, plans(random.Random(f"{seed} {owner}"))) for owner in OWNERS]
    clock, count = Clock(), 0
    fuse = [0]

    def burn() -> None:
        fuse[0] -= 1
        if fuse[0] == 0:
            raise Crash

    def burning(call: Callable) -> Callable:
        def burnt(*args: Any, **more: Any) -> Any:
            burn()
            result = call(*args, **more)
            burn()
            return result

        return burnt

    transaction = Database.transaction

    @contextmanager
    def burning_transaction(self: Database, *, durable: bool = True) -> Iterator[None]:
        burn()
        with transaction(self, durable=durable):
            yield
            burn()
        burn()

    with patch.context() as here:
        here.setattr(Database, "transaction", burning_transaction)
        for module in (desk_module, weights_module):
            here.setattr(module, "discard", burning(module.discard))
        desk = Desk.open(folder / "0", Limits(), clock=clock)
        engine = HashEngine(desk)
        while not all(client.done for client in clients):
            if crashes and fuse[0] <= 0 and draw.random() < 0.01:
                fuse[0] = draw.randint(1, 60)
            try:
                for client in clients:
                    if client.session:
                        desk.heartbeat(client.owner, client.session)
                action = draw.random()
                if action < 0.7:
                    draw.choice(clients).act(desk)
                elif action < 0.9:
                    for ticket in desk.ready(0):
                        desk.answer(ticket.request, engine.run(ticket))
                elif action < 0.93 and engine.weights:
                    engine.save(draw.choice(list(engine.weights)))
                elif action < 0.96 and engine.weights:
                    engine.drop(draw.choice(list(engine.weights)))
                elif action < 0.98:
                    clock.now += draw.choice((5, 100, 601))
                    engine.unload()
                elif action < 0.985:
                    desk._database.run("PRAGMA wal_checkpoint").fetchall()
                    synced[desk._database] = written(desk._database)
                elif crashes and draw.random() < 0.3:
                    raise Crash
            except Crash:
                fuse[0], count = 0, count + 1
                crashed(desk, folder / str(count), draw if draw.random() < 0.5 else None, synced)
                shutil.rmtree(folder / str(count - 1))
                desk = Desk.open(folder / str(count), Limits(), clock=clock)
                engine = HashEngine(desk)
        desk.close()
    return {(client.owner, *key): result for client in clients for key, result in client.results.items()}


@pytest.mark.parametrize(
    "begin", [0, 15, 30, *(pytest.param(begin, marks=pytest.mark.slow) for begin in range(45, 405, 15))]
)
def test_any_crashes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: dict[Database, Mark], begin: int
) -> None:
    for seed in range(begin, begin + 15):
        folder = tmp_path / str(seed)
        (folder / "alone").mkdir(parents=True)
        (folder / "crashing").mkdir()
        wanted = played(folder / "alone", seed, crashes=False, patch=monkeypatch, synced=synced)
        found = played(folder / "crashing", seed, crashes=True, patch=monkeypatch, synced=synced)
        assert found == wanted, f"seed {seed}"
        shutil.rmtree(folder)
