"""Exports native adapters as PEFT LoRA adapters.

The factors are A' = diag(u) A and B' = (alpha / r) diag(v) B. B' is split into the rows of q, k and v (and of gate and
up), which share A'. diag(v) B diag(u) A is a rank-r LoRA per layer and linear, so the export is exact.

PEFT's files cannot express the tie, so the native files are copied into the export. PEFT's config has the base's name
without a path of this host, and the export's record has the path.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from megatron_tiedlora.base.files import write_json
from megatron_tiedlora.base.messages import UserError, user_path
from megatron_tiedlora.base.output_folder import last_name, new_output, reject_existing
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import BlockShape
from megatron_tiedlora.checkpoint import native_adapter
from megatron_tiedlora.checkpoint.base_identity import FORMAT_FIELDS, identify_model
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert import inputs

UNNAMED = ("adapter", inputs.NATIVE_FOLDER)  # adapters in folders with these names are named after the parent folder


class Export(NamedTuple):
    """The folder and the rank of an exported adapter, and the names of the adapted linears."""

    folder: Path
    rank: int
    targets: Sequence[str]


def peft_tensors(
    source: ModelSource, adapter: native_adapter.NativeAdapter, *, rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Return the tensors of the PEFT file by name: lora_A (rank, d), lora_B (rows, rank), zero-padded to `rank`.

    They are computed in fp32 and cast to `dtype` once.
    """
    pad, block = rank - adapter.config.rank, source.shape.block
    tensors = {}
    for rule, a, b in adapter.updates(source.shape):
        a = torch.nn.functional.pad(a, (0, 0, 0, pad))
        b = torch.nn.functional.pad(b, (0, pad))
        for hf_name, rows in rule.by_stored_tensor(b).items():
            inside = hf_name.removeprefix(block.source.format(index=rule.layer - 1)).removesuffix(".weight")
            module = f"base_model.model.{block.module_name(rule.layer)}{inside}"
            # safetensors rejects tensors that share storage, and the parts of a fused linear share A'
            tensors[f"{module}.lora_A.weight"] = a.to(dtype, copy=True)
            tensors[f"{module}.lora_B.weight"] = rows.contiguous().to(dtype, copy=True)
    return tensors


def base_location(source: ModelSource) -> str:
    """Return the hub id or the absolute path from which other programs load the base on this host."""
    return source.name if source.from_hub or source.folder is None else str(source.folder.resolve())


def base_name(source: ModelSource) -> str:
    """Return the base's hub id, or the last component of its path, so that the name has no path of this host."""
    return last_name(base_location(source)) if source.folder is not None and not source.from_hub else source.name


def target_modules(block: BlockShape, linears: Iterable[str]) -> list[str]:
    """Return the names of these linears in PEFT's config: the last component of each stored module's name."""
    modules = (rows.module.rpartition(".")[2] for name in linears for rows in block.adaptable[name].sources)
    return list(dict.fromkeys(modules))


def peft_config(source: ModelSource, adapter: native_adapter.NativeAdapter, *, rank: int, base: str) -> dict[str, Any]:
    """Return the fields of PEFT's adapter_config.json. `base` is the base's name. The scale is 1: lora_alpha is r."""
    block, adapted = source.shape.block, [layer - 1 for layer in adapter.config.layers]
    modules = target_modules(block, [target.name for target in adapter.config.targets])
    # Other towers of a multimodal model have modules of the same names. PEFT allows no list of layers with a pattern.
    layers = rf"{re.escape(block.module_name(1).removesuffix('0'))}(?:{'|'.join(map(str, adapted))})"
    pattern = rf"{layers}\.(?:self_attn|mlp)\.(?:{'|'.join(modules)})"
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": pattern if block.is_tower else modules,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }
    if len(adapted) < source.shape.num_layers and not block.is_tower:
        config["layers_to_transform"] = adapted
        config["layers_pattern"] = "layers"
    return config


