"""Reads all native adapters inside a folder, to index, verify and compare them."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_tiedlora.base.files import file_sha256, first_problem, read_json_or_none, read_yaml_mapping
from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.output_folder import numbered
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint import native_adapter
from megatron_tiedlora.config.cli import DATA_HASHES, START_HASH
from megatron_tiedlora.convert import index, inputs
from megatron_tiedlora.runtime.run_folder import RunFolder


def read_entry(root: Path, folder: Path) -> index.Entry:
    """Return the index row for the native adapter in `folder`, which is `root` or a folder inside it. Raise UserError
    if its config or the files of its run cannot be read, or if a value is not valid in a row."""
    config, base, sums = native_adapter.read_config(folder)
    weights, run = folder / native_adapter.WEIGHTS_FILE, RunFolder(folder.parent)
    in_run = folder != root and folder.name == "adapter" and run.is_run
    settings = read_yaml_mapping(run.settings) if in_run else {}
    scores = (read_json_or_none(run.scores) or {}).get("after") if in_run else None
    hashes = json.dumps(settings.get(DATA_HASHES), ensure_ascii=False, default=str).encode(errors="replace").decode()
    named = folder.parent if folder.name in ("adapter", inputs.NATIVE_FOLDER) else folder
    try:
        written = (folder / native_adapter.CONFIG_FILE).stat()
        return index.Entry(
            path=str(folder.relative_to(root)),
            name=named.name,
            **{name: getattr(base, name) for name in ("base_model", "base_hash")},
            weights_hash=base.base_sample,
            **{name: getattr(config, name) for name in ("method", "rank", "alpha")},
            targets=",".join(target.name for target in config.targets),
            layers=len(config.layers),
            parameters=sum(config.num_trained().values()),
            task=settings.get("task"),
            scores=None if scores is None else json.dumps(scores),
            run=str(folder.parent.relative_to(root)) if in_run else None,
            sha256=sums.get(native_adapter.WEIGHTS_FILE) or file_sha256(weights),
            init_from=settings.get("init_from"),
            init_sha256=settings.get(START_HASH),
            checkpoints=(",".join(_checkpoint_hashes(run)) or None) if in_run else None,
            data=hashes if DATA_HASHES in settings else None,
            size=weights.stat().st_size + written.st_size,
            date=datetime.fromtimestamp(written.st_mtime, UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        raise UserError(f"{folder}: {first_problem(error)}") from None
    except (OSError, OverflowError, ValueError) as error:  # the last two mean that the file's time is not a valid date
        raise UserError(f"{folder}: cannot be read ({error}); check its files") from None


def _checkpoint_hashes(run: RunFolder) -> Iterator[str]:
    for folder in sorted(run.checkpoints.glob("step_*")):
        with suppress(UserError):  # it is broken, so that no adapter can start from it
            _, _, sums = native_adapter.read_config(folder)
            yield from filter(None, [sums.get(native_adapter.WEIGHTS_FILE)])


def find_folders(root: Path) -> Iterator[Path]:
    """Yield the folders of native and PEFT adapters inside `root`, except checkpoints and exports of runs.

    Hidden folders are skipped, because they are still being written. Links are not followed. Raise UserError if `root`
    is not a folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder with adapters")
    for file in sorted(root.rglob(native_adapter.CONFIG_FILE)):
        folder = file.parent
        if any(part.startswith(".") for part in folder.relative_to(root).parts):
            continue
        in_export = folder.name == inputs.NATIVE_FOLDER and (folder.parent / inputs.EXPORT_RECORD).is_file()
        run = RunFolder(folder.parent.parent)
        if folder == root or not (run.is_run and (in_export or folder.parent.name == run.checkpoints.name)):
            yield folder


def build_index(root: Path) -> tuple[int, list[str]]:
    """Write the index of the adapters in `root` atomically. It replaces an earlier index, and keeps its aliases and
    tags.

    Return the number of adapters in the index, and a sentence for each adapter that could not be read and each label of
    no adapter. Raise UserError if `root` is not a folder, or cannot be written."""
    problems, file = list[str](), root / index.INDEX_FILE

    def earlier(root: Path) -> index.Index:
        try:
            return index.read_index(root)
        except index.EarlierFormat:
            pass
        except UserError as error:
            if os.path.lexists(file) and not file.is_dir():
                aside = next(one for one in numbered(Path(f"{file}.unreadable")) if not os.path.lexists(one))
                os.rename(file, aside)
                problems.append(f"{aside}: is the earlier index, whose aliases and tags could not be read: {error}")
        return index.Index(())

    with index.changed_index(root, earlier) as content:
        problems += read_adapters(root, content)
    return len(content.entries), [*problems, *content.problems(file)]


def read_adapters(root: Path, content: index.Index) -> list[str]:
    """Put the adapters in `root` and its subfolders into the index of `root`, which must be locked (`changed_index`).
    Remove tags of deleted adapters. Return a sentence for each adapter that cannot be read."""
    problems, entries = list[str](), list[index.Entry]()
    for folder in progress_bar("index", "adapter", find_folders(root)):
        try:
            if inputs.adapter_kind(folder, flag=str(folder)) == "native":
                entries.append(read_entry(root, folder))
        except UserError as error:
            problems.append(str(error))
    content.entries = entries
    content.tags = {(path, tag) for path, tag in content.tags if os.path.lexists(root / path)}
    return problems


def verify_entries(root: Path, entries: Sequence[index.Entry]) -> list[str]:
    """Return a sentence for each adapter that is damaged, or has changed since it was indexed."""
    problems = []
    may_change: dict[str, Any] = {"scores": None, "task": None, "run": None, "date": "", "size": 0, "init_from": None,
                                  "init_sha256": None, "checkpoints": None, "data": None}
    for entry in progress_bar("verify", "adapter", entries):
        try:
            folder = index.entry_folder(root, entry)
            native_adapter.load_native_adapter(folder)
            if replace(read_entry(root, folder), **may_change) != replace(entry, **may_change):
                problems.append(f"{folder}: has changed since it was indexed")
        except UserError as error:
            problems.append(str(error))
    return problems


def compare_adapters(one: Path, other: Path) -> list[str]:
    """Return a line for each field and each tensor that differs. Raise UserError if an adapter cannot be read."""
    first, second = native_adapter.load_native_adapter(one), native_adapter.load_native_adapter(other)
    mine, yours = _facts(first), _facts(second)
    lines = [f"{name}: {shown(mine[name])} and {shown(yours[name])}" for name in mine if mine[name] != yours.get(name)]
    for name in dict.fromkeys([*first.config.tensors, *second.config.tensors]):
        here, there = first.state.get(name), second.state.get(name)
        if here is None or there is None:
            lines.append(f"{name}: only in {one if there is None else other}")
        elif here.shape != there.shape:
            lines.append(f"{name}: shape {tuple(here.shape)} and {tuple(there.shape)}")
        elif (largest := float((here - there).abs().max())) > 0:
            lines.append(f"{name}: differs by up to {largest:.3g}, of {float(here.abs().max()):.3g}")
    return lines


def _facts(adapter: native_adapter.NativeAdapter) -> dict[str, Any]:
    config = adapter.config
    return {**config.facts, "seed": config.seed, **asdict(adapter.base_identity)}
