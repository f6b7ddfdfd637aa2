"""Store frozen weights in 4 or 8 bits, as codes and scales, and compute matmuls with them. The scales belong to the
full tensor, so its values do not depend on how it is sharded.

    y = x D(W)^T + c        dx = dy D(W)

D(W), the dequantised weight, exists only during the matmul, in memory that all weights of a rank share. Its values are
computed in fp32 and rounded to the dtype of the activations. FP8 matmuls use the codes directly. `weight_maker` chooses
the class of a rank's weights.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tiedlora.base.messages import UserError, one_line
from megatron_tiedlora.base.shapes import BASE_FORMATS, FP8_CAPABILITY, BaseFormat, LinearShape
from megatron_tiedlora.parallel import quantise
from megatron_tiedlora.parallel.frozen_weight import (
    MESSAGE_MULTIPLE,
    Columns,
    FrozenWeight,
    MatmulInput,
    RoundedRows,
    WeightMaker,
    frozen_parameter,
)
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.rows import NUMBERS_AT_ONCE, as_wide_rows

# The number of elements that are processed at a time on a CPU, so that their temporaries stay in its cache.
_AT_ONCE = 2**19
_QUANTISED_AT_ONCE = 2**17  # for block formats, which need more temporaries


class Workspace:
    """Memory for one dequantised weight, shared by all weights of a rank. It is filled just before each matmul.

    Allocating new memory for each matmul of a 7B model would add a seventh to its time, because the operating system
    has to provide the pages.
    """

    def __init__(self) -> None:
        self._size = 0
        self._memory = torch.empty(0)
        self._ones = torch.empty(0)

    def reserve(self, size: int) -> None:
        """Make room for a weight of `size` elements."""
        self._size = max(self._size, size)

    def take(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the memory as a tensor of `shape`, which is valid until the next call."""
        memory = self._memory
        if len(memory) < self._size or memory.dtype != dtype or memory.device != device:
            self._memory = memory = torch.empty(0)  # free the old one first
            self._memory = memory = torch.empty(self._size, dtype=dtype, device=device)
        return memory[: prod(shape)].view(shape)

    def ones(self, size: int, device: torch.device) -> Tensor:
        """Return (1, size) fp32 ones, which no call may change."""
        if len(self._ones) < size or self._ones.device != device:
            self._ones = torch.ones(size, device=device)
        return self._ones[None, :size]


