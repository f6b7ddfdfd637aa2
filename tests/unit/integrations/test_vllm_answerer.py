"""`evaluate --engine vllm` without vLLM: a stand-in for it answers by transformers with attached adapters."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.evaluation_runs import answers_of, assert_same_answers, predictions, results, write_tasks
from support.native_files import with_adapter, write_native
from support.peft_models import greedy_tokens, hf_model, lora_model
from support.run_files import edit_json
from support.task_files import refusal
from support.tiny_models import write_tiny_model

import megatron_tiedlora as tiedlora
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.convert import serving
from megatron_tiedlora.evaluation.answering import read_scored
from megatron_tiedlora.evaluation.generate import RowSettings
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.integrations.vllm.answerer import VllmAnswerer, _extend
from megatron_tiedlora.parallel.shard_spec import stream_seed

END = 5


class StandIn:
    """What the package uses of vLLM's `LLM`. It keeps its options, and the parameters of all requests."""

    started: list[StandIn] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        if options["max_num_seqs"] == 13:
            raise ValueError("max_num_seqs is 13")
        self.options, self.parameters, self.models = options, list[Any](), {0: hf_model(Path(options["model"]))}
        self.variables, self.num_ends, core = dict(os.environ), 0, SimpleNamespace(shutdown=lambda: self.models.clear())
        self.llm_engine = SimpleNamespace(add_lora=self.load, engine_core=core)
        self.started.append(self)

    def load(self, request: Any) -> None:
        adapter = tiedlora.load_adapter(request.path)
        self.models[request.lora_int_id] = tiedlora.attach(hf_model(Path(self.options["model"])), adapter)

    def generate(self, prompts: Any, parameters: Any, *, lora_request: Any, use_tqdm: bool) -> list[Any]:
        self.parameters += parameters
        rows = zip((one["prompt_token_ids"] for one in prompts), parameters, lora_request, strict=True)
        return [self.answer(ids, one, self.models[request.lora_int_id if request else 0]) for ids, one, request in rows]

    def answer(self, ids: list[int], parameters: Any, model: Any) -> Any:
        assert len(ids) + parameters.max_tokens <= self.options["max_model_len"]
        new = greedy_tokens(model, ids, parameters.max_tokens)
        ends = [index for index, token in enumerate(new) if token in getattr(parameters, "stop_token_ids", ())]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1).tolist()
        own = [{token: SimpleNamespace(logprob=row[token])} for token, row in zip(ids[1:], scores, strict=False)]
        self.num_ends += bool(ends)
        last = ends[0] + 1 if ends else None  # vLLM returns the end token too
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=new[:last])], prompt_logprobs=[None, *own])


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    """The started stand-ins. Variables and signal handlers of this process are restored."""
    package, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request"))
    package.__spec__ = ModuleSpec("vllm", None)
    package.LLM, package.SamplingParams = StandIn, SimpleNamespace  # type: ignore[attr-defined]
    request.LoRARequest = lambda _, number, path: SimpleNamespace(lora_int_id=number, path=path)  # type: ignore[attr-defined]
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    StandIn.started.clear()
    yield StandIn.started
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Settings of two tasks with two adapters. A token that answers have is an end token of the model."""
    root, base = tmp_path_factory.mktemp("made"), write_tiny_model(tmp_path_factory.mktemp("base"))
    edit_json(base / "generation_config.json", seals=False, eos_token_id=[2, END])
    for method, targets in (("tl6", ("qkv", "o_proj")), ("lora", ("qkv",))):
        write_native(root / method, base, with_adapter(base, method, targets=targets)[2])
    adapters = tuple(f"{name}={root / name}" for name in ("tl6", "lora"))
    tasks = write_tasks(root)
    return {name: {**task, "model": str(base), "adapters": adapters, "limit": 4} for name, task in tasks.items()}


def alone(given: dict[str, Any], method: str = "tl6") -> dict[str, Any]:
    """The same with one adapter."""
    folder = next(one.partition("=")[2] for one in given["adapters"] if one.startswith(method))
    return {**given, "adapters": None, "adapter": folder}


@pytest.mark.parametrize("task", ["custom", "hellaswag"])
def test_answers_are_those_of_the_decoder(vllm: list[StandIn], given: dict[str, dict[str, Any]], task: str) -> None:
    expected = answers_of(**given[task])
    assert_same_answers(answers_of(VllmAnswerer, **given[task]), expected)
    assert expected["tl6"] != expected["lora"]
    options = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "max_num_seqs": 256, "dtype": "float32"}
    options |= {"lora_target_modules": ["qkv_proj", "o_proj"], "additional_config": {"tied_lora": "both"}}
    options |= {"generation_config": "vllm", "skip_tokenizer_init": False, "seed": 1234, "max_cpu_loras": 2}
    assert options.items() <= vllm[0].options.items() and vllm[0].num_ends and not vllm[0].models
    variables = {"VLLM_PLUGINS": "another,tied_lora", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    assert variables.items() <= vllm[0].variables.items()
    asked = [one for one in vllm[0].parameters if hasattr(one, "stop_token_ids")]
    assert all(one.ignore_eos and not one.detokenize for one in asked)
    assert {one.max_tokens for one in asked} == ({40} if task == "custom" else {16, 8})  # 16, 16 and 8 tokens


def test_the_end_of_an_answer_within_what_vllm_returns() -> None:
    some, new = RowSettings({9}, 5, lambda row: row[-1] == 7), [1]
    assert [_extend(new, tokens, some) for tokens in ([2], [9, 3], [7, 3], [4, 5, 6])] == [False, True, True, True]
    assert new == [1, 2, 7, 4, 5, 6]
    with pytest.raises(RuntimeError, match="vLLM returned no token"):
        _extend([], [], some)


def test_plain_loras_are_described_as_vllm_reads_them(
    vllm: list[StandIn], given: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Not as the native adapter that they equal, which has one A for q, k and v, and is tied if it is of one layer."""
    base, modules = Path(given["custom"]["model"]), ["q_proj", "k_proj", "v_proj"]
    for name, layers in (("all", None), ("one", [1])):
        peft = lora_model(base, r=8, target_modules=modules, layers_to_transform=layers)
        peft.save_pretrained(tmp_path / name)
    named = tuple(f"{name}={tmp_path / name}" for name in ("all", "one"))
    made = EvaluateSettings(**{**given["custom"], "adapters": named, "engine": "vllm", "dtype": "fp32"})
    plans = plan_evaluations(made, rank=0, world_size=1)
    scored = read_scored(plans)
    VllmAnswerer(plans, scored)
    options = {"max_lora_rank": 8, "lora_target_modules": ["qkv_proj"], "additional_config": {}}
    assert options.items() <= vllm[0].options.items()
    long = {name: replace(own, endings=((((5,) * 999),),) * len(own.prompts)) for name, own in scored.items()}
    assert re.search(r"has 1\d\d\d tokens, and the model .*; lower --max_length", refusal(VllmAnswerer, plans, long))


