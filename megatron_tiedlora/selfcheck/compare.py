"""Compares implementations in one process, in which they run their steps in turn. Memory is measured in a separate
process for each implementation.

A step of this package is compared with a step of Hugging Face + PEFT LoRA. --adapters compares three ways of training:
adapter after adapter, all adapters together in shared micro-batches, and one adapter with the same number of tokens and
micro-batches. Training one adapter shows the highest speed that joint training can reach. `measure_sides` makes the
report of --what step, scaling and decoding. `bench_report` converts the report to text.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, AdapterSegment
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterShard, TiedAdapter
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_weights import RandomWeights, load_base_weights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.settings import DEFAULT_TASK
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.convert.export_peft import target_modules
from megatron_tiedlora.data import encode, loader, splits, tokenizer
from megatron_tiedlora.engine.runner import Losses
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.model.batch import MicroBatch
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel import frozen_weight, groups
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.passes import step_flops
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.selfcheck import step_bench, timing
from megatron_tiedlora.training.throughput import ChosenKernels, choose_kernels, find_peak, timed

OURS, PADDED, PACKED = "megatron_tiedlora", "PEFT LoRA", "PEFT LoRA, packed"
IN_TURN, TOGETHER, ONE = "in turn", "together", "one adapter, all tokens"
# The micro-batches of a step, and the optimizers that update the parameters after it.
TimedStep = tuple[Sequence[MicroBatch], Sequence[torch.optim.Optimizer]]
TokenRows = list[list[int]]
# The setting of a step that each flag of --what scaling changes.
AXES = {"layers": "num_layers", "lengths": "length", "ranks": "rank", "shares": "supervised"}
_STEP = ("model", "method", "targets", "rank", "recompute")  # settings in the report of a step


@dataclass
class Side:
    """One of the compared implementations: a model, and its training steps, which it runs once in every timing round.

    Attributes:
        steps: the training steps of a round, in order.
        forward: returns the loss of a micro-batch, divided by the number of supervised tokens of its step.
        flops: the model FLOPs of the samples of a round; None if they are not computed.
        kernels: a short description of this package's kernels; None for other implementations.
    """

    model: torch.nn.Module
    steps: Sequence[TimedStep]
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
        """Run all steps of a round: forward and backward over the micro-batches of each step, then AdamW."""
        for batches, optimizers in self.steps:
            for batch in batches:
                self.forward(batch).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def saved_bytes(self) -> int:
        """Return the total bytes that autograd saves for the micro-batches of a round, without parameters."""
        total = 0
        for batch in self.batches:
            with timing.saved_by_autograd(self.model) as saved:
                self.forward(batch)
            total += timing.storage_bytes(saved)
        return total


def _optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=step_bench.LEARNING_RATE)


def make_sides(
    plan: RunPlan, settings: BenchSettings, chosen: ChosenKernels | None = None
) -> dict[str, Callable[[], Side]]:
    """Return functions that build the compared implementations, by name. All of them use the same samples.

    Args:
        chosen: this package's kernels; None to choose them by --compile when the model is built.
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
    """Return this package's implementations by name. Their adapters have different seeds and use the same model."""
    device, source = timing.default_device(), plan.source
    chosen = chosen or choose_kernels(plan, device)
    given: dict[str, Any] = {"dtype": plan.dtype, "device": device, "kernels": chosen.kernels}
    given["make_weight"] = plan.weight_maker(device, chosen.kernels)
    is_random = source.folder is None
    stage = random_stage(source.shape, plan.adapter, **given) if is_random else load_model(source, None, **given)
    names = [ONLY] if settings.adapters is None else [f"adapter {number}" for number in range(settings.adapters)]
    adapters = {name: whole_adapter(replace(plan.adapter, seed=seed), device) for seed, name in enumerate(names)}
    stage.hold(AdapterGroup(adapters), is_engines=settings.adapters is None)
    stage.set_recompute(settings.recompute)
    stage.train()
    dataset, pad_id = step_bench.read_samples(plan, settings)
    taken = dict(zip(names, plan.training_loader(dataset, pad_id=pad_id), strict=False))
    first, *_ = taken.values()

    def forward(batch: MicroBatch) -> torch.Tensor:
        supervised = batch.supervised().moved(lambda tensor: tensor.to(device))
        tokens, positions = batch.tokens.to(device), batch.positions.to(device)
        losses: torch.Tensor = stage(tokens, positions, supervised, documents=batch.documents, segments=batch.segments)
        divisors = {segment.adapter: (first.num_supervised,) for segment in batch.segments}  # the same in every step
        return Losses(divisors).weighted(losses, batch.segments)

    optimizers = {name: _optimizer(adapter) for name, adapter in adapters.items()}
    in_turn: list[TimedStep] = [
        ([loader.shared_micro_batch([(name, batch)]) for batch in step.micro_batches], [optimizers[name]])
        for name, step in taken.items()
    ]
    if settings.adapters is None:
        flops = step_flops(source.shape, plan.adapter, first.lengths, first.num_supervised).total()
        return {OURS: Side(stage, in_turn, forward, device, flops, chosen.description)}
    rounds = loader.shared_rounds(taken, capacity=settings.shared_tokens or settings.adapters * settings.adapter_tokens)
    only, *_ = adapters
    by_side: dict[str, list[TimedStep]] = {
        IN_TURN: in_turn,
        TOGETHER: [([loader.shared_micro_batch(parts) for parts in rounds], list(optimizers.values()))],
        ONE: [([_stacked(only, [batch for _, batch in parts]) for parts in rounds], [optimizers[only]])],
    }
    return {side: Side(stage, steps, forward, device, None, chosen.description) for side, steps in by_side.items()}


