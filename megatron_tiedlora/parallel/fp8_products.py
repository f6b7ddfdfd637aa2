"""Products of 8-bit numbers: an fp8 weight times activations, or gradients, that are rounded to fp8 row by row.

    y  = D(Q(x)) D(W)^T + c        dx = D(Q(dy s)) W_codes

Q gives each row (token) the scale largest |number| / 448. Going forward the weight's scales s, one per output row, are
applied to y; going back they are folded into dy before it is rounded, so that one copy of the codes and one vector of
scales serve both. In row-parallel layers a rank has a part of x's row, and in column-parallel ones of dy's, so that its
scale depends on the tensor-parallel size.

`weight_maker` chooses the class of a rank's frozen weights: these, those that are dequantised, or plain ones.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import nn

from megatron_tiedlora.base.messages import UserError, one_line
from megatron_tiedlora.base.shapes import BASE_FORMATS, FP8_CAPABILITY, LinearShape
from megatron_tiedlora.parallel import quantised_weight
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, WeightMaker, frozen_parameter
from megatron_tiedlora.parallel.quantise import CODE_TYPE, fp8_numbers, quantise_rows, row_maxima

_AT_ONCE = 2**19  # numbers that a CPU rounds at one time: their temporaries stay in its cache
_MULTIPLE = 16  # of both sizes of a weight in the GPU's kernels


def check_fp8_device(device: torch.device) -> None:
    """Raise UserError if `device` is a GPU that cannot multiply in fp8. A CPU emulates it."""
    if device.type != "cuda":
        return
    check_fp8_capability(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    try:
        _multiply_by_row(device)
    except RuntimeError as error:  # some GPUs and versions of torch have a scale for the whole tensor alone
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"--products fp8: {name} cannot multiply with a scale for each row by torch {torch.__version__}"
            f" ({one_line(str(error))}); leave --products out"
        ) from error


def check_fp8_capability(name: str, found: tuple[int, int]) -> None:
    """Raise UserError if a GPU of that name and compute capability cannot multiply in fp8."""
    if found < FP8_CAPABILITY:
        raise UserError(
            f"--products fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_CAPABILITY))} or more, and {name}"
            f" has {'.'.join(map(str, found))}; leave --products out"
        )


def _multiply_by_row(device: torch.device) -> None:
    numbers = torch.ones(_MULTIPLE, _MULTIPLE, device=device).to(CODE_TYPE["fp8"])
    scales = torch.ones(_MULTIPLE, 1, device=device)
    torch._scaled_mm(numbers, numbers.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)


def check_gpu_products(linears: Iterable[LinearShape], *, tp_size: int, dtype: torch.dtype) -> None:
    """Raise UserError if GPUs have no kernel for the products of these linears' shards: they would be emulated."""
    if dtype != torch.bfloat16:
        raise UserError("--products fp8 needs --dtype bf16 on a GPU")
    for linear in linears:
        rows, width = linear.out_size, linear.in_size
        rows, width = (rows // tp_size, width) if linear.cut == "column" else (rows, width // tp_size)
        if rows % _MULTIPLE or width % _MULTIPLE:
            raise UserError(
                f"--products fp8: GPUs need multiples of {_MULTIPLE} as sizes, and {linear.name} is {rows} x {width}"
                f" at --tensor_parallel {tp_size}; leave --products out, or change --tensor_parallel"
            )


class Fp8ProductWeight(quantised_weight.RowScaledWeight):
    """fp8 codes that are multiplied as they are.

    GPUs of capability 9.0 want the second matrix with its columns in memory one after another. Those of W^T are; for
    dy W a transposed copy is made just before the matmul, in the memory that all weights of a rank share, or kept.
    """

    transposed: torch.Tensor | None = None

    @classmethod
    def of_format(cls, *local_shape: int, keep_transposed: bool = False, **others: Any) -> Self:
        """Uninitialised memory; see `QuantisedWeight.of_format`."""
        found = super().of_format(*local_shape, **others)
        if keep_transposed:
            found.transposed = frozen_parameter(*reversed(local_shape), dtype=torch.uint8)
        return found

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """See `QuantisedWeight.parameters`."""
        if self.transposed is None:
            return super().parameters
        assert isinstance(self.transposed, nn.Parameter)
        return {**super().parameters, "transposed_codes": self.transposed}

    def _store(self, rows: slice, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super()._store(rows, codes, scales)
        if self.transposed is not None:
            self.transposed.data[:, rows].copy_(codes.t())

    def times_transposed(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `FrozenWeight.times_transposed`; x is rounded to fp8."""
        codes, scales = _rounded(x)
        if self._runs_in_fp8(x):
            weight = fp8_numbers(self.tensor.detach())
            y = torch._scaled_mm(
                codes, weight.t(), scale_a=scales[:, None], scale_b=self.scales.view(1, -1), out_dtype=x.dtype
            )
        else:
            y = codes.to(x.dtype) @ self._levels(x.dtype).t()
            y.mul_(scales[:, None]).mul_(self.scales.view(1, -1))
        if bias is not None:
            y += bias
        return y if out is None else out.copy_(y)

    def times(self, grad_y: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FrozenWeight.times`; dy s is rounded to fp8."""
        codes, scales = _rounded(grad_y, self.scales.view(1, -1))
        if self._runs_in_fp8(grad_y):
            ones = torch.ones(1, self._local_shape[1], device=grad_y.device)
            dx = torch._scaled_mm(
                codes,
                fp8_numbers(self._transposed_codes()).t(),
                scale_a=scales[:, None],
                scale_b=ones,
                out_dtype=grad_y.dtype,
            )
        else:
            dx = (codes.to(grad_y.dtype) @ self._levels(grad_y.dtype)).mul_(scales[:, None])
        return dx if out is None else out.copy_(dx)

    def _runs_in_fp8(self, x: torch.Tensor) -> bool:
        """Whether the device's own kernel can: it wants 16-bit results, and sizes that are multiples of 16."""
        fits = all(size % _MULTIPLE == 0 for size in self._local_shape)
        return x.is_cuda and x.dtype == torch.bfloat16 and fits

    def _transposed_codes(self) -> torch.Tensor:
        """(in, out) uint8, kept or made in the shared memory."""
        if self.transposed is not None:
            return self.transposed.detach()
        rows, width = self._local_shape
        out = self.workspace.take(width, rows, dtype=torch.uint8, device=self.tensor.device)
        return out.copy_(self.tensor.detach().t())

    def _levels(self, dtype: torch.dtype) -> torch.Tensor:
        """The codes as numbers of `dtype`, which holds them exactly, in the shared memory."""
        out = self.workspace.take(*self._local_shape, dtype=dtype, device=self.tensor.device)
        if self.tensor.is_cuda:
            return out.copy_(fp8_numbers(self.tensor.detach()))
        quantised_weight.look_up_fp8(self.tensor.detach(), out, self._parts())
        return out


def _rounded(rows: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 numbers (n, width), and the scale of each row (n,) fp32; some rows at a time, as they are computed in fp32.

    Args:
        factors: (1, width) fp32, by which the columns are multiplied first.
    """
    codes = torch.empty(rows.shape, dtype=CODE_TYPE["fp8"], device=rows.device)
    scales = torch.empty(len(rows), device=rows.device)
    wide = torch.promote_types(rows.dtype, torch.float32)
    for part in quantised_weight.row_parts(len(rows), rows.shape[1], _AT_ONCE, on_gpu=rows.is_cuda):
        values = rows[part] if factors is None else rows[part].to(wide) * factors
        codes[part], scales[part] = quantise_rows(values, row_maxima(values), "fp8")
    return codes, scales


def weight_maker(name: str | None, *, products: str | None = None, keep_transposed: bool = False) -> WeightMaker:
    """A function that makes empty weights of a format of the table, or plain ones (None).

    The weights that it makes share a workspace, so a rank needs one function for its whole part of the model.

    Args:
        products: "fp8" if activations and gradients are rounded to fp8 too; with the format fp8 alone.
        keep_transposed: whether such weights keep a transposed copy of their codes.
    """
    if name is None:
        return FrozenWeight.empty
    storage, workspace = BASE_FORMATS[name], quantised_weight.Workspace()
    if products is not None:
        assert (name, products) == ("fp8", "fp8")
        return partial(
            Fp8ProductWeight.of_format, storage=storage, workspace=workspace, keep_transposed=keep_transposed
        )
    kind = quantised_weight.RowScaledWeight if storage.block is None else quantised_weight.BlockScaledWeight
    return partial(kind.of_format, storage=storage, workspace=workspace)
