"""Merges at LLaMA-2-70B's layer shapes: memory, bits, and times beside `cp` (docs/performance_log.md has the figures).

    make test PYTEST_ARGS="-m slow -s" TESTS=tests/slow/test_slow_merges.py

The models are random. They and their merges take 24 GB of the disk that holds pytest's folder (--basetemp chooses it).
The times mean something on a quiet machine only.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest
import torch
from safetensors import safe_open
from support.wide_models import measured_merge, write_wide_adapter, write_wide_model

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.base_weights import weight_map
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.sources import find_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

MODELS = {  # layers, and the size of a file
    "2 layers, one a file": (2, 2_400_000_000),
    "2 layers, two a file": (2, 4_600_000_000),
    "4 layers, one a file": (4, 2_400_000_000),
    "4 layers, two a file": (4, 4_600_000_000),
}
TARGETS = {"qkv": ("qkv",), "all": TARGET_NAMES}
DTYPES = {None: torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STARTS = 15.0  # seconds that are allowed for imports and what is done once


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with model/, and adapters of it, qkv/ and all/."""
    root = tmp_path_factory.mktemp("wide")
    layers, file_bytes = MODELS[request.param]
    write_wide_model(root / "model", file_bytes=file_bytes, num_hidden_layers=layers)
    for name, targets in TARGETS.items():
        write_wide_adapter(root / name, root / "model", targets)
    yield root
    shutil.rmtree(root)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", TARGETS)
def test_memory_and_bits(folder: Path, targets: str, dtype: str | None, request: pytest.FixtureRequest) -> None:
    output = folder / "merged"
    took = measured_merge(folder / targets, output, *words(dtype))
    name = request.node.callspec.params["folder"]
    print(f"\n{name}, {targets}, {dtype}: {took.anonymous_bytes / 1e6:.0f} MB, {took.cpu_seconds:.1f} s of CPU time")
    try:
        check_bits(folder, output, targets, DTYPES[dtype])
    finally:
        shutil.rmtree(output)
    assert took.anonymous_bytes < 300e6


def words(dtype: str | None) -> list[str]:
    return [] if dtype is None else [f"--dtype={dtype}"]


def check_bits(folder: Path, output: Path, targets: str, dtype: torch.dtype) -> None:
    """Every tensor is the base's, or W in fp32 plus the update, cast once."""
    source, adapter = find_model(str(folder / "model")), load_native_adapter(folder / targets)
    updates = {
        name: (a, b)
        for rule, a, rows in adapter.updates(source.shape)
        for name, b in rule.by_stored_tensor(rows).items()
    }
    found, stored = weight_map(output), weight_map(folder / "model")
    assert {name: file.name for name, file in found.items()} == {name: file.name for name, file in stored.items()}
    assert len(updates) == source.shape.num_layers * (3 if targets == "qkv" else 7)
    for name, file in found.items():
        with safe_open(file, "pt") as reader, safe_open(stored[name], "pt") as base:
            merged, weight = reader.get_slice(name), base.get_slice(name)
            for start in range(0, weight.get_shape()[0], 1024):
                rows = slice(start, start + 1024)
                wanted = weight[rows]
                if name in updates:
                    a, b = updates[name]
                    wanted = wanted.float() + b[rows] @ a
                assert torch.equal(merged[rows], wanted.to(dtype)), (name, start)


@pytest.mark.parametrize("folder", ["4 layers, one a file"], indirect=True)
def test_times(folder: Path) -> None:
    def copied() -> float:
        (folder / "copy").mkdir()
        started = time.monotonic()
        subprocess.run(["cp", *map(str, (folder / "model").iterdir()), str(folder / "copy")], check=True)
        seconds = time.monotonic() - started
        shutil.rmtree(folder / "copy")
        return seconds

    def merged(targets: str, dtype: str | None) -> float:
        took = measured_merge(folder / targets, folder / "merged", *words(dtype))
        shutil.rmtree(folder / "merged")
        return took.seconds

    copy = median(copied() for _ in range(3))
    print(f"\ncp: {copy:.1f} s")
    slow = []
    for targets in TARGETS:
        for dtype in DTYPES:
            seconds = median(merged(targets, dtype) for _ in range(3))
            allowed = (1.1 if targets == "qkv" and dtype is None else 2.2) * copy + STARTS
            print(f"{targets}, {dtype}: {seconds:.1f} s, allowed {allowed:.1f} s")
            slow += [(targets, dtype)] * (seconds > allowed)
    assert not slow