def _stacked(name: str, batches: Sequence[MicroBatch]) -> MicroBatch:
    """Return one micro-batch of the adapter `name` that has the rows of all `batches`. The rows are not packed."""
    arrays = ("tokens", "positions", "labels", "lengths")
    joined: dict[str, Any] = {array: torch.cat([getattr(batch, array) for batch in batches]) for array in arrays}
    segments = (AdapterSegment(name, *joined["tokens"].shape),)
    return MicroBatch(**joined, segments=segments, num_samples=sum(batch.num_samples for batch in batches))


def random_stage(
    shape: ModelShape,
    adapter: AdapterConfig,
    *,
    dtype: torch.dtype,
    make_weight: frozen_weight.WeightMaker = frozen_weight.FrozenWeight.empty,
    device: torch.device,
    kernels: Kernels = EAGER,
    tensor_parallel: groups.TensorParallel | None = None,
) -> Stage:
    """Return the complete model with random weights, or the first rank's shard of it, with an adapter that has its
    initial values."""
    tp_size = 1 if tensor_parallel is None else tensor_parallel.group.size
    with device:
        specs = layer_specs(shape, dtype=dtype, tp_size=tp_size, kernels=kernels, make_weight=make_weight)
        stage = Stage(specs, None, tensor_parallel=tensor_parallel)
    load_base_weights(RandomWeights(weight_rules(shape)), frozen_weight.frozen_weights(stage))
    stage.hold(whole_adapter(adapter, device, tp_size=tp_size))
    return stage


def whole_adapter(config: AdapterConfig, device: torch.device, *, tp_size: int = 1) -> TiedAdapter:
    """Return an adapter of all layers with its initial values, or the first rank's shard of it."""
    return TiedAdapter(AdapterShard(config, config.layers, 0, tp_size)).to(device).load_full()


