"""Models of each family: a real vLLM answers as transformers, the base and adapters in tied slots and in its own."""

from __future__ import annotations

from typing import Any

import pytest
from support.served_models import Served, ServedModel
from support.tiny_models import with_both_signs
from support.vllm_engine import Engine, questions_of, wrong_answers

from megatron_tiedlora.base.messages import UserError

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]

SIZES = {"hidden_size": 64, "head_dim": 32, "num_layers": 4, "intermediate_size": 96}
LOCAL, FULL = "sliding_attention", "full_attention"
# Windows are shorter than the rows. Scores are not capped: vLLM 0.32 computes other scores then on a CPU.
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"family": "gemma", "tied": True},
    "gemma2": {"family": "gemma2", "tied": True, "sliding_window": 16, "query_pre_attn_scalar": 20}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": 20.0},
    "gemma3": {"family": "gemma3_text", "tied": True, "sliding_window": 16, "query_pre_attn_scalar": 20}
    | {"layer_kinds": (LOCAL, LOCAL, FULL)},
    "olmo2": {"family": "olmo2"},
    "olmo3": {"family": "olmo3", "sliding_window": 16, "layer_kinds": (LOCAL, FULL)},
    "granite": {"family": "granite", "embedding_multiplier": 3.1, "residual_multiplier": 0.6}
    | {"attention_multiplier": 0.2, "logits_scaling": 1.7},
    "glm4": {"family": "glm4", "attention_bias": True, "rope": {"partial_rotary_factor": 0.5}},
}
# vLLM has no slots of its own for matrices that are one in a model's files and two in its list of fused modules.
WITHOUT_PLAIN = ("glm4",)


Case = tuple[Engine, list[Served]]  # an engine with both kinds of slots, and what it serves


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, started: Any, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Answers of transformers are computed first: an engine may replace its classes by vLLM's."""
    model = ServedModel(request.param, tmp_path_factory.mktemp(request.param), {**SIZES, **FAMILIES[request.param]})
    if request.param.startswith("gemma"):
        with_both_signs(model.folder)
    served = [model.base, model.of_method("tl6", "qkv"), model.of_method("tl6", "all"), model.of_method("vera", "some")]
    served.append(model.of_method("lora", "all"))
    if request.param not in WITHOUT_PLAIN:
        served.append(model.exported("tl6", "all", native=False))
    return started(model, "both"), served


def test_a_family_s_base_and_adapters_answer_as_in_transformers(case: Case) -> None:
    engine, all_served = case
    wrong: list[str] = []
    for served in all_served:
        if served.tied or engine.model.name not in WITHOUT_PLAIN:
            asked = questions_of(served)
            wrong += wrong_answers(asked, engine.ask(asked, prompt_logprobs=True), 1.2e-4)
    assert not wrong


@pytest.mark.parametrize("case", WITHOUT_PLAIN, indirect=True)
def test_an_adapter_that_would_lose_a_part_is_refused(case: Case) -> None:
    engine, all_served = case
    with pytest.raises(UserError, match="gate_up_proj, for which the server has no slots; serve the merged model"):
        engine.load(next(served for served in all_served if not served.tied))
