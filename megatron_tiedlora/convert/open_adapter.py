"""Opens an adapter of any kind with its base: a native adapter, a checkpoint of a run, or a PEFT folder; and writes the
last as a native adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_or_none
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.base_identity import FORMAT_FIELDS, MERGE_RECORD
from megatron_tiedlora.checkpoint.native_adapter import (
    CONFIG_FILE,
    NativeAdapter,
    copy_adapter_files,
    write_adapter_files,
)
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.find_base import find_base
from megatron_tiedlora.convert.import_peft import exported_base, read_peft, read_peft_config
from megatron_tiedlora.convert.inputs import (
    BASE_PATH,
    EXPORT_RECORD,
    NATIVE_FOLDER,
    adapter_kind,
    check_base,
    open_inputs,
)


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter, and the model that it is used with; `check_base` checks whether that is its base.

    Attributes:
        adapter: if it is a PEFT adapter, its base is the one that it was exported for. If its files do not record one,
            it is the model.
        kind: what its folder holds.
        recorded: whether its files record its base.
        notes: what a user should know about it.
    """

    source: ModelSource
    adapter: NativeAdapter
    kind: Literal["native", "peft"]
    recorded: bool = True
    notes: tuple[str, ...] = ()


def open_adapter(
    given: str, model: str | None, *, tokenizer: str | None = None, longest: int = 0, differs: bool = False
) -> OpenedAdapter:
    """The adapter in the folder `given` to --adapter, and its base: `model`, or else the one that the adapter names.

    Args:
        tokenizer: the tokenizer in use, if it is not the base's own.
        longest: value of --max_length, checked before a weight is read; 0 if there is none.
        differs: value of --base_differs.

    Raises:
        UserError: the adapter or the base does not exist, cannot be read, or does not fit the other.
    """
    if adapter_kind(given) == "native":
        source, native = open_inputs(given, model)
        source.check_length("--max_length", longest)
        return OpenedAdapter(source, native, "native")
    folder = user_path(given)
    source = find_peft_base(folder, model)
    source.check_length("--max_length", longest)
    notes = check_peft_base(folder, source, differs=differs)
    content = read_peft(folder, source)
    adapter = content.of_base(source, tokenizer=tokenizer)
    trained = exported_base(folder, adapter.base)
    return OpenedAdapter(
        source,
        adapter if trained is None else replace(adapter, base=trained),
        "peft",
        recorded=trained is not None or content.native is not None,
        notes=(*notes, *content.notes),
    )


def import_peft(
    source: ModelSource,
    folder: Path,
    output: Path,
    *,
    base_differs: bool = False,
    say: Callable[[str], object] = str,
    new: Callable[[Path], AbstractContextManager[Path]] = new_output,
) -> AdapterConfig:
    """Write the PEFT adapter in `folder` as a native adapter folder of `source` atomically, and return its config.

    A native adapter that travelled along, and is the same, is copied byte for byte.

    Args:
        base_differs: write it although the adapter was trained on another base; a copied one keeps its own.
        say: called with each note.
        new: makes the output folder.

    Raises:
        UserError: the adapter cannot be read or is for another base, or the output exists.
    """
    reject_existing(output, flag=f"--output {output}")
    content = read_peft(folder, source)
    adapter = content.of_base(source)
    recorded = exported_base(folder, adapter.base)
    trained = adapter.base if content.native is not None or recorded is None else recorded
    own_base = replace(adapter, base=replace(trained, base_stored=None))  # an import quantises nothing
    base = check_base(
        source,
        own_base,
        uses_tokenizer=False,
        differs=base_differs,
        base_format=trained.base_format,  # an import uses the base in no format
        flag=f"--peft {folder}",
    )
    for note in (*check_peft_base(folder, source, differs=base_differs), *content.notes, *base.notes):
        say(note)
    if content.apart is not None:
        say(content.apart)
    with new(output) as temporary:
        if content.native is not None:
            copy_adapter_files(folder / NATIVE_FOLDER, temporary, content.native)
        else:
            kept = {name: getattr(trained, name) for name in ("tokenizer", "tokenizer_hash", *FORMAT_FIELDS)}
            own = replace(adapter.base, **kept)
            write_adapter_files(temporary, adapter.config, own, adapter.state)
    return adapter.config


def find_peft_base(folder: Path, model: str | None) -> ModelSource:
    """The base of a PEFT adapter: `model`, or else the one that it names. Raises UserError if there is none."""
    named = _named_base(folder)
    if not (model or named):
        raise UserError(f"{folder / CONFIG_FILE}: names no base model; give it with --model")
    return find_base(folder, model, named, _export_record(folder))


def check_peft_base(folder: Path, source: ModelSource, *, differs: bool = False) -> tuple[str, ...]:
    """Notes on a base that PEFT's files name otherwise. They are all that is known of it if this package did not write
    the folder.

    Raises:
        UserError: an adapter is merged into `source`, which the files do not name, and `differs` (--base_differs) is
            False.
    """
    named = _named_base(folder)
    same = _same_folder(source, named)
    if is_merged(source) and not same and not differs:
        raise UserError(f"{source.name}: an adapter is merged into it already; give the plain base with --model")
    if (folder / EXPORT_RECORD).is_file() or not named or named == source.name or same:
        return ()
    return (f"{folder} names the base {named}; PEFT files do not record whether {source.name} is the same",)


def is_merged(source: ModelSource) -> bool:
    """Whether an adapter was merged into a model."""
    return source.folder is not None and (source.folder / MERGE_RECORD).is_file()


def _named_base(folder: Path) -> str:
    """The path of the base on this host, or else its name in a PEFT folder; '' if there is none."""
    named = read_peft_config(folder).get("base_model_name_or_path")
    path = _export_record(folder).get(BASE_PATH)
    with suppress(UserError):  # it cannot be a path
        if isinstance(path, str) and (user_path(path).is_dir() or not isinstance(named, str)):
            return path
    return named if isinstance(named, str) else ""


def _export_record(folder: Path) -> dict[str, Any]:
    """The record of an export; empty if this package did not write the folder."""
    return read_json_or_none(folder / EXPORT_RECORD) or {}


def _same_folder(source: ModelSource, named: str) -> bool:
    with suppress(UserError):  # the name cannot be a path
        return user_path(named).resolve() == source.weights_folder().resolve()
    return False
