"""Steps of several adapters of one base: one after another, and together in shared micro-batches.

A third side takes one step of one adapter with as many tokens in as many micro-batches. No sharing can be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, initial_values
from megatron_tiedlora.benchmark.plan import LEARNING_RATE, read_samples
from megatron_tiedlora.benchmark.sides import build_stage, stage_losses, take_step
from megatron_tiedlora.benchmark.timing import default_device
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.data.shared import shared_input, shared_rounds
from megatron_tiedlora.engine.bank_runner import ShareLosses, Weight
from megatron_tiedlora.engine.runner import StepInput
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.training.compiling import choose_kernels
from megatron_tiedlora.training.optimizer import make_optimizer
from megatron_tiedlora.training.plan import RunPlan

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
    def steps(self) -> dict[str, Callable[[], object]]:
        """The sides, by name."""
        first, *_ = names = list(self.alone)
        return {
            IN_TURN: lambda: [self._step([name], batches) for name, batches in self.alone.items()],
            TOGETHER: lambda: self._step(names, self.shared),
            ONE: lambda: self._step([first], self.joined),
        }

    def _step(self, names: Sequence[str], batches: Sequence[StepInput]) -> None:
        """Take a step of these adapters on shared micro-batches, or of one adapter on its own."""
        shares = bool(batches[0].shares)
        self.stage.bank = self.bank if shares else None
        self.stage.adapter = None if shares else self.bank.adapters[names[0]]
        losses = ShareLosses(dict.fromkeys(names, self.weight))

        def loss(batch: StepInput) -> torch.Tensor:
            found = stage_losses(self.stage, batch, self.device)
            return losses.weighted(found, batch.shares) if shares else found / self.weight.denominator

        take_step(batches, loss, [self.optimizers[name] for name in names])


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
    return StepInput(*map(torch.cat, zip(*(batch[:3] for batch in batches), strict=True)))
