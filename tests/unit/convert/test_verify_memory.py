"""The check of exports takes the memory of one layer in the dtype that it computes in, whatever the model's layers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from folders import ROOT
from wide_models import write_wide_adapter, write_wide_model

from megatron_tiedlora.base.output_folder import new_output
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import open_adapter

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")

ALL = ("qkv", "o_proj", "gate_up", "down_proj")
MEASURE = """
import sys, threading
from pathlib import Path
from megatron_tiedlora.convert import inputs, verify  # imported here: they do not count
from megatron_tiedlora.commands.front import call

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.01):
        seen.append(anonymous())

done, start = threading.Event(), anonymous()
seen = [start]
thread = threading.Thread(target=watch)
thread.start()
status = call("verify", sys.argv[1:])
done.set(), thread.join()
print(status, len(seen), start, max(seen))
"""


class Check(NamedTuple):
    """What a check printed, and its RssAnon in bytes when everything was imported, and at its peak."""

    report: str
    start: int
    peak: int


def check(folder: Path, *flags: str) -> Check:
    """Check the merged folder in `folder` by the command."""
    exports = ["--adapter", folder / "adapter", "--merged", folder / "merged"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, exports), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report, _, last = result.stdout.rstrip("\n").rpartition("\n")
    status, samples, start, peak = map(int, last.split())
    assert status == 0 and samples > 10, report
    return Check(report, start, peak)


def write_merged(folder: Path, targets: tuple[str, ...]) -> None:
    """Merge an adapter of the model in `folder`."""
    write_wide_adapter(folder / "adapter", folder / "base", targets)
    opened = open_adapter(folder / "adapter", None)
    merge_adapter(opened.source, opened.adapter, folder / "merged", new=new_output)


def layer_bytes(base: Path, dtype: torch.dtype) -> int:
    """The size of a layer's matrices in `dtype`."""
    return find_model(str(base)).shape.block.num_weights * dtype.itemsize


def test_a_model_of_two_layers_takes_the_memory_of_one(tmp_path: Path) -> None:
    """A layer is small here beside the rest, which is 20 MB."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = {"hidden_size": 1024, "intermediate_size": 6144, "num_hidden_layers": 2, "vocab_size": 500}
    write_wide_model(tmp_path / "base", file_bytes=10**8, **sizes, **heads)
    write_merged(tmp_path, ALL)
    report, start, peak = check(tmp_path, "--in", "none")
    layer = layer_bytes(tmp_path / "base", torch.float32)
    assert layer > 80e6
    assert peak - start < 1.5 * layer, f"{(peak - start) / 1e6:.0f} MB, a layer is {layer / 1e6:.0f} MB\n{report}"


@pytest.fixture
def large_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed at once: pytest keeps those of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("targets", [("qkv",), ALL], ids=["qkv", "all"])
def test_llama2_70b_shapes_take_the_memory_of_one_layer(large_folder: Path, targets: tuple[str, ...]) -> None:
    """Four layers: 7.9 GB for the base, and as much for the merged folder. Python and torch are in the peak."""
    write_wide_model(large_folder / "base", file_bytes=2 * 10**9, num_hidden_layers=4)
    write_merged(large_folder, targets)
    for dtype, flag in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        report, _, peak = check(large_folder, "--dtype", flag)
        layer = layer_bytes(large_folder / "base", dtype)
        print(f"\n{flag}: peak of RssAnon {peak / 1e9:.2f} GB, a layer is {layer / 1e9:.2f} GB\n{report}")
        assert peak < 1.2 * layer
        (judged,) = (line for line in report.splitlines() if line.startswith("  against rounded weights"))
        assert judged.endswith("ok")
