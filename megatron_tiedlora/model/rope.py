"""Rotary position embedding in the half-rotation convention of Hugging Face.

angle(p, i) = p * f_i, f_i = theta^(-2 i / n); (x1, x2) -> a (x1 cos - x2 sin, x2 cos + x1 sin) over the two halves of
the first n elements of each head. Frequencies and angles are fp32, as in transformers. Scaling changes f_i and a.
"""

from __future__ import annotations

import math
from functools import singledispatch

import torch

from megatron_tiedlora.base.shapes import (
    HeadShape,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeScaling,
    YarnScaling,
)


def inverse_frequencies(heads: HeadShape, device: torch.device | None = None) -> torch.Tensor:
    """f_i, (rotary_dim / 2,) fp32."""
    exponents = torch.arange(0, heads.rotary_dim, 2, dtype=torch.int64, device=device).float() / heads.rotary_dim
    powers = heads.rope.theta**exponents
    return _scaled(heads.rope.scaling, powers, heads)


def amplitude(scaling: RopeScaling | None) -> float:
    """a: what cos and sin are multiplied by."""
    return scaling.amplitude if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0


def rotation_table(positions: torch.Tensor, heads: HeadShape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """a cos and a sin of the angles of all positions (b, s), each (b s, 1, rotary_dim / 2) in `dtype`."""
    angles = positions.reshape(-1, 1, 1).float() * inverse_frequencies(heads, positions.device)
    factor = amplitude(heads.rope.scaling)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


@singledispatch
def _scaled(scaling: RopeScaling | None, powers: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    """The frequencies from theta^(2 i / n)."""
    return 1.0 / powers


@_scaled.register
def _linear(scaling: LinearScaling, powers: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    return 1.0 / powers / scaling.factor


@_scaled.register
def _llama3(scaling: Llama3Scaling, powers: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    """Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor
    stay unchanged, and between them the two are blended linearly."""
    frequencies = 1.0 / powers
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    low = wavelengths > scaling.original_max_positions / scaling.low_freq_factor
    high = wavelengths < scaling.original_max_positions / scaling.high_freq_factor
    scaled = torch.where(low, frequencies / scaling.factor, frequencies)
    return torch.where(~low & ~high, blended, scaled)


@_scaled.register
def _yarn(scaling: YarnScaling, powers: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    """Frequencies that turn more than `beta_fast` times over the original positions stay, those that turn less than
    `beta_slow` times are divided by `factor`, and between them a ramp over the indices blends the two."""
    size, theta = heads.rotary_dim, heads.rope.theta

    def index_of(rotations: float) -> float:
        return size * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001  # as in transformers: no division by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1).to(powers.device)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


@_scaled.register
def _longrope(scaling: LongRopeScaling, powers: torch.Tensor, heads: HeadShape) -> torch.Tensor:
    return 1.0 / (torch.tensor(scaling.factors, dtype=torch.float32, device=powers.device) * powers)