def test_the_parameters_of_samples(vllm: list[StandIn], given: dict[str, dict[str, Any]]) -> None:
    for task, starts in (("custom", [0]), ("hellaswag", [0, 16, 32])):
        answers_of(VllmAnswerer, **alone(given[task]), temperature=0.7, top_p=0.9, top_k=20, seed=5)
        asked = [one for one in vllm[-1].parameters if hasattr(one, "stop_token_ids")]
        assert {(one.temperature, one.top_p, one.top_k) for one in asked} == {(0.7, 0.9, 20)}
        seeds = [{stream_seed(5, f"sampling.{row}.{start}") for row in range(4)} for start in starts]
        found = {one.seed for one in asked}
        assert seeds[0] <= found <= set().union(*seeds) and all(found & own for own in seeds)


def test_the_command(
    vllm: list[StandIn], given: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are those of every evaluation. vLLM's processes do not see the variables of this package's ranks."""
    one = {**alone(given["custom"]), "max_new_tokens": 20, "dtype": "fp32"}
    words = {**one, "engine": "vllm", "output_dir": tmp_path / "out", "tensor_parallel": 2, "temperature": 0.01}
    assert call("evaluate", [f"--{name}={value}" for name, value in words.items() if value is not None]) == 0
    assert ", at most 20 tokens, 256 prompts at once in vLLM\n" in capsys.readouterr().out
    assert [row["prediction"] for row in predictions(tmp_path / "out")] == [a.prediction for a in answers_of(**one)[""]]
    found = results(tmp_path / "out")
    assert found["layout"]["tensor_parallel"] == vllm[0].options["tensor_parallel_size"] == 2
    assert found["signature"].endswith("; sampled at temperature 0.01, seed 1234, by vLLM")
    assert "RANK" not in vllm[0].variables


def test_what_vllm_cannot_do(given: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    one = alone(given["custom"])
    by_vllm = partial(refusal, answers_of, VllmAnswerer, **one)
    assert "with --merge_adapter; merge with tiedlora merge" in by_vllm(merge_adapter=True)
    assert "with --pipeline_parallel; give --tensor_parallel" in by_vllm(pipeline_parallel=2)
    assert "with --base nf4; give --base none" in by_vllm(base="nf4")
    assert by_vllm(batch_size=13) == "--engine vllm: max_num_seqs is 13"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving, "why_no_lora", lambda shape: "it has no LoRA")
        assert by_vllm() == "--engine vllm: it has no LoRA"
    made = EvaluateSettings(engine="vllm", **one)
    assert "2 ranks were started; start one" in refusal(plan_evaluations, made, rank=0, world_size=2)
    shutil.copytree(one["adapter"], tmp_path / "nf4")
    edit_json(tmp_path / "nf4" / "adapter_config.json", base_format="nf4", base_stored="fp32")
    assert "as the adapter's run (nf4); give --base none" in by_vllm(adapter=str(tmp_path / "nf4"))
    write_native(tmp_path / "large", Path(one["model"]), with_adapter(Path(one["model"]), "lora", rank=513)[2])
    assert "rank 513 is greater than --max-lora-rank 512" in by_vllm(adapter=str(tmp_path / "large"))
