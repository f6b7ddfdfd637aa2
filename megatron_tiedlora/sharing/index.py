"""An index of the native adapters in a folder: one SQLite file, which other programs can read too."""

from __future__ import annotations

import json
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_tiedlora.base.atomic import new_file
from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.file_hash import file_sha256
from megatron_tiedlora.base.json_files import read_json_or_none
from megatron_tiedlora.base.yaml_files import read_yaml_mapping
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter, read_config
from megatron_tiedlora.convert.inputs import EXPORT_RECORD, NATIVE_FOLDER, adapter_kind
from megatron_tiedlora.runtime.run_folder import RunFolder

INDEX_FILE = "adapters.sqlite"
FORMAT = 1  # of the file, its `user_version`


@dataclass(frozen=True)
class Entry:
    """A row of the index.

    Attributes:
        path: the adapter's folder, relative to the indexed one.
        name: the run's name, or the folder's.
        base_hash, weights_hash: of its base's config and weights; the second is None if it is unknown.
        targets: names, with commas.
        parameters: how many are trained.
        task: of its run; None if it lies outside of one.
        scores: of its run after training, as JSON.
        sha256: of the file of its tensors, as its config says.
        size: of its files, in bytes.
        date: when its config was written, in ISO 8601 and UTC.
    """

    path: str
    name: str
    base_model: str
    base_hash: str
    weights_hash: str | None
    method: str
    rank: int
    alpha: float
    targets: str
    layers: int
    parameters: int
    task: str | None
    scores: str | None
    run: str | None
    sha256: str
    size: int
    date: str


_COLUMNS = tuple(field.name for field in fields(Entry))
FILTERS = ("name", "base_model", "method", "rank", "targets", "task")  # what `find` compares


def read_entry(root: Path, folder: Path) -> Entry:
    """The row of the native adapter in `folder`, which is `root` or below it.

    Raises:
        UserError: its config, or the files of its run, cannot be read.
    """
    config, base, sums = read_config(folder)
    weights, run = folder / WEIGHTS_FILE, RunFolder(folder.parent)
    in_run = folder != root and folder.name == "adapter" and run.is_run
    settings = read_yaml_mapping(run.settings) if in_run else {}
    scores = (read_json_or_none(run.scores) or {}).get("after") if in_run else None
    try:
        written, size = (folder / CONFIG_FILE).stat(), weights.stat().st_size
    except OSError as error:
        raise UserError(f"{weights}: cannot be read ({error.strerror or error})") from None
    task = settings.get("task")
    if not (task is None or isinstance(task, str)):
        raise UserError(f"{run.settings}: task = {shown(task)} is not a name")
    named = folder.parent if folder.name in ("adapter", NATIVE_FOLDER) else folder
    for name in (named.name, str(folder)):
        if not name.isprintable():
            raise UserError(f"{folder}: its name has characters that cannot be shown; rename it")
    return Entry(
        path=str(folder.relative_to(root)),
        name=named.name,
        base_model=base.base_model,
        base_hash=base.base_hash,
        weights_hash=base.base_sample,
        method=config.method,
        rank=config.rank,
        alpha=config.alpha,
        targets=",".join(target.name for target in config.targets),
        layers=len(config.layers),
        parameters=sum(config.num_trained().values()),
        task=task,
        scores=None if scores is None else json.dumps(scores),
        run=str(folder.parent.relative_to(root)) if in_run else None,
        sha256=sums.get(WEIGHTS_FILE) or file_sha256(weights),
        size=size + written.st_size,
        date=datetime.fromtimestamp(written.st_mtime, UTC).isoformat(timespec="seconds"),
    )


def find_folders(root: Path) -> Iterator[Path]:
    """The folders of adapters in `root` and below, native or not, without those that a run has besides: checkpoints and
    exports. Hidden folders, in which something is being written, are left out, and links are not followed."""
    for file in sorted(root.rglob(CONFIG_FILE)):
        folder = file.parent
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue
        in_export = folder.name == NATIVE_FOLDER and (folder.parent / EXPORT_RECORD).is_file()
        run = RunFolder(folder.parent.parent)
        if not (run.is_run and (in_export or folder.parent.name == run.checkpoints.name)):
            yield folder


