"""What layers use of the tensors of one linear: A, and F = scale diag(v) B diag(u); and the gradients of these tensors.

A tensor is stacked over slots, one for each group of layers that share it, unless all layers share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.parallel.backward import first_derivative_only


class Slots(NamedTuple):
    """The slots of a tensor that the layers of a stage use.

    Attributes:
        number: how many the rank holds; 0 if the tensor is not stacked.
        of_layers: the slot of each layer.
    """

    number: int
    of_layers: tuple[int, ...]

    def read(self, tensor: torch.Tensor | None, some: tuple[int, ...]) -> Any:
        """Some slots of the tensor, (slots, ...); the tensor itself if these are all, or if it is not stacked."""
        if tensor is None or not self.number or some == tuple(range(self.number)):
            return tensor
        return torch.stack([tensor[slot] for slot in some])

    def add_up(self, addends: torch.Tensor) -> torch.Tensor:
        """The gradient of the tensor from those of each layer, (layers, ...)."""
        if not self.number:
            return addends.sum(0)
        if self.of_layers == tuple(range(self.number)):
            return addends
        total = addends.new_zeros(self.number, *addends.shape[1:])
        for slot, addend in zip(self.of_layers, addends, strict=True):
            total[slot].add_(addend)
        return total


class Factors(NamedTuple):
    """B, u and v of a linear on a rank; None stands for ones. A alone takes the place of B, with a scale of 1.

    Attributes:
        slots: of each of the three.
    """

    b: torch.Tensor
    u: torch.Tensor | None
    v: torch.Tensor | None
    scale: float
    slots: Sequence[Slots]

    @torch.no_grad()
    def values(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """F of each layer, (o, r), in `dtype` and without a gradient. Layers with the same slots have one in common."""
        of_layers = list(zip(*(of.of_layers for of in self.slots), strict=True))
        numbers = {used: number for number, used in enumerate(dict.fromkeys(of_layers))}
        read = map(Slots.read, self.slots, self[:3], zip(*numbers, strict=True))
        different = fold(*read, self.scale).detach().to(dtype).expand(len(numbers), -1, -1).unbind(0)
        return [different[numbers[used]] for used in of_layers]

    def stand_ins(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that receive the gradient of each layer's F; None if it has none."""
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in self[:3]):
            return (None,) * len(self.slots[0].of_layers)
        stand_ins: tuple[torch.Tensor, ...] = _StandIns.apply(*self)
        return stand_ins


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
        ctx: Any, b: torch.Tensor, u: torch.Tensor | None, v: torch.Tensor | None, scale: float, slots: Sequence[Slots]
    ) -> tuple[torch.Tensor, ...]:
        needs_b, needs_u, needs_v = ctx.needs_input_grad[:3]
        used = (b, needs_u or needs_v), (u, needs_b or needs_v), (v, needs_b or needs_u)
        # Detached: under ZeRO-3 the Parameter is emptied when the adapter's call returns.
        ctx.save_for_backward(*(tensor.detach() if tensor is not None and needed else None for tensor, needed in used))
        ctx.scale, ctx.slots = scale, slots
        return tuple(b.new_empty(1).expand(b.shape[-2:]) for _ in slots[0].of_layers)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        b, u, v = (of.read(saved, of.of_layers) for of, saved in zip(ctx.slots, ctx.saved_tensors, strict=True))
        of_b, of_u, of_v = ctx.slots
        needs_b, needs_u, needs_v = ctx.needs_input_grad[:3]
        grad_f = torch.stack(gradients)
        grad_b = grad_u = grad_v = None
        if needs_b:
            grad_b = of_b.add_up(fold(grad_f, u, v, ctx.scale))
        if needs_u:
            grad_u = of_u.add_up((fold(grad_f, None, v, ctx.scale) * b).sum(-2))
        if needs_v:
            grad_v = of_v.add_up((fold(grad_f, u, None, ctx.scale) * b).sum(-1))
        return grad_b, grad_u, grad_v, None, None
