"""The decoder that many families share: RMS norms, grouped queries, rotary embedding, SwiGLU; transformers' names.

A family says which of its linears have a bias, and rejects features that are not implemented (`model/families/`).
"""

from __future__ import annotations

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import BlockShape, HeadShape, LinearShape, ModelShape, NormShape, StoredRows
from megatron_tiedlora.model.hf_config import HfConfig


def gated_decoder(
    config: HfConfig, *, qkv_bias: bool, output_bias: bool, max_positions: int, num_kv_heads: int | None = None
) -> ModelShape:
    """The shape that the fields common to these families describe.

    Args:
        max_positions, num_kv_heads: the family's defaults for absent fields; None: the number of heads.

    Raises:
        UserError: the name of a field that is missing or wrong.
    """
    config.reject_unless("attention_dropout", 0)
    config.reject_unless("quantization_config")
    config.reject_other_layers()
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UserError(f"{config.source}: hidden_act = {shown(activation)} is not implemented. Only 'silu' is")
    vocab, d, f = (config.size(name) for name in ("vocab_size", "hidden_size", "intermediate_size"))
    num_layers, heads = config.size("num_hidden_layers"), _heads(config, d, num_kv_heads)
    eps = config.small_number("rms_norm_eps", 1e-6)
    gate_up = (StoredRows("mlp.gate_proj"), StoredRows("mlp.up_proj"))
    qkv = tuple(StoredRows(f"self_attn.{part}_proj") for part in "qkv")
    block = BlockShape(
        source="model.layers.{index}",
        heads=heads,
        attention_norm=NormShape("attention.qkv.norm", d, eps, "input_layernorm"),
        qkv=LinearShape("attention.qkv", d, heads.rows, "column", qkv, qkv_bias),
        output=LinearShape(
            "attention.output", heads.rows[0], (d,), "row", (StoredRows("self_attn.o_proj"),), output_bias
        ),
        mlp_norm=NormShape("mlp.gate_up.norm", d, eps, "post_attention_layernorm"),
        gate_up=LinearShape("mlp.gate_up", d, (f, f), "column", gate_up),
        down=LinearShape("mlp.down", f, (d,), "row", (StoredRows("mlp.down_proj"),)),
    )
    return ModelShape(
        num_layers=num_layers,
        max_positions=config.size("max_position_embeddings", max_positions),
        embedding=LinearShape("", d, (vocab,), "vocabulary", (StoredRows("model.embed_tokens"),)),
        block=block,
        final_norm=NormShape("norm.weight", d, eps, "model.norm"),
        head=LinearShape("", d, (vocab,), "vocabulary", (StoredRows("lm_head"),)),
        tied_embeddings=config.flag("tie_word_embeddings"),
    )


def _heads(config: HfConfig, hidden_size: int, num_kv_heads: int | None) -> HeadShape:
    num = config.size("num_attention_heads")
    absent = num if num_kv_heads is None else num_kv_heads
    num_kv = num if config.get("num_key_value_heads", absent) is None else config.size("num_key_value_heads", absent)
    if hidden_size < num and not config.get("head_dim"):
        raise UserError(f"{config.source}: hidden_size {hidden_size} is less than num_attention_heads {num}")
    dim = config.size("head_dim", hidden_size // num)
    if num % num_kv:
        raise UserError(f"{config.source}: {num} heads are not a multiple of num_key_value_heads {num_kv}")
    return HeadShape(num, num_kv, dim, config.rope(dim))
