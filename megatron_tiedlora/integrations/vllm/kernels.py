"""Add tied adapters to the output of a linear on a GPU: y += v * (B (u * (A x))), each token with its own adapter.

vLLM's shrink kernel computes A x. The kernel of this module takes the place of vLLM's expand kernel. It reads the same
metadata, in which the tokens are sorted by slot, and its grid has the same axes. Everything that it needs to know of
sizes is a constant of the compiled kernel, so a call copies nothing to the GPU, and CUDA graphs can record it.

The module imports Triton, and nothing of vLLM.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tiedlora.convert.vera_files import TargetFactors

_FEW, _MANY = 16, 64  # tokens of a tile; 16 are the fewest rows, and ranks, of a matmul on tensor cores
_COLUMNS = 128  # of a tile


@triton.jit
def _expand_tile(  # type: ignore[no-untyped-def]  # Triton reads annotations in its own way
    y_ptr, low_ptr, b_ptr, u_ptr, v_ptr, tokens_ptr, counts_ptr, starts_ptr, slots_ptr,
    ENDS: tl.constexpr, FIRST_TILES: tl.constexpr, NUM_SLICES: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The tokens of group g are tokens[starts[g] : starts[g] + counts[g]], and their slot is slots[g]. It is -1 for
    # tokens without an adapter, and for groups that this batch does not have.
    group = tl.program_id(2)
    slot = tl.load(slots_ptr + group).to(tl.int64)
    count = tl.load(counts_ptr + group)
    first = tl.program_id(0) * BLOCK_M
    if (slot < 0) | (first >= count):
        return
    # Slices have tiles of their own: a tile has columns of one slice, and one u.
    tile = tl.program_id(1)
    column, end, own = tile * BLOCK_N, ENDS[0], 0
    for index in tl.static_range(1, NUM_SLICES):
        later = tile >= FIRST_TILES[index]
        column = tl.where(later, ENDS[index - 1] + (tile - FIRST_TILES[index]) * BLOCK_N, column)
        end = tl.where(later, ENDS[index], end)
        own = tl.where(later, index, own)
    OUT: tl.constexpr = ENDS[NUM_SLICES - 1]
    rows = first + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    present, inside = rows < count, columns < end
    token = tl.load(tokens_ptr + tl.load(starts_ptr + group) + rows, mask=present, other=0)
    # Everything that does not depend on the matmul is loaded before it, so that these loads overlap.
    at = y_ptr + token.to(tl.int64)[:, None] * OUT + columns[None, :]
    mask = present[:, None] & inside[None, :]
    y = tl.load(at, mask=mask, other=0)
    v = tl.load(v_ptr + slot * OUT + columns, mask=inside, other=0)
    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    for rank in range(0, RANK, BLOCK_K):
        ranks = rank + tl.arange(0, BLOCK_K)
        used = ranks < RANK
        b_at = b_ptr + slot * (OUT * RANK) + columns[None, :] * RANK + ranks[:, None]
        b = tl.load(b_at, mask=inside[None, :] & used[:, None], other=0)
        low = tl.load(low_ptr + token[:, None] * RANK + ranks[None, :], mask=present[:, None] & used[None, :], other=0)
        u = tl.load(u_ptr + (slot * NUM_SLICES + own) * RANK + ranks, mask=used, other=0)
        total = tl.dot((low * u[None, :]).to(b.dtype), b, total, input_precision="ieee")
    tl.store(at, (y.to(tl.float32) + total * v.to(tl.float32)[None, :]).to(y.dtype), mask=mask)


def _add_expanded(
    y: Tensor, low: Tensor, b: Tensor, u: Tensor, v: Tensor, slices: list[int], metadata: list[Tensor]
) -> None:
    *groups, no_adapter, _ = metadata
    if no_adapter.item():  # on the CPU
        return
    (num_tokens, out), rank = y.shape, b.shape[-1]
    sizes = tuple(slices) if u.shape[1] > 1 else (sum(slices),)  # slices that share u are one
    assert sum(sizes) == out == b.shape[-2] == v.shape[1] and len(sizes) == u.shape[1], (sizes, y.shape, u.shape)
    assert all(tensor.is_contiguous() for tensor in (y, low, b, u, v))
    tiles = [triton.cdiv(size, _COLUMNS) for size in sizes]
    # Large batches have large tiles, as the grid has blocks for every slot that may have all tokens.
    block = _FEW if num_tokens <= _FEW else _MANY
    _expand_tile[triton.cdiv(num_tokens, block), sum(tiles), len(groups[-1])](
        *(y, low, b, u, v, *groups),
        ENDS=tuple(accumulate(sizes)), FIRST_TILES=(0, *accumulate(tiles[:-1])), NUM_SLICES=len(sizes), RANK=rank,
        BLOCK_M=block, BLOCK_N=_COLUMNS, BLOCK_K=min(max(triton.next_power_of_2(rank), 16), 64),
        num_warps=4 if block == _FEW else 8,  # with 4, a large tile takes up to 246 registers of 255
    )  # fmt: skip


# An operator, which torch.compile calls and does not look into. It is registered when the module is imported, and not
# at the first call: a server that loads compiled code from its cache calls nothing of this module before that code.
_LIBRARY = torch.library.Library("tied_lora", "FRAGMENT")
_LIBRARY.define("add_expanded" + torch.library.infer_schema(_add_expanded, mutates_args=("y",)))
_LIBRARY.impl("add_expanded", _add_expanded, "CompositeExplicitAutograd")  # on every kind of device
torch.library.register_fake("tied_lora::add_expanded", lambda *_: None, lib=_LIBRARY)


class GpuTokens:
    """The slots of the tokens, which vLLM's PunicaWrapperGPU knows."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper

    def prepare(self) -> None:
        """Do nothing. The wrapper has sorted the tokens by slot."""

    def add_update(self, y: Tensor, x: Tensor, factors: TargetFactors, slices: tuple[int, ...]) -> None:
        """Add v * (B (u * (A x))) to the tokens of every slot, in place. Rows of tokens without an adapter do not
        change.

        A x and u * (A x) are fp32, and rounded once to the dtype of B. B's product, v's and the sum are fp32, and y is
        rounded once. All tensors are contiguous.

        Args:
            y, x: the output and the input of the linear, (tokens, out) and (tokens, in), both in the dtype of A and B.
            factors: the slots of one layer; u has one row or a row for each of the slices.
            slices: the sizes of the parts of the output that have a u each, on this rank; their sum is `out`.
        """
        low = torch.empty((1, len(x), factors.b.shape[-1]), dtype=torch.float32, device=x.device)
        self.wrapper.add_shrink(low, x, (factors.a,), 1.0)
        _, *metadata = self.wrapper.token_mapping_meta.meta_args(len(x), False)  # of all slots
        torch.ops.tied_lora.add_expanded(y, low, *factors[1:], list(slices), metadata)
