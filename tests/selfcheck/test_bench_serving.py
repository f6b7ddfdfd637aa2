"""tiedlora bench --what serving, with a stand-in of vLLM: draws, slots, the loop of the steps and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from megatron_tiedlora.base import installation
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.convert.export_peft import peft_tensors
from megatron_tiedlora.convert.open_adapter import read_peft_config as read_config
from megatron_tiedlora.selfcheck import serving_bench, timing
from megatron_tiedlora.selfcheck.bench_report import report_lines

VOCAB = 320


class StandIn:
    """An LLM of vLLM's with as much as the bench uses. Each running request gets one token a step; a token depends on
    the prompt and the adapter's number. Its slots are used in the order of vLLM: the least recently used one goes."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.llm_engine, self.model_config = options, self, self
        self.running: dict[str, tuple[list[int], Any, Any]] = {}
        self.most, self.loaded, self.removed, self.used = 0, list[Any](), 0, list[Any]()
        self.active: list[int] = []
        a = torch.zeros(options.get("max_loras", 1), 1, 2, 3)
        tied = "additional_config" in options
        u = torch.zeros(2, len(a), 5)
        layers = [
            SimpleNamespace(lora_a_stacked=(), lora_b_stacked=(), slots=(a, u[layer]))
            if tied
            else SimpleNamespace(lora_a_stacked=(a.clone(),), lora_b_stacked=(a.clone(), a.clone()))
            for layer in range(2)
        ]
        if not tied and "lora_target_modules" not in options:
            layers.append(SimpleNamespace(lora_a_stacked=torch.zeros(len(a), 9)))  # the head's is no tuple
        self.modules, self.lora_slots = dict(enumerate(layers)), len(a)
        StandIn.made.append(self)

    def get_vocab_size(self) -> int:
        return VOCAB

    def collective_rpc(self, ask: Callable[[Any], Any]) -> list[Any]:
        runner = SimpleNamespace(lora_manager=SimpleNamespace(_adapter_manager=self))
        return [ask(SimpleNamespace(model_runner=runner))]

    def activate_adapter(self, adapter: int) -> bool:
        is_new = adapter not in self.active
        self.active = [*(one for one in self.active if one != adapter), adapter][-self.lora_slots :]
        return is_new

    def remove_lora(self, adapter: int) -> bool:
        self.removed += 1
        return True

    def add_lora(self, request: Any) -> bool:
        self.loaded.append(request)
        return True

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any, *, lora_request: Any) -> None:
        assert name not in self.running
        self.running[name] = [], (prompt["prompt_token_ids"], sampling), lora_request
        self.most = max(self.most, len(self.running))
        self.used.append(lora_request and lora_request.lora_int_id)

    def step(self) -> list[Any]:
        outputs = []
        for name, (tokens, (prompt, sampling), request) in list(self.running.items()):
            if request is not None:
                self.activate_adapter(request.lora_int_id)
            tokens.append(prompt[0] + (0 if request is None else request.lora_int_id))
            finished = len(tokens) == sampling.max_tokens
            if finished:
                del self.running[name]
            output = SimpleNamespace(token_ids=tokens)
            outputs.append(SimpleNamespace(request_id=name, finished=finished, outputs=[output]))
        return outputs


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    """The engines that are started, in this process."""

    def module(name: str, **values: Any) -> None:
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        made.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, made)

    def request(name: str, number: int, path: str) -> SimpleNamespace:
        return SimpleNamespace(lora_name=name, lora_int_id=number, lora_path=path)

    @contextmanager
    def here(name: str, *, smaller: str) -> Iterator[Callable[..., Any]]:
        own: list[Any] = []

        def called(measure: Callable[..., Any], *given: Any) -> Any:
            monkeypatch.setattr(serving_bench, "_engine", own)
            return measure(*given)

        yield called

    module("vllm", LLM=StandIn, SamplingParams=SimpleNamespace)
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=request)
    monkeypatch.setattr(serving_bench.timing, "own_process", here)
    for name in serving_bench._ENVIRONMENT:
        monkeypatch.setenv(name, "given")
    StandIn.made = []
    yield StandIn.made


def engine_of(tmp_path: Path, **options: Any) -> tuple[serving_bench.MeasuredEngine, StandIn]:
    """An engine with at most 3 requests at a time, which has answered one."""
    settings = settings_of("--batch_size=3", "--new_tokens=4", "--in_batch=0", "--served=5", "--slots=2")
    engine = serving_bench.MeasuredEngine(options, tmp_path, settings)
    return engine, engine.llm


