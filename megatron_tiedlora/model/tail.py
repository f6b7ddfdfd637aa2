"""What follows the last attention: the last block's output projection and MLP, the final norm, head and loss.

Only supervised positions go through it. From the MLP on, the backward pass of the summed loss runs inside its forward
pass. So whatever is recomputed, only gradients are saved: d numbers per supervised position, and those of the factors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from megatron_tiedlora.adapters.adapter_bank import Shares
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.base.shapes import MLP_TARGETS
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.model.layer_specs import Block, Head
from megatron_tiedlora.parallel.backward import run_with_early_backward
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.pieces import Piece, Pieces, part_of


class Attended(NamedTuple):
    """The last block after its attention. The rest of it is computed for supervised positions only.

    Attributes:
        hidden: the input of the block, (b, s, d) or (1, b s / p, d).
        attention_output: (b, s, local heads * head_dim).
        update: of the block's linears, if it is adapted.
    """

    hidden: torch.Tensor
    attention_output: torch.Tensor
    update: LayerUpdate | None = None

    @property
    def mlp_update(self) -> LayerUpdate:
        """The part of the update that belongs to the MLP."""
        return {name: linear for name, linear in (self.update or {}).items() if name in MLP_TARGETS}

    def with_function(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Attended":
        """The same with `function`, which returns its input's values, applied to a tensor that needs a gradient."""
        if self.hidden.requires_grad:
            return self._replace(hidden=function(self.hidden))
        if self.attention_output.requires_grad:
            return self._replace(attention_output=function(self.attention_output))
        update = self.update or {}
        target, name, tensor = next(
            (target, name, tensor)
            for target, linear in update.items()
            for name in ("grad_a", "grad_f")
            if (tensor := getattr(linear, name)) is not None
        )
        changed: dict[str, Any] = {name: function(tensor)}
        return self._replace(update={**update, target: update[target]._replace(**changed)})


