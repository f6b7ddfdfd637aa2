"""A merged model of every family is decoded by other programs as by transformers: llama.cpp, and CTranslate2.

They are installed where pyproject.toml says so: on platforms for which they have a wheel.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file
from support.folders import ROOT
from support.native_files import with_adapter
from support.oracle import rope_amplitude, rope_frequencies
from support.peft_models import greedy_tokens, hf_model
from support.tiny_models import BOS_ID, LONGROPE, with_both_signs, write_tiny_model

from megatron_tiedlora.convert.merge import merge_adapter

# Greedy decoding, which uses nothing of the package -------------------------------------------------------------------

CONTEXT = 64  # tokens, of prompt and continuation
_ERROR = 4  # of llama.cpp's log levels


def needs_wheel(name: str) -> pytest.MarkDecorator:
    """A mark that skips a test where pyproject.toml does not install `name`. Where it does, `name` has to be there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    marker = next(found.marker for found in map(Requirement, extras["test-base"]) if found.name == name)
    is_here = marker is None or marker.evaluate()
    return pytest.mark.skipif(not is_here, reason=f"{name} is installed where {marker}: it has no wheel for others")


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

# Model types that llama.cpp rotates so, and in whose files it does not.
NEIGHBOURS = ("llama", "mistral", "smollm3", "granite")
# llama.cpp's names of model types, where they are others.
ARCHITECTURES = {"mistral": "llama", "olmo3": "olmo2", "gemma3_text": "gemma3"}
# A config's fields of numbers by which activations and scores are scaled or capped, and of windows.
NUMBERS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "sliding_window": "sliding_window",
}
# GGUF's names of sizes, and those in a config.
SIZES = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
}


