"""Samples for clients: the tokens and log-probabilities of an oracle, the same in any company and layout."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import groups_of, run_on_ranks
from support.native_files import native_adapter
from support.oracle import OracleConfig, load_weights, oracle_logits
from support.sampling_oracle import expected_token
from support.tiny_decoders import calls_of
from support.tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.sampling import Sampling
from megatron_tiedlora.model.weights import layer_costs, partition
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups
from megatron_tiedlora.service import sampler
from megatron_tiedlora.service.operations import Sample, SampleResult
from megatron_tiedlora.service.sampler import BASE, sample_all

ADAPTERS: dict[str, dict[str, Any]] = {
    "/runs/a": {"method": "tl6", "rank": 8},
    "/runs/b": {"method": "lora", "rank": 3, "layers": (2, 3), "targets": ("qkv", "gate_up")},
}
ALONE = Grid(0, 1)
CLOSE = 2e-5  # of log-probabilities of one model in fp32 and in fp64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("sampler") / "model", tokenizer=False)


def oracle_adapter(name: str, config: OracleConfig) -> Any:
    if name == BASE:
        return None
    return random_adapter(config=config, alpha=6.0, seed=ord(name[-1]), **ADAPTERS[name])


def decoder_of(folder: Path, grid: Grid = ALONE, *, calls_together: bool = False) -> Decoder:
    """A decoder of the base with all adapters, and without one."""
    source, config = find_model(str(folder)), OracleConfig.from_folder(folder)
    adapters = {name: native_adapter(source, oracle_adapter(name, config)) for name in ADAPTERS}
    groups = groups_of(grid) if grid.world_size > 1 else ParallelGroups()
    stages = partition(layer_costs(source.shape, length=32, first_adapted=1), grid.pp_size)
    stage = load_model(source, adapters, dtype=torch.float32, grid=grid, groups=groups, stages=stages)
    whole = AdapterShard(adapters["/runs/a"].config, (), grid.tp_rank, grid.tp_size)
    stage.adapter_group.adapters[BASE] = TiedAdapter(whole)
    return Decoder(stage, groups, source.shape, calls_together=calls_together)


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return decoder_of(folder)


def text_of(ids: Sequence[int]) -> str:
    """One character per token."""
    return "".join(chr(0x4E00 + token) for token in ids)


def asked(**given: Any) -> Sample:
    """A request for greedy tokens, where nothing else is given."""
    plain = Sample("", (5, 6, 7), 1, 6, 0, 0.0, 0, 1.0, (), (), 0, 0, False, None)
    return replace(plain, **given)


def prompt(seed: int, length: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randint(3, 319) for _ in range(length))


REQUESTS = [
    asked(folder="/runs/a", prompt=prompt(1, 20), num_samples=3, seed=5, temperature=1.0, num_top=2),
    asked(folder="/runs/b", prompt=prompt(2, 3), max_tokens=9, prompt_logprobs=True),
    asked(prompt=prompt(3, 30), num_samples=2, seed=6, temperature=0.7, top_k=4, prompt_last=5, prompt_logprobs=True),
    asked(folder="/runs/a", prompt=prompt(4, 11), max_tokens=1, prompt_logprobs=True, num_prompt_top=3),
    asked(folder="/runs/b", prompt=prompt(1, 20), num_samples=2, seed=5, temperature=1.4, top_p=0.6, top_k=50),
    asked(prompt=prompt(6, 1), max_tokens=4, num_samples=2, prompt_logprobs=True, num_prompt_top=1, num_top=5),
    asked(folder="/runs/a", prompt=prompt(1, 20), max_tokens=12, seed=2**63, temperature=1.0, top_p=0.9),
]


def sample(decoder: Decoder, requests: Sequence[Sample], grid: Grid = ALONE, **options: Any) -> list[SampleResult]:
    return sample_all(decoder, requests, grid=grid, decode=text_of, **options)


def logprobs_of(folder: Path, name: str, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The fp64 oracle's logits and log-probabilities after each token, (tokens, V)."""
    config = OracleConfig.from_folder(folder)
    weights = {key: weight.double() for key, weight in load_weights(folder).items()}
    adapter = oracle_adapter(name, config)
    logits = oracle_logits(weights, config, adapter and adapter.cast(torch.float64), torch.tensor([list(ids)]))[0]
    return logits, logits.log_softmax(-1)


