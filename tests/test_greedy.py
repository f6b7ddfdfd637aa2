"""Greedy decoding against transformers' own, and the metrics against their definitions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import native_adapter
from oracle import OracleConfig, load_weights, merged_weights
from tiny_models import EOS_ID, random_adapter, write_tiny_model

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.greedy import decode_batch
from megatron_tiedlora.evaluation.metrics import (
    METRICS,
    exact_match,
    final_number,
    gsm8k_exact_match,
    normalise_squad,
    squad_exact_match,
)
from megatron_tiedlora.model.families.llama import LlamaConfig
from megatron_tiedlora.pipeline.stage import Stage

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha_tied": {"num_kv_heads": 4, "tied": True},
    "gqa_tied_llama3": {"tied": True, "llama3_rope": True, "head_dim": 16},
}
NEW_TOKENS = 24


def prompts(seed: int = 0, count: int = 9, longest: int = 30) -> list[list[int]]:
    """Of mixed lengths, one token among them."""
    draw = random.Random(seed)
    lengths = [1, longest, *(draw.randint(2, longest) for _ in range(count - 2))]
    return [[draw.randint(3, 319) for _ in range(length)] for length in lengths]


class Decoder:
    """A tiny model with a tl6 adapter, and transformers' model of the same merged weights."""

    def __init__(self, folder: Path, **shape: Any) -> None:
        from transformers import LlamaForCausalLM

        write_tiny_model(folder, tokenizer=False, **shape)
        source, config = find_model(str(folder)), OracleConfig.from_folder(folder)
        adapter = random_adapter("tl6", config, alpha=6)
        self.config: LlamaConfig = source.config
        self.ours: Stage = load_model(source, native_adapter(source, adapter), dtype=torch.float32)
        self.theirs: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        merged = merged_weights(load_weights(folder), config, adapter)
        missing, unexpected = self.theirs.load_state_dict(merged, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}

    def decode(self, batch: list[list[int]], *, eos_id: int = EOS_ID, new: int = NEW_TOKENS) -> list[list[int]]:
        return decode_batch(self.ours, batch, config=self.config, eos_id=eos_id, max_new_tokens=new)

    def generate(self, prompt: list[int], *, eos_id: int = EOS_ID, new: int = NEW_TOKENS) -> list[int]:
        """transformers' greedy continuation, without EOS and what would follow it."""
        ids = torch.tensor([prompt])
        output = self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
        new_tokens: list[int] = output[0, len(prompt) :].tolist()
        return new_tokens[: new_tokens.index(eos_id)] if eos_id in new_tokens else new_tokens


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Decoder]:
    root = tmp_path_factory.mktemp("decoders")
    return {name: Decoder(root / name, **shape) for name, shape in SHAPES.items()}


# --------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_those_of_transformers(decoders: dict[str, Decoder], shape: str) -> None:
    decoder, batch = decoders[shape], prompts()
    ours = decoder.decode(batch)
    assert ours == [decoder.generate(prompt) for prompt in batch]
    assert len({tuple(tokens) for tokens in ours}) == len(batch) and max(map(len, ours)) == NEW_TOKENS


def test_a_prompt_decodes_alike_in_any_company(decoders: dict[str, Decoder]) -> None:
    decoder, batch = decoders["gqa"], prompts(seed=1)
    together = decoder.decode(batch)
    order = list(range(len(batch)))
    random.Random(2).shuffle(order)
    assert decoder.decode([batch[i] for i in order]) == [together[i] for i in order]
    assert [decoder.decode([prompt])[0] for prompt in batch] == together
    assert decoder.decode([batch[3]] * 2) == [together[3]] * 2


def test_decoding_ends_at_eos_for_each_prompt_alone(decoders: dict[str, Decoder]) -> None:
    """EOS is a token that these prompts do produce, at different steps, one of them at the first."""
    decoder, batch = decoders["gqa"], prompts(seed=3)
    free = decoder.decode(batch)
    eos_id = free[4][5]
    first = free[0][0]
    for stop in (eos_id, first):
        ours = decoder.decode(batch, eos_id=stop)
        assert ours == [row[: row.index(stop)] if stop in row else row for row in free]
        assert ours == [decoder.generate(prompt, eos_id=stop) for prompt in batch]
        assert len({len(row) for row in ours}) > 1
    assert decoder.decode(batch, eos_id=first)[0] == []


