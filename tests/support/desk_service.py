"""A desk with its engine and a clock, for tests."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.futures import Answer, Limits, Refused
from megatron_tiedlora.service.journal import Journal
from megatron_tiedlora.service.operations import Failure
from support.desk_engine import CREATE, HashEngine


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@dataclass
class Service:
    """A desk with its engine and clock."""

    folder: Path
    limits: Limits
    clock: Clock

    def __post_init__(self) -> None:
        self.desk = Desk.open(self.folder, self.limits, clock=self.clock)
        self.engine = HashEngine(self.desk)

    def again(self) -> Service:
        """The service after a restart."""
        self.desk.close()
        return Service(self.folder, self.limits, self.clock)

    def session(self, owner: str = "ann") -> str:
        return self.desk.open_session(owner, metadata={})

    def model(self, owner: str = "ann", session: str = "", number: int = 0, **changes: Any) -> str:
        """A new model, created."""
        session = session or self.session(owner)
        self.desk.create(owner, session, number, replace(CREATE, **changes), info={"k": "v"})
        self.run()
        return f"{session}:train:{number}"

    def run(self) -> None:
        while self.engine.turn():
            pass

    def result(self, request: str, owner: str = "ann") -> Any:
        self.run()
        answer = self.desk.answer_of(owner, request)
        assert isinstance(answer, Answer)
        return answer.result

    def saved(self, model: str, number: int, name: str | None = "w", *, owner: str = "ann", **more: Any) -> Any:
        """What the client is told about saved weights."""
        more.setdefault("kind", "weights" if name else "sampler_weights")
        request = self.desk.save(owner, model, number, name, **more)
        assert not isinstance(self.result(request, owner), Failure)
        answer = self.desk.answer_of(owner, request)
        assert isinstance(answer, Answer)
        return answer.extra

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds
        self.desk.ready(0)


def limited(service: Service, **limits: Any) -> Service:
    service.desk.close()
    return Service(service.folder, Limits(**limits), service.clock)


def status(call: Any, *args: Any, **more: Any) -> int:
    """The status with which a call is refused."""
    with pytest.raises(Refused) as caught:
        call(*args, **more)
    assert "\n" not in str(caught.value)
    return caught.value.status


def windows(service: Service, model: str, *operations: Any) -> list[Any]:
    """The results of operations from number 1."""
    requests = [service.desk.submit("ann", model, number, one) for number, one in enumerate(operations, 1)]
    return [service.result(request) for request in requests]


def journals(desk: Desk) -> list[Journal]:
    return [desk._store.registry.journal, *(queue.journal for queue in desk._store.models.values())]


def crashed(desk: Desk, folder: Path, draw: random.Random | None = None) -> None:
    """Copy the folder of a desk as a crash leaves it, and close the desk. With `draw`, the power failed: of what was
    not synced there is a part of random length, perhaps with rubbish behind it."""
    shutil.copytree(desk._store.folder, folder, ignore=shutil.ignore_patterns(".owner*"))
    for journal in journals(desk) if draw else ():
        file = folder / journal._path(journal._segment).relative_to(desk._store.folder)
        if file.exists():
            kept = draw.randint(journal._synced, journal.size)
            with file.open("r+b") as stream:
                stream.truncate(kept)
                stream.seek(kept)
                stream.write(draw.choice((b"", bytes(50), b"\xf1TLJ rubbish")))
    desk.close()
