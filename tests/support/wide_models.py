"""Models of few but wide layers, written quickly and in little memory; adapters of them; and what a merge takes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.checkpoint.base_identity import identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import StreamedTensor, sharded, write_files
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import weight_rules
from support.folders import ROOT, TESTS

MERGE = ROOT / "tools" / "merge_adapter.py"
_GROUP = 2**20 + 7  # values that are repeated; odd, so that rows differ


def write_wide_model(folder: Path, *, file_bytes: int, **values: Any) -> Path:
    """Write a bf16 model of LLaMA-2-70B's shape, changed by `values`, in files of `file_bytes`, without a tokenizer."""
    config = {**PRESETS["llama2-70b"], **values}
    group = torch.randn(_GROUP, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    parts = [part for rule in weight_rules(shape_from_hf(config)) for part in rule.parts]
    tensors = [
        StreamedTensor(part.name, torch.bfloat16, part.shape, partial(_drawn, group, part.shape, index))
        for index, part in enumerate(parts)
    ]
    write_files(folder, sharded(tensors, file_bytes))
    return folder


def _drawn(group: torch.Tensor, shape: Sequence[int], index: int) -> Iterator[torch.Tensor]:
    left, start = torch.Size(shape).numel(), 1009 * index
    while left:
        start %= len(group)
        block = group[start : start + left]
        yield block
        left, start = left - len(block), start + len(block)


def write_wide_adapter(folder: Path, model: Path, targets: Sequence[str], *, rank: int = 8) -> Path:
    """Write a tl6 adapter of the model with random values in every tensor."""
    source, draw = find_model(str(model)), torch.Generator().manual_seed(1)
    layers = tuple(range(1, source.shape.num_layers + 1))
    config = make_adapter_config(
        "tl6", rank=rank, layers=layers, targets=targets_of(source.shape, tuple(targets)), seed=0
    )
    state = {name: torch.randn(config.shape(name), generator=draw).mul_(0.1) for name in config.tensors}
    with BaseWeights(model, source.shape) as weights:
        base = identify_base(source, weights, "bf16")
    save_adapter(folder, NativeAdapter(config, base, state))
    return folder


class Merge(NamedTuple):
    """What a merge took: the most RssAnon above the import of torch, its CPU time, and its time."""

    anonymous_bytes: int
    cpu_seconds: float
    seconds: float


def merge_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def measured_merge(adapter: Path, output: Path, *words: str) -> Merge:
    """Run the command to its end and watch it from outside."""
    started, most, ended, usage = time.monotonic(), 0, 0, None
    with subprocess.Popen(
        [sys.executable, str(MERGE), f"--adapter={adapter}", f"--output={output}", *words],
        env=merge_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not ended:
            most = max(most, anonymous_bytes(process.pid))
            time.sleep(0.005)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.stderr is not None
        assert process.returncode == 0, process.stderr.read()
    return Merge(most - _torch_bytes(), usage.ru_utime + usage.ru_stime, time.monotonic() - started)


def anonymous_bytes(pid: int | str) -> int:
    """RssAnon of a process in bytes; 0 once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else 0


class Peak(NamedTuple):
    """What a process printed, its RssAnon before its work and at its peak, and how often that was read."""

    printed: str
    start: int
    most: int
    samples: int


def peak_of(before: str, work: str, *words: object) -> Peak:
    """Run `before` and then `work`, which is watched, in a process of its own that has these words."""
    code = f"""
import sys
from support.wide_models import watched
{before}
with watched() as seen:
    {work}
print(seen[0], max(seen), len(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**merge_environment(), "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    printed, _, last = done.stdout.rstrip("\n").rpartition("\n")
    return Peak(printed, *map(int, last.split()))


@contextmanager
def watched() -> Iterator[list[int]]:
    """RssAnon of this process: before the block, every two milliseconds, and after it."""
    seen, done = [anonymous_bytes("self")], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(anonymous_bytes("self"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        seen.append(anonymous_bytes("self"))


def _torch_bytes() -> int:
    """RssAnon of a process that has only imported torch."""
    code = "import torch, pathlib; print(pathlib.Path('/proc/self/status').read_text())"
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(re.findall(r"RssAnon:\s+(\d+) kB", text)[0]) * 1024
