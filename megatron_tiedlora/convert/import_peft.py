"""Reads a PEFT adapter folder as the exactly equal native adapter of a base.

Its kind's own module reads it: `import_lora` or `import_vera`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_tiedlora.base.errors import UserError, as_given
from megatron_tiedlora.base.json_files import read_fields, read_json_object
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.checkpoint.base_identity import OPTIONAL_FIELDS, SHAPE_FIELDS, BaseIdentity, identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import CONFIG_FILE, WEIGHTS_FILE, NativeAdapter, check_update
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.import_lora import read_lora
from megatron_tiedlora.convert.import_vera import read_vera
from megatron_tiedlora.convert.inputs import EXPORT_RECORD


def adapter_kind(folder: Path | str) -> Literal["native", "peft"]:
    """Which kind of adapter a folder holds.

    Raises:
        UserError: it holds no adapter; for a run or model folder the message says what to give instead.
    """
    path = user_path(folder)
    if not path.is_dir():
        raise UserError(f"--adapter {folder}: no such folder")
    if not (path / CONFIG_FILE).is_file():
        if (path / "adapter" / CONFIG_FILE).is_file():
            raise UserError(f"--adapter {folder}: this is a run folder; give {Path(folder) / 'adapter'}")
        if (path / "config.json").is_file():
            raise UserError(f"--adapter {folder}: this is a model folder; give it with --model")
        raise UserError(f"--adapter {folder}: has no {CONFIG_FILE}; give the folder of a native or PEFT adapter")
    content = read_json_object(path / CONFIG_FILE, kind="an adapter folder")
    if "peft_type" in content:
        return "peft"
    if "format_version" in content:
        return "native"
    raise UserError(f"{path / CONFIG_FILE}: neither a native adapter (format_version) nor a PEFT one (peft_type)")


def load_peft_adapter(folder: Path, source: ModelSource, *, tokenizer: str | None = None) -> NativeAdapter:
    """Read a PEFT LoRA or VeRA adapter as a native adapter of `source`.

    PEFT's files do not record the weights they were trained on. So only shapes are checked, and the adapter's base is
    `source` itself with the given `tokenizer`. For our own exports, `exported_base` knows more.

    Raises:
        UserError: it is not a PEFT LoRA or VeRA adapter of adaptable linears; it has a feature beyond the plain kind;
            or tensors are missing, unknown, not finite, or do not have the shapes of `source`.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file, kind="a PEFT adapter folder")
    if "peft_type" not in content:
        raise UserError(f"{file}: not a PEFT adapter (it has no peft_type); give another folder")
    match content["peft_type"]:
        case "LORA":
            config, state = read_lora(folder, content, source)
        case "VERA":
            config, state = read_vera(folder, content, source)
        case other:
            raise UserError(f"{file}: peft_type {as_given(other)} is not supported; only LORA and VERA are")
    with BaseWeights(source.weights_folder(), source.shape) as weights:
        base = identify_base(source, weights, "fp32", tokenizer=tokenizer)
    check_update(config, state, source=folder / WEIGHTS_FILE)
    return NativeAdapter(config, base, state)


def exported_base(folder: Path, like: BaseIdentity) -> BaseIdentity | None:
    """The base that the PEFT adapter in `folder` was exported for; None if this package did not export it.

    Args:
        like: a base of the same shape.

    Raises:
        UserError: the record cannot be read.
    """
    file = folder / EXPORT_RECORD
    if not file.is_file():
        return None
    content = read_json_object(file, kind="the record of an export")
    not_recorded = {name: getattr(like, name) for name in (*SHAPE_FIELDS, "dtype")}
    return read_fields(file, {**content, **not_recorded}, BaseIdentity, optional=OPTIONAL_FIELDS)