def write_gguf(folder: Path, file: Path) -> Path:
    """Write the model in `folder`, whose weights are in one file, to `file` in fp32, and return that."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(file, architecture)
    for name, of_config in SIZES.items():
        getattr(writer, f"add_{name}")(config[of_config])
    writer.add_tokenizer_model("none")
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if config["model_type"] == "stablelm":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_parallel_residual(config["use_parallel_residual"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name in filter(config.get, NUMBERS):
        getattr(writer, f"add_{NUMBERS[name]}")(config[name])
    _add_rope(writer, config, head_dim)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], config["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        if any(part in name for part in ("vision", "projector")):
            continue
        if config["model_type"].startswith("gemma") and "norm" in name:  # the file has the whole weight
            tensor = tensor + 1
        if config["model_type"] in NEIGHBOURS and ("q_proj" in name or "k_proj" in name):
            # The rows of each head so that elements which are rotated together, i and i + head_dim / 2, are neighbours.
            halves = tensor.unflatten(0, (-1, 2, head_dim // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2).contiguous()
        name = name.replace("language_model.", "").replace("model.model.", "model.")
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, f"GGUF has no name for {name}"
        writer.add_tensor(stored, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_rope(writer: gguf.GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    rope = config["rope_parameters"]
    if "full_attention" in rope:  # the layers with a window have the default rotation
        writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
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


# Merged models --------------------------------------------------------------------------------------------------------

# llama.cpp makes room for this many tokens at least, and chooses longrope's factors by that.
LONG = 256
PROMPT, NEW_TOKENS = [BOS_ID, 5, 77, 250, 42], 24
# Layers of which the last of so many has no window.
WINDOWS = {period: ("sliding_attention",) * (period - 1) + ("full_attention",) for period in (4, 6)}
# Of families that CTranslate2 reads too: default rope and no window in LLaMA's, which it would read wrongly, and heads
# that divide the hidden size. Of Gemma 2 it leaves out caps and windows; llama.cpp's caps of 50 and 30 bend nothing.
BOTH: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"family": "mistral", "sliding_window": None},
    "qwen2": {"family": "qwen2"},
    "qwen2 tied": {"family": "qwen2", "tied": True, "num_kv_heads": 4, "seed": 5},
    "qwen3": {"family": "qwen3", "head_dim": 32},
    "gemma": {"family": "gemma", "hidden_size": 40, "head_dim": 12, "tied": True},
    "gemma3": {"family": "gemma3_text", "hidden_size": 40, "head_dim": 12, "sliding_window": 7, "tied": True}
    | {"seed": 4, "rope_theta": 1e6, "query_pre_attn_scalar": 12, "num_layers": 7, "layer_kinds": WINDOWS[6]},
    "gemma2 plain": {"family": "gemma2", "hidden_size": 40, "head_dim": 12, "sliding_window": 64, "tied": True}
    | {"query_pre_attn_scalar": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None},
}
LLAMA_CPP: dict[str, dict[str, Any]] = BOTH | {
    "llama llama3": {"llama3_rope": True, "head_dim": 12, "attention_bias": True},
    "qwen2 linear": {"family": "qwen2", "rope": {"rope_type": "linear", "factor": 3.0}},
    "phi3": {"family": "phi3"},
    "phi3 partial": {"family": "phi3", "rope": {"partial_rotary_factor": 0.75}},
    "phi3 longrope": {
        "family": "phi3",
        "original_max_position_embeddings": LONG,
        "rope": LONGROPE | {"original_max_position_embeddings": LONG},
        "max_positions": 4 * LONG,
    },
    "stablelm": {"family": "stablelm", "use_qkv_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    # llama.cpp leaves the rotation out in every fourth layer, whatever the interval
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 4, "num_layers": 5},
    "olmo2": {"family": "olmo2"},
    "gemma2": {"family": "gemma2", "hidden_size": 40, "head_dim": 12, "sliding_window": 7, "tied": True}
    | {"query_pre_attn_scalar": 12, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "granite": {"family": "granite", "head_dim": 12, "embedding_multiplier": 3.1, "residual_multiplier": 0.6}
    | {"attention_multiplier": 0.37, "logits_scaling": 1.7},
    "glm4": {"family": "glm4", "head_dim": 12, "attention_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    "olmo3": {"family": "olmo3", "sliding_window": 7, "num_layers": 5, "layer_kinds": WINDOWS[4]},
    "mistral3": {"family": "mistral3", "head_dim": 12, "sliding_window": None},
}


# Theta of the layers with a window: llama.cpp has one theta for all layers of OLMo 3, as OLMo 3 itself, and CTranslate2
# with transformers 5 has those of Gemma 3 whatever the config says, 1e6 and 1e4.
THETAS = {"olmo3": 10000.0, "gemma3": 10000.0}


def written(folder: Path, name: str) -> Path:
    """Write a tiny model that other programs can decode, and that does not repeat itself."""
    write_tiny_model(folder, **LLAMA_CPP[name])
    if name.startswith("gemma"):
        with_both_signs(folder)
    if name in THETAS:
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["sliding_attention"]["rope_theta"] = THETAS[name]
        (folder / "config.json").write_text(json.dumps(config))
    return folder


class Merged(NamedTuple):
    """A merged folder, and what transformers decodes from it."""

    folder: Path
    tokens: list[int]


@pytest.fixture(scope="module")
def merged_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Merged]:
    """Makes a family's merged folder, of a base and a tl6 that is not zero, when it is first asked for."""
    made: dict[str, Merged] = {}

    def make(name: str) -> Merged:
        folder = tmp_path_factory.mktemp("merged")
        base = written(folder / "base", name)
        source, native, _ = with_adapter(base, "tl6")
        merge_adapter(source, native, folder / "merged")
        tokens = greedy_tokens(hf_model(folder / "merged"), PROMPT, NEW_TOKENS)
        assert len(tokens) == NEW_TOKENS and len(set(tokens)) > 6, "the text must not repeat itself"
        assert tokens[:4] != greedy_tokens(hf_model(base), PROMPT, 4), "the adapter must change it"
        return Merged(folder / "merged", tokens)

    return lambda name: made.get(name) or made.setdefault(name, make(name))


@needs_wheel("llama-cpp-py-sync")
@pytest.mark.parametrize("name", LLAMA_CPP)
def test_llama_cpp_decodes_the_same_tokens(merged_of: Callable[[str], Merged], tmp_path: Path, name: str) -> None:
    merged = merged_of(name)
    assert llama_cpp_tokens(merged.folder, PROMPT, NEW_TOKENS, scratch=tmp_path) == merged.tokens


@needs_wheel("ctranslate2")
@pytest.mark.parametrize("name", BOTH)
def test_ctranslate2_decodes_the_same_tokens(merged_of: Callable[[str], Merged], tmp_path: Path, name: str) -> None:
    merged = merged_of(name)
    assert ctranslate2_tokens(merged.folder, PROMPT, NEW_TOKENS, scratch=tmp_path) == merged.tokens
