"""The LLaMA family: what a Hugging Face `config.json` means here, what of it is refused, and the table of weight names.

The name table is the one place that knows how Hugging Face names and fuses weights; loading, merging, export read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.model.rope import RopeConfig
from megatron_tiedlora.parallel.shard_spec import ShardSpec


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA model (names as in transformers, sizes of the full model)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of Q, K and V in the fused projection."""
        kv_rows = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv_rows, kv_rows


# Settings that change what the model computes and that this code does not compute: (name, values that mean "off").
_REFUSED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("sliding_window", (None,)),
    ("use_sliding_window", (None, False)),
    ("mlp_bias", (None, False)),
    ("attention_dropout", (None, 0, 0.0)),
    ("quantization_config", (None,)),
    ("partial_rotary_factor", (None, 1, 1.0)),
    ("logits_scaling", (None, 1, 1.0)),
    ("attn_logit_softcapping", (None,)),
    ("final_logit_softcapping", (None,)),
    ("num_local_experts", (None,)),
    ("use_qk_norm", (None, False)),
)


_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Beyond any model: a table of weights is made of the layers, and products of two sizes are numbers of weights.
_LARGEST_SIZE, _LARGEST = 2**28, {"num_hidden_layers": 4096}


def llama_config_from_hf(values: Mapping[str, Any], *, source: str = "config.json") -> LlamaConfig:
    """Read the fields of a Hugging Face LLaMA config.

    Raises:
        UserError: another model type, or a feature that is not implemented, by name.
    """
    kind = values.get("model_type")
    if kind != "llama":
        raise UserError(f"{source}: model_type {shown(kind)} is not implemented; this version trains 'llama' models")
    for name, off in _REFUSED:
        if values.get(name) not in off:
            raise UserError(f"{source}: {name} = {shown(values[name])} is not implemented")
    layer_types = values.get("layer_types") or []
    for kind in layer_types if isinstance(layer_types, list) else [layer_types]:
        if kind != "full_attention":
            raise UserError(f"{source}: layer_types has {shown(kind)}, which is not implemented; 'full_attention' is")
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{source}: hidden_act = {shown(activation)} is not implemented; LLaMA's is 'silu'")
    sizes = {name: _size(values, name, source) for name in _SIZES}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    kv_heads = _size({"num_key_value_heads": values.get("num_key_value_heads") or heads}, "num_key_value_heads", source)
    if hidden < heads and not values.get("head_dim"):
        raise UserError(f"{source}: hidden_size {hidden} is less than num_attention_heads {heads}")
    config = LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_size({"head_dim": values.get("head_dim") or hidden // heads}, "head_dim", source),
        norm_eps=_norm_eps(values, source),
        rope=RopeConfig.from_hf(values, source=source),
        max_positions=_size({"max_position_embeddings": 2048, **values}, "max_position_embeddings", source),
        tied_embeddings=_flag(values, "tie_word_embeddings", source),
        attention_bias=_flag(values, "attention_bias", source),
    )
    if config.head_dim % 2:
        raise UserError(f"{source}: head_dim is {config.head_dim}; rotary embedding needs an even one")
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{source}: {heads} heads do not divide by num_key_value_heads {kv_heads}")
    return config


def _size(values: Mapping[str, Any], name: str, source: str) -> int:
    if name not in values:
        raise UserError(f"{source}: {name} is missing")
    value = values[name]
    if type(value) is not int or not 1 <= value <= _LARGEST.get(name, _LARGEST_SIZE):
        raise UserError(f"{source}: {name} = {shown(value)} is not a whole number that a model can have there")
    return value


def _norm_eps(values: Mapping[str, Any], source: str) -> float:
    value = values.get("rms_norm_eps", 1e-6)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise UserError(f"{source}: rms_norm_eps = {shown(value)} is not a small number")
    return float(value)


def _flag(values: Mapping[str, Any], name: str, source: str) -> bool:
    value = values.get(name, False)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{source}: {name} = {shown(value)} is neither true nor false")
    return bool(value)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The fields of `folder/config.json`. Raises UserError naming the file."""
    return read_json_object(folder / "config.json", kind="a Hugging Face model folder or a hub id in --model")


@dataclass(frozen=True)
class WeightRule:
    """One parameter here and the Hugging Face tensors it is made of, stacked along `spec.dim`, block by block."""

    name: str
    hf_names: tuple[str, ...]
    spec: ShardSpec
    shape: tuple[int, ...]

    def hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape that each of `hf_names` must have."""
        if len(self.hf_names) == 1:
            return (self.shape,)
        return tuple((size, *self.shape[1:]) for size in self.spec.blocks)


def weight_rules(config: LlamaConfig) -> tuple[WeightRule, ...]:
    """The name table: every base parameter, in the order of the flat list of layers.

    Layer 0 is the embedding, layers 1 to L are the blocks, layer L + 1 is the head. With tied embeddings the head has
    no weight of its own.
    """
    d, f = config.hidden_size, config.intermediate_size
    o, attention_width = sum(config.qkv_rows), config.qkv_rows[0]
    last = config.num_layers + 1

    def whole(name: str, hf_name: str, size: int) -> WeightRule:
        return WeightRule(name, (hf_name,), ShardSpec(None, (size,)), (size,))

    vocabulary = ShardSpec(0, (config.vocab_size,), padded=True)
    rules = [
        WeightRule(
            "layers.0.weight",
            ("model.embed_tokens.weight",),
            vocabulary,
            (config.vocab_size, d),
        )
    ]
    for index in range(config.num_layers):
        here, there = f"layers.{index + 1}.", f"model.layers.{index}."
        qkv = tuple(f"{there}self_attn.{part}_proj." for part in "qkv")
        rules.append(whole(f"{here}attention.qkv.norm", f"{there}input_layernorm.weight", d))
        rules.append(
            WeightRule(
                f"{here}attention.qkv.weight", tuple(n + "weight" for n in qkv), ShardSpec(0, config.qkv_rows), (o, d)
            )
        )
        if config.attention_bias:
            rules.append(
                WeightRule(
                    f"{here}attention.qkv.bias", tuple(n + "bias" for n in qkv), ShardSpec(0, config.qkv_rows), (o,)
                )
            )
            rules.append(whole(f"{here}attention.output.bias", f"{there}self_attn.o_proj.bias", d))
        rules.append(
            WeightRule(
                f"{here}attention.output.weight",
                (f"{there}self_attn.o_proj.weight",),
                ShardSpec(1, (attention_width,)),
                (d, attention_width),
            )
        )
        rules.append(whole(f"{here}mlp_norm.weight", f"{there}post_attention_layernorm.weight", d))
        gate_up = (f"{there}mlp.gate_proj.weight", f"{there}mlp.up_proj.weight")
        rules.append(WeightRule(f"{here}mlp.gate_up.weight", gate_up, ShardSpec(0, (f, f)), (2 * f, d)))
        rules.append(
            WeightRule(f"{here}mlp.down.weight", (f"{there}mlp.down_proj.weight",), ShardSpec(1, (f,)), (d, f))
        )
    rules.append(whole(f"layers.{last}.norm.weight", "model.norm.weight", d))
    if not config.tied_embeddings:
        rules.append(WeightRule(head_weight_name(config), ("lm_head.weight",), vocabulary, (config.vocab_size, d)))
    return tuple(rules)


def head_weight_name(config: LlamaConfig) -> str:
    """The name here of the vocabulary projection, where it is a parameter of its own."""
    return f"layers.{config.num_layers + 1}.weight"


def stage_weight_rules(config: LlamaConfig, *, has_embedding: bool) -> tuple[WeightRule, ...]:
    """The name table as a pipeline stage reads it: with tied embeddings, a head away from the embedding has a copy."""
    rules = weight_rules(config)
    if config.tied_embeddings and not has_embedding:
        rules += (replace(rules[0], name=head_weight_name(config)),)
    return rules


def num_base_parameters(config: LlamaConfig) -> int:
    """Parameters of the base model, a tied embedding counted once."""
    return sum(torch.Size(rule.shape).numel() for rule in weight_rules(config))
