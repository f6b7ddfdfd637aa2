"""Reads linears that a folder stores in nf4 or fp8: their codes as they are, and one fp32 scale for each block or row.

A rank reads the rows that it needs; of a shard of columns in nf4 it reads whole rows, because bitsandbytes stores a
tensor as one run of bytes. Scales that are quantised themselves (bitsandbytes' double quantisation) become plain
numbers here, so values are those of the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES
from megatron_tiedlora.model.hf_config import BITSANDBYTES, StoredFormat
from megatron_tiedlora.parallel.quantise import NF4_LEVELS, dequantise_blocks, dequantise_rows, fp8_numbers, has_nan

# The tensors beside X.weight, in which X.weight is the start of every name.
_STATE = ".quant_state.bitsandbytes__nf4"
_ABSMAX, _LEVELS, _NESTED_ABSMAX, _NESTED_LEVELS = ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"
_ROW_SCALE = "_scale"
_LARGEST_STATE = 2**16  # bytes of JSON
_LARGEST_BLOCK, _LARGEST_OFFSET = 2**30, 1e30  # that it may give

SliceOf = Callable[[str], Any]  # a stored tensor by its name, from which slices are read; None if there is none
TensorShape = tuple[int, ...]
QuantisedRows = tuple[torch.Tensor, torch.Tensor, int]  # codes, scales, and the bytes that were read


class _Nf4State(NamedTuple):
    """What the JSON beside a tensor of bitsandbytes says. `nested`: (size of a block of scales, their offset)."""

    block: int
    nested: tuple[int, float] | None


class StoredWeights:
    """The quantised tensors of a folder. Errors name the tensor; the caller adds the file."""

    def __init__(self, kind: StoredFormat, slice_of: SliceOf) -> None:
        self.kind = kind
        self._slice_of = slice_of

    def names(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make up the linear `name`, without those that only describe it."""
        if self.kind.method != BITSANDBYTES:
            return name, name + _ROW_SCALE
        nested = self._slice_of(name + _NESTED_ABSMAX) is not None
        return name, name + _ABSMAX, *([name + _NESTED_ABSMAX] if nested else [])

    def check(self, name: str, shape: TensorShape) -> None:
        """Raise UserError if the linear `name` of this shape is not stored in the folder's format."""
        if self.kind.method == BITSANDBYTES:
            self._check_nf4(name, shape)
            return
        stored = self._slice_of(name)
        if stored.get_dtype() != "F8_E4M3":
            raise UserError(f"{name} is {as_given(stored.get_dtype())}, but other linears of the blocks are fp8")
        if tuple(stored.get_shape()) != shape:
            raise UserError(f"{name} has shape {tuple(stored.get_shape())}, but config.json makes it {shape}")
        scale = self._needed(name, _ROW_SCALE)
        by_row, found = ((shape[0], 1), (shape[0],)), tuple(scale.get_shape())
        if found not in ((), (1,), (1, 1), *by_row) or scale.get_dtype() not in FLOAT_TYPES:
            raise UserError(
                f"{name}{_ROW_SCALE} is {as_given(scale.get_dtype())} {found}, not one number, or one for each row"
            )

    def read(self, name: str, shape: TensorShape, rows: slice, columns: slice) -> QuantisedRows:
        """Codes and scales of a range of rows and columns; in nf4 of columns that make up whole blocks."""
        if self.kind.method == BITSANDBYTES:
            return self._read_nf4(name, shape, rows, columns)
        codes = self._slice_of(name)[rows, columns].view(torch.uint8)
        stored = self._slice_of(name + _ROW_SCALE)
        whole = stored[...] if len(stored.get_shape()) == 0 else stored[:]
        scales = whole.float().view(-1, 1)
        scales = scales.expand(codes.shape[0], 1) if len(scales) == 1 and shape[0] != 1 else scales[rows]
        return codes, scales.contiguous(), codes.nbytes + scales.shape[0] * whole.element_size()

    def values(self, name: str, shape: TensorShape, rows: slice) -> tuple[torch.Tensor, int]:
        """(whole rows in fp32, the bytes that were read)."""
        codes, scales, num_bytes = self.read(name, shape, rows, slice(0, shape[1]))
        if has_nan(codes, self.kind.base_format) or not scales.isfinite().all():
            raise UserError(f"{name} has numbers that are not finite")
        block = BASE_FORMATS[self.kind.base_format].block
        if block is None:
            return dequantise_rows(fp8_numbers(codes), scales[:, 0]), num_bytes
        return dequantise_blocks(codes, scales, shape[1], block, self.kind.base_format), num_bytes

    def _needed(self, name: str, part: str) -> Any:
        found = self._slice_of(name + part)
        if found is None:
            raise UserError(f"{name} is quantised, but tensor {name}{part} is missing")
        return found

    def _check_nf4(self, name: str, shape: TensorShape) -> None:
        stored = self._slice_of(name)
        if stored.get_dtype() != "U8":
            raise UserError(f"{name} is {as_given(stored.get_dtype())}, but other linears of the blocks are nf4")
        state = self._state(name, shape)
        size = shape[0] * shape[1]
        counts = [("", "U8", size // 2), (_ABSMAX, "F32" if state.nested is None else "U8", size // state.block)]
        if state.nested is not None:
            counts.append((_NESTED_ABSMAX, "F32", -(-size // state.block // state.nested[0])))
            counts.append((_NESTED_LEVELS, "F32", 256))
        counts.append((_LEVELS, "F32", 16))
        for part, dtype, count in counts:
            tensor = self._needed(name, part)
            found = torch.Size(tensor.get_shape()).numel()
            if tensor.get_dtype() != dtype or found != count:
                raise UserError(
                    f"{name}{part} is {as_given(tensor.get_dtype())} of {found:,} numbers, not {dtype} of {count:,}"
                )
            # Codes may be one column or one row; rows are sliced from one run of numbers.
            sizes = list(tensor.get_shape())
            if sizes not in ([count], *([] if part else ([count, 1], [1, count]))):
                raise UserError(f"{name}{part} has shape {sizes}, not [{count}]{'' if part else f' or [{count}, 1]'}")
        if not torch.equal(self._needed(name, _LEVELS)[:], torch.tensor(NF4_LEVELS)):
            raise UserError(f"{name}{_LEVELS} has other levels than those of nf4")

    def _state(self, name: str, shape: TensorShape) -> _Nf4State:
        raw = self._needed(name, _STATE)
        try:
            if raw.get_dtype() != "U8" or torch.Size(raw.get_shape()).numel() > _LARGEST_STATE:
                raise ValueError("not bytes of JSON")
            fields = json.loads(bytes(raw[:].tolist()))
            kind, block, found = fields["quant_type"], fields["blocksize"], fields["shape"]
            nested = (fields["nested_blocksize"], fields["nested_offset"]) if "nested_blocksize" in fields else None
            sizes = [block, *([] if nested is None else nested[:1])]
            if any(type(number) is not int or not 1 <= number <= _LARGEST_BLOCK for number in sizes):
                raise ValueError(f"its sizes of blocks are no integers from 1 to {_LARGEST_BLOCK:,}")
            if nested is not None and (type(nested[1]) not in (int, float) or not abs(nested[1]) < _LARGEST_OFFSET):
                raise ValueError("its nested_offset is no number, or too large")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise UserError(f"{name}{_STATE} is not the state of an nf4 tensor ({error})") from None
        if kind != "nf4" or found != list(shape):
            raise UserError(f"{name} is {shown(kind)} of shape {shown(found)}, not 'nf4' of shape {list(shape)}")
        ours = BASE_FORMATS[self.kind.base_format].block
        assert ours is not None
        if block % ours:
            raise UserError(f"{name} has blocks of {block}, which are not whole blocks of {ours}")
        if shape[1] % block:
            raise UserError(
                f"{name} has blocks of {block} that cross its rows of {shape[1]} weights, so it cannot be sharded; give"
                " the model with weights in bf16, fp16 or fp32, and --base nf4"
            )
        # A float, since torch adds no integer above 2^63.
        return _Nf4State(block, None if nested is None else (nested[0], float(nested[1])))

    def _read_nf4(self, name: str, shape: TensorShape, rows: slice, columns: slice) -> QuantisedRows:
        state, width = self._state(name, shape), shape[1]
        start, stop, _ = rows.indices(shape[0])
        stored = self._slice_of(name)
        # The bytes are one run, in a tensor of one column (or, in some files, of one row).
        one_row = len(stored.get_shape()) == 2 and stored.get_shape()[0] == 1 != shape[0] * width // 2
        first, last = start * width // 2, stop * width // 2
        codes = (stored[:, first:last] if one_row else stored[first:last]).reshape(stop - start, width // 2)
        per_row = width // state.block
        scales, more = self._scales(name, state, slice(start * per_row, stop * per_row))
        scales = scales.view(stop - start, per_row)
        block = BASE_FORMATS[self.kind.base_format].block
        assert block is not None
        scales = scales.repeat_interleave(state.block // block, dim=1)
        num_bytes = codes.nbytes + more
        own = codes[:, columns.start // 2 : columns.stop // 2]
        return own, scales[:, columns.start // block : columns.stop // block], num_bytes

    def _scales(self, name: str, state: _Nf4State, blocks: slice) -> tuple[torch.Tensor, int]:
        """(plain scales of a range of blocks, fp32; the bytes that were read)."""
        found = self._slice_of(name + _ABSMAX)[blocks]
        if state.nested is None:
            return found, found.nbytes
        size, offset = state.nested
        levels, scales = self._slice_of(name + _NESTED_LEVELS)[:], self._slice_of(name + _NESTED_ABSMAX)[:]
        groups = torch.arange(blocks.start, blocks.stop) // size
        return levels[found.int()] * scales[groups] + offset, found.nbytes + scales.nbytes
