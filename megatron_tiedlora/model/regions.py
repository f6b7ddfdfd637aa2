"""Enter and leave the tensor-parallel region of a layer: the norm before it, and the messages between the ranks.

    entering    y = hidden + addend, x = norm(y), A x      all ranks get x and A x of complete sequences
    leaving     z = sum_i z_i                              each rank gets z, or its shard of the sequence

A message is sent by one step of a layer and received by the next step. So another half of the micro-batch can be
computed while it is on its way (`alternate`). In the backward pass, gradients are sent by the step that received in the
forward pass. They travel in a `RegionEntry` or `RegionExit`, not through autograd, because autograd must not use them
before they have arrived.

Under sequence parallelism each rank computes A x of a column-parallel linear from its shard of the sequence. A x is
sent in the same message as x, and its gradient in the same message as the gradient of x.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from megatron_tiedlora.adapters.low_rank import AllRows, apart, beside
from megatron_tiedlora.parallel import groups
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, MatmulInput, RoundedRows
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.loss import first_derivative_only
from megatron_tiedlora.parallel.rows import as_rows, as_wide_rows, detached

Result = TypeVar("Result")
# The steps of a layer. A step can receive the message that the previous one has sent.
Steps = Generator[None, None, Result]


class Needs(NamedTuple):
    """Flags for the gradients that a backward pass returns: of the input, of A and of F."""

    x: bool
    a: bool
    f: bool = False


NOTHING = Needs(x=False, a=False)


@dataclass
class RegionEntry:
    """The messages with the input of a column-parallel linear, and with its gradient, for one call.

    Attributes:
        rows: the tokens to which the update of the linear applies.
        num_rows: the number b of (b, s) tokens, needed if activations are sharded along the sequence.
        recomputes: whether the norm's root is not saved, because it is recomputed with x (see `Recompute`).
        needs: which gradients the backward pass computes.
        root: the recomputed root.
        ax: A x of complete sequences, if it is saved for the gradient of F and x is recomputed.
        adapted: whether the linear has an update.
        operand: what the matmul reads instead of x, [x | A x] or x in fp8, or instead of the gradient of z.
    """

    weight: FrozenWeight
    rows: AllRows
    num_rows: int
    tensor_parallel: groups.TensorParallel
    kernels: Kernels = EAGER
    recomputes: bool = False
    needs: Needs = NOTHING
    root: Tensor | None = None
    ax: Tensor | None = None
    adapted: bool = False
    operand: MatmulInput | None = None
    _width: int | None = None  # the columns of A x in the message
    _sent: groups.Pending | None = None
    _gradients: tuple[groups.Pending | None, Tensor | None] = (None, None)

    @property
    def in_parts(self) -> bool:
        """Return whether the hidden states are sharded along the sequence."""
        return self.tensor_parallel.sequence_parts > 1

    def send(self, normed: Tensor, ax: Tensor | None) -> None:
        """Start to gather x and A x, from this rank's shard of them."""
        if self.in_parts:
            narrow = None if ax is None else self.rows.columns(ax.detach(), local=True)
            joined = normed.detach() if narrow is None else beside(normed.detach(), narrow)
            self._width = None if narrow is None else narrow.shape[-1]
            own = self.tensor_parallel
            self._sent = groups.start_all_gather(joined[0], own.group, async_op=own.overlap)

    def receive(self, normed: Tensor, ax: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x and A x of complete sequences, (b, s, n), from what `send` has sent. A x is kept if it was not."""
        if self._sent is None:
            if self.weight.spare and ax is not None:
                self.operand = beside(normed, ax)[..., : normed.shape[-1] + ax.shape[-1]].flatten(0, -2)
            return normed, ax
        whole = self._sent.wait().unflatten(0, (self.num_rows, -1))
        self._sent = None
        if self._width is None:
            self.operand = torch.cat((whole, ax), -1).flatten(0, -2) if self.weight.spare and ax is not None else None
            return whole, ax
        whole, narrow = apart(joined := whole, self._width)
        if self.weight.spare:
            self.operand = joined[..., : whole.shape[-1] + self._width].flatten(0, -2)
        # This is a copy, because A x is saved, and a view would keep x in memory.
        return whole, self.rows.of_columns(narrow.contiguous(), local=False)

    def send_gradients(self, grad_x: Tensor | None, grad_ax: Tensor | None, a: Tensor | None) -> None:
        """Start to sum the gradient of x, which includes that of the update, and of A x over the ranks.

        Under sequence parallelism, the gradient of A x is summed in the same message if A needs a gradient. A's
        gradient is then computed from this rank's shard of x. Without sequence parallelism, A's gradient is this rank's
        partial sum, from all of x. In both cases, the gather of A sums A's gradient over ranks in its backward pass.
        """
        group, overlap = self.tensor_parallel.group, self.tensor_parallel.overlap
        if self.in_parts and grad_x is not None:
            grad_x = groups.end_to_end(grad_x)
        if self.in_parts and self.needs.a:
            assert grad_ax is not None
            joined = self.rows.columns(grad_ax, local=False)
            self._width = joined.shape[-1]
            joined = joined if grad_x is None else beside(grad_x, joined)
            pending = groups.start_reduce_scatter(joined[0], group, async_op=overlap)
            self._gradients = (pending, None)
        elif grad_x is None:
            self._gradients = (None, grad_ax)
        else:
            grad_x = self.rows.add_input_gradient_(grad_x, grad_ax, a, local=False)
            if self.in_parts:
                pending = groups.start_reduce_scatter(grad_x[0], group, async_op=overlap)
            else:
                pending = groups.start_all_reduce(grad_x, group, async_op=overlap)
            self._gradients = (pending, grad_ax)

    def receive_gradients(self, a: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of x, summed over the ranks, and of A x. Both are for this rank's shard if there is."""
        pending, grad_ax = self._gradients
        self._gradients = (None, None)
        if pending is None:
            return None, grad_ax
        grad_x = pending.wait()
        if not self.in_parts:
            return grad_x, grad_ax
        grad_x = grad_x[None]
        if not self.needs.a:
            return grad_x, grad_ax
        if not self.needs.x:
            return None, self.rows.of_columns(grad_x, local=True)
        assert self._width is not None
        grad_x, narrow = apart(grad_x, self._width)
        grad_ax = self.rows.of_columns(narrow, local=True)
        return self.rows.add_input_gradient_(grad_x, grad_ax, a, local=True), grad_ax

    def take(self) -> MatmulInput | None:
        """Return `operand`, and forget it."""
        found, self.operand = self.operand, None
        return found

    def normalise(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        norm: Tensor | None,
        norm_bias: Tensor | None,
        eps: float | None,
        *,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return y = hidden + addend, x = norm(y), and the norm's root (see `kernels.normalise`).

        Without an addend y is hidden itself, and without a norm x is y. If the matmul reads rounded rows and no message
        is sent before it, the kernel rounds too, and x is returned only if it is needed, `keeps`.
        """
        if norm is None:
            total = hidden if addend is None else hidden + addend
            return total, total.detach(), None
        rows = as_rows(hidden), None if addend is None else as_rows(addend), norm.detach(), detached(norm_bias), eps
        if self.weight.gradient_factors is not None and not self.in_parts:
            total, root, *found = self.kernels.normalise_rounded(*rows, keeps)
            self.operand = RoundedRows(*found)
            normed = self.operand.rows
        else:
            width, spare = hidden.shape[-1], self.weight.spare if keeps else 0
            joined = hidden.new_empty(len(rows[0]), width + spare) if spare else None
            total, normed, root = self.kernels.add_and_normalise(*rows, joined)
            normed = normed if joined is None else joined[:, :width]
        # For autograd, x is no view, because A x is written to its base.
        return hidden if total is None else total.view(hidden.shape), normed.view(hidden.shape).detach(), root


class Entered(NamedTuple):
    """The results of `NormedLinear.enter`.

    Attributes:
        hidden: y, the input of the layer's norm, in the shape of activations between layers.
        normed, ax: this rank's shard of x and A x, which the next step exchanges for complete sequences.
    """

    hidden: Tensor
    normed: Tensor
    ax: Tensor | None
    entry: RegionEntry


class Enter(torch.autograd.Function):
    """Computes y, x and A x. Send x and A x afterwards (`RegionEntry.send`).

    Args:
        hidden, addend: activations between layers, (b, s, d) or (1, b s / p, d).
        a, grad_a: the factor A of the update of the next linear, and its gradient slot.
        norm, norm_bias, eps: the norm; None if there is none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        addend: Tensor | None,
        grad_a: Tensor | None,
        entry: RegionEntry,
        a: Tensor | None,
        norm: Tensor | None,
        norm_bias: Tensor | None,
        eps: float | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        entry.adapted = a is not None
        total, normed, root = entry.normalise(hidden, addend, norm, norm_bias, eps, keeps=entry.adapted)
        ax = None if a is None else entry.rows.reduce_input(normed, a, local=entry.in_parts)
        entry.needs = needs = Needs(any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2])
        reads = needs.a or (needs.x and norm is not None)
        ctx.entry, ctx.wide = entry, None if grad_a is None else grad_a.dtype
        ctx.save_for_backward(
            total if reads else None, root if reads and not entry.recomputes else None, a, norm, norm_bias
        )
        return total, normed, ax

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        total, root, a, norm, norm_bias = ctx.saved_tensors
        entry: RegionEntry = ctx.entry
        root = entry.root if root is None else root
        grad_normed, grad_ax = entry.receive_gradients(a)
        grad_a = None
        if entry.needs.a:
            assert grad_ax is not None and ctx.wide is not None
            normed = as_rows(total)
            if norm is not None:
                normed = entry.kernels.apply_norm(normed, norm.detach(), detached(norm_bias), root)
            grad_a = entry.rows.gradient_of_a(grad_ax, normed, ctx.wide, local=entry.in_parts)
        found = grad_total
        if grad_normed is not None:
            if norm is None:
                found = grad_normed if grad_total is None else grad_total + grad_normed
            else:
                more = None if grad_total is None else as_rows(grad_total)
                inputs = as_wide_rows(grad_normed), as_rows(total), norm.detach(), detached(norm_bias), root, more
                found = entry.kernels.norm_gradient(*inputs).view(total.shape)
        of_hidden, of_addend = (found if needed else None for needed in ctx.needs_input_grad[:2])
        return of_hidden, of_addend, grad_a, *(None,) * 5


@dataclass
class RegionExit:
    """The messages with the partial sums of a row-parallel linear, and with their gradient, for one call.

    Attributes:
        recompute: what is recomputed for the backward pass of the linear; its message is sent before it is needed.
    """

    tensor_parallel: groups.TensorParallel
    recompute: "Recompute | None" = None
    _sent: groups.Pending | None = None
    _gradient: groups.Pending | None = None

    def send(self, partial: Tensor) -> None:
        """Start to sum the ranks' partial sums, (b, s, d)."""
        group, overlap = self.tensor_parallel.group, self.tensor_parallel.overlap
        if group.size == 1:
            return
        if self.tensor_parallel.sequence_parallel:
            rows = groups.end_to_end(partial.detach())[0]
            self._sent = groups.start_reduce_scatter(rows, group, async_op=overlap)
        else:
            self._sent = groups.start_all_reduce(partial.detach(), group, async_op=overlap)

    def receive(self, partial: Tensor, *tensors: Tensor | None) -> Tensor:
        """Return the sum in the shape of activations between layers. `tensors` are the arguments of `Recompute.start`.

        In the backward pass, every rank gets the gradient of the sum, gathered if it is sharded along the sequence.
        """
        return partial if self._sent is None else cast(Tensor, _Left.apply(partial, self, *tensors))

    def take(self) -> Tensor:
        """Return the sum when it has arrived."""
        assert self._sent is not None
        found, self._sent = self._sent.wait(), None
        return found[None] if self.tensor_parallel.sequence_parallel else found

    def send_gradient(self, gradient: Tensor) -> Tensor | None:
        """Return the gradient of the partial sums for autograd, or start to gather it and return None."""
        if not self.tensor_parallel.sequence_parallel:
            return gradient
        group, overlap = self.tensor_parallel.group, self.tensor_parallel.overlap
        self._gradient = groups.start_all_gather(gradient[0], group, async_op=overlap)
        return None

    def receive_gradient(self, gradient: Tensor | None) -> Tensor:
        """Return the gradient of the partial sums, (..., d), from what `send_gradient` has returned or sent."""
        if self._gradient is not None:
            gradient, self._gradient = self._gradient.wait(), None
        assert gradient is not None
        return gradient


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, exit_: RegionExit, *tensors: Tensor | None) -> Tensor:
        ctx.exit = exit_
        ctx.save_for_backward(*tensors)
        return exit_.take()

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.exit.recompute is not None and ctx.saved_tensors:
            ctx.exit.recompute.start(*ctx.saved_tensors)
        return ctx.exit.send_gradient(gradient), None, *(None,) * len(ctx.saved_tensors)


