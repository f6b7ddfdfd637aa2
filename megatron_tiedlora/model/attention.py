"""Causal self-attention with grouped queries: fused QKV with the tied update, rotation, attention, output."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.adapters.tied_adapter import LayerUpdate, add_update
from megatron_tiedlora.model.rope import RopeConfig, rotate, rotation_table
from megatron_tiedlora.parallel.collectives import enter_tensor_parallel_region
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.layers import ColumnParallelLinear, RowParallelLinear


class KeyValueCache:
    """Keys and values of one layer while decoding; sequences of different lengths share a batch.

    The next token of each sequence is written at its own position, so padding never stands between tokens.
    """

    def __init__(self, batch: int, local_kv_heads: int, capacity: int, head_dim: int, like: torch.Tensor) -> None:
        self.keys = like.new_zeros(batch, local_kv_heads, capacity, head_dim)
        self.values = like.new_zeros(batch, local_kv_heads, capacity, head_dim)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write new keys and values (b, kv, s, head_dim) at `positions` (b, s).

        Returns:
            all keys and values, (b, kv, capacity, head_dim) in the cache's dtype, and which of them each new token
            sees, (b, 1, s, capacity) bool.
        """
        index = positions[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, index, keys.to(self.keys.dtype))
        self.values.scatter_(2, index, values.to(self.values.dtype))
        slots = torch.arange(self.keys.shape[2], device=positions.device)
        return self.keys, self.values, slots <= positions[:, None, :, None]


class Attention(nn.Module):
    """z = W_o attention(rope(Q), rope(K), V), [Q | K | V] = W_qkv x + (alpha / r) diag(v) B diag(u) A x."""

    def __init__(
        self,
        hidden_size: int,
        *,
        local_heads: int,
        local_kv_heads: int,
        head_dim: int,
        rope: RopeConfig,
        bias: bool,
        update_scale: float,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.local_rows = (local_heads * head_dim, local_kv_heads * head_dim, local_kv_heads * head_dim)
        self.head_dim = head_dim
        self.rope = rope
        self.update_scale = update_scale
        self.qkv = ColumnParallelLinear(hidden_size, sum(self.local_rows), dtype=dtype, bias=bias)
        self.output = RowParallelLinear(local_heads * head_dim, hidden_size, dtype=dtype, bias=bias)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        tensor_parallel: TensorParallel,
        *,
        update: LayerUpdate | None = None,
        mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attention of this rank's heads, summed over the ranks.

        Args:
            hidden: what flows between layers, (b, s, d) or (b, s / p, d).
            positions: (b, s).
            mask: (b, 1, s, s) bool, which keys each token sees; None: tokens 0 to t of its row.
            cache: of this rank's key and value heads; replaces `mask`.

        Returns:
            as `hidden`.
        """
        hidden = enter_tensor_parallel_region(hidden, tensor_parallel)
        batch, length, _ = hidden.shape
        fused = self.qkv(hidden)
        if update is not None:
            fused = add_update(fused, hidden, update, self.update_scale)
        parts = fused.split(self.local_rows, dim=-1)
        query, key, value = (p.view(batch, length, -1, self.head_dim).transpose(1, 2) for p in parts)
        table = rotation_table(positions, self.rope, self.head_dim, hidden.dtype)
        query, key = rotate(query, table), rotate(key, table)
        if cache is not None:
            key, value, mask = cache.update(key, value, positions)
            query = query.to(key.dtype)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, -1).to(hidden.dtype)
        output: torch.Tensor = self.output(mixed, tensor_parallel)
        return output


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """(b, 1, s, s) bool from document ids (b, s): a token sees itself and what came before it in its own document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal
