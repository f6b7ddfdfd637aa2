"""Decide on rank 0 what all ranks do next.

Each command takes some operations of every model that has any. Owners take turns, and so do the models of an owner, so
that no client can keep others waiting. More models may exist than fit in memory. A model that is not in memory comes
back from its last saved state when it is used, and its later operations are repeated. A state is saved after some
steps, so these are few.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.runtime.ending import End
from megatron_tiedlora.service.desk import Desk
from megatron_tiedlora.service.operations import (
    Create,
    Failure,
    Load,
    OperationResult,
    Pass,
    Sample,
    Save,
    Step,
    Ticket,
)
from megatron_tiedlora.service.worker import WorkerCommand

_LOGGER = logging.getLogger(__name__)
TICK_SECONDS = 2.0  # without work, ranks still exchange a command this often, so that none waits too long for another
IDLE_SECONDS = 10.0  # a model that was idle for so long may give its place in memory to another
TURN_SECONDS = 120.0  # a model that has had its place for so long may give it to a waiting one, although it has work
# Many operations take hardly longer together than one alone. So more are awaited, until none comes for a pause: samples
# behind samples, because clients send the prompts of a batch in turn, and the next passes of models that were used now.
PAUSE_SECONDS, GATHER_SECONDS, PASS_PAUSE_SECONDS = 0.02, 0.25, 0.005


class Scheduler:
    """The operations that wait on rank 0, and the models in memory.

    The ticket of an operation that no client asked for has the request "". The save of a state has the number of the
    operation before it.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        round_tokens: int,
        round_rows: int,
        cache_tokens: int,
        most_models: int,
        state_steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start without models in memory.

        Args:
            round_tokens: the number of tokens of passes in a command; a larger pass is alone.
            round_rows, cache_tokens: the number of sequences that are sampled in a command, and of the tokens of their
                caches; a larger sample is alone.
            most_models: the number of models in memory at once.
            state_steps: the number of steps of a model between saved states.
        """
        self._desk, self._clock = desk, clock
        self._round_tokens, self._round_rows, self._cache_tokens = round_tokens, round_rows, cache_tokens
        self._most, self._state_steps = most_models, state_steps
        self._queues = dict[str, deque[Ticket]]()  # by model, the longest unserved first
        self._samples = dict[str, deque[Ticket]]()  # by owner, the longest unserved first
        self._served, self._number = Counter[str](), 0  # the number of the last command that served an owner
        self._loaded, self._used = dict[str, float](), dict[str, float]()  # when models in memory were loaded, and used
        self._looked = self._clock()  # when it was last looked for models whose session has ended
        self._steps = Counter[str]()  # of models in memory, since their last saved state
        self._had_passes = False  # in the last command
        self._running: list[Ticket] = []  # the operations of the running command

    def next(self) -> WorkerCommand:
        """Return the next command. It waits up to `TICK_SECONDS` for operations, and is empty if there are none."""
        self._receive()
        leaving = list[str]()
        if (now := self._clock()) >= self._looked + TICK_SECONDS:
            self._looked, leaving = now, self._desk.lapsed(self._loaded.keys() - self._queues)
        for model in leaving:
            self._unload(model)
        creates, passes, others = list[Ticket](), list[Ticket](), list[Ticket]()
        self._number += 1
        # Steps come before passes, so that the next passes of their models share micro-batches with those of others.
        fronts = [queue[0].operation for model, queue in self._queues.items() if model in self._loaded]
        steps_first = self._had_passes and not all(isinstance(one, Pass) for one in fronts)
        for model in self._in_turn():
            queue = self._queues.get(model)
            if queue is None:  # the model has just given its place to another one
                continue
            num_before, owner = len(queue), queue[0].owner
            if model not in self._loaded:
                if len(self._loaded) >= self._most:
                    victim = self._victim({one.model for one in (*creates, *passes, *others)})
                    if victim is None:
                        continue
                    self._unload(victim)
                    leaving.append(victim)
                creates.append(self._create(model, queue))
                others += self._new_state(creates[-1])
            passes += () if steps_first else self._passes(queue, passes)
            others += self._others(queue)
            if not queue:
                del self._queues[model]
            elif len(queue) < num_before:  # to the end, behind those that were not served
                self._queues[model] = self._queues.pop(model)
            if len(queue) < num_before:
                self._served[owner] = self._number
            self._used[model] = self._clock()
        self._had_passes = bool(passes)  # then others may come first, but not again and again
        self._running = [*creates, *passes, *others, *self._some_samples()]
        fresh = tuple(one.model for one in passes if one.fresh)
        return WorkerCommand(tuple(leaving), fresh, tuple((one.model, one.operation) for one in self._running))

    def _in_turn(self) -> list[str]:
        """Return the models with work: the first ones of all owners, the longest unserved first, then the second."""
        places, counts = list[tuple[int, int, str]](), Counter[str]()
        for model, queue in self._queues.items():
            places.append((counts[queue[0].owner], self._served[queue[0].owner], model))
            counts[queue[0].owner] += 1
        return [model for *_, model in sorted(places, key=lambda place: place[:2])]

    def _receive(self) -> None:
        """Queue the operations whose turn has come. Wait for some if there are none, and for more that come at once."""
        # If models wait for a place in memory and nothing was chosen, it is not looked for again at once.
        tickets = self._desk.ready(0.0 if self._running and (self._queues or self._samples) else TICK_SECONDS)
        end = self._clock() + GATHER_SECONDS
        while tickets:
            for one in tickets:
                if isinstance(one.operation, Sample):
                    self._samples.setdefault(one.owner, deque()).append(one)
                else:
                    self._queues.setdefault(one.model, deque()).append(one)
            now = self._clock()
            others = (used for model, used in self._used.items() if model not in self._queues)
            if now > end or (self._queues and not any(used + GATHER_SECONDS > now for used in others)):
                return
            tickets = self._desk.ready(PASS_PAUSE_SECONDS if self._queues else PAUSE_SECONDS)

    def answer(self, results: Sequence[OperationResult]) -> None:
        """Answer the operations of the last command with their results on rank 0."""
        for one, result in zip(self._running, results, strict=True):
            if isinstance(result, Failure) and isinstance(one.operation, Create):
                self._forget(one.model)
                _LOGGER.error("%s: %s", one.model, result.message)
            if one.request:
                self._desk.answer(one.request, result)
            elif isinstance(one.operation, Save) and not isinstance(result, Failure):
                self._steps[one.model] = 0
                self._desk.saved(one.model, one.number, one.operation.folder)
        self._desk.gauges["models_in_memory"] = len(self._loaded)

    def crashed(self, end: End) -> None:
        """Record that this process ends with an error, also another rank's, in the last command; not if by a signal."""
        with suppress(UserError):  # the error of the command is the one to report
            self._desk.crashed(one.request for one in self._running if not end.status)

    # Models in memory ------------------------------------------------------------------------------------------------

    def _victim(self, busy: set[str]) -> str | None:
        """Return the model in memory that gives its place to another one, or None if none has to yet."""
        now = self._clock()
        for model in sorted(self._loaded.keys() - busy, key=lambda model: self._used[model]):
            idle = model not in self._queues and self._used[model] + IDLE_SECONDS <= now
            if idle or self._loaded[model] + TURN_SECONDS <= now:
                return model
        return None

    def _unload(self, model: str) -> None:
        """Let the desk hand out the operations behind the model's last saved state when the model is used again."""
        self._queues.pop(model, None)
        self._forget(model)
        self._desk.rewind(model)

    def _forget(self, model: str) -> None:
        for known in (self._loaded, self._used, self._steps):
            known.pop(model, None)

    def _create(self, model: str, queue: deque[Ticket]) -> Ticket:
        self._loaded[model] = self._clock()
        if isinstance(queue[0].operation, Create):
            return queue.popleft()
        origin = self._desk.origin(model)
        if isinstance(origin, str):
            origin = Create("", 1, 1.0, (), 0, folder=origin, optimizer=True)
        return Ticket("", "", model, 0, origin)

    def _new_state(self, after: Ticket) -> Iterator[Ticket]:
        """Yield the save of a state, if it is due, or if a client's operation has read weights that may be deleted."""
        operation, model = after.operation, after.model
        self._steps[model] += isinstance(operation, Step)
        reads = isinstance(operation, Create | Load) and operation.folder != ""
        if after.request and (reads or self._steps[model] >= self._state_steps):
            folder = str(self._desk.state_folder(model, after.number))
            yield Ticket("", "", model, after.number, Save(folder, optimizer=True))

    # Operations ------------------------------------------------------------------------------------------------------

    def _passes(self, queue: deque[Ticket], before: list[Ticket]) -> Iterator[Ticket]:
        """Yield a model's next passes of the kind of those `before`, which other models have in the command."""
        others: list[Any] = [one.operation for one in before]
        tokens = sum(sum(one.lengths) for one in others)
        backward, found = others[0].backward if others else None, 0
        while queue and isinstance(one := queue[0].operation, Pass):
            size = sum(one.lengths)
            if backward not in (None, one.backward) or (tokens and tokens + size > self._round_tokens):
                return
            if found and queue[0].fresh:  # gradients are dropped before all passes of a command
                return
            backward, tokens, found = one.backward, tokens + size, found + 1
            yield queue.popleft()

    def _others(self, queue: deque[Ticket]) -> Iterator[Ticket]:
        """Yield a model's next operations up to its next pass, and saves of its state."""
        while queue and not isinstance(queue[0].operation, Pass):
            yield (one := queue.popleft())
            if isinstance(one.operation, Step | Load):
                yield from self._new_state(one)

    def _some_samples(self) -> list[Ticket]:
        """Return as many samples as are computed at once, those of different owners in turns."""
        found, rows, prompt, new = list[Ticket](), 0, 0, 0
        while self._samples:
            owner, queue = next(iter(self._samples.items()))
            one: Any = queue[0].operation
            rows, prompt, new = rows + one.num_samples, max(prompt, len(one.prompt)), max(new, one.max_tokens)
            if found and (rows > self._round_rows or rows * (prompt + new) > self._cache_tokens):
                break
            found.append(queue.popleft())
            del self._samples[owner]
            if queue:  # to the end
                self._samples[owner] = queue
        return found
