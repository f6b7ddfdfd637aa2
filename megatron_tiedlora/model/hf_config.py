"""Read a Hugging Face `config.json` field by field. Each field is used, known to be harmless, or rejected by name.

The field `quantization_config` describes the storage format of the weights. This module supports 4-bit folders of
bitsandbytes (nf4), and fp8 folders with one scale per row or tensor (compressed-tensors and fbgemm_fp8). Only their
weights are used. Settings for the rounding of activations are ignored.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.files import read_json_object
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import LengthLimit, LongRopeScaling, RopeScaling, RopeShape, YarnScaling

# Fields that do not change the computation: transformers writes them, or they are about tokens, generation or training.
_HARMLESS_FIELDS = """
_attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern add_cross_attention
architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
forced_bos_token_id forced_eos_token_id id2label ignore_keys_at_rope_validation initializer_range is_decoder
is_encoder_decoder is_llama_config label2id length_penalty max_length max_sequence_length max_window_layers min_length
model_type name_or_path neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams num_labels
num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp
problem_type pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed unsloth_version
use_bfloat16 use_cache use_safetensors
"""
_HARMLESS = frozenset(_HARMLESS_FIELDS.split())
# Features that are not implemented, with the values that switch them off; null also switches them off.
_OFF: dict[str, Any] = {
    **dict.fromkeys(("attention_bias", "lm_head_bias", "mlp_bias", "rope_interleaved"), False),
    **dict.fromkeys(("qk_layernorm", "use_mrope", "use_parallel_residual", "use_qk_norm", "use_sliding_window"), False),
    "use_bidirectional_attention": False,
    **dict.fromkeys(("attention_dropout", "embd_pdrop", "hidden_dropout", "resid_pdrop"), 0),
    **dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1),
    **dict.fromkeys(("full_attn_mod", "interpolate_factor"), 1),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "num_local_experts", "sliding_window"), None),
    "quantization_config": None,
}
# These sizes are larger than any model. They limit the size of the name table and the number of weights.
_LARGEST_SIZE, _LARGEST = 2**28, {"num_hidden_layers": 4096}
_LARGEST_NUMBER = 1e30  # fp32 can represent it
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers


@dataclass(eq=False)
class HfConfig:
    """The fields of one config. The object records which fields have been read.

    Attributes:
        source: the name of the file in error messages.
        defaults: the family's values of absent fields.
        of: text that follows the name of a field in error messages.
        names: the names of the stored tensors, see `shape_from_hf`.
    """

    values: Mapping[str, Any]
    source: str
    defaults: Mapping[str, Any]
    of: str = ""
    names: Collection[str] = ()
    _read: set[str] = field(default_factory=lambda: {"model_type"})

    def get(self, name: str, otherwise: Any = None) -> Any:
        """Return the value of a field. If it is absent, return the family's default, or `otherwise` without one."""
        self._read.add(name)
        return self.values.get(name, self.defaults.get(name, otherwise))

    def size(self, name: str, otherwise: int | None = None) -> int:
        """Return a positive integer, or `otherwise` for null. Raise UserError for any other value."""
        value = self.get(name)
        value = otherwise if value is None else value
        largest = _LARGEST.get(name, _LARGEST_SIZE)
        if type(value) is not int or not 1 <= value <= largest:
            raise self._wrong(name, value, f"is not an integer from 1 to {largest}")
        return value

    def small_number(self, name: str) -> float:
        """Return a number from 0 to 1. Raise UserError for any other value."""
        value = self.get(name)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise self._wrong(name, value, "is not a number from 0 to 1")
        return float(value)

    def flag(self, name: str, otherwise: bool = False) -> bool:
        """Return true or false, or `otherwise` (see `get`); null counts as false. Raise UserError for other values."""
        value = self.get(name, otherwise)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "is neither true nor false")
        return bool(value)

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number, or `default` if the field is null or absent. Raise UserError otherwise."""
        value = self.get(name)
        if value is None and default is None:
            raise self.error(f"{name}{self.of} is missing. Add this field")
        return self._positive(name, default if value is None else value)

    def optional(self, name: str) -> float | None:
        """Return a positive number, or None if the field is absent, null or 0. Raise UserError for any other value."""
        return self._positive(name, value) if (value := self.get(name)) else None

    def cap(self, name: str) -> float | None:
        """Return a positive number, or None if the field is null. Raise UserError for any other value."""
        return None if (value := self.get(name)) is None else self._positive(name, value)

    def row(self, name: str) -> tuple[float, ...]:
        """Return a list of positive numbers as a tuple. Raise UserError for any other value."""
        values = self.get(name)
        if not isinstance(values, list):
            raise self._wrong(name, values, "is not a list of numbers")
        return tuple(self._positive(name, value) for value in values)

    def _positive(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < _LARGEST_NUMBER:
            raise self._wrong(name, value, "is not a positive number")
        return float(value)

    def _wrong(self, name: str, value: Any, problem: str) -> UserError:
        return self.error(f"{name} = {shown(value)}{self.of} {problem}. Correct this field")

    def error(self, text: str) -> UserError:
        """Return an error whose message is the name of the config and `text`."""
        return UserError(f"{self.source}: {text}")

    def layer_types(self, window: int | None, default: Sequence[str] = ()) -> Sequence[str]:
        """Return the kind of each layer, `FULL` or `SLIDING`: `layer_types`, or `default` if this field is absent.

        All layers are `FULL` without a window. An empty default means that all layers of the family are alike. Raise
        UserError if the field is not a list with one kind for each layer, or if a kind is not implemented.
        """
        usual, num_layers = FULL if window is None else SLIDING, self.size("num_hidden_layers")
        known = {FULL, usual} if default else {usual}
        kinds = self.get("layer_types")
        kinds = [*(default or [usual] * num_layers)] if kinds is None else kinds
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            wanted = f"{num_layers} kinds of layers. Use a different model"
            raise self.error(f"layer_types = {shown(kinds)} is not a list of {wanted}")
        for kind in kinds:
            if not isinstance(kind, str) or kind not in known:
                allowed = f"Use a model with only {', '.join(sorted(known))}"
                raise self.error(f"layer_types has {shown(kind)}, which is not implemented. {allowed}")
        return kinds

    def reject_unread(self) -> None:
        """Reject fields that have not been read and are not known to be harmless, and features that are enabled.

        Raises:
            UserError: there is such a field; the message names the first one.
        """
        for name, value in self.values.items():
            if name in self._read or name in _HARMLESS or (name in _OFF and (value is None or value == _OFF[name])):
                continue
            if name == "quantization_config":
                stored_format(self.values, source=self.source)
                continue
            if name in _OFF:
                raise self.error(f"{name} = {shown(value)} is not implemented. Use a different model")
            field = f"the field {shown(name)} = {shown(value)} is unknown"
            raise self.error(f"{field}. Remove it if it does not change what the model computes")

    def window(self, *, used: bool = True) -> int | None:
        """Return the window of `SLIDING` layers (see `AttentionKind`), or None if it is null or not `used`."""
        return None if self.get("sliding_window") is None or not used else self.size("sliding_window")

    def alternating(self, every: int) -> list[str]:
        """Return the kinds of layers of which each `every`-th one has full attention, and the others a window."""
        return [SLIDING if layer % every else FULL for layer in range(1, self.size("num_hidden_layers") + 1)]


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the fields of `folder/config.json`. Raise UserError if it cannot be read."""
    return read_json_object(folder / "config.json", kind="a Hugging Face model folder or a hub id in --model")


