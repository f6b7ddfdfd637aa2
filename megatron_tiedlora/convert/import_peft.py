"""Reads a PEFT adapter folder as the exactly equal native adapter of a base.

Its kind's own module reads it: `import_lora` or `import_vera`. In our own exports the native adapter travels along.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.adapters.targets import targets_of
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.errors import UserError, as_given
from megatron_tiedlora.base.json_files import read_fields, read_json_object
from megatron_tiedlora.checkpoint.base_identity import (
    OPTIONAL_FIELDS,
    SHAPE_FIELDS,
    BaseIdentity,
    identify_model,
)
from megatron_tiedlora.checkpoint.native_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    NativeAdapter,
    check_update,
    load_adapter,
)
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES, read_header
from megatron_tiedlora.convert.export_peft import peft_tensors
from megatron_tiedlora.convert.import_lora import Lora, native_lora, read_alpha, read_lora, trains_apart
from megatron_tiedlora.convert.import_vera import read_vera
from megatron_tiedlora.convert.inputs import EXPORT_RECORD, NATIVE_FOLDER, is_peft


@dataclass(frozen=True)
class PeftContent:
    """A PEFT adapter folder, read as a native adapter of a model that need not be its base.

    Attributes:
        state: full fp32 tensors.
        native: the adapter that was exported, if it travelled along and is the same; it has this config and state.
        apart: says why training continues differently from PEFT's, even if PEFT has one A for modules that are fused
            here; None if it does not.
        notes: what else a user should know.
    """

    config: AdapterConfig
    state: Mapping[str, torch.Tensor]
    native: NativeAdapter | None
    apart: str | None
    notes: tuple[str, ...]

    def of_base(self, source: ModelSource, *, tokenizer: str | None = None) -> NativeAdapter:
        """The native adapter that travelled along, with its own base; else a native adapter of `source`, used with the
        given tokenizer."""
        if self.native is not None:
            return self.native
        return NativeAdapter(self.config, identify_model(source, "fp32", tokenizer), self.state)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """The fields of a PEFT adapter's config. Raises UserError if the folder holds no PEFT adapter."""
    file = folder / CONFIG_FILE
    content = read_json_object(file, kind="a PEFT adapter folder")
    if not is_peft(content):
        what = "it is a native one" if "format_version" in content else "it has no peft_type"
        raise UserError(f"{file}: not a PEFT adapter ({what}); give another folder")
    return content


def read_peft(folder: Path, source: ModelSource, *, tied: bool = True) -> PeftContent:
    """Read a PEFT LoRA or VeRA adapter for `source`, of which only the shapes are used.

    PEFT's files count. If the folder has a native adapter that gives their tensors bit for bit, that adapter is taken,
    because it is the same and tied, and not rounded to 16 bits as PEFT's tensors may be.

    Args:
        tied: False to take PEFT's tensors in any case.

    Raises:
        UserError: it is not a PEFT LoRA or VeRA adapter of adaptable linears; it has a feature beyond the plain kind;
            or tensors are missing, unknown, not finite, or do not have the shapes of `source`.
    """
    file, content = folder / CONFIG_FILE, read_peft_config(folder)
    native: NativeAdapter | None = None
    apart: str | None = None
    notes: tuple[str, ...] = ()
    state: Mapping[str, torch.Tensor]
    match content["peft_type"]:
        case "LORA":
            lora, unused = read_lora(folder, content, source)
            native, notes = _travelled(folder, lora, source)
            notes += unused
            native = native if tied else None
            config, state = native_lora(lora, source) if native is None else (native.config, native.state)
            apart = trains_apart(lora, source) if native is None else None
        case "VERA":
            config, state = read_vera(folder, content, source)
            if config.method != "vera":
                apart = "its vectors are a part of the A and B of a lora here"
        case other:
            raise UserError(f"{file}: peft_type {as_given(other)} is not supported; only LORA and VERA are")
    read_alpha(config.alpha, f"{file}: its native alpha")
    check_update(config, state, source=folder / WEIGHTS_FILE)
    if apart is not None:
        apart = f"{folder}: {apart}, so training continues differently from PEFT's"
    return PeftContent(config, state, native, apart, notes)


