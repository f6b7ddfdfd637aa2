"""Models of a folder with an adapter in the middle of training, numbers of their steps, and a layer's attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.adapters.adapter_groups import AdapterGroup
from megatron_tiedlora.adapters.tied_adapter import (
    AdapterShard,
    TiedAdapter,
    initial_values,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.shapes import AttentionKind
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.attention import Attention
from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.frozen_weight import frozen_weights


def attention_layer(
    num_heads: int,
    num_kv_heads: int,
    *,
    hidden_size: int = 48,
    head_dim: int = 8,
    dtype: torch.dtype,
    how: Scores | None = None,
) -> Attention:
    """The attention of a block, with empty weights; `how`: its scores, by default without window and cap."""
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    others = {"vocab_size": 8, "hidden_size": hidden_size, "intermediate_size": 8, "num_hidden_layers": 1}
    shape = shape_from_hf({"model_type": "llama", **sizes, **others})
    if how is not None:
        heads = replace(shape.heads, multiplier=how.scale, cap=how.cap)
        kind = AttentionKind(heads.rope, how.window)
        shape = replace(shape, block=replace(shape.block, heads=heads), kinds=(kind,))
    block: Any = layer_specs(shape, dtype=dtype)[1].build()
    attention: Attention = block.attention
    return attention


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normally distributed numbers, drawn in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def adapted_stage(
    folder: Path,
    method: str = "tl6",
    *,
    layers: tuple[int, ...] = (1, 2, 3),
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    scale: float = 0.1,
    **specs: Any,
) -> Stage:
    """The whole model with an adapter of rank 4 on QKV, none of whose tensors is zero.

    Args:
        scale: standard deviation of the adapter's numbers.
        specs: more for `layer_specs`.
    """
    shape = find_model(str(folder)).shape
    config = make_adapter_config(method, rank=4, layers=layers, targets=targets_of(shape), seed=0)
    adapter = TiedAdapter(AdapterShard.whole(config), dtype=torch.promote_types(dtype, torch.float32))
    numbers = {name: drawn(*value.shape, seed=7) * scale for name, value in initial_values(config).items()}
    adapter.load_full(numbers)
    return loaded_stage(folder, adapter, dtype, recompute, **specs)


def loaded_stage(
    folder: Path, adapter: TiedAdapter | AdapterGroup, dtype: torch.dtype, recompute: str = "none", **specs: Any
) -> Stage:
    """The whole model with these adapters; `specs`: more for `layer_specs`."""
    shape = find_model(str(folder)).shape
    made = layer_specs(shape, dtype=dtype, **specs)
    stage = Stage(made, adapter, recompute=recompute)
    with BaseWeights(folder, shape) as weights:
        load_base_weights(weights, frozen_weights(stage))
    return stage


def step_numbers(stage: Stage) -> dict[str, torch.Tensor]:
    """The loss of a micro-batch, and the gradients of the adapter by name."""
    ids = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(3))
    loss = stage(ids, torch.arange(16).expand_as(ids), ids.roll(-1, 1))
    loss.backward()
    assert stage.adapter is not None
    gradients = {name: p.grad for name, p in stage.adapter.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}
