"""The index of a folder of adapters: its rows, finding, verifying and comparing."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from support.flipped_bits import flip_bit
from support.folders import python
from support.native_files import reseal, with_adapter, write_exports, write_native
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.adapter_settings import FILTERS
from megatron_tiedlora.convert.collection import build_index, verify_entries
from megatron_tiedlora.convert.index import INDEX_FILE, Entry, read_index

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def find_entries(root: Path, wanted: dict[str, Any]) -> list[Entry]:
    return [entry for entry, _ in read_index(root).matching(wanted)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with exports and a checkpoint, and two adapters outside of runs."""
    root = tmp_path_factory.mktemp("collection")
    base = write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    (root / "runs" / "first").mkdir(parents=True)
    write_exports(root / "runs" / "first", base)
    shutil.copytree(root / "runs/first/adapter", root / "runs/first/checkpoints/step_3")
    (root / "runs/first/run.yaml").write_text(yaml.safe_dump({"task": "squad", "method": "tl6"}))
    (root / "runs/first/scores.json").write_text(json.dumps({"after": {"f1": {"score": 50.0}}}))
    write_native(root / "others/lora", base, with_adapter(base, "lora", targets=("qkv", "o_proj"))[2])
    write_native(root / "others/layers", base, with_adapter(base, "tl5", (2,))[2])
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


def test_rows(root: Path) -> None:
    assert build_index(root) == (3, [])
    layers, lora, first = find_entries(root, {})
    assert [entry.path for entry in (layers, lora, first)] == ["others/layers", "others/lora", "runs/first/adapter"]
    assert (first.name, first.run, first.task) == ("first", "runs/first", "squad")
    assert json.loads(first.scores or "") == {"f1": {"score": 50.0}}
    assert (first.method, first.rank, first.alpha, first.targets, first.layers) == ("tl6", 4, 6.0, "qkv", 3)
    assert first.sha256 == file_sha256(root / "runs/first/adapter" / WEIGHTS)
    assert first.size == sum((root / "runs/first/adapter" / name).stat().st_size for name in (CONFIG, WEIGHTS))
    assert first.base_hash == lora.base_hash and first.weights_hash == lora.weights_hash is not None
    assert (lora.targets, lora.task, lora.run, lora.scores) == ("qkv,o_proj", None, None, None)
    with sqlite3.connect(root / INDEX_FILE) as database:  # as another program reads it
        assert database.execute("SELECT name FROM adapters WHERE method = 'tl5'").fetchall() == [("layers",)]
        columns = database.execute("PRAGMA table_info(adapters)")
        types = {name: (kind, bool(needed)) for _, name, kind, needed, *_ in columns}
        expected = {"rank": ("INTEGER", True), "alpha": ("REAL", True), "task": ("TEXT", False)}
        assert {name: types[name] for name in expected} == expected
        for column in {*FILTERS} - {"alias", "tag"}:
            (plan,) = database.execute(f"EXPLAIN QUERY PLAN SELECT path FROM adapters WHERE {column} = 1")
            assert f"USING INDEX adapters_{column}" in plan[3]


def test_find(root: Path) -> None:
    build_index(root)
    for wanted, names in (
        ({"method": "tl*"}, ["layers", "first"]),
        ({"task": "squad"}, ["first"]),
        ({"targets": "qkv,o_proj"}, ["lora"]),
        ({"rank": 4, "name": "l*"}, ["layers", "lora"]),
        ({"base_model": "*/tiny", "method": "lora"}, ["lora"]),
        ({"name": "none"}, []),
    ):
        assert [entry.name for entry in find_entries(root, wanted)] == names, wanted


def test_what_cannot_be_read_is_said_and_left_out(root: Path) -> None:
    file = root / "others/lora" / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), "rank": 5}))
    (root / "cut").mkdir()
    (root / "cut" / CONFIG).write_text('{"format_version": 2')
    (root / ".writing-adapter-1").mkdir()
    (root / ".writing-adapter-1" / CONFIG).write_text("{")
    count, problems = build_index(root)
    assert count == 2 and len(problems) == 2
    assert "cut/adapter_config.json: not valid JSON" in problems[0] and "does not match its own checksum" in problems[1]
    assert call("index", [str(root)]) == 1


def test_odd_folders_are_one_line(root: Path) -> None:
    assert build_index(root / "runs/first/adapter") == (1, [])
    (root / "runs/first/run.yaml").write_text("task: [a]")
    (root / "others/lora").rename(root / "others/a\nb")
    count, problems = build_index(root)
    assert count == 1 and len(problems) == 2
    assert all("cannot be shown" in problem or "task = ['a'] has the wrong type" in problem for problem in problems)
    (root / INDEX_FILE).unlink()
    (root / INDEX_FILE).mkdir()
    assert INDEX_FILE in refusal(build_index, root)


