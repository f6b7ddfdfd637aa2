"""One rank of a pipeline test: what its stage does when, and what DeepSpeed's engine keeps meanwhile.

`trace_steps` runs on every rank (see forked_ranks.py). Steps go through the package's own road as far as the runner;
micro-batches are made up, and told apart by their positions, which start at the micro-batch's number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from forked_ranks import join_as_launched
from torch import distributed


@dataclass(frozen=True)
class Case:
    """Two equal steps: `num_micro_batches` of (rows, length), the last `supervised` labels of each row.

    Attributes:
        adapters: the settings that each of several adapters has of its own, which own the micro-batches in turn.
    """

    settings: dict[str, Any]
    num_micro_batches: int
    rows: int
    length: int
    supervised: int
    adapters: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Event:
    """A forward ("F") or backward ("B") pass of a micro-batch.

    Attributes:
        begin, end: seconds of a clock that all ranks share.
    """

    kind: str
    micro_batch: int
    begin: float
    end: float


@dataclass
class Held:
    """Bytes that the engine holds, of storages that autograd does not keep.

    Attributes:
        in_flight: micro-batches whose backward pass has not ended.
        floats: of hidden states and the like, of these micro-batches.
        integers: of tokens, positions and labels, of these.
        once: of hidden states and the like, of ended micro-batches and in the buffers that messages arrive in.
    """

    in_flight: tuple[int, ...]
    floats: int
    integers: int
    once: int


@dataclass
class Traced:
    """What a rank saw.

    Attributes:
        passes: of the second step, in order.
        parts: where the engine cut the flat list.
        held: after each forward pass of the first step, and before each backward pass.
    """

    passes: list[Event] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)


def trace_steps(cases: list[Case], folder: str) -> list[Traced]:
    """Every case on this rank."""
    device = join_as_launched(folder)
    return [_trace(case, device) for case in cases]


def _trace(case: Case, device: torch.device) -> Traced:
    started = _start(case, device)
    engine = started.engine
    traced = Traced(parts=list(engine.module.parts))
    passes = dict(engine._INSTRUCTION_MAP)  # without what is wrapped below

    def step() -> None:
        distributed.barrier()
        started.step()

    _wrap(engine, passes, _Holding(started.parameters, engine, traced.held))
    step()
    _wrap(engine, passes, _Timing(traced.passes))
    step()
    engine.destroy()
    return traced


@dataclass(frozen=True)
class _Started:
    """A run that is ready for its next step, and what autograd holds anyway."""

    engine: Any
    step: Callable[[], Any]
    parameters: list[torch.Tensor]


def _plan(case: Case, **changes: Any) -> Any:
    from megatron_tiedlora.config.settings import make_settings
    from megatron_tiedlora.planning.run_plan import plan_run

    settings = make_settings({**case.settings, **changes})
    return plan_run(settings, rank=distributed.get_rank(), world_size=distributed.get_world_size())


def _start(case: Case, device: torch.device) -> _Started:
    from megatron_tiedlora.adapters.adapter_bank import ONLY, Share
    from megatron_tiedlora.training.build import build_model

    plans = {str(number): _plan(case, **own) for number, own in enumerate(case.adapters)} or {ONLY: _plan(case)}
    (shared, *_), names = plans.values(), list(plans)
    runner = build_model(plans, device).runner
    optimizers = runner.optimizers
    batches = [
        replace(batch, shares=(Share(names[index % len(names)], case.rows, case.length),))
        for index, batch in enumerate(_batches(case, shared.source.shape.vocab_size))
    ]
    of_each = case.num_micro_batches // len(plans)
    divisors = optimizers.divisors(
        case.rows * case.supervised * of_each, accumulation_steps=of_each, dp_size=shared.grid.dp_size
    )

    def step() -> None:
        runner.accumulate(batches, dict.fromkeys(plans, divisors), lambda: None)
        assert not optimizers.sum_gradients(plans)
        norms = optimizers.norms(names)
        for name in names:
            optimizers.take(name, norms.get(name))
        optimizers.clear()

    held = [*runner.stage.parameters(), *(p for adapter in runner.adapters.values() for p in adapter.parameters())]
    return _Started(runner.engine, step, held)


def _batches(case: Case, vocab_size: int) -> list[Any]:
    from megatron_tiedlora.model.batch import MicroBatch

    generator = torch.Generator().manual_seed(7)
    found = []
    for index in range(case.num_micro_batches):
        tokens = torch.randint(3, vocab_size, (case.rows, case.length), generator=generator)
        labels = tokens.roll(-1, dims=1)
        labels[:, : case.length - case.supervised] = -100
        positions = torch.arange(index, index + case.length).expand_as(tokens).contiguous()
        lengths = torch.full((case.rows,), case.length)
        found.append(
            MicroBatch(tokens=tokens, positions=positions, labels=labels, lengths=lengths, num_samples=case.rows)
        )
    return found


class _Timing:
    """Notes when each pass begins and ends."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def run(self, kind: str, micro_batch: int, work: Callable[[], None]) -> None:
        begin = time.monotonic()
        work()
        self._events.append(Event(kind, micro_batch, begin, time.monotonic()))


