"""Rotary position embedding in the half-rotation convention of Hugging Face, with the Llama-3 scaling.

angle(p, i) = p * f_i, f_i = theta^(-2 i / head_dim); (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the two halves
of each head. Frequencies and angles are fp32, as in transformers.
"""

from __future__ import annotations

import math

import torch

from megatron_tiedlora.base.shapes import RopeShape


def inverse_frequencies(rope: RopeShape, head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """f_i, (head_dim / 2,) fp32.

    Llama 3's scaling: wavelengths above original / low_freq_factor are stretched by `factor`, wavelengths below
    original / high_freq_factor stay unchanged, and between them the two are blended linearly.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.factor is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    blend = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    low = wavelengths > rope.original_max_positions / rope.low_freq_factor
    high = wavelengths < rope.original_max_positions / rope.high_freq_factor
    scaled = torch.where(low, frequencies / rope.factor, frequencies)
    return torch.where(~low & ~high, blended, scaled)


def rotation_table(
    positions: torch.Tensor, rope: RopeShape, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles of all positions (b, s), each (b s, 1, head_dim / 2) in `dtype`."""
    frequencies = inverse_frequencies(rope, head_dim, positions.device)
    angles = positions.reshape(-1, 1, 1).float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)
