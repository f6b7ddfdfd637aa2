"""Frozen weights of 4 or 8 bits: codes, and scales that belong to the full tensor, so that its values are the same
however it is sharded.

    y = x D(W)^T + c        dx = dy D(W)

D(W), the dequantised weight, exists during the matmul only, in memory that all weights of a rank share. Its values are
fp32 numbers, rounded once more to the activations' dtype.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Self

import torch
from torch import nn

from megatron_tiedlora.base.shapes import BaseFormat
from megatron_tiedlora.parallel import quantise
from megatron_tiedlora.parallel.frozen_weight import Columns, FrozenWeight, frozen_parameter
from megatron_tiedlora.parallel.kernels import NUMBERS_AT_ONCE

# Numbers that are processed at one time on a CPU: their temporaries stay in its cache.
_AT_ONCE = 2**19
_QUANTISED_AT_ONCE = 2**17  # in blocks, which needs more of them


class Workspace:
    """Memory for one weight, which all weights of a rank share: each is dequantised into it just before its matmul.

    Fresh memory would cost a seventh of the matmul at 7B's width, as the operating system has to provide its pages.
    """

    def __init__(self) -> None:
        self._size = 0
        self._memory = torch.empty(0)

    def reserve(self, size: int) -> None:
        """Have room for a weight of `size` elements."""
        self._size = max(self._size, size)

    def take(self, *shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The memory as a tensor of `shape`. It is valid until the next call."""
        memory = self._memory
        if len(memory) < self._size or memory.dtype != dtype or memory.device != device:
            self._memory = memory = torch.empty(0)  # free the old one first
            self._memory = memory = torch.empty(self._size, dtype=dtype, device=device)
        return memory[: prod(shape)].view(shape)