def test_decoding_stops_when_all_are_done(decoders: dict[str, Decoder]) -> None:
    """The model is called once for the prompts and once a further token, and no more once every sequence has ended."""
    decoder, (prompt,) = decoders["gqa"], prompts(seed=4)[3:4]
    row = decoder.decode([prompt])[0]
    stop = next(index for index in range(1, NEW_TOKENS) if row[index] not in row[:index])
    calls: list[int] = []
    handle = decoder.ours.layers["0"].register_forward_hook(lambda *_: calls.append(1))
    try:
        decoder.decode([prompt], eos_id=row[stop])
        assert len(calls) == stop + 1
        calls.clear()
        decoder.decode([prompt], new=6)
        assert len(calls) == 6
        calls.clear()
        # Another rank has work left: this one keeps calling the model, and its answer stays the same.
        asked: list[bool] = []

        def only_at_the_end(mine: bool) -> bool:
            asked.append(mine)
            return False

        again = decode_batch(
            decoder.ours,
            [prompt],
            config=decoder.config,
            eos_id=row[stop],
            max_new_tokens=NEW_TOKENS,
            all_done=only_at_the_end,
        )
        assert again == [row[:stop]] and len(calls) == NEW_TOKENS
        assert asked == [False] * stop + [True] * (NEW_TOKENS - stop)
    finally:
        handle.remove()


@pytest.mark.parametrize("new", [1, 2])
def test_few_tokens(decoders: dict[str, Decoder], new: int) -> None:
    decoder, batch = decoders["gqa"], prompts(seed=5)
    assert decoder.decode(batch, new=new) == [row[:new] for row in decoder.decode(batch)]


@torch.no_grad()
def test_a_bf16_model_chooses_by_its_own_logits(tmp_path: Path) -> None:
    """Its cache is fp32 on a CPU, so its logits are not quite those of a whole pass; the choice is near the top."""
    folder = write_tiny_model(tmp_path, tokenizer=False)
    source, batch = find_model(str(folder)), prompts(seed=6)
    model = load_model(source, None, dtype=torch.bfloat16)
    decoded = decode_batch(model, batch, config=source.config, eos_id=EOS_ID, max_new_tokens=8)
    for prompt, row in zip(batch, decoded, strict=True):
        ids = torch.tensor([prompt + row])
        logits = model(ids, torch.arange(ids.shape[1])[None])[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(row)[:, None])[:, 0]
        assert (logits.amax(1) - chosen <= 0.03 * logits.abs().amax(1)).all()


# --------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 * 3 = <<6*3=18>>18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -12", "-12"),
        ("#### -1,200.50", "-1200.50"),
        ("#### 5 and then #### 6", "5"),  # the first one, as GSM8K's own script
        ("#### 18.", "18."),  # and its full stop
        ("#### $18", None),
        ("####18", None),
        ("The answer is 18", None),
        ("", None),
    ],
)
def test_gsm8k_takes_the_number_behind_the_hashes(text: str, number: str | None) -> None:
    assert final_number(text) == number


def test_gsm8k_compares_numbers_as_strings() -> None:
    assert gsm8k_exact_match("so\n#### 1,000", ["... #### 1000"]) == 1.0
    assert gsm8k_exact_match("#### -3", ["#### 3"]) == 0.0
    assert gsm8k_exact_match("#### 18.0", ["#### 18"]) == 0.0
    assert gsm8k_exact_match("18", ["#### 18"]) == 0.0
    assert gsm8k_exact_match("none", ["none"]) == 0.0  # no number is wrong, whatever the reference
    assert gsm8k_exact_match("#### 2", ["#### 1", "#### 2"]) == 1.0


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat's\tHat.", "cats hat"),
        ("a an the", ""),
        ("Theatre and another banana", "theatre and another banana"),
        ("U.S.A.", "usa"),
        ("20 %", "20"),
        ("The-end", "theend"),  # punctuation goes before articles
        ("“Über” the Hügel", "“über” hügel"),  # ASCII punctuation only
    ],
)
def test_squad_normalisation(text: str, normal: str) -> None:
    assert normalise_squad(text) == normal


def test_squad_is_the_best_over_all_gold_answers() -> None:
    golds = ["Denver Broncos", "the Broncos", "Broncos"]
    assert squad_exact_match("The Denver Broncos.", golds) == 1.0
    assert squad_exact_match("broncos", golds) == 1.0
    assert squad_exact_match("Denver", golds) == 0.0
    assert squad_exact_match("", golds) == 0.0


def test_plain_exact_match_leaves_out_white_space_at_the_ends_only() -> None:
    assert exact_match(" Yes\n", ["no", "Yes "]) == 1.0
    assert exact_match("yes", ["Yes"]) == 0.0
    assert exact_match("a  b", ["a b"]) == 0.0


def test_every_task_s_metric_exists() -> None:
    from megatron_tiedlora.data.tasks import TASKS

    assert {task.metric for task in TASKS.values() if task.metric} <= METRICS.keys()
    for score in METRICS.values():
        assert score("#### 7", ["#### 7"]) == 1.0 and score("#### 7", ["#### 8"]) == 0.0
