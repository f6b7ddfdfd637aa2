"""Compiled kernels of what families add to the layers: the numbers of plain ones, and nothing is compiled later."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_runs import HOST, assert_same_numbers, loss_and_gradients
from saved_bytes import saved_bytes_per_token

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.passes import saved_per_token
from megatron_tiedlora.training.compiling import compiled_kernels


def everything() -> ModelShape:
    """A model of no family: LayerNorms, norms of heads, and a scaled rotation of part of each head."""
    sizes = {"vocab_size": 500, "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 250}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    normed = shape_from_hf({"model_type": "qwen3", **sizes, **heads}).heads
    shape = shape_from_hf({"model_type": "stablelm", **sizes, **heads, "rope_parameters": rope})
    norms = {"query_norm": normed.query_norm, "key_norm": normed.key_norm}
    return replace(shape, block=replace(shape.block, heads=replace(shape.heads, **norms)))


def behind() -> ModelShape:
    """Norms after attention and MLP, and of all heads."""
    sizes = {"vocab_size": 500, "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 250}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    return shape_from_hf({"model_type": "olmo2", **sizes, **heads})


@pytest.mark.cpu_seconds(20, reason="it compiles the kernels of every norm and rotation once")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("make", [everything, behind])
def test_compiled_once_for_all_sizes_with_the_same_numbers(make: Callable[[], ModelShape]) -> None:
    shape = make()
    if make is everything:
        assert shape.heads.rotary_dim == 8 and shape.final_norm.bias_name is not None
    compiled = compiled_kernels(shape, dtype=torch.float32, device=HOST)
    cases = ((2, 136, True, "none"), (5, 203, False, "selective"), (1, 64, False, "full"))
    for rows, length, packed, recompute in cases:
        sizes = {"rows": rows, "length": length, "packed": packed, "recompute": recompute}
        wanted, expected = loss_and_gradients(EAGER, **sizes, shape=shape)
        with torch.compiler.set_stance("fail_on_recompile"):
            loss, found = loss_and_gradients(compiled, **sizes, shape=shape)
        assert_same_numbers(loss, found, wanted, expected)
    adapter = make_adapter_config("tl6", rank=4, layers=(1, 2), targets=targets_of(shape), seed=0)
    specs = layer_specs(shape, dtype=torch.float32, kernels=compiled)
    stage = Stage(specs, TiedAdapter(AdapterPart.whole(adapter)))
    planned = saved_per_token(shape, Layout((adapter,), length=256, dtype=torch.float32))
    assert saved_bytes_per_token(stage, torch.float32) == planned, "compiled kernels keep what the formula says"
