"""What a server is not started with: one error that says what to change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.served_models import ServedModel
from support.vllm_engine import MODES
from support.vllm_server import Server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]
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


def test_the_server_ends_with_the_error(models: dict[str, ServedModel], tmp_path: Path) -> None:
    """Its exit status is not 0, and its log has the line."""
    log = tmp_path / "log"
    with (
        pytest.raises(AssertionError, match="ended with status 1"),
        Server(models["llama"], "tied", tmp_path, log, "--fully-sharded-loras"),
    ):
        pass
    assert SHARDED in log.read_text()


def test_an_engine_after_a_refusal(models: dict[str, ServedModel], started: Any) -> None:
    """Every mode starts after all that."""
    for mode in MODES:
        assert started(models["llama"], mode, max_loras=1).mode == mode
