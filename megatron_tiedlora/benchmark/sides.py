"""Builds the sides of a step in one process: ours beside Hugging Face + PEFT LoRA, and several adapters of one base.

The adapters take their steps one after another, and together in shared micro-batches. A third side takes one step of
one adapter with as many tokens in as many micro-batches. No sharing can be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from megatron_tiedlora.adapters.adapter_bank import AdapterBank, Share
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterPart, TiedAdapter, initial_values
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.benchmark.plan import LEARNING_RATE, random_config, read_samples
from megatron_tiedlora.benchmark.timing import default_device, saved_by_autograd, storage_bytes
from megatron_tiedlora.checkpoint.base_weights import RandomWeights, load_base_weights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.convert.export_peft import target_modules
from megatron_tiedlora.data.loader import collate
from megatron_tiedlora.data.shared import shared_micro_batch, shared_rounds
from megatron_tiedlora.engine.runner import Divisors, Losses
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, WeightMaker, frozen_weights
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.training.compiling import ChosenKernels, choose_kernels
from megatron_tiedlora.training.optimizer import make_optimizer
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.throughput import training_flops

Batch = TypeVar("Batch")
OURS, PADDED, PACKED = "megatron_tiedlora", "PEFT LoRA", "PEFT LoRA, packed"
IN_TURN, TOGETHER, ONE = "in turn", "together", "one adapter, all tokens"


@dataclass
class Side:
    """One side with its model.

    Attributes:
        forward: the loss of a micro-batch, divided by the supervised tokens of the step.
        flops: the FLOPs of the step's samples on our side; None on others.
        kernels: how our kernels were made, in a few words; None on others.
    """

    model: torch.nn.Module
    batches: Sequence[MicroBatch]
    forward: Callable[[MicroBatch], torch.Tensor]
    device: torch.device
    flops: int | None = None
    kernels: str | None = None

    def __post_init__(self) -> None:
        self.num_tokens = sum(batch.num_tokens for batch in self.batches)
        self.num_supervised = sum(batch.num_supervised for batch in self.batches)
        self.num_positions = sum(batch.tokens.numel() for batch in self.batches)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def step(self) -> None:
        """Take a step of AdamW."""
        take_step(self.batches, self.forward, [self._optimizer])

    def saved_bytes(self) -> int:
        """The total bytes that autograd saves for a step's micro-batches, without parameters."""
        total = 0
        for batch in self.batches:
            with saved_by_autograd(self.model) as saved:
                self.forward(batch)
            total += storage_bytes(saved)
        return total


