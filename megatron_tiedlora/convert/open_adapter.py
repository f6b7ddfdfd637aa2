"""Opens a native adapter, a checkpoint of a run, or a PEFT folder, with its base, and imports PEFT folders.

`peft_files` reads a PEFT folder as an exactly equal native adapter. Our own exports also contain the native adapter.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, targets_of
from megatron_tiedlora.base.files import read_fields, read_json_object, read_json_or_none
from megatron_tiedlora.base.messages import UserError, as_given, user_path
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.checkpoint import base_identity, native_adapter
from megatron_tiedlora.checkpoint.base_identity import BaseIdentity, identify_model, identify_shape
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES, read_header
from megatron_tiedlora.convert import export_peft, inputs, vera_files
from megatron_tiedlora.convert.peft_files import Lora, Native, native_lora, read_alpha, read_lora
from megatron_tiedlora.parallel.agreement import SentTensor

AdapterKind = Literal["native", "peft"]
_BASE_NAME = "base_model_name_or_path"  # in PEFT's config


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter, and the model that it is used with. `check_base` checks whether this model is the adapter's base.

    Attributes:
        source: the model.
        kind: the kind of the adapter's folder.
        state: the full tensors in fp32.
        native: the native adapter that the folder is, or that a PEFT folder contains and whose export is equal to the
            PEFT tensors; None for any other PEFT adapter.
        exported_for: the base for which a PEFT folder was exported; None if its files do not record one.
        apart: the reason why further training differs from PEFT's; None if it does not differ. PEFT's separate A
            matrices of fused modules are one reason.
        tokenizer: the tokenizer in use, if it is not the base's own.
        notes: further notes for the user.
    """

    source: ModelSource
    kind: AdapterKind
    config: AdapterConfig
    state: Mapping[str, SentTensor]
    native: native_adapter.NativeAdapter | None
    exported_for: BaseIdentity | None = None
    apart: str | None = None
    tokenizer: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def trained_on(self) -> BaseIdentity | None:
        """Return the base that the adapter's files record; None if they record no base."""
        return self.exported_for if self.native is None else self.native.base_identity

    @cached_property
    def adapter(self) -> native_adapter.NativeAdapter:
        """Return the native adapter. Its base is the base for which it was exported, or else the base that it records.
        If no base is recorded, the model is read and becomes the base."""
        if self.native is None:
            base = self.exported_for or identify_model(self.source, "fp32", self.tokenizer)
            return native_adapter.NativeAdapter(self.config, base, self.state)
        return self.native if self.exported_for is None else replace(self.native, base_identity=self.exported_for)


def open_adapter(
    given: str | Path,
    model: ModelSource | str | None,
    *,
    flag: str = "--adapter",
    kind: AdapterKind | None = None,
    tokenizer: str | None = None,
    longest: int = 0,
    differs: bool = False,
) -> OpenedAdapter:
    """Return the adapter in the folder `given` with its base, which is `model` or else the model named in its files.

    Args:
        given: value of `flag`.
        model: value of --model, or the model that was found for it.
        kind: the kind of adapter that the folder must hold; None if both are allowed.
        tokenizer: the tokenizer in use, if it is not the base's own.
        longest: value of --max_length, which is checked before weights are read; 0 without a value.
        differs: value of --base_differs.

    Raises:
        UserError: the adapter or the base does not exist or cannot be read, or they do not fit together.
    """
    folder = user_path(given)
    found = kind if kind == "peft" else inputs.adapter_kind(given, flag=f"{flag} {given}")
    if "native" in (kind, found):
        native = native_adapter.load_native_adapter(folder)
        source = inputs.find_base(folder, model, native.base_identity.base_model, asdict(native.base_identity))
        source.check_length("--max_length", longest)
        return OpenedAdapter(source, "native", native.config, native.state, native)
    source, notes = _peft_base(folder, model, differs=differs)
    source.check_length("--max_length", longest)
    opened = read_peft(folder, source)
    like = identify_shape(source, "fp32", weights_hash="") if opened.native is None else opened.native.base_identity
    recorded = exported_base(folder, like)
    return replace(opened, exported_for=recorded, tokenizer=tokenizer, notes=(*notes, *opened.notes))


