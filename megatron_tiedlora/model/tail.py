"""What follows the last attention: the last block's output projection and MLP, the final norm, head and loss.

Only supervised positions go through it. Where none of its linears is adapted, the backward pass of the summed loss runs
inside its forward pass: d numbers per supervised position are saved, whatever is recomputed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_tiedlora.model.layer_specs import Block, Head
from megatron_tiedlora.model.supervised import Supervised, find_supervised
from megatron_tiedlora.parallel.backward import run_with_early_backward
from megatron_tiedlora.parallel.groups import TensorParallel


class Attended(NamedTuple):
    """The last block after its attention. The rest of it is computed for supervised positions only.

    Attributes:
        hidden: the input of the block, (b, s, d) or (1, b s / p, d).
        attention_output: (b, s, local heads * head_dim).
    """

    hidden: torch.Tensor
    attention_output: torch.Tensor


class SupervisedTail:
    """The last block and the head, after the attention. The stage owns their modules and parameters."""

    def __init__(self, block: Block, head: Head, *, adapted: bool = False) -> None:
        """`adapted`: whether one of its linears has an adapter; an early backward pass would lose its gradients."""
        self.block, self.head, self.adapted = block, head, adapted

    def logits(
        self, attended: Attended, tensor_parallel: TensorParallel, *, wanted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(b, s, V), equal on every rank. With `wanted`, (b,) int64, only one position of each row: (b, 1, V)."""
        size, length = attended.attention_output.shape[:2]
        if wanted is None:
            hidden = self.block.add_mlp(self._join(attended, tensor_parallel), tensor_parallel)
            return self._head(hidden, tensor_parallel).view(size, length, -1)
        assert not tensor_parallel.sequence_parallel, "positions are picked from whole sequences"
        rows = torch.arange(size, device=wanted.device) * length + wanted
        hidden = self.block.add_mlp(self._join(attended, tensor_parallel, rows, rows), tensor_parallel)
        return self._head(hidden, tensor_parallel).transpose(0, 1)

    def loss(
        self, attended: Attended, labels: torch.Tensor | Supervised, tensor_parallel: TensorParallel
    ) -> torch.Tensor:
        """The summed loss over supervised positions; `labels`: (b, s) int64 or a `Supervised`."""
        supervised, joined = self._supervised(attended, labels, tensor_parallel)

        def summed(joined: torch.Tensor) -> torch.Tensor:
            return self._losses(joined, supervised, tensor_parallel, summed=True)

        early = joined.requires_grad and torch.is_grad_enabled() and not self.adapted
        return run_with_early_backward(summed, joined) if early else summed(joined)

    def position_losses(
        self, attended: Attended, labels: torch.Tensor, tensor_parallel: TensorParallel
    ) -> torch.Tensor:
        """The loss of each position, (b, s), 0 where there is no label, without a gradient."""
        supervised, joined = self._supervised(attended, labels, tensor_parallel)
        losses = self._losses(joined, supervised, tensor_parallel, summed=False)
        spread = torch.zeros(labels.numel(), device=labels.device)
        return spread.index_put_((supervised.rows[supervised.supervised],), losses.float()).view(labels.shape)

    def _supervised(
        self, attended: Attended, labels: torch.Tensor | Supervised, tensor_parallel: TensorParallel
    ) -> tuple[Supervised, torch.Tensor]:
        """The supervised positions, and the last block's result there, up to its MLP."""
        num_parts = tensor_parallel.sequence_parts
        supervised = labels if isinstance(labels, Supervised) else find_supervised(labels, num_parts)
        local_rows = supervised.of_part(tensor_parallel.group.rank if num_parts > 1 else 0, num_parts)
        return supervised, self._join(attended, tensor_parallel, supervised.rows, local_rows)

    def _losses(
        self, joined: torch.Tensor, supervised: Supervised, tensor_parallel: TensorParallel, *, summed: bool
    ) -> torch.Tensor:
        hidden = self.block.add_mlp(joined, tensor_parallel, recomputes=self.adapted)
        return self._head(hidden, tensor_parallel, supervised, summed=summed)

    def _head(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        found: torch.Tensor = self.head(*arguments, **keywords)
        return found

    def _join(
        self,
        attended: Attended,
        tensor_parallel: TensorParallel,
        rows: torch.Tensor | None = None,
        local_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last block's result up to its MLP, at all positions, or at `rows`: then (1, m, d) or (1, m / p, d).

        Args:
            rows: (m,), indices into (b s).
            local_rows: the rows of this rank, as indices into its (b s) or (b s / p) activations between layers.
        """
        hidden, attention_output = attended
        if rows is not None and local_rows is not None:
            hidden = hidden.flatten(0, 1).index_select(0, local_rows)[None]
            attention_output = attention_output.flatten(0, 1).index_select(0, rows)[None]
        return self.block.add_attention(hidden, attention_output, tensor_parallel)
