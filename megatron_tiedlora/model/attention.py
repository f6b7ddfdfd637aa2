"""Implement causal self-attention with grouped queries: norm, QKV projection, attention and output projection."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterSegment, AdapterSegments
from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.base import shapes
from megatron_tiedlora.model import cpu_attention
from megatron_tiedlora.model.batch import find_documents, whole_rows
from megatron_tiedlora.model.cpu_attention import TiledRows
from megatron_tiedlora.model.fused_attention import AttentionRoute, attend_within, choose_attention
from megatron_tiedlora.model.linears import QkvLinear, RowParallelLinear
from megatron_tiedlora.model.regions import Steps, steps_of
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.rows import upcast


@dataclass
class KeyValueCache:
    """The keys and values of one layer during generation, each (b, kv, capacity, head_dim).

    Sequences of a batch may have different lengths. The next token of each sequence is written at its own position, so
    there is never padding between tokens. Tensors keep their addresses, so that a call can be replayed as a CUDA graph.

    Attributes:
        filled: the largest length of a sequence before the current call. The caller adds the call's tokens afterwards.
        granularity: the number of keys that a call reads is a multiple of this number, or the capacity. Keys after the
            last token are masked.
    """

    keys: Tensor
    values: Tensor
    filled: int = 0
    granularity: int = 1

    @staticmethod
    def empty(
        batch: int, local_kv_heads: int, capacity: int, head_dim: int, like: Tensor, granularity: int = 1
    ) -> "KeyValueCache":
        """Return an empty cache for `capacity` tokens per sequence, in the dtype and on the device of `like`."""
        shape = (batch, local_kv_heads, capacity, head_dim)
        return KeyValueCache(like.new_zeros(shape), like.new_zeros(shape), granularity=granularity)

    def num_read(self, length: int) -> int:
        """Return the number of keys that a call with `length` new tokens per sequence reads."""
        return min(padded(self.filled + length, self.granularity), self.keys.shape[2])

    def clear(self) -> None:
        """Empty the cache for other sequences."""
        self.keys.zero_()
        self.values.zero_()
        self.filled = 0

    def update(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Write new keys and values (b, kv, s, head_dim) at `positions` (b, s), or at 0 to s - 1 in the first call."""
        length = keys.shape[2]
        if not self.filled:
            self.keys[:, :, :length] = keys
            self.values[:, :, :length] = values
        else:
            index = positions[:, None, :, None].expand_as(keys)
            self.keys.scatter_(2, index, keys.to(self.keys.dtype))
            self.values.scatter_(2, index, values.to(self.values.dtype))

    def take(self, rows: Tensor) -> "KeyValueCache":
        """Return a cache with copies of the sequences at indices `rows` (n,). An index may occur several times."""
        return KeyValueCache(self.keys[rows], self.values[rows], self.filled, self.granularity)


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of cached keys and values for a base in `dtype`.

    On a CPU, PyTorch's masked attention is ten times slower in bf16 than in fp32 (7.6 ms against 0.7 at 24 x 450).
    """
    return torch.float32 if device.type == "cpu" else dtype


AnyCache = KeyValueCache | tuple[KeyValueCache, ...]  # one cache for a batch, or one for the tokens of each adapter


@dataclass(frozen=True)
class AttentionContext:
    """The data that attention needs about the tokens of one call. All layers use the same object.

    Attributes:
        positions: (b, s) int64.
        tables: the cos and sin of each rotation in the layers, see `rotation_table`.
        attend: for each window in the layers, the function that computes attention among the tokens of the call,
            (b, s, heads * head_dim), from queries (b, heads, s, head_dim), keys and values (b, kv heads, s, head_dim).
            A token attends to itself and to earlier tokens of its document and window.
        mask: for each window in the layers, 0 or -inf to be added to the scores if keys come from a cache,
            (b * kv, heads / kv * s, keys) in the cache's dtype.
        of_segments: one context for the tokens of each adapter, if keys come from the caches of several adapters.
    """

    positions: Tensor
    tables: Mapping[shapes.RopeShape, tuple[Tensor, Tensor]]
    attend: Mapping[int | None, Callable[[Tensor, Tensor, Tensor], Tensor]] = field(default_factory=dict)
    mask: Mapping[int | None, Tensor] = field(default_factory=dict)
    of_segments: "tuple[AttentionContext, ...]" = ()


class Attention(nn.Module):
    """The attention of a block, z = W_o attention(Q, K, V). `qkv` computes Q, K and V. Call `steps`, then `output`."""

    def __init__(
        self,
        qkv: QkvLinear,
        output: RowParallelLinear,
        kind: shapes.AttentionKind,
        *,
        kernels: Kernels,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.kernels = kernels
        self.deterministic = deterministic
        self.qkv = qkv
        self.output = output

    def context(
        self,
        positions: Tensor,
        dtype: torch.dtype,
        *,
        documents: Tensor | None = None,
        cache: AnyCache | None = None,
        segments: AdapterSegments = (),
        kinds: Iterable[shapes.AttentionKind] | None = None,
    ) -> AttentionContext:
        """Return the data that `steps` needs about the tokens. It is computed once for all layers.

        Args:
            positions: (b, s) int64.
            dtype: the dtype of the activations.
            documents: (b, s) int64, document ids; None if each row is one document. They are read fastest on the host.
            segments: the adapters of the tokens; if there are several, b is 1. By default there is one adapter.
            cache: any layer's cache (one per adapter if several), before new keys are added. The first call fills it
                with complete prompts, padded on the right. Later tokens attend to its keys up to their own position.
            kinds: the kinds of attention of all layers, if some differ from this layer's kind.
        """
        heads, (num_rows, length) = self.qkv.heads, positions.shape
        ropes, windows = map(dict.fromkeys, zip(*([self.kind] if kinds is None else kinds), strict=True))
        tables = {rope: rotation_table(positions, replace(heads, rope=rope), dtype) for rope in ropes if rope}
        context = AttentionContext(positions, tables)
        if isinstance(cache, tuple):
            by_segment = zip(_by_segment(positions, segments), cache, strict=True)
            kinds = [shapes.AttentionKind(None, window) for window in windows]
            of_segments = tuple(self.context(ids, dtype, cache=own, kinds=kinds) for ids, own in by_segment)
            return replace(context, of_segments=of_segments)
        if cache is not None and cache.filled:
            mask = partial(self._cache_mask, positions, cache)
            return replace(context, mask=_by_window(windows, cache.num_read(length), mask))
        device, size = positions.device, cpu_attention.tile_size(heads.num, heads.num_kv)
        segments = segments or (AdapterSegment(ONLY, num_rows, length),)
        if len(segments) == 1 and documents is None:
            found = whole_rows(num_rows, length, device)
        else:
            ids = torch.zeros(positions.shape) if documents is None else documents
            found = find_documents(_by_segment(ids, segments), device)

        def function(window: int | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            route, scores = self.route(device, dtype, window), cpu_attention.Scores(heads.scale, window, heads.cap)
            if route.attend is not None:
                return partial(attend_within, documents=found, scores=scores, attend=route.attend)
            find = partial(cpu_attention.find_query_tiles, size=size, window=window, device=device)
            parts = _tiled_rows(segments, documents, find)
            kernels = self.kernels if device.type == "cpu" else EAGER  # a GPU's are compiled for each number of keys
            return partial(cpu_attention.attend_by_tiles, parts=parts, scores=scores, kernels=kernels)

        return replace(context, attend=_by_window(windows, found.longest, function))

    def route(self, device: torch.device, dtype: torch.dtype, window: int | None = None) -> AttentionRoute:
        """Return the kernel for attention among the tokens of one call, on `device` and in the activations' dtype."""
        heads, options = self.qkv.heads, {"deterministic": self.deterministic, "window": window is not None}
        return choose_attention(device, dtype, heads.dim, cap=heads.cap, **options)

    def _cache_mask(self, positions: Tensor, cache: KeyValueCache, window: int | None) -> Tensor:
        batch, length = positions.shape
        kv_heads, group = self.qkv.heads.num_kv, self.qkv.heads.num // self.qkv.heads.num_kv
        num_keys = cache.num_read(length)
        keys = torch.arange(padded(num_keys), device=positions.device)
        hidden = keys > positions[:, :, None]  # (b, s, padded keys)
        if window is not None:
            hidden |= keys <= positions[:, :, None] - window
        added = cache.keys.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        rows = added[:, None].expand(batch, kv_heads * group, length, len(keys)).reshape(-1, group * length, len(keys))
        return rows[..., :num_keys]  # rows start at multiples of 8; else CUDA's kernel copies the mask in every layer

    def steps(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        context: AttentionContext,
        tensor_parallel: TensorParallel,
        *,
        update: LayerUpdate | None = None,
        cache: AnyCache | None = None,
    ) -> Steps[tuple[Tensor, Tensor]]:
        """Yield after the first step. Return x = hidden + addend, and the attention output of this rank's heads for x.

        The attention output, (b, s, local heads * head_dim), is the input of `output`.

        Args:
            hidden, addend: activations between layers, (b, s, d) or (1, b s / p, d).
            context: the result of `context`.
            cache: the cache of this rank's key and value heads, to which new keys and values are added. With several
                adapters, there is one cache per adapter.
        """
        table = () if self.qkv.rope is None else context.tables[self.qkv.rope]
        given: dict[str, Any] = {"num_rows": len(context.positions), "table": table}
        given["overlap"] = tensor_parallel.overlap
        own = (update or {}).get(shapes.QKV)
        hidden, (query, key, value) = yield from steps_of(self.qkv, hidden, tensor_parallel, own, addend, **given)
        if isinstance(cache, tuple):
            heads = cpu_attention.split_rows((query, key, value), [own.positions.shape for own in context.of_segments])
            by_segment = zip(heads, context.of_segments, cache, strict=True)
            outputs = [self._attend(q, k, v, own, of_segment) for (q, k, v), own, of_segment in by_segment]
            return hidden, torch.cat([output.flatten(0, 1) for output in outputs])[None]
        return hidden, self._attend(query, key, value, context, cache)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, cache: KeyValueCache | None
    ) -> Tensor:
        """Return attention outputs (b, s, heads * head_dim) from heads (b, heads, s, head_dim)."""
        if cache is not None:
            cache.update(key, value, context.positions)
            if cache.filled:
                output = _attend_to_cache(query, cache, context.mask[self.kind.window], self.qkv.heads)
                return output.transpose(1, 2).flatten(2).to(query.dtype)
        return context.attend[self.kind.window](query, key, value)


