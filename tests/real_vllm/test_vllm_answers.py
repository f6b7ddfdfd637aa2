"""`evaluate --engine vllm` with a real vLLM: answers and log-likelihoods are those of this package's own decoder."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.evaluation_runs import predictions, results
from support.served_models import ServedModel
from support.task_files import write_rows
from support.vllm_engine import ENVIRONMENT, apply_environment, forget_engines

from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.evaluation.answering import OwnAnswerer, answer_all, read_scored
from megatron_tiedlora.evaluation.generate import Decoder
from megatron_tiedlora.evaluation.metrics import Answer
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400)]
TOKENS = 40  # a task with a stop text is answered in several rounds
WORDS = ("abc", "de fg", "hij", "k lm no", "pq", "r", "stu vwx", "yz", "0 1 2", "345")
PROMPTS = [f"{WORDS[i % 10]} {WORDS[(3 * i + 1) % 10] * (1 + i % 3)}?" for i in range(8)]
ENDINGS = ("ab", "c d e f", "ghij klm", "nopqrs")
METHODS = ("lora", "vera", "tl6")
Found = dict[str, list[Answer]]


@pytest.fixture(scope="module")
def adapters(models: dict[str, ServedModel]) -> list[str]:
    """Values of --adapters: a native adapter of each of `METHODS`, and two exports, one with its native files."""
    model = models["llama"]
    folders = {method: model.root / f"answers-{method}" for method in METHODS}
    for seed, (method, folder) in enumerate(folders.items()):
        model.native(folder.name, method, seed=70 + seed)
    for native in (True, False):
        folders[f"export-{native}"] = model.exported("tl6", "some", native=native).folder or model.root
    return [f"{name}={folder}" for name, folder in folders.items()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Settings of a task without a stop text, and of one that also scores choices."""
    folder = tmp_path_factory.mktemp("rows")
    plain: list[dict[str, Any]] = [{"prompt": text, "completion": "x"} for text in PROMPTS]
    choices: list[dict[str, Any]] = [
        {"activity_label": "a", "ctx_a": text, "ctx_b": "", "endings": ENDINGS[: 2 + i % 3], "label": "0"}
        for i, text in enumerate(PROMPTS)
    ]
    return {
        "custom": {"task": "custom", "test_file": write_rows(folder / "plain.jsonl", plain)},
        "hellaswag": {"task": "hellaswag", "test_file": write_rows(folder / "choices.jsonl", choices)},
    }


def settings_of(**values: Any) -> EvaluateSettings:
    return EvaluateSettings(**{"dtype": "fp32", "max_new_tokens": TOKENS, **values})


def by_vllm(**values: Any) -> Found:
    """The answers of a vLLM in this process."""
    apply_environment()
    from megatron_tiedlora.integrations.vllm.answerer import VllmAnswerer

    plans = plan_evaluations(settings_of(engine="vllm", **values), rank=0, world_size=1)
    scored = read_scored(plans)
    try:
        with closing(VllmAnswerer(plans, scored)) as answerer:
            return answer_all(answerer, scored, grid=Grid(0, 1))
    finally:
        forget_engines()


def by_decoder(**values: Any) -> Found:
    """The greedy answers of this package, one adapter after the other."""
    plans, found = plan_evaluations(settings_of(**values), rank=0, world_size=1), Found()
    for name, scored in read_scored(plans).items():
        plan = plans[name]
        stage = load_model(plan.source, plan.adapter, dtype=torch.float32)
        decoder = Decoder(stage, ParallelGroups(), plan.source.shape)
        found[name] = answer_all(OwnAnswerer(decoder), {"": scored}, grid=Grid(0, 1))[""]
    return found


def assert_same(found: Found, expected: Found) -> None:
    assert found.keys() == expected.keys()
    for name, answers in expected.items():
        assert [one.prediction for one in found[name]] == [one.prediction for one in answers], name
        for ours, theirs in zip(found[name], answers, strict=True):
            assert ours.choice_scores == pytest.approx(theirs.choice_scores, abs=1e-3), name


@pytest.mark.parametrize("task", ["custom", "hellaswag"])
def test_several_adapters_answer_as_the_decoder(
    models: dict[str, ServedModel], adapters: list[str], tasks: dict[str, dict[str, str]], task: str
) -> None:
    given = {**tasks[task], "model": str(models["llama"].folder), "adapters": tuple(adapters)}
    expected = by_decoder(**given)
    assert len({answers[0].prediction for answers in expected.values()}) == len(METHODS) + 1  # the exports are equal
    assert_same(by_vllm(**given), expected)
    if task == "hellaswag":
        assert all(len(one.choice_scores) > 1 for answers in expected.values() for one in answers)


def test_the_base_and_one_adapter_alone(
    models: dict[str, ServedModel], adapters: list[str], tasks: dict[str, dict[str, str]]
) -> None:
    folder = adapters[METHODS.index("vera")].partition("=")[2]
    base = {**tasks["hellaswag"], "model": str(models["llama"].folder), "batch_size": 3, "limit": 5}
    found = [by_vllm(**base), by_vllm(**base, adapter=folder)]
    assert [len(one[""]) for one in found] == [5, 5] and found[0] != found[1]
    assert_same(found[0], by_decoder(**base))
    assert_same(found[1], by_decoder(**base, adapter=folder))


def test_samples_depend_on_the_seed_alone(models: dict[str, ServedModel], tasks: dict[str, dict[str, str]]) -> None:
    """Not on the other rows; and two rows with the same prompt get different samples."""
    given = {**tasks["hellaswag"], "model": str(models["llama"].folder), "temperature": 1.5, "max_new_tokens": 20}
    texts = [[one.prediction for one in by_vllm(**given, **more)[""]] for more in ({}, {"limit": 3}, {"seed": 7})]
    assert texts[0][:3] == texts[1] and texts[0] != texts[2]
    assert len({*texts[0]}) == len(PROMPTS)


def test_the_command_with_two_processes_of_vllm(
    models: dict[str, ServedModel], adapters: list[str], tasks: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Started as a user does, outside of a launcher; the files are those of every evaluation."""
    given = {**tasks["hellaswag"], "model": str(models["llama"].folder), "dtype": "fp32"}
    words = [f"--{name}={value}" for name, value in given.items()] + ["--max_new_tokens", str(TOKENS)]
    words += ["--tensor_parallel", "2", "--output_dir", str(tmp_path / "out"), "--adapters", *adapters[:3]]
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    environment |= {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "megatron_tiedlora", "evaluate", "--engine", "vllm", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = by_decoder(**given, adapters=tuple(adapters[:3]))
    for name, answers in expected.items():
        rows, content = predictions(tmp_path / "out" / name), results(tmp_path / "out" / name)
        assert [row["prediction"] for row in rows] == [one.prediction for one in answers]
        assert content["layout"]["tensor_parallel"] == content["ranks"] == 2
        assert content["settings"]["engine"] == "vllm" and content["versions"]["vllm"]
    assert (tmp_path / "out" / "table.csv").is_file() and "decoding   greedy, at most 40" in done.stdout
