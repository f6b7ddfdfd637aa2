"""The files of a merged model, whose values are computed some rows at a time as they are written.

A file of a base that is not quantised keeps its name and the order of its tensors; with the dtype it keeps its whole
header, and tensors that the adapter does not change keep their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, open_weights
from megatron_tiedlora.checkpoint.streamed_files import StreamedFile, StreamedTensor, file_head
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES, TYPE_NAMES, all_finite, read_bytes, read_header
from megatron_tiedlora.convert.merged_rows import Changes, ReadRows, merged_reader, row_blocks
from megatron_tiedlora.model.weights import quantised_rules, stored_shapes

Between = Callable[[], object]


def merged_file(
    file: Path, places: Mapping[str, Path], changed: Changes, dtype: torch.dtype | None, between: Between
) -> StreamedFile:
    """What becomes of one file of a base that is not quantised.

    Args:
        places: the file of every tensor.
        changed: what the adapter changes, in this file or in others.
        dtype: of all floating-point tensors; None if each keeps its own.
        between: called for each block of rows.

    Raises:
        UserError: it is not a whole safetensors file, or has a tensor that belongs to another file.
    """
    with open_weights(file):  # checks that shapes and sizes agree and that the tensors lie side by side
        header = read_header(file)
    for name in changed.keys() & header.entries.keys():
        if places[name] != file:  # some programs would read this one
            raise UserError(f"{file}: holds {name} too, beside {places[name].name}; remove one of them")
    begin, stored = header.begin, header.entries.items()
    found = {name: _file_tensor(file, begin, name, entry, changed, dtype, between) for name, entry in stored}
    offsets = {name: entry["data_offsets"] for name, entry in stored}
    if dtype is None:
        head = read_bytes(file, 0, begin).numpy().tobytes()
        return StreamedFile(file.name, head, [found[name] for name in sorted(found, key=offsets.__getitem__)])
    # Readers want every tensor at a multiple of its item's size.
    items = {name: found[name].num_bytes // max(math.prod(header.entries[name]["shape"]), 1) for name in found}
    ordered = [found[name] for name in sorted(found, key=lambda name: (-items[name], offsets[name]))]
    starts = accumulate((tensor.num_bytes for tensor in ordered), initial=0)
    entries = {}
    for tensor, start in zip(ordered, starts, strict=False):
        entry = header.entries[tensor.name]
        kind = TYPE_NAMES[dtype] if entry["dtype"] in FLOAT_TYPES else entry["dtype"]
        span = (start, start + tensor.num_bytes)
        entries[tensor.name] = {"dtype": kind, "shape": entry["shape"], "data_offsets": span}
    return StreamedFile(file.name, file_head(entries), ordered)


def _file_tensor(
    file: Path, begin: int, name: str, entry: Any, changed: Changes, dtype: torch.dtype | None, between: Between
) -> StreamedTensor:
    """A tensor of a merged file, from its entry in the header, and where the values begin in the base's file.

    One that is neither changed nor cast is given as its bytes.
    """
    start, stop = (begin + offset for offset in entry["data_offsets"])
    if name not in changed and (dtype is None or entry["dtype"] not in FLOAT_TYPES):

        def unchanged() -> Iterator[torch.Tensor]:
            for part in row_blocks((stop - start,)):
                between()
                yield read_bytes(file, start + part.start, part.stop - part.start)

        return StreamedTensor(name, torch.uint8, (stop - start,), unchanged)
    stored = FLOAT_TYPES[entry["dtype"]]
    shape = tuple(entry["shape"]) if name in changed else (math.prod(entry["shape"]),)
    row_bytes = math.prod(shape[1:]) * stored.itemsize

    def read(_: str, rows: slice) -> torch.Tensor:
        raw = read_bytes(file, start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
        return raw.view(stored).view(-1, *shape[1:])

    return _computed(name, shape, dtype or stored, read, changed, str(file), between)


def dequantised_tensors(
    weights: BaseWeights,
    shape: ModelShape,
    changed: Changes,
    dtype: torch.dtype | None,
    between: Between,
    *,
    source: str,
) -> list[StreamedTensor]:
    """Every tensor of a merge onto a folder that is quantised.

    They have new files with new names: the folder's own do not fit, because its tensors have other sizes and names.

    Args:
        dtype: of all tensors; None: each as stored, and those that are quantised as the embedding is.
        between: called for each block of rows.
        source: the folder, for messages.
    """
    shapes, quantised = stored_shapes(weights.rules), stored_shapes(quantised_rules(shape))
    embedding = weights.rules[0].hf_names[0]

    def tensor(name: str) -> StreamedTensor:
        own = dtype or weights.dtype(embedding if name in quantised else name)
        return _computed(name, shapes[name], own, weights.read, changed, source, between)

    return [tensor(name) for name in shapes]


def _computed(
    name: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    read: ReadRows,
    changed: Changes,
    source: str,
    between: Between,
) -> StreamedTensor:
    """A tensor of which `read` gives some rows of the base. A number that is not finite raises UserError."""

    def blocks() -> Iterator[torch.Tensor]:
        merged_rows = merged_reader(read, changed)
        for rows in row_blocks(shape):
            between()
            merged = merged_rows(name, rows, dtype)
            if not all_finite(merged):
                fits = f"merged, it does not fit {str(dtype).removeprefix('torch.')}; give --dtype bf16"
                why = fits if all_finite(read(name, rows)) else "the base is broken"
                raise UserError(f"{source}: {name} holds numbers that are not finite ({why})")
            yield merged

    return StreamedTensor(name, dtype, shape, blocks)
