"""What every conversion starts from: a native adapter, the base it was trained on, and an output that is free."""

from __future__ import annotations

from pathlib import Path

from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import (
    CONFIG_FILE,
    MERGE_RECORD,
    BaseIdentity,
    NativeAdapter,
    identify_base,
    load_adapter,
)
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.config.paths import user_path
from megatron_tiedlora.model.families.llama import WeightRule, weight_rules


def open_inputs(adapter: str, model: str | None) -> tuple[ModelSource, NativeAdapter]:
    """The adapter in the folder `adapter` and its base: `model`, or the one that the adapter names.

    Raises:
        UserError: no adapter there, no such base, or another base than the adapter's.
    """
    folder = user_path(adapter)
    if not (folder / CONFIG_FILE).is_file() and (folder / "adapter" / CONFIG_FILE).is_file():
        raise UserError(f"--adapter {adapter}: this is a run folder; give {Path(adapter) / 'adapter'}")
    native = load_adapter(folder)
    try:
        source = find_model(model or native.base.name)
    except UserError as error:
        if model is not None:
            raise
        raise UserError(f"{folder}: its base is not to be had, give it with --model ({error})") from None
    check_base(source, native)
    return source, native


def check_base(source: ModelSource, adapter: NativeAdapter) -> BaseIdentity:
    """The identity of `source`, whose weights are the ones that `adapter` was trained on.

    Raises:
        UserError: they are not; or they are missing, or not whole.
    """
    with BaseWeights(source.weights_folder(), weight_rules(source.config)) as weights:
        found = identify_base(source, weights, adapter.base.dtype)
    merged = (source.weights_folder() / MERGE_RECORD).is_file()
    if merged and found.weights_hash != adapter.base.weights_hash:
        raise UserError(f"{source.name}: an adapter is merged into it already; give the plain base with --model")
    adapter.check_base(found, source="--adapter")
    return found


def refuse_existing(output: Path) -> None:
    """Raise UserError where `output` holds anything."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UserError(f"--output {output} exists; give a new folder")


def adapted_projections(source: ModelSource, adapter: NativeAdapter) -> dict[int, WeightRule]:
    """The fused QKV rule of every adapted layer, by 1-based layer."""
    rules = {rule.name: rule for rule in weight_rules(source.config)}
    return {layer: rules[f"layers.{layer}.attention.qkv.weight"] for layer in adapter.config.layers}
