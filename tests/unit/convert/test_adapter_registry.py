"""Aliases, tags, lineage and gc of an index of adapters."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from support.native_files import save_step, with_adapter, write_native
from support.run_files import files_of
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.base import files
from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.ownership import take_folder
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import DATA_HASHES, START_HASH
from megatron_tiedlora.convert import collection
from megatron_tiedlora.convert.collection import build_index
from megatron_tiedlora.convert.index import INDEX_FILE, changed_index, find_entry, read_index

Said = Callable[..., list[str]]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DATA = {"rows.jsonl": "d" * 64}


def write_run(folder: Path, base: Path, seed: int, start: Path | None = None) -> None:
    """A finished run, started from the adapter in `start`, with a checkpoint of other values."""
    folder.mkdir(parents=True)
    native = write_native(folder / "adapter", base, with_adapter(base, "tl6", seed=seed)[2])
    other = {name: tensor + 1 if name.endswith("A") else tensor for name, tensor in native.state.items()}
    save_step(folder / "checkpoints", type(native)(native.config, native.base_identity, other), 3, 3)
    settings: dict[str, Any] = {"task": "squad", "init_from": None, DATA_HASHES: DATA}
    if start is not None:
        settings |= {"init_from": str(start), START_HASH: file_sha256(start / WEIGHTS)}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    (folder / "run_status.json").write_text(json.dumps({"state": "finished"}))


def edit_record(run: Path, changes: dict[str, Any]) -> None:
    """Change what a run recorded in its settings."""
    file = run / "run.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """old -> (its checkpoint) -> middle -> new, from a plain adapter; and a run and an adapter of nobody."""
    root = tmp_path_factory.mktemp("registry")
    base = write_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    for name, seed in {"plain": 7, "alone": 8}.items():
        write_native(root / "others" / name, base, with_adapter(base, "lora", seed=seed)[2])
    write_run(root / "runs/old", base, 1, root / "others/plain")
    write_run(root / "runs/middle", base, 2, root / "runs/old/checkpoints/step_3")
    write_run(root / "runs/new", base, 3, root / "runs/middle/adapter")
    write_run(root / "runs/nobody", base, 4)
    build_index(root)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "root"))


@pytest.fixture
def said(root: Path, capsys: pytest.CaptureFixture[str]) -> Said:
    """The lines that an action on the index prints, which ends with the exit status `status`."""

    def lines(*words: str, status: int = 0) -> list[str]:
        capsys.readouterr()
        assert call("index", [str(root), *words]) == status, capsys.readouterr()
        return capsys.readouterr().out.splitlines()

    return lines


def test_an_alias_moves_and_says_what_it_named(root: Path, said: Said) -> None:
    assert said("alias", "prod", "old") == ["prod: runs/old/adapter"]
    moved, served = said("alias", "prod", "runs/new/adapter")
    assert moved == "prod: runs/new/adapter (before: runs/old/adapter)" and "until they restart" in served
    assert said("alias", "best", "prod") == ["best: runs/new/adapter"]
    with sqlite3.connect(root / INDEX_FILE) as database:  # as another program reads it
        rows = database.execute("SELECT * FROM aliases ORDER BY name").fetchall()
    assert rows == [("best", "runs/new/adapter"), ("prod", "runs/new/adapter")]
    assert find_entry(root, "prod").name == "new"
    assert said("diff", "prod", "best") == ["the same"]
    assert said("alias", "prod", "--remove")[0] == "prod: removed (before: runs/new/adapter)"
    assert read_index(root).aliases == {"best": "runs/new/adapter"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alias", "prod", "none"], "none names no adapter; list them with `find`"),
        (["alias", "new", "old"], "alias new is also the name of an adapter or a folder there; give another name"),
        (["alias", "runs", "old"], "alias runs is also the name of an adapter or a folder there"),
        (["alias", "prod", "--remove"], "alias prod does not exist; list all with `find --alias '*'`"),
        (["tag", "none", "keep"], "none names no adapter"),
        (["alias", "prod"], "alias: give NAME ADAPTER, or NAME --remove"),
        (["alias", "prod", "old", "--remove"], "alias: give NAME ADAPTER, or NAME --remove"),
        (["alias", "a/b", "old"], "alias a/b: is not letters, digits and . _ + @ : -, with a letter or digit first"),
        (["alias", "", "old"], "alias : is not letters"),
        (["tag", "old", "new\n"], "is not letters"),
        (["tag", "old"], "tag: give ADAPTER TAG..."),
        (["lineage"], "lineage: give one adapter"),
        (["gc", "old"], "gc takes no name of an adapter"),
        (["find", "--remove"], "--remove is for alias and tag, not for find"),
        (["verify", "--delete"], "--delete is for gc, not for verify"),
    ],
)
def test_a_wrong_label_is_one_line_and_changes_nothing(root: Path, words: list[str], message: str) -> None:
    before = (root / INDEX_FILE).read_bytes()
    assert message in refusal(call, "index", [str(root), *words])
    assert (root / INDEX_FILE).read_bytes() == before and not list(root.glob(".*"))


def test_labels_are_found(said: Said) -> None:
    said("alias", "prod", "new")
    assert said("tag", "prod", "keep", "v2:a") == ["runs/new/adapter: keep, v2:a"]
    said("tag", "old", "v2:b", "extra")
    assert said("tag", "old", "none", "extra", "--remove") == ["runs/old/adapter: v2:b"]
    for words, names in (
        (("--tag", "v2:*"), ["new", "old"]), (("--alias", "p*"), ["new"]), (("--alias", "*", "--tag", "v2:b"), []),
        (("--data", "d" * 64), ["middle", "new", "nobody", "old"]), (("--data", "*e*"), []),
    ):  # fmt: skip
        rows = [json.loads(line) for line in said("find", "--json", *words)]
        assert [row["name"] for row in rows] == names, words
    heading, row, *_ = said("find", "--alias", "prod")
    assert heading.split()[-3:] == ["aliases", "tags", "path"]
    assert row.endswith("prod     keep, v2:a  runs/new/adapter")
    (new,) = (json.loads(line) for line in said("find", "--json", "--name", "new"))
    assert (new["alias"], new["tag"], json.loads(new["data"])) == (["prod"], ["keep", "v2:a"], DATA)


def test_labels_outlive_a_new_index(root: Path, said: Said) -> None:
    said("alias", "prod", "new"), said("alias", "last", "old"), said("tag", "old", "good"), said("tag", "new", "good")
    assert said()[0].startswith("indexed 6 adapters")
    content = read_index(root)
    assert content.aliases == {"prod": "runs/new/adapter", "last": "runs/old/adapter"} and len(content.tags) == 2
    (root / "runs/new/adapter" / CONFIG).write_text("{")  # an alias is never removed by itself, as a file may come back
    shutil.rmtree(root / "runs/old")
    broken, old, new, indexed, _ = said(status=1)
    assert "new/adapter/adapter_config.json: " in broken and indexed.startswith("indexed 4 adapters")
    lost = "which is not indexed; restore it, or move or remove the alias or tag"
    assert old == f"FAILED  {root / INDEX_FILE}: the alias last is of runs/old/adapter, {lost}"
    assert "the alias prod is of runs/new/adapter" in new
    assert read_index(root).aliases == content.aliases and read_index(root).tags == {("runs/new/adapter", "good")}
    assert "prod names runs/new/adapter, which is not in the index; " in refusal(find_entry, root, "prod")


def test_an_index_that_cannot_be_read_is_kept(root: Path, said: Said) -> None:
    """Its labels may be of use to somebody. One of an earlier format had none."""
    with sqlite3.connect(root / INDEX_FILE) as database:
        database.execute("CREATE TABLE more (x)")
    raw, aside = (root / INDEX_FILE).read_bytes(), root / f"{INDEX_FILE}.unreadable"
    assert f"{aside}: is the earlier index, whose aliases and tags could not be read" in said(status=1)[0]
    assert aside.read_bytes() == raw
    with sqlite3.connect(root / INDEX_FILE) as database:
        database.execute("PRAGMA user_version = 2")
    assert said()[0].startswith("indexed 6 adapters")
    assert {file.name for file in root.glob(f"{INDEX_FILE}*")} == {INDEX_FILE, aside.name}


def test_changes_at_once_are_all_made(root: Path) -> None:
    def change(number: int) -> None:
        if number % 4 == 0:
            build_index(root)
        with changed_index(root) as content:
            content.aliases[f"a{number}"] = "runs/new/adapter"
            content.tags.add(("runs/old/adapter", f"t{number}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(8)))
    content = read_index(root)
    assert len(content.aliases) == len(content.tags) == 8 and len(content.entries) == 6


def test_an_index_does_not_list_what_gc_deletes_meanwhile(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index that is written anew may take long, and gc may run in between."""
    with changed_index(root) as content:
        content.aliases["prod"] = "runs/new/adapter"
    read, threads = collection.read_entry, list[Thread]()

    def slow(*given: Path) -> Any:
        entry = read(*given)
        if not threads:
            threads.append(Thread(target=call, args=("index", [str(root), "gc", "--delete"])))
            threads[0].start()
            threads[0].join(1)
        return entry

    monkeypatch.setattr(collection, "read_entry", slow)
    build_index(root)
    threads[0].join()
    assert not (root / "runs/nobody").exists()
    assert [entry.name for entry in read_index(root).entries] == ["plain", "middle", "new", "old"]


