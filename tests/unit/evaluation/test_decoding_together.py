"""Decoding with several adapters in one call: each gives the tokens, and likelihoods, that it gives alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import groups_of, run_on_ranks
from support.native_files import native_adapter
from support.oracle import OracleConfig
from support.oracle_adapter import ALL_TARGETS
from support.tiny_decoders import calls_of, rows_keep_bits
from support.tiny_models import EOS_ID, random_adapter, write_tiny_model

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.evaluation.decoder import AdapterRows, Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, ending_log_likelihoods, generate
from megatron_tiedlora.evaluation.sampling import GREEDY, Sampling
from megatron_tiedlora.model.weights import layer_costs, partition
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups

ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"method": "tl6", "rank": 8},
    "b": {"method": "lora", "rank": 3, "layers": (2, 3)},
    "c": {"method": "vera", "rank": 16, "targets": ALL_TARGETS},
    "d": {"method": "tl2", "rank": 1, "targets": ("o_proj", "gate_up"), "layers": (1,)},
}
NUM_PROMPTS = {"a": 9, "b": 4, "c": 1, "d": 12}  # one has fewer prompts than a pipeline has parts
MOST = {"a": 20, "b": 11, "c": 20, "d": 5}
ALONE = Grid(0, 1)
SAMPLED = Sampling(0.8, 0.95, seed=3)
# What other orders of a matmul's sums may change, relative to the largest logit. They changed 8e-7 in fp32 (4 rows of
# this model), and 5e-3 in bf16 (of one as wide as SmolLM2-135M); another adapter changes 0.8.
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2e-2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("together") / "model"
    return write_tiny_model(path, tokenizer=False, hidden_size=64, intermediate_size=96, num_layers=3)


def adapters_of(source: ModelSource) -> dict[str, NativeAdapter]:
    config = OracleConfig.from_folder(source.weights_folder())
    return {
        name: native_adapter(source, random_adapter(config=config, alpha=6.0, seed=seed, **own))
        for seed, (name, own) in enumerate(ADAPTERS.items())
    }


def prompts_of(name: str) -> list[list[int]]:
    """Each adapter's own, of mixed lengths."""
    draw = random.Random(name)
    return [[draw.randint(3, 319) for _ in range(draw.randint(1, 30))] for _ in range(NUM_PROMPTS[name])]


def asked(name: str, adapter: str | None = None, *, end: int = EOS_ID, how: Sampling = GREEDY) -> Prompts:
    prompts = prompts_of(name)
    settings = [RowSettings((end,), MOST[name], sampling=how, number=number) for number in range(len(prompts))]
    return Prompts(prompts, settings, name if adapter is None else adapter)


def decoder_of(
    folder: Path, which: str | None = None, *, grid: Grid = ALONE, dtype: Any = torch.float32, **options: Any
) -> Decoder:
    """Of all adapters, or of one alone."""
    source = find_model(str(folder))
    adapters = adapters_of(source)
    groups = groups_of(grid) if grid.world_size > 1 else ParallelGroups()
    stages = partition(layer_costs(source.shape, length=32, first_adapted=1), grid.pp_size)
    adapter = adapters if which is None else adapters[which]
    stage = load_model(source, adapter, dtype=dtype, grid=grid, groups=groups, stages=stages)
    return Decoder(stage, groups, source.shape, **options)


def alone(decoder: Decoder, name: str, *, end: int = EOS_ID, how: Sampling = GREEDY) -> list[list[int]]:
    return generate(decoder, [asked(name, "", end=end, how=how)])[0]


def chosen_logits(decoder: Decoder, shares: list[tuple[str, list[list[int]]]]) -> list[torch.Tensor]:
    """The logits after prompts of one length, and after two more tokens, of each adapter in one call."""
    found: list[torch.Tensor] = []
    tokens = [torch.tensor(prompts) for _, prompts in shares]
    caches = [decoder.new_caches(*ids.shape[:1], ids.shape[1] + 2) for ids in tokens]
    for step in range(3):
        at = [ids.shape[1] for ids in tokens]
        news = tokens if step == 0 else [torch.full((len(ids), 1), 7) for ids in tokens]
        positions = [
            torch.arange(n).expand_as(ids) if step == 0 else torch.full((len(ids), 1), n + step - 1)
            for ids, n in zip(tokens, at, strict=True)
        ]
        rows = [
            AdapterRows(new, places, cache, name if name in decoder.stage.adapter_group.adapters else "")
            for new, places, cache, (name, _) in zip(news, positions, caches, shares, strict=True)
        ]
        wanted = [torch.full((len(ids),), n - 1) for ids, n in zip(tokens, at, strict=True)] if step == 0 else None
        logits = decoder.forward(rows, wanted=wanted)
        assert logits is not None
        found.append(logits)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(5, 4, 8, 4), (17, 16, 20, 16)], ids=["few", "more"])