def _by_window(windows: Iterable[int | None], longest: int, make: Callable[[int | None], Any]) -> dict[Any, Any]:
    """Return `make(window)` by window, where windows of at least `longest` tokens, the longest document, are None."""
    needed = {window: None if window is None or window >= longest else window for window in windows}
    made = {window: make(window) for window in dict.fromkeys(needed.values())}
    return {window: made[own] for window, own in needed.items()}


def _by_segment(ids: Tensor, segments: AdapterSegments) -> list[Tensor]:
    """Split ids (1, s), or (rows, length) of a single adapter, into one tensor (rows, length) per adapter."""
    parts = ids.flatten().split([segment.num_tokens for segment in segments])
    return [part.view(segment.num_rows, segment.length) for part, segment in zip(parts, segments, strict=True)]


def _tiled_rows(segments: AdapterSegments, documents: Tensor | None, find: Callable[..., Any]) -> tuple[TiledRows, ...]:
    """Return the rows of a micro-batch for attention by tiles. The result of a row does not depend on other rows.

    Consecutive rows of one length are computed together, except packed rows of different adapters. A tile of these
    would contain all keys that any of the rows attends to, so the rounding of a row would depend on other rows.
    """
    if documents is not None:
        pairs = zip(segments, _by_segment(documents, segments), strict=True)
        return tuple(TiledRows(s.num_rows, s.length, find(ids, s.length)) for s, ids in pairs)
    found = []
    for length, some in groupby(segments, key=lambda segment: segment.length):
        num_rows = sum(segment.num_rows for segment in some)
        found.append(TiledRows(num_rows, length, find(None, length)))
    return tuple(found)


