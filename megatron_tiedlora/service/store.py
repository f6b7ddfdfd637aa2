"""All that a service remembers, in memory and on disk: what it accepts, how it is answered, and when it is forgotten.

Below the folder of the service, which can be moved while the service is stopped:

    desk/*.journal                            sessions, samplers, saved weights and samples
    models/MODEL/journal/*.journal            the operations of a model
    models/MODEL/state/NUMBER                 a state that the engine has saved
    models/MODEL/weights/NAME, sampler_weights/NAME

`Desk` has the lock, so only one thread at a time calls a method.
"""

import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import Guard, discard, remove_leftovers, sync_path
from megatron_tiedlora.base.messages import UserError, bytes_in_words
from megatron_tiedlora.parallel.agreement import packed
from megatron_tiedlora.service.futures import Future, Limits, Refused, used_segments
from megatron_tiedlora.service.journal import Journal
from megatron_tiedlora.service.model_queue import ModelQueue
from megatron_tiedlora.service.operations import Failure, Operation, OperationResult
from megatron_tiedlora.service.registry import Registry, SessionInfo, folder_size

_SWEEP_SECONDS = 5.0  # between two looks for what has expired
_SEGMENT_BYTES = 16 * 10**6  # size of a segment after which a journal begins a new one, if it can
_LEAST_BYTES = 1024  # of an operation in a queue: what remembering it takes


