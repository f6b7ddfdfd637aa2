"""The oracle's rotary embedding, frequency by frequency. Like the oracle it imports nothing from the package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def rope_frequencies(
    theta: float, size: int, scaling: Mapping[str, Any] | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(size / 2,) angles per position of the first `size` elements of a head.

    Args:
        scaling: None, or the fields of a config's `rope_parameters` with their defaults filled in.
    """
    exponents = torch.arange(0, size, 2).to(dtype) / size
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    kind = scaling["rope_type"]
    if kind == "linear":
        return torch.stack([frequency / scaling["factor"] for frequency in plain])
    if kind == "longrope":
        return torch.stack([f / divisor for f, divisor in zip(plain, scaling["short_factor"], strict=True)])
    blend = {"llama3": _llama3_share, "yarn": _yarn_share}[kind]
    stretched = []
    for index, frequency in enumerate(plain):
        share = blend(index, float(frequency), theta, size, scaling)
        stretched.append(share * frequency + (1 - share) * frequency / scaling["factor"])
    return torch.stack(stretched)


def _llama3_share(index: int, frequency: float, theta: float, size: int, scaling: Mapping[str, Any]) -> float:
    """1 for a fast frequency, 0 for a slow one, and linear in the number of turns in between."""
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return min(max((turns - low) / (high - low), 0.0), 1.0)


def _yarn_share(index: int, frequency: float, theta: float, size: int, scaling: Mapping[str, Any]) -> float:
    """1 before the index that turns beta_fast times, 0 after the one that turns beta_slow times, linear in between."""

    def at(turns: float) -> float:
        return size / 2 * math.log(scaling["original_max_position_embeddings"] / (2 * math.pi * turns), theta)

    first = max(math.floor(at(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(at(scaling.get("beta_slow", 1))), size - 1)
    return 1 - min(max((index - first) / max(last - first, 0.001), 0.0), 1.0)


def rope_amplitude(scaling: Mapping[str, Any] | None, max_positions: int) -> float:
    """What cosines and sines are multiplied by."""
    if scaling is None or scaling["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor"):
        return float(scaling["attention_factor"])
    if scaling["rope_type"] == "yarn":
        return 0.1 * math.log(scaling["factor"]) + 1
    original = scaling["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(max_positions / original) / math.log(original))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs at the beginning of x (S, head_dim), HF's half-rotation; cos and sin (S, n / 2) turn n elements."""
    size = cos.shape[-1]
    first, second, rest = x[:, :size], x[:, size : 2 * size], x[:, 2 * size :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
