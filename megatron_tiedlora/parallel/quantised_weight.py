"""Frozen weights of 4 or 8 bits: codes, and scales that belong to the full tensor, so that its values are the same
however it is sharded.

    nf4:        y = x D(W)^T + c              dx = dy D(W)           D(W) in memory that all weights of a rank share
    int8, fp8:  y = (x Q^T) diag(s) + c       dx = (dy diag(s)) Q    Q the codes as numbers, s a scale for each row
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod

import torch
from torch import nn

from megatron_tiedlora.base.base_formats import BASE_FORMATS, BaseFormat
from megatron_tiedlora.parallel.frozen_weight import Columns, FrozenWeight, WeightMaker, frozen_parameter
from megatron_tiedlora.parallel.kernels import NUMBERS_AT_ONCE
from megatron_tiedlora.parallel.nf4_kernels import nf4_kernel
from megatron_tiedlora.parallel.quantise import (
    CODE_TYPE,
    dequantise_nf4,
    dequantise_rows,
    pack_nf4,
    quantise_nf4,
    quantise_rows,
    row_maxima,
)

# Numbers that are processed at one time on a CPU: their temporaries stay in its cache.
_AT_ONCE = 2**19


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
    ) -> QuantisedWeight:
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

    def first_rows(self, num_rows: int) -> FrozenWeight:
        """The first rows of W, in the same memory."""
        return type(self)(
            *(self.tensor.detach()[:num_rows], self.scale_bits.detach()[:num_rows]),
            width=self._local_shape[1],
            storage=self.storage,
            block=self.block,
            dtype=self.dtype,
            workspace=self.workspace,
        )

    def empty_values(self) -> torch.Tensor:
        """Uninitialised memory for the values of this rank's shard, to be passed to `load`."""
        return torch.empty(self._local_shape, dtype=self.dtype, device=self.tensor.device)

    def load(
        self, values: torch.Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None
    ) -> None:
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
    def values(self) -> torch.Tensor:
        """W in max(fp32, the activations' dtype), in memory of its own."""

    def _store(self, rows: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
        if not scales.isfinite().all():
            raise ValueError("numbers that are not finite, which cannot be quantised")
        self.tensor.data[rows].copy_(codes)
        self.scale_bits.data[rows].copy_(scales.view(torch.int32))

    def _moved(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the device of the weight, where they are quantised: groups of GPUs send no CPU tensors."""
        return values.to(self.tensor.device)

    def _parts(self, at_once: int = _AT_ONCE, num_rows: int | None = None) -> Iterator[slice]:
        """Slices of the first `num_rows` rows, or all, of about `at_once` elements each."""
        rows = self._local_shape[0] if num_rows is None else num_rows
        size = max(at_once // max(self._local_shape[1], 1), 1)
        return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


class BlockScaledWeight(QuantisedWeight):
    """nf4: a scale for each block of a row."""

    def columns_to_read(self, columns: Columns) -> slice:
        """The columns of the full tensor that make up whole blocks around a shard's own."""
        block = self.storage.block
        assert block is not None
        return slice(columns.start // block * block, min(-(-columns.stop // block) * block, columns.full))

    def _load(self, values: torch.Tensor, start: int, columns: Columns) -> None:
        width, block = self._local_shape[1], self.storage.block
        assert block is not None
        before = columns.start - self.columns_to_read(columns).start
        # The block of the full tensor in which each stored block lies.
        blocks = (before + torch.arange(self.scale_bits.shape[1], device=self.tensor.device) * self.block) // block
        for rows in self._parts(num_rows=len(values)):
            codes, scales = quantise_nf4(self._moved(values[rows]), block)
            own = codes[:, before : before + width]
            self._store(slice(start + rows.start, start + rows.stop), pack_nf4(own), scales[:, blocks])

    def values(self) -> torch.Tensor:
        """W in max(fp32, the activations' dtype), in memory of its own."""
        found = dequantise_nf4(self.tensor.detach(), self.scales, self._local_shape[1], self.block)
        return found.double() if self.dtype == torch.float64 else found

    def _dequantised(self) -> FrozenWeight:
        """W in the activations' dtype, in the memory that all weights share."""
        codes, scales = self.tensor.detach(), self.scales
        out = self.workspace.take(*self._local_shape, dtype=self.dtype, device=codes.device)
        kernel = nf4_kernel(out, self.block)
        if kernel is not None:
            kernel(codes, scales, self.block, out)
            return FrozenWeight(out)
        for rows in self._parts(NUMBERS_AT_ONCE if codes.is_cuda else _AT_ONCE):
            out[rows] = dequantise_nf4(codes[rows], scales[rows], out.shape[1], self.block)
        return FrozenWeight(out)

    def times_transposed(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `FrozenWeight.times_transposed`."""
        return self._dequantised().times_transposed(x, bias, out=out)

    def times(self, grad_y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.times`."""
        return self._dequantised().times(grad_y, out=out)


class RowScaledWeight(QuantisedWeight):
    """int8 and fp8: a scale for each row of the full tensor."""

    def _load(self, values: torch.Tensor, start: int, columns: Columns) -> None:
        maxima = torch.cat([row_maxima(self._moved(values[rows])) for rows in self._parts(num_rows=len(values))])
        if columns.largest is not None:  # infinite, not NaN: all ranks of the group raise the error, and none waits
            maxima = columns.largest(maxima.nan_to_num(nan=torch.inf, posinf=torch.inf))
        else:
            assert columns.stop - columns.start == columns.full, "a row's scale is that of the whole row"
        for rows in self._parts(num_rows=len(values)):
            codes, scales = quantise_rows(self._moved(values[rows]), maxima[rows], self.storage.name)
            self._store(slice(start + rows.start, start + rows.stop), codes.view(torch.uint8), scales[:, None])

    @property
    def _codes(self) -> torch.Tensor:
        return self.tensor.detach().view(CODE_TYPE[self.storage.name])

    def values(self) -> torch.Tensor:
        """W in max(fp32, the activations' dtype), in memory of its own."""
        scales = self.scales[:, 0]
        return dequantise_rows(self._codes, scales.double() if self.dtype == torch.float64 else scales)

    def _levels(self) -> torch.Tensor:
        """The codes as numbers in the activations' dtype, which has all of them, in the memory that weights share."""
        codes = self._codes
        out = self.workspace.take(*self._local_shape, dtype=self.dtype, device=codes.device)
        if codes.dtype != torch.float8_e4m3fn or codes.is_cuda:
            return out.copy_(codes)
        levels = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(self.dtype)
        for rows in self._parts():  # a table is four times as fast as the conversion on a CPU (torch 2.13)
            torch.index_select(levels, 0, self.tensor.detach()[rows].flatten().int(), out=out[rows].view(-1))
        return out

    def times_transposed(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `FrozenWeight.times_transposed`."""
        y = torch.mm(x, self._levels().t(), out=out)
        return _scale_columns(y, self.scales[:, 0], bias, out=y)

    def times(self, grad_y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.times`. The scales are folded into dy, so that both passes multiply by the same numbers."""
        scaled = _scale_columns(grad_y, self.scales[:, 0], out=torch.empty_like(grad_y))
        return torch.mm(scaled, self._levels(), out=out)


def _scale_columns(
    matrix: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor
) -> torch.Tensor:
    """matrix diag(scales) + bias, computed in max(fp32, the matrix's dtype) and written to `out`, which may be it."""
    size = max((NUMBERS_AT_ONCE if matrix.is_cuda else _AT_ONCE) // matrix.shape[1], 1)
    for part, result in zip(matrix.split(size), out.split(size), strict=True):
        if bias is None:
            torch.mul(part, scales, out=result)
        else:
            result.copy_((part * scales).add_(bias))
    return out


def weight_maker(name: str | None) -> WeightMaker:
    """A function that makes empty weights of a format of the table, or plain ones (None).

    The weights that it makes share a workspace, so a rank needs one function for its whole part of the model.
    """
    if name is None:
        return FrozenWeight.empty
    storage = BASE_FORMATS[name]
    kind = RowScaledWeight if storage.block is None else BlockScaledWeight
    return partial(kind.of_format, storage=storage, workspace=Workspace())
