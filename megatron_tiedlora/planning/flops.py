"""Arithmetic for the floating-point operations that one training step with a frozen base needs.

Let P be the multiplications of a token with all weights, A = 2 s d L the operations of causal attention, r the rank. A
token takes 4 P + 3 A + 6 r (in + out) L for each target, as no weight has a gradient. It takes less if it has no label
(for the head and all that follows the last attention), below the first adapted linear, and if a factor is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    linears, num_layers, query = shape.block.adaptable, shape.num_layers, shape.heads.rows[0]
    targets = {target.name: target for target in adapter.targets}
    matmuls = attention = low_rank = 0
    for layer in range(1, num_layers + 1):
        adapted = targets if layer in adapter.layers else {}
        needs = needs_gradient(adapted, earlier=layer > adapter.layers[0])
        after = num_after if layer == num_layers else num_tokens
        attention += (3 if needs[OUTPUT] else 1) * 2 * squared_lengths * query
        for name, linear in linears.items():
            tokens = num_tokens if name == QKV else after
            matmuls += (2 if needs[name] else 1) * 2 * tokens * linear.num_weights
            if name in adapted:
                widths = _widths(adapter.method_spec, adapted[name], needs_input=needs[name])
                low_rank += 2 * adapter.rank * tokens * widths
    head = 2 * 2 * num_supervised * shape.head.num_weights
    return StepFlops(matmuls, attention, low_rank, head)


def _widths(method: Method, target: Target, *, needs_input: bool) -> int:
    """The summed widths of a target's low-rank matmuls in one layer, each of r columns: 3 (d + o) if all is trained."""
    d, o = target.in_size, target.out_size
    rows_of_b = o if method.trains_f else 0
    columns = o if needs_input or method.A.trained else 0
    return (d + o) + rows_of_b + columns + d * (method.A.trained + needs_input)