def take_step(
    batches: Iterable[Batch], loss_of: Callable[[Batch], torch.Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Run forward and backward over all micro-batches, then take the step of each optimizer."""
    for batch in batches:
        loss_of(batch).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def stage_losses(stage: Stage, batch: MicroBatch, device: torch.device) -> torch.Tensor:
    """The summed loss of a micro-batch; of a shared one that of each share, (shares,)."""
    supervised = batch.supervised().moved(lambda tensor: tensor.to(device))
    tokens, positions = batch.tokens.to(device), batch.positions.to(device)
    losses: torch.Tensor = stage(tokens, positions, supervised, documents=batch.documents, shares=batch.shares)
    return losses


def make_sides(
    plan: RunPlan, settings: BenchSettings, chosen: ChosenKernels | None = None
) -> dict[str, Callable[[], Side]]:
    """The functions that build the sides, by name. The first side is ours, and all have the same samples.

    Args:
        chosen: our kernels; None: they are chosen by --compile when the side is built.
    """
    sides: dict[str, Callable[[], Side]] = {OURS: partial(_ours, plan, settings, chosen)}
    if settings.against is not None:
        sides[PADDED] = partial(_peft, plan, settings, packed=False)
        if settings.task is not None:
            sides[PACKED] = partial(_peft, plan, settings, packed=True)
    return sides


def build_whole_stage(plan: RunPlan, settings: BenchSettings, kernels: Kernels) -> Stage:
    """The whole model on our side with the plan's adapter, in training mode."""
    device, source = default_device(), plan.source
    make_weight = plan.weight_maker(device)
    if source.folder is None:
        stage = random_stage(
            source.shape,
            plan.adapter,
            dtype=plan.dtype,
            make_weight=make_weight,
            device=device,
            kernels=kernels,
        )
    else:
        stage = load_model(source, None, dtype=plan.dtype, make_weight=make_weight, device=device, kernels=kernels)
        stage.hold(whole_adapter(plan.adapter, device))
    recompute(stage, settings.recompute)
    stage.train()
    return stage


def _ours(plan: RunPlan, settings: BenchSettings, chosen: ChosenKernels | None) -> Side:
    device = default_device()
    chosen = chosen or choose_kernels(plan, device)
    stage = build_whole_stage(plan, settings, chosen.kernels)
    dataset, pad_id = read_samples(plan, settings)
    step = next(plan.training_loader(dataset, pad_id=pad_id))

    def forward(batch: MicroBatch) -> torch.Tensor:
        return stage_losses(stage, batch, device) / step.num_supervised

    flops = training_flops(plan.source.shape, plan.adapter, step)
    return Side(stage, step.micro_batches, forward, device, flops, chosen.description)


def random_stage(
    shape: ModelShape,
    adapter: AdapterConfig,
    *,
    dtype: torch.dtype,
    make_weight: WeightMaker = FrozenWeight.empty,
    device: torch.device,
    kernels: Kernels = EAGER,
) -> Stage:
    """The whole model with random weights, which are drawn in place, and the adapter with its initial values."""
    with device:
        stage = Stage(layer_specs(shape, dtype=dtype, kernels=kernels, make_weight=make_weight), None)
    load_base_weights(RandomWeights(weight_rules(shape)), frozen_weights(stage))
    stage.hold(whole_adapter(adapter, device))
    return stage


def whole_adapter(config: AdapterConfig, device: torch.device) -> TiedAdapter:
    """An adapter of the whole model with its initial values."""
    adapter = TiedAdapter(AdapterPart.whole(config)).to(device)
    adapter.load_full(initial_values(config))
    return adapter


def recompute(stage: Stage, how: str) -> None:
    """Set what the stage recomputes from its next call on: `none`, `selective` or `full`."""
    stage.recompute = how
    for index in stage.blocks:
        block: Any = stage.layers[str(index)]
        block.recomputes_gate = how == "selective"


def _peft(plan: RunPlan, settings: BenchSettings, *, packed: bool) -> Side:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device, values = default_device(), random_config(settings)
    base: Any
    if values is not None:
        with device:  # no copy of another dtype or device, whose freed pages the step would use
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=plan.dtype)
    else:
        folder = plan.source.weights_folder()
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=plan.dtype, trust_remote_code=False)
    targets = target_modules(plan.source.shape.block, settings.targets)
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets)
    model: Any = get_peft_model(base.to(device), lora)
    model.train()
    dataset, pad_id = read_samples(plan, settings)
    step = next(plan.training_loader(dataset, pad_id=pad_id))
    batches = list(step.micro_batches)
    if settings.task is not None and not packed:
        size = settings.padded_rows  # the samples come in their order, as a trainer takes them that does not sort
        starts = range(0, len(dataset), size)
        batches = [collate(dataset, [[start + row] for row in range(size)], pad_id=pad_id) for start in starts]

    def forward(batch: MicroBatch) -> torch.Tensor:
        # transformers shifts the labels itself.
        labels = torch.full_like(batch.labels, -100)
        labels[:, 1:] = batch.labels[:, :-1]
        mask = torch.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None]
        if batch.documents is not None:
            ids, length = batch.documents, batch.documents.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            mask = (ids[:, None, :, None] == ids[:, None, None, :]) & causal
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.dtype == torch.bfloat16):
            loss: torch.Tensor = model(
                input_ids=batch.tokens.to(device),
                attention_mask=mask.to(device),
                position_ids=batch.positions.to(device),
                labels=labels.to(device),
                use_cache=False,
            ).loss
        return loss * (batch.num_supervised / step.num_supervised)

    return Side(model, batches, forward, device)


