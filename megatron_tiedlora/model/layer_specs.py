"""The model as ONE flat list of layers: embedding, L blocks, head. Everything that builds a model builds this list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.model.attention import Attention, KeyValueCache
from megatron_tiedlora.model.families.llama import LlamaConfig
from megatron_tiedlora.model.mlp import SwiGlu
from megatron_tiedlora.model.norm import RmsNorm
from megatron_tiedlora.parallel.layers import FrozenEmbedding, frozen_parameter
from megatron_tiedlora.parallel.loss import IGNORED_LABEL, sum_token_losses

# Supervised rows whose logits exist at one time: 1,024 rows of a 49,152-word vocabulary are 0.2 GB in fp32.
HEAD_ROWS = 1024


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, update_scale: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attention = Attention(
            config.hidden_size,
            local_heads=config.num_heads,
            local_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rope=config.rope,
            bias=config.attention_bias,
            update_scale=update_scale,
            dtype=dtype,
        )
        self.mlp_norm = RmsNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = SwiGlu(config.hidden_size, config.intermediate_size, dtype=dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        update: LayerUpdate | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """(b, s, d) and positions (b, s) -> (b, s, d)."""
        hidden = hidden + self.attention(self.attention_norm(hidden), positions, update, cache)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Head(nn.Module):
    """Final norm, vocabulary projection and loss.

    With tied embeddings it is made without a weight, and whoever runs the list gives it the embedding's Parameter.
    """

    weight: nn.Parameter

    def __init__(self, config: LlamaConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        own = None if config.tied_embeddings else frozen_parameter(config.vocab_size, config.hidden_size, dtype=dtype)
        self.register_parameter("weight", own)

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (b, s, V) without labels, else the summed loss of the supervised positions, a scalar.

        Args:
            hidden: (b, s, d).
            labels: (b, s) int64, the token that follows each position, or -100 where it is not supervised. Only
                supervised positions meet the vocabulary.
        """
        if labels is None:
            return nn.functional.linear(self.norm(hidden), self.weight)
        supervised = labels != IGNORED_LABEL
        rows, targets = self.norm(hidden[supervised]), labels[supervised]
        if targets.numel() == 0:  # a zero that still reaches the adapters, so that every rank's gradients exist
            return hidden.float().sum() * 0.0
        losses = [
            sum_token_losses(nn.functional.linear(part, self.weight), target)
            for part, target in zip(rows.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True)
        ]
        return torch.stack(losses).sum()


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the flat list: what it is, and how to make it."""

    kind: str
    index: int
    build: Callable[[], nn.Module]


def layer_specs(config: LlamaConfig, *, update_scale: float, dtype: torch.dtype) -> tuple[LayerSpec, ...]:
    """The flat list: layer 0 the embedding, layers 1 to L the blocks (1-based as in the paper), layer L + 1 the head.

    Building makes empty weights on the default device; the checkpoint reader fills them.
    """

    def block() -> nn.Module:
        return Block(config, update_scale=update_scale, dtype=dtype)

    return (
        LayerSpec("embedding", 0, lambda: FrozenEmbedding(config.vocab_size, config.hidden_size, dtype=dtype)),
        *(LayerSpec("block", index, block) for index in range(1, config.num_layers + 1)),
        LayerSpec("head", config.num_layers + 1, lambda: Head(config, dtype=dtype)),
    )
