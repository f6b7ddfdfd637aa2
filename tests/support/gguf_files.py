"""Writes a Hugging Face model folder as a GGUF file without a vocabulary, by the names that the gguf package knows.

Where llama.cpp rotates neighbouring elements of a head, as it does for Llama, the rows of q and k are in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch
from oracle_rope import rope_amplitude, rope_frequencies
from safetensors.torch import load_file

# Model types that llama.cpp rotates so.
NEIGHBOURS = ("llama", "mistral", "smollm3")


def write_gguf(folder: Path, file: Path) -> Path:
    """Write the model in `folder`, whose weights are in one file, to `file` in fp32, and return that."""
    config = json.loads((folder / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    architecture = "llama" if config["model_type"] == "mistral" else config["model_type"]
    writer = gguf.GGUFWriter(file, architecture)
    _add_sizes(writer, config, heads=heads, head_dim=head_dim)
    _add_rope(writer, config, head_dim)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if config["model_type"] in NEIGHBOURS and ("q_proj" in name or "k_proj" in name):
            tensor = _neighbours(tensor, head_dim)
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"GGUF has no name for {name}"
        writer.add_tensor(stored, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_sizes(writer: gguf.GGUFWriter, config: dict[str, Any], *, heads: int, head_dim: int) -> None:
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config["model_type"] == "stablelm":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_parallel_residual(config["use_parallel_residual"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    rope = config["rope_parameters"]
    kind, theta = rope["rope_type"], rope["rope_theta"]
    size = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(theta)
    if kind == "longrope":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rope_amplitude(rope, config["max_position_embeddings"]))
        for which in ("long", "short"):
            factors = torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors.numpy())
    elif kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3":
        divisors = rope_frequencies(theta, size, None) / rope_frequencies(theta, size, rope)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    else:
        assert kind == "default", rope


def _neighbours(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The rows of each head so that elements which are rotated together, i and i + head_dim / 2, are neighbours."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
