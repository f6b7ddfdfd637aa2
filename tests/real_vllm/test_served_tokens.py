"""Every method on every part of every model, and PEFT's VeRA: a real vLLM answers as the merged model does.

One engine for each model and mode holds all its adapters. In the default mode vLLM's own layers compute, which on a CPU
answer base rows with an adapter that is in the batch (vllm#48421), so base rows are mixed in only in the other modes.
"""

from __future__ import annotations

import pytest
from support.served_models import MODELS, Served, ServedModel
from support.vllm_engine import MODES, TOLERANCE, Engine, Question, difference, questions_of, wrong_answers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, models: dict[str, ServedModel]) -> ServedModel:
    """A base with adapters."""
    return models[request.param]


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest, model: ServedModel, started: object) -> Engine:
    """An engine of `model` in a mode."""
    return started(model, request.param)  # type: ignore[operator]


def adapters_of(engine: Engine) -> list[Served]:
    """All adapters that a mode serves: only tied ones in tied slots alone, and a plain LoRA in the others."""
    model = engine.model
    found = [*model.everything(), model.exported("tl6", "all", native=True)]
    plain = [model.exported("tl6", "some", native=False), model.exported("lora", "all", native=False)]
    return [served for served in found if served.tied] if engine.mode == "tied" else [*found, *plain]


def tolerance(engine: Engine) -> float:
    """Twice what the base itself differs by from transformers, if that is more than `TOLERANCE`."""
    asked = questions_of(engine.model.base)
    found = engine.ask(asked, prompt_logprobs=True)
    return max(TOLERANCE, 2 * max(difference(a, s.questions[i]) for a, (s, i) in zip(found, asked, strict=True)))


def mixed(adapters: list[Served], base: Served, *, base_rows: bool) -> list[list[Question]]:
    """Batches of 8 requests: six adapters, each in one of them twice, and two of the base, or six adapters and two
    of these again, in an order in which the rows of none lie together."""
    batches = []
    for start in range(0, len(adapters), 6):
        part = (adapters[start:] + adapters)[:6]
        asked = [(served, list(served.questions)[k % 3]) for k, served in enumerate(part)]
        others = questions_of(base, most=2) if base_rows else questions_of(*part[:2], most=2)[1::2]
        batches.append([others[0], *asked[:3], others[1], *asked[3:]])
    return batches


def test_each_adapter_alone(engine: Engine) -> None:
    limit = tolerance(engine)
    wrong: list[str] = []
    for served in adapters_of(engine):
        asked = questions_of(served)
        wrong += wrong_answers(asked, engine.ask(asked, prompt_logprobs=True), limit)
    assert not wrong


def test_eight_requests_of_many_in_a_batch(engine: Engine) -> None:
    limit = tolerance(engine)
    wrong: list[str] = []
    for asked in mixed(adapters_of(engine), engine.model.base, base_rows=engine.mode != "default"):
        wrong += wrong_answers(asked, engine.ask(asked), limit)
    assert not wrong
