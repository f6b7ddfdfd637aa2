"""Compares the files of a merged folder with base and adapter, bit by bit, in the memory of some rows.

A tensor that the adapter changes must be W + B' A', added in fp32 and cast once. Any other must have the bytes of the
base, or its values cast once to the dtype of the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.errors import one_line, shown
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, open_weights, weight_map
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES, Header, read_header
from megatron_tiedlora.convert.merged_rows import Change, row_blocks, stored_changes
from megatron_tiedlora.model.weights import weight_rules

_MOST_LINES = 8  # about tensors that differ
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


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


class _Tensors:
    """The tensors of a folder's safetensors files. They are memory-mapped."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.files = weight_map(folder)
        self.headers: dict[Path, Header] = {file: read_header(file) for file in sorted(set(self.files.values()))}
        self._readers = {file: opened.enter_context(open_weights(file)) for file in self.headers}

    def entry(self, name: str) -> Mapping[str, Any] | None:
        """The tensor's entry in the header of its file; None if there is none."""
        return self.headers[self.files[name]].entries.get(name) if name in self.files else None

    def rows_of(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor in the file that has it."""
        return self.rows(self.files[name], name, rows)

    def rows(self, file: Path, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, in its stored dtype. A number is a row."""
        reader = self._readers[file]
        stored = reader.get_slice(name)
        found: torch.Tensor = stored[rows] if stored.get_shape() else reader.get_tensor(name)[None]
        return found


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
    changes = stored_changes(adapter, source.shape, base_format=base_format)
    differences, counts = [], {True: 0, False: 0}
    with ExitStack() as opened:
        written = _Tensors(merged, opened)
        names = {name for rule in weight_rules(source.shape) for name in rule.hf_names}
        base: _Tensors | _Dequantised
        dtype = None
        if source.stored is None:
            base = _Tensors(source.weights_folder(), opened)
            dtype = _merge_dtype(base, written, names)
        else:
            base = _Dequantised(opened.enter_context(BaseWeights(source.weights_folder(), source.shape, source.stored)))
        tensors = list(_in_file_order(written))
        total = sum(_size(entry) for _, _, entry in tensors)
        bar = opened.enter_context(progress_bar("merged files", "B", total=total, shows=progress))
        for file, name, entry in tensors:
            counts[name in changes] += 1
            if isinstance(base, _Tensors):
                why = _why_unlike(entry, base.entry(name), dtype, of_model=name in names)
            else:  # its stored tensors have other sizes and dtypes than those of the merge
                why = None if name in names else "is not in the base"
            if why is None:
                why = _compare_values(base, written, file, name, entry, changes.get(name), bar.update)
            if why is not None:
                differences.append(one_line(f"{file}: {name} {why}"))
    return MergedBits(counts[True], counts[False], tuple(differences))


class _Dequantised:
    """The values of a base that is quantised, as `_Tensors` has those of a plain one."""

    def __init__(self, weights: BaseWeights) -> None:
        self._weights = weights

    def rows_of(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor; in fp32 if it is quantised."""
        return self._weights.read(name, rows)


def _in_file_order(written: _Tensors) -> Iterator[tuple[Path, str, Mapping[str, Any]]]:
    for file, header in written.headers.items():
        for name, entry in sorted(header.entries.items(), key=lambda item: item[1]["data_offsets"]):
            yield file, name, entry


def _size(entry: Mapping[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop) - int(start)


def _merge_dtype(base: _Tensors, written: _Tensors, names: Collection[str]) -> str | None:
    """The dtype of a merge to one dtype, or None if tensors keep their own: what fits most of the model's `names`."""
    found = {name: entry["dtype"] for name in names if (entry := written.entry(name)) is not None}
    own = {name: entry["dtype"] for name in names if (entry := base.entry(name)) is not None}

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
    base: _Tensors | _Dequantised,
    written: _Tensors,
    file: Path,
    name: str,
    entry: Mapping[str, Any],
    change: Callable[[], Change] | None,
    compared: Callable[[int], object],
) -> str | None:
    """How the values of a tensor differ from what they must be; None if they do not."""
    made = None if change is None else change()
    count, first_row, furthest = 0, 0, 0
    for rows in row_blocks(tuple(entry["shape"]) or (1,)):
        found, wanted = written.rows(file, name, rows), base.rows_of(name, rows)
        wanted = wanted.to(found.dtype) if made is None else made.rows(wanted, rows, found.dtype)
        compared(found.nbytes)
        found, wanted = (tensor.contiguous().view(_INTEGERS[tensor.itemsize]) for tensor in (found, wanted))
        if torch.equal(found, wanted):
            continue
        different = (found != wanted).flatten(1) if found.dim() > 1 else (found != wanted)[:, None]
        if not count:
            first_row = rows.start + int(different.any(1).nonzero()[0])
        count += int(different.sum())
        furthest = max(furthest, _steps(found, wanted))
    if not count:
        return None
    like = "the base" if change is None else "base + adapter"
    where = f"in {count_text(count, 'value')}, first in row {first_row}"
    return f"differs from {like} {where}, by up to {count_text(furthest, 'unit')} in the last place"


def _steps(found: torch.Tensor, wanted: torch.Tensor) -> int:
    """The largest difference of two float tensors, given by their bits, in units in the last place."""
    # The bits of positive numbers grow with them, and those of negative ones have a sign bit.
    lowest = torch.iinfo(found.dtype).min
    ordered = (torch.where(bits < 0, lowest - bits, bits).double() for bits in (found, wanted))
    first, second = ordered
    return int((first - second).abs().max())
