"""A frozen weight: its matmuls, how values are loaded, and a second storage format in place of the plain one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_stages import adapted_stage, drawn, step_numbers
from tiny_models import write_tiny_model
from torch import nn

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.weights import weight_rules
from megatron_tiedlora.parallel.frozen_weight import Columns, FrozenWeight, frozen_parameter, frozen_weights


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


@pytest.mark.parametrize("tied", [False, True])
def test_another_storage_format_trains_as_the_plain_one(tmp_path: Path, tied: bool) -> None:
    """Only `layer_specs` is told of it; loss and gradients are equal to the last bit."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=3, attention_bias=True, tied=tied)
    models = [
        adapted_stage(folder, layers=(1, 3), dtype=torch.float64, scale=1.0, make_weight=kind.empty)
        for kind in (FrozenWeight, HalvedWeight)
    ]
    names = {name for name, _ in models[1].named_parameters() if name.endswith("_half")}
    assert len(names) == 2 * 4 * 3, "four linears in each of three blocks; embedding and head are plain"
    plain, halved = map(step_numbers, models)
    assert plain.keys() == halved.keys() and len(plain) == 5
    assert all(torch.equal(halved[name], number) and number.any() for name, number in plain.items())


def test_every_rule_of_the_name_table_has_its_weight(tmp_path: Path) -> None:
    source = find_model(str(write_tiny_model(tmp_path / "model", tokenizer=False, attention_bias=True)))
    model = Stage(layer_specs(source.shape, dtype=torch.float32, make_weight=HalvedWeight.empty), None)
    assert frozen_weights(model).keys() == {rule.name for rule in weight_rules(source.shape)}
