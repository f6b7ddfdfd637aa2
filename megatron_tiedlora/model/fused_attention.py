"""Causal attention on GPUs: one call of a fused kernel for all documents of all rows, and which kernel that is.

A row that is not packed is one document, so packed and other rows take one path, and no kernel sees a shape that it
makes a plan for (cuDNN, which PyTorch prefers for rows on Hopper, makes one for each new length). In this order, the
first that runs on the device with the dtype and the head dim:

    FlashAttention 3            16 bits, compute capability 9.x, where `flash_attn_interface` is installed
    flash_attn                  16 bits, from 8.0 on, where FlashAttention 2 is installed
    PyTorch's flash             16 bits, from 8.0 on
    PyTorch's memory-efficient  fp32, and 16 bits on older GPUs or with heads of more than 256; copies keys and values
                                for every query head that shares them
    one after another           PyTorch's attention, document by document: whatever is left

PyTorch's own two are called as operators: their first arguments are the same from 2.6 to 2.15, the public function for
different lengths (2.10 on) is not, and may choose cuDNN. CPUs have `cpu_attention.py` instead.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch.nn import functional

from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.model.documents import Documents
from megatron_tiedlora.parallel.layers import padded

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, float], torch.Tensor]
"""From queries (tokens, heads, head_dim), keys and values (tokens, kv heads, head_dim), documents and the scale of the
scores to the attention output, as the queries."""

HALF = (torch.bfloat16, torch.float16)
_CAUSAL = 1  # the memory-efficient kernel's mask type: a query sees keys up to its own position


@dataclass(frozen=True)
class AttentionRoute:
    """What computes attention on a device.

    Attributes:
        name: for the user.
        reason: why it and not one that comes before it.
        attend: None on a CPU, where `cpu_attention.attend_by_tiles` does it.
    """

    name: str
    reason: str
    attend: Attend | None

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


@cache
def choose_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, deterministic: bool = False
) -> AttentionRoute:
    """The first route that runs on `device`: each is tried forwards and backwards on a few tokens.

    Args:
        deterministic: gradients must be the same bits every time. flash_attn's kernels are told so, and are left out
            where they cannot; PyTorch's own obey torch.use_deterministic_algorithms(True), which is the caller's part.
    """
    if device.type == "cpu":
        return AttentionRoute("blocks of queries", "a CPU", None)
    passed_over: list[str] = []
    for candidate in CANDIDATES if device.type == "cuda" else ():
        obstacle = candidate.obstacle(torch.cuda.get_device_capability(device), dtype, head_dim)
        if obstacle is None:
            try:
                attend = candidate.make(deterministic)
                _try(attend, device, dtype, head_dim)
                return AttentionRoute(candidate.name, "; ".join(passed_over) or "the first choice", attend)
            except torch.OutOfMemoryError:  # no fault of the kernel's
                raise
            except Exception as error:  # whatever a library of another build brings about: a run can do without it
                obstacle = f"does not run here: {type(error).__name__}: {first_line(error)}"
        passed_over.append(f"{candidate.name} {obstacle}")
    reason = "; ".join(passed_over) or f"fused kernels are for CUDA, not for {device.type}"
    return AttentionRoute("PyTorch's attention, one document after another", reason, one_by_one)


def attend_within(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, attend: Attend
) -> torch.Tensor:
    """Causal attention within each document, scaled by 1 / sqrt(head_dim).

    Args:
        query: (b, heads, s, head_dim); key and value: (b, kv heads, s, head_dim).
        attend: of a route.

    Returns:
        (b, s, heads * head_dim).
    """
    size, _, length, head_dim = query.shape
    missing = padded(head_dim) - head_dim  # kernels load 8 numbers at once

    def by_tokens(heads: torch.Tensor) -> torch.Tensor:
        rows = heads.transpose(1, 2).flatten(0, 1)
        return functional.pad(rows, (0, missing)) if missing else rows

    output = attend(by_tokens(query), by_tokens(key), by_tokens(value), documents, head_dim**-0.5)
    return (output[..., :head_dim] if missing else output).reshape(size, length, -1)


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float
) -> torch.Tensor:
    """PyTorch's attention of each document by itself; of all at once where they are equally long."""
    grouped = query.shape[1] != key.shape[1]

    def within(length: int, *rows: torch.Tensor) -> torch.Tensor:
        query, key, value = (heads.unflatten(0, (-1, length)).transpose(1, 2) for heads in rows)
        output = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
        )
        return output.transpose(1, 2).flatten(0, 1)

    if (len(documents.bounds) - 1) * documents.longest == len(query):
        return within(documents.longest, query, key, value)
    parts = (
        within(stop - start, query[start:stop], key[start:stop], value[start:stop])
        for start, stop in pairwise(documents.bounds)
    )
    return torch.cat(list(parts))


