"""Sampled tokens: those of an oracle in Python, of the right frequencies, the same in any company and layout."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import run_on_ranks
from support.sampling_oracle import expected_token, noise, nucleus
from support.tiny_decoders import build
from support.tiny_models import write_tiny_model

from megatron_tiedlora.evaluation import sampling
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.evaluation.sampling import GREEDY, RowSamplings, Sampling, choose
from megatron_tiedlora.parallel.groups import Grid

LEVEL = 1e-3  # a right sampler fails a test of frequencies with this probability, once for all, as the seed is fixed
SAMPLING = Sampling(0.9, 0.9, seed=5)
Rows = list[list[int]]


def chosen(how: Sampling, logits: torch.Tensor, places: Sequence[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """The tokens of rows that all have the same settings."""
    return choose(logits, [(RowSamplings.of([how] * len(rows), rows.tolist()), position) for rows, position in places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(0.3, 1.0, 0), (1.0, 1.0, 0), (2.5, 0.9, 0), (1.0, 0.5, 0), (0.7, 1e-9, 0)]
    + [(2.5, 1.0, 3), (2.5, 1.0, 1), (2.5, 1.0, 77), (9.0, 0.6, 9), (2.5, 0.999, 1000)],
)
def test_tokens_are_those_of_the_oracle(
    monkeypatch: pytest.MonkeyPatch, temperature: float, top_p: float, top_k: int, dtype: torch.dtype
) -> None:
    """Rows and positions of one call may be any; bf16 logits have many ties. Few rows at a time give the same."""
    logits = (3 * torch.randn(24, 77, generator=torch.Generator().manual_seed(1))).to(dtype)
    places = [(torch.tensor([7, 0, 2**31 - 1, 5]), 0), (torch.arange(13, 0, -1), 3), (torch.arange(7), 499)]
    at = [(row, position) for rows, position in places for row in rows.tolist()]
    how = Sampling(temperature, top_p, seed=11, top_k=top_k)
    expected = [expected_token(own, *place, how) for own, place in zip(logits.tolist(), at, strict=True)]
    assert chosen(how, logits, places).tolist() == expected
    monkeypatch.setattr(sampling, "HOST_NUMBERS_AT_ONCE", 5 * 77)
    assert chosen(how, logits, places).tolist() == expected
    assert (expected == logits.argmax(-1).tolist()) == (top_p < 0.1 or top_k == 1)


def test_rows_with_different_settings_are_those_of_each_alone() -> None:
    """Greedy ones among them; of tied tokens the first `top_k` may be sampled."""
    logits, draw = 2 * torch.randn(60, 40, generator=torch.Generator().manual_seed(6)), random.Random(3)
    logits[::7] = logits[::7].round()
    how = [
        Sampling(draw.choice([0.0, 0.5, 1.0, 3.0]), draw.choice([1.0, 0.8, 0.3]), draw.choice([1, 2**80]), top_k)
        for top_k in [0, 1, 2, 5, 40, 99] * 10
    ]
    numbers, position = draw.sample(range(2**31), 60), 17
    found = choose(logits, [(RowSamplings.of(how, numbers), position)]).tolist()
    wanted = [expected_token(*given) for given in zip(logits.tolist(), numbers, [position] * 60, how, strict=True)]
    assert found == wanted != logits.argmax(-1).tolist()
    pairs = [(RowSamplings.of(how[i : i + 1], numbers[i : i + 1]), position) for i in range(60)]
    assert choose(logits, pairs).tolist() == found == [choose(logits[i : i + 1], [pairs[i]]).item() for i in range(60)]
    whole = RowSamplings.of(how, numbers)
    assert choose(logits, [(whole.at(slice(0, 9)), position), (whole.at(slice(9, 60)), position)]).tolist() == found
    tied = torch.zeros(400, 8)
    assert set(chosen(Sampling(1.0, seed=4, top_k=3), tied, [(torch.arange(400), 0)]).tolist()) == {0, 1, 2}


def test_how_answers_are_sampled_is_said() -> None:
    assert str(Sampling(0.7, 0.95, 5, 20)) == "sampled at temperature 0.7 and top_k 20 and top_p 0.95, seed 5"
    assert str(Sampling(0.7, seed=5)) == "sampled at temperature 0.7, seed 5" and str(Sampling(0, top_k=2)) == "greedy"


def test_temperature_0_is_the_most_likely_token() -> None:
    """A temperature of next to nothing, too; and one of infinity in effect samples from all."""
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(2)) * 40
    places = [(torch.arange(64), 0)]
    for how in (GREEDY, Sampling(0.0, 0.5, 3), Sampling(5e-324), Sampling(1e-5, 0.9)):
        assert torch.equal(chosen(how, logits, places), logits.argmax(-1)), how
    assert len(set(chosen(Sampling(1e15), logits, places).tolist())) > 25


def test_the_most_likely_tokens_are_those_of_transformers() -> None:
    """First the k most likely ones, then the nucleus of these, as their generation does."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = 2 * torch.randn(200, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for top_k, top_p in ((3, 1.0), (7, 0.5), (7, 0.95), (40, 0.9)):
        theirs = TopPLogitsWarper(top_p)(torch.empty(0), TopKLogitsWarper(top_k)(torch.empty(0), scores)) > -torch.inf
        ours = [nucleus(row, 1.0, top_p, top_k) for row in scores.tolist()]
        assert [sorted(kept) for kept in ours] == [row.nonzero()[:, 0].tolist() for row in theirs]


