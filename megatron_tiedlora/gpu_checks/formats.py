"""For part correct: quantised weights have a CPU's bits on this device, and its products in fp8 are a CPU's."""

from __future__ import annotations

import torch

from megatron_tiedlora.base.base_formats import BASE_FORMATS, FP8_CAPABILITY
from megatron_tiedlora.gpu_checks.attention import relative
from megatron_tiedlora.gpu_checks.records import Report
from megatron_tiedlora.parallel.fp8_products import weight_maker
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight

ROWS, WIDTHS = 192, (1024, 1040)  # the second is no multiple of nf4's block, which bitsandbytes cannot dequantise
TOKENS = 64
PRODUCT_BOUND = 0.01  # bf16 rounds by up to 0.004; without a scale the error is over 0.1
BITS_FIX = "a base in this format has other values here than on a CPU: report the versions of part env"
PRODUCT_FIX = "train without --products fp8 here, and report the versions of part env"


def check_base_formats(report: Report, device: torch.device) -> None:
    """Check the stored bits and dequantised values of each format, and both passes of products in fp8."""
    for name in BASE_FORMATS:
        for width in WIDTHS:
            label = f"{name}, {width} columns: bits as on a CPU"
            with report.attempt(label):
                weights = [_loaded(width, on, torch.bfloat16, name) for on in (torch.device("cpu"), device)]
                wrong = sum(_differing(*pair) for pair in zip(*map(_contents, weights), strict=True))
                report.expect(label, wrong == 0, wrong, unit="numbers differ", expected="0", fix=BITS_FIX)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        report.skip("products in fp8", f"the GPU's compute capability is below {'.'.join(map(str, FP8_CAPABILITY))}")
        return
    for kept in (False, True):
        label = f"products in fp8{', transposed copies kept' if kept else ''}"
        with report.attempt(label, fix=PRODUCT_FIX):
            report.at_most(label, _product_error(device, kept), PRODUCT_BOUND, fix=PRODUCT_FIX)


def _loaded(width: int, device: torch.device, dtype: torch.dtype, name: str, **products: object) -> FrozenWeight:
    values = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(3)).bfloat16()
    with device:
        weight = weight_maker(name, **products)(*values.shape, dtype=dtype)  # type: ignore[arg-type]
    weight.load(values.to(device))
    return weight


def _contents(weight: FrozenWeight) -> list[torch.Tensor]:
    """What is stored, and the values in 16 bits, as a matmul with ones reads them."""
    device = next(iter(weight.parameters.values())).device
    ones = torch.eye(weight.local_shape[0], dtype=torch.bfloat16, device=device)
    return [*(stored.detach().cpu() for stored in weight.parameters.values()), weight.times(ones).cpu()]


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    return int((found != expected).sum())


def _product_error(device: torch.device, keep_transposed: bool) -> float:
    """The larger one of both passes' errors by norm, relative to a CPU's in fp64 of the same 8-bit numbers."""
    width = WIDTHS[0]
    draw = torch.Generator().manual_seed(4)
    x, grad_y = (torch.randn(TOKENS, size, generator=draw).bfloat16() for size in (width, ROWS))
    exact = _loaded(width, torch.device("cpu"), torch.float64, "fp8", products="fp8")
    found = _loaded(width, device, torch.bfloat16, "fp8", products="fp8", keep_transposed=keep_transposed)
    return max(
        relative(found.times_transposed(x.to(device)).cpu(), exact.times_transposed(x.double())),
        relative(found.times(grad_y.to(device)).cpu(), exact.times(grad_y.double())),
    )
