"""The planner against steps on this machine: memory, messages and times (docs/planning_log.md has the figures).

    make test PYTEST_ARGS="-m slow -s" TESTS=tests/slow/test_slow_planner.py

Constants are measured first, with the widths of each model and as many ranks as a step has. Memory is the most
anonymous memory of a rank in a step, over that of an idle rank; glibc's malloc returns blocks of 64 KiB to the system
there, so that it does not keep what is free. The times need a quiet machine with a core for each rank.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from support.folders import ROOT
from support.ranks import ENVIRONMENT, free_port
from support.tiny_models import write_tiny_model

from megatron_tiedlora.planning.machines import read_machine

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3600)]

MODELS = {
    "tiny": ("--random_weights",),
    "SmolLM2": ("--model=demo", "--random_weights"),
    "7B widths": ("--model=llama2-7b", "--num_layers=2"),
}
# Model, ranks, flags; a rank holds 0.5 GB or more.
MEMORY = (
    ("tiny", 1, "--rows=32 --length=512"),
    ("tiny", 4, "--rows=64 --length=512 --tensor_parallel=2"),
    ("tiny", 4, "--rows=32 --length=512 --pipeline_parallel=2 --micro_batches=2 --recompute=selective"),
    ("SmolLM2", 1, "--rows=4 --length=512"),
    ("SmolLM2", 1, "--rows=8 --length=512 --recompute=full"),
    ("SmolLM2", 1, "--rows=4 --length=512 --recompute=selective --base=nf4"),
    ("tiny", 2, "--rows=32 --length=512 --tensor_parallel=2 --sequence_parallel=false --base=int8"),
    ("SmolLM2", 2, "--rows=4 --length=512 --pipeline_parallel=2 --micro_batches=3"),
    ("SmolLM2", 2, "--rows=4 --length=512 --ds_config=zero2.json"),
    ("SmolLM2", 4, "--rows=4 --length=512 --pipeline_parallel=4 --micro_batches=4 --recompute=selective"),
    ("SmolLM2", 3, "--rows=4 --length=512 --tensor_parallel=3"),
    ("7B widths", 1, "--rows=1 --length=1024"),
    ("7B widths", 2, "--rows=1 --length=1024 --tensor_parallel=2 --base=nf4"),
    ("7B widths", 2, "--rows=2 --length=512 --pipeline_parallel=2 --micro_batches=2 --recompute=full"),
    ("7B widths", 2, "--rows=1 --length=512 --ds_config=zero3.json --recompute=selective"),
    ("7B widths", 4, "--rows=1 --length=512 --tensor_parallel=2 --pipeline_parallel=2 --micro_batches=2"),
)
TIMES = (
    ("SmolLM2", 1, "--rows=1 --length=64"),
    ("SmolLM2", 1, "--rows=1 --length=256"),
    ("SmolLM2", 1, "--rows=1 --length=1024"),
    ("SmolLM2", 1, "--rows=4 --length=512"),
    ("SmolLM2", 1, "--rows=2 --length=512 --recompute=selective"),
    ("SmolLM2", 1, "--rows=1 --length=512 --recompute=full"),
    ("SmolLM2", 1, "--rows=2 --length=256 --base=nf4"),
    ("7B widths", 1, "--rows=1 --length=256"),
    ("7B widths", 1, "--rows=1 --length=512 --base=nf4"),
    ("7B widths", 2, "--rows=1 --length=512 --tensor_parallel=2 --sequence_parallel=false"),
    ("SmolLM2", 2, "--rows=1 --length=256 --pipeline_parallel=2 --micro_batches=4"),
    ("SmolLM2", 2, "--rows=2 --length=256 --ds_config=zero1.json"),
    ("SmolLM2", 2, "--rows=1 --length=512 --ds_config=zero3.json"),
    ("7B widths", 2, "--rows=1 --length=256 --tensor_parallel=2"),
    ("7B widths", 2, "--rows=1 --length=256 --pipeline_parallel=2 --micro_batches=2"),
)
TINY = {
    "vocab_size": 320,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_layers": 8,
    "num_heads": 6,
    "num_kv_heads": 2,
    "max_positions": 512,
}
NO_HOARD = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
# Two known misses. Gathered inputs of 2.4 MB live longer than they are used: torch's profiler counted 16 of them at the
# peak, which was 5.3 % over the plan. With ZeRO-3 it was 9.4 % over; that was not traced.
BOUNDS = {"tensor_parallel=3": 0.08, "zero3.json": 0.12}


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The flags that name a model."""
    tiny = write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", **TINY)
    return lambda name: [*MODELS[name], *([f"--model={tiny}"] if name == "tiny" else [])]


@pytest.fixture(scope="module")
def constants_of(
    flags_of: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, float], Path]:
    """The file of constants of a model's widths that so many ranks have measured in so many seconds."""
    folder = tmp_path_factory.mktemp("constants")

    @cache
    def measured(name: str, ranks: int, seconds: float) -> Path:
        file = folder / f"{name.replace(' ', '_')}-{ranks}-{seconds}.json"
        model = [flag for flag in flags_of(name) if flag.startswith("--model=")]
        start("plan.py", *model, f"--measure={file}", f"--measure_seconds={seconds}", ranks=ranks)
        return file

    return measured


def start(tool: str, *flags: str, ranks: int, environment: dict[str, str] | None = None) -> None:
    """A tool under torchrun, in processes of its own, as malloc reads the environment once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command = [*launcher, "--master_port", str(free_port()), str(ROOT / "tools" / tool), *flags]
    variables = {**os.environ, **ENVIRONMENT, **(environment or {})}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


def benched(
    flags: list[str], constants: Path, folder: Path, *, ranks: int, repeats: int, environment: dict[str, str]
) -> dict[str, Any]:
    """The report of tools/bench_step.py on a layout."""
    file = folder / "bench.json"
    flags = ["--what=layout", "--compile=true", f"--repeats={repeats}", *flags, f"--constants={constants}"]
    start("bench_step.py", *flags, f"--json={file}", ranks=ranks, environment=environment)
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def test_memory_and_messages(
    flags_of: Callable[[str], list[str]], constants_of: Callable[[str, int, float], Path], tmp_path: Path
) -> None:
    """Within 5 % on the rank with most, but for two cases; messages and bytes of every rank are exact."""
    rows, misses = ["| model | ranks | flags | planned MB | measured MB | |", "|---|---|---|---|---|---|"], []
    for name, ranks, flags in MEMORY:
        constants = constants_of("tiny", ranks, 1.0)
        idle = read_machine(constants)["context"]
        report = benched(
            [*flags_of(name), *flags.split()], constants, tmp_path, ranks=ranks, repeats=1, environment=NO_HOARD
        )
        planned, measured = (max(one[key] for one in report["ranks"]) - idle for key in ("planned_peak", "peak"))
        words = flags.replace("--", "").replace("=", " ")
        rows.append(f"| {name} | {ranks} | {words} | {planned / 1e6:,.0f} | {measured / 1e6:,.0f} | ")
        rows[-1] += f"{planned / measured - 1:+.1%} |"
        print(f"\n{rows[-1]}", flush=True)
        assert report["as_predicted"], rows[-1]
        bound = next((bound for words, bound in BOUNDS.items() if words in flags), 0.05)
        if abs(planned / measured - 1) > bound:
            misses.append(rows[-1])
    print("\n" + "\n".join(rows))
    assert not misses


def test_times(
    flags_of: Callable[[str], list[str]], constants_of: Callable[[str, int, float], Path], tmp_path: Path
) -> None:
    """Within 20 %, at the median within 10 %; two that differ by more than 25 % are in the right order."""
    rows, found = ["| model | ranks | flags | planned s | measured s | |", "|---|---|---|---|---|---|"], []
    for name, ranks, flags in TIMES:
        constants = constants_of(name, ranks, 30.0)
        report = benched([*flags_of(name), *flags.split()], constants, tmp_path, ranks=ranks, repeats=5, environment={})
        planned, measured = sum(report["planned"]["seconds"].values()), median(report["seconds"])
        words = flags.replace("--", "").replace("=", " ")
        rows.append(f"| {name} | {ranks} | {words} | {planned:.2f} | {measured:.2f} | {planned / measured - 1:+.1%} |")
        spent = {what: round(seconds, 3) for what, seconds in report["planned"]["seconds"].items() if seconds}
        print(f"\n{rows[-1]}\n   {spent}, measured {[round(each, 3) for each in report['seconds']]}", flush=True)
        found.append((planned, measured))
    print("\n" + "\n".join(rows))
    errors = sorted(abs(planned / measured - 1) for planned, measured in found)
    assert errors[-1] <= 0.2 and median(errors) <= 0.1, errors
    for (planned, measured), (other_planned, other) in itertools.combinations(found, 2):
        if max(measured, other) > 1.25 * min(measured, other):
            assert (planned < other_planned) == (measured < other)