def test_an_earlier_format_says_what_to_do(root: Path) -> None:
    with sqlite3.connect(root / INDEX_FILE) as database:
        database.execute("PRAGMA user_version = 2")
    said = f"{root / INDEX_FILE}: has format 2, not 3; write it with `tiedlora index {root}`"
    for words in ("find", "verify", "diff old new", "lineage new", "gc"):
        assert refusal(call, "index", [str(root), *words.split()]) == said


def test_data_are_found_by_each_name_and_hash(root: Path, said: Said) -> None:
    names = {"old": ["data/pr\u00fcfung.jsonl", "all/rows.jsonl"], "middle": ['a "b", c\\d: e', "tab\there"],
             "new": ["\udc80"]}  # fmt: skip
    for name, sources in names.items():
        edit_record(root / "runs" / name, {DATA_HASHES: {one: f"{i}" * 64 for i, one in enumerate(sources)}})
    said()
    for wanted, found in {
        "data/pr\u00fcfung.jsonl": ["old"], "rows.jsonl": ["nobody"], "*rows.jsonl": ["nobody", "old"], "\t": [],
        "0" * 64: ["middle", "new", "old"], "1" * 64: ["middle", "old"], 'a "b", c\\d: e': ["middle"],
        "tab\there": ["middle"], "*: *": ["middle"], "d*": ["nobody", "old"],
    }.items():  # fmt: skip
        assert [json.loads(line)["name"] for line in said("find", "--json", f"--data={wanted}")] == found, wanted
    assert "pr\u00fcfung" in said("lineage", "old")[-1], "as it is written"
    (root / "runs/old/run.yaml").write_text(f"{DATA_HASHES}: [2020-01-01]")
    assert "runs/old/adapter: data = ['2020-01-01'] has the wrong type: " in said(status=1)[0]