def settings_of(*words: str) -> BenchSettings:
    return parse_settings(["--what=serving", *words], BenchSettings)


# Parts ---------------------------------------------------------------------------------------------------------------


def test_draws_follow_zipfs_law() -> None:
    """Of 200,000 draws each adapter has 1 / rank of the first one's, within five standard deviations."""
    count, number = 200_000, 1000
    drawn = serving_bench.zipf_draw(count, number, seed=0)
    assert drawn == serving_bench.zipf_draw(count, number, seed=0) != serving_bench.zipf_draw(count, number, seed=1)
    seen = np.bincount(drawn, minlength=number)
    assert len(seen) == number
    expected = count / np.arange(1, number + 1) / sum(1 / rank for rank in range(1, number + 1))
    assert (abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_sides_have_slots_of_equal_bytes() -> None:
    sizes = {"native": 85_056, "expanded": 1_290_240}
    assert serving_bench.equal_slots(16, sizes, most=1000) == {"native": 16 * 1_290_240 // 85_056, "expanded": 16}
    assert serving_bench.equal_slots(16, sizes, most=100) == {"native": 100, "expanded": 16}
    assert serving_bench.equal_slots(1, {"native": 9, "expanded": 4}, most=5) == {"native": 1, "expanded": 1}


def test_percentiles() -> None:
    assert serving_bench.percentiles([*range(101)][::-1]) == [50.0, 99.0]
    assert serving_bench.percentiles([]) == []


def test_sides_take_turns_in_both_orders() -> None:
    """Figures of any kind; the first turn is not counted."""
    called: list[str] = []

    def figures(name: str) -> tuple[str, int]:
        called.append(name)
        return name, len(called)

    timers = {name: lambda name=name: figures(name) for name in "ab"}
    assert timing.take_turns(timers, repeats=2, shows=False) == {"a": [("a", 4), ("a", 5)], "b": [("b", 3), ("b", 6)]}
    assert "".join(called) == "abbaab"


def test_the_engine_runs_few_requests_at_once(vllm: list[StandIn], tmp_path: Path) -> None:
    """A request starts when another ends; times are of its own tokens, and no adapter is needed for the base."""
    engine, llm = engine_of(tmp_path)
    figures = engine.serve([None] * 7)
    assert llm.most == 3 and not llm.running
    assert [len(row) for row in figures["rows"]] == [4] * 7
    prompts = [row[0] for row in figures["rows"]]
    assert len(set(prompts)) > 1 and engine.serve([None] * 7)["rows"] == figures["rows"]
    assert figures["misses"] == 0 and 0 < figures["first"][0] <= figures["first"][1]
    assert figures["seconds"] > figures["first"][1] > 0 and len(figures["next"]) == 2 and figures["cpu_seconds"] >= 0


def test_times_are_of_tokens(vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that a step moves by one second, and a first step by ten: all three requests wait for it."""
    engine, llm = engine_of(tmp_path)
    now, steps = 100.0, llm.step

    def step() -> list[Any]:
        nonlocal now
        now += 10.0 if not any(tokens for tokens, *_ in llm.running.values()) else 1.0
        return steps()

    monkeypatch.setattr(llm, "step", step)
    monkeypatch.setattr(serving_bench.time, "perf_counter", lambda: now)
    monkeypatch.setattr(serving_bench.time, "process_time", lambda: 2 * now)
    figures = engine.serve([None] * 3)
    assert figures["first"] == [10.0, 10.0] and figures["next"] == [1.0, 1.0]
    assert (figures["seconds"], figures["cpu_seconds"]) == (13.0, 26.0)


def test_misses_are_counted(vllm: list[StandIn], tmp_path: Path) -> None:
    """With two slots, a third adapter takes the place of the one that was used least recently."""
    engine, llm = engine_of(tmp_path, enable_lora=True, max_loras=2)
    assert engine.serve([0, 1, 0])["misses"] == 2
    assert engine.serve([0, 1, 0])["misses"] == 0
    figures = engine.serve([2])
    assert figures["misses"] == 1 and llm.active == [1, 3]
    base = engine.serve([None])["rows"][0]
    assert figures["rows"][0] == [token + 3 for token in base]


def test_each_draw_is_another_one(vllm: list[StandIn], tmp_path: Path) -> None:
    """All adapters are loaded before the first draw; every engine draws the same ones. Without LoRA, none is drawn."""
    (tmp_path / "0").mkdir()
    used = []
    for options in ({"enable_lora": True, "max_loras": 2}, {"enable_lora": True, "max_loras": 4}, {}):
        engine, llm = engine_of(tmp_path, **options)
        for turn in (1, 2):
            engine.draw()
            assert len(llm.loaded) == (5 if options else 0)
            used.append(llm.used[-256:])
            assert len(llm.used) == 1 + 256 * turn  # the first one is the trial
    assert used[0] == used[2] != used[1] == used[3] and set(used[0]) == {1, 2, 3, 4, 5}
    assert used[4] == used[5] == [None] * 256


def test_all_adapters_are_loaded_again(vllm: list[StandIn], tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "file").write_bytes(b"123")
    engine, llm = engine_of(tmp_path, enable_lora=True, max_loras=2)
    figures = engine.load()
    assert [request.lora_path for request in llm.loaded] == [str(tmp_path / str(index)) for index in range(5)]
    assert llm.removed == 5 and figures["disk"] == 3 and figures["seconds"] > 0
    assert figures["slot"] == 4 * (2 * 3 * 6 + 9)
    tied, _ = engine_of(tmp_path, enable_lora=True, max_loras=2, additional_config={})
    assert tied.load()["slot"] == 4 * (6 + 2 * 5), "a tensor that layers share counts once"


def test_an_engine_that_does_not_start_is_one_line(vllm: list[StandIn], tmp_path: Path) -> None:
    wrong = tmp_path, settings_of("--served=64")
    with pytest.raises(UserError, match=r"native: vLLM cannot serve this model \(TypeError: .*; give another --model"):
        serving_bench.start_engine("native", {"max_loras": "two"}, *wrong)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--in_batch=0,65", "--in_batch 0,65: give numbers from 0 to 64, the least of --batch_size and --served"),
        ("--in_batch=-1", "--in_batch -1: give numbers from 0 to 64, the least of --batch_size and --served"),
        ("--served=20", "--in_batch 0,1,8,64: give numbers from 0 to 20, the least of --batch_size and --served"),
        ("--in_batch=", "--in_batch : give numbers from 0 to 64, the least of --batch_size and --served"),
        ("--slots=1001", "--slots 1001 is more than the adapters, --served 1000; reduce it"),
        ("--base=nf4", "--base nf4 is not implemented with --what serving; remove it"),
        ("--rows=2", "--rows 2 needs --what step or layout or scaling, not serving"),
        ("--what=step --draws=2", "--draws 2 needs --what serving, not step"),
        ("--what=decoding --length=9", "--length 9 needs --what step or layout or scaling or serving, not decoding"),
        ("--model=tiny --length=505", "--length + --new_tokens 513: tiny"),
        ("--model=tiny --method=lora", "--method lora: layers do not share A and B, so it has no tied slots; give tl6"),
        ("--model=tiny --rank=513", "--rank 513: vLLM serves ranks up to 512; give a lower rank"),
        ("--model=demo --num_layers=2", "--num_layers 2 needs random weights; add --random_weights"),
    ],
)
def test_wrong_values_are_one_line(words: str, said: str, vllm: list[StandIn]) -> None:
    with pytest.raises(UserError) as error:
        call("bench", ["--what=serving", *words.split()])
    assert str(error.value).startswith(said) and not vllm


def test_vllm_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--what serving needs vLLM 0.26 or later, .* pip install vllm"):
        call("bench", ["--what=serving", "--model=tiny", "--in_batch=0", "--served=1", "--slots=1"])


def test_the_command_measures_all_parts(
    vllm: list[StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tied sides serve the same adapters, each in its own files. Engines are started for each part."""
    write = serving_bench._write_adapters

    def written(source: Any, config: Any, folder: Path, settings: BenchSettings) -> None:
        write(source, config, folder, settings)
        natives = [load_native_adapter(folder / "native" / str(number)) for number in range(6)]
        assert all(len({float(own.state[name].sum()) for own in natives}) == 6 for name in "ABv")
        for number, adapter in enumerate(natives):
            assert all(bool(value.any()) for value in adapter.state.values())
            tensors, export = peft_tensors(source, adapter, rank=8), folder / "expanded" / str(number)
            assert read_config(export)["peft_type"] == "LORA" and not (export / "native").exists()
            stored = load_file(export / "adapter_model.safetensors")
            assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in stored)

    monkeypatch.setattr(serving_bench, "_write_adapters", written)
    words = "--model=tiny --dtype=fp32 --served=6 --in_batch=0,1,4 --batch_size=4 --slots=2 --draws=12 --repeats=2"
    assert call("bench", ["--what=serving", *words.split(), f"--json={tmp_path / 'bench.json'}"]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    slots = [llm.options.get("max_loras") for llm in vllm]
    assert slots == [1, 1, 1, 4, 4, None, 144 * 2 // 64, 2, None]
    tied, plain, no_flag = vllm[:3]
    assert tied.options["additional_config"] == {"tied_lora": True}
    assert tied.options["lora_target_modules"] == plain.options["lora_target_modules"] == ["q_proj", "k_proj", "v_proj"]
    assert not {"additional_config", "lora_target_modules"} & no_flag.options.keys()
    for llm, side in zip(vllm[:3], ("native", "expanded", "expanded"), strict=True):
        assert {Path(request.lora_path).parent.name for request in llm.loaded} == {side} and len(llm.loaded) == 12
    both = [f"{number}, {side}" for number in (0, 1, 4) for side in ("native", "expanded")]
    assert list(report["batches"]) == [*both[:2], "0, merged", *both[2:]]
    assert [len(set(vllm[index].used)) for index in (3, 4, 5)] == [5, 5, 1]  # the base, and 4 adapters
    assert list(report["zipf"]) == ["native", "expanded", "merged"]
    assert [own["tokens"] for own in report["zipf"].values()] == [12 * 8] * 3
    native, expanded = (sum(report["zipf"][side]["misses"]) for side in ("native", "expanded"))
    assert 0 < native < expanded and report["zipf"]["merged"]["misses"] == [0, 0]
    assert report["equal_tokens"] == 1.0 and report["memory"]["expanded, no flag"]["slot"] == [180, 180]
    heads = [line.split()[0] for line in printed.splitlines() if " least " in line]
    assert heads == ["adapters", "seconds", "seconds"]


def test_rows_by_hand() -> None:
    """Times are medians over the turns; a side without slots has none in its row."""
    served = {"seconds": [2.0, 1.0, 4.0], "cpu_seconds": [3.0, 2.0, 9.0], "tokens": 100, "misses": [7, 5, 9]}
    served |= {"first": [[0.1, 0.2], [0.3, 0.4], [0.2, 0.9]], "next": [[0.01, 0.02]] * 3}
    loaded = {"seconds": [1.0], "cpu_seconds": [1.5], "slot": [1290240], "host": [1.29e9], "disk": [2.77e6]}
    about = {"model": "m", "method": "tl6", "targets": ("qkv",), "rank": 8, "dtype": "fp32", "device": "CPU"}
    about |= {"threads": 2, "allocator": "default malloc", "torch": "2", "versions": {"vllm": "0.32.0"}}
    about |= {"batch_size": 64, "length": 20, "new_tokens": 8, "served": 1000, "draws": 256, "load": [1.0, 2.0]}
    lines = report_lines(
        {
            **about,
            "equal_tokens": 0.5,
            "engines": {"every side": {"dtype": "float32"}, "native": {"enable_lora": True}, "merged": {}},
            "batches": {"8, native": served},
            "zipf": {"native": {"slots": 16, **served}, "merged": {"slots": None, **served}},
            "memory": {"expanded": loaded, "native": {**loaded, "host": [None]}},
        }
    )
    assert lines[:5] == [
        "m, tl6 r 8 of qkv, fp32 on CPU; load 1.0 to 2.0",
        "threads a process: 2, default malloc, torch 2, vllm 0.32.0",
        "every side: dtype float32",
        "native: enable_lora True",
        "merged: nothing more",
    ]
    assert lines[6].startswith("64 requests of 20 tokens at once, 8 new tokens each (50.0% of native")
    times = "2.000 1.000 4.000 50.0 3.000 200.0 ms 400.0 ms 10.0 ms 20.0 ms"
    heads = "seconds least most tokens/s CPU s first p50 first p99 next p50 next p99"
    assert " ".join(lines[7].split()) == f"adapters {heads}"
    assert " ".join(lines[8].split()) == f"8, native {times}"
    assert lines[10] == "256 requests by Zipf's law from 1,000 adapters; slots of equal bytes"
    assert " ".join(lines[12].split()) == f"native {times} 16 7" and " ".join(lines[13].split()) == f"merged {times} 7"
    assert " ".join(lines[17].split()) == "expanded 1.000 1.000 1.000 1.500 1,290,240 1290.0 2.8"
    assert " ".join(lines[18].split()) == "native 1.000 1.000 1.000 1.500 1,290,240 2.8"
