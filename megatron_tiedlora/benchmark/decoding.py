"""Measures greedy decoding here and in transformers. Both take turns on the same weights and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from megatron_tiedlora.base.base_formats import precision_in_words
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.benchmark import timing
from megatron_tiedlora.checkpoint.load_model import DTYPES, load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.tasks import DEFAULT_TASK
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, generate
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.training.throughput import timed

Rows = list[list[int]]


def measure(settings: BenchSettings) -> dict[str, Any]:
    """The report of both sides."""
    from transformers import AutoModelForCausalLM

    source, dtype, device = find_model(settings.model), DTYPES[settings.dtype], timing.default_device()
    folder, new_tokens = source.weights_folder(), settings.new_tokens
    examples = load_split(DEFAULT_TASK, "test", files={}, seed=0, limit=settings.batch_size)
    encoded, _ = encode_prompts(load_tokenizer(folder), examples, max_length=source.shape.limit.tokens - new_tokens)
    prompts = [ids.tolist() for ids in encoded]
    base = source.base_format(settings.base)
    stage = load_model(source, None, dtype=dtype, base=base, device=device)
    decoder = Decoder(stage, ParallelGroups(), source.shape)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    turns: dict[str, Callable[[], Rows]] = {
        # No token ends a sequence.
        "megatron_tiedlora": lambda: generate(decoder, [Prompts(prompts, (), new_tokens)])[0],
        "transformers": partial(_generate_there, theirs.to(device).eval(), prompts, new_tokens),
    }
    rows = [decode() for decode in turns.values()]
    timers = {name: partial(timed, decode, device) for name, decode in turns.items()}
    return {
        "model": source.name,
        "dtype": precision_in_words(settings.dtype, base),
        **timing.describe_setup(device),
        "batch_size": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": new_tokens,
        "equal_tokens": share_of_equal_tokens(*rows),
        "seconds": timing.take_turns(timers, repeats=settings.repeats, uncounted=0),
    }


def _generate_there(model: Any, prompts: Rows, new_tokens: int) -> Rows:
    """Let transformers generate. It needs prompts that are padded on the left; no token ends a sequence."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    rows: Rows = output[:, longest:].tolist()
    return rows


def share_of_equal_tokens(ours: Rows, theirs: Rows) -> float:
    """The share of new tokens that are equal up to each sequence's first difference. In fp32 it is 1.0 but for ties."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        equal += next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return equal / sum(map(len, ours))


def decoding_table(report: Mapping[str, Any]) -> list[str]:
    """The figures as lines."""
    tokens = report["batch_size"] * report["new_tokens"]
    ours, theirs = (median(taken) for taken in report["seconds"].values())
    prompts = count_text(report["batch_size"], "prompt")
    return [
        f"{report['model']} in {report['dtype']} on {report['device']}: {prompts} of"
        f" {report['prompt_tokens']} tokens together, {report['new_tokens']} new tokens each,"
        f" {report['equal_tokens']:.1%} of them equal",
        timing.setup_line(report),
        f"{'':<20}{timing.SPEED_HEADER}",
        *(f"{name:<20}{timing.speed_columns(taken, tokens)}" for name, taken in report["seconds"].items()),
        f"ratio of the medians {theirs / ours:.2f}",
    ]