def test_the_nucleus_is_that_of_transformers() -> None:
    """The oracle's is; and each of its tokens is sampled, and no other, where tokens tie."""
    from transformers import TopPLogitsWarper

    scores = 2 * torch.randn(200, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for top_p in (1e-12, 0.1, 0.5, 0.9, 0.999):
        theirs = TopPLogitsWarper(top_p)(torch.empty(0), scores) > -torch.inf
        ours = [nucleus(row, 1.0, top_p) for row in scores.tolist()]
        assert [sorted(kept) for kept in ours] == [row.nonzero()[:, 0].tolist() for row in theirs]
    logits, rows = torch.tensor([2, 4, 2, 1, 2]).double().log(), torch.arange(500)
    for top_p, kept in ((0.36, {1}), (0.37, {0, 1}), (0.6, {0, 1, 2}), (0.9, {0, 1, 2, 4}), (0.95, {0, 1, 2, 3, 4})):
        tokens = chosen(Sampling(1.0, top_p, seed=1), logits.expand(500, -1), [(rows, 0)])
        assert set(tokens.tolist()) == kept == set(nucleus(logits.tolist(), 1.0, top_p))


# Frequencies --------------------------------------------------------------------------------------------------------


def p_value(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Pearson's chi-square test: the probability of counts at least as far from what is expected."""
    expected = probabilities * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.5, 0.8)])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    """Of single tokens; and of pairs that follow each other in an answer, or stand in neighbouring rows, or come from
    neighbouring seeds: they are independent."""
    logits = torch.tensor([0.3, 1.2, -0.5, 0.8, 0.0, 1.1, -0.2, 0.6])
    kept = nucleus(logits.tolist(), temperature, top_p)
    assert len(kept) == 8 if top_p == 1 else 3 < len(kept) < 8

    def drawn(seed: int) -> torch.Tensor:
        """Tokens (positions, rows), as numbers in the nucleus."""
        how, rows = Sampling(temperature, top_p, seed), torch.arange(400)
        tokens = torch.stack([chosen(how, logits.expand(400, -1), [(rows, position)]) for position in range(200)])
        assert set(tokens.unique().tolist()) == set(kept)
        return torch.searchsorted(torch.tensor(sorted(kept)), tokens)

    found, other = drawn(1), drawn(2)
    single = torch.tensor([kept[token] for token in sorted(kept)], dtype=torch.float64)
    assert p_value(found.flatten().bincount(minlength=len(kept)), single) > LEVEL
    for one, two in ((found[::2], found[1::2]), (found[:, ::2], found[:, 1::2]), (found, other)):
        counts = (one * len(kept) + two).flatten().bincount(minlength=len(kept) ** 2)
        assert p_value(counts, torch.outer(single, single).flatten()) > LEVEL