class Store:
    """The memory of a service.

    Attributes:
        futures: operations by request, those of models and samples.
        by_number: samples by sampler and number.
        samples: samples to be handed out.
        awake: models whose next operation may have its turn.
        queued: bytes without an answer, by owner.
        calls: who is to be told of an answer, without the lock.
        counts: operations by kind, and failures, since the start.
    """

    def __init__(self, folder: Path, limits: Limits, clock: Callable[[], float], guard: Guard) -> None:
        """Read what the folder holds."""
        self.folder, self.limits, self.clock, self.guard = folder, limits, clock, guard
        if any(folder.glob("models/*")) and not any(folder.glob("desk/*")):
            raise UserError(f"{folder}/desk: the journal is missing; restore it from a copy, or give another folder")
        self.registry, self.futures = Registry.read(self.journal(folder / "desk"))
        self.models = {queue.known.model: queue for queue in self._read_models()}
        for queue in self.models.values():
            self.futures.update((future.request, future) for future in queue.futures.values())
        waiting = [future for future in self.futures.values() if not future.answered]
        self.queued = Counter[str]()
        for future in waiting:
            self.queued[future.owner] += future.size
        self.samples = [future for future in waiting if not future.model]
        self.by_number = {(one.sampler, one.number): one for one in self.futures.values() if not one.model}
        self.awake = dict.fromkeys(self.models)
        self.calls: list[Callable[[], None]] = []
        self.counts = Counter[str]()
        self._seen = dict.fromkeys(self.registry.sessions, clock())  # last heartbeats
        self._swept = clock()
        known = {one.folder for one in self.registry.weights.values()} | {one.folder for one in waiting}
        found = {str(path.relative_to(folder)) for path in folder.glob("models/*/*weights/*")}
        self.registry.unwanted = found - known

    def _read_models(self) -> Iterator[ModelQueue]:
        for folder in sorted(self.folder.glob("models/*")):
            queue = ModelQueue.read(self.journal(folder / "journal"))
            if queue is not None:
                yield queue
            else:  # it was being created, or being forgotten
                self._remove_model(folder)

    def journal(self, folder: Path) -> Journal:
        """Return the journal in a folder, which is created if it does not exist."""
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for parent in folder.relative_to(self.folder).parents:
                sync_path(self.folder / parent)
        remove_leftovers(folder, guard=self.guard)
        return Journal(folder, guard=self.guard)

    def journal_of(self, future: Future) -> Journal:
        """Return the journal that has an operation."""
        return self.models[future.model].journal if future.model else self.registry.journal

    def model_folder(self, model: str) -> str:
        """Return the folder of a model, relative to the folder of the service."""
        return f"models/{model.replace(':', '-')}"

    # Sessions ---------------------------------------------------------------------------------------------------------

    def touch(self, session: SessionInfo) -> None:
        """Keep a session alive, or bring it back. Raise Refused if it was finished."""
        if session.finished:
            raise Refused(410, f"the session {session.key} was finished; open a new one")
        self._seen[session.key] = self.clock()
        if session.ended is not None:
            self.registry.put(replace(session, ended=None))

    def has_ended(self, session: str) -> bool:
        """Return whether a session was finished or has lapsed."""
        ended = self.registry.sessions[session].ended is not None
        return ended or self._seen[session] + self.limits.idle_seconds <= self.clock()

    # Operations -------------------------------------------------------------------------------------------------------

    def queue(self, operation: Operation | None, *, owner: str, size: int, must: bool, **more: Any) -> Future:
        """Write an operation to its journal and return its future.

        Args:
            operation: None if it was rejected. Then `more` has `kind`.
            size: bytes of the request's body.
            must: whether it is accepted into a full queue, because later operations there wait for it.
            more: other attributes of the future.
        """
        body = packed(operation)
        size, queued, limit = max(size, len(body), _LEAST_BYTES), self.queued[owner], self.limits.queued_bytes
        if size > limit:
            raise Refused(413, f"{bytes_in_words(size)} are above the limit of {bytes_in_words(limit)} in a queue")
        if queued + size > limit and not must:
            said = f"{bytes_in_words(queued + size)} would wait, above the limit of {bytes_in_words(limit)}"
            raise Refused(429, f"the queue is full ({said}); wait for answers")
        fields: dict[str, Any] = {
            "kind": type(operation).__name__,
            "backward": getattr(operation, "backward", False),
            "folder": getattr(operation, "folder", ""),
        }
        future = Future(secrets.token_hex(16), owner=owner, size=size, operation=operation, **(fields | more))
        future.queue(self.journal_of(future), body)
        self.futures[future.request] = future
        self.queued[owner] += size
        self.counts[future.kind] += 1
        return future

    def settle(self, future: Future, result: OperationResult) -> None:
        """Answer an operation. The answer to one that is repeated changes nothing, unless it fails now."""
        queue = self.models.get(future.model)
        if future.answered:
            if queue is not None and isinstance(result, Failure) and not future.failed:
                queue.give_up(future.number, result.message)
                self.awake[future.model] = None
            return
        if queue is not None and queue.broken is not None:
            result = queue.broken
        if queue is not None and future.kind == "Save" and not isinstance(result, Failure):
            size, now, known = folder_size(self.folder / future.folder), self.clock(), queue.known
            self.registry.keep_weights(future, size, create=known.create, info=known.info, now=now)
        future.answer(self.journal_of(future), result)
        self.queued[future.owner] -= future.size
        self.counts["failures"] += future.failed
        self.calls += future.calls
        future.calls = []
        if queue is not None:
            queue.fold()
            self.awake[future.model] = None

    # What expires -----------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forget what has expired, if the last look was some seconds ago."""
        now = self.clock()
        if now < self._swept + _SWEEP_SECONDS:
            return
        self._swept = now
        for weights in list(self.registry.weights.values()):
            if weights.expires is not None and weights.expires <= now:
                self.registry.forget_weights(weights)
        for session in list(self.registry.sessions.values()):
            self._sweep_session(session, now)
        self._forget_answers(now)
        self._remove_unwanted()
        samples = [future for future in self.futures.values() if not future.model]
        if self.registry.journal.size > _SEGMENT_BYTES:
            self.registry.cut(samples)
        for queue in self.models.values():
            if queue.journal.size > _SEGMENT_BYTES and queue.absorb():
                queue.cut()
        self.registry.journal.drop(used_segments(samples))

    def _sweep_session(self, session: SessionInfo, now: float) -> None:
        lapses, limits = self._seen[session.key] + self.limits.idle_seconds, self.limits
        if session.ended is None:
            if lapses <= now:
                self.registry.put(replace(session, ended=lapses))
            return
        if session.ended + limits.answer_seconds > now:
            return
        samplers = [one for one in self.registry.samplers.values() if one.session == session.key]
        keys = {sampler.key for sampler in samplers}
        for weights in [one for one in self.registry.weights.values() if one.sampler in keys]:
            self.registry.forget_weights(weights)
        if session.finished or session.ended + limits.model_seconds <= now:
            models = [queue for queue in self.models.values() if queue.known.session == session.key]
            for queue in models:
                if not queue.busy:
                    self._forget_model(queue)
            if not any(queue.busy for queue in models):
                for sampler in samplers:
                    self.registry.remove(sampler)
                self.registry.remove(session)

    def _forget_model(self, queue: ModelQueue) -> None:
        for future in queue.futures.values():
            del self.futures[future.request]
            self.calls += future.calls
            self.queued[future.owner] -= 0 if future.answered else future.size
        del self.models[queue.known.model]
        self.awake.pop(queue.known.model, None)
        self._remove_model(self.folder / self.model_folder(queue.known.model))

    def _remove_model(self, folder: Path) -> None:
        """Remove all but the weights from a model's folder."""
        for name in ("journal", "state"):
            discard(folder / name, guard=self.guard)
        for empty in (*folder.glob("*weights"), folder):
            with suppress(OSError):
                empty.rmdir()

    def _forget_answers(self, now: float) -> None:
        changed = set[str]()
        for future in list(self.futures.values()):
            fetched = future.taken is not None and future.taken + self.limits.answer_seconds <= now
            orphan = not future.model and future.answered and future.sampler not in self.registry.samplers
            future.gone |= fetched or orphan
            if future.gone and not future.model:
                del self.futures[future.request], self.by_number[future.sampler, future.number]
            elif future.gone and future.number <= self.models[future.model].known.saved:
                del self.futures[future.request], self.models[future.model].futures[future.number]
                changed.add(future.model)
        for model in changed:
            self.models[model].drop_segments()

    def _remove_unwanted(self) -> None:
        """Remove the folders of forgotten weights that no operation or sampler still needs."""
        if not self.registry.unwanted:
            return
        sessions = self.registry.sessions
        samplers = self.registry.samplers.values()
        used = {one.folder for one in samplers if sessions[one.session].ended is None}
        used |= {one.folder for one in self.futures.values() if not one.answered}
        for queue in self.models.values():
            used |= {one.folder for one in queue.futures.values() if one.number > queue.known.saved}
        for folder in self.registry.unwanted - used:
            discard(self.folder / folder, guard=self.guard)
        self.registry.unwanted &= used
