"""Causal self-attention with grouped queries: norm and QKV in one step (qkv.py), attention, output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.base.shapes import HeadShape
from megatron_tiedlora.model.blocks import Block, attend_by_blocks, block_size, find_blocks
from megatron_tiedlora.model.documents import Documents, find_documents, whole_rows
from megatron_tiedlora.model.fused_attention import Attend, AttentionRoute, attend_within, choose_attention
from megatron_tiedlora.model.normed_linear import NormedLinear
from megatron_tiedlora.model.qkv import RotatedHeads
from megatron_tiedlora.model.rope import rotation_table
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import Kernels
from megatron_tiedlora.parallel.layers import RowParallelLinear, padded


@dataclass
class KeyValueCache:
    """Keys and values of one layer while decoding, each (b, kv, capacity, head_dim); sequences of different lengths
    share a batch.

    The next token of each sequence is written at its own position, so padding never stands between tokens. `filled` is
    the longest sequence's length: what lies beyond it is not read.
    """

    keys: torch.Tensor
    values: torch.Tensor
    filled: int = 0

    @staticmethod
    def empty(batch: int, local_kv_heads: int, capacity: int, head_dim: int, like: torch.Tensor) -> KeyValueCache:
        """Room for `capacity` tokens a sequence, in the dtype and on the device of `like`."""
        shape = (batch, local_kv_heads, capacity, head_dim)
        return KeyValueCache(like.new_zeros(shape), like.new_zeros(shape))

    def update(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Write new keys and values (b, kv, s, head_dim) at `positions` (b, s); the first ones at 0 to s - 1."""
        length = keys.shape[2]
        if not self.filled:
            self.keys[:, :, :length] = keys
            self.values[:, :, :length] = values
        else:
            index = positions[:, None, :, None].expand_as(keys)
            self.keys.scatter_(2, index, keys.to(self.keys.dtype))
            self.values.scatter_(2, index, values.to(self.values.dtype))
        self.filled += length

    def take(self, rows: torch.Tensor) -> KeyValueCache:
        """A copy that holds the sequences `rows` (n,), any of them several times, to be continued in several ways."""
        return KeyValueCache(self.keys[rows], self.values[rows], self.filled)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of keys and values for a base in `dtype`.

    On a CPU, PyTorch's masked attention is ten times slower in bf16 than in fp32 (7.6 ms against 0.7 at 24 x 450).
    """
    return torch.float32 if device.type == "cpu" else dtype


@dataclass(frozen=True)
class Places:
    """Where the tokens of a call stand, alike for all layers.

    Attributes:
        positions: (b, s) int64.
        table: cos and sin of their rotation, see `rotation_table`.
        blocks: on a CPU, which tokens see each other.
        documents: elsewhere, the documents that rows hold; a token sees those of its own up to itself.
        attend: what computes attention within them.
        mask: where the keys are a cache's, what is added to the scores: 0 or -inf, (b * kv, heads / kv * s, keys) in
            the cache's dtype.
    """

    positions: torch.Tensor
    table: tuple[torch.Tensor, torch.Tensor]
    blocks: tuple[Block, ...] = ()
    documents: Documents | None = None
    attend: Attend | None = None
    mask: torch.Tensor | None = None


class Attention(nn.Module):
    """z = W_o attention(Q, K, V), of which NormedLinear gives the three. `attend` is called first, then `output`."""

    def __init__(
        self,
        qkv: NormedLinear,
        output: RowParallelLinear,
        *,
        local_heads: HeadShape,
        kernels: Kernels,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.deterministic = deterministic
        self.local_heads = local_heads
        self.qkv = qkv
        self.output = output

    def places(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype,
        *,
        documents: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Places:
        """What every layer's `forward` needs of the tokens' places, computed once for all of them.

        Args:
            positions: (b, s) int64.
            dtype: of the activations.
            documents: (b, s) int64, which document of its row each token belongs to; None: one a row. Best on the host.
            cache: of any of the layers, as it stands before the call. The first tokens in it are whole prompts, padded
                on the right; later ones see what it holds up to their own position.
        """
        places = Places(positions, rotation_table(positions, self.local_heads.rope, self.local_heads.dim, dtype))
        if cache is not None and cache.filled:
            return replace(places, mask=self._cache_mask(positions, cache))
        device, (num_rows, length) = positions.device, positions.shape
        if device.type == "cpu":
            return replace(places, blocks=find_blocks(documents, length, size=block_size(*self.local_heads.rows[:2])))
        found = whole_rows(num_rows, length, device) if documents is None else find_documents(documents, device)
        return replace(places, documents=found, attend=self.route(device, dtype).attend)

    def route(self, device: torch.device, dtype: torch.dtype) -> AttentionRoute:
        """What computes attention of tokens that are all in the call, on `device` and in the dtype of activations."""
        return choose_attention(device, dtype, self.local_heads.dim, deterministic=self.deterministic)

    def _cache_mask(self, positions: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        batch, length = positions.shape
        kv_heads, group = self.local_heads.num_kv, self.local_heads.num // self.local_heads.num_kv
        num_keys = cache.filled + length
        keys = torch.arange(padded(num_keys), device=positions.device)
        hidden = keys > positions[:, :, None]  # (b, s, padded keys)
        added = cache.keys.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        rows = added[:, None].expand(batch, kv_heads * group, length, len(keys)).reshape(-1, group * length, len(keys))
        return rows[..., :num_keys]  # rows begin at multiples of 8, else CUDA's kernel copies the mask in every layer

    def attend(
        self,
        hidden: torch.Tensor,
        places: Places,
        tensor_parallel: TensorParallel,
        *,
        update: LayerUpdate | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """What this rank's heads found, (b, s, local heads * head_dim), for `output`.

        Args:
            hidden: what flows between layers, (b, s, d) or (1, b s / p, d).
            places: of the s tokens, from `places`.
            cache: of this rank's key and value heads, which keeps the new ones.
        """
        rotated = RotatedHeads(self.local_heads.rows, self.local_heads.dim, self.kernels, places.table)
        query, key, value = self.qkv(hidden, rotated, tensor_parallel, update, num_rows=len(places.positions))
        if cache is not None and cache.filled:
            cache.update(key, value, places.positions)
            return _attend_to_cache(query, cache, places.mask).transpose(1, 2).flatten(2).to(hidden.dtype)
        if cache is not None:
            cache.update(key, value, places.positions)
        if places.blocks:
            return attend_by_blocks(query, key, value, places.blocks, self.kernels)
        assert places.documents is not None and places.attend is not None, "places without blocks have documents"
        return attend_within(query, key, value, places.documents, places.attend)


def _attend_to_cache(query: torch.Tensor, cache: KeyValueCache, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention of new tokens, (b, heads, s, head_dim), to all that the cache holds of them and before them.

    The query heads of one key-value head stand as tokens of one head: they share its keys, so that no key is copied
    for them. In fp32 (so always on a CPU) two plain products take two thirds of the time of PyTorch's fused kernel,
    which is made for long queries; in bf16 that one keeps the scores in fp32. (Not cuDNN's, which makes a plan for each
    number of keys: `prepare_environment` puts it last.)
    """
    assert mask is not None, "a cache's places have a mask"
    batch, heads, length, head_dim = query.shape
    keys, values = (tensor.flatten(0, 1)[:, : cache.filled] for tensor in (cache.keys, cache.values))
    folded = query.to(keys.dtype).reshape(keys.shape[0], -1, head_dim)
    if keys.dtype == torch.float32:
        scores = torch.baddbmm(mask, folded, keys.transpose(1, 2), alpha=head_dim**-0.5)
        output = torch.bmm(scores.softmax(dim=-1), values)
    else:
        output = functional.scaled_dot_product_attention(
            folded[:, None], keys[:, None], values[:, None], attn_mask=mask[:, None]
        )
    return output.reshape(batch, heads, length, head_dim)  # a copy where a kernel's result lies by tokens, as CUDA's

