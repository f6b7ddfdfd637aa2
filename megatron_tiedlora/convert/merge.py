"""Merged Hugging Face checkpoints: W' = W + (alpha / r) diag(v) B diag(u) A, added in fp32 and cast once.

Works file by file over the base's own safetensors shards, so its memory is one shard, whatever the model's size.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_tiedlora.adapters.methods import FACTORS
from megatron_tiedlora.adapters.tied_adapter import lora_factors
from megatron_tiedlora.checkpoint.atomic import new_folder, write_json
from megatron_tiedlora.checkpoint.base_weights import open_weights, weight_map
from megatron_tiedlora.checkpoint.native_adapter import MERGE_RECORD, BaseIdentity, NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.json_files import read_json_object
from megatron_tiedlora.convert.inputs import adapted_projections, check_base, refuse_existing
from megatron_tiedlora.data.tokenizer import load_tokenizer, save_tokenizer
from megatron_tiedlora.model.families.llama import weight_rules

INDEX_FILE = "model.safetensors.index.json"
# What travels from the base beside its weights; anything else there is not the model's.
_MODEL_FILES = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
)


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

    It holds the tensors of the name table and no others, in the base's own files: a copy of a tied head is left out.

    Args:
        dtype: of the written weights (default: as each is stored in the base).
        tokenizer: a transformers tokenizer to save there in place of the base's own.

    Raises:
        UserError: an adapter of another base, a base that holds a merge already, an output that exists, or a tokenizer
            that cannot be read.
    """
    folder = source.weights_folder()
    refuse_existing(output)
    base = check_base(source, adapter)
    own_files = [] if tokenizer is not None else _matching(folder, _TOKENIZER_FILES)
    if own_files:
        # Written anew over its copy: transformers rebuilds some tokenizers from their class names and loses parts.
        tokenizer = load_tokenizer(folder)
    wanted = {name for rule in weight_rules(source.config) for name in rule.hf_names}
    files = {name: file for name, file in weight_map(folder).items() if name in wanted}
    updates = _updates(source, adapter)
    with new_folder(output) as temporary:
        total_size = 0
        with tqdm(total=len(files), desc="merge", unit="tensor", disable=not progress, leave=False) as bar:
            for file in sorted(set(files.values())):
                tensors = {}
                with open_weights(file) as reader:
                    for name in (name for name, holder in files.items() if holder == file):
                        tensors[name] = _merged(reader.get_tensor(name), updates.get(name), dtype)
                        bar.update()
                total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                save_file(tensors, temporary / file.name, metadata={"format": "pt"})
        if (folder / INDEX_FILE).is_file():
            names = {name: file.name for name, file in files.items()}
            write_json(temporary / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": names})
        for file in (*_matching(folder, _MODEL_FILES), *own_files):
            shutil.copyfile(file, temporary / file.name)
        if dtype is not None:
            _state_dtype(temporary / "config.json", dtype)
        if tokenizer is not None:
            save_tokenizer(tokenizer, temporary)
        write_json(temporary / MERGE_RECORD, _record(adapter, base))


def _updates(source: ModelSource, adapter: NativeAdapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The fp32 factors A' (r, d) and B' (rows, r) of every adapted projection, by its Hugging Face name."""
    factors = {}
    for layer, rule in adapted_projections(source, adapter).items():
        a, b = lora_factors(adapter.config, adapter.state, layer)
        for name, rows in zip(rule.hf_names, b.split(rule.spec.blocks), strict=True):
            factors[name] = (a, rows)
    return factors


def _merged(
    weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype | None
) -> torch.Tensor:
    out_type = weight.dtype if dtype is None else dtype
    if factors is None:
        return weight.to(out_type)
    a, b = factors
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + b @ a).to(out_type)


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    values = read_json_object(config_file, kind="a model's config")
    # transformers 4 writes torch_dtype and 5 writes dtype; both read torch_dtype.
    for name in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
        values[name] = str(dtype).removeprefix("torch.")
    write_json(config_file, values)


def _record(adapter: NativeAdapter, base: BaseIdentity) -> Mapping[str, Any]:
    """What tells a merged folder from its base and from other merges; see `identify_base`."""
    digest = hashlib.sha256()
    for name in FACTORS:
        digest.update(adapter.state[name].contiguous().numpy().tobytes())
    return {
        "method": adapter.config.method,
        "rank": adapter.config.rank,
        "alpha": adapter.config.alpha,
        "layers": list(adapter.config.layers),
        "base_model": adapter.base.name,
        "base_hash": base.config_hash,
        "base_weights_hash": base.weights_hash,
        "adapter_sha256": digest.hexdigest(),
    }
