"""Rank 0 of a layout on a stand-in for the CUDA driver: what it launches, sends, waits for and holds, as JSON.

    $NULL_GPU/run python null_gpu_rank.py '{"measure": "steps", "model": "llama2-7b", "num_layers": 4}'

The stand-in's kernels do nothing, so numbers are garbage, and what checks them is switched off here. Its NCCL answers
whatever is asked, and peers are never there: gloo is replaced by torch's fake backend.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import nullgpu  # the stand-in's own module
import numpy as np
import torch
from null_gpu_attention import kernel_names
from torch import distributed
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - makes the backend known

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.model.batch import find_documents, whole_rows
from megatron_tiedlora.model.fused_attention import CANDIDATES
from megatron_tiedlora.runtime.launch_env import free_port, prepare_environment
from megatron_tiedlora.runtime.process_group import join_process_group, make_deterministic
from megatron_tiedlora.runtime.stopping import StopRequests

WARM_UP = 3  # steps


@dataclass(frozen=True)
class Order:
    """What to measure of which layout. Lengths: each step's samples have one, drawn evenly between the two."""

    measure: str = "steps"
    world_size: int = 1
    local_rank: int = 0
    model: str = "llama2-7b"
    num_layers: int | None = None
    method: str = "tl6"
    targets: str = "qkv"
    rank: int = 8
    tensor_parallel: int = 1
    sequence_parallel: bool = True
    overlap: str = "none"
    pipeline_parallel: int = 1
    recompute: str = "none"
    compile: str = "false"
    zero: str = "zero1.json"
    rows: int = 1
    lengths: tuple[int, int] = (2048, 2048)
    max_length: int = 4096
    packing: bool = False
    prompts: float = 0.5  # share of a sample's tokens that are not supervised
    micro_batches: int = 2
    steps: int = 3
    dtype: str = "bf16"
    deterministic: bool = False
    base: str | None = None
    products: str | None = None
    keep_transposed: bool = False
    adapter_in_matmul: bool = False


