"""The order of samples: a pure function of seed, epoch and number of consumed samples.

It uses PCG64's raw stream and a stable sort. NumPy promises that both stay the same between versions, unlike
`Generator.permutation`, so a run can be resumed with a newer NumPy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def permutation(num_items: int, *, seed: int, stream: int) -> NDArray[np.int64]:
    """Return a permutation of range(num_items), (num_items,) int64, that depends only on (seed, stream)."""
    words = [seed % 2**64, stream]
    raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(num_items)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=1)  # consecutive steps are in the same epoch, and sorting millions of numbers takes a second
def _epoch(num_items: int, seed: int, epoch: int) -> NDArray[np.unsignedinteger[Any]]:
    """`permutation` in the fewest bytes, since every rank holds it."""
    order = permutation(num_items, seed=seed, stream=epoch).astype(np.min_scalar_type(num_items))
    order.flags.writeable = False
    return order


def sample_indices(num_samples: int, *, seed: int, consumed: int, count: int) -> NDArray[np.int64]:
    """Return the `count` sample indices after the first `consumed` ones, (count,) int64.

    Each epoch is its own permutation of all samples. A request may span several epochs, so a global batch may be
    larger than the data set.

    Raises ValueError if there are no samples.
    """
    if num_samples < 1:
        raise ValueError("cannot draw samples from an empty data set")
    epoch, offset = divmod(consumed, num_samples)
    parts: list[NDArray[np.int64]] = []
    missing = count
    while missing > 0:
        part = _epoch(num_samples, seed, epoch)[offset : offset + missing]
        parts.append(part.astype(np.int64))
        missing -= len(part)
        epoch, offset = epoch + 1, 0
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
