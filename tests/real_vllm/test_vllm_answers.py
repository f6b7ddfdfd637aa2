"""`evaluate --engine vllm` with a real vLLM: answers and log-likelihoods are those of this package's own decoder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.evaluation_runs import PROMPTS, answers_of, assert_same_answers, predictions, results, write_tasks
from support.served_models import ServedModel
from support.vllm_engine import ENVIRONMENT, apply_environment, forget_engines

from megatron_tiedlora.evaluation.metrics import Answer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
METHODS = ("lora", "vera", "tl6")


@pytest.fixture(scope="module")
def adapters(models: dict[str, ServedModel]) -> dict[str, Path | None]:
    """A native adapter of each of `METHODS`, and two exports, one with its native files."""
    model = models["llama"]
    for seed, method in enumerate(METHODS):
        model.native(f"answers-{method}", method, seed=70 + seed)
    folders = {f"export-{native}": model.exported("tl6", "some", native=native).folder for native in (True, False)}
    return {**{method: model.root / f"answers-{method}" for method in METHODS}, **folders}


@pytest.fixture(scope="module")
def tasks(models: dict[str, ServedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Settings of two tasks on the base."""
    tasks, base = write_tasks(tmp_path_factory.mktemp("rows")), str(models["llama"].folder)
    return {name: {**task, "model": base} for name, task in tasks.items()}


def by_vllm(**settings: Any) -> dict[str, list[Answer]]:
    """The answers of a vLLM in this process."""
    apply_environment()
    from megatron_tiedlora.integrations.vllm.answerer import VllmAnswerer

    try:
        return answers_of(VllmAnswerer, **settings)
    finally:
        forget_engines()


@pytest.mark.parametrize("task", ["custom", "hellaswag"])
def test_several_adapters(adapters: dict[str, Path | None], tasks: dict[str, dict[str, Any]], task: str) -> None:
    given = {**tasks[task], "adapters": tuple(f"{name}={folder}" for name, folder in adapters.items())}
    expected = answers_of(**given)
    assert len({answers[0].prediction for answers in expected.values()}) == len(METHODS) + 1  # the exports are equal
    assert_same_answers(by_vllm(**given), expected)


def test_the_base_and_one_adapter_alone(adapters: dict[str, Path | None], tasks: dict[str, dict[str, Any]]) -> None:
    base = {**tasks["hellaswag"], "batch_size": 3, "limit": 5}
    for given in (base, {**base, "adapter": str(adapters["vera"])}):
        assert_same_answers(by_vllm(**given), answers_of(**given))


def test_samples_depend_on_the_seed_and_the_row(tasks: dict[str, dict[str, Any]]) -> None:
    given = {**tasks["hellaswag"], "temperature": 1.5, "max_new_tokens": 20}
    texts = [[one.prediction for one in by_vllm(**given, **more)[""]] for more in ({}, {"limit": 3}, {"seed": 7})]
    assert texts[0][:3] == texts[1] and texts[0] != texts[2] and len({*texts[0]}) == len(PROMPTS)


def test_the_command_with_two_processes_of_vllm(
    adapters: dict[str, Path | None], tasks: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Started as a user does, outside of a launcher; the files are those of every evaluation."""
    given, named = {**tasks["hellaswag"], "dtype": "fp32"}, [f"{name}={adapters[name]}" for name in METHODS]
    words = [f"--{name}={value}" for name, value in {**given, "max_new_tokens": 40, "tensor_parallel": 2}.items()]
    command = [sys.executable, "-m", "megatron_tiedlora", "evaluate", "--engine", "vllm", *words]
    command += ["--output_dir", str(tmp_path / "out"), "--adapters", *named]
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, answers in answers_of(**given, adapters=tuple(named)).items():
        content, found = results(tmp_path / "out" / name), predictions(tmp_path / "out" / name)
        assert [row["prediction"] for row in found] == [one.prediction for one in answers]
        assert content["layout"]["tensor_parallel"] == content["ranks"] == 2 and content["versions"]["vllm"]
