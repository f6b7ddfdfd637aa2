"""Quantise and dequantise rows of a weight in plain PyTorch, with the same bits on every device. Dequantising nf4
uses the kernels of bitsandbytes if they are installed and return the same bits.

    value = scale * level(code)        scale = largest |value| of the block or row / largest level

A format with one scale per block has up to 16 levels (`LEVELS`). Each byte stores two codes, the first in its upper
half. int8 has the levels -127 to 127. fp8 has the levels of float8_e4m3fn, and the largest level is 448.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.base.installation import install_hint
from megatron_tiedlora.base.shapes import BaseFormat

# The quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E), as the fp32 numbers in bitsandbytes.
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
LEVELS = {"nf4": NF4_LEVELS}  # for each format with a scale for each block, in ascending order
LARGEST_LEVEL = {"int8": 127.0, "fp8": 448.0}
CODE_TYPE = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LEAST_DIVISOR = 1e-38  # the constant of bitsandbytes
_LEAST_SCALE = 2.0**-120


@cache  # without a cache, each weight would wait for a copy to the GPU
def levels_of(name: str, device: torch.device) -> Tensor:
    """Return the levels of a format in fp32, indexed by code."""
    return torch.tensor(LEVELS[name], dtype=torch.float32, device=device)


def quantise_blocks(values: Tensor, block: int, name: str) -> tuple[Tensor, Tensor]:
    """Return unpacked codes (rows, width) uint8 from 0 to 15, and scales (rows, number of blocks) fp32, for `values`.

    In nf4, codes and scales are equal to those of bitsandbytes for rows that are padded with zeros to complete blocks.
    Only the scales that `without_tiny` changes are different.
    """
    rows, width = values.shape
    blocks = functional.pad(values.float(), (0, -width % block)).view(rows, -1, block)
    scales = blocks.abs().amax(-1) / LEVELS[name][-1]
    scaled = blocks * (1.0 / scales.clamp(min=_LEAST_DIVISOR))[..., None]
    codes, levels = torch.zeros_like(scaled, dtype=torch.uint8), levels_of(name, torch.device("cpu"))
    for border in ((levels[:-1] + levels[1:]) / 2).tolist():  # torch.bucketize takes twice as long on a CPU
        codes += scaled > border
    return codes.view(rows, -1)[:, :width], without_tiny(scales)


def without_tiny(scales: Tensor) -> Tensor:
    """Return the scales of blocks, in which scales below 2^-120 are replaced with 0.

    Values of such a block can be subnormal. Some CPUs flush subnormal values to zero when they round to bf16.
    """
    return torch.where(scales.abs() < _LEAST_SCALE, 0.0, scales)


def pack_codes(codes: Tensor) -> Tensor:
    """Pack codes (rows, width), from 0 to 15, into (rows, ceil(width / 2)) bytes. Odd widths are padded with code 0."""
    pairs = functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack_codes(packed: Tensor, width: int) -> Tensor:
    """Return the codes that `pack_codes` packed, (rows, width) uint8."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)[:, :width]


