"""The operations of one model in their order, and the journal that brings them back after a crash.

A model's state on disk is a saved state of the engine and the operations behind it. After a restart those that changed
weights are handed out again, whether they had been answered or not. Only successes are repeated: a failed operation
changed nothing, and the gradients of a failed pass are dropped with those of its window, which ends at the next step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from megatron_tiedlora.parallel.agreement import packed, unpacked
from megatron_tiedlora.service.futures import (
    Future,
    live_futures,
    live_requests,
    opened,
    read_future,
    record,
    used_segments,
)
from megatron_tiedlora.service.journal import Journal
from megatron_tiedlora.service.operations import Create, Failure

_ENDS_WINDOW = ("Step", "Load")


@dataclass(frozen=True)
class Window:
    """The backward passes since the last step or load: how many succeeded, and the message of one that failed."""

    num_passes: int = 0
    failed: str = ""


@dataclass(frozen=True)
class ModelRecord:
    """What is known of a model. It begins each segment of the model's journal.

    Attributes:
        saved: the number of the last operation in the saved state, or -1 if there is none.
        folder: the folder of that state, relative to the folder of the service.
        window: the window after that operation.
    """

    model: str
    owner: str
    session: str
    create: Create
    info: dict[str, str]
    created: float
    saved: int = -1
    folder: str = ""
    window: Window = field(default_factory=Window)


@dataclass(frozen=True)
class ModelInfo:
    """What a client may know of a model. `state` is "waiting" until it is created, then "active", or "failed"."""

    model: str
    session: str
    create: Create
    info: Mapping[str, str]
    state: str
    created: float


class ModelQueue:
    """The operations of a model by number.

    Attributes:
        futures: operations that are not forgotten, or that are not part of the saved state.
        turn: the number of the next operation to hand out.
        folded: the number up to which all operations are answered.
        broken: why the model cannot go on, or None.
    """

    def __init__(self, known: ModelRecord, journal: Journal, futures: dict[int, Future]) -> None:
        self.known, self.journal, self.futures = known, journal, futures
        self.turn, self.folded, self.window = known.saved + 1, known.saved, known.window
        self.broken: Failure | None = None
        self._fresh = known.window == Window()
        self.fold()

    @property
    def owner(self) -> str:
        """Return the owner of the model."""
        return self.known.owner

    @classmethod
    def read(cls, journal: Journal) -> "ModelQueue | None":
        """Return the queue that a journal describes, or None if a crash prevented its first record."""
        known, futures = None, dict[str, Future]()
        for place, payload in journal.records():
            head, body = opened(payload)
            if head["record"] == "model":
                known = unpacked(ModelRecord, body, sender=0)
                futures = live_futures(futures, head)
            else:
                read_future(futures, head, place)
        if known is None:
            return None
        # An operation of the saved state without an answer was forgotten: the segment with its answer is gone.
        kept = (future for future in futures.values() if future.answered or future.number > known.saved)
        return cls(known, journal, {future.number: future for future in kept})

    def cut(self) -> None:
        """Begin a segment of the journal with what is known now."""
        live = live_requests(self.futures.values())
        self.journal.cut(record({"record": "model", "live": live}, packed(self.known)))

    @property
    def info(self) -> ModelInfo:
        """Return what a client may know."""
        state = "failed" if self.broken else "waiting" if self.folded < 0 else "active"
        known = self.known
        return ModelInfo(known.model, known.session, known.create, known.info, state, known.created)

    @property
    def busy(self) -> bool:
        """Return whether an operation without an answer can run."""
        return self.folded + 1 in self.futures

    def fills_gap(self, number: int) -> bool:
        """Return whether later operations wait for operation `number` alone."""
        missing = self.turn
        while missing in self.futures:
            missing += 1
        return number == missing and number < max(self.futures, default=0)

    def fold(self) -> None:
        """Include answers in the window as far as all earlier operations are answered."""
        for future in self._answered(self.folded):
            self.window, self.folded = self._after(self.window, future), future.number
            if future.kind == "Create" and future.failed:
                failure = self._failure(future)
                self.broken = replace(failure, message=f"the model was not created: {failure.message}")

    def _answered(self, number: int) -> Iterator[Future]:
        """Yield the answered operations behind `number`, up to the first one without an answer."""
        while (future := self.futures.get(number := number + 1)) is not None and future.answered:
            yield future

    def _after(self, window: Window, future: Future) -> Window:
        if future.kind in _ENDS_WINDOW:
            return Window()
        if not future.backward:
            return window
        if future.failed:
            return replace(window, failed=f"operation {future.number} failed: {self._failure(future).message}")
        return replace(window, num_passes=window.num_passes + 1)

    def _failure(self, future: Future) -> Failure:
        result = future.result_in(self.journal)
        assert isinstance(result, Failure)
        return result

    def next(self) -> tuple[Future, bool] | None:
        """Return the operation whose turn has come, and whether earlier gradients are dropped first (`Ticket.fresh`).

        A step waits for the answers of all earlier operations, and everything waits for the model's creation.
        """
        while (future := self.futures.get(self.turn)) is not None:
            needed = self.turn - 1 if future.kind == "Step" else min(0, self.turn - 1)
            if not future.answered and self.folded < needed:
                return None
            self.turn += 1
            self._fresh |= future.kind in _ENDS_WINDOW
            if not future.answered or future.changes:
                fresh = self._fresh and future.backward
                self._fresh &= not future.backward
                return future, fresh
        return None

    def refusal(self, future: Future) -> Failure | None:
        """Return why an operation whose turn has come is not handed out, or None. It depends on the journal alone."""
        if future.answered:
            return None
        if self.broken is not None:
            return self.broken
        if "rejected" in future.extra:
            return Failure(future.extra["rejected"], by_user=True)
        if future.kind != "Step" or (self.window.num_passes and not self.window.failed):
            return None
        why = self.window.failed or "the model has no gradients, because no backward pass came since the last step"
        return Failure(f"the optimizer step {future.number} was not taken: {why}", by_user=True)

    def rewind(self) -> bool:
        """Hand out the operations behind the saved state again, because the model has left the memory. Return whether
        one of them has no answer yet."""
        self.turn, self._fresh = self.known.saved + 1, self.known.window == Window()
        return self.busy

    def give_up(self, number: int, message: str) -> None:
        """Fail all operations without an answer, because operation `number` failed when it was repeated: the engine
        would run them on wrong weights."""
        why = f"operation {number} could not be repeated to bring the model back ({message})"
        self.broken = self.broken or Failure(f"{why}; the server must be started again", by_user=False)

    def save(self, number: int, folder: str) -> None:
        """Record that the state after operation `number` is in `folder`, and drop what leads up to it."""
        assert self.known.saved <= number <= self.folded, f"{self.known.saved} <= {number} <= {self.folded}"
        window = self.known.window
        for future in self._answered(self.known.saved):
            if future.number <= number:
                window = self._after(window, future)
        self.known = replace(self.known, saved=number, folder=folder, window=window)
        self.cut()
        self.drop_segments()

    def absorb(self) -> bool:
        """Count answered operations right behind the saved state as part of it if they changed no weights. Return
        whether there were any; then `cut` must follow."""
        before = known = self.known
        for future in self._answered(known.saved):
            if future.changes or not known.folder:
                break
            known = replace(known, saved=future.number, window=self._after(known.window, future))
        self.known = known
        if self.turn <= known.saved:
            self.rewind()
        return known.saved > before.saved

    def drop_segments(self) -> None:
        """Remove the segments of the journal that nothing needs any more."""
        self.journal.drop(used_segments(self.futures.values()))