def test_logits_have_the_bits_of_a_decoder_of_its_own(
    folder: Path, counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Where this machine's matmul gives rows the same bits in any company; else they are equal but for its rounding.

    MKL's sgemm on processors with AVX-512 does not for the 4 rows of a step, and does from 16 rows on.
    """
    draw = random.Random(1)
    names, lengths = ("b", "a", "d", "c"), (6, 11, 3, 9)
    shares = [
        (name, [[draw.randint(3, 319) for _ in range(length)] for _ in range(count)])
        for name, length, count in zip(names, lengths, counts, strict=True)
    ]
    together = decoder_of(folder, dtype=dtype)
    found = chosen_logits(together, shares)
    tokens = [length * count for length, count in zip(lengths, counts, strict=True)]
    exact = all(rows_keep_bits(together.stage, rows) for rows in (counts, tokens))
    rounding = 0.0 if exact else ROUNDING[dtype]
    start = 0
    for name, prompts in shares:
        own = chosen_logits(decoder_of(folder, name, dtype=dtype), [(name, prompts)])
        for step, (mine, all_of) in enumerate(zip(own, found, strict=True)):
            distance = (all_of[start : start + len(prompts)].double() - mine).abs().max()
            assert distance <= rounding * mine.abs().max(), (name, step, exact)
        start += len(prompts)


@pytest.mark.parametrize(("calls_together", "sampling"), [(False, GREEDY), (True, GREEDY), (False, SAMPLED)])
def test_each_gives_the_tokens_that_it_gives_alone(folder: Path, calls_together: bool, sampling: Sampling) -> None:
    """Also if some end early, as they do with an end token that one of them soon gives."""
    together = decoder_of(folder, calls_together=calls_together)
    own = {name: decoder_of(folder, name) for name in ADAPTERS}
    expected = {name: alone(decoder, name, how=sampling) for name, decoder in own.items()}
    assert len({str(rows) for rows in expected.values()}) == len(expected)
    found = generate(together, [asked(name, how=sampling) for name in ADAPTERS])
    assert dict(zip(ADAPTERS, found, strict=True)) == expected
    end = expected["b"][0][1]
    found = generate(together, [asked(name, end=end, how=sampling) for name in ("d", "b", "a")])
    assert found == [alone(own[name], name, end=end, how=sampling) for name in ("d", "b", "a")]
    assert min(map(len, found[1])) < MOST["b"]


def test_an_adapter_that_has_ended_leaves(folder: Path) -> None:
    """The stage sees the rows of the others alone; a finished one costs nothing."""
    decoder = decoder_of(folder)
    prompts = [[5, 5, 5, last] for last in range(3, 9)]
    soon = Prompts(prompts, [RowSettings((), 6, lambda row: len(row) == 3)] * len(prompts), "a")
    with calls_of(decoder) as shapes:
        generate(decoder, [soon, Prompts(prompts[1:], [RowSettings((), 6)] * len(prompts[1:]), "b")])
    assert [torch.Size(shape).numel() for shape in shapes] == [44, 11, 11, 5, 5, 5]


def samples(name: str) -> list[tuple[list[int], list[list[int]]]]:
    draw = random.Random(name + name)
    return [
        (prompt, [[draw.randint(3, 319) for _ in range(draw.randint(1, 9))] for _ in range(3)])
        for prompt in prompts_of(name)
    ]


@pytest.mark.parametrize("name", ["a", "c"])
def test_likelihoods_of_one_of_several(folder: Path, name: str) -> None:
    together = decoder_of(folder)
    expected = ending_log_likelihoods(decoder_of(folder, name), samples(name))
    assert ending_log_likelihoods(together, samples(name), adapter=name) == expected


def _decode_rank(folder: str, world_size: int, tp: int, pp: int) -> dict[str, Any]:
    grid = Grid(torch.distributed.get_rank(), world_size, tp_size=tp, pp_size=pp)
    kinds = (False, GREEDY), (True, GREEDY), (True, SAMPLED)
    decoders = [decoder_of(Path(folder), grid=grid, calls_together=one) for one, _ in kinds]
    pairs = zip(decoders, kinds, strict=True)
    tokens = [generate(decoder, [asked(name, how=how) for name in ADAPTERS]) for decoder, (_, how) in pairs]
    return {"tokens": tokens, "likelihoods": ending_log_likelihoods(decoders[1], samples("a"), adapter="a")}


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(2, 2), (1, 3)])
def test_every_layout(folder: Path, tmp_path: Path, tp: int, pp: int) -> None:
    """All ranks have all tokens; three stages have parts with some of the adapters under way."""
    expected, sampled = (
        [alone(decoder_of(folder, name), name, how=one) for name in ADAPTERS] for one in (GREEDY, SAMPLED)
    )
    likelihoods = ending_log_likelihoods(decoder_of(folder, "a"), samples("a"))
    world = tp * pp
    for rank, found in enumerate(run_on_ranks(_decode_rank, str(folder), world, tp, pp, ranks=world, folder=tmp_path)):
        assert found["tokens"] == [expected, expected, sampled] and expected != sampled
        if Grid(rank, world, tp_size=tp, pp_size=pp).pp_rank == pp - 1:
            assert torch.allclose(torch.tensor(found["likelihoods"]), torch.tensor(likelihoods), rtol=1e-5, atol=1e-4)
