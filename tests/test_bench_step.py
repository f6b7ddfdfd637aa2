"""tools/bench_step.py: both sides see the same samples, figures are there, and bad input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import write_uneven_data
from run_helpers import ENVIRONMENT
from tiny_models import write_tiny_model

from megatron_tiedlora.config.errors import UserError
from tools import bench_contestants, bench_step

TOOL = Path(__file__).resolve().parents[1] / "tools" / "bench_step.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and its training rows."""
    folder = tmp_path_factory.mktemp("bench")
    write_tiny_model(folder / "model")
    write_uneven_data(folder / "train.jsonl")
    return folder


def options(folder: Path, *more: str) -> Namespace:
    """The command's options, resolved."""
    found: Namespace = bench_step.parser().parse_known_names([f"--model={folder / 'model'}", "--dtype=fp32", *more])
    bench_step._resolve(found)
    return found


def test_both_sides_train_on_the_same_tokens(folder: Path) -> None:
    """Packed or padded, the losses of the first step are equal: adapters start at zero on both sides."""
    real = (f"--train_file={folder / 'train.jsonl'}", "--task=custom", "--samples=16", "--length=128")
    for more in ((), real):
        sides = bench_contestants.contestants(options(folder, "--against=peft", *more))
        made = {name: make() for name, make in sides.items()}
        assert len(made) == (3 if more else 2)
        assert len({(side.num_tokens, side.num_supervised) for side in made.values()}) == 1
        losses = [sum(float(forward().detach()) for forward in side.forwards) for side in made.values()]
        assert max(losses) - min(losses) <= 1e-5 * max(losses)
        for side in made.values():
            before = [parameter.detach().clone() for parameter in side.trained]
            side.step()
            assert any(not torch.equal(old, new) for old, new in zip(before, side.trained, strict=True))
    padding = {name: side.num_positions / side.num_tokens for name, side in made.items()}
    ours, padded, packed = padding.values()
    assert ours == packed < padded


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_a_step_keeps_is_the_formula_of_its_recompute(
    folder: Path, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what is there once: the table of rotations, 32 bytes a position, and 16 a label for its places."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    from tools import bench_layout

    chosen = options(folder, f"--recompute={recompute}", "--length=256")
    side = bench_contestants.contestants(chosen)["megatron_tiedlora"]()
    formula = bench_layout.saved_formula(bench_layout.make_plan(chosen, rank=0, world_size=1), side.batches)
    beside = bench_contestants.saved_bytes(side) - formula
    assert beside == 16 * side.num_supervised + (0 if recompute == "full" else 32 * side.num_positions)


def test_the_command_writes_its_figures(folder: Path, tmp_path: Path) -> None:
    arguments = [f"--model={folder / 'model'}", "--against=peft", "--rows=2", "--length=64", "--repeats=1"]
    command = [sys.executable, str(TOOL), *arguments, f"--json={tmp_path / 'bench.json'}"]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "against PEFT LoRA: speed " in done.stdout
    report: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    ours, theirs = report["sides"]["megatron_tiedlora"], report["sides"]["PEFT LoRA"]
    assert ours["tokens"] == theirs["tokens"] == 128 and ours["supervised"] == 64
    assert 0 < ours["saved"] < theirs["saved"] and len(ours["seconds"]) == 1
    assert ours["model_flops"] > 0 and report["matmul_flops_per_second"] > 0
    assert ours["saved_ratio"] == ours["saved"] / ours["saved_formula"] == pytest.approx(1.0, abs=0.1)
    assert "saved_formula" not in theirs and "of the formula's" in done.stdout
    assert {"torch", "deepspeed", "peft"} <= set(report["versions"]) and report["allocator"] in done.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rows=0",), "--rows 0 is less than 1"),
        (("--supervised=0",), "--supervised 0.0: give a share"),
        (("--supervised=0.5", "--task=gsm8k"), "not with --task"),
        (("--samples=8",), "--samples 8 goes with --task"),
        (("--padded_rows=8",), "--padded_rows 8 goes with"),
        (("--num_layers=2",), "--num_layers 2 goes with a preset"),
        (("--task=gsm8k", "--samples=10"), "--samples 10 does not divide by --rows 4"),
    ],
)
def test_bad_input_is_one_line(folder: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        options(folder, *more)
    assert message in str(error.value) and "\n" not in str(error.value)
