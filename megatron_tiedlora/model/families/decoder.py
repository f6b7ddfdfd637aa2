"""Register model families, and build the decoder that they share.

The decorator `family` receives the defaults of absent fields, if these defaults are not LLaMA's. The shared decoder has
grouped queries, rotary embedding, a gated MLP, and the tensor names of transformers. A family adds only what differs
from this decoder.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.base.presets import SIZES
from megatron_tiedlora.model.hf_config import SLIDING, HfConfig, Rope, read_rope

Reader = Callable[[HfConfig], shapes.ModelShape]


class Family(NamedTuple):
    """The function that reads a config of the family, and the defaults of absent fields."""

    read: Reader
    defaults: Mapping[str, Any]


FAMILIES: dict[str, Family] = {}


def family(*sizes: int, **defaults: Any) -> Callable[[Reader], Reader]:
    """Return a decorator that registers a family under its function's name. `defaults` are for absent fields, as are
    `sizes`: the hidden size, the width of the MLP, and the numbers of layers, heads and key-value heads."""

    def register(read: Reader) -> Reader:
        FAMILIES[read.__name__] = Family(read, {**dict(zip(SIZES, sizes, strict=False)), **defaults})
        return read

    return register


def read_family(kind: str, values: Mapping[str, Any], source: str, names: Collection[str] = ()) -> shapes.ModelShape:
    """Return the `ModelShape` of a registered family. Raise UserError if a field is not implemented."""
    read, defaults = FAMILIES[kind]
    config = HfConfig(values, source, {**FAMILIES["llama"].defaults, **defaults}, names=names)
    shape = read(config)
    config.reject_unread()
    return shape


class Norms(NamedTuple):
    """The names of a block's norms, before and after attention and MLP. None means that the norm does not exist."""

    attention: str | None = "input_layernorm"
    output: str | None = None
    mlp: str | None = "post_attention_layernorm"
    down: str | None = None


