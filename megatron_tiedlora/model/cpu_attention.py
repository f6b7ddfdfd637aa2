"""Compute causal attention by tiles of queries: on CPUs, and on GPUs where no fused kernel has what scores need.

In 16 bits this takes half of a CPU's time with PyTorch's fused kernel. No time is spent on keys of other documents, or
before the window of a tile's first query. With S = scale Q K^T for allowed keys, P = softmax(S), O = P V, and delta =
sum of dO * O of each query,

    dV = P^T dO        dS = P (dO V^T - delta)        dQ = scale dS K        dK = scale dS^T Q

With a cap, C = cap tanh(S / cap) is in the place of S in P, and dS has another factor, 1 - (C / cap)^2.
The forward pass saves Q, K, V, O and log sum exp(S), one element per query and head, like fused kernels on GPUs. S, the
operands and exponentials of S, and the sums dK and dV are in max(fp32, input dtype). Operands of the other matmuls are
in the input dtype. Query heads that share a key head are stacked as queries of one head, so that keys are not copied.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.model.batch import document_begins
from megatron_tiedlora.parallel.kernels import Kernels
from megatron_tiedlora.parallel.loss import first_derivative_only
from megatron_tiedlora.parallel.rows import upcast


def tile_size(num_heads: int, num_kv_heads: int) -> int:
    """Return the number of queries per tile: 64, or 128 if no heads share keys, so that matmuls have enough rows.

    Smaller tiles need more calls. Larger tiles multiply with keys that their first queries do not attend to.
    """
    return 64 if num_heads > num_kv_heads else 128


class Scores(NamedTuple):
    """How the scores of attention are computed from queries and keys.

    Attributes:
        scale: the factor of Q K^T.
        window: the number of tokens that a token attends to: itself and the tokens before it. None: all of them.
        cap: scaled scores s are replaced by cap tanh(s / cap) before the softmax; None if they are not.
    """

    scale: float
    window: int | None = None
    cap: float | None = None


class QueryTile(NamedTuple):
    """The queries `start` to `stop - 1` of every row, which attend to some of the keys `first` to `stop - 1`.

    Attributes:
        mask: (rows, 1, queries, keys), or (1, 1, queries, keys) for all rows: 0 for keys that are attended to, else
            -inf. It is bf16, because a bool mask takes four times as long to read.
    """

    start: int
    stop: int
    first: int
    mask: Tensor


def find_query_tiles(
    ids: Tensor | None, length: int, *, size: int, window: int | None = None, device: torch.device | None = None
) -> tuple[QueryTile, ...]:
    """Return the tiles of rows of `length` tokens, the last tile first.

    Args:
        ids: (b, length) int64, document ids; a document begins where the id changes. None: each row is one document.
        size: the number of queries per tile, see `tile_size`.
        window: see `Scores`.
        device: the device of the masks, by default the host. It is not synchronised with if the ids are on the host.
    """
    if ids is None:
        ids = torch.zeros(1, length, dtype=torch.int64)
    positions = torch.arange(length)
    # This is the first key of each token: the first token of its document or of its window.
    first_keys = torch.where(document_begins(ids.cpu()), positions, 0).cummax(dim=1).values
    if window is not None:
        first_keys = first_keys.maximum(positions - (window - 1))
    firsts = first_keys.amin(0).tolist()  # they never decrease within a row
    if device is not None and device.type != "cpu":
        first_keys = first_keys.pin_memory() if device.type == "cuda" else first_keys
        positions, first_keys = torch.arange(length, device=device), first_keys.to(device, non_blocking=True)
    tiles = []
    for start in reversed(range(0, length, size)):
        stop, first = min(start + size, length), firsts[start]
        keys, queries = positions[first:stop], positions[start:stop, None]
        seen = (keys >= first_keys[:, start:stop, None]) & (keys <= queries)
        mask = torch.zeros_like(seen, dtype=torch.bfloat16).masked_fill_(~seen, -torch.inf)
        tiles.append(QueryTile(start, stop, first, mask[:, None].detach()))
    return tuple(tiles)


class TiledRows(NamedTuple):
    """Consecutive rows of one length, with the tiles of their queries."""

    num_rows: int
    length: int
    tiles: tuple[QueryTile, ...]


def attend_by_tiles(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[TiledRows], scores: Scores, kernels: Kernels
) -> Tensor:
    """Return the attention of each token to the keys that its tile's mask allows.

    The result is one tensor for all rows, so that it is saved once.

    Args:
        query: (b, heads, s, head_dim); key and value: (b, kv heads, s, head_dim).
        parts: consecutive rows of equal length, with their tiles; all parts together have the b s tokens.
        scores: their scale and cap. The window is part of the tiles.

    Returns:
        (b, s, heads * head_dim).
    """
    output: Tensor = _TiledAttention.apply(query, key, value, parts, scores, kernels)
    return output.flatten(2)


class _Operands:
    """Queries and keys in the layout that the matmuls need, and memory that all tiles share."""

    def __init__(self, query: Tensor, key: Tensor, tiles: Sequence[QueryTile], scale: float) -> None:
        self.query = query
        self.scale = scale
        self.keys = key.reshape(-1, *key.shape[2:])  # (b kv, s, head_dim)
        self._wide_keys = upcast(self.keys)
        self._size = max((tile.stop - tile.start) * (tile.stop - tile.first) for tile in tiles)
        self._scores = self.memory(self._wide_keys.dtype)

    def memory(self, dtype: torch.dtype) -> Tensor:
        """Return memory for the scores of the largest tile, one element per query head, query and key."""
        size, num_heads = self.query.shape[:2]
        return self.query.new_empty(size * num_heads * self._size, dtype=dtype)

    def of_tile(self, memory: Tensor, tile: QueryTile) -> Tensor:
        """Return the slice of the memory that a tile uses, (b kv, heads / kv * queries, keys)."""
        num_keys, queries = tile.stop - tile.first, tile.stop - tile.start
        folded = self.query.shape[0] * self.query.shape[1] * queries // len(self.keys)
        return memory[: len(self.keys) * folded * num_keys].view(len(self.keys), folded, num_keys)

    def fold(self, heads: Tensor, tile: QueryTile, dtype: torch.dtype) -> Tensor:
        """Return the tile's queries, (b kv, heads / kv * queries, head_dim), from (b, heads, s, head_dim)."""
        return heads[:, :, tile.start : tile.stop].to(dtype).reshape(len(self.keys), -1, heads.shape[-1])

    def scores(self, tile: QueryTile) -> Tensor:
        """Return scale Q K^T of a tile, (b kv, heads / kv * queries, keys), in the dtype of `upcast`."""
        queries = self.fold(self.query, tile, self._wide_keys.dtype)
        keys = self._wide_keys[:, tile.first : tile.stop].transpose(1, 2)
        scores = self.of_tile(self._scores, tile)
        return torch.baddbmm(scores, queries, keys, beta=0, alpha=self.scale, out=scores)


