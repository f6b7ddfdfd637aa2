"""Reads what a run has left in its folder, damages files on purpose, and makes folders with an owner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron_tiedlora.base.ownership import OWNER_FILE, FolderLock, take_folder
from support.native_files import reseal

HINT = "wait for its end"


def take(folder: Path, **keywords: Any) -> FolderLock:
    return take_folder(folder, hint=HINT, **keywords)


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def leave_dead(folder: Path) -> str:
    """A process takes the folder and is killed; returns its token."""
    code = (
        "import os, sys, pathlib; from megatron_tiedlora.base.ownership import take_folder;"
        "take_folder(pathlib.Path(sys.argv[1]), hint=''); os.kill(os.getpid(), 9)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], timeout=60, check=False)
    assert result.returncode == -9
    return (folder / OWNER_FILE).read_text()


def grow_old(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(folder / OWNER_FILE, (then, then))


def metrics(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    """The rows of one split in metrics.jsonl; every line must be strict JSON."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [row for row in rows if row["split"] == split]


def losses(folder: Path, split: str = "train") -> list[tuple[int, float]]:
    """(step, loss) of one split."""
    return [(row["step"], row["loss"]) for row in metrics(folder, split)]


def status(folder: Path) -> dict[str, Any]:
    """run_status.json."""
    content: dict[str, Any] = json.loads((folder / "run_status.json").read_text())
    assert set(content) == {"state", "step", "reason"}
    return content


def run_settings(folder: Path) -> dict[str, Any]:
    """run.yaml."""
    content: dict[str, Any] = yaml.safe_load((folder / "run.yaml").read_text())
    return content


def checkpoint_names(folder: Path) -> set[str]:
    """The names of the checkpoint folders; nothing else but `latest` may lie beside them."""
    names = {item.name for item in (folder / "checkpoints").iterdir()}
    assert "latest" in names
    return names - {"latest"}


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def has_step(folder: Path, step: int) -> bool:
    """Whether metrics.jsonl has a training row of `step`."""
    file = folder / "metrics.jsonl"
    return file.is_file() and f'{{"step": {step}, "split": "train"' in file.read_text()


def assert_same_run(folder: Path, whole: Path) -> None:
    """Both runs have the same rows, one for each step, and the same adapters, bit for bit."""
    for split in ("train", "validation"):
        assert losses(folder, split) == losses(whole, split)
    keep = ("step", "loss", "learning_rate", "grad_norm", "supervised_tokens", "padding")
    assert [[row[k] for k in keep] for row in metrics(folder)] == [[row[k] for k in keep] for row in metrics(whole)]
    for part in ("adapter", "checkpoints"):
        found, expected = files_of(folder / part), files_of(whole / part)
        assert set(found) == set(expected)
        assert all(found[name] == expected[name] for name in found if name.endswith(".safetensors")), part
    assert status(folder) == status(whole)


def assert_close_run(folder: Path, whole: Path, *, rel: float = 1e-5) -> None:
    """Both runs have rows of the same steps, and losses that differ by their rounding alone."""
    for split in ("train", "validation"):
        found, expected = losses(folder, split), losses(whole, split)
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=rel)


def flip_last_value(file: Path) -> None:
    """Flip a bit of the last value in a file, and no checksum."""
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def truncate(file: Path) -> None:
    """Cut the last bytes off."""
    file.write_bytes(file.read_bytes()[:-100])


def edit_json(file: Path, *, seals: bool = True, without: Collection[str] = (), **changes: Any) -> None:
    """Take the fields `without` out of a JSON object and change others, and if `seals` the checksums with them."""
    content = {name: value for name, value in json.loads(file.read_text()).items() if name not in without}
    file.write_text(json.dumps({**content, **changes}))
    if seals:
        reseal(file.parent)


def edit_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Call `change` on the tensors of a safetensors file and write them back, and the checksums with them."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    reseal(file.parent)
