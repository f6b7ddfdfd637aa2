"""What the doctor makes of --model and the data flags, what a host's cache holds, and whether a folder is shared."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.output_folder import CACHE_VARIABLE
from megatron_tiedlora.checkpoint.sources import demo_model_path, find_model
from megatron_tiedlora.cluster.doctor import rank
from megatron_tiedlora.cluster.doctor.rank import job_content, job_files
from megatron_tiedlora.convert.export_peft import base_location

MODEL = "meta-llama/Llama-2-7b-hf"

# Values by flag; paths below the working folder, and ids on the hub, by flag.
GIVEN: tuple[tuple[Mapping[str, str], Mapping[str, str], Mapping[str, str]], ...] = (
    ({"model": "meta-llama/Llama-2-7b-hf"}, {"model": "meta-llama/Llama-2-7b-hf"}, {"model": MODEL}),
    ({"model": "llama"}, {"model": "llama"}, {}),
    ({"model": "a/b/c"}, {"model": "a/b/c"}, {}),
    ({"model": "./a/b"}, {"model": "a/b"}, {}),
    ({"model": "a b/c"}, {"model": "a b/c"}, {}),
    ({"train_file": "rows.jsonl"}, {"train_file": "rows.jsonl"}, {}),
    ({"train_file": "data/rows.parquet"}, {"train_file": "data/rows.parquet"}, {}),
    ({"train_file": "gsm8k"}, {"train_file": "gsm8k"}, {"train_file": "gsm8k"}),
    ({"test_file": "knkarthick/samsum"}, {"test_file": "knkarthick/samsum"}, {"test_file": "knkarthick/samsum"}),
    ({"train_file": "a.de, d/a.en"}, {"train_file:1": "a.de", "train_file:2": "d/a.en"}, {}),
    ({"train_file": "a.jsonl,b.csv"}, {"train_file:1": "a.jsonl", "train_file:2": "b.csv"}, {}),
    ({"train_file": "a.jsonl:0.4,b.jsonl:0.6"}, {"train_file:1": "a.jsonl", "train_file:2": "b.jsonl"}, {}),
    ({"train_file": "data/*.jsonl"}, {}, {}),  # only a job's start knows what a pattern stands for
    ({"train_file": "a/b:main:train"}, {"train_file": "a/b:main:train"}, {"train_file": "a/b"}),
    ({"train_file": "there.de,there.en"}, {"train_file": "there.de,there.en"}, {}),
)


@pytest.mark.parametrize(("given", "paths", "hub"), GIVEN, ids=lambda value: ",".join(value.values()))
def test_what_a_flag_names(
    given: Mapping[str, str],
    paths: Mapping[str, str],
    hub: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.de,there.en").touch()
    found, repos = job_files(given)
    assert found == {flag: str(tmp_path / path) for flag, path in paths.items()}
    assert repos == hub


@pytest.mark.parametrize("name", sorted({given["model"] for given, *_ in GIVEN if "model" in given} | {"demo"}))
def test_the_hub_is_asked_where_the_doctor_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`find_model` and the doctor tell hub ids from folders alike; what came from the hub keeps its id for PEFT."""
    asked: list[str] = []
    folder = write_tiny_model(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(folder))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    _, hub = job_files({"model": name})
    if hub:
        assert base_location(find_model(name)) == name and asked == [name]
        shutil.copytree(folder, tmp_path / name)  # a folder of that name comes first
        assert base_location(find_model(name)) == str(tmp_path / name) and asked == [name]
    else:
        with pytest.raises(UserError, match=r"no such folder|the demo model is not prepared"):
            find_model(name)
        assert not asked


def test_the_prepared_demo_model_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = write_tiny_model(demo_model_path())
    (tmp_path / "demo").mkdir()  # the name means the model, wherever the command is given
    assert base_location(find_model("demo")) == str(folder)


def test_demo_is_a_model_and_no_file() -> None:
    paths, hub = job_files({"model": "demo", "train_file": "./demo"})
    assert paths == {"model": str(demo_model_path()), "train_file": str(Path.cwd() / "demo")} and hub == {}


# A host's cache of the hub -------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a model in a cache, with a config and a file that no job reads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--meta-llama--Llama-2-7b-hf"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    folder = repo / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("about")
    return folder


def test_a_model_is_looked_for_in_the_cache(snapshot: Path, tmp_path: Path) -> None:
    path = str(tmp_path / MODEL)
    content = job_content("model", path, MODEL)
    assert (content.path, content.kind) == (MODEL, "not_cached")  # without weights
    (snapshot / "model.safetensors").write_bytes(bytes(2 << 20))
    content = job_content("model", path, MODEL)
    assert (content.path, content.kind) == (MODEL, "cached")
    assert sorted(content.files) == ["config.json", "model.safetensors"]
    assert job_content("model", path, None).kind == "missing"
    assert job_content("model", path, "nobody/nothing").kind == "not_cached"
    (tmp_path / MODEL).mkdir(parents=True)
    assert job_content("model", path, MODEL).kind == "folder"  # as train: the hub is not asked for it


def test_the_cache_is_the_one_that_the_host_names(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "model.safetensors").touch()
    code = f"from {rank.__name__} import cached_model; print(cached_model({MODEL!r}))"
    for home, expected in ((tmp_path, str(snapshot)), (tmp_path / "other", "None")):
        done = subprocess.run(
            ["env", "-u", "HF_HUB_CACHE", f"HF_HOME={home}", sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_a_data_set_of_the_hub_is_not_looked_for(tmp_path: Path) -> None:
    content = job_content("train_file", str(tmp_path / "gsm8k"), "gsm8k")
    assert (content.path, content.kind, content.files) == ("gsm8k", "unchecked", {})


# A shared folder -----------------------------------------------------------------------------------------------------


def test_a_token_that_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / ".doctor-x"
    assert rank._write(str(path), "token") == "" and rank._can_read(str(path), "token")
    assert path.stat().st_mode & 0o777 == 0o600
    assert rank._write(str(path), "token") == "File exists"


@pytest.mark.parametrize("content", [None, "", "toke", "another", "token and more"])
def test_a_name_alone_is_not_enough(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_SHARED_SECONDS", 0.3)
    path = tmp_path / ".doctor-x"
    if content is not None:
        path.write_text(content)
    begin = time.monotonic()
    assert not rank._can_read(str(path), "token") and time.monotonic() - begin < 5


def test_a_full_disk_takes_no_token(tmp_path: Path) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        (folder / "filler").write_bytes(bytes(4096))
        assert rank._write(str(folder / ".doctor-x"), "token") == "No space left on device"
    finally:
        subprocess.run(["umount", str(folder)], check=True, timeout=20)
