"""Compute the low-rank update F A x of a linear, z = W x + F A x, for the micro-batches of one or more adapters.

The backward pass computes these gradients, where ax = A x, dz is the gradient of z, and grad_ax = dz F:

    dA = grad_ax^T x        dF = dz^T ax        dx = dz W + grad_ax A

With dropout D on the update's input, ax = A D(x), dA = grad_ax^T D(x), and dx = dz W + D(grad_ax A). D multiplies each
element by a number, so D is its own adjoint. No matmul here creates a (tokens, out) tensor. The layers themselves
compute the matmuls with W.

Layers use A and F = (alpha / r) diag(v) B diag(u) of each linear. The gradients of B, u and v are computed from dF. A
tensor has one slot per set of layers that share it. Slots are its first dimension, unless all layers share the tensor.

A token uses the factors of its own adapter. Functions take either all tokens of the micro-batch or, with `local`, this
rank's shard of the sequence (sequence parallelism).

With several adapters, the factors of a linear are flattened and concatenated: A_1 (r_1, in) is followed by A_2, and so
on. F_i (out, r_i), the gradients, and A x, (tokens, r_i) for the tokens of adapter i, have the same flat format. So an
adapter's tensors have the same shape and memory as when it is trained alone, and r_i elements are saved per token.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_tiedlora.base.methods import Sharing
from megatron_tiedlora.parallel.frozen_weight import MESSAGE_MULTIPLE, padded, wide_matmul
from megatron_tiedlora.parallel.loss import RowSpan, RowSpans, first_derivative_only, span_starts
from megatron_tiedlora.parallel.rows import NUMBERS_AT_ONCE, as_wide_rows
from megatron_tiedlora.parallel.shard_spec import stream_seed

# Factors --------------------------------------------------------------------------------------------------------------


@cache
def layer_slots(shared_by: Sharing, layers: tuple[int, ...]) -> dict[int, int]:
    """Return the slot that each adapted layer uses. Slots are numbered in the order of their first layers."""
    keys: list[Hashable] = list(layers) if shared_by == "one" else [None] * len(layers)
    if isinstance(shared_by, int):
        keys = [index // shared_by for index in range(len(layers))]
    elif isinstance(shared_by, tuple):
        keys = [next((group for group in shared_by if layer in group), layer) for layer in layers]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return {layer: numbers[key] for layer, key in zip(layers, keys, strict=True)}


Slots = tuple[int, ...] | None  # the index of the slot that each layer of a stage uses; None: not stacked


def factors_of_layers(
    tensors: Sequence[Tensor | None], slots: Sequence[Slots], scale: float, *, num_layers: int, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """Return F (or A) of each layer, (o, r), in `dtype`, detached, and the gradient slot of each of them.

    Layers with the same slots share one tensor. A gradient slot is None if F needs no gradient.

    Args:
        tensors: B, u and v of a linear on a rank, or A in place of B. None stands for a tensor of ones.
        scale: alpha / r, or 1 for A.
    """
    of_layers = list(zip(*(own or (0,) * num_layers for own in slots), strict=True))
    numbers = {used: number for number, used in enumerate(dict.fromkeys(of_layers))}
    used = (some and different for some, different in zip(slots, zip(*numbers, strict=True), strict=True))
    with torch.no_grad():
        b, u, v = map(_read, tensors, used)
        rows = fold(b, u, v, scale).detach().to(dtype).expand(len(numbers), -1, -1).unbind(0)
    values = [rows[numbers[used]] for used in of_layers]
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
        return values, (None,) * num_layers
    return values, _GradientSlots.apply(*tensors, slots, scale, num_layers)


def _read(tensor: Tensor | None, slots: Slots) -> Any:
    """Return these slots of a stacked tensor, (slots, ...), or the tensor itself if `slots` is None or all slots."""
    if tensor is None or slots is None or slots == tuple(range(len(tensor))):
        return tensor
    return torch.stack([tensor[slot] for slot in slots])


def _add_up(addends: Tensor, slots: Slots, number: int) -> Tensor:
    """Sum the gradients of the layers, (layers, ...), into the gradient of a tensor with `number` slots."""
    if slots is None or slots == tuple(range(number)):
        return addends.sum(0) if slots is None else addends
    total = addends.new_zeros(number, *addends.shape[1:])
    for slot, addend in zip(slots, addends, strict=True):
        total[slot].add_(addend)
    return total


def fold(b: Tensor, u: Tensor | None, v: Tensor | None, scale: float) -> Tensor:
    """Return scale diag(v) B diag(u), (o, r), or (n, o, r) if b (n, o, r), u (n, r) or v (n, o) is stacked."""
    rows = b if v is None else v[..., None] * b
    scaled = rows if u is None else rows * u[..., None, :]
    return scaled if scale == 1.0 else scaled * scale


class _GradientSlots(torch.autograd.Function):
    """Create one gradient slot per layer: a tensor in the adapter's dtype that receives the gradient of the layer's F.

    autograd casts a gradient to its tensor's dtype, and F has the dtype of the base. An fp32 gradient therefore needs
    an fp32 tensor, whose values are never read. With the gradient G of F = s diag(v) B diag(u):

        dB = s diag(v) G diag(u)      dv = row sums of s G diag(u) B      du = column sums of s diag(v) G B
    """

    @staticmethod
    def forward(
        ctx: Any, b: Tensor, u: Tensor | None, v: Tensor | None, slots: Sequence[Slots], scale: float, num_layers: int
    ) -> tuple[Tensor, ...]:
        needs_b, needs_u, needs_v = ctx.needs_input_grad[:3]
        used = (b, needs_u or needs_v), (u, needs_b or needs_v), (v, needs_b or needs_u)
        # The tensors are detached because ZeRO-3 empties the Parameter when the adapter's call returns.
        ctx.save_for_backward(*(tensor.detach() if tensor is not None and needed else None for tensor, needed in used))
        ctx.scale, ctx.slots, ctx.sizes = scale, slots, [0 if tensor is None else len(tensor) for tensor in (b, u, v)]
        return tuple(b.new_empty(1).expand(b.shape[-2:]) for _ in range(num_layers))

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
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


# The tokens of a micro-batch ------------------------------------------------------------------------------------------


class SomeTokens(NamedTuple):
    """A selection of the tokens of a micro-batch.

    Attributes:
        rows: the tokens as indices into the (b s) tokens of the micro-batch, (m,).
        local_rows: the tokens of this rank, as indices into its (b s) or (b s / p) activations between layers.
        spans, local_spans: the spans of tokens of each adapter, if there are several adapters.
    """

    rows: Tensor
    local_rows: Tensor
    spans: RowSpans = ()
    local_spans: RowSpans = ()


@dataclass(frozen=True)
class AllRows:
    """The tokens of a micro-batch that has one adapter, with factors A (r, in) and F (out, r). A x is (..., r).

    Attributes:
        dropout: the dropout of the update's input, in a training step with --dropout.
    """

    dropout: "InputDropout | None" = None

    def _dropped(self, rows: Tensor, *, local: bool) -> Tensor:
        """Return D(rows), where rows are (tokens, in)."""
        return rows if self.dropout is None else self.dropout.dropped(rows, local=local)

    def reduce_input(self, x: Tensor, a: Tensor, *, local: bool) -> Tensor:
        """Return ax = A D(x) for x (..., in)."""
        rows = self._dropped(x.flatten(0, -2), local=local)
        return torch.mm(rows, a.t()).view(*x.shape[:-1], -1)

    def add_update_(self, z: Tensor, ax: Tensor, f: Tensor) -> None:
        """Add the update F A x to z, (tokens, out), in place."""
        torch.addmm(z, flat(ax), f.t(), out=z)

    def gradient_of_ax(self, grad_z: Tensor, f: Tensor) -> Tensor:
        """Return grad_ax = dz F, from dz (tokens, out)."""
        return grad_z @ f

    def gradient_of_f(self, grad_z: Tensor, ax: Tensor, dtype: torch.dtype) -> Tensor:
        """Return dF = dz^T ax in `dtype`, from dz (tokens, out)."""
        return wide_matmul(grad_z.t(), flat(ax), dtype)

    def gradient_of_a(self, grad_ax: Tensor, x: Tensor, dtype: torch.dtype, *, local: bool) -> Tensor:
        """Return dA = grad_ax^T D(x) in `dtype`, from x (tokens, in)."""
        return wide_matmul(flat(grad_ax).t(), self._dropped(x, local=local), dtype)

    def add_input_gradient_(self, grad_x: Tensor, grad_ax: Tensor | None, a: Tensor | None, *, local: bool) -> Tensor:
        """Add D(grad_ax A) to grad_x (..., in) in place, unless `grad_ax` or `a` is None, and return grad_x.

        A temporary tensor of the size of grad_x is created only with dropout.
        """
        if grad_ax is None or a is None:
            return grad_x
        rows, narrow = flat(grad_x), grad_ax.reshape(-1, grad_ax.shape[-1])
        if self.dropout is None:
            torch.addmm(rows, narrow, a, out=rows)
        else:
            rows.add_(self._dropped(narrow @ a, local=local))
        return grad_x

    def columns(self, ax: Tensor, *, local: bool) -> Tensor:
        """Reshape A x or its gradient to (1, tokens, r), so that it can be sent in one message with activations."""
        return ax.view(1, -1, ax.shape[-1])

    def of_columns(self, columns: Tensor, *, local: bool) -> Tensor:
        """Return A x or its gradient from the columns of a message, (..., r). This is the inverse of `columns`."""
        return columns

    def at(self, some: SomeTokens) -> "AllRows":
        """Return a copy for the given tokens only."""
        return self if self.dropout is None else replace(self, dropout=self.dropout.at(some.rows, some.local_rows))

    def slot_spans(self, size: int) -> RowSpans | None:
        """Return the adapters' spans in a flat gradient of A or F, `size` elements in total; None for one adapter."""
        return None


