"""Implement frozen linears with their low-rank updates and a handwritten backward pass, and norms without a linear.

    column-parallel, after a norm     z = W x + c + F A x                x = norm(hidden), or hidden without a norm
    row-parallel, before a norm       y = norm(sum_i z_i + c)            z_i = W_i x_i + F A_i x_i

`model/regions.py` computes x and A x of a column-parallel linear and exchanges them between ranks. The backward pass
needs the norm's input, one element per token for the norm, and A x, r elements per token. It recomputes x. Gradients of
frozen factors are not computed. The algebra of the update is in `adapters/low_rank.py`, and the adapter provides A and
F. The gate of the MLP, with the linear after it, is in `layer_specs.py`.

In a row-parallel linear every rank has its own features x_i. Each rank's partial sum includes the update, so that the
update needs no message of its own. A is sharded like the columns of W, so each rank computes the complete gradient of
its shard. F is not sharded, and each rank computes a partial sum of its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from megatron_tiedlora.adapters.low_rank import AllRows, flat
from megatron_tiedlora.adapters.tied_adapter import LinearUpdate
from megatron_tiedlora.base.shapes import HeadShape, NormShape, RopeShape
from megatron_tiedlora.model.regions import Enter, Entered, Needs, RegionEntry, RegionExit, Steps, run_steps
from megatron_tiedlora.parallel import groups
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, MatmulInput, RoundedRows, frozen_parameter, register
from megatron_tiedlora.parallel.kernels import Kernels
from megatron_tiedlora.parallel.loss import first_derivative_only
from megatron_tiedlora.parallel.rows import as_rows, detached, upcast


class Norm(nn.Module):
    """An RMS norm, y = (offset + weight) * x / sqrt(mean(x^2) + eps), or LayerNorm, the RMS norm of x - mean(x) plus a
    bias.

    The input and one element per token are saved for the backward pass.
    """

    def __init__(self, shape: NormShape, *, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.weight, bias = norm_parameters(shape, dtype)
        self.register_parameter("bias", bias)
        self.eps, self.offset = shape.eps, shape.offset
        self.kernels = kernels

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the normalised hidden states (..., d), in the dtype of the input."""
        weight = offset_weight(self.weight, self.offset)
        return cast(Tensor, _Norm.apply(hidden, weight, self.bias, self.eps, self.kernels))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kernels: Kernels) -> Tensor:
        normed, root = kernels.normalise(as_rows(hidden), weight.detach(), detached(bias), eps)
        ctx.save_for_backward(hidden, weight, bias, root)
        ctx.kernels = kernels
        return normed.view(hidden.shape)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, root = ctx.saved_tensors
        rows = (as_rows(gradient), as_rows(hidden))
        found = ctx.kernels.norm_gradient(*rows, weight.detach(), detached(bias), root, None)
        return found.view(hidden.shape), None, None, None, None