def export_peft(
    source: ModelSource,
    adapter: native_adapter.NativeAdapter,
    output: Path,
    *,
    native: Path | None = None,
    pad_rank_to: int | None = None,
    dtype: torch.dtype = torch.float32,
    named: str | None = None,
    base_differs: bool = False,
    say: Callable[[str], object] = str,
    new: Callable[[Path], AbstractContextManager[Path]] = new_output,
    identify: inputs.Identify = identify_model,
) -> Export:
    """Write a PEFT adapter folder atomically.

    Args:
        dtype: dtype of the tensors. Only fp32 keeps the adapter's exact values.
        named: name of the base in PEFT's config [`base_name`].
        native: the folder from which `adapter` was read. Its two files are copied to `NATIVE_FOLDER`. An import reads
            them, because PEFT's files cannot express the tie.
        base_differs: export even if the adapter was trained on a different base. The record states what differs.
        say: called with each note about the base.
        new: returns a context that creates the output folder.
        identify: computes the base's identity. To export many adapters of one base, pass a cached function.

    Raises:
        UserError: the adapter was trained on a different base, the padded rank is less than the adapter's rank, the
            output exists, a factor is not finite (the message names it), or the files in `native` have changed.
    """
    rank = adapter.config.rank if pad_rank_to is None else pad_rank_to
    if rank < adapter.config.rank:
        raise UserError(f"--pad_rank_to {rank} is less than the adapter's rank {adapter.config.rank}; increase it")
    reject_existing(output, flag=f"--output {output}")
    of_base, notes = inputs.check_base(source, adapter, uses_tokenizer=False, differs=base_differs, identify=identify)
    for note in notes:
        say(note)
    with new(output) as temporary:
        tensors = peft_tensors(source, adapter, rank=rank, dtype=dtype)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                fits = "; give an earlier checkpoint" if dtype == torch.float32 else "; give --dtype fp32"
                raise UserError(f"--adapter: {name} of its export has values that are not finite{fits}")
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config = peft_config(source, adapter, rank=rank, base=named or base_name(source))
        write_json(temporary / "adapter_config.json", config)
        on_this_host = {} if source.from_hub else {inputs.BASE_PATH: base_location(source)}
        formats = {name: getattr(adapter.base_identity, name) for name in FORMAT_FIELDS}
        trained = {name: value for name, value in formats.items() if value is not None}
        write_json(temporary / inputs.EXPORT_RECORD, {**adapter.record(), **of_base, **trained, **on_this_host})
        if native is not None:
            (temporary / inputs.NATIVE_FOLDER).mkdir()
            native_adapter.copy_adapter_files(native, temporary / inputs.NATIVE_FOLDER, adapter)
    return Export(output, rank, [target.name for target in adapter.config.targets])


def find_adapters(given: Sequence[str], *, flag: str = "--adapter", runs: bool = False) -> list[Path]:
    """Return the folders that the values of --adapter name; a value may be a pattern such as `runs/*/adapter`.

    Args:
        runs: whether a value may also name a run, or a folder of runs, whose adapters are returned.

    Raises:
        UserError: a pattern matches no adapter. A folder that is given without a pattern is not checked here.
    """
    found: dict[Path, None] = {}
    for value in given:
        path = user_path(value)
        is_pattern = glob.has_magic(value) and not path.exists()
        matches = [Path(match) for match in sorted(glob.glob(str(path)))] if is_pattern else [path]
        folders = [folder for match in matches for folder in (_adapters_in(match) if runs else [match])]
        adapters = [folder for folder in folders if (folder / native_adapter.CONFIG_FILE).is_file()]
        if is_pattern and not adapters:
            raise UserError(f"{flag} {value}: matches no folder of an adapter; check the pattern")
        found |= dict.fromkeys(adapters or [path])
    return list(found)


def _adapters_in(folder: Path, *, deeper: bool = True) -> list[Path]:
    """Return the adapter that `folder` is or contains, or if `deeper` those of the runs in it; [] if there are none."""
    places = (path for path in (folder, folder / "adapter") if (path / native_adapter.CONFIG_FILE).is_file())
    if (own := next(places, None)) is not None:
        return [own]
    runs = sorted(folder.iterdir()) if deeper and folder.is_dir() else []
    return [adapter for run in runs for adapter in _adapters_in(run, deeper=False)]


def adapter_name(adapter: Path) -> str:
    """Return the name of the adapter's folder, or of the run's folder if the adapter's folder is called `adapter`."""
    named = Path(os.path.abspath(adapter))  # without '..', which is not a name
    while named.name in UNNAMED:
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
    """Export each adapter into its own folder in `output`. Return each base with its exports by `adapter_name`.

    Args:
        model: value of --model.
        say: called with each note, which names its adapter.
        options: arguments of `export_peft` for all adapters.

    Raises:
        UserError: as `export_peft`; or two adapters have the same name, or an output exists. The last two are checked
            before anything is written. Exports that were written before an error are not removed.
    """
    folders: dict[str, Path] = {}
    for adapter in adapters:
        name = adapter_name(adapter)
        if (other := folders.setdefault(name, adapter)) != adapter:
            raise UserError(f"--adapter: {other} and {adapter} would both be exported as {name}; rename one")
    there = [name for name in folders if (output / name).exists()]
    if there:
        raise UserError(f"--output {output}: {there[0]} already exists; remove it, or give a different folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}; give a folder that can be written") from None
    base_of = cache(lambda base: inputs.find_base(output, model, base.base_model, asdict(base)))
    identify, of_bases = cache(identify_model), dict[str, tuple[ModelSource, dict[str, Export]]]()
    for name, adapter in progress_bar("export", "adapter", folders.items()):
        try:
            if inputs.adapter_kind(adapter) != "native":
                raise UserError(f"{adapter}: this is already a PEFT adapter; give native adapters only")
            native = native_adapter.load_native_adapter(adapter)
            source = base_of(native.base_identity)
            notes, own = list[str](), {**options, "native": adapter, "identify": identify}
            exported = export_peft(source, native, output / name, say=notes.append, **own)
        except UserError as error:
            text = str(error)
            raise UserError(text if str(adapter) in text else f"{adapter}: {text}") from None
        for note in notes:
            say(note.replace("--adapter", str(adapter), 1))
        of_bases.setdefault(base_location(source), (source, {}))[1][name] = exported
    return list(of_bases.values())