# Decoding -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("sampling") / "model", tokenizer=False)


def prompts() -> Rows:
    draw = random.Random(4)
    return [[draw.randint(3, 319) for _ in range(draw.randint(1, 30))] for _ in range(11)]


def sample(decoder: Decoder, numbers: Sequence[int] = range(11), *, how: Sampling = SAMPLING, new: int = 12) -> Rows:
    """The answers of the prompts with these numbers."""
    settings = [RowSettings((), new, sampling=how, number=number) for number in numbers]
    return generate(decoder, [Prompts([prompts()[n] for n in numbers], settings)])[0]


def whole_pass(decoder: Decoder, prompt: list[int], answer: list[int]) -> Any:
    """The logits from which each token of an answer follows."""
    ids = torch.tensor([prompt + answer])
    return decoder.stage.predict(ids, torch.arange(ids.shape[1])[None])[0, len(prompt) - 1 : -1].tolist()


def test_answers_are_the_oracle_s(folder: Path) -> None:
    decoder = build(folder, grid=Grid(0, 1))
    for row, (prompt, answer) in enumerate(zip(prompts(), sample(decoder), strict=True)):
        logits = whole_pass(decoder, prompt, answer)
        assert answer == [expected_token(own, row, position, SAMPLING) for position, own in enumerate(logits)]


def test_company_changes_nothing_and_the_seed_does(folder: Path) -> None:
    decoder = build(folder, grid=Grid(0, 1))
    expected = sample(decoder)
    order = random.Random(2).sample(range(11), 11)
    assert sample(decoder, order) == [expected[n] for n in order]
    assert [sample(decoder, [n])[0] for n in range(11)] == expected
    for new in (1, 3):
        assert sample(decoder, new=new) == [row[:new] for row in expected]
    others = [sample(decoder, how=how) for how in (GREEDY, Sampling(0.9, 0.9, 6), Sampling(0.9), Sampling(0.3, 0.9))]
    for other in others:
        assert sum(one != two for one, two in zip(other, expected, strict=True)) > 8
    assert others[2] != others[3]
    settings = [RowSettings((), 12, sampling=SAMPLING, number=number) for number in range(5)]
    (alike,) = generate(decoder, [Prompts([prompts()[0]] * 5, settings)])
    assert len({tuple(row) for row in alike}) == 5 and alike[0] == expected[0]  # row 0 has the noise of row 0


def _sample_rank(folder: str, how: Sampling) -> Rows:
    grid = Grid(torch.distributed.get_rank(), 4, tp_size=2, pp_size=2)
    return sample(build(Path(folder), grid=grid, dtype=torch.bfloat16), how=how)


@pytest.mark.distributed
def test_ranks_sample_the_best_tokens_of_bf16_logits(folder: Path, tmp_path: Path) -> None:
    """Of a whole pass, but for near ties: the caches are fp32 on a CPU, and tensor-parallel ranks add in another order.
    In fp32 all layouts sample the same (test_decoding_together.py)."""
    how, decoder = Sampling(1.0, seed=7), build(folder, grid=Grid(0, 1), dtype=torch.bfloat16)
    found = run_on_ranks(_sample_rank, str(folder), how, ranks=4, folder=tmp_path)
    assert all(other == found[0] for other in found)
    for row, (prompt, answer) in enumerate(zip(prompts(), found[0], strict=True)):
        for position, (own, token) in enumerate(zip(whole_pass(decoder, prompt, answer), answer, strict=True)):
            scores = torch.tensor(own) + torch.tensor(noise(how.seed, row, position, len(own)))
            assert scores.max() - scores[token] < 0.1, (row, position)
