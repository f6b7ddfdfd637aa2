"""The inputs of every conversion: a native adapter, and the base that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_tiedlora.base.checksums import UNSEALED_NOTE
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.base_identity import (
    HASH_FIELDS,
    MERGE_RECORD,
    BaseIdentity,
    base_differences,
    check_same_base,
    identify_model,
    linears_dtype,
    quantised_otherwise,
)
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, PEFT_TYPE, NativeAdapter, load_adapter
from megatron_tiedlora.checkpoint.resume import LATEST_FILE
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.find_base import find_base

EXPORT_RECORD = "tiedlora_export.json"  # in an exported PEFT folder: what its native adapter is, and the base
BASE_PATH = "base_path"  # in that record: the base's folder on the host that exported
NATIVE_FOLDER = "native"  # in an exported PEFT folder: the two files of that adapter


def adapter_kind(folder: Path | str, *, flag: str | None = None) -> Literal["native", "peft"]:
    """Which kind of adapter a folder holds. `flag` is the flag with its value, as given [--adapter FOLDER].

    Raises:
        UserError: it holds no adapter; for a run or model folder the message says what to give instead.
    """
    path, flag = user_path(folder), flag or f"--adapter {folder}"
    if path.is_file() and path.name == LATEST_FILE:
        raise UserError(f"{flag}: this file names the newest checkpoint; give its folder, {path.parent}/step_N")
    if not path.is_dir():
        raise UserError(f"{flag}: no such folder; give a run's adapter/ or checkpoints/step_N, or a PEFT adapter")
    if not (path / CONFIG_FILE).is_file():
        if (path / LATEST_FILE).is_file():
            raise UserError(f"{flag}: this is a folder of checkpoints; give one of them, {Path(folder) / 'step_N'}")
        if (path / "adapter" / CONFIG_FILE).is_file():
            raise UserError(f"{flag}: this is a run folder; give {Path(folder) / 'adapter'}")
        if (path / "config.json").is_file():
            raise UserError(f"{flag}: this is a model folder; give it with --model")
        raise UserError(f"{flag}: has no {CONFIG_FILE}; give the folder of a native or PEFT adapter")
    content = read_json_object(path / CONFIG_FILE, kind="an adapter folder")
    if is_peft(content):
        return "peft"
    if "format_version" in content:
        return "native"
    raise UserError(f"{path / CONFIG_FILE}: neither a native adapter (format_version) nor a PEFT one (peft_type)")


def is_peft(content: Mapping[str, Any]) -> bool:
    """Whether the fields of an adapter_config.json are those of a PEFT adapter."""
    return content.get("peft_type", PEFT_TYPE) != PEFT_TYPE


def open_inputs(adapter: str, model: str | None) -> tuple[ModelSource, NativeAdapter]:
    """The adapter in the folder `adapter`, and its base: `model`, or else the one that the adapter names.

    `check_base` checks whether that is the base that it was trained on.

    Raises:
        UserError: the adapter or the base does not exist, or it is a PEFT adapter.
    """
    adapter_kind(adapter)
    folder = user_path(adapter)
    native = load_adapter(folder)
    return find_base(folder, model, native.base.base_model, asdict(native.base)), native


Identify = Callable[[ModelSource, str, str | None], BaseIdentity]


class CheckedBase(NamedTuple):
    """The base that an adapter belongs to, or is used with nevertheless (--base_differs).

    Attributes:
        record: the fields that describe it in the record of a converted adapter or model.
        notes: what a user should know about it.
    """

    record: dict[str, Any]
    notes: tuple[str, ...]


def check_base(
    source: ModelSource,
    adapter: NativeAdapter,
    *,
    tokenizer: str | None = None,
    uses_tokenizer: bool = True,
    differs: bool = False,
    base_format: str | None = None,
    flag: str = "--adapter",
    identify: Identify = identify_model,
) -> CheckedBase:
    """Compare `source` with the base that `adapter` was trained on, by its config, weights and tokenizer.

    Args:
        tokenizer: the tokenizer in use, if it is not the base's own.
        uses_tokenizer: False if nothing is tokenised; an adapter that was trained with its own tokenizer then fits
            any.
        differs: value of --base_differs.
        base_format: the storage format in which the base is used; None for that of --dtype.
        flag: the adapter's name in messages.
        identify: for a caller that checks many adapters of one base.

    Raises:
        UserError: config, weights or tokenizer differ without `differs`, are missing, or are incomplete.
    """
    used = base_format or source.stored_base
    stored = stored_precision(source) if used is not None and adapter.base.base_stored is not None else None
    found = replace(identify(source, adapter.base.dtype, tokenizer), base_format=used, base_stored=stored)
    if not uses_tokenizer and adapter.base.tokenizer is not None:
        trained = adapter.base
        found = replace(found, tokenizer=trained.tokenizer, tokenizer_hash=trained.tokenizer_hash)
    merged = (source.weights_folder() / MERGE_RECORD).is_file()
    if merged and found.base_weights_hash != adapter.base.base_weights_hash and not differs:
        raise UserError(f"{source.name}: an adapter is merged into it already; give the plain base with --model")
    notes = check_same_base(adapter.base, found, source=flag, differs=differs)
    if not adapter.sealed:
        notes += (f"{flag}: {UNSEALED_NOTE}",)
    record = {name: getattr(found, name) for name in HASH_FIELDS}
    if differences := base_differences(adapter.base, found):
        record["base_differs"] = list(differences)
    return CheckedBase(record, notes)


def stored_precision(source: ModelSource) -> str | None:
    """`linears_dtype` of a model on the disk; None if it is quantised there. Raises UserError if it cannot be read."""
    if source.stored is not None:
        return None
    with BaseWeights(source.weights_folder(), source.shape) as weights:
        return linears_dtype(weights, source.shape)


def trained_otherwise(source: ModelSource, adapter: NativeAdapter) -> str:
    """Says, with what to do, that `source` is quantised to other values than training saw; '' if not, or if unknown.

    `source` has passed `check_base`.
    """
    trained = adapter.base
    if trained.base_stored is None:
        return ""
    found = replace(trained, base_model=source.name, base_stored=stored_precision(source))
    otherwise = quantised_otherwise(trained, found)
    return otherwise and f"{otherwise}; give the model in {trained.base_stored} with --model"