@pytest.mark.parametrize("words", [[], ["find"], ["gc"], ["tag", "old", "new"]])
def test_a_missing_folder_is_not_made(tmp_path: Path, words: list[str]) -> None:
    assert "no such f" in refusal(call, "index", [str(tmp_path / "none"), *words])
    assert not os.listdir(tmp_path)


def columns(line: str) -> list[str]:
    return [word.strip() for word in line.split("  ") if word.strip()]


def test_the_lineage_of_an_adapter(root: Path, said: Said) -> None:
    """By hash: folders may move, and the start may be a checkpoint."""
    shutil.move(root / "runs/old", root / "archive/old")
    build_index(root)
    step = file_sha256(root / "archive/old/checkpoints/step_3" / WEIGHTS)
    middle, plain = (file_sha256(root / path / WEIGHTS) for path in ("runs/middle/adapter", "others/plain"))
    first, *steps, base, data = map(columns, said("lineage", "new"))
    assert first == ["adapter", "runs/new/adapter", file_sha256(root / "runs/new/adapter" / WEIGHTS)]
    assert steps == [["started from", "runs/middle/adapter", middle], ["started from", "archive/old/adapter", step],
                     ["started from", "others/plain", plain]]  # fmt: skip
    entry = find_entry(root, "new")
    assert base == ["base", entry.base_model, f"config {entry.base_hash}, weights {entry.weights_hash}"]
    assert data == ["data", json.dumps(DATA)]
    assert ["was the start of", "runs/middle/adapter", middle] in map(columns, said("lineage", "old"))
    shutil.copytree(root / "runs/middle/adapter", root / "copy")
    shutil.rmtree(root / "archive")
    build_index(root)
    _, copied, *_ = map(columns, said("lineage", "copy"))
    assert copied[1].endswith("runs/old/checkpoints/step_3 (not in the index)") and copied[2] == step
    _, both, *_ = map(columns, said("lineage", "new"))
    assert both[1] == "copy, runs/middle/adapter"


def test_a_lineage_in_a_circle_ends(root: Path, said: Said) -> None:
    """Only a wrong record can have one."""
    first, second = (find_entry(root, name).sha256 for name in ("middle", "new"))
    for name, sha256 in {"middle": second, "new": first}.items():
        edit_record(root / "runs" / name, {START_HASH: sha256})
    build_index(root)
    starts = [columns(line)[1] for line in said("lineage", "new") if line.startswith("started from")]
    assert starts == ["runs/middle/adapter", "runs/new/adapter"]
    said("alias", "prod", "new")
    assert len([line for line in said("gc") if "  " in line]) == 4


