"""The desk of a training service: who may do what, which operation is next, and what became of each.

HTTP threads submit operations and ask for answers. The engine takes operations whose turn has come, and answers them.
What is accepted is on the disk before the call returns. After a restart all names are known, and each model goes on
from its last saved state (`model_queue`). Decisions are functions of the database, so they are the same then.
"""

import json
import secrets
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import discard
from megatron_tiedlora.base.messages import bytes_in_words, os_errors
from megatron_tiedlora.base.output_folder import make_private_folder
from megatron_tiedlora.base.ownership import FolderLock, take_folder
from megatron_tiedlora.parallel.agreement import packed
from megatron_tiedlora.service.database import DATABASE_FILE, Database, unusable
from megatron_tiedlora.service.model_queue import ModelQueue, crash_failure
from megatron_tiedlora.service.operations import (
    Create,
    Failure,
    Load,
    Operation,
    OperationResult,
    Pass,
    Sample,
    Save,
    Ticket,
)
from megatron_tiedlora.service.records import (
    Answered,
    Limits,
    ModelInfo,
    Refused,
    SamplerInfo,
    SavedWeights,
    Unanswered,
    check_limit,
    known,
)
from megatron_tiedlora.service.weights import WeightFolders, model_folder

_SWEEP_SECONDS = 5.0  # between two looks for what has expired
_LEAST_BYTES = 1024  # of an operation in a queue: what remembering it takes
_LIVES = "ended IS NULL AND seen + ? > ?"  # a session with a heartbeat in so many seconds before a time
# An operation, or the type of one that is rejected, and what the client is told with its result
Making = tuple[Operation | type[Operation], dict[str, Any]]