def _peft(plan: RunPlan, settings: BenchSettings, *, packed: bool) -> Side:
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    device, values = timing.default_device(), step_bench.random_config(settings)
    base: Any
    if values is not None:
        with device:  # makes no copy in another dtype or on another device, whose freed pages a step would reuse
            base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=plan.dtype)
    else:
        kind: Any = getattr(transformers, plan.source.auto_class)
        base = kind.from_pretrained(plan.source.weights_folder(), dtype=plan.dtype, trust_remote_code=False)
    targets = target_modules(plan.source.shape.block, settings.targets)
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=targets)
    model: Any = get_peft_model(base.to(device), lora)
    model.train()
    dataset, pad_id = step_bench.read_samples(plan, settings)
    step = next(plan.training_loader(dataset, pad_id=pad_id))
    batches = list(step.micro_batches)
    if settings.task is not None and not packed:
        size = settings.padded_rows  # the samples keep their order, as in a trainer that does not sort them
        starts = range(0, len(dataset), size)
        batches = [loader.collate(dataset, [[start + row] for row in range(size)], pad_id=pad_id) for start in starts]

    def forward(batch: MicroBatch) -> torch.Tensor:
        # transformers shifts the labels itself.
        labels = torch.full_like(batch.labels, -100)
        labels[:, 1:] = batch.labels[:, :-1]
        # Without a mask, transformers finds the documents of packed rows by their positions.
        mask = torch.arange(batch.tokens.shape[1])[None] < batch.lengths[:, None] if batch.documents is None else None
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.dtype == torch.bfloat16):
            loss: torch.Tensor = model(
                input_ids=batch.tokens.to(device),
                attention_mask=None if mask is None else mask.to(device),
                position_ids=batch.positions.to(device),
                labels=labels.to(device),
                use_cache=False,
            ).loss
        return loss * (batch.num_supervised / step.num_supervised)

    return Side(model, [(batches, [_optimizer(model)])], forward, device)


# Measuring -----------------------------------------------------------------------------------------------------------


def measure_sides(settings: BenchSettings) -> dict[str, Any]:
    """Measure the compared implementations in one process, and return the report.

    Raises:
        UserError: a value is not valid. The message names its flag. Values are checked before anything is measured.
    """
    return {"step": _measure_step, "scaling": _measure_scaling, "decoding": _measure_decoding}[settings.what](settings)


def _seconds(
    steps: Mapping[str, Callable[[], object]], device: torch.device, settings: BenchSettings, *, uncounted: int = 1
) -> dict[str, list[float]]:
    """Measure the steps in turn, and return their seconds by name."""
    timers = {name: partial(timed, step, device) for name, step in steps.items()}
    return timing.take_turns(timers, repeats=settings.repeats, uncounted=uncounted)


def _measure_step(settings: BenchSettings) -> dict[str, Any]:
    plan = step_bench.plan_benchmark(settings)
    makers = make_sides(plan, settings)
    memory = {name: timing.in_own_process(name, _step_memory, plan, settings, name) for name in makers}
    sides = {name: make() for name, make in makers.items()}
    first, *_ = sides.values()
    before = os.getloadavg()[0]  # of the last minute; times on a shared machine depend on it
    seconds = _seconds({name: side.step for name, side in sides.items()}, first.device, settings)
    load = [before, os.getloadavg()[0]]
    figures = {name: {"seconds": seconds[name], **memory[name]} for name in sides}
    several = () if settings.adapters is None else ("adapters", "rows", "length")
    report = timing.about(settings, plan.settings.base, first.device, *_STEP, *several, kernels=first.kernels)
    if settings.adapters is not None:
        middle = {name: median(taken) for name, taken in seconds.items()}
        return {
            **report,
            "micro_batches": len(sides[TOGETHER].batches),
            "tokens": sides[TOGETHER].num_tokens,
            "load": load,
            "ratio": middle[IN_TURN] / middle[TOGETHER],
            "of_one_adapter": middle[ONE] / middle[TOGETHER],
            "sides": figures,
        }
    planned = step_bench.planned_saved_bytes(plan, first.batches)
    figures[OURS] |= {"saved_formula": planned, "saved_ratio": figures[OURS]["saved"] / planned}
    assert isinstance(first.model, Stage)
    rate = step_bench.base_matmul_rate(plan, first.model, first.batches, first.device)
    peak = find_peak(first.device, plan.dtype).flops_per_second if first.device.type == "cuda" else None
    for name, side in sides.items():
        figures[name] |= {
            "tokens": side.num_tokens,
            "supervised": side.num_supervised,
            "positions": side.num_positions,
            "model_flops": side.flops,
        }
        if peak is not None:
            mfu = None if side.flops is None else side.flops / median(seconds[name]) / peak
            figures[name] |= {"mfu": mfu, "kernel_seconds": timing.kernel_seconds(side.step)}
    return {**report, "matmul_flops_per_second": rate, "sides": figures}