def import_peft(
    model: ModelSource | str | None,
    folder: Path,
    output: Path,
    *,
    base_differs: bool = False,
    say: Callable[[str], object] = str,
    take_over: bool = False,
) -> OpenedAdapter:
    """Write the PEFT adapter in `folder` as a native adapter folder for `model` atomically, and return the adapter.

    If the folder also contains a native adapter whose export equals the PEFT adapter, the native files are copied.

    Args:
        model: as for `open_adapter`.
        base_differs: import even if the adapter was trained on a different base. A copied adapter keeps its own base.
        say: called with each note.
        take_over: as in `take_output`.

    Raises:
        UserError: the adapter cannot be read or has a different base, or the output exists.
    """
    reject_existing(output, flag=f"--output {output}")
    opened = open_adapter(folder, model, kind="peft", differs=base_differs)
    source, native, trained = opened.source, opened.native, opened.trained_on or opened.adapter.base_identity
    _, notes = inputs.check_base(
        source,
        replace(opened.adapter, base_identity=replace(trained, base_stored=None)),  # an import quantises nothing
        uses_tokenizer=False,
        differs=base_differs,
        base_format=trained.base_format,  # no difference is reported, because an import does not run the base
        flag=f"--peft {folder}",
    )
    for note in (*opened.notes, *notes, *([] if opened.apart is None else [opened.apart])):
        say(note)
    with new_output(output, take_over=take_over) as temporary:
        if native is not None:
            native_adapter.copy_adapter_files(folder / inputs.NATIVE_FOLDER, temporary, native)
        else:
            names = ("tokenizer", "tokenizer_hash", *base_identity.FORMAT_FIELDS)
            kept = {name: getattr(trained, name) for name in names}
            own = replace(identify_model(source, "fp32"), **kept)
            native_adapter.write_adapter_files(temporary, replace(opened.adapter, base_identity=own))
    return opened


def _peft_base(folder: Path, model: ModelSource | str | None, *, differs: bool) -> tuple[ModelSource, tuple[str, ...]]:
    """Return the base of a PEFT adapter, and a note if its files name a different model.

    The base is `model`, or else the model that the files name. Adapters of other programs record only the base's name.

    Raises:
        UserError: no base is given or named; or the base already has a merged adapter. The second error is not raised
            if the files name this base, or if `differs` (--base_differs) is True.
    """
    record, in_config = read_json_or_none(folder / inputs.EXPORT_RECORD) or {}, read_peft_config(folder).get(_BASE_NAME)
    path, named = record.get(inputs.BASE_PATH), in_config if isinstance(in_config, str) else ""
    with suppress(UserError):  # `path` is not a valid path
        if isinstance(path, str) and (user_path(path).is_dir() or not isinstance(in_config, str)):
            named = path
    if not (model or named):
        raise UserError(f"{folder / native_adapter.CONFIG_FILE}: names no base model; give it with --model")
    source, same = inputs.find_base(folder, model, named, record), False
    with suppress(UserError):  # the name cannot be a path, or the model has no folder
        same = user_path(named).resolve() == source.weights_folder().resolve()
    if inputs.is_merged(source) and not same and not differs:
        raise UserError(f"{source.name}: an adapter is already merged into it; give the plain base with --model")
    if (folder / inputs.EXPORT_RECORD).is_file() or not named or named == source.name or same:
        return source, ()
    return source, (f"{folder} names the base {named}; PEFT files do not record whether {source.name} is the same",)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Return the fields of a PEFT adapter's config. Raise UserError if the folder contains no PEFT adapter."""
    file = folder / native_adapter.CONFIG_FILE
    content = read_json_object(file, kind="a PEFT adapter folder")
    if content.get("peft_type", native_adapter.PEFT_TYPE) == native_adapter.PEFT_TYPE:
        what = "it is a native one" if "format_version" in content else "it has no peft_type"
        raise UserError(f"{file}: not a PEFT adapter ({what}); give another folder")
    return content


def read_peft(folder: Path, source: ModelSource, *, tied: bool = True) -> OpenedAdapter:
    """Read a PEFT LoRA or VeRA adapter for `source`. Only the shapes of `source` are used, and no base is searched for.

    PEFT's files take precedence. If the folder also contains a native adapter whose export equals them bit for bit, the
    native adapter is returned. It has the tie, and it is not rounded to 16 bits as PEFT's tensors may be.

    Args:
        tied: False to use PEFT's tensors in any case.

    Raises:
        UserError: the folder is not a plain PEFT LoRA or VeRA adapter of adaptable linears; or tensors are missing,
            unknown or not finite, or their shapes do not fit `source`.
    """
    file, content = folder / native_adapter.CONFIG_FILE, read_peft_config(folder)
    native: native_adapter.NativeAdapter | None = None
    notes: tuple[str, ...] = ()
    match content["peft_type"]:
        case "LORA":
            lora, unused = read_lora(folder, content, source)
            native, notes = _travelled(folder, lora, source)
            notes += unused
            native = native if tied else None
            found = native_lora(lora, source) if native is None else Native(native.config, native.state)
        case "VERA":
            vera = vera_files.read_vera(folder, content, source)
            found, notes = vera_files.native_vera(vera, source), vera.notes
        case other:
            raise UserError(f"{file}: peft_type {as_given(other)} is not supported; only LORA and VERA are")
    config, state, why = found
    read_alpha(config.alpha, f"{file}: its native alpha")
    native_adapter.check_update(config, state, source=folder / native_adapter.WEIGHTS_FILE)
    apart = why and f"{folder}: {why}, so training continues differently from PEFT's"
    return OpenedAdapter(source, "peft", config, state, native, apart=apart, notes=notes)