def _lines(tensor: Tensor, tile: QueryTile) -> Tensor:
    """Reshape (b kv, heads / kv * queries, n) or (b, heads, queries, n) to broadcast with the tile's mask.

    The result is contiguous, because torch.compile makes a kernel for each memory layout.
    """
    return tensor.reshape(len(tile.mask), -1, tile.stop - tile.start, tensor.shape[-1]).contiguous().detach()


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[TiledRows], how: Scores, kernels: Kernels
    ) -> Tensor:
        heads = [tensor.detach() for tensor in (query, key, value)]
        output = _tokens_first(query)
        by_part = split_rows((*heads, output), [part[:2] for part in parts])
        log_sums = [_attend_(views, part.tiles, how, kernels) for part, views in zip(parts, by_part, strict=True)]
        result = output.transpose(1, 2)
        ctx.save_for_backward(query, key, value, result, *log_sums)
        ctx.parts, ctx.options = parts, (how, kernels)
        return result

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *log_sums = (tensor.detach() for tensor in ctx.saved_tensors)
        grad_heads = [_tokens_first(tensor) for tensor in (query, key, value)]
        tensors = query, key, value, output.transpose(1, 2), gradient.transpose(1, 2), *grad_heads
        by_part = split_rows(tensors, [part[:2] for part in ctx.parts])
        for part, views, of_part in zip(ctx.parts, by_part, log_sums, strict=True):
            _attention_gradients_(views, of_part, part.tiles, *ctx.options)
        return *grad_heads, None, None, None


