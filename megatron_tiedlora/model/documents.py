"""Attention within documents that share a row: none sees another, and no time goes to what would be masked.

On CUDA in 16 bits by a kernel for sequences of different lengths, flash_attn's where it is installed, else PyTorch's
where it has one that fits. On GPUs and in dtypes that the kernels do not have, document by document. CPUs have
`blocks.py` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.nn import functional

Varlen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""From queries, keys and values (tokens, heads, head_dim), offsets (n + 1,) int32 and the longest length."""


class Documents(NamedTuple):
    """The documents of rows (b, s), end to end: document i is tokens bounds[i] to bounds[i + 1] - 1 of (b s).

    Attributes:
        bounds: on the host, 0 first and b s last.
        offsets: the same, (n + 1,) int32 on the device.
        longest: tokens of the longest.
        kernel: what attends to all of them at once; None: one after another.
    """

    bounds: list[int]
    offsets: torch.Tensor
    longest: int
    kernel: Varlen | None


def find_documents(ids: torch.Tensor, device: torch.device, *, dtype: torch.dtype, head_dim: int) -> Documents:
    """Where the documents of `ids` (b, s) int64 begin and end: a new id or a new row begins one.

    Waits for nothing where `ids` are on the host.
    """
    begins = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    bounds = [*begins.flatten().nonzero()[:, 0].tolist(), ids.numel()]
    offsets = torch.tensor(bounds, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    longest = max(stop - start for start, stop in pairwise(bounds))
    fits = _runs_kernels(device, dtype, head_dim)
    return Documents(bounds, offsets, longest, find_varlen(head_dim) if fits else None)


def _runs_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether kernels for different lengths run: in 16 bits, from Ampere on, with heads of up to 256."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim > 256:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend_within(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Causal attention within each document.

    Args:
        query: (b, heads, s, head_dim); key and value: (b, kv heads, s, head_dim).

    Returns:
        (b, s, heads * head_dim).
    """
    size, _, length, _ = query.shape
    if documents.kernel is not None:
        queries, keys, values = (heads.transpose(1, 2).flatten(0, 1) for heads in (query, key, value))
        mixed = documents.kernel(queries, keys, values, documents.offsets, documents.longest)
        return mixed.reshape(size, length, -1)
    parts = []
    for start, stop in pairwise(documents.bounds):
        row, first = divmod(start, length)
        part = (slice(row, row + 1), slice(None), slice(first, first + stop - start))
        parts.append(causal_attention(query[part], key[part], value[part]).transpose(1, 2))
    return torch.cat(parts, dim=1).view(size, length, -1)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """PyTorch's attention of each token to those up to it in its row, (b, heads, s, head_dim)."""
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )


def find_varlen(head_dim: int) -> Varlen | None:
    """A kernel for documents of different lengths: flash_attn's, else PyTorch's where it has grouped queries."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:  # not there, or built for another torch
        return _torch_varlen() if head_dim % 8 == 0 else None  # PyTorch's does not fill heads up

    def by_flash(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int
    ) -> torch.Tensor:
        mixed: torch.Tensor = flash_attn_varlen_func(query, key, value, offsets, offsets, longest, longest, causal=True)
        return mixed

    return by_flash


def _torch_varlen() -> Varlen | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None  # before 2.12

    def by_torch(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: torch.Tensor, longest: int
    ) -> torch.Tensor:
        mixed = varlen_attn(query, key, value, offsets, offsets, longest, longest, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(mixed, torch.Tensor)
        return mixed

    return by_torch