@dataclass
class Recompute:
    """Recomputes x and A x of a column-parallel linear in the backward pass, and sends them as in the forward pass."""

    entry: RegionEntry
    eps: float | None
    _started: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def start(self, hidden: Tensor, a: Tensor | None, norm: Tensor | None, norm_bias: Tensor | None) -> None:
        """Compute x, and A x unless it was saved, from y, and start to send them."""
        entry, ax = self.entry, None
        adds = a is not None and entry.ax is None
        _, normed, entry.root = entry.normalise(hidden, None, norm, norm_bias, self.eps, keeps=adds)
        if a is not None and adds:
            ax = entry.rows.reduce_input(normed, a, local=entry.in_parts)
        entry.send(normed, ax)
        self._started.append((normed, ax))

    def finish(self, *tensors: Any) -> tuple[Tensor, Tensor | None]:
        """Return x and A x of complete sequences, (b, s, n). `tensors` are the arguments of `start`."""
        if not self._started:
            self.start(*tensors)
        normed, ax = self._started.pop()
        return self.entry.receive(normed, self.entry.ax if ax is None else ax)


# The order of steps ---------------------------------------------------------------------------------------------------


def run_steps(steps: Steps[Result]) -> Result:
    """Run all steps in order, and return the result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return cast(Result, end.value)


def steps_of(module: nn.Module, *arguments: Any, overlap: bool, **keywords: Any) -> Steps[Any]:
    """Yield after each of `module.steps(...)` and return its result, or call the module if steps need not alternate.

    Engines need the hooks of a call (ZeRO-3 gathers the module's weights there).
    """
    if not overlap:
        return module(*arguments, **keywords)
    steps: Any = module.steps
    return (yield from steps(*arguments, **keywords))


def alternate(first: Steps[Result], second: Steps[Result]) -> list[Result]:
    """Run the steps of two halves alternately, and return their results. The first half is one step ahead.

    A layer's steps are: receive the sum, add it and enter; the first matmul; the last matmul and leave. So every
    message has a matmul of the other half beside it. autograd runs the steps in the reverse order, because it prefers
    the operation that was recorded last.
    """
    results: dict[int, Result] = {}
    halves = dict(enumerate((first, second)))
    next(first)
    turn = 0
    while halves:
        if turn in halves:
            try:
                next(halves[turn])
            except StopIteration as end:
                results[turn] = end.value
                del halves[turn]
        turn = 1 - turn
    return [results[0], results[1]]