# Storage formats ------------------------------------------------------------------------------------------------------

BITSANDBYTES, COMPRESSED, FBGEMM = "bitsandbytes", "compressed-tensors", "fbgemm_fp8"
_WHAT_TO_DO = (
    "Use the model with weights in bf16, fp16 or fp32, and quantise it with --base (formats that can be read:"
    " bitsandbytes in nf4, compressed-tensors and fbgemm_fp8 in fp8 with a scale per row or tensor)"
)


@dataclass(frozen=True)
class StoredFormat:
    """The storage format of the blocks' linears in a model folder.

    Attributes:
        method: the quant_method in the folder's config.
        base_format: the storage format, a name of `BASE_FORMATS`.
    """

    method: str
    base_format: str

    @property
    def in_words(self) -> str:
        """Return the format and the program that wrote it, as text for messages."""
        return f"{self.base_format} (by {self.method})"


def format_in_use(
    stored: StoredFormat | None, given: str | None, products: str | None = None, *, source: str
) -> str | None:
    """Return the storage format of the blocks' linears in a run: `given`, or the folder's format if it has one.

    Args:
        given: the value of --base. products: the value of --products.
        source: the name of the model in messages.

    Raises:
        UserError: the given format differs from the folder's, or `products` needs a different format.
    """
    if stored is not None and given not in (None, stored.base_format):
        raise UserError(
            f"--base {given}: the weights of {source} are already in {stored.in_words} and cannot be quantised again."
            " Remove --base, or use the model with 16-bit weights"
        )
    found = given if stored is None else stored.base_format
    if products is not None and found != products:
        base = "the linears of this base are not quantised" if found is None else f"this base is in {found}"
        raise UserError(f"--products {products} needs --base {products}, but {base}. Remove --products")
    return found