@dataclass(frozen=True)
class Candidate:
    """A fused kernel, and where it runs.

    Attributes:
        make: of `deterministic`.
        least: compute capability by dtype; other dtypes it does not have.
        below: the first compute capability that it is not for.
        most: head dim.
        module: that must be installed.
    """

    name: str
    make: Callable[[bool], Attend]
    least: dict[torch.dtype, tuple[int, int]]
    below: tuple[int, int] | None = None
    most: int | None = None
    module: str | None = None

    def obstacle(self, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it cannot run, in a few words that follow its name."""
        if dtype not in self.least:
            return f"has no {str(dtype).removeprefix('torch.')}"
        if capability < self.least[dtype] or (self.below is not None and capability >= self.below):
            return f"is not for compute capability {capability[0]}.{capability[1]}"
        if self.most is not None and head_dim > self.most:
            return f"has no heads of {head_dim}"
        if self.module is not None and find_spec(self.module) is None:
            return "is not installed"
        return None


def _from_library(module: str, deterministic: bool) -> Attend:
    """`flash_attn_varlen_func` of a library: FlashAttention 2 and 3 name these arguments alike."""
    function = importlib.import_module(module).flash_attn_varlen_func
    further = {"deterministic": True} if deterministic else {}

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float
    ) -> torch.Tensor:
        found = function(
            query,
            key,
            value,
            cu_seqlens_q=documents.offsets,
            cu_seqlens_k=documents.offsets,
            max_seqlen_q=documents.longest,
            max_seqlen_k=documents.longest,
            softmax_scale=scale,
            causal=True,
            **further,
        )
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found  # early versions of 3 add log sums
        return output

    return attend


def _torch_flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float
) -> torch.Tensor:
    offsets, longest = documents.offsets, documents.longest
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
    )[0]
    return output


def _torch_efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, scale: float
) -> torch.Tensor:
    offsets, longest = documents.offsets, documents.longest
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    one_row = (heads[None] for heads in (query, key, value))
    output: torch.Tensor = torch.ops.aten._efficient_attention_forward(
        *one_row, None, offsets, offsets, longest, longest, 0.0, _CAUSAL, True, scale=scale
    )[0]
    return output.squeeze(0)


def _obedient(attend: Attend) -> Callable[[bool], Attend]:
    """A kernel of PyTorch's, which does as torch.use_deterministic_algorithms says."""
    return lambda deterministic: attend


_AMPERE = dict.fromkeys(HALF, (8, 0))
CANDIDATES = (
    Candidate(
        "FlashAttention 3",
        partial(_from_library, "flash_attn_interface"),
        dict.fromkeys(HALF, (9, 0)),
        below=(10, 0),
        most=256,
        module="flash_attn_interface",
    ),
    Candidate("flash_attn", partial(_from_library, "flash_attn"), _AMPERE, most=256, module="flash_attn"),
    Candidate("PyTorch's flash kernel", _obedient(_torch_flash), _AMPERE, most=256),
    Candidate(
        "PyTorch's memory-efficient kernel",
        _obedient(_torch_efficient),
        {torch.float32: (5, 0), torch.float16: (5, 0), torch.bfloat16: (8, 0)},
    ),
)


def _try(attend: Attend, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Forwards and backwards on two short documents with grouped queries; raises what goes wrong."""
    documents = Documents([0, 3, 8], torch.tensor([0, 3, 8], dtype=torch.int32, device=device), 5)
    with torch.enable_grad():
        query, key, value = (
            torch.zeros(8, num_heads, padded(head_dim), dtype=dtype, device=device, requires_grad=True)
            for num_heads in (2, 1, 1)
        )
        attend(query, key, value, documents, 1.0).sum().backward()
    if query.is_cuda:
        torch.cuda.synchronize(device)  # a kernel that is not for this GPU may say so late
