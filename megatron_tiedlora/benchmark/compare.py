"""Compares sides in one process: they take turns, and what needs much memory is measured in a process of its own.

`measure_sides` has the report of --what step, scaling and decoding; `report` makes it text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.benchmark.plan import base_matmul_rate, plan_benchmark, saved_formula
from megatron_tiedlora.benchmark.sides import IN_TURN, ONE, OURS, TOGETHER, make_sides
from megatron_tiedlora.benchmark.timing import (
    about,
    default_device,
    in_own_process,
    kernel_seconds,
    peak_of,
    take_turns,
)
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import DTYPES
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.train_fields import DEFAULT_TASK
from megatron_tiedlora.data.encode import encode_prompts
from megatron_tiedlora.data.splits import load_split
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, generate
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.training.compiling import choose_kernels
from megatron_tiedlora.training.throughput import find_peak, timed

# The setting of a step that each flag of --what scaling gives values for.
AXES = {"layers": "num_layers", "lengths": "length", "ranks": "rank", "shares": "supervised"}
_STEP = ("model", "method", "targets", "rank", "recompute")  # settings that the report of a step shows
TokenRows = list[list[int]]


def measure_sides(settings: BenchSettings) -> dict[str, Any]:
    """The report of one process.

    Raises:
        UserError: a value does not fit. The message names its flag. Nothing has been measured yet.
    """
    measures = {"step": _measure_step, "scaling": _measure_scaling, "decoding": _measure_decoding}
    return measures[settings.what](settings)


def _seconds(
    steps: Mapping[str, Callable[[], object]], device: torch.device, settings: BenchSettings, *, uncounted: int = 1
) -> dict[str, list[float]]:
    """The seconds of the steps, which take turns, by name."""
    timers = {name: partial(timed, step, device) for name, step in steps.items()}
    return take_turns(timers, repeats=settings.repeats, uncounted=uncounted)


def _measure_step(settings: BenchSettings) -> dict[str, Any]:
    plan = plan_benchmark(settings)
    makers = make_sides(plan, settings)
    memory = {name: in_own_process(name, _step_memory, plan, settings, name) for name in makers}
    sides = {name: make() for name, make in makers.items()}
    first, *_ = sides.values()
    before = _load()
    seconds = _seconds({name: side.step for name, side in sides.items()}, first.device, settings)
    load, figures = [before, _load()], {name: {"seconds": seconds[name], **memory[name]} for name in sides}
    several = () if settings.adapters is None else ("adapters", "rows", "length")
    report = about(settings, plan.settings.base, first.device, *_STEP, *several, kernels=first.kernels)
    if settings.adapters is not None:
        middle = {name: median(taken) for name, taken in seconds.items()}
        return {
            **report,
            "micro_batches": len(sides[TOGETHER].batches),
            "tokens": sides[TOGETHER].num_tokens,
            "load": load,
            "ratio": middle[IN_TURN] / middle[TOGETHER],
            "of_one_adapter": middle[ONE] / middle[TOGETHER],
            "sides": figures,
        }
    formula = saved_formula(plan, first.batches)
    figures[OURS] |= {"saved_formula": formula, "saved_ratio": figures[OURS]["saved"] / formula}
    assert isinstance(first.model, Stage)
    rate = base_matmul_rate(plan, first.model, first.batches, first.device)
    for name, side in sides.items():
        figures[name] |= {
            "tokens": side.num_tokens,
            "supervised": side.num_supervised,
            "positions": side.num_positions,
            "model_flops": side.flops,
        }
    if first.device.type == "cuda":
        peak = find_peak(first.device, plan.dtype).flops_per_second
        for name, side in sides.items():
            mfu = None if side.flops is None else side.flops / median(seconds[name]) / peak
            figures[name] |= {"mfu": mfu, "kernel_seconds": kernel_seconds(side.step)}
    return {**report, "matmul_flops_per_second": rate, "sides": figures}


def _step_memory(plan: RunPlan, settings: BenchSettings, name: str) -> dict[str, Any]:
    """The bytes `peak`, and without --adapters `saved`, of a side's turn. Call it in a fresh process."""
    side = make_sides(plan, settings)[name]()
    peak = {"peak": peak_of(side.step, side.device)}
    return peak if settings.adapters is not None else {**peak, "saved": side.saved_bytes()}


