"""Define the supported model families by the `model_type` of their `config.json`, and the decoder that they share.

A family is a function that returns a `ModelShape` for an `HfConfig`, and raises UserError for features that are not
implemented. The decorator `family` receives the defaults of absent fields, if these defaults are not LLaMA's. The
shared decoder has grouped queries, rotary embedding, SwiGLU, and the tensor names of transformers. A family adds only
what differs from this decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.model.hf_config import FULL, SLIDING, HfConfig, read_rope, rope_fields, window_of_last_layers

Reader = Callable[[HfConfig], shapes.ModelShape]


class Family(NamedTuple):
    """The function that reads a config of the family, and the defaults of absent fields."""

    read: Reader
    defaults: Mapping[str, Any]


FAMILIES: dict[str, Family] = {}
_QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
# The reasons why models of unsupported types cannot be trained, by a field that only such models have.
_REASONS = {
    **dict.fromkeys(("text_config", "vision_config"), "it is part of a multimodal model"),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "it is a mixture of experts"),
    **dict.fromkeys(("linear_num_key_heads", "mamba_d_state", "state_size"), "it has layers without attention"),
    **dict.fromkeys(("parallel_attn", "use_parallel_residual"), "its attention and MLP have the same input"),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), "it caps scores or logits"),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), "its keys and values are compressed"),
}
_FACTORS = "it scales the activations between its layers"
_OTHER_TYPES = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "granite", "minicpm"), _FACTORS),
    **dict.fromkeys(("glm", "glm4"), "its rotary embedding rotates neighbouring elements"),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "nemotron", "opt", "starcoder2"), "its MLP has no gate"),
}


def shape_from_hf(values: Mapping[str, Any], *, source: str = "config.json") -> shapes.ModelShape:
    """Return the `ModelShape` that the fields of a Hugging Face config describe.

    Raises:
        UserError: a model type, feature or field is not implemented; the message names it.
    """
    kind = values.get("model_type")
    family_of_kind = FAMILIES.get(str(kind))
    if family_of_kind is None:
        reason = _OTHER_TYPES.get(str(kind))
        reason = reason or next((why for field, why in _REASONS.items() if values.get(field)), None)
        because = "" if reason is None else f", because {reason}"
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{source}: model_type {shown(kind)} is not implemented{because}. Use a model of type {known}")
    config = HfConfig(values, source, {**FAMILIES["llama"].defaults, **family_of_kind.defaults})
    shape = family_of_kind.read(config)
    config.reject_unread()
    return shape


def family(**defaults: Any) -> Callable[[Reader], Reader]:
    """Return a decorator that registers a family under its function's name. `defaults` are for absent fields."""

    def register(read: Reader) -> Reader:
        FAMILIES[read.__name__] = Family(read, defaults)
        return read

    return register


# The shared decoder ---------------------------------------------------------------------------------------------------


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


# The families ---------------------------------------------------------------------------------------------------------


