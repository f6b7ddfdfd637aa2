"""Exports many native adapters to PEFT in one call. What their bases have in common is read once."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, load_native_adapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.export_peft import base_location, export_peft
from megatron_tiedlora.convert.inputs import NATIVE_FOLDER, adapter_kind, find_base
from megatron_tiedlora.convert.serving import Export

_UNNAMED = ("adapter", NATIVE_FOLDER)  # folders of adapters that are named after the folder around them


def find_adapters(given: Sequence[str], *, flag: str = "--adapter", runs: bool = False) -> list[Path]:
    """The folders that the values of --adapter name; a value may be a pattern such as `runs/*/adapter`.

    Args:
        runs: a value may also name runs, or folders of runs; their adapters are then found.

    Raises:
        UserError: a pattern matches no adapter. A folder that is no adapter is found when it is read.
    """
    found: dict[Path, None] = {}
    for value in given:
        path = user_path(value)
        if path.exists() or not glob.has_magic(value):
            found |= dict.fromkeys((_in_runs(path) if runs else []) or [path])
            continue
        matches = [Path(match) for match in sorted(glob.glob(str(path)))]
        if runs:
            adapters = [adapter for match in matches for adapter in _in_runs(match)]
        else:
            adapters = [match for match in matches if (match / CONFIG_FILE).is_file()]
        if not adapters:
            raise UserError(f"{flag} {value}: matches no folder of an adapter")
        found |= dict.fromkeys(adapters)
    return list(found)


def _in_runs(folder: Path) -> list[Path]:
    """The adapters of a folder: itself, that of a run, or those of the runs in it; none if it has none."""
    if (own := _adapter_of(folder)) is not None:
        return [own]
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    return [adapter for path in inner if (adapter := _adapter_of(path)) is not None]


def _adapter_of(folder: Path) -> Path | None:
    """The folder itself, or `adapter` in it; None if neither holds an adapter."""
    return next((path for path in (folder, folder / "adapter") if (path / CONFIG_FILE).is_file()), None)


def output_names(adapters: Iterable[Path]) -> dict[Path, str]:
    """The name of each adapter's export: that of its folder, or of the run around `adapter`.

    Raises:
        UserError: two have the same name.
    """
    names: dict[str, Path] = {}
    for adapter in adapters:
        name = adapter_name(adapter)
        other = names.setdefault(name, adapter)
        if other != adapter:
            raise UserError(f"--adapter: {other} and {adapter} would both be exported as {name}; rename one")
    return {adapter: name for name, adapter in names.items()}


def adapter_name(adapter: Path) -> str:
    """The name of an adapter's folder, or of the run around `adapter`."""
    named = Path(os.path.abspath(adapter))  # without '..', which names no folder
    while named.name in _UNNAMED:
        named = named.parent
    return named.name


def export_all(
    adapters: Sequence[Path],
    model: str | None,
    output: Path,
    *,
    say: Callable[[str], object] = str,
    options: Mapping[str, Any],
) -> list[tuple[ModelSource, dict[str, Export]]]:
    """Export each adapter into a folder of its own in `output`, with a bar. Returns the exports of each base, by name.

    Args:
        model: value of --model.
        say: called with each note, which names its adapter.
        options: arguments of `export_peft` that hold for all.

    Raises:
        UserError: as `export_peft`; or an output exists, before anything is written. The exports before an error stay.
    """
    names = output_names(adapters)
    there = [name for name in names.values() if (output / name).exists()]
    if there:
        raise UserError(f"--output {output}: {there[0]} is there already; remove it, or give another folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}; give a folder that can be written") from None

    @cache
    def base_of(named: str, *hashes: str | None) -> ModelSource:
        kinds = ("base_hash", "base_weights_hash", "base_sample")
        return find_base(output, model, named, dict(zip(kinds, hashes, strict=True)))

    identify, of_bases = cache(identify_model), dict[str, tuple[ModelSource, dict[str, Export]]]()
    for adapter, name in progress_bar("export", "adapter", names.items()):
        try:
            if adapter_kind(adapter) != "native":
                raise UserError(f"{adapter}: this is a PEFT adapter already")
            native = load_native_adapter(adapter)
            base = native.base
            source = base_of(base.base_model, base.base_hash, base.base_weights_hash, base.base_sample)
            notes: list[str] = []
            rank = export_peft(
                source, native, output / name, native=adapter, say=notes.append, identify=identify, **options
            )
        except UserError as error:
            text = str(error)
            raise UserError(text if str(adapter) in text else f"{adapter}: {text}") from None
        for note in notes:
            say(note.replace("--adapter", str(adapter), 1))
        exported = Export(output / name, rank, [target.name for target in native.config.targets])
        of_bases.setdefault(base_location(source), (source, {}))[1][name] = exported
    return list(of_bases.values())