class QuantisedWeight(FrozenWeight):
    """W (out, in), or a shard of it, as codes (out, bytes of a row) uint8 and scales (out, n).

    The parameter of the scales holds the bits of fp32 numbers as int32: DeepSpeed's zero.Init rounds every fp32
    parameter to bf16 (seen in 0.19.8).
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale_bits: torch.Tensor,
        *,
        width: int,
        storage: BaseFormat,
        block: int,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        """Use the given tensors.

        Args:
            block: see `BaseFormat.stored_block`.
            dtype: of the activations.
        """
        super().__init__(codes)
        self.scale_bits = scale_bits
        self.storage, self.block, self.dtype, self.workspace = storage, block, dtype, workspace
        self._local_shape = (codes.shape[0], width)
        workspace.reserve(prod(self._local_shape))

    @classmethod
    def of_format(
        cls, *local_shape: int, dtype: torch.dtype, shards_rows: bool = False, storage: BaseFormat, workspace: Workspace
    ) -> Self:
        """Uninitialised memory on the current default device. For the arguments see `FrozenWeight.empty`."""
        rows, width = local_shape
        codes = frozen_parameter(rows, storage.row_bytes(width), dtype=torch.uint8)
        num_scales = storage.row_scales(width, shards_rows=shards_rows)
        scale_bits = frozen_parameter(rows, num_scales, dtype=torch.int32)
        block = storage.stored_block(width, shards_rows=shards_rows)
        return cls(codes, scale_bits, width=width, storage=storage, block=block, dtype=dtype, workspace=workspace)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The parameters that store it, by the name under which the layer registers them."""
        assert isinstance(self.tensor, nn.Parameter) and isinstance(self.scale_bits, nn.Parameter)
        return {"codes": self.tensor, "scale_bits": self.scale_bits}

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's shard."""
        return self._local_shape

    @property
    def scales(self) -> torch.Tensor:
        """(out, n) fp32, in the memory of the parameter."""
        return self.scale_bits.detach().view(torch.float32)

    def empty_values(self) -> torch.Tensor:
        """Uninitialised memory for the values of this rank's shard, to be passed to `load`."""
        return torch.empty(self._local_shape, dtype=self.dtype, device=self.tensor.device)

    def load(self, values: torch.Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None) -> None:
        """Quantise and store `values`, of any float dtype and device: rows from `start` on, or all rows if `dim` is 1.

        Args:
            columns: those that a shard of rows has in the full tensor. `values` has the columns `columns_to_read`.

        Raises:
            ValueError: a value is not finite.
        """
        start, width = (start, self._local_shape[1]) if dim == 0 else (0, values.shape[1])
        columns = columns or Columns(0, width, width)
        read = self.columns_to_read(columns)
        assert values.shape[1] == read.stop - read.start and columns.stop - columns.start == self._local_shape[1]
        with torch.no_grad():
            self._load(values, start, columns)

    @abstractmethod
    def _load(self, values: torch.Tensor, start: int, columns: Columns) -> None: ...

    @abstractmethod
    def load_stored(self, codes: torch.Tensor, scales: torch.Tensor, *, start: int, columns: Columns) -> None:
        """Store codes and scales that are there already: rows from `start` on.

        Args:
            codes: (rows, bytes) uint8, of all columns `columns_to_read`.
            scales: (rows, blocks) fp32, one for each whole block of these.
            columns: as in `load`.

        Raises:
            ValueError: a value is not finite.
        """

    @abstractmethod
    def _dequantise(self, out: torch.Tensor) -> None:
        """Write D(W) to `out`, of any float dtype."""

    def values(self) -> torch.Tensor:
        """D(W) in fp32, in memory of its own."""
        found = torch.empty(self._local_shape, device=self.tensor.device)
        self._dequantise(found)
        return found

    def _dequantised(self) -> FrozenWeight:
        out = self.workspace.take(*self._local_shape, dtype=self.dtype, device=self.tensor.device)
        self._dequantise(out)
        return FrozenWeight(out)

    def times_transposed(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `FrozenWeight.times_transposed`."""
        return self._dequantised().times_transposed(x, bias, out=out)

    def times(self, grad_y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.times`."""
        return self._dequantised().times(grad_y, out=out)

    def _store(self, rows: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
        if not scales.isfinite().all():
            raise ValueError("numbers that are not finite")
        self.tensor.data[rows].copy_(codes)
        self.scale_bits.data[rows].copy_(scales.view(torch.int32))

    def _moved(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the device of the weight, where they are quantised: groups of GPUs send no CPU tensors."""
        return values.to(self.tensor.device)

    def _parts(self, num_rows: int | None = None, at_once: int = _AT_ONCE) -> Iterator[slice]:
        """Slices of the first `num_rows` rows, or all. A CPU processes `at_once` elements at one time, a GPU more."""
        rows, width = self._local_shape
        return row_parts(rows if num_rows is None else num_rows, width, at_once, on_gpu=self.tensor.is_cuda)


def row_parts(num_rows: int, width: int, at_once: int, *, on_gpu: bool) -> Iterator[slice]:
    """Slices of rows with at most `at_once` numbers each, on a GPU with at most `NUMBERS_AT_ONCE`; at least one row."""
    size = max((NUMBERS_AT_ONCE if on_gpu else at_once) // max(width, 1), 1)
    return (slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size))


class BlockScaledWeight(QuantisedWeight):
    """nf4 and other formats of 4 bits with a scale for each block of a row, which differ in their levels."""

    def columns_to_read(self, columns: Columns) -> slice:
        """The columns of the full tensor that make up whole blocks around a shard's own."""
        block = self.storage.block
        assert block is not None
        return slice(columns.start // block * block, min(-(-columns.stop // block) * block, columns.full))

    def _load(self, values: torch.Tensor, start: int, columns: Columns) -> None:
        block = self.storage.block
        assert block is not None
        for rows in self._parts(num_rows=len(values), at_once=_QUANTISED_AT_ONCE):
            codes, scales = quantise.quantise_blocks(self._moved(values[rows]), block, self.storage.name)
            self._store_own(slice(start + rows.start, start + rows.stop), codes, scales, columns)

    @torch.no_grad()
    def load_stored(self, codes: torch.Tensor, scales: torch.Tensor, *, start: int, columns: Columns) -> None:
        """See QuantisedWeight."""
        read = self.columns_to_read(columns)
        for rows in self._parts(num_rows=len(codes)):
            unpacked = quantise.unpack_codes(self._moved(codes[rows]), read.stop - read.start)
            kept = quantise.without_tiny(self._moved(scales[rows]))
            self._store_own(slice(start + rows.start, start + rows.stop), unpacked, kept, columns)

    def _store_own(self, rows: slice, codes: torch.Tensor, scales: torch.Tensor, columns: Columns) -> None:
        """Store this rank's columns of whole blocks."""
        width, block = self._local_shape[1], self.storage.block
        assert block is not None
        before = columns.start - self.columns_to_read(columns).start
        # The block of the full tensor in which each stored block lies.
        blocks = (before + torch.arange(self.scale_bits.shape[1], device=self.tensor.device) * self.block) // block
        self._store(rows, quantise.pack_codes(codes[:, before : before + width]), scales[:, blocks])

    def _dequantise(self, out: torch.Tensor) -> None:
        codes, scales = self.tensor.detach(), self.scales
        kernel = quantise.nf4_kernel(out, self.block) if self.storage.name == "nf4" else None
        if kernel is not None:
            kernel(codes, scales, self.block, out)
            return
        for rows in self._parts():
            out[rows] = quantise.dequantise_blocks(
                codes[rows], scales[rows], out.shape[1], self.block, self.storage.name
            )


class RowScaledWeight(QuantisedWeight):
    """int8 and fp8: a scale for each row of the full tensor."""

    def _load(self, values: torch.Tensor, start: int, columns: Columns) -> None:
        maxima = torch.cat(
            [quantise.row_maxima(self._moved(values[rows])) for rows in self._parts(num_rows=len(values))]
        )
        if columns.largest is not None:  # infinite, not NaN: all ranks of the group raise the error, and none waits
            maxima = columns.largest(maxima.nan_to_num(nan=torch.inf, posinf=torch.inf))
        else:
            assert columns.stop - columns.start == columns.full, "a row's scale is that of the whole row"
        for rows in self._parts(num_rows=len(values)):
            codes, scales = quantise.quantise_rows(self._moved(values[rows]), maxima[rows], self.storage.name)
            self._store(slice(start + rows.start, start + rows.stop), codes.view(torch.uint8), scales[:, None])

    @torch.no_grad()
    def load_stored(self, codes: torch.Tensor, scales: torch.Tensor, *, start: int, columns: Columns) -> None:
        """See QuantisedWeight."""
        codes = self._moved(codes)
        if quantise.has_nan(codes, self.storage.name):
            raise ValueError("numbers that are not finite")
        self._store(slice(start, start + len(codes)), codes, self._moved(scales))

    def _dequantise(self, out: torch.Tensor) -> None:
        codes = self.tensor.detach().view(quantise.CODE_TYPE[self.storage.name])
        if codes.dtype == torch.int8:
            for rows in self._parts():
                torch.mul(codes[rows], self.scales[rows], out=out[rows])
        elif out.dtype == torch.float64:
            for rows in self._parts():
                out[rows] = quantise.dequantise_rows(codes[rows], self.scales[rows, 0])
        elif codes.is_cuda:
            out.copy_(codes).mul_(self.scales)  # computed in fp32
        else:
            look_up_fp8(self.tensor.detach(), out, self._parts(), scales=self.scales)


def look_up_fp8(
    codes: torch.Tensor, out: torch.Tensor, parts: Iterable[slice], *, scales: torch.Tensor | None = None
) -> None:
    """Write fp8's levels to `out`, or its values, by a table: on a CPU 4 times as fast as the conversion (torch 2.13).

    Args:
        codes: uint8.
        scales: (rows, 1), by which levels are multiplied.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(quantise.CODE_TYPE["fp8"]).to(out.dtype)
    for rows in parts:
        part = out[rows]
        torch.index_select(levels, 0, codes[rows].flatten().int(), out=part.view(-1))
        if scales is not None:
            part.mul_(scales[rows])  # computed in fp32