def _attend_to_cache(query: Tensor, cache: KeyValueCache, mask: Tensor, how: shapes.HeadShape) -> Tensor:
    """Return the attention output of new tokens, (b, heads, s, head_dim), over the keys for which `mask` has columns.

    Query heads that share a key-value head are stacked as tokens of one head, so that keys are not copied. In fp32
    (always on a CPU), two matmuls take two thirds of the time of PyTorch's fused kernel, which is optimised for many
    queries. In bf16 the fused kernel is used, because it computes scores in fp32; it has no cap. cuDNN's is avoided,
    because it builds a plan for each number of keys. `prepare_environment` gives cuDNN the lowest priority.
    """
    batch, heads, length, head_dim = query.shape
    keys, values = (tensor.flatten(0, 1)[:, : mask.shape[-1]] for tensor in (cache.keys, cache.values))
    folded = query.to(keys.dtype).reshape(keys.shape[0], -1, head_dim)
    if how.cap is not None:
        scores = torch.bmm(upcast(folded), upcast(keys).transpose(1, 2)).mul_(how.scale / how.cap).tanh_().mul_(how.cap)
        output = torch.bmm(scores.add_(mask).softmax(dim=-1).to(values.dtype), values)
    elif keys.dtype == torch.float32:
        scores = torch.baddbmm(mask, folded, keys.transpose(1, 2), alpha=how.scale)
        output = torch.bmm(scores.softmax(dim=-1), values)
    else:
        output = functional.scaled_dot_product_attention(
            folded[:, None], keys[:, None], values[:, None], attn_mask=mask[:, None], scale=how.scale
        )
    return output.reshape(batch, heads, length, head_dim)  # copies if the kernel returns tokens first, as CUDA's do