class Desk:
    """The desk of the service whose folder this process owns. All methods can be called from any thread."""

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float], lock: FolderLock) -> None:
        """Read the database. Use `open` instead."""
        self._folder, self._limits, self._clock, self._lock = folder, limits, clock, lock
        self._guard, self._database = lock.owner.check, Database(folder, lock.owner.check)
        self._weights = WeightFolders(self._database, folder, self._guard)
        with self._database.transaction():
            self._database.run("UPDATE sessions SET seen = ?", clock())
        models = self._database.column("SELECT model FROM models")
        self._queues = {model: ModelQueue(self._database, model) for model in models}
        self._awake = dict.fromkeys(self._queues)  # models whose next operation may have its turn
        samples = "SELECT request FROM operations WHERE result_kind = '' AND kind = 'Sample' ORDER BY rowid"
        self._samples = self._database.column(samples)  # to be handed out
        self._waiting = dict[str, list[Callable[[], None]]]()  # who is to be told of an answer, by request
        self._counts = Counter[str]()  # operations by kind, and failures, since the start
        self.gauges = dict[str, float]()  # numbers about the engine, which sets them
        self._swept = clock()
        self._changed, self._closed = threading.Condition(), False

    @classmethod
    def open(cls, folder: Path, limits: Limits, *, clock: Callable[[], float] = time.time) -> "Desk":
        """Take the folder of a service, or create it, and read what it holds. Raise FolderTaken if another process owns
        it, or UserError if it is not private, cannot be written, or has a damaged database."""
        with os_errors(f"{folder}: cannot be used", fix="; give another folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_private_folder(folder)
            folder.chmod(0o700)
            lock = take_folder(folder, hint="stop it, or give another folder")
            try:
                return cls(folder.resolve(), limits, clock, lock)
            except BaseException as error:
                lock.release()
                if isinstance(error, sqlite3.Error):
                    raise unusable(folder / DATABASE_FILE, f"cannot be used ({error})") from None
                raise

    def close(self) -> None:
        """Release the folder, and end the wait of `ready`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._database.close()
        self._lock.release()

    # Sessions ---------------------------------------------------------------------------------------------------------

    def open_session(self, owner: str, *, metadata: Mapping[str, str]) -> str:
        """Return the id of a new session."""
        with self._writing():
            now = self._clock()
            alive = self._database.value("SELECT COUNT(*) FROM sessions WHERE owner = ? AND ended IS NULL", owner)
            check_limit("living sessions", alive + 1, self._limits.sessions, "finish one, or wait until one has lapsed")
            key, told = secrets.token_hex(16), json.dumps(dict(metadata))
            self._database.put("sessions", key=key, owner=owner, metadata=told, created=now, seen=now)
            return key

    def heartbeat(self, owner: str, session: str) -> None:
        """Keep a session alive. Raise Refused if it is unknown or was finished."""
        with self._writing(durable=False):
            self._database.touch(owner, session, self._clock())

    def finish_session(self, owner: str, session: str) -> None:
        """End a session for good. A second call has no effect."""
        with self._writing():
            self._database.session(owner, session)
            end = "UPDATE sessions SET ended = ?, finished = 1 WHERE key = ? AND NOT finished"
            self._database.run(end, self._clock(), session)

    # Operations of models ---------------------------------------------------------------------------------------------

    def create(self, owner: str, session: str, number: int, create: Create, *, info: Mapping[str, str]) -> str:
        """Create the model SESSION:train:NUMBER and return the request. `create.folder` is a tinker:// path or ""."""
        name = f"{session}:train:{number}"
        with self._changed:
            with self._writing():
                self._database.session(owner, session)
                if name not in self._queues:
                    create = self._new_model(owner, session, name, create, info)
                request = self._accept(owner, name, 0, session, lambda: (create, {"model_id": name}))
            if name not in self._queues:
                self._queues[name] = ModelQueue(self._database, name)
        return request

    def _new_model(self, owner: str, session: str, name: str, create: Create, info: Mapping[str, str]) -> Create:
        """Add a model, and return how it is created."""
        now, limits = self._clock(), self._limits
        count = f"SELECT COUNT(*) FROM models JOIN sessions ON key = session WHERE models.owner = ? AND {_LIVES}"
        alive = self._database.value(count, owner, limits.idle_seconds, now)
        check_limit("models of living sessions", alive + 1, limits.models, "finish a session")
        check_limit("rank", create.rank, limits.rank, "use a smaller one")
        if create.folder:
            create = replace(create, folder=self._weights.at(create.folder, owner, optimizer=create.optimizer).folder)
        fields = {"create": packed(create), "info": json.dumps(dict(info)), "created": now}
        self._database.put("models", model=name, owner=owner, session=session, **fields)
        return create

    def submit(self, owner: str, model: str, number: int, operation: Operation, *, size: int = 0) -> str:
        """Queue operation `number` (from 1) of a model and return its request. A number seen before returns the same.
        `size` is the bytes of the request's body."""
        return self._submit(owner, model, number, lambda: (operation, {}), size=size)

    def save(
        self, owner: str, model: str, number: int, name: str | None, *, kind: str, session_number: int | None = None,
        overwrite: bool = False, ttl_seconds: float | None = None,
    ) -> str:  # fmt: skip
        """Queue a save of a model's weights and return its request.

        Args:
            name: the name of the weights. None makes temporary weights for a sampler, which live with their session.
            kind: "weights" (a checkpoint) or "sampler_weights".
            session_number: the client's number of the sampler of temporary weights.
            overwrite: whether weights with this name are replaced.
            ttl_seconds: when the weights are removed, counted from the save.
        """

        def make() -> Making:
            path, folder = self._weights.new(model, kind, name, overwrite=overwrite)
            extra: dict[str, Any] = {"path": path, "ttl_seconds": ttl_seconds}
            if name is None:
                number_of_sampler = -1 if session_number is None else session_number
                extra |= {"sampling_session_id": secrets.token_hex(16), "session_number": number_of_sampler}
            return Save(folder, optimizer=kind == "weights"), extra

        return self._submit(owner, model, number, make)

    def load(self, owner: str, model: str, number: int, path: str, *, optimizer: bool) -> str:
        """Queue that a model takes the weights at a tinker:// path, and return the request."""

        def make() -> Making:
            saved, create = self._weights.at(path, owner, optimizer=optimizer), self._model(owner, model).create
            if replace(saved.create, seed=create.seed, folder=create.folder, optimizer=create.optimizer) != create:
                said = f"{path} is {saved.create.method} of rank {saved.create.rank}, and not of this model's shape"
                raise Refused(400, f"{said}; create a model from it")
            return Load(saved.folder, optimizer), {"path": path}

        return self._submit(owner, model, number, make)

    def reject(self, owner: str, model: str, number: int, kind: type[Operation], message: str) -> str:
        """Use up the number of an operation of type `kind` that cannot be accepted, so that later ones do not wait for
        it. Return its request, whose result is a Failure. For a `Pass` the next step fails too."""
        return self._submit(owner, model, number, lambda: (kind, {"rejected": message}))

    def _submit(self, owner: str, model: str, number: int, make: Callable[[], Making], *, size: int = 0) -> str:
        if number < 1:
            raise Refused(400, f"the number {number} of an operation is rejected; count from 1")
        with self._writing():
            session = self._model(owner, model).known["session"]
            return self._accept(owner, model, number, session, make, size=size)

    def _accept(
        self, owner: str, name: str, number: int, session: str, make: Callable[[], Making], *, size: int = 0
    ) -> str:
        """Add an operation to the queue `name` unless it has the number already. Return the request of that number."""
        queue, future = self._queues.get(name), self._find("queue = ? AND number = ?", name, number)
        is_old = queue is not None and number <= queue.saved
        if future is not None and not (is_old and self._is_gone(future)):
            return str(future["request"])
        self._database.touch(owner, session, self._clock())
        if is_old:
            raise Refused(410, f"operation {number} of {name} was answered long ago; use the next number")
        operation, extra = make()
        kind, body = (operation, b"") if isinstance(operation, type) else (type(operation), packed(operation))
        tokens = sum(operation.lengths) if isinstance(operation, Pass) else 0
        if isinstance(operation, Sample):
            tokens = len(operation.prompt) + operation.num_samples * operation.max_tokens
        check_limit("tokens of a request", tokens, self._limits.tokens, "send fewer rows, or ask for fewer tokens")
        if tokens:
            self._weights.make_room(owner, self._limits, self._clock())
        size, limit = max(size, len(body), _LEAST_BYTES), self._limits.queued_bytes
        if size > limit:
            raise Refused(413, f"{bytes_in_words(size)} are above the limit of {bytes_in_words(limit)} in a queue")
        total = self._database.queued(owner) + size
        if total > limit and not (queue is not None and queue.fills_gap(number)):
            said = f"{bytes_in_words(total)} would wait, above the limit of {bytes_in_words(limit)}"
            raise Refused(429, f"the queue is full ({said}); wait for answers")
        request, backward = secrets.token_hex(16), getattr(operation, "backward", operation is Pass)
        fields = {"owner": owner, "queue": name, "number": number, "kind": kind.__name__, "backward": backward}
        fields |= {"folder": getattr(operation, "folder", ""), "size": size, "extra": json.dumps(extra)}
        self._database.put("operations", request=request, **fields)
        self._database.put("bodies", request=request, value=body)
        self._counts[kind.__name__] += 1
        if kind is Sample:
            self._samples.append(request)
        else:
            self._awake[name] = None
        return request

    def _model(self, owner: str, model: str) -> ModelQueue:
        queue = self._queues.get(model)
        return known(queue if queue is not None and queue.known["owner"] == owner else None, "model", model)

    def model_of(self, owner: str, model: str) -> ModelInfo:
        """Return what the client may know of a model. Raise Refused if it is unknown."""
        with self._changed:
            return self._model(owner, model).info

    # Saved weights and samplers ---------------------------------------------------------------------------------------

    def checkpoints(self, owner: str, model: str | None = None) -> list[SavedWeights]:
        """Return the named weights of an owner, or of one model, in the order in which they were saved."""
        mine = "owner = ? AND sampler = '' AND model = COALESCE(?, model) ORDER BY created, rowid"
        with self._reading():
            return self._weights.where(mine, owner, model)

    def checkpoint_of(self, owner: str, path: str) -> SavedWeights:
        """Return the weights at a tinker:// path. Raise Refused if there are none."""
        with self._reading():
            return self._weights.at(path, owner)

    def delete_checkpoint(self, owner: str, path: str) -> None:
        """Remove the weights at a tinker:// path. Operations and samplers that have them go on."""
        with self._writing():
            self._weights.forget(self._weights.at(path, owner))

    def open_sampler(self, owner: str, session: str, number: int, *, path: str | None) -> str:
        """Return the id of a sampler for the weights at a tinker:// path, or for the base. A number seen before in the
        session returns the same."""
        with self._writing():
            self._database.touch(owner, session, self._clock())
            return self._weights.open_sampler(owner, session, number, path)

    def sampler_of(self, owner: str, sampler: str) -> SamplerInfo:
        """Return what is known of a sampler. Raise Refused if it is unknown."""
        with self._reading():
            return self._weights.sampler(owner, sampler)

    def sample(self, owner: str, sampler: str, number: int, sample: Sample) -> tuple[str, list[str]]:
        """Queue a sample from the weights of a sampler. Return its request and the ids of its sequences."""
        with self._writing():
            info = self.sampler_of(owner, sampler)
            self._database.run("UPDATE samplers SET used = ? WHERE key = ?", self._clock(), sampler)
            made = replace(sample, folder=info.folder), {"num_samples": sample.num_samples}
            request = self._accept(owner, sampler, number, info.session, lambda: made)
            extra = json.loads(self._database.value("SELECT extra FROM operations WHERE request = ?", request))
        return request, [f"{request}-{index}" for index in range(extra["num_samples"])]

    # Answers ----------------------------------------------------------------------------------------------------------

    def answer_of(self, owner: str, request: str) -> Answered | Unanswered:
        """Return the answer of a request, or why there is none yet. Raise Refused if the request is unknown."""
        with self._reading():
            if (future := self._future(owner, request))["result_kind"]:
                return Answered(self._database.result(future), json.loads(future["extra"]))
            full = self._database.queued(owner) > self._limits.queued_bytes / 2
            return Unanswered("paused_capacity" if full or future["kind"] == "Create" else "active")

    def when_done(self, request: str, call: Callable[[], None]) -> None:
        """Call `call` once when the request has an answer, unless `forget_call` takes it back. It must not wait."""
        with self._reading():
            future = self._find("request = ?", request)
            if future is not None and not future["result_kind"]:
                self._waiting.setdefault(request, []).append(call)
                return
        call()

    def forget_call(self, request: str, call: Callable[[], None]) -> None:
        """Do not call `call` any more."""
        with self._changed, suppress(KeyError, ValueError):
            self._waiting[request].remove(call)

    def taken(self, owner: str, request: str) -> None:
        """Record that the client has the answer. It is kept for a while, because the client may ask again."""
        with self._writing(durable=False):
            self._future(owner, request)
            take = "UPDATE operations SET taken = ? WHERE request = ? AND taken IS NULL"
            self._database.run(take, self._clock(), request)

    def _find(self, condition: str, *values: Any) -> sqlite3.Row | None:
        return self._database.row(f"SELECT * FROM operations WHERE {condition}", *values)

    def _future(self, owner: str, request: str) -> sqlite3.Row:
        future = self._find("request = ?", request)
        is_there = future is not None and future["owner"] == owner and not self._is_gone(future)
        return known(future if is_there else None, "request", request)

    def _is_gone(self, future: sqlite3.Row) -> bool:
        return future["taken"] is not None and bool(future["taken"] <= self._answers_from())

    def _answers_from(self) -> float:
        """Return the time up to which fetched answers are forgotten."""
        return self._clock() - self._limits.answer_seconds

    # The engine's side ------------------------------------------------------------------------------------------------

    def ready(self, seconds: float) -> list[Ticket]:
        """Wait up to `seconds` for operations whose turn has come, and return them. Each is returned once."""
        deadline = time.monotonic() + seconds
        with self._reading():
            while not self._closed:
                self._sweep()
                tickets, left = list(self._tickets()), deadline - time.monotonic()
                if tickets or left <= 0:
                    return tickets
                self._changed.wait(left)
        return []

    def _tickets(self) -> Iterator[Ticket]:
        samples, self._samples = self._samples, []
        for request in samples:
            if (sample := self._find("request = ?", request)) is not None:
                yield from self._handed_out(sample, None, fresh=False)
        awake, self._awake = self._awake, {}
        for model in awake:
            queue = self._queues.get(model)  # None if its creation could not be written
            while queue is not None and (turn := queue.next()) is not None:
                yield from self._handed_out(turn[0], queue.refusal(turn[0]), fresh=turn[1])

    def _handed_out(self, future: sqlite3.Row, failure: Failure | None, *, fresh: bool) -> Iterator[Ticket]:
        """Yield the ticket of an operation whose turn has come, or give its failure as the answer."""
        failure = failure or crash_failure(future)
        if failure is None and future["kind"] == "Save":
            failure = self._weights.room_failure(future["owner"], self._limits, self._clock())
        if failure is not None:
            self._settle(future, failure)
            return
        operation = self._database.operation(future)
        if future["folder"]:
            operation = replace(operation, folder=str(self._folder / future["folder"]))
        model = "" if future["kind"] == "Sample" else future["queue"]
        yield Ticket(future["request"], future["owner"], model, future["number"], operation, fresh)

    def crashed(self, requests: Iterable[str]) -> None:
        """Record that the engine ends with an error while it runs operations. New ones fail after some times."""
        blame = "UPDATE operations SET crashes = crashes + 1 WHERE request = ? AND result_kind = ''"
        with self._writing():
            for request in requests:
                self._database.run(blame, request)

    def answer(self, request: str, result: OperationResult) -> None:
        """Record the result of an operation that `ready` returned."""
        with self._reading():
            if (future := self._find("request = ?", request)) is not None:
                self._settle(future, result)

    def _settle(self, future: sqlite3.Row, result: OperationResult) -> None:
        """Answered an operation. The answer to one that is repeated changes nothing, unless it fails now."""
        model = future["queue"]
        queue, failed = self._queues.get(model), isinstance(result, Failure)
        if future["result_kind"]:
            if queue is not None and isinstance(result, Failure) and future["result_kind"] != "Failure":
                queue.give_up(future["number"], result.message)
                self._awake[model] = None
            return
        if queue is not None and queue.broken is not None:
            result, failed = queue.broken, True
        saves = future["kind"] == "Save" and not failed
        # Later decisions depend on failures. What else is lost in a power failure is computed again.
        with self._database.transaction(durable=failed or saves):
            if queue is not None and saves:
                self._weights.keep(future, queue.known, self._clock())
            self._database.answer(future["request"], result)
        self._counts["failures"] += failed
        self._tell(future["request"])
        if queue is not None:
            queue.fold()
            self._awake[model] = None

    def saved(self, model: str, number: int, folder: str) -> None:
        """Record that the state after operation `number` of a model is in `folder`, and remove the state before it."""
        with self._reading():
            queue = self._queues.get(model)
            # The weights of a broken model are not those that the client knows. And `absorb` may have found that the
            # state on the disk is that after a later operation.
            if queue is None or queue.broken is not None or number < queue.saved or queue.failed(number):
                return
            path = Path(folder).resolve()
            queue.save(number, str(path.relative_to(self._folder)))
            for other in path.parent.iterdir():
                if other != path:
                    discard(other, guard=self._guard)

    def state_folder(self, model: str, number: int) -> Path:
        """Return the folder for the state of a model after operation `number`."""
        return self._folder / model_folder(model) / "state" / str(number)

    def rewind(self, model: str) -> None:
        """Record that a model has left the memory. The operations behind its last saved state are handed out again
        together with its next operation."""
        with self._reading():
            self._awake.pop(model, None)
            queue = self._queues.get(model)
            if queue is not None and queue.rewind():
                self._awake[model] = None

    def origin(self, model: str) -> Create | str:
        """Return how a model that is not in memory comes back: the folder of its saved state, or how it is created."""
        with self._changed:
            return self._queues[model].origin(self._folder)

    def lapsed(self, models: Iterable[str]) -> list[str]:
        """Return those of `models` without work whose session was finished, or has had no heartbeat for a while."""
        ended = f"SELECT model FROM models JOIN sessions ON key = session WHERE model = ? AND NOT ({_LIVES})"
        with self._reading():
            times = self._limits.idle_seconds, self._clock()
            return [one for one in models if self._database.row(ended, one, *times) and not self._queues[one].busy]

    def numbers(self) -> dict[str, float]:
        """Return gauges and counters (`*_total`) by name."""
        with self._reading():
            gauges = self._database.gauges(self._answers_from()) | self.gauges
            return gauges | {f"{kind.lower()}_total": count for kind, count in self._counts.items()}

    def _sweep(self) -> None:
        """Forget what has expired, if the last look was some seconds ago."""
        now = self._clock()
        if now < self._swept + _SWEEP_SECONDS:
            return
        self._swept = now
        for queue in self._queues.values():
            queue.absorb()
        with self._database.transaction():
            self._weights.forget_expired(now, self._answers_from())
            gone = self._database.forget(self._limits, now, lambda model: self._queues[model].busy)
        for model in gone:
            del self._queues[model]
            self._awake.pop(model, None)
            self._weights.remove_model(model)
        for request in [request for request in self._waiting if self._find("request = ?", request) is None]:
            self._tell(request)
        self._weights.remove_unwanted()

    def _tell(self, request: str) -> None:
        for call in self._waiting.pop(request, []):
            call()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold the lock, and turn errors of the disk into Refused."""
        try:
            with self._changed:
                yield
        except (OSError, sqlite3.Error) as error:
            why = getattr(error, "strerror", None) or error
            raise Refused(503, f"the server cannot use its {DATABASE_FILE} ({why}); try again") from error

    @contextmanager
    def _writing(self, *, durable: bool = True) -> Iterator[None]:
        """Change the database in one transaction, and wake `ready`."""
        with self._reading(), self._database.transaction(durable=durable):
            yield
            self._changed.notify_all()