@dataclass(frozen=True)
class SharedRows(AllRows):
    """The tokens of a micro-batch that has several adapters. Adapters that do not adapt the linear have no update.

    Attributes:
        ranks: the LoRA rank of each adapter of the linear, by number in the micro-batch, in the order of factors.
        spans: the span of each adapter in all tokens of the micro-batch.
        local_spans: the span of each adapter in this rank's shard of the sequence.
        dropouts: the dropout of each adapter, by number, instead of `dropout`. Each has the keys of all tokens.
    """

    ranks: Mapping[int, int] = field(default_factory=dict)
    spans: RowSpans = ()
    local_spans: RowSpans = ()
    dropouts: "Mapping[int, InputDropout]" = field(default_factory=dict)

    def reduce_input(self, x: Tensor, a: Tensor, *, local: bool) -> Tensor:
        """See `AllRows`."""
        factors, spans = self._factors(a, by_rows=True), self._each(flat(x), local=local, drops=True)
        return _end_to_end([rows.reduce_input(own, factors[i], local=local) for i, rows, own, _ in spans], x)

    def add_update_(self, z: Tensor, ax: Tensor, f: Tensor) -> None:
        """See `AllRows`."""
        factors = self._factors(f)
        for i, rows, own, narrow in self._each(z, ax):
            rows.add_update_(own, narrow, factors[i])

    def gradient_of_ax(self, grad_z: Tensor, f: Tensor) -> Tensor:
        """See `AllRows`."""
        factors = self._factors(f)
        return _end_to_end([rows.gradient_of_ax(own, factors[i]) for i, rows, own, _ in self._each(grad_z)], grad_z)

    def gradient_of_f(self, grad_z: Tensor, ax: Tensor, dtype: torch.dtype) -> Tensor:
        """See `AllRows`."""
        found = ((i, rows.gradient_of_f(own, narrow, dtype)) for i, rows, own, narrow in self._each(grad_z, ax))
        return self._by_adapter(found, grad_z.new_zeros(grad_z.shape[-1], dtype=dtype))

    def gradient_of_a(self, grad_ax: Tensor, x: Tensor, dtype: torch.dtype, *, local: bool) -> Tensor:
        """See `AllRows`."""
        spans = self._each(x, grad_ax, local=local, drops=True)
        found = ((i, rows.gradient_of_a(narrow, own, dtype, local=local)) for i, rows, own, narrow in spans)
        return self._by_adapter(found, x.new_zeros(x.shape[-1], dtype=dtype))

    def add_input_gradient_(self, grad_x: Tensor, grad_ax: Tensor | None, a: Tensor | None, *, local: bool) -> Tensor:
        """See `AllRows`."""
        if grad_ax is not None and a is not None:
            factors = self._factors(a, by_rows=True)
            for i, rows, own, narrow in self._each(flat(grad_x), grad_ax, local=local, drops=True):
                rows.add_input_gradient_(own, narrow, factors[i], local=local)
        return grad_x

    def columns(self, ax: Tensor, *, local: bool) -> Tensor:
        """See `AllRows`. The result is (1, tokens, largest rank), padded with zeros for adapters of smaller rank."""
        num_tokens = sum(span.size for span in (self.local_spans if local else self.spans))
        spread = ax.new_zeros(1, num_tokens, max(self.ranks.values()))
        for i, _, own, narrow in self._each(spread[0], ax, local=local):
            own[:, : self.ranks[i]] = narrow
        return spread

    def of_columns(self, columns: Tensor, *, local: bool) -> Tensor:
        """See `AllRows`."""
        spans = self._each(columns.flatten(0, -2), local=local)
        return _end_to_end([own[:, : self.ranks[i]] for i, _, own, _ in spans], columns)

    def at(self, some: SomeTokens) -> "SharedRows":
        """See `AllRows`."""
        dropouts = {adapter: dropout.at(some.rows, some.local_rows) for adapter, dropout in self.dropouts.items()}
        return replace(self, spans=some.spans, local_spans=some.local_spans, dropouts=dropouts)

    def slot_spans(self, size: int) -> RowSpans:
        """See `AllRows`."""
        width = size // sum(self.ranks.values())
        return tuple(RowSpan(adapter, rank * width) for adapter, rank in self.ranks.items())

    def _each(
        self, rows: Tensor, ax: Tensor | None = None, *, local: bool = False, drops: bool = False
    ) -> Iterator[tuple[int, AllRows, Tensor, Any]]:
        """Split rows (tokens, n), and A x or its gradient, by adapter. Skip adapters that do not adapt the linear.

        Yields:
            the adapter's number; an `AllRows` for the adapter's rows, with dropout if `drops`; a view of these rows; a
            view of their A x, (tokens, rank of the adapter), or None without `ax`.
        """
        spans, taken = self.local_spans if local else self.spans, 0
        assert len(rows) == sum(span.size for span in spans), "rows of other tokens"
        assert ax is None or ax.numel() == sum(size * self.ranks.get(i, 0) for i, size in spans), "A x of other tokens"
        for (i, size), start in zip(spans, span_starts(spans), strict=True):
            if i not in self.ranks:
                continue
            part, dropout = slice(start, start + size), self.dropouts.get(i) if drops else None
            narrow = None if ax is None else ax[taken : taken + size * self.ranks[i]].view(-1, self.ranks[i])
            taken += size * self.ranks[i]
            yield i, AllRows() if dropout is None else AllRows(dropout.at(part, part)), rows[part], narrow

    def _factors(self, flat: Tensor, *, by_rows: bool = False) -> dict[int, Tensor]:
        """Return views of F_i (out, r_i) in the flat tensor, by adapter, or of A_i (r_i, in) with `by_rows`."""
        blocks = flat.split([span.size for span in self.slot_spans(flat.numel())])
        shapes = [(rank, -1) if by_rows else (-1, rank) for rank in self.ranks.values()]
        return {adapter: block.view(shape) for adapter, block, shape in zip(self.ranks, blocks, shapes, strict=True)}

    def _by_adapter(self, found: Iterator[tuple[int, Tensor]], zeros: Tensor) -> Tensor:
        """Sum each adapter's gradients and concatenate the sums. An adapter without gradients gets zeros."""
        totals: dict[int, Tensor] = {}
        for adapter, gradient in found:
            totals[adapter] = totals[adapter] + gradient if adapter in totals else gradient
        parts = (totals[i].flatten() if i in totals else zeros.repeat(rank) for i, rank in self.ranks.items())
        return torch.cat(list(parts))


