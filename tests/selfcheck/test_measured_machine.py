"""`tiedlora plan --measure`: what is measured, its arithmetic with a clock set by hand, and the file that it writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.folders import ROOT
from support.forked_ranks import run_on_ranks
from support.run_helpers import run_ranks
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.job_settings import parse_plan
from megatron_tiedlora.planning.machines import CONSTANTS, CPU, Machine, read_machine
from megatron_tiedlora.planning.step_time import Seconds
from megatron_tiedlora.selfcheck import machine_constants as measuring
from megatron_tiedlora.selfcheck.machine_constants import measure_machine

DEVICE = torch.device("cpu")
DTYPES = ("bf16", "fp32")
ALONE = {
    *("memory", "context", "block", "step", "peak.fp8", "matmul.fp8", "bandwidth", "elementwise"),
    *(f"{name}.{dtype}" for name in ("peak", "matmul", "attention") for dtype in DTYPES),
    *("dequantise.nf4", "dequantise.int8", "dequantise.fp8", "round.forward", "round.backward"),
}
LINES = {f"{name}.{dtype}" for name in ("weights", "queries") for dtype in DTYPES}  # of which some may be hidden
TOGETHER = {"node_bandwidth", "node_link", "message", "instruction"}
TOOL = ROOT / "tools" / "plan.py"
PLAIN = {"TORCH_COMPILE_DISABLE": "1"}


def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=128, max_positions=1024)


def measured(machine: Machine) -> set[str]:
    return {name for name, constant in machine.constants.items() if constant.source.startswith("measured on")}


def short_measurements() -> None:
    """Fewer steps of each kind."""
    measuring._TINY_REPEATS, measuring._REPEATS = 4, 2


@pytest.mark.distributed
def test_a_measured_file_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process measures what it can alone; the rest keeps its value and says where that is from."""
    file = tmp_path / "constants.json"
    flags = [f"--measure={file}", f"--model={tiny(tmp_path)}", "--measure_seconds=0.15"]
    how = {"script": TOOL, "environment": PLAIN, "prelude": short_measurements}
    (text,) = run_ranks(flags, folder=tmp_path, **how).expect(0).outputs
    machine = read_machine(file)
    assert measured(machine) - LINES == ALONE and set(machine.constants) == set(CONSTANTS)
    kept = set(CONSTANTS) - ALONE - LINES
    assert {name: machine.constants[name] for name in kept} == {name: CPU.constants[name] for name in kept}
    assert 1e8 < machine["context"] < 2e9 and 1e-5 < machine["block"] < 1 and 0 < machine["elementwise"] <= 1
    assert all(name in text for name in CONSTANTS) and f"{file}: constants of CPU" in text
    flags = ["--ranks_on_cpu=2", "--max_length=64", "--global_batch_size=8", "--formats=none"]
    assert call("plan", [f"--constants={file}", "--model=llama2-7b", *flags, "--layers=1", "--top=1"]) in (0, 1)
    assert "2 x CPU, " in capsys.readouterr().out


def measure_here(model: str) -> Machine:
    os.environ.update(PLAIN)
    short_measurements()
    return measure_machine(find_model(model, weights=False), DEVICE, seconds=0.05, tokens=16)


@pytest.mark.distributed
def test_ranks_measure_their_messages(tmp_path: Path) -> None:
    for machine in run_on_ranks(measure_here, str(tiny(tmp_path)), ranks=2, folder=tmp_path / "ranks"):
        assert measured(machine) - LINES == ALONE | TOGETHER
        assert "2 ranks of a host" in machine.constants["node_bandwidth"].source
        assert 1e6 < machine["node_bandwidth"] < 1e12 and 1e-7 < machine["message"] < 1


def test_the_arithmetic_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 ms a pass and 5 ms beside them; two stages take 9 passes each, and 2 ms of DeepSpeed's for each of them."""

    def tiny(machine: Machine, *, num_layers: int, pipeline_parallel: int = 1, **more: int) -> measuring.MeasuredStep:
        planned = Seconds(matmuls=0.001, launches=2 * num_layers * machine["block"], outside=machine["step"])
        if pipeline_parallel == 2:
            return measuring.MeasuredStep(planned.total + 18 * (machine["instruction"] + 0.002), planned)
        return measuring.MeasuredStep(0.001 + 2 * num_layers * 0.003 + 0.005, planned)

    def own(machine: Machine, source: object, *, tokens: int) -> measuring.MeasuredStep:
        assert machine["elementwise"] == 1 and tokens == 16
        return measuring.MeasuredStep(taken, Seconds(matmuls=0.9, elementwise=0.1))

    monkeypatch.setattr(measuring, "_tiny_step", tiny)
    monkeypatch.setattr(measuring, "_own_step", own)
    monkeypatch.setattr(measuring, "idle_bytes", lambda: 12345)
    monkeypatch.setattr(measuring.distributed, "get_world_size", lambda: 2)
    taken = 1.3
    measures = measuring._Measure(find_model("demo", weights=False), DEVICE, 16, 1.0)
    found = measures.beside(measures.alone(CPU))
    assert found["block"] == pytest.approx(0.003) and found["step"] == pytest.approx(0.005)
    assert found["instruction"] == pytest.approx(0.002) and found["context"] == 12345
    assert found["elementwise"] == pytest.approx(0.1 / (0.1 + 0.3))  # of 1.3 s, 0.9 are matmuls
    taken = 0.8
    found = measures.beside(found)
    assert found["elementwise"] == 1 and "nothing was left of" in found.constants["elementwise"].source