def _step_memory(plan: RunPlan, settings: BenchSettings, name: str) -> dict[str, Any]:
    """Return the bytes that the first round adds to `peak` memory (None if unknown), and those that autograd `saved`.

    `saved` is missing with --adapters. Call this in a new process, as allocators other than glibc's may reuse memory.
    """
    side = make_sides(plan, settings)[name]()
    held = timing.restart_peak(side.device)
    side.step()
    most = timing.peak_bytes(side.device)
    peak = {"peak": None if held is None or most is None else most - held}
    return peak if settings.adapters is not None else {**peak, "saved": side.saved_bytes()}


# Values of a quantity ------------------------------------------------------------------------------------------------


def _measure_scaling(settings: BenchSettings) -> dict[str, Any]:
    device, plan = timing.default_device(), step_bench.plan_benchmark(settings.one_step())
    axes = {flag: [_one_step(settings, flag, value) for value in getattr(settings, flag)] for flag in AXES}
    chosen = choose_kernels(plan, device)

    def measured(flag: str) -> list[dict[str, Any]]:
        sides = [make_sides(plan, step, chosen)[OURS]() for plan, step in axes[flag]]
        seconds = _seconds({str(index): side.step for index, side in enumerate(sides)}, device, settings)
        return [
            {"value": value, "tokens": side.num_tokens, "seconds": taken}
            for value, side, taken in zip(getattr(settings, flag), sides, seconds.values(), strict=True)
        ]

    return {
        **timing.about(settings, plan.settings.base, device, "model", "method", "targets", kernels=chosen.description),
        "axes": {AXES[flag]: measured(flag) for flag, steps in axes.items() if steps},
    }


def _one_step(settings: BenchSettings, flag: str, value: Any) -> tuple[RunPlan, BenchSettings]:
    """Return the plan and the settings of a step with `value` for the setting that `flag` varies."""
    name = AXES[flag]
    try:
        step = settings.one_step(**{name: value})
        return step_bench.plan_benchmark(step), step
    except UserError as error:
        raise UserError(str(error).replace(f"--{name} ", f"--{flag} ", 1)) from None


# Decoding ------------------------------------------------------------------------------------------------------------


def _measure_decoding(settings: BenchSettings) -> dict[str, Any]:
    """Measure greedy decoding of this package and of transformers on the same prompts. End tokens are ignored."""
    import transformers

    source, dtype, device = find_model(settings.model), DTYPES[settings.dtype], timing.default_device()
    folder, new_tokens = source.weights_folder(), settings.new_tokens
    examples = splits.load_split(DEFAULT_TASK, "test", files={}, seed=0, limit=settings.batch_size)
    encoded, _ = encode.encode_prompts(
        tokenizer.load_tokenizer(folder), examples, max_length=source.shape.limit.tokens - new_tokens
    )
    prompts = [ids.tolist() for ids in encoded]
    given = [Prompts(prompts, [RowSettings((), new_tokens)] * len(prompts))]
    base_format = source.base_format(settings.base)
    stage = load_model(source, None, dtype=dtype, base_format=base_format, device=device)
    decoder = Decoder(stage, groups.ParallelGroups(), source.shape)
    theirs: Any = getattr(transformers, source.auto_class).from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    steps: dict[str, Callable[[], TokenRows]] = {
        "megatron_tiedlora": lambda: generate(decoder, given)[0],
        "transformers": partial(_generate_there, theirs.to(device).eval(), prompts, new_tokens),
    }
    rows = [decode() for decode in steps.values()]
    return {
        "model": source.name,
        **timing.about(settings, base_format, device),
        "batch_size": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": new_tokens,
        "equal_tokens": share_of_equal_tokens(*rows),
        "seconds": _seconds(steps, device, settings, uncounted=0),
    }


def _generate_there(model: Any, prompts: TokenRows, new_tokens: int) -> TokenRows:
    """Return the tokens that transformers generates for the prompts, which are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    rows: TokenRows = output[:, longest:].tolist()
    return rows


def share_of_equal_tokens(ours: TokenRows, theirs: TokenRows) -> float:
    """Return the fraction of new tokens before the first difference of each answer; in fp32, it is 1.0 without ties."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        equal += next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return equal / sum(map(len, ours))