def dequantise_blocks(packed: Tensor, scales: Tensor, levels: Tensor, width: int, block: int) -> Tensor:
    """Return values (rows, width) fp32 from packed codes and scales (rows, number of blocks), one per `block` codes.

    Args:
        levels: see `levels_of`.
    """
    values = levels[unpack_codes(packed, width).int()]
    whole = width - width % block
    values[:, :whole].unflatten(1, (-1, block)).mul_(scales[:, : whole // block, None])
    values[:, whole:].mul_(scales[:, whole // block :])
    return values


def quantised_rows(values: Tensor, storage: BaseFormat) -> Tensor:
    """Quantise and dequantise complete rows of a weight. Return the dequantised values, (rows, width) fp32."""
    if storage.block is None:
        return dequantise_rows(*quantise_rows(values, row_scales(row_maxima(values), storage.name), storage.name))
    codes, scales = quantise_blocks(values, storage.block, storage.name)
    levels = levels_of(storage.name, values.device)
    return dequantise_blocks(pack_codes(codes), scales, levels, values.shape[1], storage.block)


def row_maxima(values: Tensor) -> Tensor:
    """Return the largest |value| of each row, (rows,) fp32."""
    return values.abs().amax(1).float()


def row_scales(maxima: Tensor, name: str) -> Tensor:
    """Return the scale of each row of a stored weight in the format `name`, int8 or fp8, (rows,) fp32.

    CUDA multiplies by the inverse of a plain number. A tensor is divided, so the scales are the same on every device.

    Args:
        maxima: the largest |value| of each full row, (rows,) fp32.
    """
    return maxima / torch.full_like(maxima, LARGEST_LEVEL[name])


def quantise_rows(values: Tensor, scales: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return codes (rows, width) of the format `name`, int8 or fp8, and scales (rows,) fp32, for rows `values`.

    Args:
        scales: the largest |value| of each full row, divided by the largest level, (rows,) fp32.
    """
    largest = LARGEST_LEVEL[name]
    scaled = values.float() / torch.where(scales > 0, scales, 1.0)[:, None]
    scaled = scaled.clamp_(-largest, largest)
    return (scaled.round_() if name == "int8" else scaled).to(CODE_TYPE[name]), scales


def dequantise_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """Return values (rows, width) fp32 from int8 or fp8 codes and scales (rows,)."""
    return codes.float() * scales[:, None]


def has_nan(codes: Tensor, name: str) -> bool:
    """Return whether any uint8 code of the format `name`, int8 or fp8, is NaN."""
    return name == "fp8" and bool((codes & 127 == 127).any())


def fp8_numbers(codes: Tensor) -> Tensor:
    """Return a view of uint8 codes as e4m3 numbers."""
    return codes.view(CODE_TYPE["fp8"])


# Kernels of bitsandbytes ----------------------------------------------------------------------------------------------
#
# They are correct only if rows consist of complete blocks; otherwise the CPU kernel (0.50.2) returns wrong values with
# no error. So a kernel is compared once with plain torch before it is used.

# (packed codes (rows, width / 2), scales (rows, blocks) fp32, codes per scale, result (rows, width)) -> None
Nf4Kernel = Callable[[Tensor, Tensor, int, Tensor], None]
PACKAGE = "bitsandbytes"
_LEAST_GPU_BLOCK = 32


def nf4_kernel(out: Tensor, block: int) -> Nf4Kernel | None:
    """Return a kernel that dequantises blocks of `block` codes into `out` (rows, width), or None if there is none."""
    if out.shape[1] % block or out.shape[1] % 2 or (out.is_cuda and block < _LEAST_GPU_BLOCK):
        return None
    return _checked_kernel(out.device.type, out.dtype)


def slow_nf4(device: torch.device, dtype: torch.dtype) -> str:
    """Return the reason why no kernel can dequantise nf4 on a device, and what to do; '' if there is a kernel."""
    if _checked_kernel(device.type, dtype) is not None:
        return ""
    why = f"{PACKAGE} is not installed; {install_hint('quantised')}"
    if find_spec(PACKAGE) is not None:
        why = f"the kernel of {PACKAGE} cannot be used here for {str(dtype).removeprefix('torch.')}"
    return f"nf4 is dequantised by plain PyTorch, ten times as slowly: {why}"


@cache
def _checked_kernel(device_type: str, dtype: torch.dtype) -> Nf4Kernel | None:
    found = {"cpu": _cpu_kernel, "cuda": _gpu_kernel}[device_type](dtype) if device_type in ("cpu", "cuda") else None
    return found if found is not None and _is_right(found, device_type, dtype) else None


def _cpu_kernel(dtype: torch.dtype) -> Nf4Kernel | None:
    # The package is not imported, because that takes a second, writes to the log, and may ask the hub for more kernels.
    # Its Python functions also make a new tensor for each result.
    spec = find_spec(PACKAGE)
    suffix = {torch.bfloat16: "bf16", torch.float32: "fp32"}.get(dtype)
    if spec is None or spec.origin is None or suffix is None:
        return None
    for file in sorted(Path(spec.origin).parent.glob("libbitsandbytes_cpu.*")):
        with suppress(OSError, AttributeError):
            return _called(ctypes.CDLL(str(file))[f"cdequantize_blockwise_cpu_nf4_{suffix}"])
    return None


def _called(function: Any) -> Nf4Kernel:
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_longlong] * 3]
    function.restype = None

    def run(codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None:
        function(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), block, *out.shape)

    return run


def _gpu_kernel(dtype: torch.dtype) -> Nf4Kernel | None:
    if find_spec(PACKAGE) is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    try:
        import bitsandbytes  # noqa: F401 - the import registers its operators
    except Exception:  # plain torch computes the same values
        return None

    def run(codes: Tensor, scales: Tensor, block: int, out: Tensor) -> None:
        arguments = (codes.flatten(), scales.flatten(), block, "nf4", list(out.shape), out.dtype)
        torch.ops.bitsandbytes.dequantize_4bit.out(*arguments, out=out)

    return run


def _is_right(kernel: Nf4Kernel, device_type: str, dtype: torch.dtype) -> bool:
    """Return whether a kernel returns the same bits as plain torch, for every code and two block sizes."""
    for block in (64, 32):
        width = 5 * block
        codes = torch.arange(256, dtype=torch.uint8).repeat(5 * block // 16).view(-1, width // 2)
        scales = torch.linspace(1e-6, 3.0, len(codes) * 5).view(-1, 5)
        expected = dequantise_blocks(codes, scales, levels_of("nf4", codes.device), width, block).to(dtype)
        found = torch.empty_like(expected, device=device_type)
        try:
            kernel(codes.to(device_type), scales.to(device_type), block, found)
        except Exception:  # an operator of an earlier version has another signature
            return False
        if not torch.equal(found.cpu(), expected):
            return False
    return True
