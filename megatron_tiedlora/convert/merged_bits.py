"""Compares the files of a merged folder with base and adapter, bit by bit, in the memory of some rows.

A merge writes what `MergedWeights` reads, and here the same blocks of rows are read again. Tensors that an adapter does
not change have the bytes that they have in the base, or their values cast once to the dtype of the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.errors import one_line, shown
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.base_weights import WeightFiles
from megatron_tiedlora.checkpoint.merged_weights import MergedWeights, row_blocks
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES
from megatron_tiedlora.model.weights import stored_shapes

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
    differences, counts = [], {True: 0, False: 0}
    with ExitStack() as opened:
        base = opened.enter_context(MergedWeights(source, adapter, base_format=base_format))
        written = opened.enter_context(WeightFiles(merged))
        names = stored_shapes(base.rules)
        dtype = None if source.stored is not None else _merge_dtype(base, written, names)
        tensors = [
            (file, *item)
            for file in sorted(set(written.file_of.values()))
            for item in sorted(written.header(file).entries.items(), key=lambda item: item[1]["data_offsets"])
        ]
        total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for _, _, entry in tensors)
        bar = opened.enter_context(progress_bar("merged files", "B", total=total, shows=progress))
        for file, name, entry in tensors:
            counts[name in base.changed] += 1
            if source.stored is None:
                why = _why_unlike(entry, _entry(base, name), dtype, of_model=name in names)
            else:  # its stored tensors have other sizes and dtypes than those of the merge
                why = None if name in names else "is not in the base"
            if why is None:
                like = "base + adapter" if name in base.changed else "the base"
                why = _compare_values(base, written.reader(file), name, entry, like, bar.update)
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
    base: MergedWeights,
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
        wanted = base.read(name, part).to(found.dtype)
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
