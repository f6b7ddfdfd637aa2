"""Finds the inputs of conversions: the kind of an adapter, and its base, by name or by the hashes of the models in a
folder. This module also checks whether a model is an adapter's base."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from megatron_tiedlora.base.files import UNSEALED_NOTE, read_json_object
from megatron_tiedlora.base.messages import UserError, count_text, user_path
from megatron_tiedlora.base.presets import is_preset
from megatron_tiedlora.checkpoint import base_identity, base_weights, resume
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, PEFT_TYPE, NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model

EXPORT_RECORD = "tiedlora_export.json"  # in an exported PEFT folder: describes the native adapter and the base
BASE_PATH = "base_path"  # in that record: the base's folder on the host that exported
NATIVE_FOLDER = "native"  # in an exported PEFT folder: the two files of the native adapter
_DEPTH = 4  # levels that are searched for models; the hub's cache has models--OWNER--NAME/snapshots/REVISION
_MODEL_CONFIG = "config.json"
_WEIGHT_HASHES = ("base_weights_hash", "base_sample")
_GIVE = "give the base, or a folder that contains it; it is found there by its hashes"


def adapter_kind(folder: Path | str, *, flag: str | None = None) -> Literal["native", "peft"]:
    """Return the kind of the adapter in a folder. Messages begin with `flag`, by default `--adapter FOLDER`.

    Raises:
        UserError: the folder holds no adapter. For a run or model folder the message names the folder or flag to give
        instead.
    """
    path, flag = user_path(folder), flag or f"--adapter {folder}"
    if path.is_file() and path.name == resume.LATEST_FILE:
        raise UserError(f"{flag}: this file names the newest checkpoint; give its folder, {path.parent}/step_N")
    if not path.is_dir():
        raise UserError(f"{flag}: no such folder; give a run's adapter/ or checkpoints/step_N, or a PEFT adapter")
    if not (path / CONFIG_FILE).is_file():
        if (path / resume.LATEST_FILE).is_file():
            raise UserError(f"{flag}: this is a folder of checkpoints; give one of them, {Path(folder) / 'step_N'}")
        if (path / "adapter" / CONFIG_FILE).is_file():
            raise UserError(f"{flag}: this is a run folder; give {Path(folder) / 'adapter'}")
        if (path / _MODEL_CONFIG).is_file():
            raise UserError(f"{flag}: this is a model folder; give it with --model")
        raise UserError(f"{flag}: has no {CONFIG_FILE}; give the folder of a native or PEFT adapter")
    content = read_json_object(path / CONFIG_FILE, kind="an adapter folder")
    if content.get("peft_type", PEFT_TYPE) != PEFT_TYPE:
        return "peft"
    if "format_version" in content:
        return "native"
    raise UserError(f"{path / CONFIG_FILE}: has neither format_version nor peft_type; give a native or PEFT adapter")


def find_base(folder: Path, model: ModelSource | str | None, named: str, hashes: Mapping[str, Any]) -> ModelSource:
    """Return the base of the adapter in `folder`. `model` names the base, or if `model` is None, the adapter does.

    Args:
        model: value of --model, or the model that was found for it. A folder of models is searched for `hashes`.
        named: the base's name in the adapter's files.
        hashes: `base_hash`, `base_weights_hash` and `base_sample` of the adapter's base, if they are known.

    Raises:
        UserError: the base cannot be found.
    """
    if isinstance(model, ModelSource):
        return model
    if model is not None:
        path = user_path(model)
        is_model = is_preset(model) or not path.is_dir() or (path / _MODEL_CONFIG).is_file()
        return find_model(model) if is_model else _find_by_hash(folder, model, hashes)
    try:
        return find_model(named)
    except UserError as error:
        hint = "give it with --model, or a folder of models, where it is found by its hashes"
        raise UserError(f"{folder}: its base cannot be found; {hint} ({error})") from None


def _find_by_hash(folder: Path, model: str, hashes: Mapping[str, Any]) -> ModelSource:
    """Return the model below the folder `model` that has these hashes. Raise UserError if there is none."""
    patterns = ("*/" * depth + _MODEL_CONFIG for depth in range(1, _DEPTH + 1))
    models = sorted(file.parent for pattern in patterns for file in user_path(model).glob(pattern))
    if not models:
        none = f"has no {_MODEL_CONFIG}, and no models in subfolders down to {_DEPTH} levels"
        raise UserError(f"--model {model}: {none}; {_GIVE}")
    wanted = {name: hashes[name] for name in _WEIGHT_HASHES if hashes.get(name) is not None}
    if not wanted or "base_hash" not in hashes:
        raise UserError(f"--model {model}: {folder} does not record its base's hashes; give the base's own folder")
    for path in models:
        with suppress(UserError):  # not a supported model
            source = find_model(str(path))
            if source.base_hash == hashes["base_hash"]:
                found = base_identity.identify_model(source, "fp32")
                if all(getattr(found, name) == value for name, value in wanted.items()):
                    return source
    held = count_text(len(models), "model")
    raise UserError(f"--model {model}: contains {held}, but not the base of {folder}; {_GIVE}")


def is_merged(source: ModelSource) -> bool:
    """Return whether an adapter was merged into the model."""
    return source.folder is not None and (source.folder / base_identity.MERGE_RECORD).is_file()


Identify = Callable[[ModelSource, str, str | None], base_identity.BaseIdentity]


def check_base(
    source: ModelSource,
    adapter: NativeAdapter,
    *,
    tokenizer: str | None = None,
    uses_tokenizer: bool = True,
    differs: bool = False,
    base_format: str | None = None,
    flag: str = "--adapter",
    identify: Identify = base_identity.identify_model,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Compare `source` with the base that `adapter` was trained on, by its config, weights and tokenizer. Return the
    fields that describe the base in the record of a converted adapter or model, and notes for the user.

    Args:
        tokenizer: the tokenizer in use, if it is not the base's own.
        uses_tokenizer: False if nothing is tokenised. An adapter's own tokenizer is then not compared.
        differs: value of --base_differs.
        base_format: the storage format in which the base is used; None if it is used in --dtype.
        flag: the adapter's name in messages.
        identify: computes the base's identity. To check many adapters of one base, pass a cached function.

    Raises:
        UserError: config, weights or tokenizer are missing or incomplete, or they differ and `differs` is False.
    """
    trained, used = adapter.base_identity, base_format or source.stored_base
    stored = stored_precision(source) if used is not None and trained.base_stored is not None else None
    found = replace(identify(source, trained.dtype, tokenizer), base_format=used, base_stored=stored)
    if not uses_tokenizer and trained.tokenizer is not None:
        found = replace(found, tokenizer=trained.tokenizer, tokenizer_hash=trained.tokenizer_hash)
    if is_merged(source) and found.base_weights_hash != trained.base_weights_hash and not differs:
        raise UserError(f"{source.name}: an adapter is already merged into it; give the plain base with --model")
    notes = base_identity.check_same_base(trained, found, source=flag, differs=differs)
    if not adapter.has_checksums:
        notes += (f"{flag}: {UNSEALED_NOTE}",)
    record = {name: getattr(found, name) for name in base_identity.HASH_FIELDS}
    if differences := base_identity.base_differences(trained, found):
        record["base_differs"] = list(differences)
    return record, notes


def stored_precision(source: ModelSource) -> str | None:
    """Return the dtype of a model's linears, or None if they are quantised. Raise UserError if it cannot be read."""
    if source.stored is not None:
        return None
    with base_weights.BaseWeights(source.weights_folder(), source.shape) as weights:
        return base_identity.linears_dtype(weights, source.shape)


def trained_otherwise(source: ModelSource, adapter: NativeAdapter) -> str:
    """Return a message if quantising `source` gives different values from training, or '' if it does not.

    The message includes the fix. The result is also '' if training recorded no precision. Call `check_base` first.
    """
    trained = adapter.base_identity
    if trained.base_stored is None:
        return ""
    found = replace(trained, base_model=source.name, base_stored=stored_precision(source))
    otherwise = base_identity.quantised_otherwise(trained, found)
    return otherwise and f"{otherwise}; give the model in {trained.base_stored} with --model"
