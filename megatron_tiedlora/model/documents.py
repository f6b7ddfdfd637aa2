"""Attention within documents that share a row: none sees another, and no time goes to what would be masked.

On CUDA by a kernel for sequences of different lengths (flash_attn's where it is installed, else PyTorch's), elsewhere
document by document.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "Documents"], torch.Tensor]


class Documents(NamedTuple):
    """The documents of rows (b, s), end to end: document i is tokens offsets[i] to offsets[i + 1] - 1 of (b s).

    Attributes:
        ids: (b, s) int64, which document of its row each token belongs to.
        bounds: offsets on the host, 0 first and b s last.
        offsets: the same, (n + 1,) int32 on the device.
        longest: tokens of the longest.
    """

    ids: torch.Tensor
    bounds: list[int]
    offsets: torch.Tensor
    longest: int


def find_documents(ids: torch.Tensor, device: torch.device) -> Documents:
    """Where the documents of `ids` (b, s) int64 begin and end: a new id or a new row begins one.

    Waits for nothing where `ids` are on the host.
    """
    begins = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = [*begins.flatten().nonzero()[:, 0].tolist(), ids.numel()]
    offsets = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(stop - start for start, stop in pairwise(bounds))
    return Documents(ids, bounds, offsets, longest)


def attend_within(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: (b, heads, s, head_dim); key and value: (b, kv heads, s, head_dim).

    Returns:
        (b, s, heads * head_dim).
    """
    size, _, length, _ = query.shape
    kernel = find_varlen() if query.is_cuda and query.dtype != torch.float32 else None
    if kernel is not None:
        queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
        return kernel(queries, keys, values, documents).reshape(size, length, -1)
    if query.is_cuda:
        mask = document_mask(documents.ids.to(query.device))
        return mix(query, key, value, mask).transpose(1, 2).flatten(2)
    parts = []
    for start, stop in pairwise(documents.bounds):
        row, first = divmod(start, length)
        part = (slice(row, row + 1), slice(None), slice(first, first + stop - start))
        parts.append(mix(query[part], key[part], value[part]).transpose(1, 2))
    return torch.cat(parts, dim=1).view(size, length, -1)


def mix(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """PyTorch's attention, (b, heads, s, head_dim): causal, or as a bool `mask` says."""
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=query.shape[1] != key.shape[1]
    )


def find_varlen() -> Varlen | None:
    """A 16-bit kernel for documents of different lengths, or None: flash_attn's, else PyTorch's where it has GQA."""
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func

        def by_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, found: Documents) -> torch.Tensor:
            bounds, longest = (found.offsets, found.offsets), (found.longest, found.longest)
            mixed: torch.Tensor = flash_attn_varlen_func(query, key, value, *bounds, *longest, causal=True)
            return mixed

        return by_flash
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention.varlen import varlen_attn

    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def by_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, found: Documents) -> torch.Tensor:
        bounds, longest = (found.offsets, found.offsets), (found.longest, found.longest)
        mixed = varlen_attn(query, key, value, *bounds, *longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(mixed, torch.Tensor)
        return mixed

    return by_torch


def document_mask(documents: torch.Tensor) -> torch.Tensor:
    """(b, 1, s, s) bool from document ids (b, s): a token sees itself and what came before it in its own document."""
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal
