"""The GPU path on a stand-in for the CUDA driver; see null_gpu/null_gpu_figures.py for how to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreted_kernels
import pytest
from null_gpu_figures import FIGURES, Figure, divides, is_wide
from support.folders import ROOT

from megatron_tiedlora.selfcheck.parts import part_command, part_environment

WIDE = "ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];"


@pytest.mark.nullgpu
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("figure", FIGURES, ids=[figure.name for figure in FIGURES])
def test_a_figure_of_the_gpu_path(figure: Figure) -> None:
    assert "NULL_GPU" in os.environ, "set NULL_GPU to the folder of the stand-in for the CUDA driver"
    assert figure.least <= figure.measure() <= figure.most


# `python -m pytest` after every check of a value was switched off.
BELIEVING = "import sys, pytest, null_gpu_rank as r; r.prepare_environment(); r._believe_all_numbers(); pytest.main()"


@pytest.mark.nullgpu
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", ["host", "memory", "speed", "layers"])
def test_a_part_of_check_gpu(part: str, tmp_path: Path) -> None:
    """Waits, planned and reserved memory, steps of every form, and layers in every format, as check-gpu does."""
    start = [str(Path(os.environ["NULL_GPU"]) / "run"), sys.executable, "-c", BELIEVING]
    around = part_environment(part, "cuda")
    paths = [str(ROOT), str(ROOT / "tests" / "null_gpu"), os.environ.get("PYTHONPATH", "")]
    around.update(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", PYTHONPATH=os.pathsep.join(paths))
    around.pop("DS_ACCELERATOR", None)
    words = [*start, *part_command(part)[4:], "-W", "ignore", f"--basetemp={tmp_path / 'part'}"]
    done = subprocess.run(words, env=around, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize(
    ("ptx", "wide", "divided"),
    [
        (WIDE, True, False),
        ("ld.global.L1::evict_last.v4.b32 { %r1 }, [ %rd1 ];", True, False),
        ("ld.global.b16 { %rs1 }, [ %rd1 ];", False, False),
        ("ld.global.b32 { %rs1 }, [ %rd1 ];\nst.global.v4.b32 [ %rd1 ], { %r1 };", True, False),
        ("ld.global.b16 { %rs1 }, [ %rd1 ];\nst.global.v2.b32 [ %rd1 ], { %r1 };", False, False),
        (f"{WIDE}\nrem.s32 %r3, %r1, %r2;", True, True),
        (f"{WIDE}\ndiv.full.f32 %f3, %f1, %f2;", True, False),
    ],
)
def test_what_counts_as_wide_and_as_a_division(ptx: str, wide: bool, divided: bool) -> None:
    assert (is_wide(ptx), divides(ptx)) == (wide, divided)


@pytest.mark.nullgpu
@pytest.mark.timeout(3000)
def test_kernels_for_gpus_round_as_plain_pytorch(tmp_path: Path) -> None:
    """Inductor's code for a GPU, run by Triton's interpreter: codes and scales are those of the 16-bit numbers."""
    script, paths = str(Path(interpreted_kernels.__file__)), [str(ROOT), os.environ.get("PYTHONPATH", "")]
    around = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    around["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    around.pop("DS_ACCELERATOR", None)
    write = [str(Path(os.environ["NULL_GPU"]) / "run"), sys.executable, script, "write", str(tmp_path)]
    subprocess.run(write, env=around, check=True, capture_output=True, timeout=1500)
    command = [sys.executable, script, "run", str(tmp_path)]
    around["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in found}) >= 4 and all(row["codes"] and row["scales"] for row in found), found
