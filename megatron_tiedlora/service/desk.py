"""The desk of a training service: who may do what, which operation is next, and what became of each.

HTTP threads submit operations and ask for answers. The engine takes operations whose turn has come, and answers them.
What is accepted is on the disk before the call returns. After a restart all names are known, and each model goes on
from its last saved state (`model_queue`). Decisions are functions of the journals, so they are the same then.

Below the folder of the service, which can be moved while the service is stopped:

    desk/*.journal                            sessions, samplers, saved weights and samples
    models/MODEL/journal/*.journal            the operations of a model
    models/MODEL/state/NUMBER                 a state that the engine has saved
    models/MODEL/weights/NAME, sampler_weights/NAME
"""

import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import discard, remove_leftovers
from megatron_tiedlora.base.messages import bytes_in_words, os_errors, shown
from megatron_tiedlora.base.output_folder import make_private_folder
from megatron_tiedlora.base.ownership import FolderLock, take_folder
from megatron_tiedlora.parallel.agreement import packed
from megatron_tiedlora.service.futures import Answer, Future, Limits, Pending, Refused, used_segments
from megatron_tiedlora.service.journal import Journal, Place
from megatron_tiedlora.service.model_queue import ModelInfo, ModelQueue, ModelRecord
from megatron_tiedlora.service.operations import (
    Create,
    Failure,
    Load,
    Operation,
    Pass,
    Result,
    Sample,
    Save,
    Step,
    Ticket,
)
from megatron_tiedlora.service.registry import (
    Registry,
    SamplerInfo,
    SavedWeights,
    SessionInfo,
    checked_name,
    folder_size,
    owned,
)

_SWEEP_SECONDS = 5.0  # between two looks for what has expired
_SEGMENT_BYTES = 16 * 10**6  # size of the desk's own journal after which it begins a segment

Making = tuple[Operation, dict[str, Any], str]  # an operation, what the client is told with its result, its sampler


