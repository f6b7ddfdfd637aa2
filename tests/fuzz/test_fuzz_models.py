"""Model folders, broken or odd: one clear line, or the logits that transformers computes from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import break_one, broken_json, changed_fields, fresh, json_text
from fuzzing import MAPPED, Draw, cases, explore, outcome
from safetensors.torch import load_file, save_file
from support.quantised_models import KINDS, SHAPE, quantised_folder
from support.tiny_models import FAMILY_MODELS, LLAMA3_ROPE, write_tiny_model, write_tiny_tokenizer

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.data.tokenizer import check_vocabulary, end_ids, load_tokenizer
from megatron_tiedlora.model.attention import inverse_frequencies
from megatron_tiedlora.model.families import FAMILIES
from megatron_tiedlora.model.weights import num_base_parameters

INDEX = "model.safetensors.index.json"
VOCABULARY = 320


@cases("model")
def test_a_broken_model_folder(base: Path, area: Path, examples: int) -> None:
    folder, shard = area / "model", min(base.glob("*.safetensors")).name

    def load() -> ModelSource:
        source = find_model(str(folder))
        assert num_base_parameters(source.shape) > 0
        inverse_frequencies(source.shape.heads)
        with BaseWeights(folder, source.shape) as weights:
            assert weights.read("model.norm.weight").shape == (source.shape.hidden_size,)
        return source

    def body(draw: Draw) -> object:
        fresh(base, folder)
        break_one(draw, folder, ["config.json", INDEX, shard])
        return outcome(load, unchanged=area, names=(str(folder),))

    explore("model", examples, body, addresses=MAPPED)


@cases("stored")
def test_a_broken_quantised_folder(tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int) -> None:
    """What is stored beside the codes is broken as well: scales, levels, and the JSON in a tensor."""
    made = tmp_path_factory.mktemp("stored")
    plain = write_tiny_model(
        made / "plain", tokenizer=False, num_layers=2, dtype=torch.bfloat16, **{**SHAPE, "intermediate_size": 256}
    )
    wholes = [quantised_folder(plain, made / kind, kind)[0] for kind in KINDS]
    folder = area / "model"
    tokens, positions = torch.arange(3, 60)[None], torch.arange(57)[None]

    def body(draw: Draw) -> object:
        fresh(draw.choice(wholes), folder)
        file = folder / "model.safetensors"
        states = [name for name in load_file(file) if ".quant_state." in name]
        if states and draw.chance():
            tensors = load_file(file)
            name = draw.say(draw.choice(states))
            tensors[name] = torch.tensor(list(broken_json(draw, bytes(tensors[name].tolist()))), dtype=torch.uint8)
            save_file(tensors, file)
        else:
            break_one(draw, folder, ["config.json", file.name])

        def load() -> torch.Tensor:
            source = find_model(str(folder))
            base = draw.choice([source.base_format(None), None])
            model = load_model(source, None, dtype=torch.bfloat16, base_format=base)
            logits: torch.Tensor = model.predict(tokens, positions)
            return logits

        return outcome(load, unchanged=area, names=(str(folder),))

    explore("stored", examples, body, addresses=MAPPED)


@cases("tokenizer")
def test_a_broken_tokenizer(tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int) -> None:
    whole = write_tiny_tokenizer(tmp_path_factory.mktemp("whole"))
    (whole / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    folder, files = area / "tokenizer", sorted(path.name for path in whole.iterdir())

    def load() -> Any:
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, VOCABULARY)
        prompt = Example("Tom has 12 pens, naïve 日本語 😀</s>", "", "here")
        encoded, _ = encode_prompts(tokenizer, [prompt], max_length=64)
        return encoded[0].tolist(), end_ids(tokenizer, folder, vocab_size=VOCABULARY)

    def body(draw: Draw) -> object:
        fresh(whole, folder)
        break_one(draw, folder, files)
        found = outcome(load, unchanged=area, names=(str(folder), "--tokenizer"))
        if not isinstance(found, UserError):
            for number in (*found[0], *found[1]):
                assert type(number) is int and 0 <= number < VOCABULARY, f"id {number} is outside the vocabulary"
        return found

    explore("tokenizer", examples, body)


# Beside transformers ----------------------------------------------------------------------------------------------

_ROPES: list[Any] = [
    None, {}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": 500.0}, {"rope_theta": 1e6},
    {"rope_theta": 10000.0, **LLAMA3_ROPE}, {**LLAMA3_ROPE, "factor": 2.0}, {**LLAMA3_ROPE, "rope_theta": 77.0},
    {**LLAMA3_ROPE, "original_max_position_embeddings": 8}, {**LLAMA3_ROPE, "high_freq_factor": 1.5},
    {"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}, {"type": "llama3", **LLAMA3_ROPE},
    {"rope_type": "dynamic", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}, {"type": "default"},
    {"rope_type": "default", "partial_rotary_factor": 0.5}, {"rope_type": "default", "factor": 8.0},
    {"rope_type": "llama3", "factor": 8.0}, {"type": "x"},
]  # fmt: skip
# By field: what models have there, and what somebody may write.
VALUES: dict[str, list[Any]] = {
    "tie_word_embeddings": [True, False, None],
    "num_key_value_heads": [1, 2, 4, None, 0, 3],
    "num_attention_heads": [2, 4, 8],
    "head_dim": [8, None, 0, 4, 16],
    "num_hidden_layers": [1, 2, 3],
    "rms_norm_eps": [1e-5, 1e-6, 1e-2, 0, 0.0, 1, None],
    "rope_parameters": _ROPES,
    "rope_scaling": _ROPES,
    "rope_theta": [10000.0, 500000, 77.0, None, 0, 1],
    "attention_bias": [True, False, None],
    "mlp_bias": [True, False, None],
    "hidden_act": ["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu", None],
    "max_position_embeddings": [8, 64, 256, 4096, None],
    "vocab_size": [320, 319, 1000],
    "model_type": [*FAMILIES, None],
    "architectures": [["LlamaForCausalLM"], ["MistralForCausalLM"], ["LlamaModel"], [], None],
    "pretraining_tp": [1, 2],
    "attention_dropout": [0.0, 0.5, None],
    "sliding_window": [None, 4, 64],
    "use_sliding_window": [True, False, None],
    "use_qkv_bias": [True, False, None],
    "qk_layernorm": [True, False, None],
    "use_parallel_residual": [True, False, None],
    "no_rope_layers": [None, [1, 0], [0, 0], [1], [1, 2], "10"],
    "no_rope_layer_interval": [1, 2, 3, 0, None],
    "layer_norm_eps": [1e-5, 0.1, None],
    "original_max_position_embeddings": [8, 64, None],
    "layer_types": [None, [], ["full_attention"] * 2, ["sliding_attention"] * 2, "full_attention"]
    + [["full_attention", "sliding_attention"], ["sliding_attention", "full_attention"], ["chunked_attention"] * 2],
    "use_cache": [True, False],
    "partial_rotary_factor": [None, 1.0, 0.5],
    "logits_scaling": [None, 1.0, 2.0],
    "embedding_multiplier": [None, 1, 2.5, 0, float("inf")],
    "attention_multiplier": [None, 0.5, -1.0, "1"],
    "residual_multiplier": [None, 1.0, 0.3],
    "query_pre_attn_scalar": [None, 5, 256, 0],
    "attn_logit_softcapping": [None, 2.0, 0, 50.0],
    "final_logit_softcapping": [None, 3.0, 0, True],
    "hidden_activation": [None, "gelu", "gelu_pytorch_tanh", "silu"],
    "use_bidirectional_attention": [None, False, True],
    "sliding_window_pattern": [None, 1, 2, 3],
    "rope_local_base_freq": [None, 77.0, 10000.0],
    "max_window_layers": [None, 0, 1, 28],
    "text_config": [None, {}, 7, {"model_type": "llama"}],
    "initializer_range": [0.02, 1.0],
    "pad_token_id": [None, 0, 3, -1, 5000],
    "eos_token_id": [2, [2, 5], None],
    "dtype": ["float32", "bfloat16", None],
    "torch_dtype": ["float16", "float32", None],
    "quantization_config": [None, {}],
    "attn_implementation": ["eager", "sdpa"],
    "_name_or_path": ["x"],
    "transformers_version": ["4.30.0", "5.0.0", None],
}  # fmt: skip


def changed_head(draw: Draw, folder: Path, content: dict[str, Any]) -> None:
    """Whether the head is tied, and what the files hold of it: nothing, a copy of the embedding, or its own."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tower = "language_model." if "text_config" in content else ""
    embedding, name = tensors[f"{tower}model.embed_tokens.weight"], f"{tower}lm_head.weight"
    content["tie_word_embeddings"] = draw.choice([True, True, False])
    match draw.say(draw.choice(["no head", "copied head", "own head", "head of one other bit"])):
        case "no head":
            tensors.pop(name, None)
        case "copied head":
            tensors[name] = embedding.clone()
        case "own head":
            tensors[name] = embedding.flip(0).contiguous()
        case "head of one other bit":
            head = embedding.clone()
            head[7, 3] += 1.0
            tensors[name] = head
    save_file(tensors, file, metadata={"format": "pt"})


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Raises whatever transformers does."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, attn_implementation="eager"
    )
    logits: torch.Tensor = model.eval()(tokens).logits
    return logits


