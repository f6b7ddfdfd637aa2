"""Part decode: greedy decoding with a cache gives the same tokens as without one, and its time per token."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.benchmark.sides import random_stage
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, generate
from megatron_tiedlora.gpu_checks.correct import adapter_of, plain_tensors, unsettle
from megatron_tiedlora.gpu_checks.package import compute_dtype, small_shape
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.gpu_checks.reference import document_logits
from megatron_tiedlora.gpu_checks.running import layers_that_fit, release
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.runtime.process_group import join_process_group

LENGTHS = (3, 17, 40, 41)  # of the prompts whose answers are compared
NEW_TOKENS = 24
BATCHES, PROMPTS, WARM_UP, TIMED_TOKENS = (1, 16), (128, 200), 64, 32
MOST_REPEATED = 1.5  # time of a first answer relative to a second one with the same lengths
TOKENS_FIX = "decoding is wrong here, so scores are too: check part attention, and report the versions of part env"
PLAN_FIX = (
    "a plan is built for every length of the cache, as cuDNN does: check in part env that"
    " TORCH_CUDNN_SDPA_DEPRIORITIZED is 1, which the package sets by default"
)


def check(report: Report, options: CheckOptions) -> None:
    """Run the part; on a CPU only compare the tokens."""
    device = join_process_group(1.0, expected_ranks=1)  # as in a run: with PyTorch's settings for matmuls
    for kv_heads in (4, 2):
        label = f"fp32, {'MHA' if kv_heads == 4 else 'GQA'}: tokens as without a cache"
        with report.attempt(label):
            _compare(report, label, small_shape(num_key_value_heads=kv_heads), device)
    if options.on_gpu:
        with report.attempt(f"{options.model}: decoding"):
            _time(report, options, device)


def prompts_of(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Random prompts."""
    draw = random.Random(3)
    return [[draw.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def answers(stage: Stage, shape: ModelShape, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The package's answers; no token ends an answer."""
    decoder = Decoder(stage.eval(), ParallelGroups(), shape)
    return generate(decoder, [Prompts(prompts, (), num_tokens)])[0]


def _compare(report: Report, label: str, shape: ModelShape, device: torch.device) -> None:
    """Check that each token is the reference's most likely one after the tokens before it, in fp64 without a cache."""
    adapter = adapter_of(shape, "tl6")
    stage = random_stage(shape, adapter, dtype=torch.float32, device=device)
    unsettle(stage)
    prompts = prompts_of(LENGTHS, shape.vocab_size)
    rows = answers(stage, shape, prompts, NEW_TOKENS)
    weights, factors = plain_tensors(stage, torch.float64)
    equal = 0
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = torch.tensor(prompt + row, device=device)
        logits = document_logits(shape, adapter.scale, weights, factors, tokens)
        equal += int((logits[len(prompt) - 1 : -1].argmax(-1).cpu() == torch.tensor(row)).sum())
    share = equal / (len(prompts) * NEW_TOKENS)
    # Two logits may differ by less than fp32's rounding error.
    report.at_least(label, share, 0.98, fix=TOKENS_FIX)


def _time(report: Report, options: CheckOptions, device: torch.device) -> None:
    layers = layers_that_fit(options.model, "--rows=1", "--length=4096", "--supervised=1")
    values = {**PRESETS[options.model], "num_hidden_layers": layers}
    shape = shape_from_hf(values, source=options.model)
    stage = random_stage(shape, adapter_of(shape, "tl6"), dtype=compute_dtype(device), device=device)
    base = sum(weight.numel() * weight.element_size() for weight in stage.parameters())
    report.tell("weights", base / 1e9, "GB", why=f"{layers} layers of {options.model}; each token reads them once")
    for batch in BATCHES:
        # Warm up with another length: a kernel's very first call costs more than a new length.
        answers(stage, shape, prompts_of([WARM_UP] * batch, shape.vocab_size), TIMED_TOKENS)
        ratios = []
        for length in PROMPTS:
            prompts = prompts_of([length] * batch, shape.vocab_size)
            first, again = (_seconds(stage, shape, prompts) for _ in range(2))
            ratios.append(first / again)
        report.tell(
            f"batch {batch}: time per token", 1e3 * again / TIMED_TOKENS, "ms", why="of all answers, prompts included"
        )
        report.tell(f"batch {batch}: tokens/s", batch * TIMED_TOKENS / again)
        report.at_most(
            f"batch {batch}: first answer per second one",
            min(ratios),  # a plan costs time at every length, other work of the host does not
            MOST_REPEATED,
            fix=PLAN_FIX,
            otherwise="warn",
        )
    del stage
    release()


def _seconds(stage: Stage, shape: ModelShape, prompts: list[list[int]]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    answers(stage, shape, prompts, TIMED_TOKENS)
    torch.cuda.synchronize()
    return time.perf_counter() - began
