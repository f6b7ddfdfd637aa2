"""Checks that greedy decoding gives the same tokens without a cache and without CUDA graphs, and measures its time."""

import random
from collections.abc import Sequence
from functools import partial

import pytest
import torch

from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, generate
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.selfcheck import compare, parts, reference, running
from megatron_tiedlora.training.throughput import timed

pytestmark = pytest.mark.gpu

LENGTHS = (3, 17, 40, 41, 120)  # of the prompts whose answers are compared; the last answer needs a second graph
NEW_TOKENS = 24
BATCHES, PROMPTS, WARM_UP, TIMED_TOKENS = (1, 16), (128, 200), 64, 32
MOST_REPEATED = 1.5  # largest time of a first answer relative to a second one with the same lengths
GRAPHS_FIX = "the replay of a CUDA graph computes other values than its kernels: report the versions of part env"
TOKENS_FIX = "generated tokens and scores are wrong here: check part attention, and report the versions of part env"
PLAN_FIX = (
    "attention builds a plan for every length of the cache, as cuDNN does: check in part env that"
    " TORCH_CUDNN_SDPA_DEPRIORITIZED is 1, which the package sets by default"
)


def prompts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Return random prompts with the given numbers of tokens."""
    draw = random.Random(3)
    return [[draw.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def answers(decoder: Decoder, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Return the tokens that this package generates for the prompts. End tokens are ignored."""
    return generate(decoder, [Prompts(prompts, [RowSettings((), num_tokens)] * len(prompts))])[0]


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["MHA", "GQA"])
def test_tokens(kv_heads: int, joined: torch.device, tell: parts.Tell) -> None:
    """Check that each token that is generated in fp32 is the most likely token of an fp64 reference without a cache."""
    shape, device = running.small_shape(num_key_value_heads=kv_heads), joined
    adapter = running.adapter_of(shape, "tl6")
    stage = compare.random_stage(shape, adapter, dtype=torch.float32, device=device)
    running.unsettle(stage)
    prompts = prompts_of(LENGTHS, shape.vocab_size)
    decoder = Decoder(stage.eval(), ParallelGroups(), shape)
    rows = answers(decoder, prompts, NEW_TOKENS)
    decoder.graphs = None
    assert rows == answers(decoder, prompts, NEW_TOKENS), GRAPHS_FIX
    weights, factors = running.plain_tensors(stage, torch.float64)
    equal = 0
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = torch.tensor(prompt + row, device=device)
        logits = reference.document_logits(shape, adapter.scale, weights, factors, tokens)
        equal += int((logits[len(prompt) - 1 : -1].argmax(-1).cpu() == torch.tensor(row)).sum())
    share = equal / (len(prompts) * NEW_TOKENS)
    tell("share of tokens that are those without a cache", share)
    assert share >= 0.98, TOKENS_FIX  # the two largest logits may differ by less than fp32's rounding error


def test_time(joined: torch.device, gpu: torch.device, model: str, tell: parts.Tell) -> None:
    """Measure the milliseconds per token, and how much longer a first answer takes than a second answer."""
    layers = running.layers_that_fit(model, "--rows=1", "--length=4096", "--supervised=1")
    shape = shape_from_hf({**PRESETS[model], "num_hidden_layers": layers}, source=model)
    stage = compare.random_stage(shape, running.adapter_of(shape, "tl6"), dtype=running.compute_dtype(gpu), device=gpu)
    base = sum(weight.numel() * weight.element_size() for weight in stage.parameters())
    tell(f"GB of weights of {layers} layers, which each token reads once", base / 1e9)
    decoder = Decoder(stage.eval(), ParallelGroups(), shape)
    graphs = decoder.graphs
    for batch in BATCHES:
        decoder.graphs = None
        # Warm up with a different length, because a kernel's very first call takes longer than a new length.
        answers(decoder, prompts_of([WARM_UP] * batch, shape.vocab_size), TIMED_TOKENS)
        ratios = []
        for length in PROMPTS:
            prompts = prompts_of([length] * batch, shape.vocab_size)
            answer = partial(answers, decoder, prompts, TIMED_TOKENS)
            first, again = timed(answer, gpu), timed(answer, gpu)
            ratios.append(first / again)
        tell(f"batch {batch}: ms per token without CUDA graphs", 1e3 * again / TIMED_TOKENS)
        decoder.graphs = graphs
        answer()  # captures the graphs
        again = timed(answer, gpu)
        parts.warn_unless(bool(decoder.graphs), tell, "no CUDA graph was captured: the log says why")
        tell(f"batch {batch}: ms per token of all answers, prompts included", 1e3 * again / TIMED_TOKENS)
        tell(f"batch {batch}: tokens/s", batch * TIMED_TOKENS / again)
        tell(f"batch {batch}: first answer per second one", min(ratios))
        # Other work of the host slows only some lengths, but a plan of a kernel would slow each. So the minimum counts.
        parts.warn_unless(min(ratios) <= MOST_REPEATED, tell, PLAN_FIX)
