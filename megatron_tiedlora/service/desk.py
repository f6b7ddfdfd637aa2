"""The desk of a training service: who may do what, which operation is next, and what became of each.

HTTP threads submit operations and ask for answers. The engine takes operations whose turn has come, and answers them.
What is accepted is on the disk before the call returns. After a restart all names are known, and each model goes on
from its last saved state (`model_queue`). Decisions are functions of the journals, so they are the same then.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import discard
from megatron_tiedlora.base.messages import os_errors, shown
from megatron_tiedlora.base.output_folder import make_private_folder
from megatron_tiedlora.base.ownership import FolderLock, take_folder
from megatron_tiedlora.service.futures import Answer, Future, Limits, Pending, Refused
from megatron_tiedlora.service.journal import Journal, Place
from megatron_tiedlora.service.model_queue import ModelInfo, ModelQueue, ModelRecord
from megatron_tiedlora.service.operations import (
    Create,
    Load,
    Operation,
    OperationResult,
    Pass,
    Sample,
    Save,
    Step,
    Ticket,
)
from megatron_tiedlora.service.registry import (
    SamplerInfo,
    SavedWeights,
    SessionInfo,
    checked_name,
    owned,
)
from megatron_tiedlora.service.store import Store

# An operation, what the client is told with its result, and other attributes of its future
Making = tuple[Operation | None, dict[str, Any], dict[str, Any]]


class Desk:
    """The desk of the service whose folder this process owns. All methods can be called from any thread."""

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float], lock: FolderLock) -> None:
        """Read the journals. Use `open` instead."""
        self._store = Store(folder, limits, clock, lock.owner.check)
        self._registry, self._limits, self._clock, self._lock = self._store.registry, limits, clock, lock
        self._changed = threading.Condition()
        self._closed = False

    @classmethod
    def open(cls, folder: Path, limits: Limits, *, clock: Callable[[], float] = time.time) -> "Desk":
        """Take the folder of a service and read what it holds. The folder is created if it does not exist.

        Raises:
            FolderTaken: another process owns the folder.
            UserError: the folder is not private, cannot be written, or has a damaged journal.
        """
        with os_errors(f"{folder}: cannot be used", fix="; give another folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_private_folder(folder)
            folder.chmod(0o700)
            lock = take_folder(folder, hint="stop it, or give another folder")
            try:
                return cls(folder.resolve(), limits, clock, lock)
            except BaseException:
                lock.release()
                raise

    def close(self) -> None:
        """Release the folder, and end the wait of `ready`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._lock.release()

    # Sessions ---------------------------------------------------------------------------------------------------------

    def open_session(self, owner: str, *, metadata: Mapping[str, str]) -> str:
        """Return the id of a new session."""
        with self._writing():
            alive = sum(one.owner == owner and one.ended is None for one in self._registry.sessions.values())
            check_limit("living sessions", alive + 1, self._limits.sessions, "finish one, or wait until one has lapsed")
            session = SessionInfo(secrets.token_hex(16), owner, dict(metadata), self._clock())
            place = self._registry.put(session)
            self._store.touch(session)
        self._sync(self._registry.journal, place)
        return session.key

    def heartbeat(self, owner: str, session: str) -> None:
        """Keep a session alive. Raise Refused if it is unknown or was finished."""
        with self._writing():
            self._store.touch(self._session(owner, session))

    def finish_session(self, owner: str, session: str) -> None:
        """End a session for good. A second call has no effect."""
        with self._writing():
            known = self._session(owner, session)
            if known.finished:
                return
            place = self._registry.put(replace(known, ended=self._clock(), finished=True))
        self._sync(self._registry.journal, place)

    def _session(self, owner: str, session: str) -> SessionInfo:
        return owned(self._registry.sessions.get(session), owner, f"the session {shown(session)}")

    # Operations of models ---------------------------------------------------------------------------------------------

    def create(self, owner: str, session: str, number: int, create: Create, *, info: Mapping[str, str]) -> str:
        """Create the model SESSION:train:NUMBER and return the request. `create.folder` is a tinker:// path or ""."""
        name = f"{session}:train:{number}"
        with self._writing():
            known = self._session(owner, session)
            if name not in self._store.models:
                self._store.touch(known)
                mine = (queue.known for queue in self._store.models.values() if queue.owner == owner)
                alive = sum(not self._store.has_ended(one.session) for one in mine)
                check_limit("models of living sessions", alive + 1, self._limits.models, "finish a session")
                check_limit("rank", create.rank, self._limits.rank, "use a smaller one")
                if create.folder:
                    weights = self._registry.weights_at(create.folder, owner, optimizer=create.optimizer)
                    create = replace(create, folder=weights.folder)
                record = ModelRecord(name, owner, session, create, dict(info), self._clock())
                folder = self._store.folder / self._store.model_folder(name)
                queue = ModelQueue(record, self._store.journal(folder / "journal"), {})
                queue.cut()
                self._store.models[name] = queue
        return self._submit(owner, name, 0, lambda queue: (queue.known.create, {"model_id": name}, {}), first=0)

    def submit(self, owner: str, model: str, number: int, operation: Operation, *, size: int = 0) -> str:
        """Queue operation `number` (from 1) of a model and return its request. A number seen before returns the same.

        Args:
            size: bytes of the request's body.
        """
        return self._submit(owner, model, number, lambda _: (operation, {}, {}), size=size)

    def save(
        self,
        owner: str,
        model: str,
        number: int,
        name: str | None,
        *,
        kind: str,
        session_number: int | None = None,
        overwrite: bool = False,
        ttl_seconds: float | None = None,
    ) -> str:
        """Queue a save of a model's weights and return its request.

        Args:
            name: the name of the weights. None makes temporary weights for a sampler, which live with their session.
            kind: "weights" (a checkpoint) or "sampler_weights".
            session_number: the client's number of the sampler of temporary weights.
            overwrite: whether weights with this name are replaced.
            ttl_seconds: when the weights are removed, counted from the save.
        """

        def make(queue: ModelQueue) -> Making:
            chosen = f"temporary-{secrets.token_hex(8)}" if name is None else checked_name(name)
            path = f"tinker://{model}/{kind}/{chosen}"
            waiting = (one for one in queue.futures.values() if one.kind == "Save" and not one.answered)
            exists = path in self._registry.weights or any(one.extra.get("path") == path for one in waiting)
            if exists and not overwrite:
                raise Refused(409, f"{path} exists; choose another name, or overwrite it")
            self._registry.make_room(owner, self._limits, self._clock())
            folder = f"{self._store.model_folder(model)}/{kind}/{chosen}"
            if exists or (self._store.folder / folder).exists():
                folder += f"~{secrets.token_hex(4)}"  # what has the old weights goes on with them, also in a replay
            extra: dict[str, Any] = {"path": path, "ttl_seconds": ttl_seconds}
            sampler = secrets.token_hex(16) if name is None else ""
            if sampler:
                number_of_sampler = -1 if session_number is None else session_number
                extra |= {"sampling_session_id": sampler, "session_number": number_of_sampler}
            return Save(folder, optimizer=kind == "weights"), extra, {"sampler": sampler}

        return self._submit(owner, model, number, make)

    def load(self, owner: str, model: str, number: int, path: str, *, optimizer: bool) -> str:
        """Queue that a model takes the weights at a tinker:// path, and return the request."""

        def make(queue: ModelQueue) -> Making:
            weights = self._registry.weights_at(path, owner, optimizer=optimizer)
            return Load(weights.folder, optimizer), {"path": path}, {}

        return self._submit(owner, model, number, make)

    def reject(self, owner: str, model: str, number: int, kind: type[Operation], message: str) -> str:
        """Use up the number of an operation of type `kind` that cannot be accepted, so that later ones do not wait for
        it. Return its request, whose result is a Failure. For a `Pass` the next step fails too."""

        def make(queue: ModelQueue) -> Making:
            return None, {"rejected": message}, {"kind": kind.__name__, "backward": kind is Pass}

        return self._submit(owner, model, number, make)

    def _submit(
        self,
        owner: str,
        model: str,
        number: int,
        make: Callable[[ModelQueue], Making],
        *,
        size: int = 0,
        first: int = 1,
    ) -> str:
        if number < first:
            raise Refused(400, f"the number {number} of an operation is rejected; count from 1")
        with self._writing():
            queue = self._model(owner, model)
            future = queue.futures.get(number)
            if future is None:
                self._store.touch(self._registry.sessions[queue.known.session])
                if number <= queue.known.saved:
                    raise Refused(410, f"operation {number} of {model} was answered long ago; use the next number")
                operation, extra, more = make(queue)
                if isinstance(operation, Pass):
                    tokens = sum(operation.lengths)
                    check_limit("tokens of a request", tokens, self._limits.tokens, "send fewer rows")
                fields = {"model": model, "sampler": "", "number": number, "extra": extra, **more}
                future = self._store.queue(operation, owner=owner, size=size, must=queue.fills_gap(number), **fields)
                queue.futures[number] = future
                self._store.awake[model] = None
        self._sync(queue.journal, future.place)
        return future.request

    def _model(self, owner: str, model: str) -> ModelQueue:
        return owned(self._store.models.get(model), owner, f"the model {shown(model)}")

    def model_of(self, owner: str, model: str) -> ModelInfo:
        """Return what the client may know of a model. Raise Refused if it is unknown."""
        with self._changed:
            return self._model(owner, model).info

    # Saved weights ----------------------------------------------------------------------------------------------------

    def checkpoints(self, owner: str, model: str | None = None) -> list[SavedWeights]:
        """Return the named weights of an owner, or of one model, in the order in which they were saved."""
        with self._changed:
            mine = (one for one in self._registry.weights.values() if one.owner == owner and not one.sampler)
            return [one for one in mine if model in (None, one.model)]

    def checkpoint_of(self, owner: str, path: str) -> SavedWeights:
        """Return the weights at a tinker:// path. Raise Refused if there are none."""
        with self._changed:
            return self._registry.weights_at(path, owner)

    def delete_checkpoint(self, owner: str, path: str) -> None:
        """Remove the weights at a tinker:// path. Operations and samplers that have them go on."""
        with self._writing():
            place = self._registry.forget_weights(self._registry.weights_at(path, owner))
        self._sync(self._registry.journal, place)

    # Sampling ---------------------------------------------------------------------------------------------------------

    def open_sampler(self, owner: str, session: str, number: int, *, path: str | None) -> str:
        """Return the id of a sampler for the weights at a tinker:// path, or for the base. A number seen before in the
        session returns the same."""
        with self._writing():
            known = self._session(owner, session)
            for sampler in self._registry.samplers.values():
                if (sampler.session, sampler.number) == (session, number):
                    return sampler.key
            self._store.touch(known)
            weights = None if path is None else self._registry.weights_at(path, owner)
            found = ("", "", None) if weights is None else (weights.key, weights.folder, weights.create)
            sampler = SamplerInfo(secrets.token_hex(16), owner, session, number, *found)
            place = self._registry.put(sampler)
        self._sync(self._registry.journal, place)
        return sampler.key

    def sampler_of(self, owner: str, sampler: str) -> SamplerInfo:
        """Return what is known of a sampler. Raise Refused if it is unknown."""
        with self._changed:
            return owned(self._registry.samplers.get(sampler), owner, f"the sampler {shown(sampler)}")

    def sample(self, owner: str, sampler: str, number: int, sample: Sample) -> tuple[str, list[str]]:
        """Queue a sample from the weights of a sampler. Return its request and the ids of its sequences."""
        with self._writing():
            known = self.sampler_of(owner, sampler)
            future = self._store.by_number.get((sampler, number))
            if future is None:
                self._store.touch(self._registry.sessions[known.session])
                tokens = len(sample.prompt) + sample.num_samples * sample.max_tokens
                check_limit("tokens of a request", tokens, self._limits.tokens, "ask for fewer samples or tokens")
                fields = {"model": "", "sampler": sampler, "number": number}
                fields["extra"] = {"num_samples": sample.num_samples}
                operation = replace(sample, folder=known.folder)
                future = self._store.queue(operation, owner=owner, size=0, must=False, **fields)
                self._store.samples.append(future)
                self._store.by_number[sampler, number] = future
                self._registry.used[sampler] = self._clock()
        self._sync(self._registry.journal, future.place)
        return future.request, [f"{future.request}-{index}" for index in range(future.extra["num_samples"])]

    # Answers ----------------------------------------------------------------------------------------------------------

    def answer_of(self, owner: str, request: str) -> Answer | Pending:
        """Return the answer of a request, or why there is none yet. Raise Refused if the request is unknown."""
        with self._changed:
            future = self._future(owner, request)
            if future.answered:
                journal = self._store.journal_of(future)
                return Answer(future.operation_in(journal), future.result_in(journal), future.extra)
            full = self._store.queued[owner] > self._limits.queued_bytes / 2
            return Pending("paused_capacity" if full or future.kind == "Create" else "active")

    def when_done(self, request: str, call: Callable[[], None]) -> None:
        """Call `call` once when the request has an answer: in the engine's thread, or at once."""
        with self._changed:
            future = self._store.futures.get(request)
            if future is not None and not future.answered:
                future.calls.append(call)
                return
        call()

    def taken(self, owner: str, request: str) -> None:
        """Record that the client has the answer. It is kept for a while, because the client may ask again."""
        with self._writing():
            future = self._future(owner, request)
            future.take(self._store.journal_of(future), self._clock())

    def _future(self, owner: str, request: str) -> Future:
        future = self._store.futures.get(request)
        return owned(None if future is None or future.gone else future, owner, f"the request {shown(request)}")

    # The engine's side ------------------------------------------------------------------------------------------------

    def ready(self, seconds: float) -> list[Ticket]:
        """Wait up to `seconds` for operations whose turn has come, and return them. Each is returned once."""
        deadline = time.monotonic() + seconds
        with self._writing():
            self._store.sweep()
            while not (tickets := list(self._tickets())) and not self._store.calls and not self._closed:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
        self._run_calls()
        return tickets

    def _tickets(self) -> Iterator[Ticket]:
        samples, self._store.samples = self._store.samples, []
        for future in samples:
            yield self._ticket(future, fresh=False)
        awake, self._store.awake = self._store.awake, {}
        for model in awake:
            queue = self._store.models[model]
            while (turn := queue.next()) is not None:
                future, fresh = turn
                failure = queue.refusal(future)
                if failure is None:
                    yield self._ticket(future, fresh=fresh)
                else:
                    self._store.settle(future, failure)

    def _ticket(self, future: Future, *, fresh: bool) -> Ticket:
        operation = future.operation_in(self._store.journal_of(future))
        assert operation is not None
        if future.folder:
            assert not isinstance(operation, Pass | Step)
            operation = replace(operation, folder=str(self._store.folder / future.folder))
        return Ticket(future.request, future.model, future.number, operation, fresh)

    def answer(self, request: str, result: OperationResult) -> None:
        """Record the result of an operation that `ready` returned."""
        with self._writing():
            if request in self._store.futures:
                self._store.settle(self._store.futures[request], result)
        self._run_calls()

    def saved(self, model: str, number: int, folder: str) -> None:
        """Record that the state after operation `number` of a model is in `folder`, and remove the state before it."""
        with self._writing():
            queue = self._store.models.get(model)
            if queue is None or queue.broken is not None:  # its weights are not those that the client knows
                return
            path = Path(folder).resolve()
            queue.save(number, str(path.relative_to(self._store.folder)))
            for other in path.parent.iterdir():
                if other != path:
                    discard(other, guard=self._store.guard)

    def state_folder(self, model: str, number: int) -> Path:
        """Return the folder for the state of a model after operation `number`."""
        return self._store.folder / self._store.model_folder(model) / "state" / str(number)

    def rewind(self, model: str) -> None:
        """Record that a model has left the memory. The operations behind its last saved state are handed out again
        together with its next operation."""
        with self._changed:
            self._store.awake.pop(model, None)
            if model in self._store.models and self._store.models[model].rewind():
                self._store.awake[model] = None

    def origin(self, model: str) -> Create | str:
        """Return how a model that is not in memory comes back: the folder of its saved state, or how it is created."""
        with self._changed:
            known = self._store.models[model].known
            if known.folder:
                return str(self._store.folder / known.folder)
            create = known.create
            return replace(create, folder=str(self._store.folder / create.folder)) if create.folder else create

    def lapsed(self) -> list[str]:
        """Return the models without work whose session was finished, or has had no heartbeat for a while."""
        with self._changed:
            resting = (queue.known for queue in self._store.models.values() if not queue.busy)
            return [known.model for known in resting if self._store.has_ended(known.session)]

    def numbers(self) -> dict[str, float]:
        """Return gauges and counters (`*_total`) by name."""
        with self._changed:
            waiting = sum(not future.answered for future in self._store.futures.values())
            gauges: dict[str, float] = {
                "sessions": sum(one.ended is None for one in self._registry.sessions.values()),
                "models": len(self._store.models),
                "samplers": len(self._registry.samplers),
                "requests_waiting": waiting,
                "answers_kept": sum(not one.gone for one in self._store.futures.values()) - waiting,
                "queued_bytes": sum(self._store.queued.values()),
                "saved_weights": len(self._registry.weights),
                "saved_weights_bytes": sum(one.size for one in self._registry.weights.values()),
            }
            return gauges | {f"{kind.lower()}_total": count for kind, count in self._store.counts.items()}

    # Helpers ----------------------------------------------------------------------------------------------------------

    def _run_calls(self) -> None:
        with self._changed:
            calls, self._store.calls = self._store.calls, []
        for call in calls:
            call()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with _disk_errors(), self._changed:
            yield
            self._changed.notify_all()

    def _sync(self, journal: Journal, place: Place | None) -> None:
        assert place is not None
        with _disk_errors():
            journal.sync(place)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(503, f"the server cannot write to its disk ({error.strerror or error}); try again") from error


def check_limit(what: str, value: int, limit: int, fix: str) -> None:
    """Raise Refused if a value is above a limit of its owner."""
    if value > limit:
        raise Refused(400, f"{what}: {value:,} is above the limit of {limit:,}; {fix}")
