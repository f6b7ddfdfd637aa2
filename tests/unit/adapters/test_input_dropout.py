"""Which inputs dropout keeps: the oracle's, whatever part of the tokens and features is asked for, and like chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle_dropout import dropout, kept

from megatron_tiedlora.adapters.low_rank import InputDropout, dropout_salt, token_keys

NUMBERS = [0, 1, 2**24, 2**24 + 1, 2**32 - 1, 2**32, 7 * 2**40 + 5]


def of(numbers: list[int], *, layer: int = 2, target: str = "qkv", p: float = 0.25, first: int = 0) -> InputDropout:
    keys = token_keys(torch.tensor(numbers), seed=11)
    return InputDropout(keys, keys[1:3], dropout_salt(11, layer=layer, target=target), first, p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_the_oracle_s(dtype: torch.dtype) -> None:
    x = torch.randn(len(NUMBERS), 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = dropout(NUMBERS, seed=11, probability=0.25)(x.double(), 2, "qkv")
    found = of(NUMBERS).dropped(x, local=False)
    assert found.dtype == dtype and (found == 0).equal(expected == 0)
    assert torch.allclose(found.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_parts_of_tokens_and_features_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(len(NUMBERS), 40)
    whole = of(NUMBERS).dropped(x, local=False)
    assert of(NUMBERS, first=10).dropped(x[:, 10:25], local=False).equal(whole[:, 10:25])
    assert of(NUMBERS).dropped(x[1:3], local=True).equal(whole[1:3])
    some, local = torch.tensor([4, 0, 4]), torch.tensor([1])
    assert of(NUMBERS).at(some, local).dropped(x[some], local=False).equal(whole[some])
    assert of(NUMBERS).at(some, local).dropped(x[2:3], local=True).equal(whole[2:3])
    monkeypatch.setattr("megatron_tiedlora.adapters.low_rank._HOST_NUMBERS_AT_ONCE", 100)  # two tokens at a time
    assert of(NUMBERS).dropped(x, local=False).equal(whole)


def test_layers_targets_seeds_and_tokens_draw_their_own() -> None:
    numbers = list(range(200))
    x = torch.ones(200, 64)
    masks = [
        of(numbers, layer=layer, target=target).dropped(x, local=False) > 0
        for layer, target in ((1, "qkv"), (2, "qkv"), (1, "down_proj"), (11, "qkv"))
    ]
    other = InputDropout(
        token_keys(torch.arange(200), seed=12), masks[0], dropout_salt(12, layer=1, target="qkv"), 0, 0.25
    )
    masks += [other.dropped(x, local=False) > 0, masks[0].roll(1, 0), masks[0].roll(1, 1)]
    for index, one in enumerate(masks):
        assert abs(float(one.float().mean()) - 0.75) < 0.02
        for another in masks[:index]:  # 0.75^2 + 0.25^2 agree by chance
            assert abs(float((one == another).float().mean()) - 0.625) < 0.02


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rows_and_columns_are_like_chance(p: float) -> None:
    """Among 64 x 64 pairs of 4,096 numbers each, the largest correlation is what chance gives (5 sigma are 0.08)."""
    numbers = [n * 2**24 + t for n in range(64) for t in range(64)]
    mask = kept(numbers, seed=3, layer=1, target="qkv", width=64, probability=p).astype(float)
    correlations = np.corrcoef(mask.T) - np.eye(64)
    assert np.abs(correlations).max() < 0.08
    rows = np.corrcoef(kept(numbers[:64], seed=3, layer=1, target="qkv", width=4096, probability=p)) - np.eye(64)
    assert np.abs(rows).max() < 0.08
