"""The rotary embedding that a Hugging Face `config.json` describes: its kind, its numbers, and how far it reaches.

`rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before 5), which take precedence. What an absent
number means is what transformers' `modeling_rope_utils` means by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.shapes import (
    LengthLimit,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    RopeShape,
    YarnScaling,
)
from megatron_tiedlora.model.hf_config import HfConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
_LARGEST_NUMBER = 1e30  # fp32 can hold it
_KNOWN = frozenset(
    {
        "attention_factor", "beta_fast", "beta_slow", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
        "mscale", "mscale_all_dim", "original_max_position_embeddings", "partial_rotary_factor", "rope_theta",
        "rope_type", "short_factor", "truncate", "type",
    }
)  # fmt: skip


class _Numbers:
    """The numbers of one rotary embedding. Each is checked as it is read."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; null is absent. Raises UserError for another one, or if it is absent without a default."""
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise UserError(f"{self.source}: {name} of the rotary embedding is missing")
        return self.checked(name, value)

    def checked(self, name: str, value: Any) -> float:
        """`value` as a positive number. Raises UserError."""
        if type(value) not in (int, float) or not 0 < value < _LARGEST_NUMBER:
            raise UserError(f"{self.source}: {name} = {shown(value)} of the rotary embedding is not a positive number")
        return float(value)

    def optional(self, name: str) -> float | None:
        """A positive number; None if it is absent, null or 0. Raises UserError."""
        return self.checked(name, value) if (value := self._values.get(name)) else None

    def row(self, name: str) -> tuple[float, ...]:
        """A list of positive numbers. Raises UserError."""
        values = self._values.get(name)
        if not isinstance(values, list):
            raise UserError(f"{self.source}: {name} = {shown(values)} of the rotary embedding is not a list of numbers")
        return tuple(self.checked(name, value) for value in values)

    def flag(self, name: str, default: bool) -> bool:
        """True or false. Raises UserError."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{self.source}: {name} = {shown(value)} of the rotary embedding is neither true nor false")
        return value


def read_ropes_by_kind(config: HfConfig, *, theta: float) -> dict[str, tuple[RopeShape, LengthLimit | None]]:
    """The rotary embeddings of `full_attention` and of `sliding_attention` layers, each as `read_rope` returns it.

    `rope_parameters` has one for each. `rope_theta` and `rope_scaling` are those of full attention.

    Args:
        theta: where a kind has none.

    Raises:
        UserError: as `read_rope` does.
    """
    by_kind, older = _fields(config, config.get("rope_parameters")), config.get("rope_scaling")
    full, sliding, scaling = (_fields(config, v) for v in (by_kind.get(FULL), by_kind.get(SLIDING), older))
    full = {"rope_theta": config.get("rope_theta") or theta, **full, **scaling}
    return {
        FULL: read_rope(config, values=full),
        SLIDING: read_rope(config, values={"rope_theta": theta, **sliding}),
    }


def _fields(config: HfConfig, values: Any) -> dict[str, Any]:
    """The fields of an object; of null none. Raises UserError for anything else."""
    if not isinstance(values or {}, Mapping):
        raise UserError(f"{config.source}: rope_parameters or rope_scaling is {shown(values)}, not an object")
    return dict(values or {})


def read_rope(
    config: HfConfig,
    *,
    values: Mapping[str, Any] | None = None,
    partial: bool = False,
    original_positions: int | None = None,
    other_names: Mapping[str, str] | None = None,
) -> tuple[RopeShape, LengthLimit | None]:
    """The rotary embedding, and the length beyond which transformers would use other frequencies.

    Args:
        values: its fields; None for those of the config.
        partial: whether the family can rotate part of a head.
        original_positions: the family's own field for `original_max_position_embeddings`, which takes precedence.
        other_names: kinds of scaling by names that only this family has for them.

    Raises:
        UserError: the kind of scaling is not implemented, or numbers do not define frequencies.
    """
    max_positions = config.size("max_position_embeddings")
    new = config.get("rope_parameters")
    values = _fields(config, config.get("rope_scaling") or new) if values is None else values
    for name in values:
        if name not in _KNOWN:
            raise UserError(f"{config.source}: {shown(name)} of the rotary embedding is not implemented")
    numbers = _Numbers(values, config.source)
    theta = numbers.number("rope_theta", config.get("rope_theta") or 10000.0)
    absent_share = config.get("partial_rotary_factor")
    share = numbers.number("partial_rotary_factor", 1.0 if absent_share is None else absent_share)
    if share > 1 or (share != 1 and not partial):
        raise UserError(f"{config.source}: partial_rotary_factor = {share:g} is not implemented")
    kind = values.get("rope_type", values.get("type")) or "default"
    kind = (other_names or {}).get(str(kind), kind)
    if kind in ("default", "dynamic"):  # dynamic scaling begins beyond the trained length, where no row is accepted
        return RopeShape(theta, share), None
    reader = _READERS.get(str(kind))
    if reader is None:
        known = ", ".join(sorted(["default", "dynamic", *_READERS]))
        raise UserError(f"{config.source}: rope_type {shown(kind)} is not implemented. These are: {known}")
    original = int(original_positions or numbers.number("original_max_position_embeddings", max_positions))
    if original < 1:
        raise UserError(f"{config.source}: original_max_position_embeddings is below 1")
    scaling = reader(numbers, max_positions, original)
    if isinstance(scaling, YarnScaling) and theta <= 1:
        raise UserError(f"{config.source}: rope_theta = {theta} must be above 1 for yarn")
    limit = None
    if isinstance(scaling, LongRopeScaling):
        why = f"has other frequencies beyond {original} tokens (original_max_position_embeddings)"
        limit = LengthLimit(original, f"{why}. Longer rows are not implemented")
    return RopeShape(theta, share, scaling), limit


def _linear(numbers: _Numbers, max_positions: int, original: int) -> RopeScaling:
    return LinearScaling(numbers.number("factor"))


def _llama3(numbers: _Numbers, max_positions: int, original: int) -> RopeScaling:
    low, high = numbers.number("low_freq_factor"), numbers.number("high_freq_factor")
    if low >= high:
        raise UserError(f"{numbers.source}: low_freq_factor {low} is not below high_freq_factor {high}")
    return Llama3Scaling(numbers.number("factor"), low, high, original)


def _yarn(numbers: _Numbers, max_positions: int, original: int) -> RopeScaling:
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
        numbers.flag("truncate", True),
        numbers.number("attention_factor", derived),
    )


def _longrope(numbers: _Numbers, max_positions: int, original: int) -> RopeScaling:
    factor = numbers.number("factor", max_positions / original)
    numbers.row("long_factor")  # for rows beyond the original length, which are rejected
    derived = 1.0 if factor <= 1 or original == 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(numbers.row("short_factor"), numbers.number("attention_factor", derived))


_READERS: dict[str, Callable[[_Numbers, int, int], RopeScaling]] = {
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "yarn": _yarn,
}