def main(order: Order) -> dict[str, Any]:
    """Join, build, take steps; returns the figures."""
    place = {"RANK": 0, "WORLD_SIZE": order.world_size, "LOCAL_RANK": order.local_rank, "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["TORCH_NCCL_RANKS_PER_ROOT"] = "1000000"  # rank 0 asks nobody for an id
    segments = hasattr(ctypes.CDLL("libcuda.so.1"), "cuMemCreate")
    if not segments:  # a stand-in without virtual memory
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
    if order.deterministic:
        make_deterministic()
    prepare_environment()
    _meet_nobody(order.world_size)
    nullgpu.reset()
    device = join_process_group(1, expected_ranks=order.world_size)
    if order.measure == "decode":
        return _decoding(order, device)
    if order.measure == "join":
        bound = distributed.distributed_c10d._get_default_group().bound_device_id
        return {"device": str(device), "bound": str(bound), **_counts()}
    if order.measure == "attention":
        return {candidate.name: kernel_names(candidate) for candidate in CANDIDATES}
    _believe_all_numbers()
    plan, built = _built(order, device)
    train_step = _train_step(plan, built.runner)
    take, steps = lambda step: train_step.run({ONLY: step}).only, _steps(order, plan)
    for _ in range(WARM_UP if order.measure != "compile" else 0):
        take(next(steps))
    start = _counts()  # communicators are made by the first messages
    if order.measure == "compile":
        return _compiling(order, take, steps)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    found = []
    largest, documents, longest = 0, 0, 0
    for _ in range(order.steps):
        step = next(steps)
        for batch in step.micro_batches:
            rows, length = batch.labels.shape
            within = find_documents([batch.documents], device) if order.packing else whole_rows(rows, length, device)
            largest, documents = max(largest, rows * length), max(documents, len(within.bounds) - 1)
            longest = max(longest, within.longest)
        nullgpu.reset()
        take(step)
        found.append(_counts())
    return {
        "start": start,
        "steps": found,
        "micro_batches": [list(batch.labels.shape) for batch in step.micro_batches],
        "held": held,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "segments": segments,
        "planned": _planned(plan, tokens=largest, documents=documents, longest=longest),
    }


def _built(order: Order, device: torch.device) -> Any:
    from megatron_tiedlora.planning.run_plan import plan_run
    from megatron_tiedlora.training.build import build_random_model
    from megatron_tiedlora.training.throughput import choose_kernels

    same = ("model", "method", "targets", "rank", "dtype", "deterministic", "base", "products", "keep_transposed")
    same += ("adapter_in_matmul",)
    same += ("compile", "recompute", "tensor_parallel", "pipeline_parallel", "packing", "max_length")
    same += ("sequence_parallel", "overlap")
    settings = make_settings(
        {
            **{name: getattr(order, name) for name in same},
            "task": "demo",
            "ds_config": order.zero,
            "micro_batch_size": order.rows,
            "global_batch_size": _global_batch(order),
            "max_steps": 1_000_000,
            "warmup_steps": 0,
            "replica_check_steps": 0,
        }
    )
    plan = plan_run(settings, rank=0, world_size=order.world_size, source=_source(order))
    chosen = choose_kernels(plan, device)
    assert order.compile == "false" or chosen.description.startswith("compiled"), chosen.description
    return plan, build_random_model({ONLY: plan}, device, kernels=chosen.kernels)


def _train_step(plan: Any, runner: Any) -> Any:
    from megatron_tiedlora.training.step import TrainStep

    return TrainStep({ONLY: plan}, runner, StopRequests())


def _decoding(order: Order, device: torch.device) -> dict[str, Any]:
    """The counts of two batches, each a list with those of as many tokens; all captures of each; what was logged."""
    from megatron_tiedlora.evaluation.decoder import Decoder
    from megatron_tiedlora.evaluation.generate import TOKENS_BETWEEN_AGREEMENTS, Prompts, RowSettings, generate

    _believe_all_numbers()
    plan, built = _built(order, device)
    built.runner.engine.module.eval()
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_tiedlora")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    together = order.zero == "zero3.json"
    decoder = Decoder(built.runner.stage, built.runner.groups, plan.source.shape, calls_together=together)
    prompts = Prompts([[5] * order.lengths[1]] * order.rows, [RowSettings((), order.steps)] * order.rows)
    found: list[list[dict[str, int]]] = []

    def agree(_: bool) -> bool:
        found[-1].append(_counts())
        nullgpu.reset()
        return False

    for _ in range(2):  # the second batch has the graphs of the first
        found.append([])
        generate(decoder, [prompts], agree=agree)
    every = 1 if together else TOKENS_BETWEEN_AGREEMENTS
    captures = [sum(counts.get("cudaStreamBeginCapture", 0) for counts in some) for some in found]
    return {"tokens": every, "batches": [some[1:] for some in found], "captures": captures, "told": told}


def _global_batch(order: Order) -> int:
    dp_size = order.world_size // (order.tensor_parallel * order.pipeline_parallel)
    samples_a_row = order.max_length // order.lengths[1] if order.packing else 1
    return dp_size * order.micro_batches * order.rows * samples_a_row


def _source(order: Order) -> Any:
    from megatron_tiedlora.checkpoint.sources import find_model

    assert order.model in PRESETS, f"{order.model} is no preset, and weights are drawn at random"
    source = find_model(order.model)
    if order.num_layers is None:
        return source
    return replace(source, shape=replace(source.shape, num_layers=order.num_layers))


def _steps(order: Order, plan: Any) -> Iterator[TrainingStep]:
    """Steps whose samples are all of one length, which is another one in each."""
    draw, count = np.random.default_rng(0), _global_batch(order)
    while True:
        length = int(draw.integers(order.lengths[0], order.lengths[1] + 1))
        samples = TokenDataset.after_prompts(
            tokens=draw.integers(3, plan.source.shape.vocab_size, count * length).astype(np.int32),
            offsets=np.arange(count + 1, dtype=np.int64) * length,
            prompt_lengths=np.full(count, int(length * order.prompts), np.int32),
        )
        yield next(plan.training_loader(samples, pad_id=0))


def _planned(plan: Any, **largest: int) -> float:
    from megatron_tiedlora.planning.memory import LargestMicroBatch, held_memory, step_memory

    return held_memory(plan.stages[0]).plus(step_memory(plan.stages[0], LargestMicroBatch(**largest))).total


def _compiling(order: Order, take: Any, steps: Iterator[TrainingStep]) -> dict[str, Any]:
    """Graphs that are compiled in steps of many lengths, after those of the warm-up."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    lengths = set()
    for _ in range(order.steps):
        step = next(steps)
        lengths |= {batch.labels.shape[1] for batch in step.micro_batches}
        take(step)
    return {"lengths": sorted(lengths), "graphs": before, "more": counters["stats"]["unique_graphs"] - before}


def _counts() -> dict[str, int]:
    return {name: number for name, number in nullgpu.report().items() if not name.startswith("ltlayout")}


def _meet_nobody(world_size: int) -> None:
    """Let rank 0 of any world begin alone: NCCL is the stand-in's, what goes over CPUs stays as it is."""
    if world_size == 1:
        return
    from megatron_tiedlora.runtime import process_group

    process_group.gather_on_rank_0 = lambda value, **_: [value]  # type: ignore[assignment]
    begin, new_group = distributed.init_process_group, distributed.new_group

    def faked(backend: str | None) -> str | None:
        return None if backend is None else backend.replace("gloo", "fake")

    def init_process_group(backend: str | None = None, **keywords: Any) -> None:
        keywords.pop("init_method", None)
        keywords.update(rank=0, world_size=world_size, store=distributed.HashStore())
        begin(faked(backend), **keywords)

    init_process_group.__signature__ = inspect.signature(begin)  # type: ignore[attr-defined]  # DeepSpeed looks
    distributed.init_process_group = init_process_group
    distributed.new_group = lambda *arguments, **keywords: new_group(
        *arguments, **{**keywords, "backend": faked(keywords.get("backend"))}
    )


def _believe_all_numbers() -> None:
    """No check of a value ends the run or leaves a step out: losses, norms and gradients are whatever was in memory."""
    from deepspeed.runtime.zero import stage_1_and_2

    from megatron_tiedlora.engine.optimizers import EngineOptimizer, Optimizers
    from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
    from megatron_tiedlora.training import step

    def store(self: QuantisedWeight, rows: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
        self.tensor.data[rows].copy_(codes)
        self.scale_bits.data[rows].copy_(scales.view(torch.int32))

    QuantisedWeight._store = store  # type: ignore[method-assign]
    stage_1_and_2.is_invalid_grad_norm = lambda _norm: False
    step.before_steps = lambda *_, **__: {}
    step.after_steps = lambda *_: {}
    # DeepSpeed's ZeRO-3 prints its parameters, whose garbage takes printing many gigabytes.
    torch.Tensor.__repr__ = lambda self, **_: str(tuple(self.shape))  # type: ignore[assignment, method-assign]
    for kind in (EngineOptimizer, Optimizers):
        kind.take = _finite(kind.take)  # type: ignore[method-assign]
    step.math = SimpleNamespace(**{**vars(math), "isfinite": lambda _: True})  # type: ignore[attr-defined]


def _finite(take: Any) -> Any:
    def taken(*arguments: Any) -> float:
        take(*arguments)
        return 1.0

    return taken


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    assert wanted.keys() <= {field.name for field in fields(Order)}, wanted
    if "lengths" in wanted:
        wanted["lengths"] = tuple(wanted["lengths"])
    print(json.dumps(main(Order(**wanted))), flush=True)
    os._exit(0)  # nobody is there to leave a group with
