"""A layer's attention by itself."""

from __future__ import annotations

from typing import Any

import torch

from megatron_tiedlora.model.attention import Attention
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs


def attention_layer(
    num_heads: int, num_kv_heads: int, *, hidden_size: int = 48, head_dim: int = 8, dtype: torch.dtype
) -> Attention:
    """The attention of a block, with empty weights."""
    sizes = {"num_attention_heads": num_heads, "num_key_value_heads": num_kv_heads, "head_dim": head_dim}
    others = {"vocab_size": 8, "hidden_size": hidden_size, "intermediate_size": 8, "num_hidden_layers": 1}
    block: Any = layer_specs(shape_from_hf({"model_type": "llama", **sizes, **others}), dtype=dtype)[1].build()
    attention: Attention = block.attention
    return attention
