"""What a server is not started with, and what it does not load: one error that says what to change."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.served_models import Served, ServedModel
from support.vllm_engine import MODES, questions_of, wrong_answers
from support.vllm_server import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
# Values of `tied_lora`.
WRONG: dict[str, Any] = {"a word": "yes", "a mode's name": "tied", "a number": 1, "a list": [True]}
SHARDED = "--fully-sharded-loras; start the server without one of them"


@pytest.mark.parametrize("case", WRONG)
def test_values_that_are_refused(case: str, models: dict[str, ServedModel], started: Any) -> None:
    value = WRONG[case]
    said = re.escape(f'tied_lora = {value!r} is unknown; give true, false or "both"')
    with pytest.raises(ValueError, match=said):
        started(models["llama"], "tied", additional_config={"tied_lora": value})


@pytest.mark.parametrize("mode", ["tied", "both"])
def test_sharded_loras(mode: str, models: dict[str, ServedModel], started: Any) -> None:
    with pytest.raises(ValueError, match=SHARDED):
        started(models["llama"], mode, fully_sharded_loras=True)


def test_two_streams(models: dict[str, ServedModel], started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself refuses them on a CPU; the plugin's own error is tested where no vLLM is needed."""
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(ValueError, match="Dual CUDA streams are only supported on CUDA"):
        started(models["llama"], "tied")


def test_graphs_for_each_number_of_adapters(models: dict[str, ServedModel]) -> None:
    """vLLM replays one that was recorded for one group of tokens, of an adapter, where the base's are another."""
    from transformers import AutoConfig
    from vllm.config.lora import LoRAConfig

    from megatron_tiedlora.integrations.vllm.manager import TiedLoRAModelManager

    folder = models["llama"].folder
    config = SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder), model=str(folder))
    for value in (True, "both"):
        vllm_config = SimpleNamespace(additional_config={"tied_lora": value}, model_config=config)
        with pytest.raises(ValueError, match=r"the CUDA graphs of --specialize-active-lora; start the server without"):
            TiedLoRAModelManager(
                vllm_config=vllm_config,
                lora_config=LoRAConfig(specialize_active_lora=True),
                device=torch.device("cuda"),
            )


def test_the_server_ends_with_the_error(models: dict[str, ServedModel], tmp_path: Path) -> None:
    """Its exit status is not 0, and its log has the line."""
    log = tmp_path / "log"
    with (
        pytest.raises(AssertionError, match="ended with status 1"),
        Server(models["llama"], "tied", tmp_path, log, "--fully-sharded-loras"),
    ):
        pass
    assert SHARDED in log.read_text()


@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_loaded(mode: str, models: dict[str, ServedModel], started: Any) -> None:
    """A rank above the server's, a linear without slots, another base's shape, and in tied slots what is not tied. The
    engine answers afterwards."""
    llama, qwen3 = models["llama"], models["qwen3"]
    engine = started(llama, mode, lora_target_modules=["q_proj", "k_proj", "v_proj"])
    served = llama.of_method("tl6", "qkv")
    llama.native("rank16", "tl6", rank=16)
    llama.native("o_proj", "tl6", targets=("qkv", "o_proj"))
    qwen3.native("of_qwen3", "tl6")
    wrong = {
        llama.root / "rank16": ["rank16", "rank 16 is greater than --max-lora-rank 8"],
        llama.root / "o_proj": ["o_proj", "has no slots", "--lora-target-modules"],
        qwen3.root / "of_qwen3": ["of_qwen3", "num_layers 4"],
        llama.root / "nothing": ["nothing"],
    }
    if mode == "tied":
        wrong |= {llama.exported("tl6", "qkv", native=False).folder: ["tl6-qkv-plain", "method lora"]}
        wrong |= {llama.of_method("lora", "qkv").folder: ["lora-qkv", "method lora"]}
    for folder, words in wrong.items():
        with pytest.raises(Exception) as raised:
            engine.load(Served(folder.name, folder, {}))
        assert "\n" not in str(raised.value).strip()
        assert not [word for word in words if word not in str(raised.value)], raised.value
        assert not wrong_answers(questions_of(served), engine.ask(questions_of(served)))


def test_an_engine_after_a_refusal(models: dict[str, ServedModel], started: Any) -> None:
    """Every mode starts after all that."""
    for mode in MODES:
        assert started(models["llama"], mode, max_loras=1).mode == mode
