"""launch/train.py --adapters: each adapter's run folder is that of a run of its own, whatever the others do."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_helpers import Base, run, write_base
from safetensors.torch import load_file

OWN: dict[str, dict[str, Any]] = {
    "a": {"method": "tl6", "rank": 8, "max_steps": 6},
    "b": {"method": "lora", "layers": [2, 3], "global_batch_size": 8, "max_steps": 4, "learning_rate": 1e-2},
    "c": {"method": "vera", "rank": 16, "targets": "all", "seed": 3, "max_steps": 6, "save_interval": 3},
    "d": {"method": "tl2", "rank": 1, "targets": "o_proj,gate_up", "gradient_clipping": 0.01, "max_steps": 6},
}
_TIMES = {"tokens_per_second", "supervised_tokens_per_second", "mfu", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


def written(file: Path, own: dict[str, dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump([{"name": name, **settings} for name, settings in own.items()], sort_keys=False))
    return file


def rows(folder: Path) -> list[dict[str, Any]]:
    """The numbers of metrics.jsonl that are not times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in _TIMES} for row in found]


def content(file: Path) -> Any:
    """What a file of a run folder holds, without where it lies."""
    if file.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(file).items()}
    if file.suffix == ".json":
        found = json.loads(file.read_text())
        if "settings" in found:
            found["settings"] |= {"output_dir": None}
            found.pop("config_sha256")  # of the settings, with that folder
        return found
    if file.suffix == ".yaml":
        return yaml.safe_load(file.read_text()) | {"output_dir": None}
    return file.read_bytes()


def _files(folder: Path) -> list[str]:
    skipped = ("logs", "tensorboard", "metrics.jsonl", ".")  # an owner's token is a dot file
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in found if not name.startswith(skipped))


def same_folders(found: Path, expected: Path) -> None:
    """Fail unless two run folders hold the same files and, but for times and paths, the same content."""
    assert rows(found) == rows(expected)
    names, others = (_files(folder) for folder in (found, expected))
    assert names == others
    for name in names:
        if not name.endswith((".png", ".md")):
            assert content(found / name) == content(expected / name), name


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def alone(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four adapters, each in a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    for name, own in OWN.items():
        run(base, folder / name, ds_config="zero0.json", **own)
    return folder


def test_folders_are_those_of_single_runs(base: Base, tmp_path: Path, alone: Path) -> None:
    file = written(tmp_path / "adapters.yaml", OWN)
    run(base, tmp_path / "run", adapters=file)
    for name in OWN:
        same_folders(tmp_path / "run" / name, alone / name)
    found = table(tmp_path / "run")
    assert {name: (row["state"], row["reason"]) for name, row in found.items()} == {
        name: ("finished", "max_steps") for name in OWN
    }
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["state"] == "finished"
