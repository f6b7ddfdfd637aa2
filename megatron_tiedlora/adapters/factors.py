"""What layers use of the tensors of one linear: A, and F = scale diag(v) B diag(u); and the gradients of these tensors.

A tensor has a slot for each group of layers that share it. It is stacked over slots unless there is one for all layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base.methods import Sharing
from megatron_tiedlora.parallel.backward import first_derivative_only


@cache
def layer_slots(shared_by: Sharing, layers: tuple[int, ...]) -> dict[int, int]:
    """The slot of each adapted layer; slots are in the order of their first layers."""
    keys: list[Hashable] = list(layers) if shared_by == "one" else [None] * len(layers)
    if isinstance(shared_by, int):
        keys = [index // shared_by for index in range(len(layers))]
    elif isinstance(shared_by, tuple):
        keys = [next((group for group in shared_by if layer in group), layer) for layer in layers]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return {layer: numbers[key] for layer, key in zip(layers, keys, strict=True)}


Slots = tuple[int, ...] | None  # the slot that each layer of a stage uses, of those that the rank holds; or not stacked


class LinearFactors(NamedTuple):
    """B, u and v of a linear on a rank, their slots, and alpha / r. A tensor that is None counts as ones.

    A alone takes the place of B, with a scale of 1.
    """

    tensors: tuple[torch.Tensor | None, ...]
    slots: Sequence[Slots]
    scale: float
    num_layers: int

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """F of each layer, (o, r), in `dtype` and without a gradient. Layers with the same slots have one in common."""
        of_layers = list(zip(*(slots or (0,) * self.num_layers for slots in self.slots), strict=True))
        numbers = {used: number for number, used in enumerate(dict.fromkeys(of_layers))}
        used = (some and different for some, different in zip(self.slots, zip(*numbers, strict=True), strict=True))
        b, u, v = map(_read, self.tensors, used)
        rows = fold(b, u, v, self.scale).detach().to(dtype).expand(len(numbers), -1, -1).unbind(0)
        return [rows[numbers[used]] for used in of_layers]

    def stand_ins(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that receive the gradient of each layer's F; None if it has none."""
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in self.tensors):
            return (None,) * self.num_layers
        stand_ins: tuple[torch.Tensor, ...] = _StandIns.apply(*self.tensors, *self[1:])
        return stand_ins


def _read(tensor: torch.Tensor | None, slots: Slots) -> Any:
    """Some slots of a tensor, (slots, ...); itself if these are all of it, in order, or if it is not stacked."""
    if tensor is None or slots is None or slots == tuple(range(len(tensor))):
        return tensor
    return torch.stack([tensor[slot] for slot in slots])


def _add_up(addends: torch.Tensor, slots: Slots, number: int) -> torch.Tensor:
    """The gradient of a tensor of so many slots from those of each layer, (layers, ...)."""
    if slots is None or slots == tuple(range(number)):
        return addends.sum(0) if slots is None else addends
    total = addends.new_zeros(number, *addends.shape[1:])
    for slot, addend in zip(slots, addends, strict=True):
        total[slot].add_(addend)
    return total


def fold(b: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None, scale: float) -> torch.Tensor:
    """scale diag(v) B diag(u), (o, r), or (n, o, r) if b (n, o, r), u (n, r) or v (n, o) is stacked."""
    rows = b if v is None else v[..., None] * b
    scaled = rows if u is None else rows * u[..., None, :]
    return scaled if scale == 1.0 else scaled * scale


class _StandIns(torch.autograd.Function):
    """Stand-ins that receive the gradient of each layer's F = scale diag(v) B diag(u), in the adapter's dtype.

    autograd casts a gradient to its tensor's dtype, and F has the base's. An fp32 gradient therefore needs an fp32
    tensor, whose values are never read. With the gradients G of F, for all layers at once,

        dB = s diag(v) G diag(u)      dv = row sums of s G diag(u) B      du = column sums of s diag(v) G B
    """

    @staticmethod
    def forward(
        ctx: Any,
        b: torch.Tensor,
        u: torch.Tensor | None,
        v: torch.Tensor | None,
        slots: Sequence[Slots],
        scale: float,
        num_layers: int,
    ) -> tuple[torch.Tensor, ...]:
        needs_b, needs_u, needs_v = ctx.needs_input_grad[:3]
        used = (b, needs_u or needs_v), (u, needs_b or needs_v), (v, needs_b or needs_u)
        # Detached: under ZeRO-3 the Parameter is emptied when the adapter's call returns.
        ctx.save_for_backward(*(tensor.detach() if tensor is not None and needed else None for tensor, needed in used))
        ctx.scale, ctx.slots, ctx.sizes = scale, slots, [0 if tensor is None else len(tensor) for tensor in (b, u, v)]
        return tuple(b.new_empty(1).expand(b.shape[-2:]) for _ in range(num_layers))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        b, u, v = map(_read, ctx.saved_tensors, ctx.slots)
        of_b, of_u, of_v = zip(ctx.slots, ctx.sizes, strict=True)
        needs_b, needs_u, needs_v = ctx.needs_input_grad[:3]
        grad_f = torch.stack(gradients)
        grad_b = grad_u = grad_v = None
        if needs_b:
            grad_b = _add_up(fold(grad_f, u, v, ctx.scale), *of_b)
        if needs_u:
            grad_u = _add_up((fold(grad_f, None, v, ctx.scale) * b).sum(-2), *of_u)
        if needs_v:
            grad_v = _add_up((fold(grad_f, u, None, ctx.scale) * b).sum(-1), *of_v)
        return grad_b, grad_u, grad_v, None, None, None
