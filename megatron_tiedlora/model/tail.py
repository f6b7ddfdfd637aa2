"""Compute the layers after the last attention: output projection and MLP of the last block, final norm, head and loss.

They compute only supervised positions. From the MLP on, the backward pass of the summed loss runs inside its forward
pass. So with every recompute setting, only gradients are saved: d elements per supervised position, and the gradients
of the factors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.adapters.adapter_groups import AdapterSegments
from megatron_tiedlora.adapters.low_rank import SomeTokens
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate, update_at
from megatron_tiedlora.base.shapes import MLP_TARGETS, OUTPUT
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.model.layer_specs import Block, Head
from megatron_tiedlora.parallel.groups import TensorParallel, with_adjoint
from megatron_tiedlora.parallel.loss import RowSpan, run_with_early_backward, spans_between


class Attended(NamedTuple):
    """The state of the last block after its attention. Later layers are computed for supervised positions only.

    Attributes:
        hidden: the input of the block, (b, s, d) or (1, b s / p, d).
        attention_output: (b, s, local heads * head_dim).
        update: the update of the block, if it is adapted.
        zero_gradients: tensors on which the loss does not depend, but which must get a gradient (zeros).
    """

    hidden: Tensor
    attention_output: Tensor
    update: LayerUpdate | None = None
    zero_gradients: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class SupervisedTail:
    """The layers after the last block's attention, and the head. The stage owns their modules and parameters."""

    block: Block
    head: Head
    tensor_parallel: TensorParallel

    def logits(self, attended: Attended, *, wanted: Tensor | None = None, segments: AdapterSegments = ()) -> Tensor:
        """Return logits, equal on every rank: (b, s, V), or (n, 1, V) for the tokens `wanted`, see `Stage.predict`."""
        (size, length), some = attended.attention_output.shape[:2], None
        if wanted is not None:
            assert not self.tensor_parallel.sequence_parallel, "positions are picked from whole sequences"
            spans = tuple(
                RowSpan(number, segment.num_rows) for number, segment in enumerate(segments) if len(segments) > 1
            )
            some = SomeTokens(wanted, wanted, spans, spans)
        joined, update = self._join(attended, some)
        logits: Tensor = self.head(self._add_mlp(joined, update), self.tensor_parallel)
        return logits.view(size, length, -1) if some is None else logits.transpose(0, 1)

    def loss(self, attended: Attended, labels: Tensor | Supervised) -> Tensor:
        """Return the summed loss over supervised positions. `labels` is (b, s) int64 or a `Supervised`.

        If the positions belong to several adapters, there is one loss per adapter, (adapters,).
        """
        supervised, some = self._supervised(labels)
        joined, update = self._join(attended, some)
        update = {name: linear for name, linear in update.items() if name in MLP_TARGETS}
        pairs = [(linear, slot) for linear in update.values() for slot in (linear.grad_a, linear.grad_f)]
        slots = [slot for _, slot in pairs]

        def summed(joined: Tensor, *slots: Tensor | None) -> Tensor:
            pairs = zip(slots[::2], slots[1::2], strict=True)
            inner = {
                name: linear._replace(grad_a=grad_a, grad_f=grad_f)
                for (name, linear), (grad_a, grad_f) in zip(update.items(), pairs, strict=True)
            }
            return supervised.summed(self.head(self._add_mlp(joined, inner), self.tensor_parallel, supervised))

        inputs = joined, *slots
        needs = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        spans = None
        if some.local_spans:
            of_slots = [slot if slot is None else linear.rows.slot_spans(slot.numel()) for linear, slot in pairs]
            spans = [some.local_spans, *of_slots]
        loss = run_with_early_backward(summed, *inputs, spans=spans) if needs else summed(joined, *slots)
        return with_zero_gradients(loss, attended.zero_gradients)

    def at_positions(
        self, attended: Attended, labels: Tensor, segments: AdapterSegments = (), *, num_top: int | None = None
    ) -> Tensor:
        """Return the loss of each position, (b, s) fp32, without a gradient. It is 0 without a label. With `num_top`
        return the `label_logprobs` of each position instead, (b, s, 1 + 2 num_top), nan without a label."""
        supervised, some = self._supervised(labels, segments)
        joined, update = self._join(attended, some)
        numbers = self.head(self._add_mlp(joined, update), self.tensor_parallel, supervised, num_top=num_top)
        numbers, fill = (numbers.float(), 0.0) if num_top is None else (numbers, torch.nan)
        found = numbers.new_full((labels.numel(), *numbers.shape[1:]), fill)
        found[supervised.rows[supervised.supervised]] = numbers
        return found.view(*labels.shape, *numbers.shape[1:])

    def _supervised(self, labels: Tensor | Supervised, segments: AdapterSegments = ()) -> tuple[Supervised, SomeTokens]:
        """Return the supervised positions, and this rank's tokens at these positions."""
        num_parts, supervised = self.tensor_parallel.sequence_parts, labels
        if not isinstance(supervised, Supervised):
            supervised = find_supervised(supervised, num_parts, segments)
        size, part = len(supervised.rows) // num_parts, self.tensor_parallel.group.rank if num_parts > 1 else 0
        start, stop = part * size, (part + 1) * size
        local_spans = spans_between(supervised.spans, start, stop)
        return supervised, SomeTokens(supervised.rows, supervised.local_rows[start:stop], supervised.spans, local_spans)

    def _join(self, attended: Attended, some: SomeTokens | None) -> tuple[Tensor, LayerUpdate]:
        """Return the input of the last block's MLP, and the block's update, for all tokens or for `some`.

        With `some` the result is (1, m, d) or (1, m / p, d).
        """
        hidden, attention_output, update, _ = attended
        update = update or {}
        if some is not None:
            hidden = hidden.flatten(0, 1).index_select(0, some.local_rows)[None]
            attention_output = attention_output.flatten(0, 1).index_select(0, some.rows)[None]
            update = update_at(update, some)
        output = self.block.attention.output(attention_output, self.tensor_parallel, update.get(OUTPUT))
        return hidden + output, update

    def _add_mlp(self, joined: Tensor, update: LayerUpdate) -> Tensor:
        """Return x + mlp(x), in the shape of x. Gate and up are saved, because the backward pass follows at once."""
        hidden, output = self.block.mlp(joined, None, self.tensor_parallel, update, recomputes=False)
        return hidden + output


def with_zero_gradients(result: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return `result` with a backward pass that also returns zeros for `tensors`."""
    if not tensors:
        return result
    zeros = zeros_like(tensors)
    return with_adjoint(lambda result, *_: result.view_as(result), lambda g: (g, *zeros(g)), *(result, *tensors))


def zeros_like(tensors: Sequence[Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Return an adjoint that returns zeros like `tensors`, without keeping references to them."""
    makers = [partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
    return lambda _gradient: tuple(make() for make in makers)
