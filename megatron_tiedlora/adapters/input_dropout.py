"""--dropout: the adapter's input x becomes x * kept / (1 - p), where `kept` depends on no layout, device or packing.

    z = W x + F A (x * kept) / (1 - p)

Whether feature j of a token is kept follows from the run's seed, the token's number (which step and sample, and where
in the sample, see `data/loader.py`), the layer, the target and j. It is computed where it is used, in the forward and
again in the backward pass, so nothing is saved, no random state exists, and a rank computes it for its own tokens and
features alone. All integers are 32-bit values in int64 lanes that never overflow, so they are the same everywhere:

    kept = mix(key(token) ^ mix(j ^ salt(layer, target))) >= p * 2^32
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_tiedlora.parallel.kernels import NUMBERS_AT_ONCE
from megatron_tiedlora.parallel.shard_spec import stream_seed

_WORD = 2**32 - 1
_HOST_NUMBERS_AT_ONCE = 2**16  # on a CPU the integers of a part then stay in its cache


def mix_(words: torch.Tensor) -> torch.Tensor:
    """Replace 32-bit values in an int64 tensor by hashed ones, one to one. (A hash of C. Wellons' prospector.)"""
    words ^= words >> 15
    words.mul_(0x2C1B3C6D).bitwise_and_(_WORD)  # factors below 2^30, so no product reaches 2^63
    words ^= words >> 12
    words.mul_(0x297A2D39).bitwise_and_(_WORD)
    words ^= words >> 15
    return words


def token_keys(numbers: torch.Tensor, *, seed: int) -> torch.Tensor:
    """The key of each token, 32 bits in int64, from the tokens' numbers, int64 and not negative."""
    salt = stream_seed(seed, "dropout")
    low = mix_((numbers & _WORD) ^ (salt & _WORD))
    return mix_(low ^ (numbers >> 32) ^ (salt >> 32))


@dataclass(frozen=True)
class InputDropout:
    """Which inputs of one linear's adapter are kept, for the tokens of a micro-batch on one rank.

    Attributes:
        keys: of all tokens of the micro-batch in order, (b s,) int64.
        local_keys: of this rank's part of the sequence, (b s / p,).
        salt: differs between layers and targets, 32 bits.
        first: this rank's first input feature; not 0 where the linear's columns are sharded.
        probability: p, of an input to be dropped.
    """

    keys: torch.Tensor
    local_keys: torch.Tensor
    salt: int
    first: int
    probability: float

    def of_whole(self, rows: torch.Tensor) -> torch.Tensor:
        """`rows` (b s, n) of all tokens, with dropped elements at 0 and the others divided by 1 - p."""
        return self._dropped(rows, self.keys)

    def of_local(self, rows: torch.Tensor) -> torch.Tensor:
        """The same for `rows` (b s / p, n) of this rank's part of the sequence."""
        return self._dropped(rows, self.local_keys)

    def at(self, rows: torch.Tensor | slice, local_rows: torch.Tensor | slice) -> InputDropout:
        """The same for some tokens only: `rows` are indices into `keys`, `local_rows` into `local_keys`."""
        return replace(self, keys=self.keys[rows], local_keys=self.local_keys[local_rows])

    def _dropped(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        assert len(rows) == len(keys), "rows of other tokens"
        width = rows.shape[1]
        columns = mix_(torch.arange(self.first, self.first + width, device=rows.device) ^ self.salt)
        least, result = round(self.probability * 2**32), torch.empty_like(rows)
        scale = 1 / (1 - least / 2**32)
        size = max(1, (NUMBERS_AT_ONCE if rows.is_cuda else _HOST_NUMBERS_AT_ONCE) // width)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            kept = mix_(keys[part, None] ^ columns) >= least
            torch.mul(rows[part], scale, out=result[part]).masked_fill_(~kept, 0)
        return result


def dropout_salt(seed: int, *, layer: int, target: str) -> int:
    """The salt of a target in a 1-based layer."""
    return stream_seed(seed, f"dropout.{layer}.{target}") & _WORD
