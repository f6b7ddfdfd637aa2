"""Finds the base of an adapter: by name, or by hash among the models in a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.presets import is_preset

_DEPTH = 4  # of a model below the folder; the hub's cache has models--OWNER--NAME/snapshots/REVISION
_CONFIG = "config.json"
_WEIGHTS = ("base_weights_hash", "base_sample")
_GIVE = "give the base, or a folder of models that holds it: it is found there by its hashes"


def find_base(folder: Path, model: str | None, named: str, hashes: Mapping[str, Any]) -> ModelSource:
    """The base of the adapter in `folder`: the one that `model` names, or else the one that the adapter names.

    Args:
        model: value of --model. It may be a folder of models, among which the base is found by its hashes.
        hashes: `base_hash`, `base_weights_hash` and `base_sample` of the adapter's base, as far as they are known.

    Raises:
        UserError: it does not exist.
    """
    if model is not None:
        models = _models_under(model)
        return find_model(model) if models is None else _find_by_hash(folder, model, models, hashes)
    try:
        return find_model(named)
    except UserError as error:
        hint = "give it with --model, or a folder of models, where it is found by its hashes"
        raise UserError(f"{folder}: its base cannot be found; {hint} ({error})") from None


def _models_under(model: str) -> list[Path] | None:
    """The folders of models below the folder `model`; None if it is a model itself, or not a folder.

    Raises:
        UserError: the folder holds no models.
    """
    folder = user_path(model)
    if is_preset(model) or not folder.is_dir() or (folder / _CONFIG).is_file():
        return None
    found = sorted(file.parent for pattern in _patterns() for file in folder.glob(pattern))
    if not found:
        raise UserError(f"--model {model}: holds no {_CONFIG}, and no models down to {_DEPTH} folders below; {_GIVE}")
    return found


def _patterns() -> Iterator[str]:
    for depth in range(1, _DEPTH + 1):
        yield "*/" * depth + _CONFIG


def _find_by_hash(folder: Path, model: str, models: list[Path], hashes: Mapping[str, Any]) -> ModelSource:
    wanted = {name: hashes[name] for name in _WEIGHTS if hashes.get(name) is not None}
    if not wanted or "base_hash" not in hashes:
        raise UserError(f"--model {model}: {folder} does not record its base's hashes; give the base's own folder")
    for path in models:
        with suppress(UserError):  # not a model that is known here
            source = find_model(str(path))
            if source.base_hash == hashes["base_hash"] and _has_weights(source, wanted):
                return source
    raise UserError(f"--model {model}: none of its {count_text(len(models), 'model')} is the base of {folder}; {_GIVE}")


def _has_weights(source: ModelSource, wanted: Mapping[str, Any]) -> bool:
    found = identify_model(source, "fp32")
    return all(getattr(found, name) == value for name, value in wanted.items())
