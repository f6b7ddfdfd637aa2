"""A small model whose loss and gradients are computed with given kernels."""

from __future__ import annotations

from typing import Any

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.kernels import Kernels

HOST = torch.device("cpu")


def model_config() -> ModelShape:
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 250, "num_attention_heads": 6}
    return shape_from_hf(
        {"model_type": "llama", "vocab_size": 5000, "num_key_value_heads": 2, "num_hidden_layers": 2, **sizes}
    )


def loss_and_gradients(
    kernels: Kernels,
    *,
    rows: int,
    length: int,
    packed: bool,
    dtype: torch.dtype = torch.float32,
    recompute: str = "none",
    shape: ModelShape | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a model with random weights, each a number of bf16, and an adapter that is not zero."""
    config = shape or model_config()
    adapter = make_adapter_config("tl6", rank=4, layers=(1, 2), targets=targets_of(config), seed=0)
    specs = layer_specs(config, dtype=dtype, kernels=kernels)
    stage = Stage(specs, TiedAdapter(AdapterShard.whole(adapter)), recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        parameter.data = (0.1 * torch.randn(parameter.shape, generator=generator)).bfloat16().to(parameter.dtype)
    if dtype == torch.float64:
        stage.double()
    tokens = torch.randint(config.vocab_size, (rows, length), generator=generator)
    labels = tokens.roll(-1, dims=1).masked_fill(torch.arange(length) < length // 3, -100)
    positions = torch.arange(length).expand(rows, length)
    documents = (torch.arange(length) // 50).expand(rows, length) if packed else None
    loss = stage(tokens, positions, labels, documents=documents)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


def assert_same_numbers(
    loss: torch.Tensor, found: dict[str, torch.Tensor], wanted: torch.Tensor, expected: dict[str, torch.Tensor]
) -> None:
    """Loss and gradients, found and expected, but for the order of fp32 sums."""
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-5, atol=2e-6 * float(expected[name].abs().max()))