def test_a_changed_config_is_found(root: Path) -> None:
    """PEFT writes folders without checksums."""
    file = root / "others/lora" / CONFIG
    content = {name: value for name, value in json.loads(file.read_text()).items() if "sha256" not in name}
    file.write_text(json.dumps(content))
    build_index(root)
    file.write_text(json.dumps({**content, "alpha": 80.0}))
    said = f"{root / 'others/lora'}: has changed since it was indexed"
    assert verify_entries(root, find_entries(root, {"name": "lora"})) == [said]


def test_verify_names_what_is_damaged_or_changed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_index(root)
    assert verify_entries(root, find_entries(root, {})) == []
    flip_bit(root / "others/lora" / WEIGHTS, "A")
    damaged, changed = root / "others/lora", root / "others/layers"
    flip_bit(changed / WEIGHTS, "A")
    reseal(changed)
    problems = verify_entries(root, find_entries(root, {}))
    assert problems[0] == f"{changed}: has changed since it was indexed"
    assert problems[1].startswith(f"{damaged / WEIGHTS}: does not match its checksum") and len(problems) == 2
    assert call("index", [str(root), "verify"]) == 1
    assert capsys.readouterr().out.count("FAILED") == 2
    assert call("index", [str(root), "verify", "--method", "tl6"]) == 0


def test_diff(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "others/lora", root / "others/copy")
    flip_bit(root / "others/copy" / WEIGHTS, "o_proj.B", bit=20)
    reseal(root / "others/copy")
    build_index(root)
    assert call("index", [str(root), "diff", "lora", "others/lora"]) == 0
    assert capsys.readouterr().out == "the same\n"
    assert call("index", [str(root), "diff", "lora", "copy"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("o_proj.B: differs by up to ")
    assert call("index", [str(root), "diff", "lora", "layers"]) == 1
    out = capsys.readouterr().out
    assert "method: 'lora' and 'tl5'" in out and f"o_proj.A: only in {root / 'others/lora'}" in out


def test_the_table_and_the_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("index", [str(root)]) == 0
    base = find_entries(root, {})[0].base_model
    serving = f"serve them with: tiedlora serve --model {base} --adapters {root}"
    assert capsys.readouterr().out == f"indexed 3 adapters: {root / INDEX_FILE}\n{serving}\n"
    call("index", [str(root), "find", "--targets", "o_proj,qkv"])
    heading, row, _, count = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["name", "base", "method"] and row.split()[:4] == ["lora", "tiny", "lora", "4"]
    assert count == "1 adapter"
    call("index", [str(root), "find", "--json"])
    assert [json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()] == ["layers", "lora", "first"]


def test_finding_does_not_wait_for_torch(root: Path) -> None:
    build_index(root)
    actions = "find --json", "alias prod first", "tag first good", "lineage first"
    code = "import sys; from megatron_tiedlora.commands.front import call"
    code += "; assert not any([call('index', [sys.argv[1], *words.split()]) for words in sys.argv[2:]])"
    code += "; assert 'torch' not in sys.modules"
    done = python("-c", code, root, *actions)
    assert done.returncode == 0 and "first" in done.stdout, done.stderr


@pytest.mark.parametrize("error", [OverflowError("timestamp out of range"), ValueError("year 318857 is out of range")])
def test_a_time_of_no_calendar_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Some file systems take it."""
    monkeypatch.setattr("megatron_tiedlora.convert.collection.datetime", Mock(fromtimestamp=Mock(side_effect=error)))
    count, problems = build_index(root)
    assert count == 0 and problems[1] == f"{root / 'others/lora'}: cannot be read ({error}); check its files"


def test_a_row_that_would_not_be_read_is_not_written(root: Path) -> None:
    """The same types hold for both."""
    file = root / "runs/first/scores.json"
    file.write_text(json.dumps({"after": {"f1": {"score": 50.0, "note": "x" * 100_000}}}))
    count, (problem,) = build_index(root)
    assert count == 2 and "scores = " in problem and "at most 100000 characters" in problem
    assert len(find_entries(root, {})) == 2


@pytest.mark.parametrize("content", [b"", b"no database at all, but as long as a header of one would be at least"])
def test_a_broken_index_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_FILE).write_bytes(content)
    with pytest.raises(UserError, match=rf"{INDEX_FILE}: (file is not a database|has format 0)"):
        find_entries(tmp_path, {})


def test_two_of_one_name_are_asked_by_path(root: Path) -> None:
    shutil.copytree(root / "others/lora", root / "more/lora")
    build_index(root)
    assert "lora names 2 adapters; give the path of one" in refusal(call, "index", [str(root), "diff", "lora", "first"])