class QuantisedWeight(FrozenWeight):
    """A weight W (out, in), or a shard of it, stored as codes (out, bytes per row) uint8 and scales (out, n).

    The parameter of the scales stores the bits of fp32 numbers as int32, because DeepSpeed's zero.Init rounds every
    fp32 parameter to bf16 (seen in 0.19.8).
    """

    def __init__(
        self,
        *local_shape: int,
        dtype: torch.dtype,
        shards_rows: bool = False,
        after_norm: bool = False,
        storage: BaseFormat,
        workspace: Workspace,
        kernels: Kernels = EAGER,
    ) -> None:
        """Create the weight in uninitialised memory on the default device. See `FrozenWeight.empty`."""
        rows, width = self._local_shape = local_shape
        super().__init__(frozen_parameter(rows, storage.row_bytes(width), dtype=torch.uint8))
        num_scales = storage.row_scales(width, shards_rows=shards_rows)
        self.scale_bits = frozen_parameter(rows, num_scales, dtype=torch.int32)
        self.block = storage.stored_block(width, shards_rows=shards_rows)
        self.storage, self.dtype, self.workspace, self.kernels = storage, dtype, workspace, kernels
        workspace.reserve(rows * width)

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters that store the weight, by the names under which the layer registers them."""
        (codes,) = super().parameters.values()
        return {"codes": codes, "scale_bits": self.scale_bits}

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Return the shape of this rank's shard."""
        return self._local_shape

    @property
    def scales(self) -> Tensor:
        """Return the scales (out, n) fp32, as a view of the parameter."""
        return self.scale_bits.detach().view(torch.float32)

    def load(self, values: Tensor, *, dim: int = 0, start: int = 0, columns: Columns | None = None) -> None:
        """Quantise `values`, of any float dtype and device, and store them as the rows from `start` on.

        If `dim` is 1, `values` must have all rows.

        Args:
            columns: the shard's columns of the full tensor. If given, `values` has the columns of `columns_to_read`.

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
    def _load(self, values: Tensor, start: int, columns: Columns) -> None: ...

    @abstractmethod
    def load_stored(self, codes: Tensor, scales: Tensor, *, start: int, columns: Columns | None) -> None:
        """Store codes and scales of an already quantised weight, as the rows from `start` on.

        Args:
            codes: (rows, bytes) uint8, for the columns that `columns_to_read` returns.
            scales: (rows, blocks) fp32, one for each block of these columns.
            columns: as in `load`.

        Raises:
            ValueError: a value is not finite.
        """

    @abstractmethod
    def _dequantise(self, out: Tensor) -> None:
        """Write D(W) to `out`, which can have any float dtype."""

    def _dequantised(self) -> FrozenWeight:
        out = self.workspace.take(*self._local_shape, dtype=self.dtype, device=self.tensor.device)
        self._dequantise(out)
        return FrozenWeight(out)

    def times_transposed(self, x: MatmulInput, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `FrozenWeight.times_transposed`."""
        return self._dequantised().times_transposed(x, bias, out=out)

    def times(self, grad_y: MatmulInput, *, out: Tensor | None = None) -> Tensor:
        """See `FrozenWeight.times`."""
        return self._dequantised().times(grad_y, out=out)

    def _store(self, rows: slice, codes: Tensor, scales: Tensor) -> None:
        if not scales.isfinite().all():
            raise ValueError("numbers that are not finite")
        self.tensor.data[rows].copy_(codes)
        self.scale_bits.data[rows].copy_(scales.view(torch.int32))

    def _moved(self, values: Tensor) -> Tensor:
        """Move values to the weight's device, where they are quantised. Groups of GPUs cannot send CPU tensors."""
        return values.to(self.tensor.device)

    def _parts(self, num_rows: int | None = None, at_once: int = _AT_ONCE) -> Iterator[slice]:
        """Return slices of the first `num_rows` rows, or of all, with at most `at_once` elements (more on a GPU)."""
        rows, width = self._local_shape
        stop = rows if num_rows is None else num_rows
        size = max((NUMBERS_AT_ONCE if self.tensor.is_cuda else at_once) // max(width, 1), 1)
        return (slice(first, min(first + size, stop)) for first in range(0, stop, size))


class BlockScaledWeight(QuantisedWeight):
    """A weight in a 4-bit format with one scale per block of a row, such as nf4. Formats differ only in levels."""

    def columns_to_read(self, columns: Columns) -> slice:
        """Return the columns of the full tensor that form complete blocks around the shard's columns."""
        block = self.storage.block
        assert block is not None
        return slice(columns.start // block * block, min(-(-columns.stop // block) * block, columns.full))

    def _load(self, values: Tensor, start: int, columns: Columns) -> None:
        block = self.storage.block
        assert block is not None
        for rows in self._parts(num_rows=len(values), at_once=_QUANTISED_AT_ONCE):
            codes, scales = quantise.quantise_blocks(self._moved(values[rows]), block, self.storage.name)
            self._store_own(slice(start + rows.start, start + rows.stop), codes, scales, columns)

    @torch.no_grad()
    def load_stored(self, codes: Tensor, scales: Tensor, *, start: int, columns: Columns | None) -> None:
        """See `QuantisedWeight.load_stored`."""
        columns = columns or Columns(0, self._local_shape[1], self._local_shape[1])
        read = self.columns_to_read(columns)
        for rows in self._parts(num_rows=len(codes)):
            unpacked = quantise.unpack_codes(self._moved(codes[rows]), read.stop - read.start)
            kept = quantise.without_tiny(self._moved(scales[rows]))
            self._store_own(slice(start + rows.start, start + rows.stop), unpacked, kept, columns)

    def _store_own(self, rows: slice, codes: Tensor, scales: Tensor, columns: Columns) -> None:
        """Store this rank's columns from codes and scales of complete blocks."""
        width, block = self._local_shape[1], self.storage.block
        assert block is not None
        before = columns.start - self.columns_to_read(columns).start
        # The full tensor's block to which each stored block belongs.
        blocks = (before + torch.arange(self.scale_bits.shape[1], device=self.tensor.device) * self.block) // block
        self._store(rows, quantise.pack_codes(codes[:, before : before + width]), scales[:, blocks])

    def _dequantise(self, out: Tensor) -> None:
        codes, scales = self.tensor.detach(), self.scales
        kernel = quantise.nf4_kernel(out, self.block) if self.storage.name == "nf4" else None
        if kernel is not None:
            kernel(codes, scales, self.block, out)
        else:
            levels = quantise.levels_of(self.storage.name, codes.device)
            self.kernels.dequantise_blocks_(codes, scales, levels, self.block, out)


class RowScaledWeight(QuantisedWeight):
    """A weight in int8 or fp8, with a scale for each row of the full tensor."""

    def _load(self, values: Tensor, start: int, columns: Columns) -> None:
        maxima = torch.cat(
            [quantise.row_maxima(self._moved(values[rows])) for rows in self._parts(num_rows=len(values))]
        )
        if columns.largest is not None:  # NaN becomes infinite, so that all ranks raise the error and none waits
            maxima = columns.largest(maxima.nan_to_num(nan=torch.inf, posinf=torch.inf))
        else:
            assert columns.stop - columns.start == columns.full, "the scale of a row needs the complete row"
        for rows in self._parts(num_rows=len(values)):
            scales = quantise.row_scales(maxima[rows], self.storage.name)
            codes, _ = quantise.quantise_rows(self._moved(values[rows]), scales, self.storage.name)
            self._store(slice(start + rows.start, start + rows.stop), codes.view(torch.uint8), scales[:, None])

    @torch.no_grad()
    def load_stored(self, codes: Tensor, scales: Tensor, *, start: int, columns: Columns | None) -> None:
        """See `QuantisedWeight.load_stored`."""
        codes = self._moved(codes)
        if quantise.has_nan(codes, self.storage.name):
            raise ValueError("numbers that are not finite")
        self._store(slice(start, start + len(codes)), codes, self._moved(scales))

    def _dequantise(self, out: Tensor) -> None:
        codes = self.tensor.detach().view(quantise.CODE_TYPE[self.storage.name])
        if codes.is_cuda and out.dtype != torch.float64:
            self.kernels.dequantise_rows_(codes, self.scales, out)
        elif codes.dtype == torch.int8:
            for rows in self._parts():
                torch.mul(codes[rows], self.scales[rows], out=out[rows])
        elif out.dtype == torch.float64:
            for rows in self._parts():
                out[rows] = quantise.dequantise_rows(codes[rows], self.scales[rows, 0])
        else:
            _look_up_fp8(self.tensor.detach(), out, self._parts(), scales=self.scales)


def _look_up_fp8(codes: Tensor, out: Tensor, parts: Iterable[slice], *, scales: Tensor | None = None) -> None:
    """Convert fp8 codes to values with a lookup table, and write them to `out`. A cast takes 4 times as long.

    Args:
        codes: uint8.
        scales: (rows, 1), the factors of the values; None: the values are not scaled.
    """
    levels = torch.arange(256, dtype=torch.uint8).view(quantise.CODE_TYPE["fp8"]).to(out.dtype)
    for rows in parts:
        part = out[rows]
        torch.index_select(levels, 0, codes[rows].flatten().int(), out=part.view(-1))
        if scales is not None:
            part.mul_(scales[rows])  # computed in fp32


# FP8 matmuls ----------------------------------------------------------------------------------------------------------
#
# An fp8 weight is multiplied with activations, or gradients, that are rounded to fp8 row by row:
#
#     y  = D(Q(x)) D(W)^T + c        dx = D(Q(dy s)) W_codes
#
# Q scales each row (token) by its largest |value| / 448. In the forward pass the weight's scales s, one per
# output row, multiply y. In the backward pass they multiply dy before it is rounded, so that one copy of the codes and
# one vector of scales are enough. In row-parallel layers a rank has only a shard of x's row, and in column-parallel
# layers a shard of dy's row, so the scales depend on the tensor-parallel size.

_MULTIPLE = 16  # both sizes of a weight must be multiples of this in the GPU's kernels


def check_fp8_device(device: torch.device) -> None:
    """Raise UserError if `device` is a GPU that has no FP8 matmuls. A CPU emulates them."""
    if device.type != "cuda":
        return
    check_fp8_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    try:
        _multiply_by_row(device)
    except RuntimeError as error:  # some GPUs and versions of torch only support one scale per tensor
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"--products fp8: torch {torch.__version__} has no FP8 matmul with one scale per row for {name}"
            f" ({one_line(str(error))}). Remove --products"
        ) from error


def check_fp8_capability(name: str, found: tuple[int, int]) -> None:
    """Raise UserError if a GPU of this name and compute capability has no FP8 matmuls."""
    if found < FP8_CAPABILITY:
        raise UserError(
            f"--products fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or more, but {name}"
            f" has {'.'.join(map(str, found))}. Remove --products"
        )


def _multiply_by_row(device: torch.device) -> None:
    weight = torch.ones(_MULTIPLE, _MULTIPLE, device=device).to(quantise.CODE_TYPE["fp8"])
    rows, scales = weight[:3], torch.ones(_MULTIPLE, device=device)
    bias = torch.ones(_MULTIPLE, dtype=torch.bfloat16, device=device)
    for others in ({"bias": bias, "use_fast_accum": True}, {}):  # as in both passes
        _multiply(rows, weight.t(), scales[:3], scales[None], torch.bfloat16, **others)


def check_gpu_products(linears: Iterable[LinearShape], *, tp_size: int, dtype: torch.dtype) -> None:
    """Raise UserError if GPUs have no FP8 kernel for the shards of these linears, and would emulate the matmuls."""
    if dtype != torch.bfloat16:
        raise UserError("--products fp8 needs --dtype bf16 on a GPU. Set --dtype bf16, or remove --products")
    for linear in linears:
        rows, width = linear.out_size, linear.in_size
        rows, width = (rows // tp_size, width) if linear.sharded_dim == "column" else (rows, width // tp_size)
        if rows % _MULTIPLE or width % _MULTIPLE:
            raise UserError(
                f"--products fp8: on GPUs the sizes of weights must be multiples of {_MULTIPLE}, but {linear.name} is"
                f" {rows} x {width} with --tensor_parallel {tp_size}. Change --tensor_parallel, or remove --products"
            )


class Fp8MatmulWeight(RowScaledWeight):
    """A weight whose fp8 codes are the operands of FP8 matmuls.

    GPUs of compute capability 9.0 need contiguous columns in the second matrix, which W^T has. For dy W, a transposed
    copy of the codes is either stored, or made in the workspace just before the matmul.
    """

    def __init__(self, *local_shape: int, keep_transposed: bool = False, **others: Any) -> None:
        """Create the weight in uninitialised memory; see `QuantisedWeight`."""
        super().__init__(*local_shape, **others)
        made = frozen_parameter(*reversed(local_shape), dtype=torch.uint8) if keep_transposed else None
        self.transposed = made

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See `QuantisedWeight.parameters`."""
        kept = {} if self.transposed is None else {"transposed_codes": self.transposed}
        return {**super().parameters, **kept}

    def _store(self, rows: slice, codes: Tensor, scales: Tensor) -> None:
        super()._store(rows, codes, scales)
        if self.transposed is not None:
            self.transposed.data[:, rows].copy_(codes.t())

    @property
    def gradient_factors(self) -> Tensor:
        """See `FrozenWeight.gradient_factors`. They are the scales of the weight's rows."""
        return self.scales.view(1, -1)

    def times_transposed(self, x: MatmulInput, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """See `FrozenWeight.times_transposed`; x is rounded to fp8."""
        codes, scales = x[1:] if isinstance(x, RoundedRows) else self.kernels.round_rows(as_wide_rows(x), x.shape[1])
        if self._runs_in_fp8:
            weight = quantise.fp8_numbers(self.tensor.detach()).t()
            # Fast accumulation keeps fewer bits of partial sums. Some kernels are known to be slow without it.
            others = {"bias": bias, "out": out, "use_fast_accum": True}
            return _multiply(codes, weight, scales, self.gradient_factors, self.dtype, **others)
        y = codes.to(self.dtype) @ self._levels().t()
        y.mul_(scales[:, None]).mul_(self.gradient_factors)
        if bias is not None:
            y += bias
        return y if out is None else out.copy_(y)

    def times(self, grad_y: MatmulInput, *, out: Tensor | None = None) -> Tensor:
        """See `FrozenWeight.times`; dy s is rounded to fp8."""
        factors = self.gradient_factors
        given = grad_y if isinstance(grad_y, RoundedRows) else (None, *self.kernels.round_scaled_rows(grad_y, factors))
        _, codes, scales = given
        if self._runs_in_fp8:
            weight = quantise.fp8_numbers(self._transposed_codes()).t()
            ones = self.workspace.ones(self._local_shape[1], codes.device)
            return _multiply(codes, weight, scales, ones, self.dtype, out=out)
        dx = (codes.to(self.dtype) @ self._levels()).mul_(scales[:, None])
        return dx if out is None else out.copy_(dx)

    @property
    def _runs_in_fp8(self) -> bool:
        """Return whether the GPU's FP8 matmul kernel can be used: activations are bf16, and the weight's sizes fit."""
        fits = all(size % _MULTIPLE == 0 for size in self._local_shape)
        return self.tensor.is_cuda and self.dtype == torch.bfloat16 and fits

    def _transposed_codes(self) -> Tensor:
        """Return the transposed codes, uint8 of shape (in, out): the stored copy, or a copy in the workspace."""
        if self.transposed is not None:
            return self.transposed.detach()
        rows, width = self._local_shape
        out = self.workspace.take(width, rows, dtype=torch.uint8, device=self.tensor.device)
        self.kernels.transpose_(self.tensor.detach(), out)
        return out

    def _levels(self) -> Tensor:
        """Return the values of the codes in the weight's dtype, which has them all, stored in the workspace."""
        out = self.workspace.take(*self._local_shape, dtype=self.dtype, device=self.tensor.device)
        if self.tensor.is_cuda:
            return out.copy_(quantise.fp8_numbers(self.tensor.detach()))
        _look_up_fp8(self.tensor.detach(), out, self._parts())
        return out


def _multiply(
    codes: Tensor, weight: Tensor, scales: Tensor, columns: Tensor, dtype: torch.dtype, **others: Any
) -> Tensor:
    """Return the FP8 matmul of codes (n, k) and weight (k, m) with a scale for each row (n,) and column (1, m)."""
    return torch._scaled_mm(codes, weight, scale_a=scales[:, None], scale_b=columns, out_dtype=dtype, **others)


def weight_maker(
    base: str | None,
    *,
    products: str | None = None,
    keep_transposed: bool = False,
    adapter_in_matmul: bool = False,
    kernels: Kernels = EAGER,
) -> WeightMaker:
    """Return a function that creates uninitialised weights in the format `base`, or plain weights if it is None.

    These weights share a workspace, so a rank should use the same function for all its layers.

    Args:
        products: "fp8" if activations and gradients are rounded to fp8 too; only for the format fp8.
        keep_transposed: whether weights for FP8 matmuls store a transposed copy of their codes.
        adapter_in_matmul: whether plain weights have spare columns for the factor F of an update.
        kernels: the kernels that dequantise weights and round activations and gradients.
    """
    if base is None:
        return partial(FrozenWeight.empty, spare=MESSAGE_MULTIPLE) if adapter_in_matmul else FrozenWeight.empty
    storage = BASE_FORMATS[base]
    given: dict[str, Any] = {"storage": storage, "workspace": Workspace(), "kernels": kernels}
    if products is not None:
        assert (base, products) == ("fp8", "fp8")
        return partial(Fp8MatmulWeight, keep_transposed=keep_transposed, **given)
    return partial(RowScaledWeight if storage.block is None else BlockScaledWeight, **given)
