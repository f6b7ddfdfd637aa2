"""Native adapters with given values on a model folder, and checkpoints of them. Uses the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.files import FILES_FIELD, SEAL_FIELD, with_checksums
from megatron_tiedlora.checkpoint.base_identity import identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import Checkpoint, Progress, save_checkpoint
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from support.oracle import OracleAdapter, OracleConfig
from support.tiny_models import random_adapter

Inputs = tuple[ModelSource, NativeAdapter]  # what conversions take


def native_adapter(source: ModelSource, adapter: OracleAdapter) -> NativeAdapter:
    """`adapter`'s values as a native adapter of `source`."""
    config = make_adapter_config(
        adapter.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        layers=adapter.layers,
        targets=targets_of(source.shape, adapter.targets),
        seed=5,
    )
    with BaseWeights(source.weights_folder(), source.shape, source.stored) as weights:
        base = identify_base(source, weights, "fp32")
    return NativeAdapter(config, base, adapter.tensors)


def moments_of(native: NativeAdapter, value: float | None = None) -> dict[str, torch.Tensor]:
    """Moments of every trained factor by their names in the file: `value` everywhere, or the factor's |values|."""
    values = {
        name: native.state[name].abs() if value is None else torch.full(native.state[name].shape, value)
        for name in native.config.num_trained()
    }
    moments = ("exp_avg", "exp_avg_sq")
    return {f"{moment}.adapter.{name}": tensor.clone() for moment in moments for name, tensor in values.items()}


def reseal(folder: Path) -> None:
    """Give the JSON files of an adapter or a checkpoint the checksums of what is there now, as who has changed it on
    purpose would; those of older versions and broken ones stay."""
    for name in ("adapter_config.json", "trainer_state.json"):
        file = folder / name
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            content = json.loads(file.read_text())
            sums = content[FILES_FIELD]
            files = [folder / name for name in sums if (folder / name).is_file()]
            file.write_text(
                json.dumps(with_checksums({k: v for k, v in content.items() if k != SEAL_FIELD}, files=files))
            )


def write_native(folder: Path, model: Path, adapter: OracleAdapter) -> NativeAdapter:
    """Write `adapter` as a native adapter of the model folder `model` to `folder`."""
    native = native_adapter(find_model(str(model)), adapter)
    save_adapter(folder, native)
    return native


def with_adapter(
    base: Path, method: str, layers: tuple[int, ...] | None = None, **keywords: Any
) -> tuple[ModelSource, NativeAdapter, OracleAdapter]:
    """The model folder `base` with a random adapter of rank 4 and alpha 6, none of whose tensors is zero."""
    source = find_model(str(base))
    oracle = random_adapter(method, OracleConfig.from_folder(base), alpha=6, layers=layers, **keywords)
    return source, native_adapter(source, oracle), oracle


def write_exports(root: Path, base: Path) -> Path:
    """Write adapter/, merged/, merged16/ and peft/ of one adapter of the model folder `base` into `root`."""
    source, adapter, oracle = with_adapter(base, "tl6")
    native = root / "adapter"
    write_native(native, base, oracle)
    merge_adapter(source, adapter, root / "merged")
    merge_adapter(source, adapter, root / "merged16", dtype=torch.bfloat16)
    export_peft(source, load_native_adapter(native), root / "peft", native=native)
    return root


def save_step(root: Path, native: NativeAdapter, step: int, best: int | None, **keywords: Any) -> Path:
    """Save `native` as it is after `step` steps of four samples, of which `best` was the best; every moment is `step`.

    Args:
        keywords: of save_checkpoint.
    """
    settings = {"settings": {"global_batch_size": 4, "method": native.config.method, "layers": [1, 3]}}
    return save_checkpoint(
        root,
        progress=Progress(step=step, consumed_samples=4 * step, best_metric=0.5, best_step=best, evaluated_step=step),
        adapter=native,
        moments=moments_of(native, float(step)),
        **{**settings, **keywords},
    )


def checkpoint_of(settings: Mapping[str, Any], step: int) -> Checkpoint:
    """A checkpoint without files, for what is decided before any is read: of these settings after `step`, in step_4."""
    return cast(Checkpoint, SimpleNamespace(settings=settings, progress=Progress(step=step), folder=Path("step_4")))