def stored_format(values: Mapping[str, Any], *, source: str) -> StoredFormat | None:
    """Return the storage format of a folder according to its config, or None if nothing is quantised.

    Args:
        source: the name of the config in messages.

    Raises:
        UserError: the format cannot be read.
    """
    config = values.get("quantization_config")
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    why = ""
    if isinstance(config, Mapping) and isinstance(method, str) and method in _CHECKS:
        base, why = _CHECKS[method](config)
        if not why:
            return StoredFormat(method, base)
    detail = f" ({why})" if why else ""
    raise UserError(
        f"{source}: quantization_config: weights quantised by {shown(method)}{detail} cannot be read. {_WHAT_TO_DO}"
    )


def _bitsandbytes(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the format, and the reason why it cannot be read ('' if it can)."""
    kind, storage = config.get("bnb_4bit_quant_type"), config.get("bnb_4bit_quant_storage") or "uint8"
    if not config.get("load_in_4bit"):
        return "", "load_in_4bit is not true"
    if kind != "nf4":
        return "", f"bnb_4bit_quant_type is {shown(kind)}, not 'nf4'"
    return "nf4", "" if storage == "uint8" else f"bnb_4bit_quant_storage is {shown(storage)}, not 'uint8'"


def _compressed(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the format, and the reason why it cannot be read ('' if it can)."""
    groups, sparsity = config.get("config_groups"), config.get("sparsity_config") or {}
    if not isinstance(groups, Mapping) or not groups:
        return "", "it has no config_groups"
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            return "", f"{shown(name)} has no weights"
        bits, kind, strategy = (weights.get(field) for field in ("num_bits", "type", "strategy"))
        if (bits, kind) != (8, "float"):
            return "", f"{shown(name)} has {shown(bits)} bits of type {shown(kind)}, not 8 of 'float'"
        if strategy not in ("channel", "tensor"):
            return "", f"the strategy of {shown(name)} is {shown(strategy)}, not 'channel' or 'tensor'"
        if weights.get("symmetric", True) is not True:
            return "", f"{shown(name)} is not symmetric"
    if not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense":
        return "", "its weights are sparse"
    if config.get("transform_config"):
        return "", "it transforms weights"
    return "fp8", ""


_CHECKS: dict[str, Callable[[Mapping[str, Any]], tuple[str, str]]] = {
    BITSANDBYTES: _bitsandbytes,
    COMPRESSED: _compressed,
    FBGEMM: lambda config: ("fp8", ""),  # it has only one scheme
}


# Rotary embedding -----------------------------------------------------------------------------------------------------
#
# The kind, numbers and limits of the rotary embedding are in `rope_parameters` (transformers 5), or in `rope_theta` and
# `rope_scaling` (before 5), which take precedence. An absent number means the same as in transformers'
# `modeling_rope_utils`.


Rope = tuple[RopeShape, LengthLimit | None]
_KNOWN = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
        "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
        "rope_type", "short_factor", "truncate", "type",
    }
)  # fmt: skip


def rope_fields(config: HfConfig, values: Any) -> dict[str, Any]:
    """Return the fields of an object, or {} for null. Raise UserError for any other value."""
    if not isinstance(values or {}, Mapping):
        raise config.error(f"rope_parameters or rope_scaling is {shown(values)}, not an object. Correct this field")
    return dict(values or {})