@family(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    hidden_act="silu",
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
)
def llama(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of LLaMA 1 to 3, and of models with the same layers."""
    bias = config.flag("attention_bias")
    return gated_decoder(config, qkv_bias=bias, output_bias=bias)


@family(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32, sliding_window=4096)
def mistral(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Mistral 7B, Nemo and Small: LLaMA layers, with a sliding window in the oldest models."""
    return gated_decoder(config, window=config.window())


@family(vocab_size=50304, rms_norm_eps=1e-5)
def olmo2(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of OLMo 2, with norms after attention and MLP, and over all heads of queries and of keys."""
    bias = config.flag("attention_bias")
    return gated_decoder(config, qkv_bias=bias, output_bias=bias, norms=BEHIND, head_norms="together")


@family(vocab_size=50304, rms_norm_eps=1e-5, sliding_window=4096)
def olmo3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of OLMo 3: OLMo 2 layers, most of them with a sliding window and a different rotation."""
    bias, num_layers = config.flag("attention_bias"), config.size("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if layer % 4 else FULL for layer in range(1, num_layers + 1)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        wanted = f"{num_layers} kinds of layers, each {FULL} or {SLIDING}. Use a different model"
        raise config.error(f"layer_types = {shown(kinds)} is not a list of {wanted}")
    # `rope_parameters` has an entry for each kind of layer. `rope_theta` and `rope_scaling` apply to full attention.
    theta, by_kind = 500000.0, rope_fields(config, config.get("rope_parameters"))
    fields = (by_kind.get(FULL), by_kind.get(SLIDING), config.get("rope_scaling"))
    full, sliding, scaling = (rope_fields(config, own) for own in fields)
    full = {"rope_theta": config.get("rope_theta") or theta, **full, **scaling}
    ropes = {FULL: read_rope(config, values=full), SLIDING: read_rope(config, values={"rope_theta": theta, **sliding})}
    limits = [limit for _, limit in ropes.values() if limit is not None]
    return gated_decoder(
        config,
        rope=(ropes[FULL][0], min(limits, key=lambda limit: limit.tokens, default=None)),
        kinds=[shapes.AttentionKind(ropes[kind][0]) for kind in kinds],
        window=config.window(used=SLIDING in kinds),
        qkv_bias=bias,
        output_bias=bias,
        norms=BEHIND,
        head_norms="together",
    )


@family(
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
def phi3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Phi-3, 3.5 and 4, with fused q, k and v, fused gate and up, and partly rotated heads."""
    original, names = config.size("original_max_position_embeddings"), {"su": "longrope", "yarn": "longrope"}
    rope = read_rope(config, partial=True, original_positions=original, other_names=names)
    return gated_decoder(config, rope=rope, window=config.window(), fused=True)


@family(**_QWEN_DEFAULTS)
def qwen2(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Qwen1.5, Qwen2 and Qwen2.5, with a bias on query, key and value but not on the output."""
    return gated_decoder(config, window=window_of_last_layers(config), qkv_bias=True)


@family(**_QWEN_DEFAULTS, head_dim=128)
def qwen3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of dense Qwen3 models, with an RMS norm on each query and key head before the rotation."""
    bias, window = config.flag("attention_bias"), window_of_last_layers(config)
    return gated_decoder(config, window=window, qkv_bias=bias, output_bias=bias, head_norms="each")


@family(
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_theta=2000000.0,
    no_rope_layer_interval=4,
    tie_word_embeddings=True,
)
def smollm3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of SmolLM3: LLaMA layers, some without rotation of queries and keys."""
    bias = config.flag("attention_bias")
    num_layers, interval = config.size("num_hidden_layers"), config.size("no_rope_layer_interval")
    rotates = config.get("no_rope_layers")  # 1 is a layer with rotation, despite the name of the field
    if rotates is None:
        rotates = [int(layer % interval != 0) for layer in range(1, num_layers + 1)]
    if not isinstance(rotates, list) or len(rotates) != num_layers or not {*map(repr, rotates)} <= {"0", "1"}:
        wanted = f"a list of {num_layers} zeros and ones. Correct the field"
        raise config.error(f"no_rope_layers = {shown(rotates)} is not {wanted}")
    rope = read_rope(config)
    window = config.window(used=config.flag("use_sliding_window"))
    blocks = [shapes.AttentionKind(rope[0] if rotated else None) for rotated in rotates]
    return gated_decoder(config, rope=rope, window=window, qkv_bias=bias, output_bias=bias, kinds=blocks)


@family(
    vocab_size=50304,
    hidden_size=2560,
    intermediate_size=6912,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    layer_norm_eps=1e-5,
    partial_rotary_factor=0.25,
)
def stablelm(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of StableLM 2 and NVIDIA's GPT-2B-001, with biased LayerNorms and partly rotated heads."""
    rope, eps = read_rope(config, partial=True), config.small_number("layer_norm_eps")
    return gated_decoder(config, rope=rope, norm_eps=eps, qkv_bias=config.flag("use_qkv_bias"))