def _travelled(folder: Path, lora: Lora, source: ModelSource) -> tuple[NativeAdapter | None, tuple[str, ...]]:
    """The native adapter in a PEFT folder, if it gives the tensors of the folder bit for bit; and notes."""
    inside = folder / NATIVE_FOLDER
    if not os.path.lexists(inside):
        if not (folder / EXPORT_RECORD).is_file():
            return None, ()
        return None, (f"{folder}: only its PEFT files are used, since {NATIVE_FOLDER}/, what was exported, is missing",)
    try:
        for path in (inside, inside / CONFIG_FILE, inside / WEIGHTS_FILE):
            if path.is_symlink():
                raise UserError(f"{path} is a link")
        native = load_adapter(inside)
    except UserError as error:
        return None, (f"{folder}: only its PEFT files are used, since {NATIVE_FOLDER}/ is broken: {error}",)
    if not _unlike_export(lora, source, native, stored_dtype(folder)):
        return native, ()
    changed = f"{folder}: only its PEFT files are used, since they are not what the adapter in {NATIVE_FOLDER}/ gives"
    return None, (f"{changed}; they were changed after the export",)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the tensors in a PEFT folder: fp32 if they have several."""
    names = {entry["dtype"] for entry in read_header(folder / WEIGHTS_FILE).entries.values()}
    return FLOAT_TYPES.get(names.pop(), torch.float32) if len(names) == 1 else torch.float32


def _unlike_export(
    lora: Lora, source: ModelSource, native: NativeAdapter, dtype: torch.dtype
) -> tuple[str, ...]:
    """A sentence for everything in which a LoRA differs from the export of a native adapter in `dtype`, bit by bit."""
    config, block = native.config, source.shape.block
    fits = config.targets == targets_of(source.shape, [target.name for target in config.targets])
    rank, scales = max(len(pair.a) for pair in lora.values()), {pair.scale for pair in lora.values()}
    if not fits or config.layers[-1] > source.shape.num_layers or config.rank > rank or scales != {1.0}:
        return ("its targets, layers, rank or scale cannot be the adapter's",)
    found: dict[str, torch.Tensor] = {}
    for (layer, module), pair in lora.items():
        name = f"base_model.model.{block.source.format(index=layer - 1)}.{module}"
        found |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    exported = peft_tensors(source, native, rank=rank, dtype=dtype)
    differences = [f"{name} is not in the adapter's export" for name in found if name not in exported]
    for name, tensor in exported.items():
        if name not in found:
            differences.append(f"{name} is missing")
        elif not _same_bits(tensor.float(), found[name]):
            differences.append(f"{name} differs from the adapter's export")
    return tuple(differences)


def compare_export(folder: Path, source: ModelSource, adapter: NativeAdapter) -> tuple[str, ...] | None:
    """A sentence for everything in which the PEFT files in `folder` differ from the export of `adapter`, bit by bit;
    None if this package did not export them.

    Raises:
        UserError: it is not a PEFT LoRA of `source`.
    """
    if not (folder / EXPORT_RECORD).is_file():
        return None
    file = folder / WEIGHTS_FILE
    lora, _ = read_lora(folder, read_peft_config(folder), source)
    return tuple(f"{file}: {difference}" for difference in _unlike_export(lora, source, adapter, stored_dtype(folder)))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two fp32 tensors are equal, also in the sign of a zero."""
    return torch.equal(*(tensor.contiguous().view(torch.int32) for tensor in (one, other)))


def load_peft_adapter(
    folder: Path,
    source: ModelSource,
    *,
    tokenizer: str | None = None,
    tied: bool = True,
    say: Callable[[str], object] = str,
) -> NativeAdapter:
    """Read a PEFT LoRA or VeRA adapter as a native adapter of `source`; see `read_peft`.

    PEFT's files do not record the weights they were trained on. So only shapes are checked, and the adapter's base is
    `source` itself with the given `tokenizer`, unless the native adapter travelled along: that has its own base. For
    our own exports, `exported_base` knows more.

    Args:
        tied: as in `read_peft`.
        say: called with each note.

    Raises:
        UserError: as `read_peft`.
    """
    content = read_peft(folder, source, tied=tied)
    for note in content.notes:
        say(note)
    return content.of_base(source, tokenizer=tokenizer)


def exported_base(folder: Path, like: BaseIdentity) -> BaseIdentity | None:
    """The base that the PEFT adapter in `folder` was exported for; None if this package did not export it.

    Args:
        like: a base of the same shape.

    Raises:
        UserError: the record cannot be read, or its storage format or precision is unknown.
    """
    file = folder / EXPORT_RECORD
    if not file.is_file():
        return None
    content = read_json_object(file, kind="the record of an export")
    not_recorded = {name: getattr(like, name) for name in (*SHAPE_FIELDS, "dtype")}
    found = read_fields(file, {**content, **not_recorded}, BaseIdentity, optional=OPTIONAL_FIELDS)
    found.check_formats(file)
    return found
