"""Register model families, and build the decoder that they share.

The decorator `family` receives the defaults of absent fields, if these defaults are not LLaMA's. The shared decoder has
grouped queries, rotary embedding, a gated MLP, and the tensor names of transformers. A family adds only what differs
from this decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.model.hf_config import HfConfig, read_rope

Reader = Callable[[HfConfig], shapes.ModelShape]


class Family(NamedTuple):
    """The function that reads a config of the family, and the defaults of absent fields."""

    read: Reader
    defaults: Mapping[str, Any]


FAMILIES: dict[str, Family] = {}


def family(**defaults: Any) -> Callable[[Reader], Reader]:
    """Return a decorator that registers a family under its function's name. `defaults` are for absent fields."""

    def register(read: Reader) -> Reader:
        FAMILIES[read.__name__] = Family(read, defaults)
        return read

    return register


class Norms(NamedTuple):
    """The names of a block's norms, before and after attention and MLP. None means that the norm does not exist."""

    attention: str | None = "input_layernorm"
    output: str | None = None
    mlp: str | None = "post_attention_layernorm"
    down: str | None = None


BEFORE = Norms()
BEHIND = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


def gated_decoder(
    config: HfConfig,
    *,
    rope: tuple[shapes.RopeShape, shapes.LengthLimit | None] | None = None,
    window: shapes.LengthLimit | None = None,
    norm_eps: float | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norms: Literal["each", "together"] | None = None,
    norms: Norms = BEFORE,
    fused: bool = False,
    kinds: Sequence[shapes.AttentionKind] = (),
) -> shapes.ModelShape:
    """Return the `ModelShape` of the shared decoder, with the given features of a family.

    Args:
        rope: the result of `read_rope`; by default the result of `read_rope(config)`.
        window: the limit that a sliding window sets, see `HfConfig.window`.
        norm_eps: the epsilon of LayerNorms, which have biases; None for RMS norms, with an epsilon from the config.
        head_norms: "each": each head of queries and keys has an RMS norm before the rotation. "together": all heads of
            queries share one norm, and all heads of keys share one.
        norms: the norms over the hidden size.
        kinds: the kind of attention of each block, if blocks differ; see `ModelShape`.
        fused: whether q, k and v are stored as one tensor, and gate and up as one tensor.

    Raises:
        UserError: a field is missing or wrong; the message names it.
    """
    rope = read_rope(config) if rope is None else rope
    config.reject_other_layers("full_attention", *(() if window is None else ("sliding_attention",)))
    activation = config.get("hidden_act")
    if activation not in ("silu", "swish"):
        raise config.error(f"hidden_act = {shown(activation)} is not implemented. Use a model with hidden_act 'silu'")
    vocab, d, f = (config.size(name) for name in ("vocab_size", "hidden_size", "intermediate_size"))
    num_layers = config.size("num_hidden_layers")
    eps = config.small_number("rms_norm_eps") if norm_eps is None else norm_eps

    def norm(source: str | None, weight: str, bias: str) -> shapes.NormShape | None:
        return None if source is None else shapes.NormShape(weight, d, eps, source, None if norm_eps is None else bias)

    num, num_kv, dim = _head_sizes(config, d)

    def head_norm(part: str, count: int) -> shapes.NormShape | None:
        if head_norms is None:
            return None
        size, source = dim if head_norms == "each" else count * dim, f"self_attn.{part[0]}_norm"
        return shapes.NormShape(f"attention.qkv.{part}_norm", size, eps, source, sharded=head_norms == "together")

    heads = shapes.HeadShape(num, num_kv, dim, rope[0], head_norm("query", num), head_norm("key", num_kv))
    for own in filter(None, (heads.rope, *(kind.rope for kind in kinds))):
        _check_rotation(config, replace(heads, rope=own))
    qkv = tuple(shapes.StoredRows(f"self_attn.{part}_proj") for part in "qkv")
    gate_up = tuple(shapes.StoredRows(f"mlp.{part}_proj") for part in ("gate", "up"))
    if fused:
        qkv = _rows_of("self_attn.qkv_proj", heads.rows)
        gate_up = _rows_of("mlp.gate_up_proj", (f, f))
    output = (shapes.StoredRows("self_attn.o_proj"),)
    sizes = shapes.linear_sizes(d, heads.rows, f)
    block = shapes.BlockShape(
        source="model.layers.{index}",
        heads=heads,
        attention_norm=norm(norms.attention, "attention.qkv.norm", "attention.qkv.norm_bias"),
        qkv=shapes.LinearShape("attention.qkv", *sizes[shapes.QKV], qkv, qkv_bias),
        output=shapes.LinearShape("attention.output", *sizes[shapes.OUTPUT], output, output_bias),
        output_norm=norm(norms.output, "attention.output.norm.weight", "attention.output.norm.bias"),
        mlp_norm=norm(norms.mlp, "mlp.gate_up.norm", "mlp.gate_up.norm_bias"),
        gate_up=shapes.LinearShape("mlp.gate_up", *sizes[shapes.GATE_UP], gate_up),
        down=shapes.LinearShape("mlp.down", *sizes[shapes.DOWN], (shapes.StoredRows("mlp.down_proj"),)),
        down_norm=norm(norms.down, "mlp.down.norm.weight", "mlp.down.norm.bias"),
    )
    final_norm = norm("model.norm", "norm.weight", "norm.bias")
    assert final_norm is not None
    max_positions = config.size("max_position_embeddings")
    trained = shapes.LengthLimit(max_positions, f"was trained for {max_positions} positions")
    return shapes.ModelShape(
        num_layers=num_layers,
        max_positions=max_positions,
        limit=min((trained, *filter(None, (rope[1], window))), key=lambda limit: limit.tokens),
        embedding=shapes.LinearShape("", d, (vocab,), "vocabulary", (shapes.StoredRows("model.embed_tokens"),)),
        block=block,
        final_norm=final_norm,
        head=shapes.LinearShape("", d, (vocab,), "vocabulary", (shapes.StoredRows("lm_head"),)),
        tied_embeddings=config.flag("tie_word_embeddings"),
        kinds=tuple(kinds),
    )