def check_top(found: Sequence[tuple[int, float]], expected: torch.Tensor, count: int) -> None:
    values, ids = expected.topk(count)
    assert [token for token, _ in found] == ids.tolist()
    assert [number for _, number in found] == pytest.approx(values.tolist(), abs=CLOSE)


def alike(one: SampleResult, two: SampleResult) -> bool:
    """Whether tokens are equal, and log-probabilities but for the rounding of other orders of a sum."""

    def numbers(result: SampleResult) -> list[float]:
        tops = [*(top for own in result.sequences for top in own.top), *(result.prompt_top or ())]
        own = [number for sequence in result.sequences for number in sequence.logprobs]
        return [*own, *(result.prompt_logprobs or ()), *(number for top in tops for pair in top for number in pair)]

    same = [(own.tokens, own.stopped) for own in one.sequences] == [(own.tokens, own.stopped) for own in two.sequences]
    return same and numbers(one) == pytest.approx(numbers(two), abs=CLOSE, nan_ok=True)


# One process --------------------------------------------------------------------------------------------------------


def test_results_are_the_oracle_s(folder: Path, decoder: Decoder) -> None:
    """Each token follows from the noise of its request's seed and its sample number; log-probabilities are those of
    softmax(logits), whatever the temperature. The first token of a prompt has none."""
    for request, found in zip(REQUESTS, sample(decoder, REQUESTS), strict=True):
        how = Sampling(request.temperature, request.top_p, request.seed, request.top_k)
        length = len(request.prompt)
        assert len(found.sequences) == request.num_samples
        for number, own in enumerate(found.sequences):
            assert len(own.tokens) == len(own.logprobs) == len(own.top) == request.max_tokens and not own.stopped
            logits, logprobs = logprobs_of(folder, request.folder or BASE, (*request.prompt, *own.tokens))
            after = logits[length - 1 :]
            assert list(own.tokens) == [
                expected_token(after[place].tolist(), number, place, how) for place in range(request.max_tokens)
            ]
            expected = [logprobs[length - 1 + place, token].item() for place, token in enumerate(own.tokens)]
            assert own.logprobs == pytest.approx(expected, abs=CLOSE)
            for place, top in enumerate(own.top):
                check_top(top, logprobs[length - 1 + place], request.num_top)
        first = length - (request.prompt_last or length - 1)
        if request.prompt_logprobs:
            wanted = [
                math.nan if place < first else logprobs[place - 1, token].item()
                for place, token in enumerate(request.prompt)
            ]
            assert found.prompt_logprobs == pytest.approx(wanted, abs=CLOSE, nan_ok=True)
        assert (found.prompt_logprobs is not None) == request.prompt_logprobs
        assert (found.prompt_top is not None) == (request.num_prompt_top > 0)
        for place, top in enumerate(found.prompt_top or ()):
            check_top(top, logprobs[place - 1], request.num_prompt_top if place >= first else 0)
    samples = [own.tokens for own in sample(decoder, REQUESTS[:1])[0].sequences]
    assert len(set(samples)) == 3


