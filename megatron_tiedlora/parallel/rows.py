"""View tensors as rows, (T, n), and run functions on a limited number of rows at a time."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

# The number of elements of its widest argument that an uncompiled kernel processes at a time on a GPU: 64 MiB in fp32.
NUMBERS_AT_ONCE = 2**24


def upcast(tensor: Tensor) -> Tensor:
    """Return `tensor` in max(fp32, its own dtype), the precision of norms, softmax and loss."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_rows(tensor: Tensor) -> Tensor:
    """Reshape (..., n) to (T, n), detached from autograd.

    Kernels always receive 2-D tensors that autograd does not treat as views, such as detached tensors. Otherwise
    torch.compile would generate several versions of each kernel.
    """
    return tensor.reshape(-1, tensor.shape[-1]).detach()


def as_wide_rows(tensor: Tensor) -> Tensor:
    """Return `as_rows` of (..., n) together with the columns that follow in memory, (T, m), m >= n.

    `tensor` may be a view of the first columns. A compiled kernel knows the distance between rows only as a size, and
    reads 16 bytes at a time only if it knows that distance.
    """
    rows = as_rows(tensor)
    (count, width), (distance, step) = rows.shape, rows.stride()
    end = (rows.storage_offset() + count * distance) * rows.itemsize
    if count < 2 or step != 1 or not width < distance < 2 * width or end > rows.untyped_storage().nbytes():
        return rows
    return rows.as_strided((count, distance), (distance, 1)).detach()


def detached(tensor: Tensor | None) -> Tensor | None:
    """Return `tensor` detached from autograd, or None if it is None."""
    return None if tensor is None else tensor.detach()


def run_in_parts(
    kernel: Callable[..., Any], arguments: tuple[Any, ...], has_rows: list[bool], at_once: int | None = None
) -> Any:
    """Return `kernel(*arguments)`, computed on a limited number of rows at a time. The results are the same.

    At most `at_once` elements of the widest argument are processed at a time, by default NUMBERS_AT_ONCE.
    """
    has_rows = [mine and argument is not None for argument, mine in zip(arguments, has_rows, strict=True)]
    wide = [argument for argument, mine in zip(arguments, has_rows, strict=True) if mine]
    num_rows, width = len(wide[0]), max(tensor[:1].numel() for tensor in wide)
    size = max((at_once or NUMBERS_AT_ONCE) // max(width, 1), 1)
    if num_rows <= size:
        return kernel(*arguments)
    results: list[Tensor | None] | None = None
    for start in range(0, num_rows, size):
        part = slice(start, start + size)
        found = kernel(*(a[part] if mine else a for a, mine in zip(arguments, has_rows, strict=True)))
        if found is None:  # it changes its arguments in place
            continue
        found = found if isinstance(found, tuple) else (found,)
        results = results or [t if t is None else t.new_empty((num_rows, *t.shape[1:])) for t in found]
        for result, tensor in zip(results, found, strict=True):
            if result is not None:
                result[part] = tensor
    if results is None:
        return None
    return tuple(results) if len(results) > 1 else results[0]


def scaled(tensor: Tensor, factor: Tensor) -> Tensor:
    """Return tensor * factor, (..., n), in the tensor's dtype. It is computed in fp32 or wider, some rows at a time.

    Args:
        factor: (), or one per row, (rows, 1).
    """
    has_rows = [True, factor.ndim > 0]
    rows = run_in_parts(lambda part, by: (upcast(part) * by).to(part.dtype), (as_rows(tensor), factor), has_rows)
    return cast(Tensor, rows).view(tensor.shape)
