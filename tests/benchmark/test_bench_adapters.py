"""tools/bench_step.py --adapters: both sides take the same steps, figures are there, and bad input is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.benchmark.compare import IN_TURN, ONE, TOGETHER, Side, make_sides
from megatron_tiedlora.benchmark.layout import plan_benchmark
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.config.cli import parse_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "model")


def words(model: Path, *more: str) -> list[str]:
    sizes = ["--dtype=bf16", "--rows=2", "--length=16", "--compile=false", "--repeats=1"]
    return [f"--model={model}", *sizes, *more]


def sides_of(model: Path, *more: str) -> dict[str, Side]:
    settings = parse_settings(words(model, *more), BenchSettings)
    return {name: make() for name, make in make_sides(plan_benchmark(settings), settings).items()}


def tensors_of(side: Side) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in side.model.bank.named_parameters()}


def tensors_after(side: Side) -> dict[str, torch.Tensor]:
    for _ in range(2):
        side.step()
    return tensors_of(side)


@pytest.mark.parametrize(("more", "micro_batches"), [((), 1), (("--shared_tokens=80",), 2)])
def test_both_sides_take_the_same_steps(model: Path, more: tuple[str, ...], micro_batches: int) -> None:
    """So that their times are those of the same work: every tensor of every adapter has the same bits afterwards."""
    alone, together = (sides_of(model, "--adapters=3", *more) for _ in range(2))
    assert len(together[TOGETHER].batches) == len(together[ONE].batches) == micro_batches
    assert len(alone[IN_TURN].batches) == 3
    before = {name: tensor.clone() for name, tensor in tensors_of(alone[IN_TURN]).items()}
    expected, found = tensors_after(alone[IN_TURN]), tensors_after(together[TOGETHER])
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    changed = {name.split(".")[0] for name, tensor in expected.items() if not torch.equal(tensor, before[name])}
    assert changed == {"adapter 0", "adapter 1", "adapter 2"}


def test_the_third_side_has_as_many_tokens_of_one_adapter(model: Path) -> None:
    side = sides_of(model, "--adapters=3")[ONE]
    assert [batch.tokens.shape for batch in side.batches] == [(6, 16)]
    before = {name: tensor.clone() for name, tensor in tensors_of(side).items()}
    after = tensors_after(side)
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"adapter 0"}


def test_the_command_writes_its_figures(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert call("bench", words(model, "--adapters=2", f"--json={file}")) == 0
    printed = capsys.readouterr().out
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["tokens"] == 2 * 2 * 16 and report["micro_batches"] == 1
    assert list(report["sides"]) == [IN_TURN, TOGETHER, ONE]
    assert all(len(side["seconds"]) == 1 and side["peak"] != 0 for side in report["sides"].values())
    middle = {name: side["seconds"][0] for name, side in report["sides"].items()}
    assert report["ratio"] == middle[IN_TURN] / middle[TOGETHER]
    assert f"together against in turn {report['ratio']:.2f}" in printed
    assert "2 x 16 tokens an adapter and step; together in 1 micro-batch\n" in printed and "load " in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--adapters=0",), "--adapters 0: input should be greater than or equal to 1"),
        (("--adapters=2", "--against=peft"), "--adapters 2 is not implemented with --against; leave one out"),
        (("--adapters=2", "--task=gsm8k"), "--adapters 2 is not implemented with --task; leave one out"),
        (("--shared_tokens=64",), "--shared_tokens 64 goes with --adapters"),
        (("--adapters=2", "--shared_tokens=31"), "--shared_tokens 31 is less than the micro-batch of one adapter"),
        (("--adapters=2", "--what=scaling"), "--adapters 2 goes with --what step, not scaling"),
        (("--adapters=2", "--tensor_parallel=2"), "--adapters 2 goes with --what step, not layout"),
    ],
)
def test_bad_input_is_one_line(model: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_settings(words(model, *more), BenchSettings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_several_ranks_are_rejected(model: Path) -> None:
    settings = parse_settings(words(model, "--adapters=2"), BenchSettings)
    with pytest.raises(UserError, match=r"^--adapters 2 is for one process, so not for 2 ranks"):
        settings.measured_on(2)
