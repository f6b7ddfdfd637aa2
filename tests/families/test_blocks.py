"""What families add to a block: kernels, compiled and plain, the gradient through norms of heads, and saved bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bytes_touched import saved_bytes_per_token
from support.kernel_runs import HOST, assert_same_numbers, loss_and_gradients
from support.tiny_models import FAMILY_MODELS, tiny_config, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.kernels import EAGER, rotate_normed, rotate_normed_gradient
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.passes import saved_per_token
from megatron_tiedlora.training.throughput import compiled_kernels


def sized(model_type: str, **fields: Any) -> ModelShape:
    sizes = {"vocab_size": 500, "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 250}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    return shape_from_hf({"model_type": model_type, **sizes, **heads, **fields})


def everything() -> ModelShape:
    """A model of no family: LayerNorms, norms of heads, and a scaled rotation of part of each head."""
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    normed, shape = sized("qwen3").heads, sized("stablelm", rope_parameters=rope)
    norms = {"query_norm": normed.query_norm, "key_norm": normed.key_norm}
    return replace(shape, block=replace(shape.block, heads=replace(shape.heads, **norms)))


def behind() -> ModelShape:
    """Norms after attention and MLP, and of all heads."""
    return sized("olmo2")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("make", [everything, pytest.param(behind, marks=pytest.mark.slow)])
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
    stage = Stage(specs, TiedAdapter(AdapterShard.whole(adapter)))
    planned = saved_per_token(shape, Layout((adapter,), length=256, dtype=torch.float32))
    assert saved_bytes_per_token(stage, torch.float32) == planned, "compiled kernels keep what the formula says"


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_gradient_through_norms_of_heads_is_as_exact_as_autograd_s(dtype: torch.dtype, bound: float) -> None:
    """They are not kept, but computed again from the rotated result. Autograd goes through the same function."""
    draw = torch.Generator().manual_seed(4)
    heads, gradient = (torch.randn(300, 5, 32, generator=draw).to(dtype) for _ in range(2))
    angles = 40 * torch.rand(300, 1, 12, generator=draw)
    cos, sin = (1.2 * angles.cos()).to(dtype), (1.2 * angles.sin()).to(dtype)  # part of a head, scaled
    weight = (10 ** (2 * torch.rand(3, 32, generator=draw) - 1)).to(dtype)  # from 0.1 to 10

    def by_autograd(kind: torch.dtype) -> torch.Tensor:
        inputs = heads.to(kind).requires_grad_()
        rotated, _ = rotate_normed(inputs, cos.to(kind), sin.to(kind), weight.to(kind), 1e-6)
        return torch.autograd.grad(rotated, inputs, gradient.to(kind))[0].double()

    rotated, root = rotate_normed(heads, cos, sin, weight, 1e-6)
    parts = gradient.split((2, 1, 2), dim=1)
    found = rotate_normed_gradient(*parts, rotated, root, None, cos, sin, weight).double()
    true = by_autograd(torch.float64)
    error, plain = (float((gradient - true).norm() / true.norm()) for gradient in (found, by_autograd(dtype)))
    assert error <= bound and error <= max(1.5 * plain, 1e-14)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("name", ["qwen3", "stablelm", "phi3", "gemma", "gemma2", "gemma3_text", "granite", "glm4"])
def test_bytes_kept_of_a_family_in_bf16_are_the_formula_s(name: str, recompute: str) -> None:
    shape = shape_from_hf(tiny_config(**{**FAMILY_MODELS[name], "num_layers": 2}).to_dict())
    adapter = make_adapter_config("tl6", rank=3, layers=(1, 2), targets=targets_of(shape), seed=1)
    specs = layer_specs(shape, dtype=torch.bfloat16)
    layout = Layout((adapter,), length=256, dtype=torch.bfloat16, recompute=recompute)
    stage = Stage(specs, TiedAdapter(AdapterShard.whole(adapter)), recompute=recompute)
    assert saved_bytes_per_token(stage, torch.bfloat16) == saved_per_token(shape, layout)


@pytest.mark.parametrize(("targets", "more"), [(("qkv",), 0), (("qkv", "gate_up"), 32 + 3)])
def test_bytes_of_norms_behind_the_linears_by_hand(tmp_path: Path, targets: tuple[str, ...], more: int) -> None:
    """A linear without a norm before it keeps its input for its A alone, and a norm of all heads two numbers."""
    shape = find_model(str(write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=2, family="olmo2"))).shape
    adapter = make_adapter_config("tl6", rank=3, layers=(1, 2), targets=targets_of(shape, targets), seed=1)
    stage = Stage(layer_specs(shape, dtype=torch.float32), TiedAdapter(AdapterShard.whole(adapter)))
    d, f, queries, keys, heads = 32, 48, 32, 16, 4
    attention = d + 3 + (queries + 2 * keys + 2) + (queries + heads)  # input and A x; heads and roots; what it keeps
    mlp = more + 2 * f
    assert saved_bytes_per_token(stage, torch.float32) == 4 * (attention + (d + 1) + mlp + (d + 1))
