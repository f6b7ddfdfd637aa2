"""tiedlora bench --what serving, with a stand-in of vLLM: draws, slots, the loop of the steps and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
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
        self.most, self.loaded, self.used = 0, list[Any](), list[Any]()
        self.active: list[int] = []
        self.active_first: list[int] = []  # when the first request came
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

    def add_lora(self, request: Any) -> bool:
        self.loaded.append(request)
        return self.activate_adapter(request.lora_int_id)

    def add_request(self, name: str, prompt: dict[str, list[int]], sampling: Any, *, lora_request: Any) -> None:
        assert name not in self.running
        self.running[name] = [], (prompt["prompt_token_ids"], sampling), lora_request
        self.most = max(self.most, len(self.running))
        self.active_first = self.active_first or self.active
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

    def here(name: str, measure: Callable[..., Any], *given: Any) -> Any:
        return measure(*given)

    module("vllm", LLM=StandIn, SamplingParams=SimpleNamespace)
    module("vllm.lora")
    module("vllm.lora.request", LoRARequest=request)
    monkeypatch.setattr(serving_bench.timing, "in_own_process", here)
    for name in serving_bench._ENVIRONMENT:
        monkeypatch.setenv(name, "given")
    StandIn.made = []
    yield StandIn.made


def engine_of(tmp_path: Path, **options: Any) -> tuple[serving_bench.MeasuredEngine, StandIn]:
    """An engine with at most 3 requests at a time."""
    settings = settings_of("--batch_size=3", "--new_tokens=4", "--in_batch=0", "--served=5", "--slots=2")
    engine = serving_bench.MeasuredEngine(options, tmp_path, settings)
    return engine, StandIn.made[-1]


def settings_of(*words: str) -> BenchSettings:
    return parse_settings(["--what=serving", *words], BenchSettings)


# Parts ---------------------------------------------------------------------------------------------------------------


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
    """A request starts when another ends. Prompts differ, and the base needs no adapter."""
    engine, llm = engine_of(tmp_path)
    times = engine.serve([0] * 7)
    assert llm.most == 3 and not llm.running and set(llm.used) == {None}
    assert [len(own) for own in times] == [1 + 4] * 7 and all(own == sorted(own) for own in times)
    assert len({tuple(prompt) for prompt in engine.prompts}) == len(engine.prompts) == 12


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
    figures = engine.measure([0] * 3)
    first, after = ([figures[f"{token}_p{of}_ms"] for of in (50, 99)] for token in ("first", "next"))
    assert first == [10_000.0, 10_000.0] and after == [1000.0, 1000.0]
    assert (figures["seconds"], figures["cpu_seconds"], figures["tokens"]) == (13.0, 26.0, 12)


def test_percentiles(vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpolated; first tokens apart from the next ones, which a request of one token does not have."""
    engine, _ = engine_of(tmp_path)
    monkeypatch.setattr(engine, "serve", lambda adapters: [[0.0, size / 1000] for size in range(101)][::-1])
    figures = engine.measure([0])
    assert (figures["first_p50_ms"], figures["first_p99_ms"]) == (50.0, 99.0) and "next_p50_ms" not in figures


def test_misses_are_counted(vllm: list[StandIn], tmp_path: Path) -> None:
    """With two slots, a third adapter takes the place of the one that was used least recently."""
    engine, llm = engine_of(tmp_path, enable_lora=True, max_loras=2)
    assert engine.measure([1, 2, 1])["misses"] == 2
    assert engine.measure([1, 2, 1])["misses"] == 0
    assert engine.measure([3])["misses"] == 1 and llm.active == [1, 3]
    assert llm.used[-2:] == [1, 3]


def test_all_adapters_are_loaded(vllm: list[StandIn], tmp_path: Path) -> None:
    """A load has no tokens. It includes the memory that the process takes."""
    engine, llm = engine_of(tmp_path, enable_lora=True, max_loras=2)
    held: list[Any] = []
    add = llm.add_lora

    def taken(request: Any) -> bool:
        held.append(torch.ones(2_500_000))
        return add(request)

    llm.add_lora = taken  # type: ignore[method-assign]
    figures = engine.measure(None)
    assert [request.lora_path for request in llm.loaded] == [str(tmp_path / str(number)) for number in (5, 4, 3, 2, 1)]
    assert figures["seconds"] > 0 and figures["tokens"] == 0 and figures["misses"] == 5 and figures["slots"] == 2
    assert figures["host_mb"] == 0 or 45 < figures["host_mb"] < 60
    assert figures["slot_bytes"] == 4 * (2 * 3 * 6 + 9)
    tied, _ = engine_of(tmp_path, enable_lora=True, max_loras=2, additional_config={})
    assert tied.measure(None)["slot_bytes"] == 4 * (6 + 2 * 5), "a tensor that layers share counts once"


