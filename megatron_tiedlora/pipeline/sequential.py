"""The flat list run as a plain sequence in one process: the PP = 1 model, and the reference of every other layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.model.attention import KeyValueCache
from megatron_tiedlora.model.layer_specs import LayerSpec


class SequentialModel(nn.Module):
    """Embedding, blocks and head in order, with the adapter bank beside them.

    The bank is read once per call, outside recompute, so its gradients leave through one autograd path per call.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        adapter: TiedAdapter | None,
        *,
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(spec.build() for spec in specs)
        if self.layers[-1].weight is None:  # tied embeddings
            self.layers[-1].weight = self.layers[0].weight
        self.adapter = adapter
        self.recompute = recompute

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        labels: torch.Tensor | None = None,
        caches: Sequence[KeyValueCache] | None = None,
        wanted: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Summed loss over supervised positions when `labels` are given, else logits (b, s, V).

        Args:
            tokens: (b, s) int64.
            positions: (b, s) int64.
            labels: (b, s) int64, the next token or -100.
            caches: one per block, for decoding.
            wanted: (b,) int64, the one position of each row whose logits are wanted; the result is then (b, 1, V).
        """
        updates = {} if self.adapter is None else dict(zip(self.adapter.config.layers, self.adapter(), strict=True))
        hidden = self.layers[0](tokens)
        for index in range(1, len(self.layers) - 1):
            block, update = self.layers[index], updates.get(index)
            if self.recompute == "full" and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, positions, update, use_reentrant=False)
            else:
                hidden = block(hidden, positions, update, caches[index - 1] if caches else None)
        if wanted is not None:
            hidden = hidden.gather(1, wanted[:, None, None].expand(-1, 1, hidden.shape[-1]))
        logits_or_loss: torch.Tensor = self.layers[-1](hidden, labels)
        return logits_or_loss
