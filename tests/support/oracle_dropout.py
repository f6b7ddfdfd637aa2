"""The oracle's dropout of an adapter's input, in NumPy's 32-bit integers, token by token.

It imports nothing from the package it judges. The rule: a run draws from SHA-256 of "SEED:NAME"; a token has a number;
feature j of the input of a target in a layer is kept where a hash of the token's key and of j is at least p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor


def _hash(words: np.ndarray) -> np.ndarray:
    """The hashes of 32-bit values by C. Wellons' constants; products wrap."""
    words = words ^ words >> np.uint32(15)
    words = words * np.uint32(0x2C1B3C6D)
    words = words ^ words >> np.uint32(12)
    words = words * np.uint32(0x297A2D39)
    return words ^ words >> np.uint32(15)


def _drawn(seed: int, name: str) -> int:
    """63 bits of a run's stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") // 2


def kept(numbers: Sequence[int], *, seed: int, layer: int, target: str, width: int, probability: float) -> np.ndarray:
    """(tokens, width) bool."""
    run, salt = _drawn(seed, "dropout"), _drawn(seed, f"dropout.{layer}.{target}") % 2**32
    columns = _hash(np.arange(width, dtype=np.uint32) ^ np.uint32(salt))
    low, high = (np.array([part(n) for n in numbers], np.uint32) for part in (lambda n: n % 2**32, lambda n: n >> 32))
    keys = _hash(_hash(low ^ np.uint32(run % 2**32)) ^ high ^ np.uint32(run >> 32))
    return _hash(keys[:, None] ^ columns) >= round(probability * 2**32)


def dropout(numbers: Sequence[int], *, seed: int, probability: float) -> Callable[[Tensor, int, str], Tensor]:
    """The dropout of a sequence of tokens with these numbers, as `oracle_logits` takes it."""
    share = 1 - round(probability * 2**32) / 2**32

    def drop(x: Tensor, layer: int, target: str) -> Tensor:
        mask = kept(numbers, seed=seed, layer=layer, target=target, width=x.shape[1], probability=probability)
        return x * torch.from_numpy(mask).to(x.dtype) / share

    return drop