def test_a_side_that_fails_is_one_line(vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its start, at a load, and in a step."""
    wrong = tmp_path, settings_of("--served=64")
    with pytest.raises(UserError, match=r"native: vLLM cannot serve this model \(TypeError: .*; give another --model"):
        serving_bench.measure_side("native", {"max_loras": "two"}, *wrong, {})

    def failed(*_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    for name, adapters in (("add_lora", None), ("step", [0])):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=r"^merged: .*\(RuntimeError: out of memory\);"),
        ):
            patch.setattr(StandIn, name, failed)
            serving_bench.measure_side("merged", {"enable_lora": True}, *wrong, {"row": [adapters]})


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--in_batch=0,65", "--in_batch 0,65: give numbers from 0 to 64, the least of --batch_size and --served"),
        ("--in_batch=-1", "--in_batch -1: give numbers from 0 to 64, the least of --batch_size and --served"),
        ("--served=20", "--in_batch 0,1,8,64: give numbers from 0 to 20, the least of --batch_size and --served"),
        ("--slots=0", "--slots 0: input should be greater than or equal to 1"),
        ("--base=nf4", "--base nf4 is not implemented with --what serving; remove it"),
        ("--rows=2", "--rows 2 needs --what step or layout or scaling, not serving"),
        ("--what=step --served=2", "--served 2 needs --what serving, not step"),
        ("--what=decoding --length=9", "--length 9 needs --what step or layout or scaling or serving, not decoding"),
        ("--model=tiny --length=505", "--length + --new_tokens 513: tiny"),
        (
            "--model=tiny --method=lora",
            "--method lora: its layers do not share A and B, so it has no tied slots;",
        ),
        ("--model=llama2-7b --rank=513", "--rank 513: vLLM serves ranks up to 512; give a lower rank"),
        ("--model=demo --num_layers=2", "--num_layers 2 needs random weights; add --random_weights"),
    ],
)
def test_wrong_values_are_one_line(words: str, said: str, vllm: list[StandIn]) -> None:
    with pytest.raises(UserError) as error:
        call("bench", ["--what=serving", *words.split()])
    assert str(error.value).startswith(said) and not vllm


def test_vllm_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--what serving needs vLLM 0.26 or later, .* pip install 'vllm"):
        call("bench", ["--what=serving", "--model=tiny", "--in_batch=0", "--served=1", "--slots=1"])


def test_the_command_measures_all_parts(
    vllm: list[StandIn], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tied sides serve the same adapters, each in its own files. Engines are started for each part."""
    write = serving_bench._write_adapters

    def written(source: Any, config: Any, folder: Path, settings: BenchSettings) -> None:
        write(source, config, folder, settings)
        natives = [load_native_adapter(folder / "native" / str(number)) for number in range(1, 7)]
        assert all(len({float(own.state[name].sum()) for own in natives}) == 6 for name in "ABv")
        for number, adapter in enumerate(natives, start=1):
            assert all(bool(value.any()) for value in adapter.state.values())
            tensors, export = peft_tensors(source, adapter, rank=8), folder / "expanded" / str(number)
            assert read_config(export)["peft_type"] == "LORA" and not (export / "native").exists()
            stored = load_file(export / "adapter_model.safetensors")
            assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in stored)

    monkeypatch.setattr(serving_bench, "_write_adapters", written)
    words = "--model=tiny --dtype=fp32 --served=6 --in_batch=0,1,4 --batch_size=4 --slots=2 --repeats=2"
    assert call("bench", ["--what=serving", *words.split(), f"--json={tmp_path / 'bench.json'}"]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    one, other = [1, 1, 1], [4, 4, 4, 4]
    last = [144 * 2 // 64, 2, 144 * 2 // 180, 1]
    assert [llm.options["max_loras"] for llm in vllm] == [*one, *one, *other, *other, *last, *last[::-1]]
    tied, plain, no_flag = vllm[:3]
    assert tied.options["additional_config"] == {"tied_lora": True}
    assert tied.options["lora_target_modules"] == plain.options["lora_target_modules"] == ["q_proj", "k_proj", "v_proj"]
    assert not {"additional_config", "lora_target_modules"} & no_flag.options.keys()
    assert vllm[9].options.keys() == {*plain.options} - {
        "enable_lora",
        "max_lora_rank",
        "max_cpu_loras",
        "lora_target_modules",
    }
    for llm, side in zip(vllm[:6], ("native", "expanded", "expanded", "expanded", "expanded", "native"), strict=True):
        assert {Path(request.lora_path).parent.name for request in llm.loaded} == {side} and len(llm.loaded) == 6
    assert [len(set(vllm[index].used)) for index in (6, 7, 8, 9)] == [5, 5, 5, 1]  # the base, and 4 adapters
    memory, batches, zipf = report["parts"]
    assert list(memory) == ["native", "expanded", "expanded, no flag"] and {*batches, *zipf} == {*memory, "merged"}
    assert [turn["load of all"]["slot_bytes"] for turn in memory["expanded, no flag"]] == [180, 180]
    for turn in (turn for turns in batches.values() for turn in turns):
        assert list(turn) == [f"adapters at once: {number}" for number in (0, 1, 4)]
        assert all(own["tokens"] == 4 * 8 and own["misses"] == 0 for own in turn.values())
    drawn = {side: [turn["Zipf's law, equal bytes"] for turn in turns] for side, turns in zipf.items()}
    assert all(own["tokens"] == 4 * 4 * 8 for turns in drawn.values() for own in turns)
    native, expanded, no_flag = (drawn[side][0]["misses"] for side in memory)
    assert 0 < native < expanded <= no_flag and drawn["merged"][0]["misses"] == 0
    heads = [line.split("  ")[0] for line in printed.splitlines() if " least " in line]
    assert heads == [
        "load of all",
        "adapters at once: 0",
        "adapters at once: 1",
        "adapters at once: 4",
        "Zipf's law, equal bytes",
    ]


def test_draws_follow_zipfs_law(vllm: list[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter has 1 / rank of the first one's draws, within five standard deviations, on all sides the same."""
    monkeypatch.setattr(serving_bench, "_write_adapters", lambda *_: None)
    words = "--model=tiny --served=20 --in_batch=0 --batch_size=1000 --length=2 --new_tokens=1 --slots=2 --repeats=1"
    assert call("bench", ["--what=serving", *words.split(), f"--json={tmp_path / 'bench.json'}"]) == 0
    native, expanded, _, merged = (llm.used[-4000:] for llm in vllm[-4:])
    assert native == expanded and set(merged) == {None}
    assert all(len(llm.used) == 8000 and llm.used[:4000] != native for llm in vllm[-4:]), "the first draws do not count"
    assert all(llm.active_first == list(range(len(llm.active), 0, -1)) for llm in vllm[-4:-1]), "the slots hold them"
    seen = np.bincount(native, minlength=21)[1:]
    expected = 4000 / np.arange(1, 21) / sum(1 / rank for rank in range(1, 21))
    assert len(seen) == 20 and (abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_rows_by_hand() -> None:
    """Times are medians over the turns, in the order of the sides."""
    turns = [
        {"seconds": seconds, "cpu_seconds": cpu, "tokens": 100, "slots": 16, "misses": misses, "first_p50_ms": first}
        for seconds, cpu, misses, first in ((2.0, 3.0, 7, 100.0), (1.0, 2.0, 5, 300.0), (4.0, 9.0, 9, 200.0))
    ]
    loaded = {"seconds": 1.0, "cpu_seconds": 1.5, "tokens": 0, "slot_bytes": 1290240, "host_mb": 1290.123}
    about = {"model": "m", "method": "tl6", "targets": ("qkv",), "rank": 8, "dtype": "fp32", "device": "CPU"}
    about |= {"threads": 2, "allocator": "default malloc", "torch": "2", "versions": {"vllm": "0.32.0"}}
    about |= {"batch_size": 64, "length": 20, "new_tokens": 8, "served": 1000, "load": [1.0, 2.0]}
    lines = report_lines(
        {
            **about,
            "engines": {"every side": {"dtype": "float32"}, "native": {"enable_lora": True}, "merged": {}},
            "parts": [
                {"native": [{"load": loaded}]},
                {side: [{"8": turn} for turn in turns] for side in ("native", "merged")},
            ],
        }
    )
    assert lines[:6] == [
        "m, tl6 r 8 of qkv, fp32 on CPU; 1,000 adapters; 64 requests at once: 20 + 8 tokens",
        "threads a process: 2, default malloc, torch 2, vllm 0.32.0, load 1.0 to 2.0",
        "every side: {'dtype': 'float32'}",
        "native: {'enable_lora': True}",
        "merged: {}",
        "",
    ]
    words = [" ".join(line.split()) for line in lines[6:]]
    assert words == [
        "load seconds least most tokens/s cpu seconds slot bytes host mb",
        "native 1.000 1.000 1.000 0.0 1.50 1,290,240 1,290.12",
        "",
        "8 seconds least most tokens/s cpu seconds slots misses first p50 ms",
        "native 2.000 1.000 4.000 50.0 3.00 16 7 200.00",
        "merged 2.000 1.000 4.000 50.0 3.00 16 7 200.00",
    ]
