"""bitsandbytes' kernels that dequantise nf4, where they are installed and give the bits of `quantise`.

They are right only if rows are whole blocks: elsewhere the CPU's (0.50.2) returns other numbers without an error. So a
kernel is compared once with plain torch before it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.extras import install_hint
from megatron_tiedlora.parallel.quantise import dequantise_blocks

# (packed codes (rows, width / 2), scales (rows, blocks) fp32, codes for each scale, result (rows, width)) -> None
Kernel = Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor], None]
PACKAGE = "bitsandbytes"
_LEAST_GPU_BLOCK = 32


def nf4_kernel(out: torch.Tensor, block: int) -> Kernel | None:
    """The kernel that can fill `out` (rows, width) from codes with a scale for each `block`; None if there is none."""
    if out.shape[1] % block or out.shape[1] % 2 or (out.is_cuda and block < _LEAST_GPU_BLOCK):
        return None
    return _checked_kernel(out.device.type, out.dtype)


def slow_nf4(device: torch.device, dtype: torch.dtype) -> str:
    """Why no kernel dequantises nf4 on a device, and what to do; '' if one does."""
    if _checked_kernel(device.type, dtype) is not None:
        return ""
    why = f"{PACKAGE} is not installed; {install_hint('quantised')}"
    if find_spec(PACKAGE) is not None:
        why = f"the kernel of {PACKAGE} is not right here for {str(dtype).removeprefix('torch.')}"
    return f"nf4 is dequantised by plain PyTorch, ten times as slowly: {why}"


@cache
def _checked_kernel(device_type: str, dtype: torch.dtype) -> Kernel | None:
    found = {"cpu": _cpu_kernel, "cuda": _gpu_kernel}[device_type](dtype) if device_type in ("cpu", "cuda") else None
    return found if found is not None and _is_right(found, device_type, dtype) else None


def _cpu_kernel(dtype: torch.dtype) -> Kernel | None:
    # Not by an import of the package: that takes a second, writes to the log, and may ask the hub for more kernels.
    # And its Python functions make a new tensor for each result.
    spec = find_spec(PACKAGE)
    suffix = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
    if spec is None or spec.origin is None or suffix is None:
        return None
    for file in sorted(Path(spec.origin).parent.glob("libbitsandbytes_cpu.*")):
        with suppress(OSError, AttributeError):
            return _called(ctypes.CDLL(str(file))[f"cdequantize_blockwise_cpu_nf4_{suffix}"])
    return None


def _called(function: Any) -> Kernel:
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_longlong] * 3]
    function.restype = None

    def run(codes: torch.Tensor, scales: torch.Tensor, block: int, out: torch.Tensor) -> None:
        function(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), block, *out.shape)

    return run


def _gpu_kernel(dtype: torch.dtype) -> Kernel | None:
    if find_spec(PACKAGE) is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    try:
        import bitsandbytes  # noqa: F401 - it registers its operators
    except Exception:  # whatever fails in it, plain torch gives the same values
        return None

    def run(codes: torch.Tensor, scales: torch.Tensor, block: int, out: torch.Tensor) -> None:
        arguments = (codes.flatten(), scales.flatten(), block, "nf4", list(out.shape), out.dtype)
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)

    return run


def _is_right(kernel: Kernel, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a kernel gives the bits of plain torch, for every code and blocks of two sizes."""
    for block in (64, 32):
        width = 5 * block
        codes = torch.arange(256, dtype=torch.uint8).repeat(5 * block // 16).view(-1, width // 2)
        scales = torch.linspace(1e-6, 3.0, len(codes) * 5).view(-1, 5)
        expected = dequantise_blocks(codes, scales, width, block, "nf4").to(dtype)
        found = torch.empty_like(expected, device=device_type)
        try:
            kernel(codes.to(device_type), scales.to(device_type), block, found)
        except Exception:  # an operator of an earlier version has another signature
            return False
        if not torch.equal(found.cpu(), expected):
            return False
    return True
