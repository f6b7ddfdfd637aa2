"""Arithmetic for the floating-point operations that one training step with a frozen base needs.

Let P be the multiplications of a token with all weights, A = 2 s d L the operations of causal attention, r the rank. A
token takes 4 P + 3 A + 6 r (in + out) L for each target, as no weight has a gradient. It takes less if it has no label
(for the head and all that follows the last attention), below the first adapted linear, and if a factor is frozen.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.methods import Method
from megatron_tiedlora.base.shapes import OUTPUT, QKV, ModelShape
from megatron_tiedlora.planning.stages import needs_gradient


@dataclass(frozen=True)
class StepFlops:
    """Operations by purpose. A multiplication with its addition counts as two."""

    matmuls: int
    attention: int
    adapter: int
    head: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.matmuls + self.attention + self.adapter + self.head


class LinearFlops(NamedTuple):
    """Operations of a frozen linear and of its update: forward, and backward."""

    forward: int
    low_rank: int
    backward: int
    low_rank_backward: int


@dataclass(frozen=True)
class BlockFlops:
    """Operations of a block, without recompute.

    Attributes:
        linears: by the names of `TARGET_NAMES`.
        attention, attention_backward: of causal attention.
    """

    linears: Mapping[str, LinearFlops]
    attention: int
    attention_backward: int

    def plus(self, other: BlockFlops) -> BlockFlops:
        """Each of them with that of another."""
        pairs = ((name, map(operator.add, own, other.linears[name])) for name, own in self.linears.items())
        return BlockFlops(
            {name: LinearFlops(*sums) for name, sums in pairs},
            self.attention + other.attention,
            self.attention_backward + other.attention_backward,
        )


def block_flops(
    shape: ModelShape,
    adapter: AdapterConfig,
    adapted: Collection[str],
    needs: Mapping[str, bool],
    *,
    num_tokens: int,
    squared_lengths: int,
    num_after: int,
) -> BlockFlops:
    """The operations of one block of the model.

    Args:
        adapted: its linears that the adapter changes.
        needs: whether the input of each linear needs a gradient; see `needs_gradient`.
        num_tokens, squared_lengths: as in `step_flops`.
        num_after: the positions that are computed after its attention.
    """
    targets, found = {target.name: target for target in adapter.targets}, {}
    for name, linear in shape.block.adaptable.items():
        tokens = num_tokens if name == QKV else num_after
        matmul = 2 * tokens * linear.num_weights
        ahead, back = 0, 0
        if name in adapted:
            ahead, back = _widths(adapter.method_spec, targets[name], needs_input=needs[name])
        columns = 2 * adapter.rank * tokens
        found[name] = LinearFlops(matmul, columns * ahead, matmul * needs[name], columns * back)
    attention = 2 * squared_lengths * shape.heads.rows[0]
    return BlockFlops(found, attention, 2 * attention * needs[OUTPUT])


def head_flops(shape: ModelShape, num_supervised: int) -> int:
    """The operations of the head for so many positions, and of the gradient of its input."""
    return 2 * 2 * num_supervised * shape.head.num_weights


def step_flops(
    shape: ModelShape,
    adapter: AdapterConfig,
    *,
    num_tokens: int,
    squared_lengths: int,
    num_after: int,
    num_supervised: int,
) -> StepFlops:
    """The operations of the whole model, forward and backward, without recompute.

    Args:
        num_tokens: the positions that are computed.
        squared_lengths: the sum of s^2 over sequences of s positions; causal attention needs half of that.
        num_after: the positions that are computed after the last attention.
        num_supervised: the positions that the head computes logits for.
    """
    targets = [target.name for target in adapter.targets]
    matmuls = attention = low_rank = 0
    for layer in range(1, shape.num_layers + 1):
        adapted = targets if layer in adapter.layers else []
        flops = block_flops(
            shape,
            adapter,
            adapted,
            needs_gradient(adapted, earlier=layer > adapter.layers[0]),
            num_tokens=num_tokens,
            squared_lengths=squared_lengths,
            num_after=num_after if layer == shape.num_layers else num_tokens,
        )
        attention += flops.attention + flops.attention_backward
        for linear in flops.linears.values():
            matmuls += linear.forward + linear.backward
            low_rank += linear.low_rank + linear.low_rank_backward
    return StepFlops(matmuls, attention, low_rank, head_flops(shape, num_supervised))


def _widths(method: Method, target: Target, *, needs_input: bool) -> tuple[int, int]:
    """The summed widths of a target's low-rank matmuls in one layer, each of r columns, forward and backward.

    Together they are 3 (d + o) if all is trained.
    """
    d, o = target.in_size, target.out_size
    rows_of_b = o if method.trains_f else 0
    columns = o if needs_input or method.A.trained else 0
    return d + o, rows_of_b + columns + d * (method.A.trained + needs_input)
