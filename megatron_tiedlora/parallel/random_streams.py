"""Initial values that do not depend on the layout: full tensors are drawn from a seed and a name, then sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def stream_seed(seed: int, name: str) -> int:
    """A 63-bit seed for the random stream `name` of a run with `seed`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_normal(shape: Sequence[int], *, std: float, seed: int, name: str) -> torch.Tensor:
    """A full fp32 tensor of N(0, std^2) on the CPU; equal arguments give equal bits for every layout and device."""
    generator = torch.Generator(device="cpu").manual_seed(stream_seed(seed, name))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32) * std
