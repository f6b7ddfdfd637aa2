"""An oracle in Python of the token that a sampler chooses from some logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_tiedlora.evaluation.sampling import Sampling
from support.oracle_adapter import hashed, keys_of


def noise(seed: int, row: int, position: int, num_tokens: int) -> list[float]:
    """The Gumbel noise of each token of the vocabulary."""
    high, low = (keys_of([(row << 32) + position], seed=seed, name=f"sampling.{half}") for half in ("high", "low"))
    first = hashed(high ^ hashed(np.arange(num_tokens, dtype=np.uint32)))
    numbers = hashed(first ^ low).astype(np.float64) * 2**20 + (first >> 12)
    found: list[float] = (-np.log(-np.log((numbers + 0.5) / 2**52))).tolist()
    return found


def nucleus(logits: Sequence[float], temperature: float, top_p: float, top_k: int = 0) -> dict[int, float]:
    """The tokens that may be sampled, most likely first and smaller ids first, and the probability of each of them."""
    most = max(logits)
    weights = [math.exp((logit - most) / temperature) for logit in logits]
    best = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[: top_k or None]
    kept: dict[int, float] = {}
    for token in best:
        kept[token] = weights[token]
        if math.fsum(kept.values()) >= top_p * math.fsum(weights[token] for token in best):
            break
    return {token: weight / math.fsum(kept.values()) for token, weight in kept.items()}


def expected_token(logits: Sequence[float], row: int, position: int, how: Sampling) -> int:
    """The most likely token, or the one with the largest sum of score and noise."""
    if how.temperature == 0:
        return max(range(len(logits)), key=logits.__getitem__)
    kept = nucleus(logits, how.temperature, how.top_p, how.top_k)
    added = noise(how.seed, row, position, len(logits))
    return max(kept, key=lambda token: logits[token] / how.temperature + added[token])
