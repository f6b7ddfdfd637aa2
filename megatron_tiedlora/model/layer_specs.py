"""The model as ONE flat list of layers: embedding, L blocks, head. Everything that builds a model builds this list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from megatron_tiedlora.adapters.tied_adapter import LayerUpdate
from megatron_tiedlora.base.shapes import ModelShape, NormShape
from megatron_tiedlora.model.attention import Attention, KeyValueCache, Places
from megatron_tiedlora.model.mlp import SwiGlu
from megatron_tiedlora.model.norm import RmsNorm
from megatron_tiedlora.model.supervised import Supervised
from megatron_tiedlora.parallel.collectives import enter_tensor_parallel_region, gather_from_tensor_parallel_region
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.layers import VocabularyParallelEmbedding, frozen_linear, frozen_parameter
from megatron_tiedlora.parallel.loss import sum_token_losses, token_losses

# Supervised rows whose logits exist at one time (1,024 rows of a 49,152-word vocabulary are 0.2 GB in fp32).
HEAD_ROWS = 1024


class Block(nn.Module):
    """x = x + attention(norm(x)); x = x + mlp(norm(x)).

    With `recomputes_gate` the second norm, gate and up are computed again in the backward pass: of d + 2 f numbers a
    token only d are kept.
    """

    def __init__(self, *, attention: Attention, mlp_norm: RmsNorm, mlp: SwiGlu, recomputes_gate: bool) -> None:
        super().__init__()
        self.recomputes_gate = recomputes_gate
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def forward(
        self,
        hidden: torch.Tensor,
        places: Places,
        tensor_parallel: TensorParallel,
        *,
        update: LayerUpdate | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """What flows between layers, (b, s, d) or (1, b s / p, d), and the same back; the rest as in Attention."""
        attention_output = self.attention.attend(hidden, places, tensor_parallel, update=update, cache=cache)
        return self.feed(self.join(hidden, attention_output, tensor_parallel), tensor_parallel)

    def join(
        self, hidden: torch.Tensor, attention_output: torch.Tensor, tensor_parallel: TensorParallel
    ) -> torch.Tensor:
        """x + attention's output, position by position: of all positions, or of some. Keeps nothing.

        Args:
            hidden: what came into the block, (b, s, d) or (1, b s / p, d).
            attention_output: (b, s, local heads * head_dim).
        """
        return hidden + self.attention.output(attention_output, tensor_parallel)

    def feed(self, hidden: torch.Tensor, tensor_parallel: TensorParallel, *, recomputes: bool = True) -> torch.Tensor:
        """x + mlp(norm(x)) of what `join` gives, the same shape.

        Args:
            recomputes: False to keep gate and up all the same, where the backward pass follows at once.
        """
        if self.recomputes_gate and recomputes and torch.is_grad_enabled():
            opened = checkpoint(self._open, hidden, tensor_parallel, use_reentrant=False, preserve_rng_state=False)
        else:
            opened = self._open(hidden, tensor_parallel)
        return hidden + self.mlp.close(opened, tensor_parallel)

    def _open(self, hidden: torch.Tensor, tensor_parallel: TensorParallel) -> torch.Tensor:
        return self.mlp.open(self.mlp_norm(hidden), tensor_parallel)


class Head(nn.Module):
    """Final norm, vocabulary projection and loss.

    With tied embeddings it is made without a weight, and whoever runs the list gives it the embedding's Parameter, or
    one of its own where the embedding is on another stage.
    """

    weight: nn.Parameter

    def __init__(self, norm: RmsNorm, weight: nn.Parameter | None, *, vocab_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.norm = norm
        self.register_parameter("weight", weight)
        self.vocab_size = vocab_size
        self.kernels = kernels

    def forward(
        self,
        hidden: torch.Tensor,
        tensor_parallel: TensorParallel,
        supervised: Supervised | None = None,
        *,
        summed: bool = True,
    ) -> torch.Tensor:
        """Logits, (b, s, V) or (1, b s, V); with `supervised` the summed loss of those positions. Alike on every rank.

        Args:
            hidden: what flows between layers, (b, s, d) or (1, b s / p, d); with `supervised` of its `rows` alone,
                (1, m, d) or (1, m / p, d).
            summed: False for every position's own loss, (n,), without a gradient.
        """
        group = tensor_parallel.group
        hidden = enter_tensor_parallel_region(self.norm(hidden), tensor_parallel)
        if supervised is None:
            local_logits = frozen_linear(hidden, self.weight)
            return gather_from_tensor_parallel_region(local_logits, group, dim=-1)[..., : self.vocab_size]
        first_id = group.rank * self.weight.shape[0]
        weight = self.weight[: max(self.vocab_size - first_id, 0)]  # without the padding of the last rank
        losses = sum_token_losses if summed else token_losses
        rows = hidden[0].index_select(0, supervised.kept)
        del hidden  # as large as its gradient, which is made next
        return losses(
            rows,
            weight,
            supervised.targets,
            first_id=first_id,
            group=group,
            rows_at_once=HEAD_ROWS,
            kernels=self.kernels,
        )


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the flat list: what it is, and how to make it."""

    kind: str
    index: int
    build: Callable[[], nn.Module]


def layer_specs(
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    tp_size: int = 1,
    kernels: Kernels = EAGER,
    recomputes_gate: bool = False,
    deterministic: bool = False,
) -> tuple[LayerSpec, ...]:
    """The flat list: layer 0 the embedding, layers 1 to L the blocks (1-based as in the paper), layer L + 1 the head.

    Building makes empty weights of one tensor-parallel rank's sizes on the default device; the checkpoint reader fills
    them. `tp_size` must divide heads, key-value heads and the feed-forward width. `recomputes_gate`: see Block;
    `deterministic`: see `choose_attention`.
    """
    d, local_vocabulary = shape.hidden_size, -(-shape.vocab_size // tp_size)

    def norm(norm: NormShape) -> RmsNorm:
        return RmsNorm(norm.size, eps=norm.eps, dtype=dtype, kernels=kernels)

    def block() -> nn.Module:
        attention = Attention(
            d,
            local_heads=shape.heads.num // tp_size,
            local_kv_heads=shape.heads.num_kv // tp_size,
            head_dim=shape.heads.dim,
            rope=shape.heads.rope,
            norm_eps=shape.block.attention_norm.eps,
            qkv_bias=shape.block.qkv.bias,
            output_bias=shape.block.output.bias,
            dtype=dtype,
            kernels=kernels,
            deterministic=deterministic,
        )
        mlp = SwiGlu(d, shape.intermediate_size // tp_size, dtype=dtype, kernels=kernels)
        return Block(attention=attention, mlp_norm=norm(shape.block.mlp_norm), mlp=mlp, recomputes_gate=recomputes_gate)

    def head() -> nn.Module:
        own = None if shape.tied_embeddings else frozen_parameter(local_vocabulary, d, dtype=dtype)
        return Head(norm(shape.final_norm), own, vocab_size=shape.vocab_size, kernels=kernels)

    return (
        LayerSpec("embedding", 0, lambda: VocabularyParallelEmbedding(local_vocabulary, d, dtype=dtype)),
        *(LayerSpec("block", index, block) for index in range(1, shape.num_layers + 1)),
        LayerSpec("head", shape.num_layers + 1, head),
    )
