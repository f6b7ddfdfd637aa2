"""Writes merged Hugging Face checkpoints: W' = W + (alpha / r) diag(v) B diag(u) A, added in fp32 and cast once.

It goes through the base's safetensors shards file by file, so it needs the memory of one shard, whatever the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.output_folder import new_output, reject_existing
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD
from megatron_tiedlora.checkpoint.base_weights import INDEX_FILE, open_weights, weight_map
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.convert.inputs import check_base
from megatron_tiedlora.convert.side_files import load_tokenizer_to_copy, side_files
from megatron_tiedlora.data.tokenizer import save_tokenizer
from megatron_tiedlora.model.weights import weight_rules

# Files that are copied from the base besides its weights; others there are not part of the model.
_MODEL_FILES = ("config.json", "generation_config.json", "LICENSE*", "NOTICE*")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "*.jinja"),
)


def merge_adapter(
    source: ModelSource,
    adapter: NativeAdapter,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    base_differs: bool = False,
    say: Callable[[str], object] = str,
    new: Callable[[Path], AbstractContextManager[Path]] = new_output,
    progress: bool = False,
) -> None:
    """Write a merged Hugging Face checkpoint folder atomically.

    It holds the tensors of the name table in the base's file layout, and no others: a copy of a tied head is omitted.

    Args:
        dtype: dtype of the written weights (default: each as it is stored in the base).
        tokenizer: folder, hub id or SentencePiece file of the tokenizer to save instead of the base's own.
        base_differs: merge into this base although the adapter was trained on another; the record says so.
        say: called with each note about the base.
        new: makes the output folder.

    Raises:
        UserError: the adapter is for another base, the base is already merged, the output exists, the tokenizer cannot
            be read, a weight is not finite (the message names it), or a file is a link out of the folder.
    """
    folder = source.weights_folder()
    reject_existing(output, flag=f"--output {output}")
    model_files = side_files(folder, _MODEL_FILES)
    own_files = [] if tokenizer is not None else side_files(folder, _TOKENIZER_FILES)
    # The base's tokenizer is saved again over its copy: transformers would rebuild some from their class names.
    saved = load_tokenizer_to_copy(tokenizer or folder) if tokenizer is not None or own_files else None
    base = check_base(source, adapter, tokenizer=tokenizer, differs=base_differs)
    for note in base.notes:
        say(note)
    wanted = {name for rule in weight_rules(source.shape) for name in rule.hf_names}
    files = {name: file for name, file in weight_map(folder).items() if name in wanted}
    side_files(folder, sorted({file.name for file in files.values()}))  # rejects links out of the folder here too
    # The fp32 factors A' (r, d) and B' (rows, r) of every adapted weight, by its Hugging Face name.
    factors = {
        name: (a, rows)
        for rule, a, b in adapter.updates(source.shape)
        for name, rows in rule.by_stored_tensor(b).items()
    }
    with new(output) as temporary:
        total_size = 0
        with tqdm(total=len(files), desc="merge", unit="tensor", disable=not progress, leave=False) as bar:
            for file in sorted(set(files.values())):
                tensors = {}
                with open_weights(file) as reader:
                    for name in (name for name, holder in files.items() if holder == file):
                        tensors[name] = _merged(file, name, reader.get_tensor(name), factors.get(name), dtype)
                        bar.update()
                total_size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
                save_file(tensors, temporary / file.name, metadata={"format": "pt"})
        if (folder / INDEX_FILE).is_file():
            names = {name: file.name for name, file in files.items()}
            write_json(temporary / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": names})
        for file in (*model_files, *own_files):
            shutil.copyfile(file, temporary / file.name)
        if dtype is not None:
            _state_dtype(temporary / "config.json", dtype)
        if saved is not None:
            save_tokenizer(saved, temporary)
        write_json(temporary / MERGE_RECORD, {**adapter.record(), **base.record})


def _merged(
    file: Path,
    name: str,
    weight: torch.Tensor,
    factors: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """The weight `name` of `file` as it is written. Raises UserError if it is not finite."""
    out_type = weight.dtype if dtype is None else dtype
    if factors is None:
        merged = weight.to(out_type)
    else:
        a, b = factors
        merged = (weight.to(torch.promote_types(weight.dtype, torch.float32)) + b @ a).to(out_type)
    if not merged.isfinite().all():
        wide = str(out_type).removeprefix("torch.")
        why = f"merged, it does not fit {wide}; give --dtype bf16" if weight.isfinite().all() else "the base is broken"
        raise UserError(f"{file}: {name} holds numbers that are not finite ({why})")
    return merged


def _state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    values = read_json_object(config_file, kind="a model's config")
    # transformers 4 writes torch_dtype and 5 writes dtype; both read torch_dtype.
    for name in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
        values[name] = str(dtype).removeprefix("torch.")
    write_json(config_file, values)