def _travelled(
    folder: Path, lora: Lora, source: ModelSource
) -> tuple[native_adapter.NativeAdapter | None, tuple[str, ...]]:
    """Return the native adapter in a PEFT folder, if its export equals the PEFT tensors bit for bit, and notes."""
    inside = folder / inputs.NATIVE_FOLDER
    because, name = f"{folder}: only its PEFT files are used, since", f"{inputs.NATIVE_FOLDER}/"
    if not os.path.lexists(inside):
        is_export = (folder / inputs.EXPORT_RECORD).is_file()
        return None, (f"{because} {name}, the exported adapter, is missing",) if is_export else ()
    stored = (folder / native_adapter.CONFIG_FILE).resolve().parent  # the hub's cache has links to files of one folder
    try:
        for path in (inside, inside / native_adapter.CONFIG_FILE, inside / native_adapter.WEIGHTS_FILE):
            if path.is_symlink() and path.resolve().parent != stored:
                raise UserError(f"{path} is a link")
        native = native_adapter.load_native_adapter(inside)
    except UserError as error:
        return None, (f"{because} {name} is broken: {error}",)
    if not _unlike_export(lora, source, native, stored_dtype(folder)):
        return native, ()
    return None, (f"{because} they differ from the adapter in {name}; they were changed after the export",)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the tensors in a PEFT folder, or fp32 if their dtypes differ."""
    names = {entry["dtype"] for entry in read_header(folder / native_adapter.WEIGHTS_FILE).entries.values()}
    return FLOAT_TYPES.get(names.pop(), torch.float32) if len(names) == 1 else torch.float32


def _unlike_export(
    lora: Lora, source: ModelSource, native: native_adapter.NativeAdapter, dtype: torch.dtype
) -> tuple[str, ...]:
    """Return a sentence for each difference between a LoRA and the export of `native` in `dtype`, bit by bit."""
    config, block = native.config, source.shape.block
    fits = config.targets == targets_of(source.shape, [target.name for target in config.targets])
    rank, scales = max(len(pair.a) for pair in lora.values()), {pair.scale for pair in lora.values()}
    if not fits or config.layers[-1] > source.shape.num_layers or config.rank > rank or scales != {1.0}:
        return ("its targets, layers, rank or scale differ from the adapter's",)
    found: dict[str, torch.Tensor] = {}
    for (layer, module), pair in lora.items():
        name = f"base_model.model.{block.module_name(layer)}.{module}"
        found |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    exported = export_peft.peft_tensors(source, native, rank=rank, dtype=dtype)
    differences = [f"{name} is not in the adapter's export" for name in found if name not in exported]
    for name, tensor in exported.items():
        if name not in found:
            differences.append(f"{name} is missing")
        elif not torch.equal(*(one.contiguous().view(torch.int32) for one in (tensor.float(), found[name]))):
            differences.append(f"{name} differs from the adapter's export")
    return tuple(differences)


def compare_export(folder: Path, source: ModelSource, adapter: native_adapter.NativeAdapter) -> tuple[str, ...] | None:
    """Return a sentence for each difference between the PEFT files in `folder` and the export of `adapter`, bit by bit.

    The result is None if this package did not export the files.

    Raises:
        UserError: the folder is not a PEFT LoRA of `source`.
    """
    if not (folder / inputs.EXPORT_RECORD).is_file():
        return None
    file = folder / native_adapter.WEIGHTS_FILE
    lora, _ = read_lora(folder, read_peft_config(folder), source)
    return tuple(f"{file}: {difference}" for difference in _unlike_export(lora, source, adapter, stored_dtype(folder)))


def exported_base(folder: Path, like: BaseIdentity) -> BaseIdentity | None:
    """Return the base for which the PEFT adapter in `folder` was exported; None if this package did not export it.

    Args:
        like: a base with the same shape. The result has its shape and dtype.

    Raises:
        UserError: the record cannot be read, or its storage format or precision is unknown.
    """
    file = folder / inputs.EXPORT_RECORD
    if not file.is_file():
        return None
    content = read_json_object(file, kind="the record of an export")
    not_recorded = {name: getattr(like, name) for name in (*base_identity.SHAPE_FIELDS, "dtype")}
    found = read_fields(file, {**content, **not_recorded}, BaseIdentity, optional=base_identity.OPTIONAL_FIELDS)
    found.check_formats(file)
    return found
