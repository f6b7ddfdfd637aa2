"""The storage formats of a quantised base as data: this table says how many bits a weight has and where scales lie.

Only the weights of the blocks' linears are quantised. Embedding, head, norms, biases and the adapter are not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FP8_CAPABILITY = (8, 9)  # the least compute capability of a GPU that multiplies in fp8


@dataclass(frozen=True)
class BaseFormat:
    """A storage format: one row of the table.

    Attributes:
        bits: bits of a code.
        block: how many weights, which follow each other in a row, have a scale in common; None for a whole row. The
            last block of a row may be shorter. A scale belongs to the block or row of the full tensor, even if
            tensor parallelism shards that.
    """

    name: str
    bits: int
    block: int | None

    def row_bytes(self, width: int) -> int:
        """The bytes of the codes in a row of `width` weights. A row begins with a byte of its own."""
        return -(-width * self.bits // 8)

    def row_scales(self, width: int, *, shards_rows: bool = False) -> int:
        """The number of scales that are stored for a row, or a shard of it, of `width` weights; see `stored_block`."""
        return 1 if self.block is None else -(-width // self.stored_block(width, shards_rows=shards_rows))

    def stored_block(self, width: int, *, shards_rows: bool = False) -> int:
        """How many weights a stored scale is for.

        A rank's shard of a row may begin within a block. Then it stores the block's scale once for each part of a size
        that divides both the block and the shard, so that all shards are stored in the same way.
        """
        if self.block is None:
            return width
        return math.gcd(self.block, width) if shards_rows else self.block


BASE_FORMATS: dict[str, BaseFormat] = {
    row.name: row
    for row in (
        BaseFormat("int8", bits=8, block=None),
        BaseFormat("fp8", bits=8, block=None),  # e4m3: 4 bits of exponent, 3 of mantissa
        BaseFormat("nf4", bits=4, block=64),  # QLoRA's 16 levels
    )
}
BASE_NAMES = tuple(BASE_FORMATS)
UNQUANTISED = "none"  # where a format that was trained with is the default


def precision_in_words(dtype: str, base_format: str | None, products: str | None = None) -> str:
    """The dtype of a model, and the storage format of the linears of its blocks if they have one, and --products."""
    if base_format is None:
        return dtype
    return f"{dtype} with the linears in {base_format}" + ("" if products is None else f", multiplied in {products}")
