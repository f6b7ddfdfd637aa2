"""Writes checkpoints of random weights, to test memory and speed without a model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_tiedlora.base.atomic import new_folder, write_json
from megatron_tiedlora.base.output_folder import reject_existing, require_room
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_weights import draw_
from megatron_tiedlora.checkpoint.tensor_files import INDEX_FILE
from megatron_tiedlora.config.presets import TINY
from megatron_tiedlora.data.tokenizer import byte_tokenizer, save_tokenizer
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import num_base_parameters, stored_shapes, weight_rules
from megatron_tiedlora.parallel.shard_spec import stream_seed


def write_random_model(values: Mapping[str, Any], output: Path, *, name: str, seed: int) -> None:
    """Write config.json, shards and index of a model into `output`; for the preset `tiny` a tokenizer too.

    Args:
        values: the content of its config.json.
        name: its name in messages.

    Raises:
        UserError: `output` exists, or the disk has too little space.
    """
    reject_existing(output, flag=f"--output {output}")
    model_shape = shape_from_hf(values, source=name)
    needed = num_base_parameters(model_shape) * torch.bfloat16.itemsize
    existing = next(parent for parent in output.absolute().parents if parent.exists())
    require_room(existing, needed, output=output)
    index: dict[str, str] = {}
    with new_folder(output) as folder:
        parts = [list(rules) for _, rules in groupby(weight_rules(model_shape), key=lambda rule: rule.layer)]
        for number, rules in enumerate(progress_bar(name, "shard", parts), start=1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors = {
                hf_name: draw_(
                    torch.empty(shape, dtype=torch.bfloat16),
                    name=hf_name,
                    full_shape=shape,
                    seed=stream_seed(seed, hf_name),
                )
                for hf_name, shape in stored_shapes(rules).items()
            }
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(tensors, file))
        kinds = values.get("architectures") or [_class_name(values)]
        write_json(folder / "config.json", {**values, "architectures": kinds, "dtype": "bfloat16"})
        weight_index = {"metadata": {"total_size": needed}, "weight_map": index}
        write_json(folder / INDEX_FILE, weight_index)
        if name == TINY:
            save_tokenizer(byte_tokenizer(values["max_position_embeddings"]), folder)


def _class_name(values: Mapping[str, Any]) -> str:
    """The name of the model's class in transformers, which a machine without it may lack."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]])
