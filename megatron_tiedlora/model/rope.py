"""Rotary position embedding in the half-rotation convention of Hugging Face, with the Llama-3 scaling.

angle(p, i) = p * f_i, f_i = theta^(-2 i / head_dim); (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the two halves
of each head. Frequencies and angles are fp32, as in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from megatron_tiedlora.base.errors import UserError, shown

_LARGEST = 1e30  # of a number here, so that fp32 holds it


@dataclass(frozen=True)
class RopeConfig:
    """Base frequency and, for Llama 3, how low frequencies are stretched (factor None: no scaling)."""

    theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    @staticmethod
    def from_hf(values: Mapping[str, Any], *, source: str) -> RopeConfig:
        """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before). Raises UserError.

        Where both are there, `rope_scaling` counts, as in transformers.
        """
        scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
        if not isinstance(scaling, Mapping):
            raise UserError(f"{source}: rope_parameters or rope_scaling is {shown(scaling)}, not an object")
        theta = scaling.get("rope_theta", values.get("rope_theta") or 10000.0)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if scaling.get("partial_rotary_factor", 1.0) != 1.0:
            found = shown(scaling["partial_rotary_factor"])
            raise UserError(f"{source}: partial_rotary_factor = {found} is not implemented")
        if kind in (None, "default"):
            return _checked(RopeConfig(theta), source)
        if kind != "llama3":
            raise UserError(f"{source}: rope_type {shown(kind)} is not implemented; 'default' and 'llama3' are")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for name in names:
            if name not in scaling:
                raise UserError(f"{source}: {name} is missing")
        return _checked(RopeConfig(theta, *(scaling[name] for name in names)), source)


def _checked(config: RopeConfig, source: str) -> RopeConfig:
    """The same with floats for floats; raises UserError where a number is none, or gives frequencies that are none."""
    for field in fields(config):
        value = getattr(config, field.name)
        if (value is not None or field.name != "factor") and not (type(value) in (int, float) and 0 < value < _LARGEST):
            raise UserError(f"{source}: of the rotary embedding, {field.name} = {shown(value)} is no number above 0")
    if config.factor is not None and config.low_freq_factor >= config.high_freq_factor:
        low, high = config.low_freq_factor, config.high_freq_factor
        raise UserError(f"{source}: low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeConfig(
        float(config.theta),
        None if config.factor is None else float(config.factor),
        float(config.low_freq_factor),
        float(config.high_freq_factor),
        int(config.original_max_positions),
    )


def inverse_frequencies(config: RopeConfig, head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """f_i, (head_dim / 2,) fp32.

    Llama 3's scaling: wavelengths beyond original / low_freq_factor are stretched by `factor`, those under
    original / high_freq_factor are kept, and between them the two are blended linearly.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (config.theta**exponents)
    if config.factor is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    blend = (config.original_max_positions / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - blend) * frequencies / config.factor + blend * frequencies
    low = wavelengths > config.original_max_positions / config.low_freq_factor
    high = wavelengths < config.original_max_positions / config.high_freq_factor
    scaled = torch.where(low, frequencies / config.factor, frequencies)
    return torch.where(~low & ~high, blended, scaled)


def rotation_table(
    positions: torch.Tensor, config: RopeConfig, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, each (b s, 1, head_dim / 2) in `dtype`, from positions (b, s)."""
    frequencies = inverse_frequencies(config, head_dim, positions.device)
    angles = positions.reshape(-1, 1, 1).float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
