"""Merged Hugging Face checkpoints: W' = W + (alpha / r) diag(v) B diag(u) A, added in fp32 and cast once.

Works file by file over the base's own safetensors shards, so its memory is one shard, whatever the model's size.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_tiedlora.adapters.tied_adapter import delta_weight
from megatron_tiedlora.checkpoint.atomic import new_folder, write_json
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, open_weights, weight_map
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, identify_base
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.data.tokenizer import save_tokenizer
from megatron_tiedlora.model.families.llama import WeightRule, weight_rules

MERGE_RECORD = "tiedlora_merge.json"
# What beside weights makes a Hugging Face model folder: config, generation config, tokenizer, chat template.
_COPIED = ("*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")


def adapted_projections(source: ModelSource, adapter: NativeAdapter) -> dict[int, WeightRule]:
    """The fused QKV rule of every adapted layer, by 1-based layer."""
    rules = {rule.name: rule for rule in weight_rules(source.config)}
    return {layer: rules[f"layers.{layer}.attention.qkv.weight"] for layer in adapter.config.layers}


def merge_adapter(
    source: ModelSource,
    adapter: NativeAdapter,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    progress: bool = False,
) -> None:
    """Write a merged Hugging Face checkpoint folder, whole or not at all.

    Args:
        dtype: of the written weights (default: as each is stored in the base).
        tokenizer: a transformers tokenizer to save there in place of the base's own.

    Raises:
        UserError: an adapter of another base, a base that holds a merge already, or an output that exists.
    """
    folder = source.weights_folder()
    refuse_existing(output)
    if (folder / MERGE_RECORD).exists():
        raise UserError(f"{folder}: an adapter is merged into this model already; give the plain base with --model")
    with BaseWeights(folder, weight_rules(source.config)) as weights:
        adapter.check_base(identify_base(source, weights, adapter.base.dtype), source="adapter")
    targets = {
        hf_name: (layer, slice(offset, offset + size))
        for layer, rule in adapted_projections(source, adapter).items()
        for hf_name, offset, size in zip(rule.hf_names, rule.spec.block_offsets(), rule.spec.blocks, strict=True)
    }
    files = weight_map(folder)
    with new_folder(output) as temporary:
        total = 0
        for file in tqdm(sorted(set(files.values())), desc="merge", unit="file", disable=not progress, leave=False):
            tensors = {}
            with open_weights(file) as reader:
                for name in reader.keys():
                    tensors[name] = _merged(reader.get_tensor(name), targets.get(name), adapter, dtype)
            total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            save_file(tensors, temporary / file.name, metadata={"format": "pt"})
        _copy_side_files(folder, temporary)
        if len(set(files.values())) > 1 or (folder / "model.safetensors.index.json").is_file():
            names = {name: file.name for name, file in files.items()}
            index = {"metadata": {"total_size": total}, "weight_map": names}
            write_json(temporary / "model.safetensors.index.json", index)
        if dtype is not None:
            _state_dtype(temporary / "config.json", dtype)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        record = {"method": adapter.config.method, "rank": adapter.config.rank, "base_model": adapter.base.name}
        write_json(temporary / MERGE_RECORD, record)


def refuse_existing(output: Path) -> None:
    """Raise UserError where `output` holds anything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists; give a new folder")


def _merged(
    weight: torch.Tensor,
    target: tuple[int, slice] | None,
    adapter: NativeAdapter,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    out_type = dtype if dtype is not None and weight.is_floating_point() else weight.dtype
    if target is None:
        return weight.to(out_type)
    layer, rows = target
    delta = delta_weight(adapter.config, adapter.state, layer)[rows]
    return (weight.float() + delta).to(out_type)


def _copy_side_files(folder: Path, target: Path) -> None:
    for pattern in _COPIED:
        for file in folder.glob(pattern):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)


def _state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    values = json.loads(config_file.read_text(encoding="utf-8"))
    values.pop("torch_dtype", None)  # the field's name before transformers 5
    values["dtype"] = str(dtype).removeprefix("torch.")
    write_json(config_file, values)
