"""Measures the steps of several adapters of one base: one after another, and together in shared micro-batches.

A third side takes one step of one adapter with as many tokens in as many micro-batches. No sharing can be faster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from megatron_tiedlora.adapters.adapter_bank import AdapterBank, pieces_of
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, initial_values
from megatron_tiedlora.base.base_formats import precision_in_words
from megatron_tiedlora.benchmark.plan import LEARNING_RATE, make_plan, read_samples
from megatron_tiedlora.benchmark.sides import build_stage
from megatron_tiedlora.benchmark.timing import (
    SPEED_HEADER,
    default_device,
    describe_setup,
    in_own_process,
    peak_of,
    setup_line,
    speed_columns,
    take_turns,
)
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.data.shared import shared_input, shared_rounds
from megatron_tiedlora.engine.bank_runner import ShareLosses, Weight
from megatron_tiedlora.engine.runner import StepInput
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.supervised import find_shared_supervised, find_supervised
from megatron_tiedlora.training.compiling import choose_kernels
from megatron_tiedlora.training.optimizer import make_optimizer
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.throughput import timed

IN_TURN, TOGETHER, ONE = "in turn", "together", "one adapter, all tokens"


@dataclass(frozen=True)
class Group:
    """Adapters of one base, ready for steps.

    Attributes:
        alone: the micro-batches of each adapter's step, by its name.
        shared: those of all of them, in shared ones.
        joined: the same rows as micro-batches of one adapter.
        weight: of a loss.
        kernels: how they were made, in a few words.
    """

    stage: Stage
    bank: AdapterBank
    optimizers: Mapping[str, torch.optim.Optimizer]
    alone: Mapping[str, Sequence[StepInput]]
    shared: Sequence[StepInput]
    joined: Sequence[StepInput]
    weight: Weight
    device: torch.device
    kernels: str

    @property
    def steps(self) -> dict[str, Callable[[], None]]:
        """The sides, by name."""
        return {IN_TURN: self._in_turn, TOGETHER: self._together, ONE: self._one}

    def _in_turn(self) -> None:
        for name, batches in self.alone.items():
            self._step_alone(name, batches)

    def _one(self) -> None:
        self._step_alone(next(iter(self.alone)), self.joined)

    def _step_alone(self, name: str, batches: Sequence[StepInput]) -> None:
        self.stage.bank, self.stage.adapter = None, self.bank.adapters[name]
        for batch in batches:
            (self._losses(batch) / self.weight.denominator).backward()
        self._update([name])

    def _together(self) -> None:
        self.stage.bank, self.stage.adapter = self.bank, None
        losses = ShareLosses(dict.fromkeys(self.alone, self.weight))
        for batch in self.shared:
            losses.weighted(self._losses(batch), batch.shares).backward()
        self._update(self.alone)

    def _losses(self, batch: StepInput) -> torch.Tensor:
        pieces, labels = pieces_of(batch.shares), batch.labels
        found = find_shared_supervised(labels, pieces) if pieces else find_supervised(labels)
        supervised = found.moved(lambda tensor: tensor.to(self.device))
        tokens, positions = batch.tokens.to(self.device), batch.positions.to(self.device)
        losses: torch.Tensor = self.stage(tokens, positions, supervised, shares=batch.shares)
        return losses

    def _update(self, names: Iterable[str]) -> None:
        for name in names:
            self.optimizers[name].step()
            self.optimizers[name].zero_grad()


def build_group(plan: RunPlan, settings: BenchSettings) -> Group:
    """The adapters, which differ in their seeds, and their steps of --rows x --length made-up tokens each."""
    assert settings.adapters is not None
    device = default_device()
    chosen = choose_kernels(plan, device)
    stage = build_stage(plan, settings, chosen.kernels)
    adapters = {}
    for number in range(settings.adapters):
        config = replace(plan.adapter, seed=number)
        adapters[f"adapter {number}"] = TiedAdapter(AdapterPart.whole(config)).to(device)
        adapters[f"adapter {number}"].load_full(initial_values(config))
    dataset, pad_id = read_samples(plan, settings)
    loader = plan.training_loader(dataset, pad_id=pad_id)
    steps = {name: next(loader) for name in adapters}
    step, capacity = steps["adapter 0"], settings.shared_tokens or settings.adapters * settings.adapter_tokens
    rounds = shared_rounds(steps, capacity=capacity)
    return Group(
        stage,
        AdapterBank(adapters),
        {name: _optimizer(adapter) for name, adapter in adapters.items()},
        {name: [batch.model_input for batch in step.micro_batches] for name, step in steps.items()},
        [shared_input(parts) for parts in rounds],
        [_stacked([batch.model_input for _, batch in parts]) for parts in rounds],
        Weight(step.num_supervised, 1),
        device,
        chosen.description,
    )


def _optimizer(adapter: TiedAdapter) -> torch.optim.Optimizer:
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    return make_optimizer(trained, learning_rate=LEARNING_RATE, weight_decay=0.0)


def _stacked(batches: Sequence[StepInput]) -> StepInput:
    """The rows of several micro-batches, all of one length and not packed."""
    return StepInput(
        torch.cat([batch.tokens for batch in batches]),
        torch.cat([batch.positions for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
    )


def measure(settings: BenchSettings) -> dict[str, Any]:
    """The report of one process."""
    assert settings.adapters is not None
    plan = make_plan(settings)
    peaks = {name: in_own_process(name, _peak, plan, settings, name) for name in (IN_TURN, TOGETHER, ONE)}
    group = build_group(plan, settings)
    before = _load()
    timers = {name: _timer(step, group.device) for name, step in group.steps.items()}
    seconds = take_turns(timers, repeats=settings.repeats)
    middle = {name: median(taken) for name, taken in seconds.items()}
    return {
        **{name: getattr(settings, name) for name in ("model", "method", "targets", "rank", "recompute", "adapters")},
        "dtype": precision_in_words(settings.dtype, plan.settings.base, settings.products),
        "kernels": group.kernels,
        **describe_setup(group.device),
        "rows": settings.rows,
        "length": settings.length,
        "micro_batches": len(group.shared),
        "tokens": settings.adapters * settings.adapter_tokens,
        "load": [before, _load()],
        "ratio": middle[IN_TURN] / middle[TOGETHER],
        "of_one_adapter": middle[ONE] / middle[TOGETHER],
        "sides": {name: {"seconds": taken, "peak": peaks[name]} for name, taken in seconds.items()},
    }


def _timer(step: Callable[[], None], device: torch.device) -> Callable[[], float]:
    return lambda: timed(step, device)


def _peak(plan: RunPlan, settings: BenchSettings, name: str) -> int | None:
    """The peak bytes of a side's step. Call it in a fresh process."""
    group = build_group(plan, settings)
    return peak_of(group.steps[name], group.device)