def _load() -> float | None:
    """The machine's load average of the last minute, which a figure on a shared machine depends on."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


# Values of a quantity ------------------------------------------------------------------------------------------------


def _measure_scaling(settings: BenchSettings) -> dict[str, Any]:
    device, plan = default_device(), plan_benchmark(settings.one_step())
    axes = {flag: [_one_step(settings, flag, value) for value in getattr(settings, flag)] for flag in AXES}
    chosen = choose_kernels(plan, device)

    def measured(flag: str) -> list[dict[str, Any]]:
        sides = [make_sides(plan, step, chosen)[OURS]() for plan, step in axes[flag]]
        seconds = _seconds({str(index): side.step for index, side in enumerate(sides)}, device, settings)
        return [
            {"value": value, "tokens": side.num_tokens, "seconds": taken}
            for value, side, taken in zip(getattr(settings, flag), sides, seconds.values(), strict=True)
        ]

    return {
        **about(settings, plan.settings.base, device, "model", "method", "targets", kernels=chosen.description),
        "axes": {AXES[flag]: measured(flag) for flag, steps in axes.items() if steps},
    }


def _one_step(settings: BenchSettings, flag: str, value: Any) -> tuple[RunPlan, BenchSettings]:
    """The step in which one quantity has another value, which `flag` gave."""
    name = AXES[flag]
    try:
        step = settings.one_step(**{name: value})
        return plan_benchmark(step), step
    except UserError as error:
        raise UserError(str(error).replace(f"--{name} ", f"--{flag} ", 1)) from None


# Decoding ------------------------------------------------------------------------------------------------------------


def _measure_decoding(settings: BenchSettings) -> dict[str, Any]:
    """Greedy decoding here and in transformers, on the same weights and prompts. No token ends a sequence."""
    from transformers import AutoModelForCausalLM

    source, dtype, device = find_model(settings.model), DTYPES[settings.dtype], default_device()
    folder, new_tokens = source.weights_folder(), settings.new_tokens
    examples = load_split(DEFAULT_TASK, "test", files={}, seed=0, limit=settings.batch_size)
    encoded, _ = encode_prompts(load_tokenizer(folder), examples, max_length=source.shape.limit.tokens - new_tokens)
    prompts = [ids.tolist() for ids in encoded]
    base_format = source.base_format(settings.base)
    stage = load_model(source, None, dtype=dtype, base_format=base_format, device=device)
    decoder = Decoder(stage, ParallelGroups(), source.shape)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    steps: dict[str, Callable[[], TokenRows]] = {
        "megatron_tiedlora": lambda: generate(decoder, [Prompts(prompts, (), new_tokens)])[0],
        "transformers": partial(_generate_there, theirs.to(device).eval(), prompts, new_tokens),
    }
    rows = [decode() for decode in steps.values()]
    return {
        "model": source.name,
        **about(settings, base_format, device),
        "batch_size": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "new_tokens": new_tokens,
        "equal_tokens": share_of_equal_tokens(*rows),
        "seconds": _seconds(steps, device, settings, uncounted=0),
    }


def _generate_there(model: Any, prompts: TokenRows, new_tokens: int) -> TokenRows:
    """Let transformers generate. It needs prompts that are padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    model.generation_config.eos_token_id = None
    output = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, use_cache=True
    )
    rows: TokenRows = output[:, longest:].tolist()
    return rows


def share_of_equal_tokens(ours: TokenRows, theirs: TokenRows) -> float:
    """The share of new tokens that are equal up to each sequence's first difference. In fp32 it is 1.0 but for ties."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        equal += next((i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine))
    return equal / sum(map(len, ours))
