"""Floating-point operations of one training step, as arithmetic: what a frozen base needs, and no more.

With P the multiplications of a token with all weights, A = 2 s d L the operations of causal attention and r the rank, a
token takes 4 P + 3 A + 6 r (d + o) L: there is no gradient of a weight. Less where positions have no label (head, and
what comes after the last attention), below the first adapted layer, and for what only a frozen factor would need.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.shapes import ModelShape


@dataclass(frozen=True)
class StepFlops:
    """Operations by what they are for; a multiplication with its addition counts as two."""

    products: int
    attention: int
    adapter: int
    head: int

    @property
    def total(self) -> int:
        """All together."""
        return self.products + self.attention + self.adapter + self.head


def step_flops(
    shape: ModelShape,
    adapter: AdapterConfig,
    *,
    num_tokens: int,
    squared_lengths: int,
    num_after: int,
    num_supervised: int,
) -> StepFlops:
    """The whole model's operations, forward and backward, without recompute.

    Args:
        num_tokens: positions that are computed.
        squared_lengths: sum of s^2 over sequences of s positions; causal attention sees half of that.
        num_after: positions that are computed after the last attention.
        num_supervised: positions that meet the vocabulary.
    """
    block, first, num_layers = shape.block, adapter.layers[0], shape.num_layers
    qkv, query = block.qkv.num_weights, shape.heads.rows[0]
    products = attention = low_rank = 0
    for layer in range(1, num_layers + 1):
        after = num_after if layer == num_layers else num_tokens
        rest = 2 * after * (block.num_weights - qkv)
        products += (2 if layer >= first else 1) * rest + (2 if layer > first else 1) * 2 * num_tokens * qkv
        attention += (3 if layer >= first else 1) * 2 * squared_lengths * query
        if layer in adapter.layers:
            low_rank += 2 * num_tokens * adapter.rank * _widths(adapter, needs_input=layer > first)
    head = 2 * 2 * num_supervised * shape.head.num_weights
    return StepFlops(products, attention, low_rank, head)


def sample_flops(
    shape: ModelShape, adapter: AdapterConfig, *, num_tokens: int, squared_lengths: int, num_supervised: int
) -> int:
    """What training on samples takes, however they are padded, packed or cut: positions of padding count for nothing.

    Args:
        num_tokens, squared_lengths, num_supervised: sums over the samples, of lengths s, s^2 and supervised tokens.
    """
    return step_flops(
        shape,
        adapter,
        num_tokens=num_tokens,
        squared_lengths=squared_lengths,
        num_after=num_supervised,
        num_supervised=num_supervised,
    ).total


def _widths(adapter: AdapterConfig, *, needs_input: bool) -> int:
    """Summed widths of the adapter's products in one layer, each of r columns: 3 (d + o) where all is trained."""
    row, d, o = adapter.row, adapter.hidden_size, adapter.out_size
    rows_of_b = o if row.B.trained or row.u.trained or row.v.trained else 0
    columns = o if needs_input or row.A.trained else 0
    return (d + o) + rows_of_b + columns + d * (row.A.trained + needs_input)