def _load() -> float | None:
    """The machine's load average of the last minute, which a figure on a shared machine depends on."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def adapters_table(report: Mapping[str, Any]) -> list[str]:
    """The figures as lines."""
    adapter = f"{report['method']} r {report['rank']} of {', '.join(report['targets'])}"
    load = " to ".join("unknown" if value is None else f"{value:.1f}" for value in report["load"])
    lines = [
        f"{report['model']}, {report['adapters']} adapters, {adapter}, {report['dtype']} on {report['device']};"
        f" recompute {report['recompute']}; kernels {report['kernels']}",
        f"{setup_line(report)}, load {load}",
        f"{report['rows']} x {report['length']} tokens an adapter and step; together in {report['micro_batches']}"
        f" micro-batch{'es' if report['micro_batches'] > 1 else ''}",
        f"{'':<26}{SPEED_HEADER}{'peak MB':>9}",
    ]
    for name, side in report["sides"].items():
        peak = "" if side["peak"] is None else f"{side['peak'] / 1e6:.1f}"
        lines.append(f"{name:<26}{speed_columns(side['seconds'], report['tokens'])}{peak:>9}")
    lines.append(
        f"together against in turn {report['ratio']:.2f}, against one adapter with all tokens"
        f" {report['of_one_adapter']:.2f}"
    )
    return lines