def read_rope(
    config: HfConfig,
    *,
    values: Mapping[str, Any] | None = None,
    partial: bool = False,
    original_positions: int | None = None,
    other_names: Mapping[str, str] | None = None,
) -> Rope:
    """Return the rotary embedding, and the length beyond which transformers uses different frequencies, or None.

    Args:
        values: the fields of the embedding; None to use the fields of the config.
        partial: whether models of the family may rotate only some elements of a head.
        original_positions: the value of the family's own field for the original length, which takes precedence.
        other_names: the kinds of scaling, by names that only this family uses.

    Raises:
        UserError: the kind of scaling is not implemented, or the fields do not define frequencies.
    """
    max_positions = config.size("max_position_embeddings")
    new = config.get("rope_parameters")
    values = rope_fields(config, config.get("rope_scaling") or new) if values is None else values
    for name in values:
        if name not in _KNOWN:
            raise config.error(f"{shown(name)} of the rotary embedding is not implemented. Use a different model")
    numbers = HfConfig(values, config.source, {"truncate": True}, of=" of the rotary embedding")
    theta = numbers.number("rope_theta", config.get("rope_theta") or 10000.0)
    absent_fraction = config.get("partial_rotary_factor")
    fraction = numbers.number("partial_rotary_factor", 1.0 if absent_fraction is None else absent_fraction)
    if fraction > 1 or (fraction != 1 and not partial):
        raise config.error(f"partial_rotary_factor = {fraction:g} is not implemented. Use a different model")
    kind = values.get("rope_type", values.get("type")) or "default"
    kind = (other_names or {}).get(str(kind), kind)
    if kind in ("default", "dynamic"):  # dynamic scaling begins after the trained length, and longer rows are rejected
        return RopeShape(theta, fraction), None
    reader = _READERS.get(str(kind))
    if reader is None:
        known = ", ".join(sorted(["default", "dynamic", *_READERS]))
        raise config.error(f"rope_type {shown(kind)} is not implemented. Use a model with one of: {known}")
    original = int(original_positions or numbers.number("original_max_position_embeddings", max_positions))
    if original < 1:
        raise config.error("original_max_position_embeddings is below 1. Correct this field")
    scaling = reader(numbers, max_positions, original)
    if isinstance(scaling, YarnScaling) and theta <= 1:
        raise config.error(f"rope_theta = {theta} must be above 1 for yarn. Correct this field")
    limit = None
    if isinstance(scaling, LongRopeScaling):
        why = f"has different frequencies beyond {original} tokens (original_max_position_embeddings)"
        limit = LengthLimit(original, f"{why}. Longer rows are not implemented")
    return RopeShape(theta, fraction, scaling), limit


def read_ropes(config: HfConfig, theta: float, local_theta: float) -> tuple[Rope, RopeShape]:
    """Return the result of `read_rope` for layers with full attention, and the embedding of layers with a window.

    Both have an entry in `rope_parameters`. `rope_theta` and `rope_scaling` apply to full attention. `theta` and
    `local_theta` are used if the config has no base.
    """
    by_kind = rope_fields(config, config.get("rope_parameters"))
    if others := by_kind.keys() - {FULL, SLIDING}:
        problem = f"rope_parameters has {shown(min(others))}, which is neither {FULL} nor {SLIDING}"
        raise config.error(f"{problem}. Give each kind of layer its own parameters")
    fields = by_kind.get(FULL), by_kind.get(SLIDING), config.get("rope_scaling")
    full, sliding, scaling = (rope_fields(config, own) for own in fields)
    full = {"rope_theta": config.get("rope_theta") or theta, **full, **scaling}
    rope, limit = read_rope(config, values=full)
    local, local_limit = read_rope(config, values={"rope_theta": local_theta, **sliding})
    limits = [one for one in (limit, local_limit) if one is not None]
    return (rope, min(limits, key=lambda one: one.tokens, default=None)), local


def _llama3(numbers: HfConfig, max_positions: int, original: int) -> RopeScaling:
    low, high = numbers.number("low_freq_factor"), numbers.number("high_freq_factor")
    if low >= high:
        raise numbers.error(f"low_freq_factor {low} is not below high_freq_factor {high}. Correct one of them")
    return shapes.Llama3Scaling(numbers.number("factor"), low, high, original)


def _yarn(numbers: HfConfig, max_positions: int, original: int) -> RopeScaling:
    factor = numbers.number("factor", max_positions / original)
    scale, scale_all = numbers.optional("mscale"), numbers.optional("mscale_all_dim")

    def amplitude(times: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0

    derived = amplitude(scale) / amplitude(scale_all) if scale and scale_all else amplitude(1.0)
    return YarnScaling(
        factor,
        original,
        numbers.optional("beta_fast") or 32.0,
        numbers.optional("beta_slow") or 1.0,
        numbers.flag("truncate"),
        numbers.number("attention_factor", derived),
    )


def _longrope(numbers: HfConfig, max_positions: int, original: int) -> RopeScaling:
    factor = numbers.number("factor", max_positions / original)
    numbers.row("long_factor")  # for rows over the original length, which are rejected
    derived = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(numbers.row("short_factor"), numbers.number("attention_factor", derived))


_READERS: dict[str, Callable[[HfConfig, int, int], RopeScaling]] = {
    "linear": lambda numbers, *_: shapes.LinearScaling(numbers.number("factor")),
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
