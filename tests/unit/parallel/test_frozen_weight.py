"""A frozen weight: its matmuls, how values are loaded, and a second storage format in place of the plain one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_model
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterPart,
    TiedAdapter,
    initial_values,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel.frozen_weight import (
    Columns,
    FrozenWeight,
    frozen_linear,
    frozen_parameter,
    frozen_weights,
)


class HalvedWeight(FrozenWeight):
    """W = half + half: another storage format, with the same values to the last bit and other parameters."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__(first)
        self.second = second

    @classmethod
    def empty(cls, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False) -> HalvedWeight:
        return cls(*(frozen_parameter(*local_shape, dtype=dtype) for _ in range(2)))

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        assert isinstance(self.tensor, nn.Parameter) and isinstance(self.second, nn.Parameter)
        return {"first_half": self.tensor, "second_half": self.second}

    def times_transposed(self, x: torch.Tensor, bias: Any = None, *, out: Any = None) -> torch.Tensor:
        return FrozenWeight(self.tensor + self.second).times_transposed(x, bias, out=out)

    def times(self, grad_y: torch.Tensor, *, out: Any = None) -> torch.Tensor:
        return FrozenWeight(self.tensor + self.second).times(grad_y, out=out)

    def load(self, values: torch.Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None) -> None:
        for half in (self.tensor, self.second):
            FrozenWeight(half).load(values / 2, dim=dim, start=start)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", [FrozenWeight, HalvedWeight])
def test_matmuls_and_the_input_gradient(kind: type[FrozenWeight]) -> None:
    values, x, bias, grad_y = drawn(6, 4), drawn(2, 3, 4, seed=1).requires_grad_(), drawn(6, seed=2), drawn(2, 3, 6)
    weight = kind.empty(6, 4, dtype=torch.float64)
    weight.load(values)
    y = frozen_linear(x, weight)
    y.backward(grad_y)
    assert x.grad is not None and weight.local_shape == (6, 4)
    torch.testing.assert_close(y, x @ values.t(), rtol=0, atol=1e-14)
    torch.testing.assert_close(x.grad, grad_y @ values, rtol=0, atol=1e-14)
    rows = x.detach().flatten(0, 1)
    torch.testing.assert_close(weight.times_transposed(rows, bias), rows @ values.t() + bias, rtol=0, atol=1e-14)
    memory = torch.empty(6, 6, dtype=torch.float64)
    assert weight.times_transposed(rows, out=memory) is memory and torch.equal(memory, weight.times_transposed(rows))


def test_values_are_loaded_in_blocks_of_rows_or_columns() -> None:
    values = drawn(6, 4)
    for dim, sizes in ((0, (1, 3, 2)), (1, (3, 1))):
        weight, start = FrozenWeight.empty(6, 4, dtype=torch.float32), 0
        for block in values.split(sizes, dim=dim):
            weight.load(block, dim=dim, start=start)
            start += block.shape[dim]
        assert torch.equal(weight.tensor, values.float()), "cast to the weight's dtype"
    first = weight.first_rows(2)
    assert torch.equal(first.tensor, values[:2].float()) and first.tensor.data_ptr() == weight.tensor.data_ptr()


def build(folder: Path, kind: type[FrozenWeight]) -> Stage:
    """A model in fp64 with a trained adapter whose tensors are not zero."""
    source = find_model(str(folder))
    config = make_adapter_config("tl6", rank=4, layers=(1, 3), targets=targets_of(source.shape), seed=0)
    adapter = TiedAdapter(AdapterPart.whole(config), dtype=torch.float64)
    adapter.load_full({name: drawn(*value.shape, seed=7) for name, value in initial_values(config).items()})
    model = Stage(layer_specs(source.shape, dtype=torch.float64, make_weight=kind.empty), adapter)
    with BaseWeights(folder, source.shape) as weights:
        load_base_weights(weights, frozen_weights(model))
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_another_storage_format_trains_as_the_plain_one(tmp_path: Path, tied: bool) -> None:
    """Only `layer_specs` is told of it; loss and gradients are equal to the last bit."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=3, attention_bias=True, tied=tied)
    found = []
    for kind in (FrozenWeight, HalvedWeight):
        model = build(folder, kind)
        ids = torch.randint(3, 320, (2, 16), generator=torch.Generator().manual_seed(3))
        loss = model(ids, torch.arange(16).expand_as(ids), ids.roll(-1, 1))
        loss.backward()
        assert model.adapter is not None
        found.append((loss.detach(), {name: p.grad for name, p in model.adapter.named_parameters() if p.requires_grad}))
    names = {name for name, _ in model.named_parameters() if name.endswith("_half")}
    assert len(names) == 2 * 4 * 3, "four linears in each of three blocks; embedding and head are plain"
    (plain, expected), (halved, gradients) = found
    assert torch.equal(plain, halved) and gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) and expected[name].any() for name in expected)


def test_every_rule_of_the_name_table_has_its_weight(tmp_path: Path) -> None:
    source = find_model(str(write_tiny_model(tmp_path / "model", tokenizer=False, attention_bias=True)))
    model = Stage(layer_specs(source.shape, dtype=torch.float32, make_weight=HalvedWeight.empty), None)
    assert frozen_weights(model).keys() == {rule.name for rule in weight_rules(source.shape)}
