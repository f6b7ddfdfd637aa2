"""Writes merged Hugging Face checkpoints: W' = W + (alpha / r) diag(v) B diag(u) A, added in fp32 and cast once.

It copies the base's files one by one and computes the adapted tensors some rows at a time (`merged_file`). So it needs
little memory, whatever the model. A merge that was killed continues with the files that are whole (`merge_journal`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tiedlora.base.atomic import sync_path, write_json
from megatron_tiedlora.base.base_formats import BASE_NAMES
from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.json_files import read_json_object, read_json_or_none
from megatron_tiedlora.base.output_folder import new_output, reject_existing, require_room
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.base_identity import MERGE_RECORD
from megatron_tiedlora.checkpoint.base_weights import INDEX_FILE, BaseWeights, weight_map
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.streamed_files import write_streamed
from megatron_tiedlora.convert.inputs import check_base, trained_otherwise
from megatron_tiedlora.convert.merge_dequantised import dequantised_tensors, state_plain_weights
from megatron_tiedlora.convert.merge_journal import MergeJournal, fingerprint
from megatron_tiedlora.convert.merged_file import MergedFile
from megatron_tiedlora.convert.merged_rows import Changes, stored_changes
from megatron_tiedlora.convert.side_files import load_tokenizer_to_copy, side_files
from megatron_tiedlora.data.tokenizer import save_tokenizer

MERGED_ONTO = "merged_onto"  # in the record of a merge onto a dequantised base
NO_PRECISION_NOTE = (
    "the adapter does not record from which precision its base was quantised; weights in another one have other values"
    " than training saw"
)
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
    onto_trained: bool = False,
    say: Callable[[str], object] = str,
    new: Callable[[Path], AbstractContextManager[Path]] = new_output,
    between: Callable[[], object] = lambda: None,
    progress: bool = False,
) -> None:
    """Write a merged Hugging Face checkpoint folder atomically.

    File names, index, and the bytes of tensors that the adapter does not change are the base's own. With `dtype` the
    values of all tensors are cast to it once.

    Args:
        dtype: dtype of the written weights (default: each as it is stored in the base).
        tokenizer: folder, hub id or SentencePiece file of the tokenizer to save instead of the base's own.
        base_differs: merge into this base although the adapter was trained on another; the record says so.
        onto_trained: merge onto the base that training saw, dequantised, in place of the stored one.
        say: called with each note about the base.
        new: makes the output folder. Whole files in it, of a merge of the same inputs that was killed, are kept.
        between: called many times a second; it may raise to end the merge.

    Raises:
        UserError: the adapter is for another base, or one that is quantised to other values than training saw; the
            base is quantised or already merged, the output exists, the tokenizer cannot be read, the disk has too
            little room, a computed weight is not finite (the message names it), or a file is a link out of the folder.
    """
    folder = source.weights_folder()
    if not onto_trained:
        reject_quantised(source)
    reject_existing(output, flag=f"--output {output}")
    model_files = side_files(folder, _MODEL_FILES)
    own_files = [] if tokenizer is not None else side_files(folder, _TOKENIZER_FILES)
    # The base's tokenizer is saved again over its copy: transformers would rebuild some from their class names.
    saved = load_tokenizer_to_copy(tokenizer or folder) if tokenizer is not None or own_files else None
    onto = trained_format(adapter) if onto_trained else None
    base = check_base(source, adapter, tokenizer=tokenizer, differs=base_differs, base_format=onto)
    if onto is not None and "weights" in base.record.get("base_differs", ()):
        raise UserError(
            f"--onto trained: {source.name} has other weights than the base that training saw; give that one with"
            " --model, or leave --onto out"
        )
    if onto is not None and (otherwise := trained_otherwise(source, adapter)):
        raise UserError(f"--onto trained: {otherwise}")
    if onto is not None and source.stored is None and adapter.base.base_stored is None:
        say(f"--onto trained: {NO_PRECISION_NOTE}")
    for note in base.notes:
        say(note)
    record = {**adapter.record(), **base.record, **({} if onto is None else {MERGED_ONTO: onto})}
    if source.stored is not None:
        merge = _Dequantised(source, adapter, dtype, [*model_files, *own_files])
        with new(output) as temporary:
            merge.write(temporary, fingerprint(record, []), output, between, progress)
            if saved is not None:
                save_tokenizer(saved, temporary)
            write_json(temporary / MERGE_RECORD, record)
        return
    places = weight_map(folder)
    side_files(folder, sorted({file.name for file in places.values()}))  # rejects links out of the folder here too
    changed = stored_changes(adapter, source.shape, base_format=onto)
    plans = {file: MergedFile.of(file, places, changed, dtype) for file in sorted(set(places.values()))}
    copied = [*model_files, *own_files, *side_files(folder, [INDEX_FILE])]
    with new(output) as temporary:
        journal = MergeJournal(temporary, fingerprint({**record, "dtype": str(dtype)}, plans))
        needed = sum(plan.size for file, plan in plans.items() if file.name not in journal)
        require_room(temporary, needed + sum(file.stat().st_size for file in copied), output=output)
        _write_weights(temporary, plans, changed, journal, between, progress)
        for file in copied:
            shutil.copyfile(file, temporary / file.name)
        if dtype is not None:
            _state_dtype(temporary / "config.json", dtype)
            _state_size(temporary / INDEX_FILE, sum(plan.value_bytes for plan in plans.values()))
        if saved is not None:
            save_tokenizer(saved, temporary)
        write_json(temporary / MERGE_RECORD, record)
        journal.close()


@dataclass(frozen=True)
class _Dequantised:
    """A merge onto the values of a folder that is quantised."""

    source: ModelSource
    adapter: NativeAdapter
    dtype: torch.dtype | None
    copied: Sequence[Path]

    def write(
        self, folder: Path, inputs: str, output: Path, between: Callable[[], object], progress: bool
    ) -> None:
        """Write weights and the copied files. What a merge that was killed left in `folder` is written again."""
        source, shape = self.source, self.source.shape
        MergeJournal(folder, inputs).close()  # it has removed whatever is of other inputs, and knows of no whole file
        with BaseWeights(source.weights_folder(), shape, source.stored) as weights:
            changes = stored_changes(self.adapter, shape)
            tensors = dequantised_tensors(weights, source, changes, self.dtype, between)
            needed = sum(tensor.num_bytes for tensor in tensors)
            require_room(folder, needed + sum(file.stat().st_size for file in self.copied), output=output)
            write_streamed(folder, tensors, source=source.name, progress=progress)
        for file in self.copied:
            shutil.copyfile(file, folder / file.name)
        state_plain_weights(folder / "config.json")
        if self.dtype is not None:
            _state_dtype(folder / "config.json", self.dtype)


def reject_quantised(source: ModelSource) -> None:
    """Raise UserError if the weights of `source` are stored in 4 or 8 bits."""
    if source.stored is not None:
        raise UserError(
            f"{source.name}: its weights are stored in {source.stored.in_words}, and no adapter can be merged into so"
            " few bits: rounding would lose most of its update. Give the model that was quantised, with --model"
            " ORIGINAL --base_differs, or --onto trained to write these weights in 16 bits"
        )


def is_merge_of(folder: Path, adapter: NativeAdapter) -> bool:
    """Whether `folder` is a model into which this adapter was merged, as its record says."""
    record = read_json_or_none(folder / MERGE_RECORD) or {}
    return record.get("adapter_sha256") == adapter.sha256


def trained_format(adapter: NativeAdapter) -> str:
    """The storage format of the base that an adapter was trained on. Raises UserError if it was not quantised."""
    if adapter.base.base_format is None:
        raise UserError(
            f"--onto trained: the adapter was trained on its base in {adapter.base.dtype}, not on a quantised one;"
            " leave --onto out"
        )
    return adapter.base.base_format


def merged_onto(folder: Path) -> str | None:
    """The storage format of the base onto which a folder's adapter was merged; None for the stored one.

    Raises:
        UserError: the folder's record is not one of this version.
    """
    file = folder / MERGE_RECORD
    onto = read_json_object(file, kind="the record of a merge").get(MERGED_ONTO) if file.is_file() else None
    if onto is not None and onto not in BASE_NAMES:
        raise UserError(f"{file}: {MERGED_ONTO} = {shown(onto)} is not one of {', '.join(BASE_NAMES)}")
    return onto


def _write_weights(
    folder: Path,
    plans: Mapping[Path, MergedFile],
    changed: Changes,
    journal: MergeJournal,
    between: Callable[[], object],
    progress: bool,
) -> None:
    """Write the files that are not whole yet. Each is flushed to the disk while the next one is written."""
    total = sum(plan.work for plan in plans.values())
    done = sum(plan.work for file, plan in plans.items() if file.name in journal)
    bar = progress_bar("merge", "B", total=total, initial=done, shows=progress)
    with bar, ThreadPoolExecutor(1) as thread:
        written: list[tuple[str, Future[None]]] = []

        def note_whole(*, wait: bool) -> None:
            while written and (wait or written[0][1].done()):
                name, flushed = written.pop(0)
                flushed.result()
                journal.add(name)

        def wrote(count: int) -> None:
            between()
            note_whole(wait=False)
            bar.update(count)

        for file, plan in plans.items():
            if file.name not in journal:
                plan.write(folder / file.name, changed, wrote)
                note_whole(wait=True)
                written.append((file.name, thread.submit(sync_path, folder / file.name)))
        note_whole(wait=True)


def _state_dtype(config_file: Path, dtype: torch.dtype) -> None:
    values = read_json_object(config_file, kind="a model's config")
    # transformers 4 writes torch_dtype and 5 writes dtype; both read torch_dtype.
    for name in {"torch_dtype", "dtype"} & values.keys() or {"torch_dtype"}:
        values[name] = str(dtype).removeprefix("torch.")
    write_json(config_file, values)


def _state_size(index_file: Path, size: int) -> None:
    if index_file.is_file():
        values = read_json_object(index_file, kind="a safetensors index")
        metadata = values.get("metadata")
        values["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": size}
        write_json(index_file, values)
