"""The smallest tiedlora bench --what serving with a real vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.folders import ROOT

from megatron_tiedlora.base.presets import PRESETS

pytestmark = pytest.mark.vllm

LAYERS, WIDTH, QKV, RANK = 2, 64, (64, 32, 32), 4  # two heads of 32, the least of vLLM's attention on a CPU
SERVED_RANK = 8  # vLLM's next one
WORDS = ["--dtype=fp32", f"--rank={RANK}", "--served=5", "--in_batch=0,1,4", "--batch_size=4", "--slots=2"]


def bench(folder: Path, model: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as its sides' processes import the script that starts them."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_tiedlora", "bench", "--what=serving", f"--model={model}", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def slot_bytes(*, out: int, width: int, tied: bool) -> int:
    """Bytes of a slot in fp32: A and B once, u and v per layer; or A (once for each of q, k and v) and B per layer."""
    if tied:
        return 4 * (SERVED_RANK * (width + out) + LAYERS * (out + 3 * SERVED_RANK))
    return 4 * LAYERS * SERVED_RANK * (3 * width + out)


@pytest.mark.timeout(1000)
def test_all_parts_are_measured(tmp_path: Path) -> None:
    """In the bytes of two expanded slots, all native adapters have one, so none misses."""
    config: dict[str, Any] = {**PRESETS["tiny"], "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 1}))
    ended = bench(tmp_path, str(tmp_path), "--random_weights", "--repeats=1", "--json=bench.json", *WORDS)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["versions"]["vllm"]
    memory, batches, zipf = report["parts"]
    slots = {side: turn["load of all"]["slot_bytes"] for side, (turn,) in memory.items()}
    tied, plain = (slot_bytes(out=sum(QKV), width=WIDTH, tied=tied) for tied in (True, False))
    assert (slots["native"], slots["expanded"]) == (tied, plain) and slots["expanded, no flag"] > plain
    assert all(turn["load of all"]["misses"] == 5 for (turn,) in memory.values())
    drawn = {side: turn["Zipf's law, equal bytes"] for side, (turn,) in zipf.items()}
    assert [own["slots"] for own in drawn.values()] == [5, 2, max(1, 2 * plain // slots["expanded, no flag"]), 0]
    assert drawn["native"]["misses"] == 0 < drawn["expanded"]["misses"] <= 16 and drawn["merged"]["misses"] == 0
    for (turn,) in batches.values():
        assert list(turn) == [f"adapters at once: {number}" for number in (0, 1, 4)]
        assert all(own["tokens"] == 4 * 8 and own["next_p50_ms"] > 0 and own["misses"] == 0 for own in turn.values())
    assert "5 adapters; 4 requests at once: 20 + 8 tokens" in ended.stdout


@pytest.mark.timeout(300)
def test_a_model_that_vllm_cannot_serve_is_one_line(tmp_path: Path) -> None:
    """On a CPU, vLLM's attention has no heads of 16."""
    ended = bench(tmp_path, "tiny", "--repeats=1", *WORDS)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: native: vLLM cannot serve this model (RuntimeError: Unsupported CPU attention")
    assert not list(tmp_path.iterdir())