# Rotary embedding -----------------------------------------------------------------------------------------------------
#
# It follows Hugging Face:
#
#     angle(p, i) = p * f_i, f_i = theta^(-2 i / n); (x1, x2) -> a (x1 cos - x2 sin, x2 cos + x1 sin)
#
# over the two halves of the first n elements of each head, or over its even and odd elements if the embedding is
# interleaved. Frequencies and angles are fp32, as in transformers. Scaling changes f_i and a.


@lru_cache(maxsize=64)
def inverse_frequencies(heads: shapes.HeadShape, device: torch.device | None = None) -> Tensor:
    """Return the frequencies f_i of the rotary embedding, (rotary_dim / 2,) fp32. They are computed once, because some
    scalings have numbers from the host, which a CUDA graph cannot copy."""
    exponents = torch.arange(0, heads.rotary_dim, 2, dtype=torch.int64, device=device).float() / heads.rotary_dim
    powers, scaling = heads.rope.theta**exponents, heads.rope.scaling
    match scaling:
        case shapes.LinearScaling():
            return 1.0 / powers / scaling.factor
        case shapes.Llama3Scaling():
            return _llama3(scaling, 1.0 / powers)
        case shapes.YarnScaling():
            return _yarn(scaling, powers, heads)
        case shapes.LongRopeScaling():
            return 1.0 / (torch.tensor(scaling.factors, dtype=torch.float32, device=device) * powers)
    return 1.0 / powers


def amplitude(scaling: shapes.RopeScaling | None) -> float:
    """Return the factor `a` by which cos and sin are multiplied."""
    return scaling.amplitude if isinstance(scaling, shapes.YarnScaling | shapes.LongRopeScaling) else 1.0


def rotation_table(positions: Tensor, heads: shapes.HeadShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the scaled cos and sin of all positions (b, s), each (b s, 1, rotary_dim / 2) in `dtype`."""
    angles = positions.reshape(-1, 1, 1).float() * inverse_frequencies(heads, positions.device)
    factor = amplitude(heads.rope.scaling)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _llama3(scaling: shapes.Llama3Scaling, frequencies: Tensor) -> Tensor:
    """Return frequencies for Llama 3. Wavelengths above original / low_freq_factor are multiplied by `factor`. Those
    below original / high_freq_factor do not change. Between these limits, the result is a linear blend."""
    wavelengths = 2 * math.pi / frequencies
    blend = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - blend) * frequencies / scaling.factor + blend * frequencies
    low = wavelengths > scaling.original_max_positions / scaling.low_freq_factor
    high = wavelengths < scaling.original_max_positions / scaling.high_freq_factor
    scaled = torch.where(low, frequencies / scaling.factor, frequencies)
    return torch.where(~low & ~high, blended, scaled)


def _yarn(scaling: shapes.YarnScaling, powers: Tensor, heads: shapes.HeadShape) -> Tensor:
    """Return frequencies for YaRN. Those with more than `beta_fast` rotations over the original positions do not
    change. Those with fewer than `beta_slow` are divided by `factor`. A ramp over the indices blends the rest."""
    size, theta = heads.rotary_dim, heads.rope.theta

    def index_of(rotations: float) -> float:
        return size * math.log(scaling.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001  # as in transformers: no division by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1).to(powers.device)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
