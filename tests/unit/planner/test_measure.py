"""`tiedlora plan --measure`: what is measured, its arithmetic with a clock set by hand, and the file that it writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_ranks import run_on_ranks

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.commands import plan as command
from megatron_tiedlora.config.plan_settings import parse_plan
from megatron_tiedlora.planner import measure
from megatron_tiedlora.planner.measure import measure_machine
from megatron_tiedlora.planning.cards import CPU
from megatron_tiedlora.planning.machines import CONSTANTS, Machine, read_machine

DEVICE = torch.device("cpu")
ALONE = {
    *("memory", "context", "peak.bf16", "peak.fp32", "peak.fp8", "matmul.bf16", "matmul.fp32", "matmul.fp8"),
    *("attention.bf16", "attention.fp32", "bandwidth", "elementwise"),
    *("dequantise.nf4", "dequantise.int8", "dequantise.fp8"),
}
TOGETHER = {"node_bandwidth", "node_link", "message"}


def measured(machine: Machine) -> set[str]:
    return {name for name, constant in machine.constants.items() if constant.source.startswith("measured on")}


def test_a_measured_file_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One process measures what it can alone; the rest keeps its value and says where that is from."""
    file = tmp_path / "constants.json"
    assert command.main([f"--measure={file}", "--model=demo", "--measure_seconds=0.05"]) == 0
    text = capsys.readouterr().out
    machine = read_machine(file)
    assert measured(machine) == ALONE and set(machine.constants) == set(CONSTANTS)
    assert {name: machine.constants[name] for name in machine.constants if name not in ALONE} == {
        name: CPU.constants[name] for name in CPU.constants if name not in ALONE
    }
    assert all(name in text for name in CONSTANTS) and f"{file}: constants of CPU" in text
    flags = ["--ranks_on_cpu=2", "--max_length=64", "--global_batch_size=8", "--formats=none"]
    assert command.main([f"--constants={file}", "--model=llama2-7b", *flags, "--layers=1", "--top=1"]) in (0, 1)
    assert "2 x CPU, " in capsys.readouterr().out


def measure_here(path: str) -> Machine:
    return measure_machine(find_model("demo", weights=False), DEVICE, seconds=0.05, tokens=16)


def test_ranks_measure_their_messages(tmp_path: Path) -> None:
    for machine in run_on_ranks(measure_here, "", ranks=2, folder=tmp_path):
        assert measured(machine) == ALONE | TOGETHER
        assert "2 ranks of a host" in machine.constants["node_bandwidth"].source
        assert 1e6 < machine["node_bandwidth"] < 1e12 and 1e-7 < machine["message"] < 1


def test_the_arithmetic_of_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 ranks, 1 ms a message and 2 GB/s over a ring: an all-reduce of 4 parts carries 6 of them, a gather 3."""

    def together(self: object, step: Callable[[], object], group: object, seconds: float) -> float:
        found.append(step)
        length = measure._MESSAGES["cpu"][(len(found) - 1) // 2]
        return 1e-3 + (6 if len(found) % 2 else 3) * length / 2e9

    found: list[object] = []
    monkeypatch.setattr(measure._Measure, "_together", together)
    one = measure._Measure(find_model("demo", weights=False), DEVICE, 16, 0.1)
    message, bandwidth = one._links(None, 4, 0.1)
    assert message == pytest.approx(1e-3, rel=0.01) and bandwidth == pytest.approx(2e9, rel=0.01)


def test_the_arithmetic_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes half a second by this clock."""
    monkeypatch.setattr(measure, "timed", lambda step, device: 0.5)
    monkeypatch.setattr(measure, "measured_peak", lambda device, dtype: 1e9)
    found = measure_machine(find_model("demo", weights=False), DEVICE, seconds=1e-6, tokens=16)
    shape = find_model("demo", weights=False).shape
    linears = shape.block.linears
    flops = sum(2 * 2 * 16 * linear.num_weights for linear in linears)
    assert found["matmul.bf16"] == pytest.approx(flops / (2 * len(linears) * 0.5) / 1e9)
    assert found["attention.fp32"] == pytest.approx(3 * 2 * 16**2 * shape.heads.rows[0] / 0.5 / 1e9)
    assert found["bandwidth"] == 2 * 2**26 / 0.5
    assert found["dequantise.nf4"] == shape.block.output.num_weights / 0.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--measure=c.json", "--gpu=h100"], "--measure measures this machine and plans nothing; remove --gpu"),
        (["--measure=c.json", "--ranks_on_cpu=2"], "remove --ranks_on_cpu"),
        (["--measure=c.json", "--why=t1p1d1-b1-zero0"], "remove --why"),
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
            command.main(["--model=demo", f"--measure={path}"])
