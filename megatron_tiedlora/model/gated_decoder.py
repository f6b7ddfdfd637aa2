"""The decoder that many families share: grouped queries, rotary embedding, SwiGLU; transformers' names.

A family says what its layers have besides, and rejects features that are not implemented (`model/families.py`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import (
    DOWN,
    GATE_UP,
    OUTPUT,
    QKV,
    BlockShape,
    HeadShape,
    LengthLimit,
    LinearShape,
    LongRopeScaling,
    ModelShape,
    NormShape,
    RopeShape,
    StoredRows,
    linear_sizes,
)
from megatron_tiedlora.model.hf_config import HfConfig, read_rope


class Norms(NamedTuple):
    """The modules of a block's norms: of the inputs of attention and MLP, and of their results; None: there is none."""

    attention: str | None = "input_layernorm"
    output: str | None = None
    mlp: str | None = "post_attention_layernorm"
    down: str | None = None


BEFORE = Norms()
BEHIND = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def gated_decoder(
    config: HfConfig,
    *,
    rope: tuple[RopeShape, LengthLimit | None] | None = None,
    window: LengthLimit | None = None,
    norm_eps: float | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norms: Literal["each", "together"] | None = None,
    norms: Norms = BEFORE,
    fused: bool = False,
    ropes: Sequence[RopeShape | None] = (),
) -> ModelShape:
    """The shape that the fields common to these families describe.

    Args:
        rope: what `read_rope` returns; by default for the config alone.
        window: the limit that a sliding window sets, see `HfConfig.window`.
        norm_eps: that of LayerNorms, which have biases; None for RMS norms, whose field is read here.
        head_norms: "each": each head of queries and keys has an RMS norm before the rotation; "together": all heads of
            queries have one, and all heads of keys.
        norms: the norms of the hidden size.
        ropes: of each block, if they differ; see `ModelShape`.
        fused: whether q, k and v are one stored tensor, and gate and up another.

    Raises:
        UserError: the name of a field that is missing or wrong.
    """
    rope = read_rope(config) if rope is None else rope
    config.reject_other_layers("full_attention", *(() if window is None else ("sliding_attention",)))
    activation = config.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise UserError(f"{config.source}: hidden_act = {shown(activation)} is not implemented. Only 'silu' is")
    vocab, d, f = (config.size(name) for name in ("vocab_size", "hidden_size", "intermediate_size"))
    num_layers = config.size("num_hidden_layers")
    eps = config.small_number("rms_norm_eps") if norm_eps is None else norm_eps

    def norm(name: str, bias_name: str, source: str) -> NormShape:
        return NormShape(name, d, eps, source, None if norm_eps is None else bias_name)

    def before(linear: str, source: str | None) -> NormShape | None:
        return None if source is None else norm(f"{linear}.norm", f"{linear}.norm_bias", source)

    def behind(linear: str, source: str | None) -> NormShape | None:
        return None if source is None else norm(f"{linear}.norm.weight", f"{linear}.norm.bias", source)

    num, num_kv, dim = _head_sizes(config, d)

    def head_norm(part: str, count: int) -> NormShape | None:
        if head_norms is None:
            return None
        size, source = dim if head_norms == "each" else count * dim, f"self_attn.{part[0]}_norm"
        return NormShape(f"attention.qkv.{part}_norm", size, eps, source, sharded=head_norms == "together")

    heads = HeadShape(num, num_kv, dim, rope[0], head_norm("query", num), head_norm("key", num_kv))
    for own in filter(None, (heads.rope, *ropes)):
        _check_rotation(config, replace(heads, rope=own))
    qkv = tuple(StoredRows(f"self_attn.{part}_proj") for part in "qkv")
    gate_up = tuple(StoredRows(f"mlp.{part}_proj") for part in ("gate", "up"))
    if fused:
        qkv = _rows_of("self_attn.qkv_proj", heads.rows)
        gate_up = _rows_of("mlp.gate_up_proj", (f, f))
    output = (StoredRows("self_attn.o_proj"),)
    sizes = linear_sizes(d, heads.rows, f)
    block = BlockShape(
        source="model.layers.{index}",
        heads=heads,
        attention_norm=before("attention.qkv", norms.attention),
        qkv=LinearShape("attention.qkv", *sizes[QKV], qkv, qkv_bias),
        output=LinearShape("attention.output", *sizes[OUTPUT], output, output_bias),
        output_norm=behind("attention.output", norms.output),
        mlp_norm=before("mlp.gate_up", norms.mlp),
        gate_up=LinearShape("mlp.gate_up", *sizes[GATE_UP], gate_up),
        down=LinearShape("mlp.down", *sizes[DOWN], (StoredRows("mlp.down_proj"),)),
        down_norm=behind("mlp.down", norms.down),
    )
    max_positions = config.size("max_position_embeddings")
    trained = LengthLimit(max_positions, f"was trained for {max_positions} positions")
    return ModelShape(
        num_layers=num_layers,
        max_positions=max_positions,
        limit=min((trained, *filter(None, (rope[1], window))), key=lambda limit: limit.tokens),
        embedding=LinearShape("", d, (vocab,), "vocabulary", (StoredRows("model.embed_tokens"),)),
        block=block,
        final_norm=norm("norm.weight", "norm.bias", "model.norm"),
        head=LinearShape("", d, (vocab,), "vocabulary", (StoredRows("lm_head"),)),
        tied_embeddings=config.flag("tie_word_embeddings"),
        ropes=tuple(ropes),
    )


def _rows_of(module: str, sizes: tuple[int, ...]) -> tuple[StoredRows, ...]:
    """Blocks of these sizes that follow each other in one stored tensor."""
    return tuple(StoredRows(module, sum(sizes[:index]), sum(sizes)) for index in range(len(sizes)))


def _head_sizes(config: HfConfig, hidden_size: int) -> tuple[int, int, int]:
    num = config.size("num_attention_heads")
    num_kv = config.size("num_key_value_heads", num)
    if hidden_size < num and not config.get("head_dim"):
        raise UserError(f"{config.source}: hidden_size {hidden_size} is less than num_attention_heads {num}")
    dim = config.size("head_dim", hidden_size // num)
    if num % num_kv:
        raise UserError(f"{config.source}: {num} heads are not a multiple of num_key_value_heads {num_kv}")
    return num, num_kv, dim


def _check_rotation(config: HfConfig, heads: HeadShape) -> None:
    rotated, scaling = heads.rotary_dim, heads.rope.scaling
    if rotated % 2 or not rotated:
        of = "" if rotated == heads.dim else f", of which {rotated} are rotated"
        raise UserError(
            f"{config.source}: head_dim is {heads.dim}{of}, but rotary embedding needs an even number of elements"
        )
    if isinstance(scaling, LongRopeScaling) and len(scaling.factors) != rotated // 2:
        found = f"short_factor has {len(scaling.factors)} numbers, but there are {rotated // 2} frequencies"
        raise UserError(f"{config.source}: {found}")
