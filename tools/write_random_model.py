"""Write a checkpoint of random bf16 weights in the shape of a preset, to test memory and speed without a model.

    python tools/write_random_model.py --model llama2-7b --output random-7b

Each layer is one shard and is written at once, so this needs the memory of one shard. There is no tokenizer: give one
with --tokenizer when you train the folder.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_tiedlora.base.atomic import new_folder, write_json
from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.output_folder import reject_existing, require_room
from megatron_tiedlora.checkpoint.base_weights import INDEX_FILE, draw_
from megatron_tiedlora.config.cli import CommandParser, path_value, run_command
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import num_base_parameters, weight_rules
from megatron_tiedlora.parallel.random_streams import stream_seed


def write_random_model(values: Mapping[str, Any], output: Path, *, name: str, seed: int) -> None:
    """Write config.json, shards and index of a model into `output`.

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
        for number, rules in enumerate(tqdm(parts, desc=name, unit="shard"), start=1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensors = {
                hf_name: draw_(
                    torch.empty(shape, dtype=torch.bfloat16),
                    name=hf_name,
                    full_shape=shape,
                    seed=stream_seed(seed, hf_name),
                )
                for rule in rules
                for hf_name, shape in zip(rule.hf_names, rule.hf_shapes(), strict=True)
            }
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(tensors, file))
        write_json(folder / "config.json", {**values, "architectures": [_class_name(values)], "dtype": "bfloat16"})
        weight_index = {"metadata": {"total_size": needed}, "weight_map": index}
        write_json(folder / INDEX_FILE, weight_index)


def _class_name(values: Mapping[str, Any]) -> str:
    """Of the model in transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]])


def main(argv: Sequence[str]) -> int:
    """Read the command line and write the folder."""
    parser = CommandParser(prog="write_random_model.py", description=(__doc__ or "").strip())
    parser.add_argument("--model", required=True, choices=sorted(PRESETS), help="the shape")
    parser.add_argument("--output", required=True, type=path_value, help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights [0]")
    arguments = parser.parse_known_names(argv)
    write_random_model(PRESETS[arguments.model], arguments.output, name=arguments.model, seed=arguments.seed)
    show(f"{arguments.output}: random weights in the shape of {arguments.model}")
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
