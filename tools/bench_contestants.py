"""The sides of tools/bench_step.py: this package's step, and Hugging Face + PEFT LoRA on q, k and v."""

from __future__ import annotations

import ctypes
import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterPart,
    TiedAdapter,
    make_adapter_config,
    start_values,
)
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_weights import draw_base_weights
from megatron_tiedlora.checkpoint.load_model import DTYPES, load_model
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.data.encode import TokenDataset, encode_dataset
from megatron_tiedlora.data.loader import BatchShape, MicroBatch, collate, plan_global_batch
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tokenizer import load_tokenizer, padding_id
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.hf_config import read_hf_config
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.supervised import find_supervised
from megatron_tiedlora.model.weights import stage_weight_rules
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.flops import sample_flops
from megatron_tiedlora.training.compiling import ChosenKernels, after_compiling, compiled_kernels
from megatron_tiedlora.training.throughput import peak_memory_bytes, product_rate, resident_bytes

OURS, PADDED, PACKED = "megatron_tiedlora", "PEFT LoRA", "PEFT LoRA, packed"
LEARNING_RATE = 1e-4


@dataclass
class Side:
    """One side with its model in place.

    Attributes:
        forwards: of each micro-batch, what gives its loss, divided by the supervised tokens of the step.
        batches: the step's micro-batches.
        flops: what the step's samples take, where it is this package's; None elsewhere.
        kernels: how this package's came to be, in a few words; None elsewhere.
    """

    model: torch.nn.Module
    forwards: Sequence[Callable[[], torch.Tensor]]
    batches: Sequence[MicroBatch]
    device: torch.device
    num_tokens: int
    num_supervised: int
    num_positions: int
    flops: int | None
    kernels: str | None

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=LEARNING_RATE)

    def step(self) -> None:
        """Forward and backward over all micro-batches, and the optimizer's step."""
        for forward in self.forwards:
            forward().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def contestants(options: Namespace, chosen: ChosenKernels | None = None) -> dict[str, Callable[[], Side]]:
    """By name, what makes each side; the first is ours. Both see the same samples.

    Args:
        chosen: our kernels; None: `our_kernels` when the side is made.
    """
    sides: dict[str, Callable[[], Side]] = {OURS: lambda: _ours(options, chosen or our_kernels(options))}
    if options.against == "peft":
        sides[PADDED] = lambda: _theirs(options, packed=False)
        if options.task is not None:
            sides[PACKED] = lambda: _theirs(options, packed=True)
    return sides


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_samples(options: Namespace, vocab_size: int, *, num_rows: int) -> tuple[TokenDataset, int]:
    """What a step is made of, and the token that pads it: the task's first samples, or `num_rows` made-up ones.

    Raises:
        UserError: data that cannot be read, or too little of it.
    """
    if options.task is None:
        return _made_up(options, vocab_size, num_rows), 0
    source = find_model(options.model)
    tokenizer = load_tokenizer(source.weights_folder())
    files = {"train": options.train_file}
    examples = load_split(options.task, "train", files=files, seed=0, tokenizer=tokenizer, limit=options.samples)
    if len(examples) < options.samples:
        raise UserError(f"--samples {options.samples}: the training part has {len(examples)} rows")
    return encode_dataset(examples, tokenizer, max_length=options.length), padding_id(tokenizer)


def _batches(options: Namespace, vocab_size: int, *, packed: bool) -> list[MicroBatch]:
    dataset, pad = read_samples(options, vocab_size, num_rows=options.rows)
    if options.task is None:
        return [collate(dataset, [[index] for index in range(options.rows)], pad_id=pad)]
    if packed:
        shape = BatchShape(len(dataset), options.rows, 1, options.length)
        plan = plan_global_batch(dataset, shape, seed=0, consumed_samples=0)
        return [collate(dataset, some, pad_id=pad, packed=True) for some in plan.micro_batches]
    order = np.arange(len(dataset)).tolist()  # as they come, as a trainer without sorting takes them
    size = options.padded_rows
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [collate(dataset, [[index] for index in part], pad_id=pad) for part in parts]


def _made_up(options: Namespace, vocab_size: int, num_rows: int) -> TokenDataset:
    """Random tokens, the last `labels` of each of a row's documents with a label."""
    draw = np.random.default_rng(0)
    num_samples, length = num_rows * options.documents, options.length // options.documents
    return TokenDataset(
        tokens=draw.integers(3, vocab_size, num_samples * length).astype(np.int32),
        offsets=np.arange(num_samples + 1, dtype=np.int64) * length,
        prompt_lengths=np.full(num_samples, length - options.labels, np.int32),
        truncated_prompts=0,
    )


