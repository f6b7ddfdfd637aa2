"""Random slots of one linear, batches of tokens, and y + v * (B (u * (A x))) of each token in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tiedlora.convert.vera_files import TargetFactors

SLOTS = 4
# The slot of each token, -1 for the base. The runs of a slot are ragged, apart, and longer than a tile; slot 2 is not
# used. The metadata has room for more tokens, and for more slots than a batch has.
MANY = (*[1] * 3, *[-1] * 5, *[0] * 70, -1, *[3] * 17, *[0] * 4, 1, -1, -1)
FEW = (3, -1, 0, 3, 3, 1, -1)
# Ranks and sizes of slices: all sizes in whole tiles, and slices that end within one, at odd places too.
SIZES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (8, (256, 128, 128)),
    (4, (200, 72, 72)),
    (16, (576, 192, 192)),
    (24, (7, 130, 129)),
    (64, (40,)),
    (80, (136, 264)),
)


@dataclass(frozen=True)
class Update:
    """The arguments of `add_tied_update` beside the wrapper, and the slot of each token."""

    y: Tensor
    x: Tensor
    a: Tensor
    b: Tensor
    u: Tensor
    v: Tensor
    slices: tuple[int, ...]
    mapping: tuple[int, ...]

    @property
    def rest(self) -> tuple[Any, ...]:
        """The arguments after y."""
        return self.x, self.a, self.b, self.u, self.v, self.slices

    @property
    def base_rows(self) -> Tensor:
        """Whether each token has no adapter, (tokens,)."""
        return torch.tensor(self.mapping) < 0

    def expected(self) -> Tensor:
        """y after the update in fp64, one token and one slice at a time."""
        y = self.y.double()
        for token, slot in enumerate(self.mapping):
            if slot < 0:
                continue
            low, first = self.a[slot, 0].double() @ self.x[token].double(), 0
            for number, size in enumerate(self.slices):
                part, u = slice(first, first + size), self.u[slot, number if self.u.shape[1] > 1 else 0].double()
                y[token, part] += self.v[slot, part].double() * (self.b[slot, 0, part].double() @ (u * low))
                first += size
        return y


def make_update(
    mapping: tuple[int, ...], rank: int, slices: tuple[int, ...], num_u: int, dtype: torch.dtype, width: int = 96
) -> Update:
    """An update whose A x, and whose rows of y, are about 1. y and its update are of the same size."""
    draw = torch.Generator().manual_seed(rank)
    out = sum(slices)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    return Update(
        y=drawn(len(mapping), out).to(dtype),
        x=drawn(len(mapping), width).to(dtype),
        a=(drawn(SLOTS, 1, rank, width) / width**0.5).to(dtype),
        b=(drawn(SLOTS, 1, out, rank) / rank**0.5).to(dtype),
        u=drawn(SLOTS, num_u, rank),
        v=drawn(SLOTS, out).to(dtype),
        slices=slices,
        mapping=mapping,
    )


def add_tied_update(kernels: Any, wrapper: Any, y: Tensor, x: Tensor, *factors_and_slices: Any) -> None:
    """What a layer calls."""
    *factors, slices = factors_and_slices
    kernels.GpuTokens(wrapper).add_update(y, x, TargetFactors(*factors), slices)


def check_update(add: Callable[..., None], wrapper: Any, update: Update) -> None:
    """Add an update with `add_tied_update` and the metadata of its tokens: values, and base rows bit for bit."""
    y = update.y.clone()
    add(wrapper, y, *update.rest)
    near = 2e-3 if y.dtype == torch.float16 else 2e-6
    torch.testing.assert_close(y.double(), update.expected(), rtol=near, atol=4 * near)
    assert torch.equal(y[update.base_rows], update.y[update.base_rows])


@contextmanager
def interpreted(kernels: Any) -> Iterator[None]:
    """Triton's interpreter runs the kernel of `kernels` on the CPU."""
    from triton.runtime.interpreter import InterpretedFunction

    kept = kernels._expand_tile
    kernels._expand_tile = InterpretedFunction(kept.fn)
    try:
        yield
    finally:
        kernels._expand_tile = kept
