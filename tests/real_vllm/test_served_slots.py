"""Slots of a running vLLM: one, fewer than adapters, used before by an adapter that was larger, and their bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.served_models import Served, ServedModel, prompts
from support.vllm_engine import MODES, Engine, Question, expected_bytes, held_bytes, questions_of, woven, wrong_answers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]
NATIVE = ("tied", "both")  # modes with slots of the plugin's own


@pytest.fixture(scope="module", params=NATIVE)
def mode(request: pytest.FixtureRequest) -> str:
    """A mode whose slots hold A, B, u and v."""
    return str(request.param)


@pytest.fixture(scope="module")
def llama(models: dict[str, ServedModel]) -> ServedModel:
    """A base with adapters."""
    return models["llama"]


@pytest.fixture(scope="module")
def single(mode: str, llama: ServedModel, started: Any) -> Engine:
    """One slot, and room for one adapter in vLLM's memory too."""
    return started(llama, mode, max_loras=1, max_cpu_loras=1)  # type: ignore[no-any-return]


def asked_in_turn(engine: Engine, *batches: list[Question]) -> list[str]:
    """What is wrong in the answers to batches, one after the other."""
    return [wrong for asked in batches for wrong in wrong_answers(asked, engine.ask(asked))]


def test_one_slot_with_the_base_beside_it(single: Engine, llama: ServedModel) -> None:
    base, adapter = questions_of(llama.base), questions_of(llama.of_method("tl6", "all"))
    assert not asked_in_turn(single, woven(base, adapter), woven(adapter, base), base)


def test_one_slot_for_adapters_in_turn(single: Engine, llama: ServedModel) -> None:
    """A lower rank than the adapter's before, fewer targets, fewer layers, another kind: nothing is left of it."""
    small = llama.served("small", "tl6", rank=2, layers=(3,), targets=("o_proj",), seed=40)
    large, qkv, some = llama.of_method("tl6", "all"), llama.of_method("vera", "qkv"), llama.of_method("tl2", "some")
    in_turn = [large, qkv, some, small, large, small, qkv, llama.vera("vera-all"), small, llama.vera("vera-qv"), small]
    if single.mode == "both":
        plain = [llama.of_method("lora", "all"), llama.exported("tl3", "some", native=False)]
        in_turn += [plain[0], small, plain[1], large, plain[1], qkv, plain[0]]
    wrong = [line for served in in_turn for line in asked_in_turn(single, questions_of(served, llama.base, most=2))]
    assert not wrong


@pytest.fixture(scope="module")
def pair(mode: str, llama: ServedModel, started: Any) -> Engine:
    """Two slots, and room for two adapters; prompts longer than a step are split."""
    return started(llama, mode, max_loras=2, max_cpu_loras=2, max_num_batched_tokens=16)  # type: ignore[no-any-return]


def test_three_adapters_over_two_slots(pair: Engine, llama: ServedModel) -> None:
    """The one that made room comes back, beside the one that stayed."""
    a, b, c = (questions_of(llama.of_method(*of)) for of in (("tl6", "all"), ("tl1", "qkv"), ("vera", "some")))
    base = questions_of(llama.base)
    assert not asked_in_turn(pair, woven(a, b, base), woven(c, base, a), woven(b, c), woven(base, a, b), woven(c, a))


def test_more_adapters_in_one_go_than_slots(pair: Engine, llama: ServedModel) -> None:
    """vLLM puts off what has no slot, and loads it when there is room."""
    adapters = [llama.of_method(method, "all") for method in ("tl1", "tl2", "tl3", "tl4", "tl5", "tl6")]
    asked = questions_of(*adapters, llama.base, most=2)
    assert not wrong_answers(asked, pair.ask(asked, load=False))


def test_an_adapter_in_place_of_another(pair: Engine, llama: ServedModel) -> None:
    """`load_inplace` reads a folder under the number of the adapter that it replaces. A prompt of one token looks to
    vLLM like the step before."""
    kinds = [("tl6", "all"), ("tl4", "some"), *([("lora", "all"), ("vera", "qkv")] if pair.mode == "both" else [])]
    wrong: list[str] = []
    for of in kinds:
        served = Served("changing", llama.of_method(*of).folder, llama.of_method(*of).questions)
        pair.load(served, load_inplace=True)
        for question in questions_of(served):
            wrong += wrong_answers([question], pair.ask([question], load=False))
    assert not wrong


def test_prompts_of_many_with_their_logprobs(mode: str, llama: ServedModel, started: Any) -> None:
    """vLLM wraps the head too where no target modules are named, and then ends with several such requests on a CPU."""
    engine = started(llama, mode, **({"lora_target_modules": None} if mode == "tied" else {}))
    adapters = [llama.of_method(method, part) for method, part in (("tl6", "all"), ("vera", "qkv"), ("tl3", "some"))]
    asked = woven(*(questions_of(served) for served in [*adapters, llama.base]))
    assert not wrong_answers(asked, engine.ask(asked, prompt_logprobs=True))


# What a slot takes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_bytes_of_a_slot(name: str, dtype: str, models: dict[str, ServedModel], started: Any) -> None:
    model, slots = models[name], 3
    engine = started(model, "tied", dtype=dtype, max_loras=slots)
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert engine.on_workers(held_bytes) == [slots * expected_bytes(model, rank=8, width=width)]


# 16 bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_bf16_is_as_exact_as_the_base(mode: str, llama: ServedModel, started: Any) -> None:
    """Log-probabilities of the prompts, against the merged model in fp32: adapters differ by what the base differs by.

    Each error is a draw, so they are compared as root mean squares over all prompts of four adapters.
    """
    engine = started(llama, mode, dtype="bfloat16")
    adapters = [llama.of_method(*of) for of in (("tl6", "all"), ("vera", "qkv"), ("tl3", "some"), ("tl5", "all"))]
    of_base, of_adapters = (errors_of_prompts(engine, served) for served in ([llama.base], adapters))
    print(f"{mode}: rms {of_adapters.square().mean().sqrt():.4f}, base {of_base.square().mean().sqrt():.4f}")
    print(f"{mode}: max {of_adapters.abs().max():.3f}, base {of_base.abs().max():.3f}")
    assert of_adapters.square().mean().sqrt() < 1.5 * of_base.square().mean().sqrt()


def errors_of_prompts(engine: Engine, served: list[Served]) -> torch.Tensor:
    """Differences of the log-probabilities of prompts from fp32, of all questions together."""
    asked = questions_of(*served, most=len(prompts()))
    found, expected = engine.ask(asked, prompt_logprobs=True), [one.questions[index] for one, index in asked]
    pairs = zip(found, expected, strict=True)
    return torch.cat([torch.tensor(one.prompt_logprobs) - torch.tensor(other.prompt_logprobs) for one, other in pairs])