# Several adapters ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSteps:
    """Adapters of one base, ready for steps.

    Attributes:
        alone: the micro-batches of each adapter's step, by its name.
        shared: those of all of them, in shared ones.
        joined: the same rows as micro-batches of one adapter.
        divisors: of a loss.
        kernels: how they were made, in a few words.
    """

    stage: Stage
    optimizers: Mapping[str, torch.optim.Optimizer]
    alone: Mapping[str, Sequence[MicroBatch]]
    shared: Sequence[MicroBatch]
    joined: Sequence[MicroBatch]
    divisors: Divisors
    device: torch.device
    kernels: str

    @property
    def steps(self) -> dict[str, Callable[[], None]]:
        """The sides, by name."""
        first, *_ = names = list(self.alone)
        return {
            IN_TURN: self._in_turn,
            TOGETHER: lambda: self._step(names, self.shared),
            ONE: lambda: self._step([first], self.joined),
        }

    def _in_turn(self) -> None:
        for name, batches in self.alone.items():
            self._step([name], batches)

    def _step(self, names: Sequence[str], batches: Sequence[MicroBatch]) -> None:
        """Take a step of these adapters."""
        losses = Losses(dict.fromkeys(names, self.divisors))

        def loss(batch: MicroBatch) -> torch.Tensor:
            return losses.weighted(stage_losses(self.stage, batch, self.device), batch.shares)

        take_step(batches, loss, [self.optimizers[name] for name in names])


def build_adapter_steps(plan: RunPlan, settings: BenchSettings) -> AdapterSteps:
    """The adapters, which differ in their seeds, and their steps of --rows x --length made-up tokens each."""
    assert settings.adapters is not None
    device = default_device()
    chosen = choose_kernels(plan, device)
    stage = build_whole_stage(plan, settings, chosen.kernels)
    adapters = {}
    for number in range(settings.adapters):
        adapters[f"adapter {number}"] = whole_adapter(replace(plan.adapter, seed=number), device)
    stage.hold(AdapterBank(adapters))
    dataset, pad_id = read_samples(plan, settings)
    loader = plan.training_loader(dataset, pad_id=pad_id)
    steps = {name: next(loader) for name in adapters}
    step, capacity = steps["adapter 0"], settings.shared_tokens or settings.adapters * settings.adapter_tokens
    rounds = shared_rounds(steps, capacity=capacity)
    return AdapterSteps(
        stage,
        {name: _optimizer(adapter) for name, adapter in adapters.items()},
        {name: [shared_micro_batch([(name, batch)]) for batch in step.micro_batches] for name, step in steps.items()},
        [shared_micro_batch(parts) for parts in rounds],
        [_stacked("adapter 0", [batch for _, batch in parts]) for parts in rounds],
        (step.num_supervised,),
        device,
        chosen.description,
    )


def _optimizer(adapter: TiedAdapter) -> torch.optim.Optimizer:
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    return make_optimizer(trained, learning_rate=LEARNING_RATE, weight_decay=0.0)


def _stacked(name: str, batches: Sequence[MicroBatch]) -> MicroBatch:
    """The rows of several micro-batches, all of one length and not packed, as those of one adapter."""
    tokens = torch.cat([batch.tokens for batch in batches])
    return MicroBatch(
        tokens=tokens,
        positions=torch.cat([batch.positions for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        shares=(Share(name, *tokens.shape),),
        lengths=torch.cat([batch.lengths for batch in batches]),
        num_samples=sum(batch.num_samples for batch in batches),
    )
