"""The sessions, samplers and saved weights of a service, and the journal that keeps them."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from megatron_tiedlora.base.messages import bytes_in_words, nearest_name, shown
from megatron_tiedlora.parallel.agreement import packed, unpacked
from megatron_tiedlora.service.futures import (
    Future,
    Limits,
    Refused,
    live_futures,
    live_requests,
    opened,
    read_future,
    record,
)
from megatron_tiedlora.service.journal import Journal, Place
from megatron_tiedlora.service.operations import Create

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")  # no dot at the start: temporary files have one


@dataclass(frozen=True)
class SessionInfo:
    """A client's session. `ended` is when it was finished or had lapsed; a lapsed one goes on with its next call."""

    key: str
    owner: str
    metadata: dict[str, str]
    created: float
    ended: float | None = None
    finished: bool = False


@dataclass(frozen=True)
class SamplerInfo:
    """Weights to sample from.

    Attributes:
        number: the client's number of the sampler in its session.
        path: the tinker:// path of the weights; "" for the base.
        folder: the folder of the weights, relative to the folder of the service; "" for the base.
        create: how the model of the weights was created, or None for the base.
    """

    key: str
    owner: str
    session: str
    number: int
    path: str
    folder: str
    create: Create | None


@dataclass(frozen=True)
class SavedWeights:
    """Weights that a model has saved.

    Attributes:
        key: their tinker:// path.
        size: bytes of their files.
        expires: when they are removed, or None.
        sampler: the sampler that they were saved for if they have no name, else "".
        info: what the client said about the model.
    """

    key: str
    owner: str
    model: str
    folder: str
    size: int
    created: float
    expires: float | None
    sampler: str
    create: Create
    info: dict[str, str]


Entry = TypeVar("Entry", SessionInfo, SamplerInfo, SavedWeights)


@dataclass(frozen=True)
class _Known:
    """The content of a registry, which begins each segment of its journal."""

    sessions: dict[str, SessionInfo] = field(default_factory=dict)
    samplers: dict[str, SamplerInfo] = field(default_factory=dict)
    weights: dict[str, SavedWeights] = field(default_factory=dict)

    def table(self, kind: type[Entry]) -> dict[str, Entry]:
        """Return the entries of a kind by key."""
        tables: Mapping[type, dict] = {
            SessionInfo: self.sessions, SamplerInfo: self.samplers, SavedWeights: self.weights,
        }  # fmt: skip
        return tables[kind]


_KINDS: Mapping[str, type] = {kind.__name__: kind for kind in (SessionInfo, SamplerInfo, SavedWeights)}