def test_gc_deletes_what_no_alias_needs(root: Path, said: Said) -> None:
    assert "has no alias, so gc would delete every adapter; " in refusal(call, "index", [str(root), "gc"])
    said("alias", "prod", "new")
    before = files_of(root).keys()
    alone, nobody, summary = said("gc")
    assert alone.endswith(f" kB  {root / 'others/alone'}") and nobody.endswith(f" kB  {root / 'runs/nobody'}")
    assert summary.startswith("2 folders of ") and summary.endswith("not needed; delete them with --delete")
    assert before <= files_of(root).keys()
    said("tag", "alone", "keep")
    assert said("gc", "--delete")[-1].endswith("kB deleted")
    assert before - files_of(root).keys() == {path for path in before if path.startswith("runs/nobody")}
    assert [entry.name for entry in read_index(root).entries] == ["alone", "plain", "middle", "new", "old"]
    said("alias", "prod", "plain"), said("tag", "alone", "keep", "--remove")
    assert len(said("gc", "--delete")) == 5
    assert {path for path in files_of(root) if path.endswith(CONFIG)} == {f"others/plain/{CONFIG}"}
    assert [entry.name for entry in read_index(root).entries] == ["plain"]


def test_gc_keeps_the_start_of_an_earlier_version_s_run_by_its_name(root: Path, said: Said) -> None:
    """Such a run recorded no hash."""
    edit_record(root / "runs/middle", {"init_from": "../moved/old/checkpoints/step_2", START_HASH: None})
    said("alias", "prod", "new")
    assert [line.rpartition("/")[2] for line in said("gc")[:-1]] == ["alone", "nobody"]


@pytest.mark.parametrize(
    ("name", "content", "said_of_it"),
    [
        ("notes.txt", "", "/notes.txt: is not a file of the adapter or its run; move it away, or delete it by hand"),
        ("adapter/notes.txt", "", "/adapter/notes.txt: is not a file"),
        ("logs/out", Path(), "/logs/out: is not a file"),  # a link
        ("run_status.json", '{"state": "stopped"}', ": this run has not ended and may be resumed; delete it by hand"),
        ("run_status.json", None, ": this run has not ended"),
    ],
)
def test_gc_keeps_what_is_not_only_a_run(root: Path, said: Said, name: str, content: Any, said_of_it: str) -> None:
    file = root / "runs/nobody" / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if isinstance(content, Path):
        file.symlink_to(root / "runs/new")
    elif content is not None:
        file.write_text(content)
    said("alias", "prod", "new"), said("tag", "alone", "keep")
    before = files_of(root).keys()
    kept, summary = said("gc", "--delete", status=1)
    assert kept.startswith(f"kept: {root}/runs/nobody{said_of_it}") and summary == "0 folders of 0 B deleted"
    assert before <= files_of(root).keys() and len(read_index(root).entries) == 6


def test_gc_keeps_what_is_in_use(root: Path, said: Said) -> None:
    said("alias", "prod", "new"), said("tag", "alone", "keep")
    for place in (root / "runs/nobody", root / "runs", root, root.parent):
        with take_folder(place, hint=""):
            for words in ([], ["--delete"]):
                kept, _ = said("gc", *words, status=len(words))
                assert "is using this folder" in kept and kept.startswith(f"kept: {place}: a launch on")
    assert (root / "runs/nobody/adapter").is_dir()
    assert len(said("gc", "--delete")) == 2 and not (root / "runs/nobody").exists()


def test_gc_does_not_follow_links_or_delete_the_folder_itself(root: Path, said: Said, tmp_path: Path) -> None:
    run = Path(shutil.copytree(root / "runs/nobody", tmp_path / "run"))
    shutil.copytree(root / "others/alone", run / "alone")
    build_index(run)
    assert call("index", [str(run), "alias", "prod", "alone"]) == 0 and call("index", [str(run), "gc", "--delete"]) == 1
    (root / "outside").symlink_to(run)
    said("alias", "prod", "new"), said("gc", "--delete")
    assert (run / "adapter" / CONFIG).is_file()


