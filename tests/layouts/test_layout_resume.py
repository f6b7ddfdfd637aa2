"""Checkpoints know no layout: what one grid has written any other goes on with, and one grid's files are another's."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cases import marked
from support.engine_runs import Layout, relative_distance
from support.run_files import assert_same_run, files_of, metrics, status
from support.run_helpers import Base, run, write_base
from support.run_preludes import kill_at_step

pytestmark = pytest.mark.distributed

STEPS, SAVED = 6, 3
# Two orders of summation drift apart by 2e-7 (loss), 9e-7 (norm) and 2.4e-6 (adapter) in 20 steps of AdamW.
CURVE_TOLERANCE = 1e-5
TENSOR_TOLERANCE = 5e-5


@dataclass(frozen=True)
class Grid(Layout):
    """A layout with a ZeRO stage."""

    zero: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of a run on it."""
        return {
            **super().settings,
            "ranks": self.ranks,
            "ds_config": f"zero{self.zero}.json",
            "global_batch_size": 8,
            "max_steps": STEPS,
            "eval_interval": SAVED,
            "targets": "all",
            "learning_rate": 1e-3,
            "rate_factors": "B=2,v=0.5",
        }


WRITER = Grid(2, 2, 1, zero=1)
ALONE = Grid(1, 1, 1, zero=0)
READERS = [Grid(1, 4, 1, zero=1), Grid(1, 1, 2, zero=0), Grid(4, 1, 1, zero=0), Grid(1, 1, 1, zero=1)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A model that four ranks can share, whose layers divide by neither 2 nor 4 stages."""
    return write_base(tmp_path_factory.mktemp("base"), num_layers=5, num_heads=8, num_kv_heads=4, head_dim=6)


@pytest.fixture(scope="module")
def runs(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run of all steps at (2, 2, 1), and the same one stopped, and saved, after three."""
    folder = tmp_path_factory.mktemp("runs")
    run(base, folder / "whole", **WRITER.settings)
    run(base, folder / "stopped", **WRITER.settings, prelude=partial(kill_at_step, SAVED), expect=143)
    assert (status(folder / "stopped")["state"], status(folder / "stopped")["step"]) == ("stopped", SAVED)
    return folder / "whole", folder / "stopped"


def resumed(base: Base, stopped: Path, folder: Path, grid: Grid, *, prelude: Any = None) -> Path:
    """A copy of the stopped run that has gone on to its end on another grid."""
    shutil.copytree(stopped, folder)
    run(base, folder, **grid.settings, resume="auto", prelude=prelude)
    return folder


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor in a checkpoint's files."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= {f"{file.name}:{name}": tensor for name, tensor in load_file(file).items()}
    return found


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """The same files with the same names in them, and tensors that are equal up to orders of summation."""
    assert set(files_of(found)) == set(files_of(expected))
    ours, theirs = tensors(found), tensors(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name
        assert relative_distance(ours[name], tensor) <= TENSOR_TOLERANCE, name
    for file in found.glob("*.json"):
        contents = [json.loads((folder / file.name).read_text()) for folder in (found, expected)]
        assert list(contents[0]) == list(contents[1]), file.name


@pytest.mark.cpu_seconds(15, reason="its fixtures make the runs that all share")
def test_the_same_layout_goes_on_bit_for_bit(base: Base, runs: tuple[Path, Path], tmp_path: Path) -> None:
    whole, stopped = runs
    assert_same_run(resumed(base, stopped, tmp_path / "run", WRITER), whole)


@pytest.mark.parametrize("grid", marked(READERS, [READERS[0], READERS[3]]))
def test_another_layout_goes_on(base: Base, runs: tuple[Path, Path], tmp_path: Path, grid: Grid) -> None:
    """The next three losses and norms are those of the run that went through; so are the adapter and its moments."""
    whole, stopped = runs
    assert_went_on(resumed(base, stopped, tmp_path / "run", grid), whole)


def assert_went_on(folder: Path, whole: Path) -> None:
    """A run that was resumed at another layout is `whole`, up to orders of summation."""
    rows, expected = metrics(folder), metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate"):
        found = [row[key] for row in rows[SAVED:]]
        assert found == pytest.approx([row[key] for row in expected[SAVED:]], rel=CURVE_TOLERANCE), key
    losses, whole_losses = ([row["loss"] for row in metrics(run, "validation")] for run in (folder, whole))
    assert losses == pytest.approx(whole_losses, rel=CURVE_TOLERANCE)
    assert_same_checkpoint(folder / "checkpoints" / f"step_{STEPS}", whole / "checkpoints" / f"step_{STEPS}")


def test_files_are_those_of_one_process(base: Base, runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Three steps at (2, 2, 1) and on one rank leave the same files: full A, B, u and v, with both their moments.

    And so what one rank has begun four go on with.
    """
    whole, stopped = runs
    run(base, tmp_path / "alone", **ALONE.settings, prelude=partial(kill_at_step, SAVED), expect=143)
    ours, alone = (folder / "checkpoints" / f"step_{SAVED}" for folder in (stopped, tmp_path / "alone"))
    assert_same_checkpoint(ours, alone)
    prefixes = {"": (32, 6 * (8 + 4 + 4)), "o_proj.": (6 * 8, 32), "gate_up.": (32, 2 * 48), "down_proj.": (48, 32)}
    shapes = {}
    for prefix, (d, o) in prefixes.items():
        full = {"A": (3, d), "B": (o, 3), "u": (5, 3), "v": (5, o)}
        for factor, start in product(full, ("", "exp_avg.adapter.", "exp_avg_sq.adapter.")):
            shapes[f"{start}{prefix}{factor}"] = full[factor]
    assert {name.partition(":")[2]: tensor.shape for name, tensor in tensors(ours).items()} == shapes
    assert_went_on(resumed(base, tmp_path / "alone", tmp_path / "more", WRITER), whole)