def build_index(root: Path, *, progress: bool = False) -> tuple[int, list[str]]:
    """Write the index of the adapters below `root` atomically, in place of an earlier one.

    Returns:
        how many adapters it has, and a sentence for each that could not be read.

    Raises:
        UserError: `root` is not a folder, or cannot be written.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    entries, problems = [], []
    for folder in tqdm(find_folders(root), desc="index", unit="adapter", disable=not progress, leave=False):
        try:
            if adapter_kind(folder, flag=str(folder)) == "native":
                entries.append(read_entry(root, folder))
        except UserError as error:
            problems.append(str(error))
    try:
        with new_file(root / INDEX_FILE) as temporary, closing(sqlite3.connect(temporary)) as database:
            columns = ", ".join(f"{name} PRIMARY KEY" if name == "path" else name for name in _COLUMNS)
            database.execute(f"CREATE TABLE adapters ({columns})")
            database.execute(f"PRAGMA user_version = {FORMAT}")
            places = ", ".join("?" * len(_COLUMNS))
            database.executemany(f"INSERT INTO adapters VALUES ({places})", map(astuple, entries))
            database.commit()
    except sqlite3.Error as error:
        raise UserError(f"{root / INDEX_FILE}: cannot be written ({error})") from None
    return len(entries), problems


def find_entries(root: Path, wanted: Mapping[str, Any]) -> list[Entry]:
    """The rows of the index of `root` in which every column of `wanted` matches, ordered by path.

    Texts are patterns with `*` and `?`. Targets must be the same set.

    Raises:
        UserError: there is no index, or it cannot be read.
    """
    terms, values = ["1"], []
    for name, value in wanted.items():
        if name not in FILTERS:
            raise ValueError(name)
        terms.append(f"{name} GLOB ?" if isinstance(value, str) else f"{name} = ?")
        values.append(value)
    return _select(root, " AND ".join(terms), values)


def find_entry(root: Path, name: str) -> Entry:
    """The row of one adapter, by its path or its name. Raises UserError if there is none, or more than one."""
    found = _select(root, "path = ?", [name]) or _select(root, "name = ?", [name])
    if len(found) != 1:
        what = "no adapter" if not found else f"{len(found)} adapters; give one's path"
        raise UserError(f"{root / INDEX_FILE}: {as_given(name)} names {what}")
    return found[0]


def _select(root: Path, condition: str, values: Sequence[Any]) -> list[Entry]:
    file = root / INDEX_FILE
    if not file.is_file():
        raise UserError(f"{file}: no such file; write it with `tiedlora index {shlex.quote(str(root))}`")
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise UserError(f"{file}: has format {version}, not {FORMAT}; write it again")
            columns = ", ".join(_COLUMNS)
            rows = database.execute(f"SELECT {columns} FROM adapters WHERE {condition} ORDER BY path", values)
            return [Entry(*row) for row in rows]
    except sqlite3.Error as error:
        raise UserError(f"{file}: cannot be read ({error}); write it again") from None


def _identity(entry: Entry) -> Entry:
    """The row without what may change although the adapter does not."""
    return replace(entry, scores=None, task=None, run=None, date="", size=0)


def verify_entries(root: Path, entries: Sequence[Entry], *, progress: bool = False) -> list[str]:
    """A sentence for each adapter that cannot be read, has another checksum than its config, or has changed since it
    was indexed."""
    problems = []
    for entry in tqdm(entries, desc="verify", unit="adapter", disable=not progress, leave=False):
        folder = root / entry.path
        try:
            load_adapter(folder)
            if _identity(read_entry(root, folder)) != _identity(entry):
                problems.append(f"{folder}: has changed since it was indexed")
        except UserError as error:
            problems.append(str(error))
    return problems