def test_gc_needs_every_labelled_adapter(root: Path, said: Said) -> None:
    """What one that is missing was started from is unknown."""
    said("alias", "prod", "new"), said("alias", "other", "alone")
    config, away = root / "runs/new/adapter" / CONFIG, root / "config"
    config.rename(away)
    before = files_of(root).keys()
    message = refusal(call, "index", [str(root), "gc", "--delete"])
    assert "the alias prod is of runs/new/adapter, which is not indexed" in message
    build_index(root / "others")
    away.rename(config)
    message = refusal(call, "index", [str(root), "gc"])
    assert f"{root / 'others' / INDEX_FILE}: its aliases would not be kept; " in message
    (root / "others" / INDEX_FILE).unlink(), config.rename(away)
    said("alias", "prod", "--remove")
    with changed_index(root) as content:
        content.tags.add(("runs/new/adapter", "keep"))
    assert "the tag keep is of runs/new/adapter" in refusal(call, "index", [str(root), "gc", "--delete"])
    assert before <= files_of(root).keys()


def test_gc_needs_to_read_every_adapter(root: Path, said: Said) -> None:
    """`new` was started from `middle`, and what `middle` was started from is in the files that cannot be read."""
    said("alias", "prod", "new")
    (root / "runs/middle/adapter" / CONFIG).write_text("{")
    before = files_of(root).keys()
    for words in ([], ["--delete"]):
        message = refusal(call, "index", [str(root), "gc", *words])
        assert message.startswith(f"{root / 'runs/middle/adapter' / CONFIG}: not valid JSON")
        assert message.endswith("(gc must know from what it was started; mend it, or move its folder away)")
    assert before <= files_of(root).keys()
    shutil.rmtree(root / "runs/middle")
    assert [line.rpartition("/")[2] for line in said("gc")[:-1]] == ["alone", "plain", "nobody", "old"]


def test_gc_keeps_a_run_with_another_adapter_in_it(root: Path, said: Said) -> None:
    mine, thesis = root / "runs/nobody/peft/mine", root / "runs/nobody/logs/thesis.txt"
    shutil.copytree(root / "others/alone", mine)
    thesis.parent.mkdir()
    thesis.touch()
    said(), said("alias", "prod", "new"), said("alias", "best", "mine")
    before = files_of(root).keys()
    is_in = f"kept: {root}/runs/nobody: the adapter runs/nobody/peft/mine is in it; move it out"
    for words in ([], ["--delete"]):
        kept, summary = said("gc", *words, status=len(words))
        assert kept.startswith(is_in) and summary.startswith("0 folders") and before <= files_of(root).keys()
    said("alias", "best", "--remove"), said("tag", "alone", "keep"), said("tag", "mine", "keep")
    assert said("gc")[0].startswith(is_in)
    shutil.move(mine, root / "mine")
    said(), said("gc", "--delete")
    assert not thesis.exists(), "the folders of a run are deleted with all that they contain"


def test_gc_keeps_the_runs_of_a_sweep_that_has_not_ended(root: Path, said: Said) -> None:
    """Between the jobs of a sweep on Slurm nothing locks its folder, which may be above the index. A file called
    sweep.yaml alone is no sweep's."""
    said("alias", "prod", "new"), said("tag", "alone", "keep")
    (study := root.parent).joinpath("sweep.yaml").touch()
    assert said("gc")[0].endswith("/runs/nobody")
    (study / "base.json").touch()
    kept = f"kept: {root}/runs/nobody: its sweep in {study} has not ended and may be resumed; delete it by hand"
    before = files_of(root).keys()
    assert said("gc", "--delete", status=1)[0].startswith(kept)
    (study / "sweep_status.json").write_text('{"state": "stopped"}')
    assert said("gc", "--delete", status=1)[0].startswith(kept) and before <= files_of(root).keys()
    (study / "sweep_status.json").write_text('{"state": "failed"}')
    assert said("gc", "--delete")[0].endswith("/runs/nobody") and not before <= files_of(root).keys()


def test_a_killed_gc_leaves_no_half_adapter(root: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    said("alias", "prod", "new"), said("tag", "alone", "keep")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        call("index", [str(root), "gc", "--delete"])
    (left,) = (root / "runs").glob(".*")
    assert not (root / "runs/nobody").exists() and (left / "nobody/adapter" / CONFIG).is_file()
    assert said()[0].startswith("indexed 5 adapters")
    assert said("gc", "--delete") == ["0 folders of 0 B deleted"] and not left.exists()


def test_an_export_is_deleted_as_a_whole(root: Path, said: Said) -> None:
    export = root / "exports/one"
    shutil.copytree(root / "others/alone", export / "native")
    for name in (CONFIG, WEIGHTS, "tiedlora_export.json"):
        (export / name).write_text("{}")
    (export / CONFIG).write_text('{"peft_type": "LORA"}')
    said("alias", "prod", "new"), said("gc", "--delete")
    assert not export.exists() and (root / "exports").is_dir() and not (root / "others/alone").exists()
    assert os.listdir(root / "others") == ["plain"]