def test_the_arithmetic_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 ranks, 1 ms a message and 2 GB/s over a ring: an all-reduce of 4 parts carries 6 of them, a gather 3."""

    def together(self: object, step: Callable[[], object], seconds: float, group: object) -> float:
        found.append(step)
        length = measuring._MESSAGES["cpu"][(len(found) - 1) // 2]
        return 1e-3 + (6 if len(found) % 2 else 3) * length / 2e9

    found: list[object] = []
    monkeypatch.setattr(measuring._Measure, "_time", together)
    one = measuring._Measure(find_model("demo", weights=False), DEVICE, 16, 0.1)
    message, bandwidth = one._links(None, 4, 0.1)
    assert message == pytest.approx(1e-3, rel=0.01) and bandwidth == pytest.approx(2e9, rel=0.01)


def test_the_arithmetic_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes half a second by this clock."""
    monkeypatch.setattr(measuring, "timed", lambda step, device: 0.5)
    monkeypatch.setattr(measuring, "measured_peak", lambda device, dtype: 1e9)
    source = find_model("demo", weights=False)
    shape, one = source.shape, measuring._Measure(source, DEVICE, 16, 1e-6)
    taken = 2 * len(shape.block.linears) * 0.5
    assert one._matmuls(torch.bfloat16, 16, 1e-6) == taken
    assert one._attention(torch.float32, 16, 1e-6) == 0.5
    assert one._copies(1e-6).value == 2 * 2**26 / 0.5
    assert one._dequantised("nf4", 1e-6).value == shape.block.output.num_weights / 0.5
    assert dict(one._fp8(1e-6))["peak.fp8"].value == pytest.approx(4 * 16 * shape.block.num_weights / taken)


def test_the_arithmetic_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read at 2e9 and queries at 1e8 a second beside FLOPs at 3e9 a second; peaks are 6e9."""
    source, peaks = find_model("demo", weights=False), iter([6e9, 2e9])
    weights, width = 2 * source.shape.block.num_weights, source.shape.heads.rows[0]

    def matmuls(self: object, dtype: torch.dtype, tokens: int, seconds: float) -> float:
        return 2 * tokens * weights / 3e9 + weights / 2e9

    def attention(self: object, dtype: torch.dtype, tokens: int, seconds: float) -> float:
        return 6 * tokens**2 * width / 3e9 + 3 * tokens * width / 1e8

    def found() -> dict[str, float]:
        return {name: constant.value for name, constant in one._rates("bf16", 1.0)}

    monkeypatch.setattr(measuring, "measured_peak", lambda device, dtype: next(peaks))
    monkeypatch.setattr(measuring._Measure, "_matmuls", matmuls)
    monkeypatch.setattr(measuring._Measure, "_attention", attention)
    one = measuring._Measure(source, DEVICE, 512, 1.0)
    expected = {"matmul.bf16": 0.5, "weights.bf16": 2e9, "attention.bf16": 0.5, "queries.bf16": 1e8}
    assert found() == pytest.approx({"peak.bf16": 6e9, **expected})
    noisy = found()
    assert 2.9e9 < noisy["peak.bf16"] < 3e9, "square matmuls that took too long are not the peak"
    assert noisy["matmul.bf16"] == 1 and noisy["weights.bf16"] == 0, "at the peak no time is left to read"
    assert noisy["attention.bf16"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--measure=c.json", "--gpu=h100"], "--measure measures this machine and plans nothing; remove --gpu"),
        (["--measure=c.json", "--ranks_on_cpu=2"], "remove --ranks_on_cpu"),
        (["--measure=c.json", "--why=t1p1d1-b1-zero0"], "remove --why"),
        (["--measure=c.json", "--json=p.json"], "remove --json"),
        (["--measure=c.json", "--max_length=99"], "plans nothing; remove --max_length"),
        (["--measure=c.json", "--recompute=full"], "remove --recompute"),
        (["--measure=c.json", "--train_file=rows.jsonl"], "remove --train_file"),
        (["--measure_seconds=3"], "--measure_seconds needs --measure"),
        (["--measure=c.json", "--measure_seconds=0"], "--measure_seconds 0"),
        (["--measure="], "--measure: the path is empty"),
        (["--json="], "--json: the path is empty"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_plan(["--model=demo", *flags])


def test_a_file_that_cannot_be_written_is_found_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in ((tmp_path / "file" / "c.json", "file is a file; give a folder"), (tmp_path, "is a folder")):
        with pytest.raises(UserError, match=rf"^--measure .*{words}"):
            call("plan", ["--model=demo", f"--measure={path}"])


def test_a_file_of_settings_names_the_model_to_measure(tmp_path: Path) -> None:
    """It may hold a run's other settings, which are not for a measurement."""
    file = tmp_path / "run.yaml"
    for data in ("train_file: rows.jsonl", "task: squad"):
        file.write_text(f"model: demo\n{data}\nmax_length: 99\n")
        assert parse_plan([f"--config={file}", "--measure=c.json"]).train.model == "demo"
