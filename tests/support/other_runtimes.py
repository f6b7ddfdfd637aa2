"""Greedy decoding of a model folder in transformers, llama.cpp and CTranslate2. Uses nothing of the package.

llama.cpp and CTranslate2 are installed where pyproject.toml says so: on platforms for which they have a wheel.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from folders import ROOT
from oracle_rope import rope_amplitude, rope_frequencies
from packaging.requirements import Requirement
from safetensors.torch import load_file

CONTEXT = 64  # tokens, of prompt and continuation
_ERROR = 4  # of llama.cpp's log levels


def needs_wheel(name: str) -> pytest.MarkDecorator:
    """A mark that skips a test where pyproject.toml does not install `name`. Where it does, `name` has to be there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    marker = next(found.marker for found in map(Requirement, extras["test-base"]) if found.name == name)
    is_here = marker is None or marker.evaluate()
    return pytest.mark.skipif(not is_here, reason=f"{name} is installed where {marker}: it has no wheel for others")


def transformers_tokens(folder: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers decodes in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return [int(token) for token in rows[0, len(prompt) :]]


def llama_cpp_tokens(folder: Path, prompt: list[int], count: int, *, scratch: Path) -> list[int]:
    """What llama.cpp decodes in fp32, with an fp32 cache, from a GGUF file in `scratch`."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()

    def show_errors(level: int, text: Any, _: Any) -> None:
        if level == _ERROR:
            print(ffi.string(text).decode())

    log = ffi.callback("ggml_log_callback", show_errors)
    lib.llama_log_set(log, ffi.NULL)
    model = lib.llama_model_load_from_file(
        str(write_gguf(folder, scratch / "model.gguf")).encode(), lib.llama_model_default_params()
    )
    assert model != ffi.NULL, "llama.cpp does not load the file"
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = CONTEXT, 1, 1
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it would round to 16 bits
    context = lib.llama_init_from_model(model, settings)
    assert context != ffi.NULL, "llama.cpp does not run the file"
    size, found, unread = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model)), [], list(prompt)
    for _ in range(count):
        tokens = ffi.new("llama_token[]", unread)
        assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(unread))) == 0
        logits = torch.frombuffer(ffi.buffer(lib.llama_get_logits_ith(context, -1), 4 * size), dtype=torch.float32)
        unread = [int(logits.argmax())]
        found += unread
    lib.llama_free(context)
    lib.llama_model_free(model)
    lib.llama_log_set(ffi.NULL, ffi.NULL)
    return found


def ctranslate2_tokens(folder: Path, prompt: list[int], count: int, *, scratch: Path) -> list[int]:
    """What CTranslate2 decodes in fp32 from its own reading of the folder, which needs a tokenizer.

    With transformers 5 it computes other kinds of rope and windows wrongly, without a word.
    """
    import ctranslate2
    from transformers import AutoTokenizer

    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(scratch / "converted"))
    generator: Any = ctranslate2.Generator(str(scratch / "converted"), compute_type="float32", intra_threads=1)
    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(prompt)
    (result,) = generator.generate_batch([words], max_length=count, include_prompt_in_result=False, end_token=[])
    return [int(token) for token in result.sequences_ids[0]]


# GGUF files -----------------------------------------------------------------------------------------------------------


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