def _rows_of(module: str, sizes: tuple[int, ...]) -> tuple[shapes.StoredRows, ...]:
    """Return blocks of these sizes, which are consecutive rows of one stored tensor."""
    return tuple(shapes.StoredRows(module, sum(sizes[:index]), sum(sizes)) for index in range(len(sizes)))


def _head_sizes(config: HfConfig, hidden_size: int) -> tuple[int, int, int]:
    num = config.size("num_attention_heads")
    num_kv = config.size("num_key_value_heads", num)
    if hidden_size < num and not config.get("head_dim"):
        raise config.error(f"hidden_size {hidden_size} is less than num_attention_heads {num}. Correct one of them")
    dim = config.size("head_dim", hidden_size // num)
    if num % num_kv:
        raise config.error(f"{num} heads are not a multiple of num_key_value_heads {num_kv}. Correct one of them")
    return num, num_kv, dim


def _check_rotation(config: HfConfig, heads: shapes.HeadShape) -> None:
    rotated, scaling = heads.rotary_dim, heads.rope.scaling
    if rotated % 2 or not rotated:
        of = "" if rotated == heads.dim else f", of which {rotated} are rotated"
        problem = f"head_dim is {heads.dim}{of}, but rotary embedding needs an even number of elements"
        raise config.error(f"{problem}. Use a different model")
    if isinstance(scaling, shapes.LongRopeScaling) and len(scaling.factors) != rotated // 2:
        found = f"short_factor has {len(scaling.factors)} numbers"
        raise config.error(f"{found}, but there are {rotated // 2} frequencies. Correct the list")
