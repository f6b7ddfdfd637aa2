"""The check of exports takes the memory of one layer in the dtype that it computes in, whatever the number of layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROOT
from native_files import with_adapter, write_native

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.convert import merged_rows
from megatron_tiedlora.convert.merge import merge_adapter
from tools.write_random_model import write_random_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")

ALL = ("qkv", "o_proj", "gate_up", "down_proj")
MEASURE = """
import sys, threading
from pathlib import Path
from megatron_tiedlora.convert import inputs, merged_rows, verify  # imported here: they do not count
from tools.verify_export import main

merged_rows.BLOCK_ELEMENTS = int(sys.argv[1])

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def watch():
    while not done.wait(0.01):
        seen.append(anonymous())

done, start = threading.Event(), anonymous()
seen = [start]
thread = threading.Thread(target=watch)
thread.start()
status = main(sys.argv[2:])
done.set(), thread.join()
print(status, len(seen), start, max(seen))
"""


def measure(folder: Path, config: dict[str, Any], targets: tuple[str, ...], *flags: str) -> tuple[str, int, int]:
    """Write a random model of `config` and merge an adapter into it. Returns the check's report, and its RssAnon in
    bytes at the start and at the peak."""
    base = folder / "base"
    if not base.exists():
        write_random_model(config, base, name="random", seed=0)
    oracle = with_adapter(base, "tl6", targets=targets, rank=8)[2]
    adapter, source = write_native(folder / "adapter", base, oracle), find_model(str(base))
    merge_adapter(source, adapter, folder / "merged")
    exports = ["--adapter", folder / "adapter", "--merged", folder / "merged"]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(merged_rows.BLOCK_ELEMENTS), *exports, *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report, _, last = result.stdout.rstrip("\n").rpartition("\n")
    status, samples, start, peak = map(int, last.split())
    assert status == 0 and samples > 10, report
    return report, start, peak


def layer_bytes(base: Path, dtype: torch.dtype) -> int:
    """The size of a layer's weights in `dtype`."""
    return find_model(str(base)).shape.block.num_weights * dtype.itemsize


def test_a_model_of_two_layers_takes_the_memory_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks and the rows of tokens are as small beside the layer as with a large model."""
    monkeypatch.setattr(merged_rows, "BLOCK_ELEMENTS", 2**17)
    config = {
        **PRESETS["llama2-7b"],
        **{"hidden_size": 1024, "intermediate_size": 6144, "num_attention_heads": 8, "num_key_value_heads": 2},
        **{"num_hidden_layers": 2, "vocab_size": 500, "max_position_embeddings": 12},
    }
    report, start, peak = measure(tmp_path, config, ALL, "--in", "none")
    layer = layer_bytes(tmp_path / "base", torch.float32)
    assert layer > 80e6
    assert peak - start < 1.2 * layer, f"{(peak - start) / 1e6:.0f} MB, a layer is {layer / 1e6:.0f} MB\n{report}"


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("qkv",), ALL], ids=["qkv", "all"])
def test_llama2_70b_shapes_take_the_memory_of_one_layer(
    tmp_path_factory: pytest.TempPathFactory, targets: tuple[str, ...]
) -> None:
    """Four layers: 7.9 GB each for base and merged folder. Python and torch are in the peak."""
    folder = tmp_path_factory.mktemp("large")
    try:
        for dtype, flag in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            config = {**PRESETS["llama2-70b"], "num_hidden_layers": 4}
            report, _, peak = measure(folder, config, targets, "--dtype", flag)
            print(f"\\n{report}\\n{flag}: peak of RssAnon {peak / 1e9:.2f} GB")
            assert peak < 1.2 * layer_bytes(folder / "base", dtype)
            (judged,) = (line for line in report.splitlines() if line.startswith("  against rounded weights"))
            assert judged.endswith("ok")
            break
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
