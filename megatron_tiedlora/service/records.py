"""What clients may use, what they are told, and what refuses a request."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.service.operations import Create, OperationResult


class Refused(UserError):
    """A request that is not accepted. `status` is the HTTP status to answer with."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What each owner may use, and how long it is remembered."""

    models: int = 64  # of sessions that are alive
    rank: int = 512  # of a model
    tokens: int = 2**20  # of a request, with those that it may generate
    queued_bytes: int = 256 * 10**6  # of requests that have no answer yet
    disk_bytes: int = 100 * 10**9  # of saved weights, and of requests and answers that are kept
    sessions: int = 64  # that are alive
    idle_seconds: float = 600.0  # without a heartbeat until a session has lapsed, and its models may leave the memory
    answer_seconds: float = 600.0  # for answers after they were fetched, and temporary weights after their session
    model_seconds: float = 7 * 86400.0  # for models of a lapsed session; saved weights stay


@dataclass(frozen=True)
class Answered:
    """The result of an operation, and what else the client is told (`model_id`, `path`, `sampling_session_id`)."""

    result: OperationResult
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Unanswered:
    """An operation without a result: "active", or "paused_capacity" if it waits for memory or in a full queue."""

    reason: str


@dataclass(frozen=True)
class ModelInfo:
    """What a client may know of a model. `state` is "waiting" until it is created, then "active", or "failed"."""

    create: Create
    info: Mapping[str, str]
    state: str
    created: float


@dataclass(frozen=True)
class SamplerInfo:
    """Weights to sample from: their tinker:// path and their folder below that of the service, or "" for the base."""

    session: str
    path: str
    folder: str


@dataclass(frozen=True)
class SavedWeights:
    """Weights that a model has saved."""

    create: Create  # of their model
    key: str  # their tinker:// path
    folder: str  # relative to the folder of the service
    size: int  # bytes of their files
    created: float
    sampler: str  # that they were saved for if they have no name, else ""


Value = TypeVar("Value")


def known(value: Value | None, what: str, name: str) -> Value:
    """Return `value`. Raise Refused if it is None: nothing has the name, or others have it, who must not be found."""
    if value is None:
        raise Refused(404, f"the {what} {shown(name)} is unknown")
    return value


def check_limit(what: str, value: int, limit: int, fix: str) -> None:
    """Raise Refused if a value is above a limit of its owner."""
    if value > limit:
        raise Refused(400, f"{what}: {value:,} is above the limit of {limit:,}; {fix}")
