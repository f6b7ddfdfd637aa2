"""Greedy decoding against transformers' own, at every layout: token for token, with an adapter that is not zero."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapted_stages import attention_layer
from support.forked_ranks import run_on_ranks
from support.oracle import OracleConfig, load_weights, merged_weights
from support.tiny_decoders import build, calls_of, decoded_adapter
from support.tiny_models import EOS_ID, write_tiny_model

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import (
    TOKENS_BETWEEN_AGREEMENTS,
    Prompts,
    RowSettings,
    _groups,
    ending_log_likelihoods,
    generate,
    similar_lengths,
    split_evenly,
)
from megatron_tiedlora.model.attention import KeyValueCache, _attend_to_cache
from megatron_tiedlora.model.cpu_attention import Scores
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "gqa_tied_llama3": {"tied": True, "llama3_rope": True, "head_dim": 16},
    "mha": {"num_kv_heads": 4, "attention_bias": True},
    "mha_tied": {"num_kv_heads": 4, "tied": True, "vocab_size": 321},
}
FEW = ("gqa",)  # shapes of what need not be seen for all of them
# (data, tensor, pipeline), and the shapes seen there in part: heads and biases are cut over tensor-parallel ranks, tied
# embeddings are on two stages, and where both are, the last shape pads its vocabulary besides.
LAYOUTS: dict[tuple[int, int, int], tuple[str, ...]] = {
    (1, 2, 1): ("gqa", "mha"),
    (1, 1, 2): ("gqa", "gqa_tied_llama3"),
    (1, 2, 2): ("gqa", "mha_tied"),
    **dict.fromkeys([(2, 1, 1), (1, 1, 3)], FEW),
}
NEW_TOKENS = 2 * TOKENS_BETWEEN_AGREEMENTS
Expected = dict[str, list[list[int]]]  # by shape, the tokens of each prompt


def prompts(seed: int = 0, count: int = 32, longest: int = 30) -> list[list[int]]:
    """Of mixed lengths, one token among them."""
    draw = random.Random(seed)
    lengths = [1, longest, *(draw.randint(2, longest) for _ in range(count - 2))]
    return [[draw.randint(3, 319) for _ in range(length)] for length in lengths]


class Reference:
    """transformers' model of the merged weights, and what it generates alone for each prompt."""

    def __init__(self, folder: Path, **shape: Any) -> None:
        from transformers import AutoModelForCausalLM

        self.folder = write_tiny_model(folder, tokenizer=False, **shape)
        config = OracleConfig.from_folder(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        merged = merged_weights(load_weights(folder), config, decoded_adapter(folder))
        missing, unexpected = self.model.load_state_dict(merged, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}

    def generate(self, prompt: list[int], *, eos_id: int = EOS_ID, new: int = NEW_TOKENS) -> list[int]:
        """transformers' greedy continuation, without EOS and what would follow it."""
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": new, "eos_token_id": eos_id, "pad_token_id": eos_id}
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        new_tokens: list[int] = output[0, len(prompt) :].tolist()
        return new_tokens[: new_tokens.index(eos_id)] if eos_id in new_tokens else new_tokens

    @torch.no_grad()
    def check(self, batch: Sequence[list[int]], rows: Sequence[list[int]], expected: Sequence[list[int]]) -> None:
        """Equal tokens; or, at the first difference, the reference's two best logits closer than 1e-4."""
        assert len(rows) == len(batch) == len(expected)
        for prompt, row, wanted in zip(batch, rows, expected, strict=True):
            if row != wanted:
                same = next(i for i in range(NEW_TOKENS) if row[i : i + 1] != wanted[i : i + 1])
                best = self.model(torch.tensor([prompt + wanted[:same]])).logits[0, -1].topk(2).values
                assert best[0] - best[1] < 1e-4, (prompt, row, wanted)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    root = tmp_path_factory.mktemp("references")
    return {name: Reference(root / name, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def expected(references: dict[str, Reference]) -> Expected:
    return {name: [reference.generate(prompt) for prompt in prompts()] for name, reference in references.items()}


def decode(decoder: Decoder, batch: list[list[int]], *, eos_id: int = EOS_ID, new: int = NEW_TOKENS) -> list[list[int]]:
    return generate(decoder, [Prompts(batch, [RowSettings((eos_id,), new)] * len(batch))])[0]


# One process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_those_of_transformers(
    references: dict[str, Reference], expected: Expected, shape: str, merged: bool
) -> None:
    decoder = build(references[shape].folder, grid=Grid(0, 1), merged=merged)
    assert (decoder.stage.adapter is None) == merged
    ours = decode(decoder, prompts())
    references[shape].check(prompts(), ours, expected[shape])
    assert len({tuple(tokens) for tokens in ours}) == len(ours) and max(map(len, ours)) == NEW_TOKENS


@pytest.fixture(scope="module")
def decoder(references: dict[str, Reference]) -> Decoder:
    return build(references["gqa"].folder, grid=Grid(0, 1))


def test_decoding_ends_at_eos_for_each_prompt_alone(decoder: Decoder, references: dict[str, Reference]) -> None:
    """EOS is a token that these prompts do produce, at different steps, one of them at the first."""
    batch = prompts(seed=3, count=9)
    free = decode(decoder, batch)
    eos_id, first = free[4][5], free[0][0]
    for stop in (eos_id, first):
        ours = decode(decoder, batch, eos_id=stop)
        assert ours == [row[: row.index(stop)] if stop in row else row for row in free]
        assert ours == [references["gqa"].generate(prompt, eos_id=stop) for prompt in batch]
        assert len({len(row) for row in ours}) > 1
    assert decode(decoder, batch, eos_id=first)[0] == []


def test_decoding_ends_where_it_is_told_to(decoder: Decoder) -> None:
    batch = prompts(seed=7, count=5)
    free = decode(decoder, batch)
    own = RowSettings((EOS_ID,), NEW_TOKENS, lambda row: row[-1] % 7 == 0 and len(row) > 2)
    given = Prompts(batch, [own] * len(batch))
    (rows,) = generate(decoder, [given])
    for row, whole in zip(rows, free, strict=True):
        end = next((i + 1 for i, token in enumerate(whole) if token % 7 == 0 and i > 1), NEW_TOKENS)
        assert row == whole[:end]
    assert len({len(row) for row in rows}) > 1


def test_the_model_is_called_once_a_token_and_no_more_once_all_are_done(decoder: Decoder) -> None:
    (prompt,) = prompts(seed=4)[3:4]
    row = decode(decoder, [prompt])[0]
    stop = next(index for index in range(1, NEW_TOKENS) if row[index] not in row[:index])
    with calls_of(decoder) as calls:
        decode(decoder, [prompt], eos_id=row[stop])
    assert len(calls) == stop + 1
    with calls_of(decoder) as calls:
        decode(decoder, [prompt], new=6)
    assert len(calls) == 6
    # Another rank has work left: this one is asked on and on, and rests.
    asked: list[bool] = []
    given = Prompts([prompt], [RowSettings((row[stop],), NEW_TOKENS)])
    with calls_of(decoder) as calls:
        again = generate(decoder, [given], agree=lambda mine: bool(asked.append(mine)))
    assert again == [[row[:stop]]] and len(calls) == stop + 1
    steps = range(TOKENS_BETWEEN_AGREEMENTS, NEW_TOKENS + 1, TOKENS_BETWEEN_AGREEMENTS)
    assert asked == [step > stop for step in steps]


def test_ranks_that_call_together_call_equally_often(references: dict[str, Reference]) -> None:
    """Under ZeRO-3 a rank whose sequences have ended keeps calling the model, and its answer stays the same. Prompts
    are read in one call, whatever their lengths are: a peer's may be alike."""
    decoder, (prompt,) = build(references["gqa"].folder, grid=Grid(0, 1), calls_together=True), prompts(seed=4)[3:4]
    row = decode(decoder, [prompt])[0]
    stop, asked = next(index for index in range(1, NEW_TOKENS) if row[index] not in row[:index]), []
    with calls_of(decoder) as calls:
        given = Prompts([prompt], [RowSettings((row[stop],), NEW_TOKENS)])
        rows = generate(decoder, [given], agree=lambda mine: bool(asked.append(mine)))
    assert rows == [[row[:stop]]] and len(calls) == NEW_TOKENS
    assert asked == [False] * stop + [True] * (NEW_TOKENS - stop)
    with calls_of(decoder) as calls:
        decode(decoder, [[5] * length for length in (3, 30, 12, 28, 11)], new=1)
    assert len(calls) == 1
    with calls_of(decoder) as calls:
        ending_log_likelihoods(decoder, [([5] * 4500, [[6, 7]] * 4)] * 2)
    assert len(calls) == 2


@torch.no_grad()
def test_a_bf16_model_chooses_by_its_own_logits(tmp_path: Path) -> None:
    """Its cache is fp32 on a CPU, so its logits are not quite those of a whole pass; the choice is near the top."""
    folder = write_tiny_model(tmp_path, tokenizer=False)
    source, batch = find_model(str(folder)), prompts(seed=6, count=9)
    model = load_model(source, None, dtype=torch.bfloat16)
    decoded = decode(Decoder(model, ParallelGroups(), source.shape), batch, new=8)
    for prompt, row in zip(batch, decoded, strict=True):
        ids = torch.tensor([prompt + row])
        logits = model.predict(ids, torch.arange(ids.shape[1])[None])[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(row)[:, None])[:, 0]
        assert (logits.amax(1) - chosen <= 0.03 * logits.abs().amax(1)).all()


def test_prompts_of_similar_length_are_computed_together(decoder: Decoder) -> None:
    assert similar_lengths([100, 80, 75, 74, 60, 56, 10]) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert similar_lengths([5000, 5000, 4096, 4096, 4096]) == [slice(0, 1), slice(1, 2), slice(2, 4), slice(4, 5)]
    assert similar_lengths([9]) == [slice(0, 1)]
    with calls_of(decoder) as shapes:
        decode(decoder, [[5] * length for length in (3, 30, 12, 28, 11)], new=1)
    assert shapes == [(2, 30), (2, 12), (1, 3)]


# Likelihoods ----------------------------------------------------------------------------------------------------


def samples() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts of different lengths, one token among them, each with four endings of different lengths."""
    draw = random.Random(8)
    return [
        (prompt, [[draw.randint(3, 319) for _ in range(draw.randint(1, 9))] for _ in range(4)])
        for prompt in prompts(seed=8, count=7)
    ]


@torch.no_grad()
def reference_likelihoods(model: Any) -> list[list[float]]:
    """From whole passes over prompt and ending, one by one."""
    found = []
    for prompt, endings in samples():
        scores = []
        for ending in endings:
            logits = model(torch.tensor([prompt + ending])).logits[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(ending) - 1)
            scores.append(sum(float(logits[p, token]) for p, token in zip(places, ending, strict=True)))
        found.append(scores)
    return found


@pytest.mark.parametrize("shape", ["gqa", "mha_tied"])
def test_likelihoods_of_endings_equal_those_of_whole_passes(references: dict[str, Reference], shape: str) -> None:
    decoder = build(references[shape].folder, grid=Grid(0, 1))
    ours = ending_log_likelihoods(decoder, samples())
    wanted = torch.tensor(reference_likelihoods(references[shape].model))
    assert torch.allclose(torch.tensor(ours), wanted.float(), rtol=1e-5, atol=1e-4)
    alone = [ending_log_likelihoods(decoder, [sample])[0] for sample in samples()]
    assert torch.allclose(torch.tensor(ours), torch.tensor(alone), rtol=1e-5, atol=1e-4)


def test_a_prompt_is_computed_once_for_all_its_endings(decoder: Decoder) -> None:
    with calls_of(decoder) as shapes:
        ending_log_likelihoods(decoder, samples())
    longest = max(len(prompt) for prompt, _ in samples())
    longest_ending = max(len(ending) for _, endings in samples() for ending in endings)
    assert shapes == [(7, longest - 1), (28, longest_ending)]


# Several ranks --------------------------------------------------------------------------------------------------


def _decode_rank(folders: dict[str, str], world_size: int, tp: int, pp: int) -> dict[str, Any]:
    grid = Grid(torch.distributed.get_rank(), world_size, tp_size=tp, pp_size=pp)
    batch = prompts()[grid.dp_rank :: grid.dp_size]
    answers: dict[str, Any] = {}
    for name, folder in folders.items():
        decoder = build(Path(folder), grid=grid)
        answers[name] = decode(decoder, batch)
        answers[name, "eos"] = decode(decoder, batch, eos_id=sixth_token(answers[name]))
        answers[name, "few"] = decode(decoder, batch[: pp - 1] or batch[:1], new=3)
        if name in FEW:
            answers["likelihoods"] = ending_log_likelihoods(decoder, samples())
            answers["merged"] = decode(build(Path(folder), grid=grid, merged=True), batch)
            answers["stopped"] = _stopped(decoder, batch)
    return answers


def _stopped(decoder: Decoder, batch: list[list[int]]) -> list[list[int]]:
    """What is decoded after all ranks stopped in the middle of a batch: nothing of it may still be under way."""

    def refuse(_: bool) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(decoder, [Prompts(batch, [RowSettings((EOS_ID,), NEW_TOKENS)] * len(batch))], agree=refuse)
    return decode(decoder, batch, new=3)


def sixth_token(rows: Sequence[Sequence[int]]) -> int:
    """Of the first row from the fifth on that has so many."""
    return next(row[5] for row in rows[4:] if len(row) > 5)


@pytest.mark.distributed
@pytest.mark.parametrize(("dp", "tp", "pp"), LAYOUTS)
def test_every_layout_decodes_the_same(
    references: dict[str, Reference], expected: Expected, tmp_path: Path, dp: int, tp: int, pp: int, whole: bool
) -> None:
    """All ranks have all tokens; three stages have parts of 10, 11 and 11 prompts under way."""
    likelihoods = torch.tensor(reference_likelihoods(references["gqa"].model))
    shapes = tuple(SHAPES) if whole and pp < 3 else LAYOUTS[dp, tp, pp]
    folders = {name: str(references[name].folder) for name in shapes}
    world = dp * tp * pp
    ranks = run_on_ranks(_decode_rank, folders, world, tp, pp, ranks=world, folder=tmp_path / "ranks")
    for name in shapes:
        reference, alone = references[name], build(references[name].folder, grid=Grid(0, 1))
        until: dict[tuple[int, int], list[list[int]]] = {}  # what one rank decodes, by data-parallel rank and EOS
        for rank, answers in enumerate(ranks):
            grid = Grid(rank, world, tp_size=tp, pp_size=pp)
            batch, right = (rows[grid.dp_rank :: dp] for rows in (prompts(), expected[name]))
            rows = answers[name]
            reference.check(batch, rows, right)
            end = grid.dp_rank, sixth_token(rows)
            if end not in until:
                until[end] = decode(alone, batch, eos_id=end[1])
            assert answers[name, "eos"] == until[end]
            assert answers[name, "few"] == [row[:3] for row in rows[: max(pp - 1, 1)]]
            if name not in FEW:
                continue
            reference.check(batch, answers["merged"], right)
            assert answers["stopped"] == [row[:3] for row in rows]
            if grid.pp_rank == pp - 1:
                assert torch.allclose(torch.tensor(answers["likelihoods"]), likelihoods, rtol=1e-5, atol=1e-4)
            else:
                assert answers["likelihoods"] == [[]] * len(samples())


def _groups_used(folder: str) -> tuple[set[str], set[str]]:
    """(groups of point-to-point messages, groups of broadcasts) of a batch in two stages."""
    grid = Grid(torch.distributed.get_rank(), 2, pp_size=2)
    decoder = build(Path(folder), grid=grid)
    seen: dict[str, set[str]] = {"isend": set(), "recv": set(), "broadcast": set()}
    with pytest.MonkeyPatch.context() as patch:
        for name, groups in seen.items():
            original = getattr(torch.distributed, name)

            def noted(*args: Any, _original: Any = original, _groups: set[str] = groups, **keywords: Any) -> Any:
                _groups.add(keywords["group"].group_name)
                return _original(*args, **keywords)

            patch.setattr(torch.distributed, name, noted)
        decode(decoder, prompts(count=4), new=3)
    return seen["isend"] | seen["recv"], seen["broadcast"]


@pytest.mark.distributed
def test_choices_travel_apart_from_hidden_states(references: dict[str, Reference], tmp_path: Path) -> None:
    """Ranks send the two in different orders, and NCCL may keep one queue a group."""
    for between_stages, from_the_last in run_on_ranks(
        _groups_used, str(references["gqa"].folder), ranks=2, folder=tmp_path / "ranks"
    ):
        assert between_stages and from_the_last and not between_stages & from_the_last


# Parts by themselves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [None, Scores(0.3, 3), Scores(0.9, 7, 2.0), Scores(0.9, None, 2.0)], ids=str)
@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("length", "granularity"), [(1, 1), (5, 1), (1, 16), (5, 16), (1, 32)])
def test_attention_to_a_cache(
    dtype: torch.dtype,
    length: int,
    granularity: int,
    by_tokens: bool,
    how: Scores | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against a plain softmax, in every dtype that a cache may have; CUDA's kernels lay their results out by tokens.
    A GPU reads keys that are not there yet."""
    original = torch.nn.functional.scaled_dot_product_attention
    if by_tokens:
        monkeypatch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **keywords: original(*args, **keywords).transpose(1, 2).contiguous().transpose(1, 2),
        )
    torch.manual_seed(0)
    layer, how = attention_layer(6, 2, dtype=dtype, how=how), how or Scores(8**-0.5)
    cache = KeyValueCache.empty(3, 2, 20, 8, torch.empty(0, dtype=dtype), granularity)
    cache.update(torch.randn(3, 2, 9, 8), torch.randn(3, 2, 9, 8), torch.arange(9).expand(3, 9))
    cache.filled = 9
    positions = torch.tensor([[9], [4], [7]]) + torch.arange(length)
    context = layer.context(positions, dtype, cache=cache)
    (mask,) = context.mask.values()
    assert mask.shape[-1] == {1: 9 + length, 16: 16, 32: 20}[granularity]
    cache.update(torch.randn(3, 2, length, 8), torch.randn(3, 2, length, 8), positions)
    query = torch.randn(3, 6, length, 8, dtype=dtype)
    ours = _attend_to_cache(query, cache, mask, layer.qkv.heads)
    keys, values = (tensor.double().repeat_interleave(3, dim=1) for tensor in (cache.keys, cache.values))
    scores = query.double() @ keys.transpose(2, 3) * how.scale
    scores = scores if how.cap is None else how.cap * (scores / how.cap).tanh()
    distance = positions[:, None, :, None] - torch.arange(20)
    hidden = (distance < 0) | (distance >= (how.window or 20))
    wanted = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    assert torch.allclose(ours.double(), wanted, rtol=0, atol=2e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("filled", [6, 7, 8, 9])
def test_rows_of_a_mask_begin_at_multiples_of_8(filled: int) -> None:
    """Else CUDA's kernel copies it in every layer."""
    layer = attention_layer(6, 2, dtype=torch.bfloat16)
    cache = KeyValueCache.empty(3, 2, 20, 8, torch.empty(0, dtype=torch.bfloat16))
    cache.filled = filled
    positions = torch.tensor([[filled], [2], [4]])
    (mask,) = layer.context(positions, torch.bfloat16, cache=cache).mask.values()
    assert mask.shape == (6, 3, filled + 1)
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
