"""Builds the sides of a step in one process: ours beside Hugging Face + PEFT LoRA, and several adapters of one base.

The adapters take their steps one after another, and together in shared micro-batches. A third side takes one step of
one adapter with as many tokens in as many micro-batches. No sharing can be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

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
from megatron_tiedlora.data.loader import collate, shared_micro_batch, shared_rounds
from megatron_tiedlora.engine.runner import Losses
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, WeightMaker, frozen_weights
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.passes import training_flops
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.training.compiling import ChosenKernels, choose_kernels

OURS, PADDED, PACKED = "megatron_tiedlora", "PEFT LoRA", "PEFT LoRA, packed"
IN_TURN, TOGETHER, ONE = "in turn", "together", "one adapter, all tokens"
# The micro-batches of a step, and the optimizers that take it.
StepParts = tuple[Sequence[MicroBatch], Sequence[torch.optim.Optimizer]]


@dataclass
class Side:
    """One side: a model, and the steps that it takes at each of its turns.

    Attributes:
        steps: one, or several that are taken one after another.
        forward: the loss of a micro-batch, divided by the supervised tokens of its step.
        flops: the FLOPs of the step's samples on our side; None on others.
        kernels: how our kernels were made, in a few words; None on others.
    """

    model: torch.nn.Module
    steps: Sequence[StepParts]
    forward: Callable[[MicroBatch], torch.Tensor]
    device: torch.device
    flops: int | None = None
    kernels: str | None = None

    def __post_init__(self) -> None:
        self.batches = [batch for batches, _ in self.steps for batch in batches]
        self.num_tokens = sum(batch.num_tokens for batch in self.batches)
        self.num_supervised = sum(batch.num_supervised for batch in self.batches)
        self.num_positions = sum(batch.tokens.numel() for batch in self.batches)

    def step(self) -> None:
        """Take a turn: run forward and backward over the micro-batches of a step, then AdamW."""
        for batches, optimizers in self.steps:
            for batch in batches:
                self.forward(batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def saved_bytes(self) -> int:
        """The total bytes that autograd saves for the micro-batches of a turn, without parameters."""
        total = 0
        for batch in self.batches:
            with saved_by_autograd(self.model) as saved:
                self.forward(batch)
            total += storage_bytes(saved)
        return total


def trained_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that AdamW steps."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained_parameters(module), lr=LEARNING_RATE)


def make_sides(
    plan: RunPlan, settings: BenchSettings, chosen: ChosenKernels | None = None
) -> dict[str, Callable[[], Side]]:
    """The functions that build the sides, by name. All have the same samples.

    Args:
        chosen: our kernels; None: they are chosen by --compile when a side is built.
    """
    ours = cache(partial(_our_sides, plan, settings, chosen))
    names = (OURS,) if settings.adapters is None else (IN_TURN, TOGETHER, ONE)
    sides: dict[str, Callable[[], Side]] = {name: partial(lambda name: ours()[name], name) for name in names}
    if settings.against is not None:
        sides[PADDED] = partial(_peft, plan, settings, packed=False)
        if settings.task is not None:
            sides[PACKED] = partial(_peft, plan, settings, packed=True)
    return sides


def _our_sides(plan: RunPlan, settings: BenchSettings, chosen: ChosenKernels | None) -> dict[str, Side]:
    """Our side with one adapter; or the sides of several adapters, which differ in their seeds and share a model."""
    device, source = default_device(), plan.source
    chosen = chosen or choose_kernels(plan, device)
    given: dict[str, Any] = {"dtype": plan.dtype, "make_weight": plan.weight_maker(device), "device": device}
    if source.folder is None:
        stage = random_stage(source.shape, plan.adapter, kernels=chosen.kernels, **given)
    else:
        stage = load_model(source, None, kernels=chosen.kernels, **given)
        stage.hold(whole_adapter(plan.adapter, device))
    recompute(stage, settings.recompute)
    stage.train()
    dataset, pad_id = read_samples(plan, settings)
    loader = plan.training_loader(dataset, pad_id=pad_id)
    first = next(loader)

    def forward(batch: MicroBatch) -> torch.Tensor:
        supervised = batch.supervised().moved(lambda tensor: tensor.to(device))
        tokens, positions = batch.tokens.to(device), batch.positions.to(device)
        losses: torch.Tensor = stage(tokens, positions, supervised, documents=batch.documents, shares=batch.shares)
        if settings.adapters is None:
            return losses / first.num_supervised
        divisors = {share.adapter: (first.num_supervised,) for share in batch.shares}  # every step has as many
        return Losses(divisors).weighted(losses, batch.shares)

    if settings.adapters is None:
        flops, steps = training_flops(source.shape, plan.adapter, first), [(first.micro_batches, [_optimizer(stage)])]
        return {OURS: Side(stage, steps, forward, device, flops, chosen.description)}
    configs = {f"adapter {number}": replace(plan.adapter, seed=number) for number in range(settings.adapters)}
    adapters = {name: whole_adapter(config, device) for name, config in configs.items()}
    stage.hold(AdapterBank(adapters))
    optimizers = {name: _optimizer(adapter) for name, adapter in adapters.items()}
    taken = {name: first if number == 0 else next(loader) for number, name in enumerate(adapters)}
    rounds = shared_rounds(taken, capacity=settings.shared_tokens or settings.adapters * settings.adapter_tokens)
    only, *_ = adapters
    by_side: dict[str, list[StepParts]] = {
        IN_TURN: [
            ([shared_micro_batch([(name, batch)]) for batch in step.micro_batches], [optimizers[name]])
            for name, step in taken.items()
        ],
        TOGETHER: [([shared_micro_batch(parts) for parts in rounds], list(optimizers.values()))],
        ONE: [([_stacked(only, [batch for _, batch in parts]) for parts in rounds], [optimizers[only]])],
    }
    return {side: Side(stage, steps, forward, device, None, chosen.description) for side, steps in by_side.items()}


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

    return Side(model, [(batches, [_optimizer(model)])], forward, device)
