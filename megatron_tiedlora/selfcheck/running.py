"""Runs for several parts, made as in tiedlora bench, whose steps the caller chooses."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.base.wording import bytes_in_words
from megatron_tiedlora.benchmark.layout import Started, made_up, plan_benchmark, start
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.planning.memory import held_memory, step_memory
from megatron_tiedlora.planning.run_plan import RunPlan

MOST_LAYERS = 8  # of the runs of parts host and memory
# The config.json of a small LLaMA whose heads have sizes that kernels support.
SMALL: dict[str, Any] = {
    **PRESETS["llama2-7b"],
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of a model on the device: bf16 on a GPU, fp32 on a CPU, which may have no fast bf16."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def small_shape(**changes: int) -> ModelShape:
    """The shape of SMALL with changed fields."""
    return shape_from_hf({**SMALL, **changes}, source="small")


def write_small(folder: Path) -> str:
    """Write the config.json of SMALL for --random_weights; returns the folder as a value for --model."""
    (folder / "config.json").write_text(json.dumps(SMALL), encoding="utf-8")
    return str(folder)


def step_settings(model: str, *flags: str) -> BenchSettings:
    """The settings of bench_step.py, parsed as from its command line, for a step with an engine."""
    return parse_settings(["--what=layout", f"--model={model}", *flags], BenchSettings)


def planned_bytes(plan: RunPlan) -> float:
    """The bytes that the dry run plans for this rank's tensors: at most what torch's allocator holds."""
    tokens = plan.layout.rows * plan.layout.length
    step = step_memory(plan.stage, tokens=tokens, documents=1, longest=tokens)
    return held_memory(plan.stage).plus(step).total


def layers_that_fit(model: str, *flags: str, share: float = 0.85) -> int:
    """How many layers of a preset fit into `share` of the GPU's free memory, by the dry run's plan.

    Raises:
        UserError: not even one layer fits.
    """
    release()
    free = share * torch.cuda.mem_get_info()[0]
    for layers in range(PRESETS[model]["num_hidden_layers"], 0, -1):
        plan = plan_benchmark(step_settings(model, *flags, f"--num_layers={layers}"))
        if planned_bytes(plan) <= free:
            return layers
    raise UserError(f"--model {model}: not one layer fits into {bytes_in_words(free)}; give a smaller one")


@contextmanager
def started(settings: BenchSettings, **changes: Any) -> Iterator[Started]:
    """One rank's run inside the block; `changes` as in `plan_benchmark`. The next one frees its memory."""
    release()
    run = start(plan_benchmark(settings, **changes), settings)
    try:
        yield run
    finally:
        run.runner.engine.destroy()


def loader_of(run: Started, lengths: NDArray[np.int64]) -> Iterator[TrainingStep]:
    """A loader of the run's steps over random samples of these lengths."""
    return run.plan.training_loader(made_up(run.plan.source.shape.vocab_size, lengths), pad_id=0)


def release() -> None:
    """Free unreferenced memory and reset the peak statistics."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