class _Holding:
    """Notes what the engine holds after each forward pass and before each backward pass."""

    def __init__(self, parameters: list[torch.Tensor], engine: Any, held: list[Held]) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._engine = engine
        self._held = held
        self._saved: dict[int, list[torch.Tensor]] = {}  # by micro-batch in flight

    def run(self, kind: str, micro_batch: int, work: Callable[[], None]) -> None:
        if kind == "B":
            self._held.append(self._count())
            work()
            del self._saved[micro_batch]
            return
        saved = self._saved[micro_batch] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            work()
        self._held.append(self._count())

    def _count(self) -> Held:
        counted = self._own | {t.untyped_storage().data_ptr() for kept in self._saved.values() for t in kept}
        buffers = self._engine.pipe_buffers
        found = Held(tuple(sorted(self._saved)), 0, 0, 0)
        for index in range(self._engine.num_pipe_buffers):
            tensors = [t for name in ("inputs", "outputs", "labels") for t in _tensors(buffers[name][index])]
            # The last stage gives up what came in before what went out.
            inputs = buffers["inputs"][index]
            if inputs is not None and _number(inputs) in self._saved:
                found.floats += _bytes(tensors, counted, floating=True)
                found.integers += _bytes(tensors, counted, floating=False)
            else:
                found.once += _bytes(tensors, counted, floating=True)
        found.once += _bytes(_tensors(self._engine.grad_layer), counted, floating=True)
        return found


def _wrap(engine: Any, passes: dict[Any, Any], watcher: Any) -> None:
    """Let `watcher` run the engine's forward and backward passes."""
    from deepspeed.runtime.pipe import schedule

    def watched(kind: str, run: Any) -> Any:
        def watch(engine: Any, buffer_id: int) -> None:
            number = _number(engine.pipe_buffers["inputs"][buffer_id])
            watcher.run(kind, number, lambda: run(engine, buffer_id))

        return watch

    engine._INSTRUCTION_MAP = {
        **passes,
        schedule.ForwardPass: watched("F", passes[schedule.ForwardPass]),
        schedule.BackwardPass: watched("B", passes[schedule.BackwardPass]),
    }


def _number(inputs: tuple[torch.Tensor, torch.Tensor]) -> int:
    """Of a micro-batch, by its first position, from (tokens or hidden states, positions)."""
    return int(inputs[1].flatten()[0])


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _bytes(tensors: Iterable[torch.Tensor], counted: set[int], *, floating: bool) -> int:
    """Of storages that are not in `counted`, which they enter."""
    size = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() == floating and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            size += storage.nbytes()
    return size