def test_company_and_rounds_change_nothing(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in another order, in rounds of few rows and of few bytes, and with few logits at a time."""
    expected = sample(decoder, REQUESTS)
    for request, own in zip(REQUESTS, expected, strict=True):
        (found,) = sample(decoder, [request])
        assert alike(found, own)
    assert all(map(alike, sample(decoder, REQUESTS[::-1]), expected[::-1]))
    assert sample(decoder, []) == []
    room = 60 * decoder.bytes_per_token
    with calls_of(decoder) as shapes:
        assert all(map(alike, sample(decoder, REQUESTS, cache_bytes=room), expected))
    # The first call of a round has the prompts of one or several adapters.
    assert max(math.prod(shape) for shape in shapes) <= 60
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "ROWS_AT_ONCE", 2)
        patch.setattr(decoder.stage.tail.head, "rows_at_once", 3)
        with calls_of(decoder) as shapes:
            assert all(map(alike, sample(decoder, REQUESTS), expected))
        assert max(shape[0] for shape in shapes) <= 2


def test_the_samples_of_a_request_read_its_prompt_once(decoder: Decoder) -> None:
    many = asked(prompt=prompt(1, 20), num_samples=4, temperature=1.0)
    with calls_of(decoder) as shapes:
        sample(decoder, [many, asked(prompt=prompt(2, 20), num_samples=2, prompt_logprobs=True)])
    assert [math.prod(shape) for shape in shapes][:2] == [2 * 20, 6]


@pytest.mark.parametrize("dp", [1, 3])
def test_a_round_is_as_large_as_its_caches_may_be(monkeypatch: pytest.MonkeyPatch, dp: int) -> None:
    """Every sequence has room for the longest prompt and the most tokens of its round; one alone may exceed it."""
    monkeypatch.setattr(sampler, "ROWS_AT_ONCE", 7)
    draw = random.Random(dp)
    rows = [asked(prompt=(5,) * draw.randint(1, 30), max_tokens=draw.randint(1, 90)) for _ in range(200)]
    rounds = list(sampler._rounds(rows, 100, dp))

    def fits(some: range) -> bool:
        count, own = -(-len(some) // dp), [rows[index] for index in some]
        return count <= 7 and count * (max(len(r.prompt) for r in own) + max(r.max_tokens for r in own)) <= 100

    assert [index for some in rounds for index in some] == list(range(200))
    assert all(fits(some) or len(some) == 1 for some in rounds)
    assert not any(fits(range(some.start, some.stop + 1)) for some in rounds[:-1])
    assert list(sampler._rounds([], 100, dp)) == [] and max(map(len, rounds)) > dp


def test_settings_of_others_do_not_change_a_bit(decoder: Decoder) -> None:
    """In batches of the same prompts, where matmuls are the same."""
    prompts = [prompt(seed, 12) for seed in range(8)]
    plain = [asked(folder="/runs/a", prompt=own, seed=3, temperature=0.9) for own in prompts]
    expected = sample(decoder, plain)
    for change in (
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5, "seed": 8},
        {"num_top": 4, "prompt_logprobs": True, "num_prompt_top": 2},
        {"stop_tokens": tuple(range(200)), "max_tokens": 9},
    ):
        mixed = [replace(own, **change) if index % 2 else own for index, own in enumerate(plain)]
        order = sorted(range(8), key=lambda index: -mixed[index].max_tokens)  # as if all had the same
        found = dict(zip(order, sample(decoder, [mixed[index] for index in order]), strict=True))
        for index in range(0, 8, 2):
            assert alike(found[index], expected[index]), change
            if "max_tokens" not in change:
                assert found[index] == expected[index], change
        assert any(found[index] != expected[index] for index in range(1, 8, 2)), change


def test_sequences_end_with_their_stops(decoder: Decoder) -> None:
    """With a stop token, which the result has; and after the token that completes a stop text, across tokens."""
    request = asked(folder="/runs/b", prompt=prompt(2, 9), max_tokens=12, seed=1, temperature=1.0, num_samples=2)
    (whole,) = sample(decoder, [request])
    tokens = whole.sequences[0].tokens
    assert len(set(tokens)) > 6
    text = text_of(tokens)
    first = {token: tokens.index(token) for token in tokens}
    stops = {
        "token": {"stop_tokens": (tokens[4], 319)},
        "text": {"stop_texts": ("nothing", text[2:5])},
        "both": {"stop_tokens": (tokens[11],), "stop_texts": (text[7],)},
        "at once": {"stop_tokens": (tokens[0],)},
    }
    both = 1 + min(first[tokens[7]], first[tokens[11]])
    counts = {"token": first[tokens[4]] + 1, "text": 5, "both": both, "at once": 1}
    found = sample(decoder, [replace(request, **own) for own in stops.values()] + [request])
    assert alike(found[-1], whole)
    for name, result in zip(stops, found[:-1], strict=True):
        (own, other), count = result.sequences, counts[name]
        assert own.tokens == tokens[:count] and own.stopped and len(own.logprobs) == count, name
        assert own.logprobs == pytest.approx(whole.sequences[0].logprobs[:count], abs=CLOSE)
        assert other.tokens == whole.sequences[1].tokens[: len(other.tokens)]
    (last,) = sample(decoder, [replace(request, max_tokens=5, stop_texts=(text[2:5],))])
    assert last.sequences[0].stopped and last.sequences[0].tokens == tokens[:5]


def test_nothing_more_is_sent_than_asked(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of the messages: token, log-probability, ids and their log-probabilities."""
    widths: list[int] = []
    share = Decoder.share
    monkeypatch.setattr(Decoder, "share", lambda *given: widths.append(given[2][1]) or share(*given))
    sample(decoder, [asked(max_tokens=2)])
    assert widths == [2, 2]
    sample(decoder, [asked(max_tokens=2), asked(max_tokens=1, num_top=3, prompt_logprobs=True)])
    assert widths[2:] == [8, 8, 1]


# Layouts ------------------------------------------------------------------------------------------------------------


FEW = [asked(max_tokens=20), asked(folder="/runs/b", max_tokens=3)]  # on two ranks


def _sample_rank(folder: str, world: int, tp: int, pp: int) -> list[SampleResult]:
    grid = Grid(torch.distributed.get_rank(), world, tp_size=tp, pp_size=pp)
    decoder = decoder_of(Path(folder), grid)
    found = sample(decoder, REQUESTS, grid)
    few = sample(decoder, FEW, grid, agree=_all)
    return found + few


def _all(done: bool) -> bool:
    """Whether all ranks have finished, which they ask equally often."""
    number = torch.tensor(int(done))
    torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MIN)
    return bool(number)


