"""Attention of layers with windows, caps and scales: rows of several adapters, caches, and what all layers share."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from support.adapted_stages import attention_layer
from support.attention_oracle import assert_same, attended, heads

from megatron_tiedlora.adapters.adapter_groups import AdapterSegment
from megatron_tiedlora.base.shapes import AttentionKind, RopeShape
from megatron_tiedlora.model.attention import Attention, KeyValueCache
from megatron_tiedlora.model.cpu_attention import Scores, attend_by_tiles
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.fused_attention import attend_within, one_by_one
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.regions import run_steps
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels

META = torch.device("meta")
HOWS = [Scores(0.4), Scores(0.4, 1), Scores(0.4, 6), Scores(2.0, 6, 0.8), Scores(2.0, None, 0.8)]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def drawn_layer(counts: tuple[int, int], how: Scores, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(3)
    layer = attention_layer(*counts, dtype=dtype, how=how)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("counts", [(6, 2), (4, 4)])
def test_rows_of_several_adapters(counts: tuple[int, int], packed: bool, how: Scores) -> None:
    """Two rows of 20 tokens and one of 70, longer than a tile: no window goes on in the row or document before."""
    segments = (AdapterSegment("a", 2, 20), AdapterSegment("b", 1, 70))
    rows = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 20, 70]))[None]
    ids = rows * 100 + torch.arange(110)[None] // 9 if packed else rows
    layer = drawn_layer(counts, how)
    positions = torch.zeros(1, 110, dtype=torch.int64)
    documents = torch.arange(110)[None] // 9 if packed else None
    context = layer.context(positions, torch.float64, documents=documents, segments=segments)
    parts = heads(torch.float64, shape=(1, 110), counts=counts, head_dim=8)
    assert_same(context.attend[how.window](*parts), attended(*parts, ids, how), parts, 1e-12)


def outputs(layer: Attention, hidden: torch.Tensor, context: Any, cache: Any = None) -> torch.Tensor:
    with torch.no_grad():
        _, found = run_steps(layer.steps(hidden, None, context, TensorParallel(), cache=cache))
    result: torch.Tensor = found
    return result


@pytest.mark.parametrize("granularity", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("counts", [(6, 2), (4, 4)])
def test_decoding_gives_what_whole_rows_give(
    counts: tuple[int, int], how: Scores, dtype: torch.dtype, granularity: int
) -> None:
    """A prompt of 10 tokens, two single tokens, then three at once, the window behind them; alone and beside another
    adapter's row, which is 4 tokens shorter."""
    layer, hidden = drawn_layer(counts, how, dtype), torch.randn(2, 15, 48, dtype=dtype)
    positions = torch.arange(15).expand(2, 15)
    wanted = outputs(layer, hidden, layer.context(positions, dtype))
    empty = partial(KeyValueCache.empty, 1, counts[1], 20, 8, torch.empty(0, dtype=dtype), granularity)
    caches, alone = (empty(), empty()), empty()
    segments, starts = [(0, 10, 6), (10, 1, 1), (11, 1, 1), (12, 3, 3)], [0, 0]
    for _, *lengths in segments:
        parts = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        rows = tuple(AdapterSegment(name, 1, length) for name, length in zip("ab", lengths, strict=True))
        both = torch.cat([positions[0, part] for part in parts])[None]
        context = layer.context(both, dtype, cache=caches, segments=rows)
        given = torch.cat([hidden[row, part] for row, part in enumerate(parts)])[None]
        found = outputs(layer, given, context, caches)[0].split(lengths)
        one = layer.context(positions[:1, parts[0]], dtype, cache=alone)
        results = [(0, outputs(layer, hidden[:1, parts[0]], one, alone)[0]), *enumerate(found)]
        for row, result in results:
            tolerance = 1e-11 if dtype == torch.float64 else 2e-5
            torch.testing.assert_close(result, wanted[row, parts[row]], rtol=tolerance, atol=tolerance)
        starts = [part.stop for part in parts]
        for cache, length in zip((*caches, alone), (*lengths, lengths[0]), strict=True):
            cache.filled += length


def kinds(windows: Sequence[int | None]) -> list[AttentionKind]:
    return [AttentionKind(RopeShape(10000.0 + (window or 0)), window) for window in windows]