@cases("logits")
@torch.no_grad()
def test_an_odd_config_means_what_transformers_means(
    tmp_path_factory: pytest.TempPathFactory, area: Path, examples: int
) -> None:
    """Configs that only we take are counted."""
    made = tmp_path_factory.mktemp("bases")
    shapes: list[dict[str, Any]] = [{}, {"tied": True}, {"attention_bias": True, "num_kv_heads": 4}, {"head_dim": 12}]
    shapes += FAMILY_MODELS.values()
    bases = [
        write_tiny_model(made / str(index), num_layers=2, tokenizer=False, seed=index, **shape)
        for index, shape in enumerate(shapes)
    ]
    folder = area / "model"
    tokens = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(20).expand_as(tokens)

    def load() -> torch.Tensor:
        source = find_model(str(folder))
        source.check_length("--max_length", tokens.shape[1])
        logits: torch.Tensor = load_model(source, None, dtype=torch.float32).predict(tokens, positions)
        return logits

    def body(draw: Draw) -> object:
        fresh(draw.choice(bases), folder)
        content = json.loads((folder / "config.json").read_text())
        if draw.chance(0.15):
            changed_head(draw, folder, content)
        if draw.chance(0.2):
            content = changed_fields(draw, content)
        else:
            for name in draw.sample(sorted(VALUES), draw.randint(1, 2)):
                content[name] = draw.choice(VALUES[name])
                draw.say(f"{name} = {content[name]!a}"[:80])
        (folder / "config.json").write_bytes(json_text(content))
        ours = outcome(load, unchanged=area, names=(str(folder),))
        if isinstance(ours, UserError):
            return ours
        try:
            theirs = transformers_logits(folder, tokens)
        except Exception:  # of any kind
            draw.notes.append("accepted, transformers refuses")
            return ours
        largest = (ours - theirs).abs().max().item()
        assert largest < 1e-3 * theirs.abs().max().item(), f"logits differ from transformers' by {largest:.2g}"
        return ours

    explore("logits", examples, body)
