"""Real sizes, which take minutes: the demo model over tensor and pipeline ranks, a 7B-shaped model in 24 GB, and in
nf4 on one process.

    make test PYTEST_ARGS="-m slow" TESTS=tests/slow/test_slow_layouts.py

Their figures are in docs/parallelism_log.md.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import psutil
import pytest
from support.folders import ROOT
from support.run_files import losses, metrics
from support.run_helpers import Command, deepspeed_command, plain_command, start_command, write_rows
from support.tiny_models import write_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(3600)]

# A real cache: the demo model is prepared once a machine.
CACHE = Path(os.environ.get("MEGATRON_TIEDLORA_CACHE", "~/.cache/megatron_tiedlora")).expanduser()
GIGABYTE = 1024**3


def train(arguments: list[str], folder: Path, *, ranks: int = 1) -> Command:
    """launch/train.py under its launcher, with as many threads as the cores give each rank."""
    command = plain_command(arguments) if ranks == 1 else deepspeed_command(arguments, ranks=ranks)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    return start_command(["env", f"OMP_NUM_THREADS={threads}", *command], folder=folder, cache=CACHE, limit=3000)


@pytest.mark.parametrize(("tp", "pp"), [(3, 1), (1, 2)])
def test_the_demo_model_over_ranks(tmp_path: Path, tp: int, pp: int, demo_losses: list[float]) -> None:
    """SmolLM2-135M, 9 heads on 3 key-value heads, bf16: 20 steps within 2e-2 a step and 5e-3 on average."""
    sizes = [f"--tensor_parallel={tp}", f"--pipeline_parallel={pp}", "--ds_config=zero1.json"]
    folder = tmp_path / "run"
    train([*sizes, f"--output_dir={folder}"], tmp_path / "work", ranks=tp * pp).wait().expect(0)
    found = [loss for _, loss in losses(folder)]
    gaps = [abs(one - other) for one, other in zip(found, demo_losses, strict=True)]
    print(f"tp {tp} pp {pp}: largest {max(gaps):.2e}, mean {sum(gaps) / len(gaps):.2e}")
    assert max(gaps) <= 2e-2 and sum(gaps) / len(gaps) <= 5e-3


@pytest.fixture(scope="module")
def demo_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The one-process demo, step by step."""
    folder = tmp_path_factory.mktemp("demo")
    train([f"--output_dir={folder / 'run'}"], folder / "work").wait().expect(0)
    found = [loss for _, loss in losses(folder / "run")]
    assert len(found) == 20
    return found


@pytest.fixture(scope="module")
def model_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bf16 weights in the shape of LLaMA-2 7B, 13.5 GB on disk."""
    folder = tmp_path_factory.mktemp("model") / "7b"
    script = ROOT / "tools" / "write_random_model.py"
    command = [plain_command([])[0], str(script), "--model", "llama2-7b", "--output", str(folder)]
    start_command(command, folder=folder.parent / "work", limit=1200).wait().expect(0)
    return folder


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_a_7b_model_in_24_gb(tmp_path: Path, model_7b: Path, tp: int, pp: int) -> None:
    """2 steps of 64 tokens on two ranks; the ranks' anonymous memory together stays under 20 GB."""
    peak = peak_of_two_steps(tmp_path, model_7b, ranks=2, tensor_parallel=tp, pipeline_parallel=pp)
    assert peak < 20e9


def test_a_7b_model_in_nf4_on_one_process(tmp_path: Path, model_7b: Path) -> None:
    """2 steps of 64 tokens, loading included, in 5.5 GB; the blocks' weights take 3.6 GB."""
    assert peak_of_two_steps(tmp_path, model_7b, ranks=1, base="nf4") <= 5.5e9


def peak_of_two_steps(tmp_path: Path, model: Path, *, ranks: int, **more: object) -> int:
    """The most anonymous memory, in bytes, that all processes of a run of 2 steps of 64 tokens have together."""
    write_tiny_tokenizer(tmp_path / "tokenizer", vocab_size=32000)
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    folder = tmp_path / "run"
    settings = {
        "model": model,
        "tokenizer": tmp_path / "tokenizer",
        "train_file": rows,
        "validation_file": rows,
        "ds_config": "zero1.json",
        "max_length": 64,
        "global_batch_size": 1,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "eval_interval": 2,
        "output_dir": folder,
        **more,
    }
    started = time.monotonic()
    command = train([f"--{name}={value}" for name, value in settings.items()], tmp_path / "work", ranks=ranks)
    peak = 0
    while command.process.poll() is None and time.monotonic() < command.deadline:
        peak = max(peak, sum(map(anonymous_bytes, [psutil.Process(command.process.pid), *command.descendants()])))
        time.sleep(0.2)
    command.wait().expect(0)
    seconds = time.monotonic() - started
    print(f"{ranks} ranks, {more}: peak of anonymous memory {peak / GIGABYTE:.2f} GiB, {seconds:.0f} s")
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert peak > 3e9, "the processes with the weights are among those that are measured"
    return peak


def anonymous_bytes(process: psutil.Process) -> int:
    """RssAnon of a process; 0 once it is gone."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else 0
