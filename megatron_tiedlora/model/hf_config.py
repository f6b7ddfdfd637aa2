"""A Hugging Face `config.json`, read field by field: a field is used, known to be harmless, or rejected by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.shapes import RopeShape

# Fields that do not change the computation: transformers writes them, or they concern tokens, generation or training.
_HARMLESS = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures",
        "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
        "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty",
        "finetuning_task", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder",
        "is_encoder_decoder", "is_llama_config", "label2id", "length_penalty", "max_length", "max_sequence_length",
        "min_length", "model_type", "name_or_path", "neftune_noise_alpha", "no_repeat_ngram_size", "num_beam_groups",
        "num_beams", "num_labels", "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores",
        "pad_token_id", "prefix", "pretraining_tp", "problem_type", "pruned_heads", "remove_invalid_values",
        "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "suppress_tokens",
        "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k",
        "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
        "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_safetensors",
    }
)
# Larger than any model. The limits keep the name table and numbers of weights within bounds.
_LARGEST_SIZE, _LARGEST = 2**28, {"num_hidden_layers": 4096}
_LARGEST_NUMBER = 1e30  # of the rotary embedding: fp32 can hold it


class HfConfig:
    """The fields of one config. It records which of them have been read.

    Attributes:
        source: the name of the file in error messages.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._values = values
        self._read = {"model_type"}

    def get(self, name: str, default: Any = None) -> Any:
        """The stored value of a field, or `default` if the field is absent."""
        self._read.add(name)
        return self._values.get(name, default)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer, or `default` if the field is absent or null.

        Raises:
            UserError: the field is missing without a default, or not such an integer.
        """
        value = self.get(name, default)
        if name not in self._values and value is None:
            raise UserError(f"{self.source}: {name} is missing")
        if value is None:
            value = default
        largest = _LARGEST.get(name, _LARGEST_SIZE)
        if type(value) is not int or not 1 <= value <= largest:
            raise UserError(f"{self.source}: {name} = {shown(value)} is not an integer from 1 to {largest}")
        return value

    def small_number(self, name: str, default: float) -> float:
        """A number from 0 to 1. Raises UserError."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise UserError(f"{self.source}: {name} = {shown(value)} is not a number from 0 to 1")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; null is false. Raises UserError."""
        value = self.get(name, default)
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{self.source}: {name} = {shown(value)} is neither true nor false")
        return bool(value)

    def reject_unless(self, name: str, *off: Any) -> None:
        """Reject a feature that is not implemented: the field must be absent, null or one of `off`.

        Raises:
            UserError: the field has another value.
        """
        value = self.get(name)
        if value is not None and value not in off:
            raise UserError(f"{self.source}: {name} = {shown(value)} is not implemented")

    def reject_other_layers(self) -> None:
        """Reject layers without full attention. Raises UserError."""
        kinds = self.get("layer_types") or []
        for kind in kinds if isinstance(kinds, list) else [kinds]:
            if kind != "full_attention":
                raise UserError(
                    f"{self.source}: layer_types has {shown(kind)}, which is not implemented. Only 'full_attention' is"
                )

    def reject_unread(self) -> None:
        """Reject fields that have not been read and are not known to be harmless.

        Raises:
            UserError: the name of the first such field.
        """
        for name, value in self._values.items():
            if name not in self._read and name not in _HARMLESS:
                raise UserError(
                    f"{self.source}: the field {shown(name)} = {shown(value)} is unknown. Remove it if it does not"
                    " change what the model computes"
                )

    def rope(self, head_dim: int) -> RopeShape:
        """`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before 5), which take precedence.

        Raises:
            UserError: the kind of scaling is not implemented, or numbers do not define frequencies.
        """
        if head_dim % 2:
            raise UserError(f"{self.source}: head_dim is {head_dim}, but rotary embedding needs an even number")
        new = self.get("rope_parameters")
        scaling, theta = self.get("rope_scaling") or new or {}, self.get("rope_theta") or 10000.0
        if not isinstance(scaling, Mapping):
            raise UserError(f"{self.source}: rope_parameters or rope_scaling is {shown(scaling)}, not an object")
        theta = scaling.get("rope_theta", theta)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            found = shown(scaling["partial_rotary_factor"])
            raise UserError(f"{self.source}: partial_rotary_factor = {found} is not implemented")
        if kind in (None, "default"):
            return self._checked_rope(RopeShape(theta))
        if kind != "llama3":
            raise UserError(f"{self.source}: rope_type {shown(kind)} is not implemented. 'default' and 'llama3' are")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for name in names:
            if name not in scaling:
                raise UserError(f"{self.source}: {name} is missing")
        return self._checked_rope(RopeShape(theta, *(scaling[name] for name in names)))

    def _checked_rope(self, rope: RopeShape) -> RopeShape:
        for field in fields(rope):
            value = getattr(rope, field.name)
            positive = type(value) in (int, float) and 0 < value < _LARGEST_NUMBER
            if (value is not None or field.name != "factor") and not positive:
                problem = f"{field.name} = {shown(value)} of the rotary embedding is not a positive number"
                raise UserError(f"{self.source}: {problem}")
        low, high = rope.low_freq_factor, rope.high_freq_factor
        if rope.factor is not None and low >= high:
            raise UserError(f"{self.source}: low_freq_factor {low} is not below high_freq_factor {high}")
        return RopeShape(
            float(rope.theta),
            None if rope.factor is None else float(rope.factor),
            float(low),
            float(high),
            int(rope.original_max_positions),
        )


def read_hf_config(folder: Path) -> dict[str, Any]:
    """The fields of `folder/config.json`. Raises UserError naming the file."""
    return read_json_object(folder / "config.json", kind="a Hugging Face model folder or a hub id in --model")
