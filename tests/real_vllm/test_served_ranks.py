"""Two tensor-parallel ranks, each in a process of its own: every method and VeRA, and each rank's bytes."""

from __future__ import annotations

from typing import Any

import pytest
from support.served_models import METHODS, ServedModel
from support.vllm_engine import MODES, Engine, expected_bytes, held_bytes, questions_of, woven, wrong_answers

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400), pytest.mark.distributed]


@pytest.fixture(scope="module", params=MODES)
def engine(request: pytest.FixtureRequest, models: dict[str, ServedModel], started: Any) -> Engine:
    """Two ranks, each with one of the two key-value heads."""
    return started(models["llama"], request.param, tensor_parallel_size=2)  # type: ignore[no-any-return]


def test_every_method_on_two_ranks(engine: Engine) -> None:
    model, wrong = engine.model, list[str]()
    parts = [*(model.of_method(method, "all") for method in METHODS), model.of_method("tl6", "some")]
    for served in [*parts, model.vera("vera-all"), model.vera("vera-qv")]:
        if served.tied or engine.mode != "tied":
            wrong += wrong_answers(asked := questions_of(served), engine.ask(asked, prompt_logprobs=True))
    assert not wrong


def test_a_batch_on_two_ranks(engine: Engine) -> None:
    model = engine.model
    adapters = [model.of_method(*of) for of in (("tl6", "all"), ("vera", "qkv"), ("tl3", "some"))]
    others = [model.vera("vera-qv")] if engine.mode == "default" else [model.base]
    asked = woven(*map(questions_of, [*adapters, *others]))
    assert not wrong_answers(asked, engine.ask(asked))


def test_bytes_of_a_slot_on_each_rank(engine: Engine) -> None:
    if engine.mode != "tied":
        pytest.skip("the other modes have slots of vLLM's own")
    assert engine.on_workers(held_bytes) == [8 * expected_bytes(engine.model, rank=8, width=4, ranks=2)] * 2