def test_layers_share_what_their_windows_allow() -> None:
    """One function or mask for each window that hides a token, and one for all others; rotations are apart from it."""
    layer = attention_layer(4, 2, dtype=torch.float64)
    given, positions = kinds([None, 4, 16, 20]), torch.arange(16).expand(2, 16)
    context = layer.context(positions, torch.float64, kinds=[*given, *given])
    assert list(context.attend) == [None, 4, 16, 20] and len(context.tables) == 4
    assert context.attend[None] is context.attend[16] is context.attend[20] is not context.attend[4]
    cache = KeyValueCache.empty(2, 2, 40, 8, torch.empty(0, dtype=torch.float64))
    cache.filled = 16
    mask = layer.context(positions[:, :1] + 16, torch.float64, cache=cache, kinds=kinds([None, 16, 17])).mask
    assert mask[None] is mask[17] and mask[16].isinf().sum() == mask[16].shape[0] * 2  # the first key is hidden
    (only,) = layer.context(positions, torch.float64).attend
    assert only is None


def test_on_a_gpu_windows_count_from_the_longest_document() -> None:
    """Documents of 9 tokens in rows of 16; where no fused kernel has windows, tiles of queries on that device."""
    layer = attention_layer(4, 2, dtype=torch.float64, how=Scores(0.3))
    layer.kernels = Kernels()  # a run's own, which may be compiled
    ids = torch.tensor([[0] * 9 + [1] * 7] * 2)
    positions = torch.zeros(2, 16, dtype=torch.int64, device=META)
    attend: Any = layer.context(positions, torch.float64, documents=ids, kinds=kinds([None, 8, 9])).attend
    assert attend[9] is attend[None] and attend[None].func is attend_within
    assert attend[None].keywords["attend"] is one_by_one and attend[None].keywords["scores"] == Scores(0.3)
    assert attend[8].func is attend_by_tiles and attend[8].keywords["kernels"] is EAGER
    assert attend[8].keywords["scores"] == Scores(0.3, 8)
    assert all(tile.mask.is_meta for rows in attend[8].keywords["parts"] for tile in rows.tiles)
    capped = attention_layer(4, 2, dtype=torch.float64, how=Scores(0.3, None, 5.0))
    found: Any = capped.context(positions, torch.float64, documents=ids).attend
    assert found[None].func is attend_by_tiles and found[None].keywords["scores"] == Scores(0.3, None, 5.0)


def test_a_stage_knows_the_kinds_of_its_blocks() -> None:
    """Its contexts have all windows, and its words for the user name the kernels of both."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 48, "num_hidden_layers": 3}
    shape = shape_from_hf({"model_type": "llama", **sizes, "vocab_size": 8, "intermediate_size": 8})
    for windows, has_both in (([None, 6, 6], True), ([None] * 3, False)):
        own = replace(shape, kinds=tuple(kinds(windows)))
        stage = Stage(layer_specs(own, dtype=torch.float32), None)
        context = stage.context(torch.arange(9)[None], torch.float32)
        assert list(context.attend) == list(dict.fromkeys(windows))
        assert {kind.rope for kind in own.kinds} == set(context.tables)
        assert str(stage.attention_route(torch.device("cpu"), torch.float32)) == "tiles of queries (a CPU)"
        words = str(stage.attention_route(META, torch.float32))
        assert words.startswith("PyTorch's attention, one document after another (fused kernels")
        assert ("; in windows, tiles of queries (fused kernels" in words) == has_both, words


@needs_compiler
def test_compiled_caps_are_not_compiled_again_for_another_tile() -> None:
    """They round no worse than 2e-6, for tiles of other sizes."""
    kernels = Kernels().compiled()
    draw = torch.Generator().manual_seed(5)
    for size, stance in ((24, "default"), (40, "fail_on_recompile")):
        for rows in (2, 3) if stance == "default" else (5,):
            scores, gradient = (torch.randn(rows, 3, 8, size, generator=draw) * 4 for _ in range(2))
            hidden = torch.ones(8, size).triu(2) > 0
            mask = torch.zeros(rows, 1, 8, size, dtype=torch.bfloat16).masked_fill_(hidden, -torch.inf)
            with torch.compiler.set_stance(stance):
                results = []
                for own in (kernels, EAGER):
                    weights, changed = torch.empty_like(scores), gradient.clone()
                    sums, total = own.exp_scores_(scores.clone(), mask, weights, 3.0)
                    deltas = (gradient * weights / total).sum(-1, keepdim=True)
                    own.score_gradient_(scores.clone(), mask, sums, deltas, changed, weights, 3.0)
                    results.append((sums, total, changed, weights))
            for ours, theirs in zip(*results, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