def _ours(options: Namespace, chosen: ChosenKernels) -> Side:
    dtype, device, source = DTYPES[options.dtype], _device(), find_source(options)
    shape = source.shape
    adapter = make_adapter_config(
        options.method,
        rank=options.rank,
        layers=tuple(range(1, shape.num_layers + 1)),
        hidden_size=shape.hidden_size,
        qkv_rows=shape.heads.rows,
        seed=0,
    )
    if source.folder is None:
        stage = random_stage(shape, adapter, dtype=dtype, device=device, kernels=chosen.kernels)
    else:
        stage = load_model(source, None, dtype=dtype, device=device, kernels=chosen.kernels)
        give_adapter(stage, adapter, device)
    recompute(stage, options.recompute)
    stage.train()
    batches = _batches(options, shape.vocab_size, packed=options.task is not None)
    supervised = sum(batch.num_supervised for batch in batches)
    flops = sample_flops(
        shape,
        adapter,
        num_tokens=sum(batch.num_tokens for batch in batches),
        squared_lengths=sum(batch.squared_lengths for batch in batches),
        num_supervised=supervised,
    )

    def forward(batch: MicroBatch) -> torch.Tensor:
        found = find_supervised(batch.labels)
        on_device = type(found)(*(tensor.to(device) for tensor in found))
        tokens, positions = batch.input_ids.to(device), batch.position_ids.to(device)
        loss: torch.Tensor = stage(tokens, positions, on_device, documents=batch.documents)
        return loss / supervised

    return _side(stage, batches, forward, device, flops, chosen.description)


def random_stage(
    shape: ModelShape, adapter: AdapterConfig, *, dtype: torch.dtype, device: torch.device, kernels: Kernels = EAGER
) -> Stage:
    """The whole model with random weights, drawn in place, and the adapter at its start."""
    with device:
        stage = Stage(layer_specs(shape, dtype=dtype, kernels=kernels), None)
    rules = stage_weight_rules(shape, has_embedding=True)
    draw_base_weights(frozen_weights(stage), rules)
    give_adapter(stage, adapter, device)
    return stage


def give_adapter(stage: Stage, adapter: AdapterConfig, device: torch.device) -> None:
    """Put an adapter at its start beside the whole model."""
    stage.adapter = TiedAdapter(AdapterPart.whole(adapter)).to(device)
    stage.adapter.load_full(start_values(adapter))


def recompute(stage: Stage, how: str) -> None:
    """Let the stage recompute `none`, `selective` or `full` from its next call on."""
    stage.recompute = how
    for index in stage.blocks:
        block: Any = stage.layers[str(index)]
        block.recomputes_gate = how == "selective"


def our_kernels(options: Namespace) -> ChosenKernels:
    """Our kernels as --compile asks for them. Raises UserError where they must be compiled and cannot be."""
    if options.compile == "false":
        return ChosenKernels(EAGER, "not compiled")
    started, kernels, failure = time.monotonic(), EAGER, None
    try:
        kernels = compiled_kernels(find_source(options).shape, dtype=DTYPES[options.dtype], device=_device())
    except UserError as error:
        failure = str(error)
    return after_compiling(options.compile, kernels, failure, seconds=time.monotonic() - started)


def _theirs(options: Namespace, *, packed: bool) -> Side:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    dtype, device = DTYPES[options.dtype], _device()
    base: Any
    shape = random_shape(options)
    if shape is not None:
        values = {name: value for name, value in shape.items() if name != "model_type"}
        with device:  # no copy of another dtype or place, whose freed pages the step would use
            base = AutoModelForCausalLM.from_config(LlamaConfig(**values), dtype=dtype)
    else:
        folder: Path = find_model(options.model).weights_folder()
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    targets = ["q_proj", "k_proj", "v_proj"]
    lora = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets)
    model: Any = get_peft_model(base.to(device), lora)
    model.train()
    batches = _batches(options, base.config.vocab_size, packed=packed)
    supervised = sum(batch.num_supervised for batch in batches)

    def forward(batch: MicroBatch) -> torch.Tensor:
        # transformers shifts the labels itself.
        labels = torch.full_like(batch.labels, -100)
        labels[:, 1:] = batch.labels[:, :-1]
        places = torch.arange(batch.input_ids.shape[1])[None]
        mask = places < batch.lengths[:, None]
        if batch.documents is not None:
            ids, length = batch.documents, batch.documents.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            mask = (ids[:, None, :, None] == ids[:, None, None, :]) & causal
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss: torch.Tensor = model(
                input_ids=batch.input_ids.to(device),
                attention_mask=mask.to(device),
                position_ids=batch.position_ids.to(device),
                labels=labels.to(device),
                use_cache=False,
            ).loss
        return loss * (batch.num_supervised / supervised)

    return _side(model, batches, forward, device, flops=None, kernels=None)


