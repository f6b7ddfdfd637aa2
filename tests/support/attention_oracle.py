"""Attention within documents by its definition, in fp64, and documents to try it on."""

from __future__ import annotations

import torch

IDS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 8, [0] * 1 + [1] * 15])
"""Documents of 5, 3, 8, 1 and 15 tokens in two rows of 16."""


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """Softmax of masked scores: (b, heads, s, head_dim), keys and values (b, kv heads, ...) -> (b, s, heads head_dim).

    Args:
        ids: (b, s), which document of its row each token belongs to.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (heads.double() for heads in (query, key, value))
    key, value = (heads.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for heads in (key, value))
    length = ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    seen = (ids[:, None, :, None] == ids[:, None, None, :]) & causal
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


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
