"""Writes merged Hugging Face checkpoints: W' = W + (alpha / r) diag(v) B diag(u) A, added in fp32 and cast once.

Every tensor is read, computed and written some rows at a time (`MergedWeights`), so a merge needs little memory. If the
base's folder is quantised, W is replaced by the dequantised values D(W) of training, and the weights files are new.

Only files inside the folder are copied, because an untrusted folder may contain links to private files. Links in the
hub's cache, from `models--X/snapshots/REVISION/` to `models--X/blobs/`, count as files inside the folder.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from megatron_tiedlora.base import output_folder, shapes
from megatron_tiedlora.base.files import read_json_object, read_json_or_none, write_json
from megatron_tiedlora.base.messages import UserError, shown, user_path
from megatron_tiedlora.checkpoint import base_identity, native_adapter, sources, tensor_files
from megatron_tiedlora.checkpoint.load_model import MergedWeights, ReadRows, row_blocks
from megatron_tiedlora.convert.inputs import check_base, trained_otherwise
from megatron_tiedlora.data.tokenizer import load_tokenizer, save_tokenizer
from megatron_tiedlora.model.weights import coded_shapes, stored_shapes

MERGED_ONTO = "merged_onto"  # in the record of a merge onto a dequantised base
# Files that are copied from the base in addition to its weights. Its other files are not part of the model. tekken.json
# is the tokenizer that mistral-common reads.
_MODEL_FILES = ("config.json", "generation_config.json", "*processor_config.json", "tekken.json", "LICENSE*", "NOTICE*")
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "*.jinja"),
)
# The files from which transformers reads a tokenizer, and the chat templates, whose texts it writes to the output.
_TOKENIZER_SOURCES = (
    *("tokenizer*", "*.model", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json"),
    *("*.txt", "*.spm", "*.codes", "chat_template*", "*.jinja", "additional_chat_templates"),
    "additional_chat_templates/*",
)


def merge_adapter(
    source: sources.ModelSource,
    adapter: native_adapter.NativeAdapter,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    base_differs: bool = False,
    onto_trained: bool = False,
    say: Callable[[str], object] = str,
    new: Callable[[Path], AbstractContextManager[Path]] = output_folder.new_output,
    between: Callable[[], object] = lambda: None,
) -> None:
    """Write a merged Hugging Face checkpoint folder atomically.

    File names, the index, and the bytes of tensors that the adapter does not change are copied from the base, including
    the other towers of a multimodal model. If `dtype` is given, the values of all tensors are cast once.

    Args:
        dtype: dtype of the written weights (default: the stored dtype of each tensor).
        tokenizer: folder, hub id or SentencePiece file of the tokenizer to save instead of the base's own.
        base_differs: merge even if the adapter was trained on a different base. The record then states what differs.
        onto_trained: merge onto the dequantised base that training used, instead of the stored base.
        say: called with each note about the base.
        new: returns a context that creates the output folder.
        between: called many times per second; it may raise an exception to end the merge.

    Raises:
        UserError: the adapter was trained on a different base, or on one that is quantised to different values; the
            base is quantised or already merged, the output exists, the tokenizer cannot be read, the disk has too
            little space, a computed weight is not finite (the message names it), or a link leads out of the folder.
    """
    folder = source.weights_folder()
    if not onto_trained:
        reject_quantised(source)
    output_folder.reject_existing(output, flag=f"--output {output}")
    model_files = side_files(folder, _MODEL_FILES)
    own_files = [] if tokenizer is not None else side_files(folder, _TOKENIZER_FILES)
    # The loaded tokenizer is saved over its copied files, for which transformers may choose a different class.
    saved = None
    if tokenizer is not None or own_files:
        if (named := user_path(tokenizer or folder)).is_dir():
            side_files(named, _TOKENIZER_SOURCES)  # also rejects links out of this folder
        saved = load_tokenizer(tokenizer or folder)
    onto = adapter.base_identity.base_format if onto_trained else None
    if onto_trained and onto is None:
        raise UserError(
            f"--onto trained: the adapter was trained on its base in {adapter.base_identity.dtype}, not on a quantised"
            " base; remove --onto"
        )
    of_base, notes = check_base(source, adapter, tokenizer=tokenizer, differs=base_differs, base_format=onto)
    if onto is not None and "weights" in of_base.get("base_differs", ()):
        raise UserError(
            f"--onto trained: {source.name} has different weights from the base that training used; give that base with"
            " --model, or remove --onto"
        )
    if onto is not None and (otherwise := trained_otherwise(source, adapter)):
        raise UserError(f"--onto trained: {otherwise}")
    if onto is not None and source.stored is None and adapter.base_identity.base_stored is None:
        say(
            "--onto trained: the adapter does not record the precision from which its base was quantised; if it was not"
            " the precision of this model, the values differ from those in training"
        )
    for note in notes:
        say(note)
    record = {**adapter.record(), **of_base, **({} if onto is None else {MERGED_ONTO: onto})}
    # A quantised folder already has the values that training used.
    quantised = source.stored is not None
    copied = [*model_files, *own_files]
    with MergedWeights(source, adapter, base_format=None if quantised else onto) as weights:
        merged = _MergedFiles(weights, source, dtype, between)
        if quantised:
            files = tensor_files.sharded(merged.of_quantised())
        else:
            side_files(folder, sorted({file.name for file in weights.file_of.values()}))  # rejects outside links
            files = [merged.of_file(file) for file in sorted(set(weights.file_of.values()))]
            copied += side_files(folder, [tensor_files.INDEX_FILE])
        needed = sum(len(file.head) + file.value_bytes for file in files) + sum(file.stat().st_size for file in copied)
        with new(output) as temporary:
            output_folder.require_room(temporary, needed, output=output)
            tensor_files.write_files(temporary, files, bar="weights" if quantised else "merge")
            for file in copied:  # also an unquantised base's index, which may have more metadata than a new one
                shutil.copyfile(file, temporary / file.name)
            if quantised or dtype is not None:
                _restate_config(temporary / "config.json", dtype, dequantised=quantised)
            if not quantised and dtype is not None and (index := temporary / tensor_files.INDEX_FILE).is_file():
                values = read_json_object(index, kind="a safetensors index")
                metadata = values["metadata"] if isinstance(values.get("metadata"), dict) else {}
                size = sum(file.value_bytes for file in files)
                write_json(index, {**values, "metadata": {**metadata, "total_size": size}})
            if saved is not None:
                save_tokenizer(saved, temporary)
            write_json(temporary / base_identity.MERGE_RECORD, record)


@dataclass(frozen=True)
class _MergedFiles:
    """The files of a merged folder. Their values are read from `weights` when they are written.

    Attributes:
        dtype: the dtype of all floating-point tensors; None if each keeps its own.
        between: called for each block of rows.
    """

    weights: MergedWeights
    source: sources.ModelSource
    dtype: torch.dtype | None
    between: Callable[[], object]

    def of_file(self, file: Path) -> tensor_files.StreamedFile:
        """Return the merged version of a file of a base that is not quantised.

        The file keeps its name and, if no dtype is given, its header.

        Raises:
            UserError: it is not a complete safetensors file, or contains an adapted tensor that the index finds in
                another file.
        """
        reader = self.weights.reader(file)  # checks that shapes and sizes agree and that the tensors lie side by side
        header = self.weights.header(file)
        for name in self.weights.changed & header.entries.keys():
            if (other := self.weights.file_of[name]) != file:  # some programs would read the tensor in `file`
                raise UserError(f"{file}: holds {name}, which is also in {other.name}; remove one of them")
        found = {}
        for name, entry in header.entries.items():
            try:
                found[name] = self._of_stored(file, name, reader.get_slice(name))
            except (RuntimeError, SafetensorError):
                dtype = shown(entry["dtype"])
                raise UserError(f"{file}: {name} has dtype {dtype}, which cannot be read; remove it") from None
        ordered = sorted(found, key=lambda name: header.entries[name]["data_offsets"])
        if self.dtype is None:
            with file.open("rb") as stream:
                head = stream.read(header.begin)
        else:
            # Readers need every tensor at an offset that is a multiple of its element size.
            ordered.sort(key=lambda name: -found[name].dtype.itemsize if found[name].num_bytes else 0)
            kinds = {
                name: tensor_files.TYPE_NAMES.get(found[name].dtype, header.entries[name]["dtype"]) for name in ordered
            }
            head = tensor_files.file_head(
                (name, kinds[name], found[name].shape, found[name].num_bytes) for name in ordered
            )
        return tensor_files.StreamedFile(file.name, head, [found[name] for name in ordered])

    def _of_stored(self, file: Path, name: str, stored: Any) -> tensor_files.StreamedTensor:
        """Return the merged version of an unquantised tensor. If it is neither changed nor cast, it keeps its bytes."""
        shape, changed = tuple(stored.get_shape()), name in self.weights.changed
        kind = stored[:0].dtype if shape else stored[...].dtype
        cast = self.dtype if kind in tensor_files.TYPE_NAMES else None
        # A file may hold tensors that the index does not name, or for which it names a different file.
        read = self.weights.read if changed else lambda _, rows: stored[rows]
        return self._streamed(file, name, shape, cast or kind, read, checked=changed or cast is not None)

    def of_quantised(self) -> list[tensor_files.StreamedTensor]:
        """Return every tensor of a merge onto a quantised folder.

        The tensors are written to files with new names, because the folder's tensors have different sizes and names.
        Without `dtype`, each tensor keeps its stored dtype, and tensors that were quantised get the embedding's dtype.
        Raise UserError if a tensor outside of the text tower is quantised.
        """
        weights, quantised = self.weights, coded_shapes(self.source.shape)
        embedding = weights.rules[0].hf_names[0]
        found = []
        for name, shape in stored_shapes(weights.rules).items():
            dtype = self.dtype or weights.dtype(embedding if name in quantised else name)
            found.append(self._streamed(weights.file_of[name], name, shape, dtype, weights.read, checked=True))
        for name in weights.others:
            file, stored = weights.file_of[name], weights.stored(name)
            if (kind := stored.get_dtype()) not in tensor_files.COPIED_TYPES.values():
                said = f"{name} is {kind}, and only the text tower's linears are dequantised"
                raise UserError(f"{file}: {said}; give the original model with --model ORIGINAL --base_differs")
            found.append(self._of_stored(file, name, stored))
        return found

    def _streamed(
        self, file: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, read: ReadRows, *, checked: bool
    ) -> tensor_files.StreamedTensor:
        """Return a tensor whose rows `read` reads. If `checked`, a value that is not finite raises UserError."""
        size, source = file.stat().st_size, self.source.name if self.source.stored is not None else str(file)

        def blocks() -> Iterator[torch.Tensor]:
            for rows in row_blocks(shape or (1,)):
                self.between()
                if file.stat().st_size < size:  # reading the lost part of a mapped file would end the process
                    raise UserError(f"{file}: the file was truncated while it was being read; copy it again")
                part: Any = rows if shape else ...  # a scalar has no rows
                values = read(name, part).to(dtype)
                if checked and not tensor_files.all_finite(values):
                    base = self.weights.read_base(name, part) if name in self.weights.changed else read(name, part)
                    fits = f"merged values are too large for {str(dtype).removeprefix('torch.')}; give --dtype bf16"
                    why = fits if tensor_files.all_finite(base) else "the base has such values too; download it again"
                    raise UserError(f"{source}: {name} has values that are not finite ({why})")
                yield values

        return tensor_files.StreamedTensor(name, dtype, shape, blocks)


def reject_quantised(source: sources.ModelSource) -> None:
    """Raise UserError if the weights of `source` are stored in 4 or 8 bits."""
    if source.stored is not None:
        raise UserError(
            f"{source.name}: its weights are stored in {source.stored.in_words}, and no adapter can be merged into so"
            " few bits, because rounding would lose most of its update. Give the original model with --model ORIGINAL"
            " --base_differs, or give --onto trained to write these weights in 16 bits"
        )


def is_merge_of(folder: Path, adapter: native_adapter.NativeAdapter) -> bool:
    """Return whether the record in `folder` states that this adapter was merged into it."""
    record = read_json_or_none(folder / base_identity.MERGE_RECORD) or {}
    return record.get("adapter_sha256") == adapter.sha256


def merged_onto(folder: Path) -> str | None:
    """Return the storage format of the base in a merge onto the trained base; None for any other folder.

    Raises:
        UserError: the folder's record has an unknown format.
    """
    file = folder / base_identity.MERGE_RECORD
    onto = read_json_object(file, kind="the record of a merge").get(MERGED_ONTO) if file.is_file() else None
    if onto is not None and onto not in shapes.BASE_NAMES:
        raise UserError(f"{file}: {MERGED_ONTO} = {shown(onto)} is not one of {', '.join(shapes.BASE_NAMES)}")
    return onto


def side_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the sorted files of a model folder that match one of `patterns`. Folders are ignored.

    Raises:
        UserError: a file is a link that leads out of the model, or a pipe, a socket or a device.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    inside = [folder.resolve()]
    if inside[0].parent.name == "snapshots" and inside[0].parents[1].name.startswith("models--"):
        inside.append(inside[0].parents[1] / "blobs")
    for path in found:
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in inside):
            raise UserError(
                f"{path}: leads to {target}, outside the model folder; replace it with the file itself, or remove the"
                " link"
            )
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: is a pipe, a socket or a device; replace it with a file, or remove it")
    return [path for path in found if path.is_file()]


def _restate_config(config_file: Path, dtype: torch.dtype | None, *, dequantised: bool) -> None:
    """Write `dtype`, if given, to a model's config. If `dequantised`, remove the config's quantisation entry."""
    values = read_json_object(config_file, kind="a model's config")
    if dequantised:
        values.pop("quantization_config", None)
    if dtype is not None:
        # transformers 4 writes torch_dtype and 5 writes dtype; both read torch_dtype.
        for name in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
            values[name] = str(dtype).removeprefix("torch.")
    write_json(config_file, values)