def flat(tensor: Tensor) -> Tensor:
    """Return a view of a (..., n) tensor with shape (tokens, n)."""
    return tensor.view(-1, tensor.shape[-1])


def _end_to_end(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Flatten and concatenate the tensors. Without tensors, return an empty tensor in the dtype of `like`."""
    return torch.cat([part.flatten() for part in parts]) if parts else like.new_empty(0)


def beside(wide: Tensor, narrow: Tensor) -> Tensor:
    """Concatenate `wide` and `narrow` for one message, and pad `narrow` to a multiple of `MESSAGE_MULTIPLE` columns.

    If as many columns follow `wide` in memory, `wide` is not copied, and `narrow` is written there unless it is there.
    """
    width, size = wide.shape[-1], narrow.shape[-1]
    missing = padded(size, MESSAGE_MULTIPLE) - size
    if (rows := as_wide_rows(wide)).shape[1] == width + size + missing:
        place = rows[:, width : width + size].view(narrow.shape)
        if place.data_ptr() != narrow.data_ptr():
            place.copy_(narrow)
        return rows.view(*wide.shape[:-1], -1)
    return torch.cat((wide, narrow, narrow.new_zeros(*narrow.shape[:-1], missing)), dim=-1)


def apart(joined: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return views of `wide` and `narrow` in a result of `beside`, where `narrow` has `size` columns."""
    width = joined.shape[-1] - padded(size, MESSAGE_MULTIPLE)
    return joined[..., :width], joined[..., width : width + size]


# Dropout --------------------------------------------------------------------------------------------------------------
#
# x becomes x kept / (1 - p). `kept` does not depend on the layout, device or packing. Whether feature j of a token is
# kept depends on the run's seed, the token's index (step, sample and position in the sample, see `data/loader`), the
# layer, the target and j. The mask is computed in the forward pass and again in the backward pass. So nothing is saved,
# there is no random state, and a rank computes the mask for its own tokens and features only. All integers are 32-bit
# values in int64 elements that never overflow, so they are equal on all devices:
#
#     kept = mix(key(token) ^ mix(j ^ salt(layer, target))) >= p * 2^32

_WORD = 2**32 - 1
HOST_NUMBERS_AT_ONCE = 2**16  # small enough that the integers of a block stay in a CPU's cache


def mix_(words: Tensor) -> Tensor:
    """Replace each 32-bit value in an int64 tensor by its hash, a bijection (from C. Wellons' hash-prospector)."""
    words ^= words >> 15
    words.mul_(0x2C1B3C6D).bitwise_and_(_WORD)  # factors below 2^30, so no product reaches 2^63
    words ^= words >> 12
    words.mul_(0x297A2D39).bitwise_and_(_WORD)
    words ^= words >> 15
    return words


def token_keys(token_index: Tensor, *, seed: int) -> Tensor:
    """Return a 32-bit key in int64 for each token. The token indices are int64 and not negative."""
    return salted_keys(token_index, stream_seed(seed, "dropout"))


def salted_keys(token_index: Tensor, salt: int | Tensor) -> Tensor:
    """Return the keys of `token_keys` from the seed of a random stream, an integer or (n,) int64, below 2^63."""
    low = mix_((token_index & _WORD) ^ (salt & _WORD))
    return mix_(low ^ (token_index >> 32) ^ (salt >> 32))


@dataclass(frozen=True)
class InputDropout:
    """The dropout of an adapter's input at one linear, for the tokens of a micro-batch on one rank.

    Attributes:
        keys: the keys of all tokens of the micro-batch in order, (b s,) int64.
        local_keys: the keys of this rank's shard of the sequence, (b s / p,).
        salt: a 32-bit value that is different for each layer and target.
        first: the index of this rank's first input feature; it can be above 0 if the linear's columns are sharded.
        probability: p, the probability that an input element is dropped.
    """

    keys: Tensor
    local_keys: Tensor
    salt: int
    first: int
    probability: float

    def at(self, rows: Tensor | slice, local_rows: Tensor | slice) -> "InputDropout":
        """Return a copy for a subset of the tokens. `rows` selects from `keys`, and `local_rows` from `local_keys`."""
        return replace(self, keys=self.keys[rows], local_keys=self.local_keys[local_rows])

    def dropped(self, rows: Tensor, *, local: bool) -> Tensor:
        """Return `rows` with dropped elements set to 0 and the other elements divided by 1 - p. `rows` is (b s, n) for
        all tokens, or (b s / p, n) for this rank's shard of the sequence if `local`."""
        keys = self.local_keys if local else self.keys
        assert len(rows) == len(keys), "rows of other tokens"
        width = rows.shape[1]
        columns = mix_(torch.arange(self.first, self.first + width, device=rows.device) ^ self.salt)
        least, result = round(self.probability * 2**32), torch.empty_like(rows)
        scale = 1 / (1 - least / 2**32)
        size = max(1, (NUMBERS_AT_ONCE if rows.is_cuda else HOST_NUMBERS_AT_ONCE) // width)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            kept = mix_(keys[part, None] ^ columns) >= least
            torch.mul(rows[part], scale, out=result[part]).masked_fill_(~kept, 0)
        return result


def dropout_salt(seed: int, *, layer: int, target: str) -> int:
    """Return the 32-bit salt of a target in a layer (1-based)."""
    return stream_seed(seed, f"dropout.{layer}.{target}") & _WORD
