"""Parts of decoding by themselves: attention to a cache, and how a batch is cut."""

from __future__ import annotations

import pytest
import torch
from attention_layers import attention_layer

from megatron_tiedlora.evaluation.generate import _groups, split_evenly
from megatron_tiedlora.model.attention import KeyValueCache, _attend_to_cache


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 5])
def test_attention_to_a_cache(
    dtype: torch.dtype, length: int, by_tokens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain softmax, in every dtype that a cache may have; CUDA's kernels lay their results out by tokens."""
    original = torch.nn.functional.scaled_dot_product_attention
    if by_tokens:
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **keywords: original(*args, **keywords).transpose(1, 2).contiguous().transpose(1, 2),
        )
    torch.manual_seed(0)
    layer = attention_layer(6, 2, dtype=dtype)
    cache = KeyValueCache.empty(3, 2, 20, 8, torch.empty(0, dtype=dtype))
    cache.update(torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8), torch.arange(9).expand(3, 9))
    positions = torch.tensor([[9], [4], [7]]) + torch.arange(length)
    context = layer.context(positions, dtype, cache=cache)
    cache.update(torch.randn(3, 2, length, 8), torch.randn(3, 2, length, 8), positions)
    query = torch.randn(3, 6, length, 8, dtype=dtype)
    ours = _attend_to_cache(query, cache, context.mask)
    keys, values = (tensor.double().repeat_interleave(3, dim=1) for tensor in (cache.keys, cache.values))
    scores = query.double() @ keys.transpose(2, 3) / 8**0.5
    hidden = torch.arange(20) > positions[:, None, :, None]
    wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    assert torch.allclose(ours.double(), wanted, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("filled", [6, 7, 8, 9])
def test_rows_of_a_mask_begin_at_multiples_of_8(filled: int) -> None:
    """Else CUDA's kernel copies it in every layer."""
    layer = attention_layer(6, 2, dtype=torch.bfloat16)
    cache = KeyValueCache.empty(3, 2, 20, 8, torch.empty(0, dtype=torch.bfloat16))
    cache.filled = filled
    positions = torch.tensor([[filled], [2], [4]])
    mask = layer.context(positions, torch.bfloat16, cache=cache).mask
    assert mask is not None and mask.shape == (6, 3, filled + 1)
    assert mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])
    seen = torch.arange(filled + 1) <= positions
    assert torch.equal(mask == 0, seen[:, None, None].expand(3, 2, 3, -1).reshape(mask.shape))


def test_parts_of_a_batch_are_even_and_none_is_empty() -> None:
    assert split_evenly("abcdefg", 3) == ["ab", "cd", "efg"]
    assert split_evenly("ab", 3) == ["a", "b"]
    assert split_evenly("abc", 1) == ["abc"]


def test_endings_are_scored_in_groups_of_a_bounded_size() -> None:
    samples = [([1] * length, [[2] * 10] * 4) for length in (4086, 4086, 1000, 1000, 9000)]
    sizes = [len(group) for group in _groups(samples, whole=False)]
    assert sizes == [2, 2, 1]  # 8 x 4,096 is the bound; one sample is never split
    assert [len(group) for group in _groups(samples, whole=True)] == [5]
    assert [len(group) for group in _groups(samples[:1], whole=False)] == [1]
