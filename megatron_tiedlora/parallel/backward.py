"""Handwritten backward passes: they cannot be differentiated again, and that of a loss can run in its forward pass.

The backward pass of a loss needs only the incoming factor, which scales the gradients. So only the gradients are saved.

Rows of several adapters are consecutive in one tensor, a piece for each. A sum over one adapter's rows, or a factor for
them, is computed as if the tensor had no other rows.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.parallel.kernels import scaled


class Piece(NamedTuple):
    """Consecutive rows of one owner.

    Attributes:
        owner: its number, from 0.
        size: the number of rows.
    """

    owner: int
    size: int


Pieces = tuple[Piece, ...]


def starts_of(pieces: Sequence[Piece]) -> list[int]:
    """The first row of each piece."""
    return [0, *accumulate(piece.size for piece in pieces)][: len(pieces)]


def part_of(pieces: Sequence[Piece], start: int, stop: int) -> Pieces:
    """The pieces of rows `start` to `stop` - 1."""
    found = []
    for piece, first in zip(pieces, starts_of(pieces), strict=True):
        size = min(stop, first + piece.size) - max(start, first)
        if size > 0:
            found.append(Piece(piece.owner, size))
    return tuple(found)


def scaled_by_owner(tensor: Tensor, factors: Tensor, pieces: Sequence[Piece] | None) -> Tensor:
    """`scaled`, with each owner's own factor; without pieces there is one owner, and one factor ().

    Args:
        tensor: (..., n), whose rows the pieces are; or (n,), whose numbers they are.
        factors: (owners,).
    """
    if pieces is None:
        return scaled(tensor, factors)
    rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
    parts = zip(rows.split([piece.size for piece in pieces]), pieces, strict=True)
    return torch.cat([scaled(part, factors[piece.owner]) for part, piece in parts]).view(tensor.shape)


def sums_by_owner(numbers: Tensor, pieces: Sequence[Piece], *, at_once: int) -> Tensor:
    """The sum of each owner's numbers, (owners,), added up in chunks of `at_once` numbers of each piece.

    Args:
        numbers: (n,).
    """
    totals = [numbers.new_zeros(()) for _ in range(1 + max(piece.owner for piece in pieces))]
    for part, piece in zip(numbers.split([piece.size for piece in pieces]), pieces, strict=True):
        for chunk in part.split(at_once):
            totals[piece.owner] += chunk.sum()
    return torch.stack(totals)


def first_derivative_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's `backward` that raises an error if it is differentiated again.

    torch's `once_differentiable` raises only if the incoming gradient has a graph. The gradient of a loss has none, so
    autograd would silently treat what is computed from it as a constant.

    Raises:
        RuntimeError: in a backward pass with `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the frozen base has no second derivative: call backward without create_graph=True")
        return backward(ctx, *gradients)

    return checked


class _EarlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], pieces: Sequence[Pieces | None], *inputs: Tensor | None
    ) -> Tensor:
        ctx.needs, ctx.pieces = ctx.needs_input_grad[2:], pieces
        inner = [
            tensor.detach().requires_grad_() if tensor is not None and needs else tensor
            for tensor, needs in zip(inputs, ctx.needs, strict=True)
        ]
        wanted = [tensor for tensor, needs in zip(inner, ctx.needs, strict=True) if tensor is not None and needs]
        # A caller's hooks are for tensors saved until the backward pass; these are not.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            loss = function(*inner)
        # Not autograd.grad, inside of which torch's hooks for several gradients fail (seen in 2.13).
        loss.backward(torch.ones_like(loss), inputs=wanted)
        ctx.save_for_backward(*(tensor.grad for tensor in wanted))
        return loss.detach()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        needs_and_pieces = zip(ctx.needs, ctx.pieces, strict=True)
        found = (scaled_by_owner(next(saved), gradient, own) if needs else None for needs, own in needs_and_pieces)
        return None, None, *found


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def run_with_early_backward(
    function: Callable[..., Tensor], *inputs: Tensor | None, pieces: Sequence[Pieces | None] | None = None
) -> Tensor:
    """`function(*inputs)`, a scalar, or the losses of several owners, (owners,).

    Only the gradients of the inputs that need one are saved for backward.

    Args:
        function: it is differentiated for these inputs alone; other tensors that it uses get no gradient.
        inputs: of any float dtype. At least one needs a gradient, and the result must depend on all that do.
        pieces: with several losses, which rows of each input belong to which loss. A loss depends on its own alone.
    """
    loss: Tensor = _EarlyBackward.apply(function, pieces or [None] * len(inputs), *inputs)
    return loss