class Registry:
    """All entries by key, in memory and in a journal, which also has the samples: `read` returns their futures."""

    def __init__(self, journal: Journal, known: _Known) -> None:
        self.journal = journal
        self.sessions, self.samplers, self.weights = known.sessions, known.samplers, known.weights
        self._known = known
        self.used = dict[str, float]()  # when each sampler was last used
        self.unwanted = set[str]()  # folders of forgotten weights, which go when nothing uses them

    @classmethod
    def read(cls, journal: Journal) -> tuple["Registry", dict[str, Future]]:
        """Return the registry in a journal, and the futures of samples by request. A new journal is begun."""
        known, futures = _Known(), dict[str, Future]()
        for place, payload in journal.records():
            head, body = opened(payload)
            if head["record"] == "registry":
                known = unpacked(_Known, body, sender=0)
                futures = live_futures(futures, head)
            elif head["record"] in _KINDS:
                kind = _KINDS[head["record"]]
                entry = unpacked(kind, body, sender=0)
                if head["removed"]:
                    known.table(kind).pop(entry.key, None)
                else:
                    known.table(kind)[entry.key] = entry
            else:
                read_future(futures, head, place)
        registry = cls(journal, known)
        registry.cut(futures.values())
        return registry, futures

    def put(self, entry: Entry) -> Place:
        """Add an entry, or replace the one with its key. Return the place of its record, which is not yet synced."""
        place = self._write(entry, removed=False)
        self._known.table(type(entry))[entry.key] = entry
        return place

    def remove(self, entry: Entry) -> Place:
        """Remove an entry. Return the place of the record of this, which is not yet synced."""
        self._known.table(type(entry)).pop(entry.key, None)
        return self._write(entry, removed=True)

    def weights_at(self, path: str, owner: str, *, optimizer: bool = False) -> SavedWeights:
        """Return the weights at a tinker:// path. Raise Refused if the owner has none, or none with an optimizer."""
        near = nearest_name(path, (one.key for one in self.weights.values() if one.owner == owner))
        weights = owned(self.weights.get(path), owner, f"the weights {shown(path)}", near)
        if optimizer and path.split("/")[-2] != "weights":
            raise Refused(400, f"{path} has no optimizer; load it without one, or give a path of /weights/")
        return weights

    def keep_weights(self, future: Future, size: int, *, create: Create, info: dict[str, str], now: float) -> None:
        """Add the weights of `size` bytes that a `Save` has written, and their sampler. They are then on the disk."""
        path, ttl = future.extra["path"], future.extra["ttl_seconds"]
        old = self.weights.get(path)
        if old is not None and old.folder != future.folder:
            self.unwanted.add(old.folder)
        expires = None if ttl is None else now + ttl
        owner, folder, sampler = future.owner, future.folder, future.sampler
        place = self.put(SavedWeights(path, owner, future.model, folder, size, now, expires, sampler, create, info))
        if sampler:
            session, number = future.model.split(":")[0], future.extra["session_number"]
            place = self.put(SamplerInfo(sampler, owner, session, number, path, folder, create))
        self.journal.sync(place)

    def forget_weights(self, weights: SavedWeights) -> Place:
        """Remove weights and the sampler that they were saved for. Return the place of the last record of this."""
        self.unwanted.add(weights.folder)
        if weights.sampler in self.samplers:
            self.remove(self.samplers[weights.sampler])
        return self.remove(weights)

    def make_room(self, owner: str, limits: Limits, now: float) -> None:
        """Raise Refused if the owner's weights fill the disk limit. Temporary weights that rest are forgotten first."""
        mine = [one for one in self.weights.values() if one.owner == owner]
        total, limit = sum(one.size for one in mine), limits.disk_bytes
        last = {one.key: self.used.get(one.sampler, one.created) for one in mine if one.sampler}
        for weights in sorted((one for one in mine if one.sampler), key=lambda one: last[one.key]):
            if total >= limit and last[weights.key] + limits.answer_seconds <= now:
                self.forget_weights(weights)
                total -= weights.size
        if total >= limit:
            said = f"{bytes_in_words(total)} of saved weights reach the limit of {bytes_in_words(limit)}"
            raise Refused(400, f"{said}; delete some")

    def _write(self, entry: SessionInfo | SamplerInfo | SavedWeights, *, removed: bool) -> Place:
        return self.journal.append(record({"record": type(entry).__name__, "removed": removed}, packed(entry)))

    def cut(self, futures: Iterable[Future]) -> None:
        """Begin a segment of the journal with all entries. `futures` are those of samples that are not forgotten."""
        self.journal.cut(record({"record": "registry", "live": live_requests(futures)}, packed(self._known)))


Owned = TypeVar("Owned", bound="_HasOwner")


class _HasOwner(Protocol):
    @property
    def owner(self) -> str: ...


def owned(value: Owned | None, owner: str, what: str, near: str = "") -> Owned:
    """Return `value`. Raise Refused if there is none, or if it belongs to another owner, who must not be found out."""
    if value is None or value.owner != owner:
        raise Refused(404, f"{what} is unknown{near}")
    return value


def checked_name(name: str) -> str:
    """Return the name for saved weights. Raise Refused if it cannot be a file's name."""
    if not _NAME.fullmatch(name):
        raise Refused(400, f"the name {shown(name)} is rejected; use 1 to 64 of A-Z a-z 0-9 . _ - and no dot first")
    return name


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
