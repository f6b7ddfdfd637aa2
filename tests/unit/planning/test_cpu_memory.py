"""The planned activations of a rank on a CPU against what torch allocates in a step, by its profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_tiny_model
from torch.profiler import ProfilerActivity, profile

from megatron_tiedlora.benchmark.compare import OURS, make_sides
from megatron_tiedlora.benchmark.layout import plan_benchmark
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.planning.memory import LargestMicroBatch, step_memory
from megatron_tiedlora.training.compiling import ChosenKernels


def most_allocated(profiled: Any) -> int:
    """The most bytes that a profiled block held at once, of those that it allocated."""
    records = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    held = most = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    assert abs(held) < 1e5, "a step frees what it has allocated"
    return most


@pytest.mark.parametrize(
    "flags",
    [
        {"vocab_size": 320, "length": 128},  # the gradients of an MLP
        {"vocab_size": 320, "length": 512, "recompute": "selective"},
        {"vocab_size": 320, "length": 512, "recompute": "full", "dtype": "fp32"},
        {"vocab_size": 320, "length": 512, "intermediate_size": 64},  # tiles of attention
        {"vocab_size": 16384, "length": 128},  # logits
    ],
    ids=lambda flags: " ".join(f"{name} {value}" for name, value in flags.items()),
)
def test_a_step_allocates_what_is_planned(flags: dict[str, Any], tmp_path: Path) -> None:
    changes = dict(flags)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 4, "max_positions": 512}
    sizes |= {name: changes.pop(name) for name in ("vocab_size", "intermediate_size") if name in changes}
    model = write_tiny_model(tmp_path / "model", tokenizer=False, **sizes)
    values = {"model": str(model), "random_weights": True, "rows": 8, "supervised": 1.0, "compile": "false", **changes}
    settings = validate_settings(values, BenchSettings)
    plan = plan_benchmark(settings)
    side = make_sides(plan, settings, ChosenKernels(EAGER, "not compiled"))[OURS]()
    side.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        side.step()
    planned = step_memory(plan.stage, LargestMicroBatch(8 * settings.length, 8, settings.length)).activations
    # Masks, labels and copies of a tile are not planned.
    assert planned == pytest.approx(most_allocated(profiled), rel=0.04)