def norm_parameters(shape: NormShape, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the uninitialised weight of a norm, and its bias or None."""
    bias = None if shape.bias_name is None else frozen_parameter(shape.size, dtype=dtype)
    return frozen_parameter(shape.size, dtype=dtype), bias


def offset_weight(weight: Tensor, offset: float) -> Tensor:
    """Return offset + weight in at least fp32, or without an offset the weight itself."""
    return upcast(weight.detach()) + offset if offset else weight


class NormedLinear(nn.Module):
    """A column-parallel linear: this rank's shard of W, its bias, and the weights of the norm before it, if any."""

    norm: nn.Parameter | None
    norm_bias: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: FrozenWeight,
        *,
        norm: NormShape | None,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """Create the linear from `weight`, which is W (local out, in). `dtype` is the dtype of the activations."""
        super().__init__()
        self.eps = None if norm is None else norm.eps
        self._offset = 0.0 if norm is None else norm.offset
        self.dtype = dtype
        self.kernels = kernels
        own, norm_bias = (None, None) if norm is None else norm_parameters(norm, dtype)
        self.register_parameter("norm", own)
        self.register_parameter("norm_bias", norm_bias)
        self.frozen = register(self, weight)
        self.register_parameter("bias", bias)

    @property
    def norm_weight(self) -> Tensor | None:
        """Return the weight of the norm, (d,), with its offset; None without a norm."""
        return None if self.norm is None else offset_weight(self.norm, self._offset)

    def enter(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        tensor_parallel: groups.TensorParallel,
        update: LinearUpdate,
        *,
        num_rows: int,
        recomputes: bool = False,
    ) -> Entered:
        """Return hidden + addend, and the input of the linear for (num_rows, s) tokens, which is being sent.

        Args:
            hidden, addend: activations between layers, (b, s, d) or (1, b s / p, d).
            recomputes: whether the input is recomputed before the backward pass of the linear.
        """
        entry = RegionEntry(self.frozen, update.rows, num_rows, tensor_parallel, self.kernels, recomputes)
        norm = self.norm_weight, self.norm_bias, self.eps
        total, normed, ax = Enter.apply(hidden, addend, update.grad_a, entry, update.a, *norm)
        entry.send(normed, ax)
        return Entered(total, normed, ax, entry)

    def project(self, entered: Entered, update: LinearUpdate, split: "SplitHeads | None" = None) -> tuple[Tensor, ...]:
        """Return z, (b, s, local out), or with `split` its parts, from the result of `enter`."""
        operands, projection = Operands(update.a, update.f, self.bias), Projection(self.frozen, update.rows)
        _, normed, ax, entry = entered
        found: tuple[Tensor, ...] = _Projected.apply(
            *(normed, ax, None, update.grad_f), operands, projection, entry, split
        )
        return found


class Operands(NamedTuple):
    """The tensors of a projection except W. A tensor that does not exist is None.

    Attributes:
        a, f: the factors of the update, A (r, local in) and F (local out, r).
        bias: the bias of the linear.
    """

    a: Tensor | None = None
    f: Tensor | None = None
    bias: Tensor | None = None


def gradient_dtype(*slots: Tensor | None) -> torch.dtype | None:
    """Return the dtype of the factors' gradients and gradient slots, or None if all factors are frozen."""
    return next((tensor.dtype for tensor in slots if tensor is not None), None)


@dataclass(frozen=True)
class Projection:
    """Computes z from x on one rank, and the gradients from dz. Autograd does not record these operations.

    Attributes:
        rows: the tokens to which the factors of the update apply.
    """

    weight: FrozenWeight
    rows: AllRows

    def forward(
        self, x: Tensor, operands: Operands, ax: Tensor | None = None, operand: MatmulInput | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return z (..., local out) from x (..., local in), and A x (..., r), unless `ax` is already A x.

        Args:
            operand: what the matmul reads instead of x, [x | A x] or x in fp8. In fp8, `x` may be `operand.rows`.
        """
        a, f, bias = operands
        if a is not None and ax is None:
            ax = self.rows.reduce_input(x, a, local=False)
        joins = isinstance(operand, Tensor)
        if joins and f is not None:
            self.weight.write_update(f)
        rows = x.flatten(0, -2) if operand is None else operand
        projected = self.weight.times_transposed(rows, bias).view(*x.shape[:-1], -1)
        if ax is not None and f is not None and not joins:
            self.rows.add_update_(flat(projected), ax, f)
        return projected, ax

    def gradients(
        self,
        grad_z: Tensor,
        ax: Tensor | None,
        f: Tensor | None,
        needs: Needs,
        wide: torch.dtype | None,
        operand: MatmulInput | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x without that of the update, of A x, and of F, from dz (..., local out).

        Args:
            ax: A x; needed for the gradient of F.
            operand: dz in fp8, as x in `forward`.
            wide: the dtype of the gradient of F.
        """
        rows = grad_z.flatten(0, -2)
        grad_f = grad_ax = None
        if needs.f:
            assert ax is not None and wide is not None
            grad_f = self.rows.gradient_of_f(rows, ax, wide)
        size = self.weight.local_shape[1]
        if self.weight.spare and f is not None and needs.x:
            joined = self.weight.times(rows, out=rows.new_empty(len(rows), size + self.weight.spare))
            return joined[:, :size].view(*grad_z.shape[:-1], -1), joined[:, size : size + f.shape[1]], grad_f
        if f is not None and (needs.x or needs.a):
            grad_ax = self.rows.gradient_of_ax(rows, f)
        grad_x = self.weight.times(operand or rows).view(*grad_z.shape[:-1], -1) if needs.x else None
        return grad_x, grad_ax, grad_f

    def backward(
        self,
        grad_z: Tensor,
        x: Tensor | None,
        ax: Tensor | None,
        operands: Operands,
        needs: Needs,
        wide: torch.dtype | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, A and F of a row-parallel linear. The gradient of A needs x, (..., local in)."""
        grad_x, grad_ax, grad_f = self.gradients(grad_z, ax, operands.f, needs, wide)
        grad_a = None
        if needs.a:
            assert grad_ax is not None and x is not None and wide is not None
            grad_a = self.rows.gradient_of_a(grad_ax, as_rows(x), wide, local=False)
        if grad_x is not None:
            grad_x = self.rows.add_input_gradient_(grad_x, grad_ax, operands.a, local=False)
        return grad_x, grad_a, grad_f


class _Projected(torch.autograd.Function):
    """Computes z, or with `split` the queries, keys and values from z.

    A column-parallel linear receives x and A x through a `RegionEntry`. A row-parallel linear has its own x, and leaves
    through a `RegionExit`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ax: Tensor | None,
        grad_a: Tensor | None,
        grad_f: Tensor | None,
        operands: Operands,
        projection: Projection,
        region: RegionEntry | RegionExit,
        split: "SplitHeads | None",
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(split is not None)
        needs = Needs(*(ctx.needs_input_grad[index] for index in (0, 2, 3)))
        operand = None
        if isinstance(region, RegionEntry):
            x, ax = region.receive(x, ax)
            needs, operand = region.needs._replace(f=needs.f), region.take()
        projected, ax = projection.forward(x, operands, ax, operand)
        if isinstance(region, RegionEntry) and region.recomputes and needs.f:
            region.ax = detached(ax)
        ctx.shape = x.shape
        saved_x = x if needs.a and not isinstance(region, RegionEntry) else None
        del x, operand
        results, saved = ((projected,), ()) if split is None else split.forward(projected)
        ctx.projection, ctx.region, ctx.split, ctx.needs = projection, region, split, needs
        ctx.wide = gradient_dtype(grad_a, grad_f)
        ctx.save_for_backward(saved_x, ax if needs.f else None, *operands[:2], *saved)
        return results

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, ax, a, f, *saved = ctx.saved_tensors
        region, operands = ctx.region, Operands(a, f)
        if isinstance(region, RegionEntry):
            grad_z = gradients[0] if ctx.split is None else ctx.split.backward(gradients, *saved)
            operand = region.take()
            grad_z = operand.rows.view(*ctx.shape[:-1], -1) if isinstance(operand, RoundedRows) else grad_z
            grad_x, grad_ax, grad_f = ctx.projection.gradients(grad_z, ax, f, ctx.needs, ctx.wide, operand)
            region.send_gradients(grad_x, grad_ax, a)
            return None, None, None, grad_f, *(None,) * 4
        grad_z = region.receive_gradient(gradients[0])
        grad_x, grad_a, grad_f = ctx.projection.backward(grad_z, x, ax, operands, ctx.needs, ctx.wide)
        grad_x = None if grad_x is None else grad_x.view(ctx.shape)
        return grad_x, None, grad_a, grad_f, *(None,) * 4


class RowParallelLinear(nn.Module):
    """A row-parallel linear: this rank's columns of W, the bias, and the norm after it, if any."""

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: FrozenWeight,
        *,
        bias: nn.Parameter | None = None,
        norm: Norm | None = None,
        multiplier: float = 1.0,
    ) -> None:
        """Create the linear from `weight`, which is W_i (out, local in). The result is multiplied by `multiplier`."""
        super().__init__()
        self.multiplier = multiplier
        self.frozen = register(self, weight)
        self.register_parameter("bias", bias)
        self.norm = norm

    def forward(self, *arguments: Any) -> Tensor:
        """Return the result of `steps`."""
        return run_steps(self.steps(*arguments))

    def steps(
        self, local_hidden: Tensor, tensor_parallel: groups.TensorParallel, update: LinearUpdate | None = None
    ) -> Steps[Tensor]:
        """Yield when the partial sum is being sent. Return y from this rank's local features (..., local in)."""
        update, leaving = update or LinearUpdate(), RegionExit(tensor_parallel)
        operands, projection = Operands(update.a, update.f), Projection(self.frozen, update.rows)
        slots = update.grad_a, update.grad_f
        (partial,) = _Projected.apply(local_hidden, None, *slots, operands, projection, leaving, None)
        leaving.send(partial)
        del local_hidden
        yield
        return self.finish(leaving.receive(partial))

    def finish(self, output: Tensor) -> Tensor:
        """Return y from the sum of the ranks' partial sums, in the shape of activations between layers.

        Under sequence parallelism, the norm is computed on this rank's shard of the sequence.
        """
        output = output if self.bias is None else output + self.bias
        output = output if self.norm is None else self.norm(output)
        return output if self.multiplier == 1 else output * self.multiplier


# The QKV projection ---------------------------------------------------------------------------------------------------


class QkvLinear(NormedLinear):
    """Computes [Q | K | V] of this rank's heads and splits it into heads, which may be normalised and rotated.

    All of this, after the norm before it, is one autograd function.
    """

    query_norm: nn.Parameter | None
    key_norm: nn.Parameter | None

    def __init__(
        self, weight: FrozenWeight, local_heads: HeadShape, *, rope: RopeShape | None, dtype: torch.dtype, **others: Any
    ) -> None:
        """Create the linear from this rank's weight and heads. Without `rope`, queries and keys are not rotated.

        Args:
            others: the other arguments of `NormedLinear`.
        """
        super().__init__(weight, dtype=dtype, **others)
        assert rope or not local_heads.norms, "no family has norms of heads that are not rotated"
        assert not (local_heads.norms and local_heads.rope.interleaved), "no family has both"
        self.heads = local_heads
        self.rope = rope
        for name, norm in (("query_norm", local_heads.query_norm), ("key_norm", local_heads.key_norm)):
            self.register_parameter(name, None if norm is None else frozen_parameter(norm.size, dtype=dtype))

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the result of `steps`."""
        return run_steps(self.steps(*arguments, **keywords))

    def steps(
        self,
        hidden: Tensor,
        tensor_parallel: groups.TensorParallel,
        update: LinearUpdate | None = None,
        addend: Tensor | None = None,
        *,
        num_rows: int,
        table: tuple[Tensor, ...] = (),
    ) -> Steps[tuple[Tensor, tuple[Tensor, ...]]]:
        """Yield when x is being sent. Return hidden + addend, and queries, keys and values as views of one tensor.

        Args:
            hidden, addend: activations between layers, (b, s, d) or (1, b s / p, d).
            num_rows: the number of rows b.
            table: the cos and sin of the tokens' positions if heads are rotated; see `rotation_table`.

        Returns:
            the sum, and the heads, each (b, heads, s, head_dim).
        """
        update = update or LinearUpdate()
        entered = self.enter(hidden, addend, tensor_parallel, update, num_rows=num_rows)
        hidden = entered.hidden
        yield
        both = zip((self.query_norm, self.key_norm), self.heads.norms, strict=False)
        norms = tuple(offset_weight(norm, shape.offset) for norm, shape in both if norm is not None)
        split = SplitHeads(self.heads, self.kernels, table, norms, tensor_parallel.group)
        return hidden, self.project(entered, update, split)


@dataclass(frozen=True)
class SplitHeads:
    """Splits [Q | K | V], (b, s, o), into queries, keys and values, (b, heads, s, head_dim), as views of one tensor.

    If there is a table, queries and keys are rotated. If there are norms, either each of their heads has an RMS norm
    before the rotation, or all heads share one. The backward pass needs the result, which attention saves too, and one
    element per token and norm. A norm that all heads share is computed over the heads of all ranks. In each pass, one
    message then sums the means of the ranks' heads over the group, two elements per token.

    Attributes:
        heads: the heads of this rank.
        table: the cos and sin of the positions of the s tokens; () if there is no rotation.
        norms: the norm weights of queries and of keys, (head_dim,), or (heads * head_dim,) for a shared norm; or ().
        group: the ranks that share the heads.
    """

    heads: HeadShape
    kernels: Kernels
    table: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    group: groups.RankGroup

    def forward(self, projected: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return queries, keys and values, and the tensors that `backward` needs: the table, or with norms the heads,
        the norms' roots, the table and the norms' weights. `projected` may be overwritten."""
        counts = (self.heads.num, self.heads.num_kv, self.heads.num_kv)
        heads, saved = projected.view(-1, sum(counts), self.heads.dim).detach(), self.table
        if self.norms:
            norm, weight = self.heads.norms[0], self._weight(self.norms)
            if norm.sharded:
                means = self.kernels.square_means(heads, self.heads.num, self.heads.num_kv)
                root = torch.rsqrt(groups.all_reduce(means, self.group) / self.group.size + norm.eps)
                heads = self.kernels.rotate_with_root(heads, *self.table, self._by_head(root), weight)
            else:
                heads, root = self.kernels.rotate_normed(heads, *self.table, weight, norm.eps)
            saved = (heads, root, *self.table, *self.norms)
        elif self.table:
            cos, sin = self.table
            interleaved = self.heads.rope.interleaved
            heads = self.kernels.rotate(heads, cos, sin, self.heads.num + self.heads.num_kv, interleaved)
        by_token = heads.view(*projected.shape[:-1], -1, self.heads.dim)
        return by_token.transpose(1, 2).split(counts, dim=1), saved

    def backward(self, gradients: Sequence[Tensor], *saved: Tensor) -> Tensor:
        """Return the gradient of [Q | K | V] from the gradients of the results."""
        batch, _, length, _ = gradients[0].shape
        # (b, heads, s, head_dim) -> (b s, heads, head_dim). GPU kernels use this order, so nothing is copied.
        by_token = [gradient.transpose(1, 2).flatten(0, 1).contiguous().detach() for gradient in gradients]
        if self.norms:
            (query, key, _), (rotated, root, cos, sin, *norms) = by_token, saved
            rotated, mean = rotated.detach(), None
            if self.heads.norms[0].sharded:
                means = groups.all_reduce(self.kernels.product_means(query, key, rotated), self.group)
                mean, root = self._by_head(means / self.group.size), self._by_head(root)
            numbers = rotated, root, mean, cos, sin, self._weight(norms)
            found = self.kernels.rotate_normed_gradient(*by_token, *numbers)
        else:
            more = self.heads.rope.interleaved
            found = self.kernels.rotate_gradient(*by_token, *saved, more) if saved else torch.cat(by_token, dim=1)
        return found.view(batch, length, -1)

    def _weight(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the norm weights of each head, (num + num_kv, head_dim)."""
        counts = self.heads.num, self.heads.num_kv
        by_head = (norm.detach().view(-1, self.heads.dim) for norm in norms)
        return torch.cat([norm.expand(count, -1) for norm, count in zip(by_head, counts, strict=True)])

    def _by_head(self, numbers: Tensor) -> Tensor:
        """Expand a value for queries and one for keys, (T, 2), to all of their heads, (T, num + num_kv, 1)."""
        counts = self.heads.num, self.heads.num_kv
        return torch.cat([numbers[:, i : i + 1].expand(-1, count) for i, count in enumerate(counts)], dim=1)[..., None]
