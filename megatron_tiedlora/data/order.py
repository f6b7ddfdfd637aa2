"""The order of samples: a pure function of seed, epoch and how many samples were consumed.

Built on PCG64's raw stream and a stable sort, both of which NumPy promises to keep between versions
(it does not promise that of `Generator.permutation`), so a run can be resumed under a newer NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def permutation(num_items: int, *, seed: int, stream: int) -> NDArray[np.int64]:
    """Return a permutation of range(num_items), (num_items,) int64, that depends on (seed, stream) only."""
    words = [seed % 2**64, stream]
    raw = np.random.PCG64(np.random.SeedSequence(words)).random_raw(num_items)
    return np.argsort(raw, kind="stable").astype(np.int64)


def sample_indices(num_samples: int, *, seed: int, consumed: int, count: int) -> NDArray[np.int64]:
    """Return the `count` sample indices that come after the first `consumed` ones, (count,) int64.

    Each epoch is its own permutation of all samples, and a request may span several of them, so a data set
    smaller than a global batch is walked more than once.

    Raises ValueError when there is no sample to draw.
    """
    if num_samples < 1:
        raise ValueError("cannot draw samples from an empty data set")
    epoch, offset = divmod(consumed, num_samples)
    parts: list[NDArray[np.int64]] = []
    missing = count
    while missing > 0:
        part = permutation(num_samples, seed=seed, stream=epoch)[offset : offset + missing]
        parts.append(part)
        missing -= len(part)
        epoch, offset = epoch + 1, 0
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
