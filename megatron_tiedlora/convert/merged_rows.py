"""The values of a merged weight, some rows at a time: W' = W + B' A', added in fp32 and cast once; its files, and the
comparison of such files with base and adapter, bit by bit, in the memory of some rows.

In a merge onto the base that training saw, W stands for what the storage format of that base makes of it. Merging
writes what this module computes, and the check of a merged folder computes it again. The last bits of a matmul can
depend on its number of rows. So both take the same blocks of rows.

A file of a base that is not quantised keeps its name and the order of its tensors; with the dtype it keeps its whole
header, and tensors that the adapter does not change keep their bytes, or their values cast once to the dtype of the
merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.base_formats import BASE_FORMATS
from megatron_tiedlora.base.errors import UserError, one_line, shown
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, WeightFiles, open_weights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, changed_tensors
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import (
    FLOAT_TYPES,
    TYPE_NAMES,
    StreamedFile,
    StreamedTensor,
    all_finite,
    file_head,
    read_bytes,
    read_header,
)
from megatron_tiedlora.model.weights import quantised_rules, stored_shapes
from megatron_tiedlora.parallel.quantise import quantised_rows

BLOCK_ELEMENTS = 2**19  # of a block of rows: 2 MiB in fp32, and as much again for its update; it stays in the caches
_FEWEST_ROWS = 16  # of a block: a matmul of a few rows sums in another order than one of many

ReadRows = Callable[[str, slice], torch.Tensor]  # of a stored tensor, by its name
_MOST_LINES = 8  # about tensors that differ
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of about `BLOCK_ELEMENTS` elements that cover the rows of a stored tensor of this shape.

    None has fewer than 16 rows, unless the tensor has.
    """
    num_rows, width = shape[0], max(torch.Size(shape[1:]).numel(), 1)
    size = max(BLOCK_ELEMENTS // width // _FEWEST_ROWS, 1) * _FEWEST_ROWS
    start = 0
    while start < num_rows:
        stop = num_rows if num_rows - start < size + _FEWEST_ROWS else start + size
        yield slice(start, stop)
        start = stop


def merged_rows(rows: torch.Tensor, a: torch.Tensor, b_rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, in) of W' in `dtype`, from the same rows of W as stored, A' (r, in) and the same rows (n, r) of B'."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide, copy=True).add_(b_rows @ a).to(dtype)


class Merge:
    """What a merge makes of the stored tensors of a base.

    Attributes:
        names: the tensors that it changes.
    """

    def __init__(self, adapter: NativeAdapter | None, shape: ModelShape, *, base_format: str | None = None) -> None:
        """The merge of an adapter; None for what `base_format` alone changes.

        Args:
            base_format: of the base that the adapter is merged onto; None for the stored one.
        """
        self._adapter, self._base_format = adapter, base_format
        self._places = {} if adapter is None else changed_tensors(adapter.config, shape)
        self._quantised = () if base_format is None else stored_shapes(quantised_rules(shape)).keys()
        self.names = frozenset((*self._places, *self._quantised))

    def reader(self, read: ReadRows) -> Callable[[str, slice, torch.dtype], torch.Tensor]:
        """A function that gives some rows of a merged tensor in a dtype; `read` gives the rows of the base.

        It keeps the factors of the last tensor, so the rows of a tensor are best read one after another. Those of all
        layers at once would take memory for each layer.
        """

        @lru_cache(maxsize=1)
        def factors_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
            assert self._adapter is not None
            return self._places[name].factors(self._adapter.config, self._adapter.state)

        def merged(name: str, rows: slice, dtype: torch.dtype) -> torch.Tensor:
            values = read(name, rows)
            if name in self._quantised:
                values = quantised_rows(values, BASE_FORMATS[str(self._base_format)])
            if name not in self._places:
                return values.to(dtype)
            a, b = factors_of(name)
            return merged_rows(values, a, b[rows], dtype)

        return merged


@dataclass(frozen=True)
class MergedTensors:
    """The tensors of a merged model, whose values are computed as they are written.

    Attributes:
        dtype: of all floating-point tensors; None if each keeps its own.
        between: called for each block of rows.
    """

    merge: Merge
    dtype: torch.dtype | None
    between: Callable[[], object]

    def of_file(self, file: Path, places: Mapping[str, Path]) -> StreamedFile:
        """What becomes of one file of a base that is not quantised. `places` has the file of every tensor.

        Raises:
            UserError: it is not a whole safetensors file, or has a tensor that belongs to another file.
        """
        with open_weights(file):  # checks that shapes and sizes agree and that the tensors lie side by side
            header = read_header(file)
        begin, stored = header.begin, header.entries
        for name in self.merge.names & stored.keys():
            if places[name] != file:  # some programs would read this one
                raise UserError(f"{file}: holds {name} too, beside {places[name].name}; remove one of them")
        found = {name: self._of_entry(file, begin, name, entry) for name, entry in stored.items()}
        if self.dtype is None:
            head = read_bytes(file, 0, begin).numpy().tobytes()
            ordered = sorted(found, key=lambda name: stored[name]["data_offsets"])
            return StreamedFile(file.name, head, [found[name] for name in ordered])
        # Readers want every tensor at a multiple of its item's size.
        items = {name: found[name].num_bytes // max(math.prod(stored[name]["shape"]), 1) for name in found}
        ordered = sorted(found, key=lambda name: (-items[name], stored[name]["data_offsets"]))
        kinds = dict.fromkeys(FLOAT_TYPES, TYPE_NAMES[self.dtype])  # of what is cast
        own = ((name, stored[name]["dtype"], stored[name]["shape"], found[name].num_bytes) for name in ordered)
        head = file_head((name, kinds.get(kind, kind), shape, size) for name, kind, shape, size in own)
        return StreamedFile(file.name, head, [found[name] for name in ordered])

    def _of_entry(self, file: Path, begin: int, name: str, entry: Any) -> StreamedTensor:
        """A tensor of a merged file, from its entry in the header, and where the values begin in the base's file.

        One that is neither changed nor cast is given as its bytes.
        """
        start, stop = (begin + offset for offset in entry["data_offsets"])
        changed = name in self.merge.names
        if not changed and (self.dtype is None or entry["dtype"] not in FLOAT_TYPES):

            def unchanged() -> Iterator[torch.Tensor]:
                for part in row_blocks((stop - start,)):
                    self.between()
                    yield read_bytes(file, start + part.start, part.stop - part.start)

            return StreamedTensor(name, torch.uint8, (stop - start,), unchanged)
        stored = FLOAT_TYPES[entry["dtype"]]
        shape = tuple(entry["shape"]) if changed else (math.prod(entry["shape"]),)
        row_bytes = math.prod(shape[1:]) * stored.itemsize

        def read(_: str, rows: slice) -> torch.Tensor:
            raw = read_bytes(file, start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
            return raw.view(stored).view(-1, *shape[1:])

        return self._computed(name, shape, self.dtype or stored, read, str(file))

    def of_quantised(self, weights: BaseWeights, shape: ModelShape, *, source: str) -> list[StreamedTensor]:
        """Every tensor of a merge onto a folder that is quantised.

        They have new files with new names: the folder's own do not fit, because its tensors have other sizes and names.
        Without a dtype each is as stored, and those that are quantised as the embedding is. `source` names the folder
        in messages.
        """
        quantised = stored_shapes(quantised_rules(shape))
        embedding = weights.rules[0].hf_names[0]
        return [
            self._computed(
                name,
                size,
                self.dtype or weights.dtype(embedding if name in quantised else name),
                weights.read,
                source,
            )
            for name, size in stored_shapes(weights.rules).items()
        ]

    def _computed(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, read: ReadRows, source: str
    ) -> StreamedTensor:
        """A tensor of which `read` gives some rows of the base. A number that is not finite raises UserError."""

        def blocks() -> Iterator[torch.Tensor]:
            merged_rows = self.merge.reader(read)
            for rows in row_blocks(shape):
                self.between()
                merged = merged_rows(name, rows, dtype)
                if not all_finite(merged):
                    fits = f"merged, it does not fit {str(dtype).removeprefix('torch.')}; give --dtype bf16"
                    why = fits if all_finite(read(name, rows)) else "the base is broken"
                    raise UserError(f"{source}: {name} holds numbers that are not finite ({why})")
                yield merged

        return StreamedTensor(name, dtype, shape, blocks)


@dataclass(frozen=True)
class MergedBits:
    """What the comparison found.

    Attributes:
        touched, untouched: how many tensors were compared that the adapter changes, and others.
        differences: a sentence for each tensor that is wrong; it names file, tensor and row.
    """

    touched: int
    untouched: int
    differences: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result for a user."""
        compared = f"{count_text(self.touched, 'tensor')} with the adapter, {self.untouched} as in the base"
        return bit_lines(f"merged files, bit by bit: {compared}", self.differences)


def bit_lines(compared: str, differences: Sequence[str]) -> list[str]:
    """The result of a comparison for a user: what was compared, with the verdict; and what differs."""
    verdict = f"FAILED: {len(differences)} differ" if differences else "ok"
    shown_first = [f"  {difference}" for difference in differences[:_MOST_LINES]]
    left = len(differences) - len(shown_first)
    return [f"{compared}  {verdict}", *shown_first, *([f"  and {left} more"] if left else [])]


def compare_merged(
    source: ModelSource,
    adapter: NativeAdapter,
    merged: Path,
    *,
    base_format: str | None = None,
    progress: bool = False,
) -> MergedBits:
    """Compare every tensor in the files of the folder `merged` with base and adapter.

    Args:
        base_format: of the base that it was merged onto; None for the stored one.

    Raises:
        UserError: a file is missing or not whole.
    """
    merge = Merge(adapter, source.shape, base_format=base_format)
    differences, counts = [], {True: 0, False: 0}
    with ExitStack() as opened:
        base = opened.enter_context(BaseWeights(source.weights_folder(), source.shape, source.stored))
        written = opened.enter_context(WeightFiles(merged))
        names = stored_shapes(base.rules)
        dtype = None if source.stored is not None else _merge_dtype(base, written, names)
        wanted = merge.reader(base.read)
        tensors = [
            (file, *item)
            for file in sorted(set(written.file_of.values()))
            for item in sorted(written.header(file).entries.items(), key=lambda item: item[1]["data_offsets"])
        ]
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, _, entry in tensors)
        bar = opened.enter_context(progress_bar("merged files", "B", total=total, shows=progress))
        for file, name, entry in tensors:
            counts[name in merge.names] += 1
            if source.stored is None:
                why = _why_unlike(entry, _entry(base, name), dtype, of_model=name in names)
            else:  # its stored tensors have other sizes and dtypes than those of the merge
                why = None if name in names else "is not in the base"
            if why is None:
                like = "base + adapter" if name in merge.names else "the base"
                why = _compare_values(wanted, written.reader(file), name, entry, like, bar.update)
            if why is not None:
                differences.append(one_line(f"{file}: {name} {why}"))
    return MergedBits(counts[True], counts[False], tuple(differences))


def _entry(files: WeightFiles, name: str) -> Mapping[str, Any] | None:
    """The tensor's entry in the header of its file; None if there is none."""
    return files.header(files.file_of[name]).entries.get(name) if name in files.file_of else None


def _merge_dtype(base: WeightFiles, written: WeightFiles, names: Collection[str]) -> str | None:
    """The dtype of a merge to one dtype, or None if tensors keep their own: what fits most of the model's `names`."""
    found = {name: entry["dtype"] for name in names if (entry := _entry(written, name)) is not None}
    own = {name: entry["dtype"] for name in names if (entry := _entry(base, name)) is not None}

    def misfits(dtype: str | None) -> int:
        return sum(kind != (dtype or own.get(name)) for name, kind in found.items())

    return min([None, *sorted(set(found.values()))], key=misfits)


def _why_unlike(
    entry: Mapping[str, Any], base: Mapping[str, Any] | None, dtype: str | None, *, of_model: bool
) -> str | None:
    """Why the values of a tensor cannot be compared with those of the base; None if they can.

    Args:
        dtype: the result of `_merge_dtype`.
        of_model: False for a tensor that the model does not use, such as a copy of a tied head. It may also keep the
            dtype that it has in the base.
    """
    if base is None:
        return "is not in the base"
    if entry["shape"] != base["shape"]:
        return f"has shape {shown(entry['shape'])}, but {shown(base['shape'])} in the base"
    allowed = {base["dtype"]} if dtype is None or base["dtype"] not in FLOAT_TYPES else {dtype}
    if entry["dtype"] not in (allowed if of_model else allowed | {base["dtype"]}):
        return f"is {entry['dtype']}, not {' '.join(allowed)}"
    return None


def _compare_values(
    wanted_rows: Callable[[str, slice, torch.dtype], torch.Tensor],
    written: Any,
    name: str,
    entry: Mapping[str, Any],
    like: str,
    compared: Callable[[int], object],
) -> str | None:
    """How the values of a tensor differ from what they must be; None if they do not.

    Args:
        written: the opened file that has it.
        like: what it must be, in words.
        compared: called with numbers of bytes.
    """
    count, first_row, furthest = 0, 0, 0
    stored = written.get_slice(name)
    for rows in row_blocks(tuple(entry["shape"]) or (1,)):
        part: Any = rows if entry["shape"] else ...  # a number has no rows
        found = stored[part]
        wanted = wanted_rows(name, part, found.dtype)
        compared(found.nbytes)
        bits = (tensor.contiguous().view(_INTEGERS[tensor.itemsize]) for tensor in (found, wanted))
        found, wanted = torch.atleast_1d(*bits)
        if torch.equal(found, wanted):
            continue
        different = (found != wanted).flatten(1) if found.dim() > 1 else (found != wanted)[:, None]
        if not count:
            first_row = rows.start + int(different.any(1).nonzero()[0])
        count += int(different.sum())
        furthest = max(furthest, _steps(found, wanted))
    if not count:
        return None
    where = f"in {count_text(count, 'value')}, first in row {first_row}"
    return f"differs from {like} {where}, by up to {count_text(furthest, 'unit')} in the last place"


def _steps(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """The largest difference of two float tensors, given by their bits, in units in the last place."""
    # The bits of positive numbers grow with them, and those of negative ones have a sign bit.
    lowest = torch.iinfo(found.dtype).min
    ordered = (torch.where(bits < 0, lowest - bits, bits).double() for bits in (found, wanted))
    first, second = ordered
    return int((first - second).abs().max())
