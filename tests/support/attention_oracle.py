"""Attention by its definition, in fp64, and random heads to compare kernels on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.selfcheck.reference import plain_attention


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor, how: Scores | None = None
) -> torch.Tensor:
    """Attention within documents by its definition, in fp64, (b, s, heads * head_dim); `ids` (b, s) on the host."""
    return plain_attention(query.double(), key.double(), value.double(), ids, how)


def heads(
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    shape: tuple[int, int] = (2, 16),
    counts: tuple[int, int] = (6, 2),
    head_dim: int = 32,
) -> list[torch.Tensor]:
    """Queries of `counts[0]` heads, keys and values of `counts[1]`, as views of one storage by tokens; each a leaf."""
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(*shape, counts[0] + 2 * counts[1], head_dim, generator=generator).to(device, dtype)
    parts = fused.transpose(1, 2).split((counts[0], counts[1], counts[1]), dim=1)
    return [part.detach().requires_grad_() for part in parts]


def assert_same(found: torch.Tensor, wanted: torch.Tensor, parts: Sequence[torch.Tensor], tolerance: float) -> None:
    """Values within 1e-12, gradients within the tolerance."""
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    gradient = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(*(torch.autograd.grad(x, parts, gradient) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