def _side(
    model: torch.nn.Module,
    batches: Sequence[MicroBatch],
    forward: Callable[[MicroBatch], torch.Tensor],
    device: torch.device,
    flops: int | None,
    kernels: str | None,
) -> Side:
    return Side(
        model,
        [lambda batch=batch: forward(batch) for batch in batches],  # type: ignore[misc]
        batches,
        device,
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_supervised=sum(batch.num_supervised for batch in batches),
        num_positions=sum(batch.input_ids.numel() for batch in batches),
        flops=flops,
        kernels=kernels,
    )


def find_source(options: Namespace) -> ModelSource:
    """The model of all sides; its folder is None where weights are random."""
    shape = random_shape(options)
    if shape is None:
        return find_model(options.model)
    return ModelSource(options.model, None, shape_from_hf(shape, source=options.model))


def check_positions(length: int, most: int, *, model: str, flag: str = "length") -> None:
    """Raise UserError for rows that are longer than the model's `most` positions."""
    if length > most:
        raise UserError(f"--{flag} {length}: {model} was trained for {most} positions; give at most that")


def random_shape(options: Namespace) -> dict[str, Any] | None:
    """The fields of config.json of a model whose weights are random; None where they are read."""
    if options.model in PRESETS:
        values = dict(PRESETS[options.model])
    elif options.random_weights:
        folder = find_model(options.model, weights=False).folder
        assert folder is not None, "no preset"
        values = read_hf_config(folder)
    else:
        return None
    return values if options.num_layers is None else {**values, "num_hidden_layers": options.num_layers}


def matmul_peak(
    shape: tuple[int, int], batches: Sequence[MicroBatch], dtype: torch.dtype, device: torch.device
) -> float:
    """FLOP/s of a bare product of a micro-batch's tokens with a matrix of `shape`, the best of several."""
    rows = max(1024, sum(batch.input_ids.numel() for batch in batches) // len(batches))
    columns, inner = shape
    return product_rate(rows, inner, columns, dtype=dtype, device=device, repeats=10)


def largest_frozen(side: Side) -> tuple[int, int]:
    """The shape of a side's largest frozen matrix."""
    weight = max((p for p in side.model.parameters() if p.ndim == 2 and not p.requires_grad), key=lambda p: p.numel())
    rows, columns = weight.shape
    return rows, columns


@contextmanager
def saved_by_autograd(model: torch.nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """By storage, what autograd keeps of what is computed inside the block, without the model's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def storage_bytes(saved: dict[int, torch.Tensor]) -> int:
    """Of all storages together."""
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def saved_bytes(side: Side) -> int:
    """Bytes that autograd keeps of a step's micro-batches together, by storage and without parameters."""
    total = 0
    for forward in side.forwards:
        with saved_by_autograd(side.model) as saved:
            forward()
        total += storage_bytes(saved)
    return total


def return_free_pages() -> None:
    """Give what is free but still resident back to the system, which else a step uses without a rise of the peak.

    By glibc's malloc; another allocator, which a report's header names, keeps by its own rules.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def restart_peak(device: torch.device) -> int | None:
    """Let `peak_memory_bytes` start again; returns what is held now, or None where that is not known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    return_free_pages()
    before = resident_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return None
    return before


def peak_bytes(side: Side) -> int | None:
    """The most that a first step holds over what is there before it (CUDA: allocated; CPU: resident), where known.

    For a fresh process: what an allocator other than glibc's has kept of earlier steps would not be seen.
    """
    before = restart_peak(side.device)
    side.step()
    most = peak_memory_bytes(side.device)
    return None if before is None or most is None else most - before