BEFORE = Norms()
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = Norms(BEFORE.attention, AFTER.output, "pre_feedforward_layernorm", AFTER.down)
ACTIVATIONS: dict[str, shapes.Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu"}


def gated_decoder(
    config: HfConfig,
    *,
    rope: Rope | None = None,
    local_rope: shapes.RopeShape | None = None,
    window: int | None = None,
    layer_types: Sequence[str] = (),
    activation: str = "hidden_act",
    activations: Mapping[str, shapes.Activation] = ACTIVATIONS,
    norm_eps: float | None = None,
    norm_offset: float = 0.0,
    qkv_bias: bool = False,
    bias: bool = False,
    head_norms: Literal["each", "together"] | None = None,
    norms: Norms = BEFORE,
    fused: Collection[str] = (),
    multiplier: float | None = None,
    cap: float | None = None,
) -> shapes.ModelShape:
    """Return the `ModelShape` of the shared decoder, with the given features of a family.

    Args:
        rope: the result of `read_rope`; by default the result of `read_rope(config)`.
        local_rope: the rotary embedding of layers with a sliding window, if it differs.
        window: the window of layers with a sliding window, see `HfConfig.window`.
        layer_types: the kinds of layers if the config does not say them, see `HfConfig.layer_types`.
        activation: the field with the name of the gate's activation. `activations`: the names that are implemented.
        bias: whether the field `attention_bias` adds a bias to all linears of attention. `qkv_bias`: only to QKV.
        norm_eps: the epsilon of LayerNorms, which have biases; None for RMS norms, with an epsilon from the config.
        norm_offset: the offset of all norms, see `NormShape`.
        head_norms: "each": each head of queries and keys has an RMS norm before the rotation. "together": all heads of
            queries share one norm, and all heads of keys share one.
        norms: the norms over the hidden size.
        fused: the targets, of QKV and GATE_UP, whose matrices are stored as one tensor.
        multiplier, cap: the factor and the cap of attention scores, see `HeadShape`.

    Raises:
        UserError: a field is missing or wrong; the message names it.
    """
    rope = read_rope(config) if rope is None else rope
    act = config.get(activation)
    if not isinstance(act, str) or act not in activations:
        known = f"Use a model with {activation} {' or '.join(sorted(activations))}"
        raise config.error(f"{activation} = {shown(act)} is not implemented. {known}")
    vocab, d, f = (config.size(name) for name in ("vocab_size", "hidden_size", "intermediate_size"))
    num_layers = config.size("num_hidden_layers")
    eps = config.small_number("rms_norm_eps") if norm_eps is None else norm_eps

    def norm(source: str | None, weight: str, bias: str) -> shapes.NormShape | None:
        if source is None:
            return None
        return shapes.NormShape(weight, d, eps, source, None if norm_eps is None else bias, offset=norm_offset)

    bias = bias and config.flag("attention_bias")
    num, num_kv, dim = _head_sizes(config, d)

    def head_norm(part: str, count: int) -> shapes.NormShape | None:
        if head_norms is None:
            return None
        size, source = dim if head_norms == "each" else count * dim, f"self_attn.{part[0]}_norm"
        sharded = head_norms == "together"
        return shapes.NormShape(f"attention.qkv.{part}_norm", size, eps, source, sharded=sharded, offset=norm_offset)

    qk_norms = head_norm("query", num), head_norm("key", num_kv)
    heads = shapes.HeadShape(num, num_kv, dim, rope[0], *qk_norms, multiplier, cap)
    for own in (rope[0], local_rope or rope[0]):
        _check_rotation(config, replace(heads, rope=own))
    max_positions = config.size("max_position_embeddings")
    # Longer rows are rejected, so a window of all positions has no effect.
    effective = None if window is None or window >= max_positions else window
    full, local = shapes.AttentionKind(rope[0]), shapes.AttentionKind(local_rope or rope[0], effective)
    kinds = [local if kind == SLIDING else full for kind in config.layer_types(window, layer_types)]
    qkv = tuple(shapes.StoredRows(f"self_attn.{part}_proj") for part in "qkv")
    gate_up = tuple(shapes.StoredRows(f"mlp.{part}_proj") for part in ("gate", "up"))
    if shapes.QKV in fused:
        qkv = _rows_of("self_attn.qkv_proj", heads.rows)
    if shapes.GATE_UP in fused:
        gate_up = _rows_of("mlp.gate_up_proj", (f, f))
    output = (shapes.StoredRows("self_attn.o_proj"),)
    sizes = shapes.linear_sizes(d, heads.rows, f)
    block = shapes.BlockShape(
        source="model.layers.{index}",
        heads=heads,
        attention_norm=norm(norms.attention, "attention.qkv.norm", "attention.qkv.norm_bias"),
        qkv=shapes.LinearShape("attention.qkv", *sizes[shapes.QKV], qkv, qkv_bias or bias),
        output=shapes.LinearShape("attention.output", *sizes[shapes.OUTPUT], output, bias),
        output_norm=norm(norms.output, "attention.output.norm.weight", "attention.output.norm.bias"),
        mlp_norm=norm(norms.mlp, "mlp.gate_up.norm", "mlp.gate_up.norm_bias"),
        gate_up=shapes.LinearShape("mlp.gate_up", *sizes[shapes.GATE_UP], gate_up),
        down=shapes.LinearShape("mlp.down", *sizes[shapes.DOWN], (shapes.StoredRows("mlp.down_proj"),)),
        down_norm=norm(norms.down, "mlp.down.norm.weight", "mlp.down.norm.bias"),
        activation=activations[act],
    )
    final_norm = norm("model.norm", "norm.weight", "norm.bias")
    assert final_norm is not None
    trained = shapes.LengthLimit(max_positions, f"was trained for {max_positions} positions")
    return shapes.ModelShape(
        num_layers=num_layers,
        max_positions=max_positions,
        limit=trained if rope[1] is None else min(trained, rope[1], key=lambda limit: limit.tokens),
        embedding=shapes.LinearShape("", d, (vocab,), "vocabulary", (shapes.StoredRows("model.embed_tokens"),)),
        block=block,
        final_norm=final_norm,
        head=shapes.LinearShape("", d, (vocab,), "vocabulary", (shapes.StoredRows("lm_head"),)),
        tied_embeddings=config.flag("tie_word_embeddings"),
        kinds=() if kinds == [full] * num_layers else tuple(kinds),
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


# Text models inside multimodal models ---------------------------------------------------------------------------------


# The prefix of the text model's tensors and the head's name: in transformers' model, and in files.
_TOWERS = ("model.language_model.", "lm_head"), ("language_model.model.", "language_model.lm_head")
# Fields that do not change what is computed for texts.
_NOT_OF_TEXT = """
boi_token_id boi_token_index eoi_token_id eoi_token_index image_token_id image_token_index mm_tokens_per_image
multimodal_projector_bias projector_hidden_act spatial_merge_size vision_config vision_feature_layer
"""


def text_tower(config: HfConfig, *kinds: str, absent: Mapping[str, Any] | None = None) -> shapes.ModelShape:
    """Return the `ModelShape` of the text model inside a multimodal model. It has one of the types `kinds`, by default
    the first.

    If `text_config` is absent, the fields of `absent` describe it. Raise UserError if it has a different type, or if a
    field is not implemented.
    """
    for name in _NOT_OF_TEXT.split():
        config.get(name)
    found, values = config.get("text_config"), absent or {}
    values = values if found is None else found
    if not isinstance(values, Mapping):
        raise config.error(f"text_config is {shown(values)}, not an object. Correct this field")
    if (own := values.get("model_type", kinds[0])) not in kinds:
        problem = f"text_config has model_type {shown(own)}, which is not implemented in a multimodal model"
        raise config.error(f"{problem}. Use a model whose text_config has model_type {' or '.join(kinds)}")
    shape = read_family(own, values, f"{config.source}: text_config")
    towers = [tower for tower in _TOWERS if any(name.startswith(tower[0]) for name in config.names)]
    if len(towers) > 1:
        problem = " and ".join(f"tensors named {prefix}*" for prefix, _ in towers)
        raise config.error(f"the model has {problem}, which are the same. Remove those that are out of date")
    prefix, head = (*towers, _TOWERS[0])[0]
    # Without the field, transformers ties the head, unless the files have a different one.
    tied = config.flag("tie_word_embeddings", f"{head}.weight" not in config.names)
    return replace(
        shape,
        embedding=replace(shape.embedding, sources=(shapes.StoredRows(f"{prefix}embed_tokens"),)),
        block=replace(shape.block, source=f"{prefix}layers.{{index}}", module=f"{_TOWERS[0][0]}layers.{{index}}"),
        final_norm=replace(shape.final_norm, source=f"{prefix}norm"),
        head=replace(shape.head, sources=(shapes.StoredRows(head),)),
        tied_embeddings=tied,
    )