class Desk:
    """The desk of the service whose folder this process owns. All methods can be called from any thread."""

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float], lock: FolderLock) -> None:
        """Read the journals. Use `open` instead."""
        self._folder, self._limits, self._clock, self._lock = folder, limits, clock, lock
        self._changed = threading.Condition()
        self._guard = lock.owner.check
        self._registry, self._futures = Registry.read(self._journal(folder / "desk"))
        self._models = {queue.known.model: queue for queue in self._read_models()}
        for queue in self._models.values():
            self._futures.update((future.request, future) for future in queue.futures.values())
        waiting = [future for future in self._futures.values() if not future.answered]
        self._queued = Counter[str]()  # bytes by owner
        for future in waiting:
            self._queued[future.owner] += future.size
        self._samples = [future for future in waiting if not future.model]  # to be handed out
        self._by_number = {(one.sampler, one.number): one for one in self._futures.values() if not one.model}
        self._awake = dict.fromkeys(self._models)  # models whose next operation may have its turn
        self._seen = dict.fromkeys(self._registry.sessions, clock())  # last heartbeats
        self._calls: list[Callable[[], None]] = []  # to be called without the lock
        self._counts = Counter[str]()
        self._swept, self._closed = clock(), False
        known = {one.folder for one in self._registry.weights.values()} | {one.folder for one in waiting}
        found = (str(path.relative_to(folder)) for path in folder.glob("models/*/*weights/*"))
        self._registry.unwanted = {path for path in found if path not in known}  # removed when nothing uses them

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

    def _journal(self, folder: Path) -> Journal:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, guard=self._guard)
        return Journal(folder, guard=self._guard)

    def _read_models(self) -> Iterator[ModelQueue]:
        for folder in sorted(self._folder.glob("models/*")):
            queue = ModelQueue.read(self._journal(folder / "journal"))
            if queue is not None:
                yield queue
            else:  # it was being created, or being forgotten
                self._remove_model(folder)

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
            _check("living sessions", alive + 1, self._limits.sessions, "finish one, or wait until one has lapsed")
            session = SessionInfo(secrets.token_hex(16), owner, dict(metadata), self._clock())
            place = self._registry.put(session)
            self._seen[session.key] = session.created
        self._sync(self._registry.journal, place)
        return session.key

    def heartbeat(self, owner: str, session: str) -> None:
        """Keep a session alive. Raise Refused if it is unknown or was finished."""
        with self._writing():
            self._touch(self._session(owner, session))

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

    def _touch(self, session: SessionInfo) -> None:
        if session.finished:
            raise Refused(410, f"the session {session.key} was finished; open a new one")
        self._seen[session.key] = self._clock()
        if session.ended is not None:
            self._registry.put(replace(session, ended=None))

    # Operations of models ---------------------------------------------------------------------------------------------

    def create(self, owner: str, session: str, number: int, create: Create, *, info: Mapping[str, str]) -> str:
        """Create the model SESSION:train:NUMBER and return the request. `create.folder` is a tinker:// path or ""."""
        name = f"{session}:train:{number}"
        with self._writing():
            known = self._session(owner, session)
            if name not in self._models:
                self._touch(known)
                alive = sum(one.known.owner == owner and not self._has_ended(one) for one in self._models.values())
                _check("models of living sessions", alive + 1, self._limits.models, "finish a session")
                _check("rank", create.rank, self._limits.rank, "use a smaller one")
                if create.folder:
                    folder = self._registry.weights_at(create.folder, owner, optimizer=create.optimizer).folder
                    create = replace(create, folder=folder)
                record = ModelRecord(name, owner, session, create, dict(info), self._clock())
                queue = ModelQueue(record, self._journal(self._folder / _folder_name(name) / "journal"), {})
                queue.cut()
                self._models[name] = queue
        return self._submit(owner, name, 0, lambda queue: (queue.known.create, {"model_id": name}, ""))

    def submit(self, owner: str, model: str, number: int, operation: Operation, *, size: int = 0) -> str:
        """Queue operation `number` (from 1) of a model and return its request. A number seen before returns the same.

        Args:
            size: bytes of the request's body.
        """
        if number < 1:
            raise Refused(400, f"the number {number} of an operation is rejected; count from 1")
        return self._submit(owner, model, number, lambda _: (operation, {}, ""), size=size)

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
            exists = path in self._registry.weights or any(one.extra["path"] == path for one in waiting)
            if exists and not overwrite:
                raise Refused(409, f"{path} exists; choose another name, or overwrite it")
            self._registry.make_room(owner, self._limits, self._clock())
            folder = f"{_folder_name(model)}/{kind}/{chosen}"
            if exists or (self._folder / folder).exists():
                folder += f"~{secrets.token_hex(4)}"  # what has the old weights goes on with them, also in a replay
            extra: dict[str, Any] = {"path": path, "ttl_seconds": ttl_seconds}
            sampler = ""
            if name is None:
                sampler = secrets.token_hex(16)
                extra |= {"sampling_session_id": sampler, "session_number": session_number or 0}
            return Save(folder, optimizer=kind == "weights"), extra, sampler

        return self._submit(owner, model, number, make)

    def load(self, owner: str, model: str, number: int, path: str, *, optimizer: bool) -> str:
        """Queue that a model takes the weights at a tinker:// path, and return the request."""

        def make(queue: ModelQueue) -> Making:
            return Load(self._registry.weights_at(path, owner, optimizer=optimizer).folder, optimizer), {}, ""

        return self._submit(owner, model, number, make)

    def _submit(
        self, owner: str, model: str, number: int, make: Callable[[ModelQueue], Making], *, size: int = 0
    ) -> str:
        with self._writing():
            queue = self._model(owner, model)
            future = queue.futures.get(number)
            if future is None:
                self._touch(self._registry.sessions[queue.known.session])
                if number <= queue.known.saved:
                    raise Refused(410, f"operation {number} of {model} was answered long ago; use the next number")
                operation, extra, sampler = make(queue)
                fills_gap = queue.fills_gap(number)
                future = self._queue(
                    queue.journal, operation, owner=owner, size=size, must=fills_gap,
                    model=model, sampler=sampler, number=number, extra=extra,
                )  # fmt: skip
                queue.futures[number] = future
                self._awake[model] = None
        self._sync(queue.journal, future.place)
        return future.request

    def _queue(
        self, journal: Journal, operation: Operation, *, owner: str, size: int, must: bool, **more: Any
    ) -> Future:
        """Return the future of a new operation. `must`: later operations in the queue wait for it."""
        if isinstance(operation, Pass):
            _check("tokens of a request", sum(operation.lengths), self._limits.tokens, "send fewer rows")
        body = packed(operation)
        size, queued, limit = max(size, len(body)), self._queued[owner], self._limits.queued_bytes
        if size > limit:
            raise Refused(413, f"{bytes_in_words(size)} are above the limit of {bytes_in_words(limit)} in a queue")
        if queued + size > limit and not must:
            said = f"{bytes_in_words(queued + size)} would wait, above the limit of {bytes_in_words(limit)}"
            raise Refused(429, f"the queue is full ({said}); wait for answers")
        future = Future(
            secrets.token_hex(16), owner=owner, kind=type(operation).__name__, folder=getattr(operation, "folder", ""),
            backward=getattr(operation, "backward", False), size=size, operation=operation, **more,
        )  # fmt: skip
        future.queue(journal, body)
        self._futures[future.request] = future
        self._queued[owner] += size
        self._counts[future.kind] += 1
        self._changed.notify_all()
        return future

    def _model(self, owner: str, model: str) -> ModelQueue:
        return owned(self._models.get(model), owner, f"the model {shown(model)}")

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
            self._touch(known)
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
            future = self._by_number.get((sampler, number))
            if future is None:
                self._touch(self._registry.sessions[known.session])
                tokens = len(sample.prompt) + sample.num_samples * sample.max_tokens
                _check("tokens of a request", tokens, self._limits.tokens, "ask for fewer samples or tokens")
                future = self._queue(
                    self._registry.journal, replace(sample, folder=known.folder), owner=owner, size=0, must=False,
                    model="", sampler=sampler, number=number, extra={"num_samples": sample.num_samples},
                )  # fmt: skip
                self._samples.append(future)
                self._by_number[sampler, number] = future
                self._registry.used[sampler] = self._clock()
        self._sync(self._registry.journal, future.place)
        return future.request, [f"{future.request}-{index}" for index in range(future.extra["num_samples"])]

    # Answers ----------------------------------------------------------------------------------------------------------

    def answer_of(self, owner: str, request: str) -> Answer | Pending:
        """Return the answer of a request, or why there is none yet. Raise Refused if the request is unknown."""
        with self._changed:
            future = self._future(owner, request)
            if future.answered:
                journal = self._journal_of(future)
                return Answer(future.operation_in(journal), future.result_in(journal), future.extra)
            full = self._queued[owner] > self._limits.queued_bytes / 2
            return Pending("paused_capacity" if full or future.kind == "Create" else "active")

    def when_done(self, request: str, call: Callable[[], None]) -> None:
        """Call `call` once when the request has an answer: in the engine's thread, or at once."""
        with self._changed:
            future = self._futures.get(request)
            if future is not None and not future.answered:
                future.calls.append(call)
                return
        call()

    def taken(self, owner: str, request: str) -> None:
        """Record that the client has the answer. It is kept for a while, because the client may ask again."""
        with self._writing():
            future = self._future(owner, request)
            future.take(self._journal_of(future), self._clock())

    def _future(self, owner: str, request: str) -> Future:
        future = self._futures.get(request)
        return owned(None if future is None or future.gone else future, owner, f"the request {shown(request)}")

    def _journal_of(self, future: Future) -> Journal:
        return self._models[future.model].journal if future.model else self._registry.journal

    # The engine's side ------------------------------------------------------------------------------------------------

    def ready(self, seconds: float) -> list[Ticket]:
        """Wait up to `seconds` for operations whose turn has come, and return them. Each is returned once."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._sweep()
            while not (tickets := list(self._tickets())) and not self._calls and not self._closed:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
        self._run_calls()
        return tickets

    def _tickets(self) -> Iterator[Ticket]:
        samples, self._samples = self._samples, []
        for future in samples:
            yield self._ticket(future, fresh=False)
        awake, self._awake = self._awake, {}
        for model in awake:
            queue = self._models[model]
            while (turn := queue.next()) is not None:
                future, fresh = turn
                failure = queue.refusal(future)
                if failure is None:
                    yield self._ticket(future, fresh=fresh)
                else:
                    self._settle(future, failure)

    def _ticket(self, future: Future, *, fresh: bool) -> Ticket:
        operation = future.operation_in(self._journal_of(future))
        if future.folder:
            assert not isinstance(operation, Pass | Step)
            operation = replace(operation, folder=str(self._folder / future.folder))
        return Ticket(future.request, future.model, future.number, operation, fresh)

    def answer(self, request: str, result: Result) -> None:
        """Record the result of an operation that `ready` returned."""
        with self._changed:
            if request in self._futures:
                self._settle(self._futures[request], result)
        self._run_calls()

    def _settle(self, future: Future, result: Result) -> None:
        queue = self._models.get(future.model)
        if future.answered:  # it was repeated after a restart
            if queue is not None and isinstance(result, Failure) and not future.failed and queue.broken is None:
                why = f"operation {future.number} could not be repeated after a restart ({result.message})"
                queue.broken = Failure(f"{why}; the server must be started again", by_user=False)
                for other in list(queue.futures.values()):
                    if other.number < queue.turn and not other.answered:
                        self._settle(other, queue.broken)
            return
        if queue is not None and queue.broken is not None:
            result = queue.broken
        if queue is not None and future.kind == "Save" and not isinstance(result, Failure):
            size = folder_size(self._folder / future.folder)
            known = queue.known
            self._registry.keep_weights(future, size, create=known.create, info=known.info, now=self._clock())
        future.answer(self._journal_of(future), result)
        self._queued[future.owner] -= future.size
        self._counts["failures"] += future.failed
        self._calls += future.calls
        future.calls = []
        if queue is not None:
            queue.fold()
            self._awake[future.model] = None
            self._changed.notify_all()

    def saved(self, model: str, number: int, folder: str) -> None:
        """Record that the state after operation `number` of a model is in `folder`, and remove the state before it."""
        with self._changed:
            queue = self._models.get(model)
            if queue is None or queue.broken is not None:  # its weights are not those that the client knows
                return
            path = Path(folder).resolve()
            queue.save(number, str(path.relative_to(self._folder)))
            for other in path.parent.iterdir():
                if other != path:
                    discard(other, guard=self._guard)

    def state_folder(self, model: str, number: int) -> Path:
        """Return the folder for the state of a model after operation `number`."""
        return self._folder / _folder_name(model) / "state" / str(number)

    def rewind(self, model: str) -> None:
        """Record that a model has left the memory. The operations behind its last saved state are handed out again
        together with its next operation."""
        with self._changed:
            self._awake.pop(model, None)
            if model in self._models and self._models[model].rewind():
                self._awake[model] = None

    def origin(self, model: str) -> Create | str:
        """Return how a model that is not in memory comes back: the folder of its saved state, or how it is created."""
        with self._changed:
            known = self._models[model].known
            if known.folder:
                return str(self._folder / known.folder)
            create = known.create
            return replace(create, folder=str(self._folder / create.folder)) if create.folder else create

    def lapsed(self) -> list[str]:
        """Return the models without work whose session was finished, or has had no heartbeat for a while."""
        with self._changed:
            return [name for name, queue in self._models.items() if not queue.busy and self._has_ended(queue)]

    def _has_ended(self, queue: ModelQueue) -> bool:
        session = self._registry.sessions[queue.known.session]
        return session.ended is not None or self._seen[session.key] + self._limits.idle_seconds <= self._clock()

    def numbers(self) -> dict[str, float]:
        """Return gauges and counters (`*_total`) by name."""
        with self._changed:
            waiting = sum(not future.answered for future in self._futures.values())
            gauges: dict[str, float] = {
                "sessions": sum(one.ended is None for one in self._registry.sessions.values()),
                "models": len(self._models),
                "samplers": len(self._registry.samplers),
                "requests_waiting": waiting,
                "answers_kept": sum(not one.gone for one in self._futures.values()) - waiting,
                "queued_bytes": sum(self._queued.values()),
                "saved_weights": len(self._registry.weights),
                "saved_weights_bytes": sum(one.size for one in self._registry.weights.values()),
            }
            return gauges | {f"{kind.lower()}_total": count for kind, count in self._counts.items()}

    # What expires -----------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        """Forget what has expired, if the last look was some seconds ago."""
        now = self._clock()
        if now < self._swept + _SWEEP_SECONDS:
            return
        self._swept = now
        for weights in list(self._registry.weights.values()):
            if weights.expires is not None and weights.expires <= now:
                self._registry.forget_weights(weights)
        for session in list(self._registry.sessions.values()):
            self._sweep_session(session, now)
        self._forget_answers(now)
        self._remove_unwanted()
        samples = [future for future in self._futures.values() if not future.model]
        if self._registry.journal.size > _SEGMENT_BYTES:
            self._registry.cut(samples)
        self._registry.journal.drop(used_segments(samples))

    def _sweep_session(self, session: SessionInfo, now: float) -> None:
        lapses, limits = self._seen[session.key] + self._limits.idle_seconds, self._limits
        if session.ended is None:
            if lapses <= now:
                self._registry.put(replace(session, ended=lapses))
            return
        if session.ended + limits.answer_seconds > now:
            return
        samplers = [one for one in self._registry.samplers.values() if one.session == session.key]
        keys = {sampler.key for sampler in samplers}
        for weights in [one for one in self._registry.weights.values() if one.sampler in keys]:
            self._registry.forget_weights(weights)
        if session.finished or session.ended + limits.model_seconds <= now:
            models = [queue for queue in self._models.values() if queue.known.session == session.key]
            for queue in models:
                if not queue.busy:
                    self._forget_model(queue)
            if not any(queue.busy for queue in models):
                for sampler in samplers:
                    self._registry.remove(sampler)
                self._registry.remove(session)

    def _forget_model(self, queue: ModelQueue) -> None:
        for future in queue.futures.values():
            del self._futures[future.request]
            self._calls += future.calls
            self._queued[future.owner] -= 0 if future.answered else future.size
        del self._models[queue.known.model]
        self._awake.pop(queue.known.model, None)
        self._remove_model(self._folder / _folder_name(queue.known.model))

    def _remove_model(self, folder: Path) -> None:
        """Remove all but the weights from a model's folder."""
        for name in ("journal", "state"):
            discard(folder / name, guard=self._guard)
        for empty in (*folder.glob("*weights"), folder):
            with suppress(OSError):
                empty.rmdir()

    def _forget_answers(self, now: float) -> None:
        changed = set[str]()
        for future in list(self._futures.values()):
            fetched = future.taken is not None and future.taken + self._limits.answer_seconds <= now
            orphan = not future.model and future.answered and future.sampler not in self._registry.samplers
            future.gone |= fetched or orphan
            if future.gone and not future.model:
                del self._futures[future.request], self._by_number[future.sampler, future.number]
            elif future.gone and future.number <= self._models[future.model].known.saved:
                del self._futures[future.request], self._models[future.model].futures[future.number]
                changed.add(future.model)
        for model in changed:
            self._models[model].drop_segments()

    def _remove_unwanted(self) -> None:
        """Remove the folders of forgotten weights that no operation or sampler still needs."""
        if not self._registry.unwanted:
            return
        sessions = self._registry.sessions
        samplers = self._registry.samplers.values()
        used = {one.folder for one in samplers if sessions[one.session].ended is None}
        used |= {one.folder for one in self._futures.values() if not one.answered}
        for queue in self._models.values():
            used |= {one.folder for one in queue.futures.values() if one.number > queue.known.saved}
        for folder in self._registry.unwanted - used:
            discard(self._folder / folder, guard=self._guard)
        self._registry.unwanted &= used

    # Helpers ----------------------------------------------------------------------------------------------------------

    def _run_calls(self) -> None:
        with self._changed:
            calls, self._calls = self._calls, []
        for call in calls:
            call()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with _disk_errors(), self._changed:
            yield

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


def _check(what: str, value: int, limit: int, fix: str) -> None:
    if value > limit:
        raise Refused(400, f"{what}: {value:,} is above the limit of {limit:,}; {fix}")


def _folder_name(model: str) -> str:
    return f"models/{model.replace(':', '-')}"
