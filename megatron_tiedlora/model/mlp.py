"""SwiGLU behind its norm: y = W_down (silu(W_gate x) * (W_up x)), x = norm(hidden), gate and up in one matmul.

With their updates the norm and both linears are one autograd step with one backward pass. It saves the norm's input,
gate and up, and A x of each adapted linear, r numbers per token; silu(gate) * up is computed again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.tied_adapter import LinearUpdate
from megatron_tiedlora.base.shapes import DOWN, GATE_UP
from megatron_tiedlora.model.linears import Needs, NormedLinear, Operands, Projection, RowParallelLinear, gradient_dtype
from megatron_tiedlora.parallel.backward import first_derivative_only
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import Kernels, as_rows


class SwiGlu(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, gate_up: NormedLinear, down: RowParallelLinear, *, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = gate_up
        self.down = down

    def forward(
        self,
        hidden: torch.Tensor,
        tensor_parallel: TensorParallel,
        update: Mapping[str, LinearUpdate] | None = None,
        *,
        recomputes: bool = False,
    ) -> torch.Tensor:
        """Activations between layers, (b, s, d) or (1, b s / p, d), to the same shape.

        Args:
            update: of the layer; those of gate_up and down_proj are used.
            recomputes: do not save gate and up, but compute them again in the backward pass.
        """
        gate_up, down = ((update or {}).get(name, LinearUpdate()) for name in (GATE_UP, DOWN))
        projection, operands = self.gate_up.projection(tensor_parallel, gate_up, num_rows=len(hidden))
        step = _Step(projection, Projection(self.down.frozen, down.rows), self.kernels, recomputes)
        result: torch.Tensor = _SwiGlu.apply(
            *(hidden, gate_up.grad_a, gate_up.grad_f, down.grad_a, down.grad_f),
            *(operands, Operands(down.a, down.f), step),
        )
        return self.down.total(result, tensor_parallel)


@dataclass(frozen=True)
class _Step:
    gate_up: Projection
    down: Projection
    kernels: Kernels
    recomputes: bool


class _SwiGlu(torch.autograd.Function):
    """This rank's addend of y, (b, s, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        grad_a: torch.Tensor | None,
        grad_f: torch.Tensor | None,
        down_grad_a: torch.Tensor | None,
        down_grad_f: torch.Tensor | None,
        operands: Operands,
        of_down: Operands,
        step: _Step,
    ) -> torch.Tensor:
        gate_up, root, ax = step.gate_up.forward(hidden, operands)
        needs, down_needs = _needs(ctx)
        reads_gate_up = down_needs.x or down_needs.a
        gated, shape = step.kernels.gate(as_rows(gate_up)), gate_up.shape[:-1]
        saved_gate_up = gate_up if reads_gate_up and not step.recomputes else None
        del gate_up  # before the matmul, if it is not saved
        z, _, down_ax = step.down.forward(gated, of_down)
        reads_norm = step.gate_up.reads_input(needs)
        ctx.step = step
        ctx.wide = gradient_dtype(grad_a, grad_f, down_grad_a, down_grad_f)
        ctx.save_for_backward(
            hidden if reads_norm or (step.recomputes and reads_gate_up) else None,
            root if reads_norm and not step.recomputes else None,
            saved_gate_up,
            ax if needs.f else None,
            down_ax if down_needs.f else None,
            *(*of_down[:2], *operands),
        )
        return z.view(*shape, -1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_z: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, root, gate_up, ax, down_ax, down_a, down_f, *others = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # so that gate and up are freed below; autograd holds them until this returns
        needs, down_needs = _needs(ctx)
        step: _Step = ctx.step
        operands = Operands(*others)
        if step.recomputes and hidden is not None:
            gate_up, root, _ = step.gate_up.forward(hidden, operands, ax=ax)
        gated = step.kernels.gate(as_rows(gate_up)) if down_needs.a else None
        grad_gated, *of_down_factors = step.down.backward(
            grad_z.flatten(0, -2), gated, None, down_ax, Operands(down_a, down_f), down_needs, ctx.wide
        )
        del gated
        if step.gate_up.tensor_parallel.sequence_parts > 1:
            # It was gathered for this function alone, but autograd would hold all of its d numbers per token.
            grad_z.untyped_storage().resize_(0)
        found: tuple[torch.Tensor | None, ...] = (None, None, None)
        if grad_gated is not None:
            grad_gate_up = step.kernels.gate_gradient(as_rows(grad_gated), as_rows(gate_up)).view(gate_up.shape)
            del grad_gated, gate_up
            found = step.gate_up.backward(grad_gate_up, hidden, root, ax, operands, needs, ctx.wide)
        return *found, *of_down_factors, *(None,) * 3


def _needs(ctx: Any) -> tuple[Needs, Needs]:
    """Which gradients are needed of gate-up and of down, whose input has one if anything before it needs one."""
    hidden, a, f, down_a, down_f = ctx.needs_input_grad[:5]
    needs = Needs(hidden, a, f)
    return needs, Needs(any(needs), down_a, down_f)