def _tokens_first(heads: Tensor) -> Tensor:
    """Return memory for (b, heads, s, head_dim) in the order of (b, s, heads, head_dim), in which matmuls read it."""
    size, num_heads, length, head_dim = heads.shape
    return heads.new_empty(size, length, num_heads, head_dim).transpose(1, 2)


def split_rows(tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield views (rows, heads, length, head_dim) of tensors (b, heads, s, head_dim), for each (rows, length)."""
    if len(shapes) == 1 and len(tensors[0]) == shapes[0][0]:
        yield tuple(tensors)
        return
    sizes = [rows * length for rows, length in shapes]
    by_tensor = [tensor.transpose(1, 2).flatten(0, 1).split(sizes) for tensor in tensors]
    for shape, views in zip(shapes, zip(*by_tensor, strict=True), strict=True):
        yield tuple(view.unflatten(0, shape).transpose(1, 2) for view in views)


def _attend_(tensors: Sequence[Tensor], tiles: Sequence[QueryTile], how: Scores, kernels: Kernels) -> Tensor:
    """Write O and return log sum exp(S), (b, heads, s, 1). `tensors` are Q, K, V and O, (b, heads, s, head_dim)."""
    query, key, value, output = tensors
    size, num_heads, length, _ = query.shape
    operands = _Operands(query, key, tiles, how.scale)
    values = value.reshape(operands.keys.shape)
    log_sums = upcast(query.new_empty(size, num_heads, length, 1))
    memory = operands.memory(query.dtype)
    for tile in tiles:
        scores, weights = operands.scores(tile), operands.of_tile(memory, tile)
        sums, total = kernels.exp_scores_(_lines(scores, tile), tile.mask, _lines(weights, tile), how.cap)
        summed = torch.bmm(weights, values[:, tile.first : tile.stop])
        part = slice(tile.start, tile.stop)
        lines = (size, num_heads, tile.stop - tile.start, -1)
        log_sums[:, :, part] = sums.view(lines)
        output[:, :, part] = summed.view(lines) / total.view(lines)
    return log_sums


def _attention_gradients_(
    tensors: Sequence[Tensor], log_sums: Tensor, tiles: Sequence[QueryTile], how: Scores, kernels: Kernels
) -> None:
    """Write dQ, dK and dV. `tensors` are Q, K, V, O, dO, dQ, dK and dV, each (b, heads, s, head_dim)."""
    query, key, value, output, gradient, grad_query, grad_key, grad_value = tensors
    operands = _Operands(query, key, tiles, how.scale)
    keys, values = operands.keys, value.reshape(operands.keys.shape)
    deltas = (upcast(gradient) * upcast(output)).sum(-1, keepdim=True)
    key_sums, value_sums = (torch.zeros_like(keys, dtype=log_sums.dtype) for _ in range(2))
    memories = [operands.memory(query.dtype) for _ in range(2)]
    for tile in tiles:
        part, seen = slice(tile.start, tile.stop), slice(tile.first, tile.stop)
        queries, gradients = (operands.fold(heads, tile, query.dtype) for heads in (query, gradient))
        weights, grad_scores = (operands.of_tile(memory, tile) for memory in memories)
        torch.bmm(gradients, values[:, seen].transpose(1, 2), out=grad_scores)
        row_wise = (log_sums[:, :, part], deltas[:, :, part], grad_scores, weights)
        scores = _lines(operands.scores(tile), tile)
        kernels.score_gradient_(scores, tile.mask, *(_lines(tensor, tile) for tensor in row_wise), how.cap)
        value_sums[:, seen] += torch.bmm(weights.transpose(1, 2), gradients)
        key_sums[:, seen] += torch.bmm(grad_scores.transpose(1, 2), queries)
        product = torch.empty_like(queries)
        torch.baddbmm(product, grad_scores, keys[:, seen], beta=0, alpha=operands.scale, out=product)
        grad_query[:, :, part] = product.view(*query.shape[:2], -1, query.shape[-1])
    key_sums *= operands.scale
    grad_key.copy_(key_sums.view(key.shape))
    grad_value.copy_(value_sums.view(key.shape))
