"""What a value that was loaded has to be: one that a run, a merge or an evaluation can go on with.

The bounds are wide: they tell what cannot be from what is odd.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from fuzzing import printable
from support.native_files import moments_of

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter, lora_factors
from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.checkpoint.base_identity import SHAPE_FIELDS
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.resume import Checkpoint, Progress, save_checkpoint
from megatron_tiedlora.config.fields import CommandSettings
from megatron_tiedlora.runtime.run_folder import RunFolder

LARGEST_ALPHA = 1e6
LARGEST_WIDTH = 1e3  # of start values
# A run's metrics.jsonl
METRICS = (
    b'{"step": 1, "split": "train", "loss": 2.5, "learning_rate": 0.1, "mfu": 0.5, "padding": 0}\n'
    b'{"step": 2, "split": "validation", "loss": 2.25, "exact_match": 50.0}\n'
    b'{"step": 3, "split": "train", "loss": 2.0, "learning_rate": 0.1, "mfu": 0.5, "padding": 0}\n'
)
BATCH = 24  # samples a step of the runs that `write_run` writes


def check_adapter(adapter: NativeAdapter) -> None:
    """It can be used and saved again, its numbers are those of an adapter, and what it says can be printed."""
    config, base = adapter.config, adapter.base_identity
    tied_adapter = TiedAdapter(AdapterShard.whole(config))
    tied_adapter.load_full(adapter.state)
    assert set(adapter.state) == set(config.tensors)
    for name, tensor in adapter.state.items():
        assert tensor.dtype == torch.float32 and tensor.isfinite().all(), name
    sizes = [getattr(base, name) for name in SHAPE_FIELDS]
    assert all(type(number) is int and number > 0 for number in (*config.layers, *sizes))
    json.dumps([asdict(config), asdict(base)], allow_nan=False)
    for name, (_, factor) in config.tensors.items():
        if factor in "uv" and not METHODS[config.method].factor(factor).trained:
            assert adapter.state[name].eq(1).all(), f"{config.method} does not train {name}, which is not one"
    assert 0 < config.alpha <= LARGEST_ALPHA, f"alpha {config.alpha}"
    for width in (config.init_std_a, config.init_std_b):
        assert 0 <= width <= LARGEST_WIDTH, f"a width of start values of {width}"
    printable(base.base_model, base.base_hash, base.base_weights_hash)
    for layer in config.layers:
        for target in config.targets:
            a, b = lora_factors(config, adapter.state, target, layer)
            assert (b @ a).isfinite().all(), "an update that is not finite"


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Adapter, moments and counts are such as a run can have written."""
    check_adapter(checkpoint.adapter)
    progress = checkpoint.progress
    json.dumps(asdict(progress), allow_nan=False)
    assert (progress.best_step or 0) in range(progress.step + 1)
    assert (progress.evaluated_step or 0) in range(progress.step + 1)
    assert (progress.best_step is None) == (progress.best_metric is None), "a best step without its metric"
    assert 0 <= progress.evaluations_since_best <= progress.step - (progress.best_step or 0)
    batch = checkpoint.settings.get("global_batch_size", BATCH)
    assert progress.consumed_samples == progress.step * batch, f"{progress.consumed_samples} samples"
    for name, moment in checkpoint.moments.items():
        assert moment.dtype == torch.float32 and moment.isfinite().all(), name
        assert not name.startswith("exp_avg_sq.") or moment.min() >= 0, f"{name} is negative"


def write_run(path: Path, native: NativeAdapter) -> RunFolder:
    """A run with checkpoints of steps 2 (the best) and 4."""
    run = RunFolder(path)
    run.path.mkdir(parents=True)
    run.settings.write_text("seed: 1\n")
    run.metrics.write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    for step in (2, 4):
        state = {name: tensor * (1 if name in "uv" else step / 4) for name, tensor in native.state.items()}
        save_checkpoint(
            run.checkpoints,
            progress=Progress(step, BATCH * step, 0.5, 2, 1 if step == 4 else 0, step),
            adapter=replace(native, state=state),
            moments={name: tensor / step for name, tensor in moments_of(native).items()},
            keep=2,
            settings={"method": "tl6", "rank": 4, "layers": [1, 3], "global_batch_size": BATCH, "data_sha256": "0"},
        )
    return run


def check_settings(found: CommandSettings) -> None:
    """All can be written out, and numbers are numbers."""
    plain: dict[str, Any] = json.loads(json.dumps(found.model_dump(), allow_nan=False))
    for name, value in plain.items():
        kinds = type(found).model_fields[name].annotation
        assert not isinstance(value, bool) or kinds is bool, name
        assert not isinstance(value, str) or "\0" not in value, name