class SupervisedTail:
    """The last block and the head, after the attention. The stage owns their modules and parameters."""

    def __init__(self, block: Block, head: Head) -> None:
        self.block, self.head = block, head

    def logits(
        self,
        attended: Attended,
        tensor_parallel: TensorParallel,
        *,
        wanted: torch.Tensor | None = None,
        shares: Shares = (),
    ) -> torch.Tensor:
        """(b, s, V), equal on every rank. With `wanted`, (b,) int64, only one position of each row: (b, 1, V).

        With several shares, the rows are theirs, and the positions are among all tokens (1, s).
        """
        size, length = attended.attention_output.shape[:2]
        if wanted is None:
            joined = self._join(attended, tensor_parallel)
            hidden = self.block.add_mlp(joined, tensor_parallel, attended.mlp_update)
            return cast(torch.Tensor, self.head(hidden, tensor_parallel)).view(size, length, -1)
        assert not tensor_parallel.sequence_parallel, "positions are picked from whole sequences"
        rows = torch.arange(size, device=wanted.device) * length + wanted
        pieces = tuple(Piece(number, share.num_rows) for number, share in enumerate(shares) if len(shares) > 1)
        some = _Some(rows, rows, pieces, pieces)
        joined = self._join(attended, tensor_parallel, some)
        hidden = self.block.add_mlp(joined, tensor_parallel, some.of(attended.mlp_update))
        return cast(torch.Tensor, self.head(hidden, tensor_parallel)).transpose(0, 1)

    def loss(
        self, attended: Attended, labels: torch.Tensor | Supervised, tensor_parallel: TensorParallel
    ) -> torch.Tensor:
        """The summed loss over supervised positions; `labels`: (b, s) int64 or a `Supervised`.

        If they belong to several owners, there is one for each, (owners,).
        """
        supervised, some, joined = self._supervised(attended, labels, tensor_parallel)
        update = some.of(attended.mlp_update)
        pairs = [(linear, tensor) for linear in update.values() for tensor in (linear.grad_a, linear.grad_f)]
        stand_ins = [tensor for _, tensor in pairs]

        def summed(joined: torch.Tensor, *stand_ins: torch.Tensor | None) -> torch.Tensor:
            pairs = zip(stand_ins[::2], stand_ins[1::2], strict=True)
            inner = {
                name: linear._replace(grad_a=grad_a, grad_f=grad_f)
                for (name, linear), (grad_a, grad_f) in zip(update.items(), pairs, strict=True)
            }
            hidden = self.block.add_mlp(joined, tensor_parallel, inner, recomputes=False)
            loss: torch.Tensor = self.head(hidden, tensor_parallel, supervised)
            return loss

        inputs = joined, *stand_ins
        needs = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
        if not needs:
            return summed(joined, *stand_ins)
        pieces = None
        if some.local_pieces:
            of_stand_ins = [t if t is None else linear.rows.stand_in_pieces(t.numel()) for linear, t in pairs]
            pieces = [some.local_pieces, *of_stand_ins]
        return run_with_early_backward(summed, *inputs, pieces=pieces)

    def position_losses(
        self, attended: Attended, labels: torch.Tensor, tensor_parallel: TensorParallel, shares: Shares = ()
    ) -> torch.Tensor:
        """The loss of each position, (b, s), 0 where there is no label, without a gradient."""
        supervised, some, joined = self._supervised(attended, labels, tensor_parallel, shares)
        update = some.of(attended.mlp_update)
        hidden = self.block.add_mlp(joined, tensor_parallel, update, recomputes=False)
        losses = self.head(hidden, tensor_parallel, supervised, summed=False)
        spread = torch.zeros(labels.numel(), device=labels.device)
        return spread.index_put_((supervised.rows[supervised.supervised],), losses.float()).view(labels.shape)

    def _supervised(
        self,
        attended: Attended,
        labels: torch.Tensor | Supervised,
        tensor_parallel: TensorParallel,
        shares: Shares = (),
    ) -> "tuple[Supervised, _Some, torch.Tensor]":
        """The supervised positions, those of this rank, and the last block's result there, up to its MLP."""
        num_parts, supervised = tensor_parallel.sequence_parts, labels
        if not isinstance(supervised, Supervised):
            supervised = find_supervised(supervised, num_parts, shares)
        size, part = len(supervised.rows) // num_parts, tensor_parallel.group.rank if num_parts > 1 else 0
        start, stop = part * size, (part + 1) * size
        local_pieces = part_of(supervised.pieces, start, stop)
        some = _Some(supervised.rows, supervised.local_rows[start:stop], supervised.pieces, local_pieces)
        return supervised, some, self._join(attended, tensor_parallel, some)

    def _join(self, attended: Attended, tensor_parallel: TensorParallel, some: "_Some | None" = None) -> torch.Tensor:
        """The last block's result up to its MLP, at all positions, or at some: then (1, m, d) or (1, m / p, d)."""
        hidden, attention_output, update = attended
        if some is not None:
            hidden = hidden.flatten(0, 1).index_select(0, some.local_rows)[None]
            attention_output = attention_output.flatten(0, 1).index_select(0, some.rows)[None]
            update = some.of(update or {})
        return self.block.add_attention(hidden, attention_output, tensor_parallel, update)


@dataclass(frozen=True)
class _Some:
    """Some positions of a micro-batch.

    Attributes:
        rows: (m,), indices into (b s).
        local_rows: the rows of this rank, as indices into its (b s) or (b s / p) activations between layers.
        pieces, local_pieces: whose they are, if there are several owners.
    """

    rows: torch.Tensor
    local_rows: torch.Tensor
    pieces: Pieces = ()
    local_pieces: Pieces = ()

    def of(self, update: LayerUpdate) -> LayerUpdate:
        """The update for these tokens only."""
        where = self.rows, self.local_rows, self.pieces, self.local_pieces
        return {name: linear._replace(rows=linear.rows.at(*where)) for name, linear in update.items()}