@pytest.mark.distributed
@pytest.mark.parametrize(("dp", "tp", "pp"), [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 2)])
def test_every_layout(folder: Path, decoder: Decoder, tmp_path: Path, dp: int, tp: int, pp: int) -> None:
    """Rank 0 has all results. Data-parallel ranks agree equally often, also without sequences of as many tokens."""
    world = dp * tp * pp
    found, *others = run_on_ranks(_sample_rank, str(folder), world, tp, pp, ranks=world, folder=tmp_path)
    assert all(map(alike, found, expected := sample(decoder, REQUESTS) + sample(decoder, FEW)))
    assert len(found) == len(expected)
    assert all(other == [] for other in others)


def _head_calls(folder: str) -> list[int]:
    """The number of calls of the head on this rank, which has one of two requests, for each request and for both."""
    grid = Grid(torch.distributed.get_rank(), 2)
    decoder, counts = decoder_of(Path(folder), grid, calls_together=True), [0]
    decoder.stage.tail.head.register_forward_hook(lambda *_: counts.append(counts.pop() + 1))
    few = [asked(prompt=prompt(8, 40), max_tokens=5), asked(max_tokens=2, prompt_logprobs=True)]
    for requests in (few[:1], few[1:], few):
        counts.append(0)
        sample(decoder, requests, grid, agree=_all)
    return counts


@pytest.mark.distributed
def test_ranks_of_zero_3_call_the_head_equally_often(folder: Path, tmp_path: Path) -> None:
    """Whichever requests they have, since weights are gathered in each call."""
    one, two = run_on_ranks(_head_calls, str(folder), ranks=2, folder=tmp_path)
    assert one == two == [0, 5, 3, 6]
