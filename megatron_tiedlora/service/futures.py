"""What a service remembers of each operation: its future, how it is written to a journal, and what refuses it."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.parallel.agreement import packed, unpacked
from megatron_tiedlora.service import operations
from megatron_tiedlora.service.journal import Journal, Place
from megatron_tiedlora.service.operations import Failure, Operation, OperationResult

_LENGTH_BYTES = 4


class Refused(UserError):
    """A request that is not accepted. `status` is the HTTP status to answer with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What each owner may use.

    Attributes:
        models: models of sessions that are alive.
        rank: the rank of a model.
        tokens: tokens of a request, with those that it may generate.
        queued_bytes: the size of requests that have no answer yet.
        disk_bytes: the size of saved weights.
        sessions: sessions that are alive.
        idle_seconds: time without a heartbeat after which a session has lapsed, and its models may leave the memory.
        answer_seconds: time for which an answer is kept after the client has fetched it, and the temporary weights of a
            session after its end.
        model_seconds: time after which the models of a lapsed session are forgotten. Saved weights stay.
    """

    models: int = 64
    rank: int = 512
    tokens: int = 2**20
    queued_bytes: int = 256 * 10**6
    disk_bytes: int = 100 * 10**9
    sessions: int = 64
    idle_seconds: float = 600.0
    answer_seconds: float = 600.0
    model_seconds: float = 7 * 86400.0


@dataclass(frozen=True)
class Answer:
    """The result of an operation, and what else the client is told (`model_id`, `path`, `sampling_session_id`). The
    operation is None if it was rejected."""

    operation: Operation | None
    result: OperationResult
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Pending:
    """An operation without a result: "active", or "paused_capacity" if it waits for memory or in a full queue."""

    reason: str


@dataclass
class Future:
    """An operation and its result. Both are read from the journal if they are not in memory.

    Attributes:
        model: the model, or "" for a sample.
        sampler: the sampler of a sample, or the one for which temporary weights are saved.
        number: the number among the operations of the model or the sampler.
        kind: the name of the operation's type.
        backward: whether it is a `Pass` that adds gradients.
        folder: the folder that the operation reads or writes, relative to the folder of the service, or "".
        size: bytes that count against the owner's queue.
        extra: what the client is told with the result.
        result_kind: the name of the result's type, or "" if there is none.
        taken: when the client fetched the answer.
        gone: whether the answer is forgotten.
    """

    request: str
    owner: str
    model: str
    sampler: str
    number: int
    kind: str
    backward: bool
    folder: str
    size: int
    extra: dict[str, Any]
    place: Place | None = None
    operation: Operation | None = None
    result: OperationResult | None = None
    result_kind: str = ""
    result_place: Place | None = None
    taken: float | None = None
    gone: bool = False
    calls: list[Callable[[], None]] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        """Return whether the operation has a result."""
        return bool(self.result_kind)

    @property
    def failed(self) -> bool:
        """Return whether the result is a Failure."""
        return self.result_kind == Failure.__name__

    @property
    def changes(self) -> bool:
        """Return whether the operation was done and changed weights or gradients, so that a replay needs it."""
        return (self.backward or self.kind in ("Create", "Load", "Step")) and not self.failed

    def operation_in(self, journal: Journal) -> Operation | None:
        """Return the operation, or None if it was rejected."""
        if "rejected" in self.extra:
            return None
        return _value(journal, self.place, self.kind) if self.operation is None else self.operation

    def result_in(self, journal: Journal) -> OperationResult:
        """Return the result of an answered operation."""
        return _value(journal, self.result_place, self.result_kind) if self.result is None else self.result

    def queue(self, journal: Journal, body: bytearray) -> None:
        """Write the operation, whose `packed` value is `body`, to the journal. `read_future` reads it."""
        fields = {name: getattr(self, name) for name in _WRITTEN}
        self.place = journal.append(record({"record": "operation", **fields}, body))

    def answer(self, journal: Journal, result: OperationResult) -> None:
        """Set the result and write it to the journal. A failure is synced, because later decisions depend on it."""
        kind = type(result).__name__
        head = {"record": "answer", "request": self.request, "kind": kind}
        self.result_place = journal.append(record(head, packed(result)))
        if isinstance(result, Failure):
            journal.sync(self.result_place)
        self.result, self.result_kind = result, kind

    def take(self, journal: Journal, now: float) -> None:
        """Record that the client has fetched the answer. The values leave the memory."""
        if self.taken is None:
            journal.append(record({"record": "taken", "request": self.request, "at": now}))
            self.taken = now
        self.operation = self.result = None


_WRITTEN = ("request", "owner", "model", "sampler", "number", "kind", "backward", "folder", "size", "extra")


def read_future(futures: dict[str, Future], head: dict[str, Any], place: Place) -> None:
    """Apply a record of `Future.queue`, `answer` or `take` to the futures by request."""
    kind = head.pop("record")
    if kind == "operation":
        futures[head["request"]] = Future(**head, place=place)
    elif head["request"] in futures:  # else it was forgotten, and its operation was dropped
        future = futures[head["request"]]
        if kind == "taken":
            future.taken = head["at"]
        else:
            future.result_kind, future.result_place = head["kind"], place


def live_requests(futures: Iterable[Future]) -> dict[str, float | None]:
    """Return what a new segment says about operations in earlier ones: their requests, and when they were taken."""
    return {future.request: future.taken for future in futures}


def live_futures(futures: Mapping[str, Future], head: Mapping[str, Any]) -> dict[str, Future]:
    """Return the futures by request that the record `head` has in its `live_requests`, and whose segments are there."""
    live = {request: taken for request, taken in head["live"].items() if request in futures}
    return {request: replace(futures[request], taken=taken) for request, taken in live.items()}


def used_segments(futures: Iterable[Future]) -> set[int]:
    """Return the segments of the journal that these futures need."""
    return {place.segment for future in futures for place in (future.place, future.result_place) if place is not None}


def record(head: Mapping[str, Any], body: bytes | bytearray = b"") -> bytes:
    """Return the payload of a journal's record: a JSON object, and a value serialised by `packed`."""
    encoded = json.dumps(head).encode()
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded + body


def opened(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the JSON object and the serialised value of a `record`."""
    end = _LENGTH_BYTES + int.from_bytes(payload[:_LENGTH_BYTES], "little")
    return json.loads(payload[_LENGTH_BYTES:end]), payload[end:]


def _value(journal: Journal, place: Place | None, kind: str) -> Any:
    assert place is not None
    return unpacked(getattr(operations, kind), opened(journal.read(place))[1], sender=0)
