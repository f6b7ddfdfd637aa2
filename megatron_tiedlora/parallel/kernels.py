"""Define the elementwise and row-wise operations of the model as pure functions that can be compiled.

Elementwise kernels are bound by memory traffic. Uncompiled functions read and write their tensors several times, and
compiled functions only once. Layers receive a `Kernels` object, compiled or not, when they are built. On a GPU,
uncompiled kernels process a limited number of rows at a time (`in_parts`). Otherwise their fp32 temporaries would be
several times as large as their results.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tiedlora.parallel.quantise import LARGEST_LEVEL, dequantise_blocks, quantise_rows, row_maxima
from megatron_tiedlora.parallel.rows import NUMBERS_AT_ONCE, run_in_parts, upcast

# `NUMBERS_AT_ONCE` on a CPU, for kernels that would otherwise fall out of its cache.
_IN_CACHE = ("round_rows", "round_scaled_rows", "normalise_rounded", "gate_rounded", "gate_gradient_rounded")
HOST_NUMBERS_AT_ONCE = dict.fromkeys((*_IN_CACHE, "dequantise_blocks_"), 2**19)
# The memory that compiled kernels need on a CPU, in copies of their widest argument. Other kernels need none.
COPIES_ON_CPU = {"gate_gradient": 1}  # it joins the gradients of gate and up in one more tensor


# Options of torch.compile on GPUs. A kernel that reads this often gets blocks for accesses of 8 bytes (torch 2.11); the
# compiler finds better ones by trying some at the first call.
_SEARCHED: dict[str, dict[str, Any]] = {"norm_gradient": {"coordinate_descent_tuning": True}}
# gelu(g) = g sigmoid(k (g + c g^3)), the same as `Activation` of base/shapes.py says with tanh.
_GELU_SCALE, _GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
# Arguments of kernels whose first dimension is not the rows.
_WITHOUT_ROWS = ("weight", "bias", "factors", "levels", "matrix", "transposed")


def normalise(hidden: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised rows (..., d), and root = 1 / sqrt(mean(x^2) + eps), (..., 1) in the dtype of `upcast`.

    Without a bias, this is the RMS norm, weight * x * root. With a bias, this is LayerNorm, which is the RMS norm of
    x - mean(x) plus the bias.
    """
    root = torch.rsqrt(_centred(hidden, bias).square().mean(-1, keepdim=True) + eps)
    return apply_norm(hidden, weight, bias, root), root


def add_and_normalise(
    hidden: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, joined: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Return hidden + addend if there is an addend, and the results of `normalise` for this sum.

    With `joined` (T, m), m >= d, the normalised rows are written to its first columns and not returned. A compiled
    kernel may use the sum before it is rounded, so the results can differ from those for the returned sum by a rounding
    of the sum.
    """
    total = None if addend is None else hidden + addend
    normed, root = normalise(hidden if total is None else total, weight, bias, eps)
    if joined is None:
        return total, normed, root
    joined[:, : hidden.shape[1]].copy_(normed)
    return total, None, root


def apply_norm(hidden: Tensor, weight: Tensor, bias: Tensor | None, root: Tensor) -> Tensor:
    """Return the normalised rows from a known root, rounded as in transformers.

    The RMS norm rounds x * root before the multiplication by a weight of the same dtype. LayerNorm, and the RMS norm
    with a wider weight, round only their results. Compiled kernels may keep values in fp32 instead.
    """
    normed = _centred(hidden, bias) * root
    if bias is None:
        return weight * normed.to(hidden.dtype) if weight.dtype == hidden.dtype else (normed * weight).to(hidden.dtype)
    return (normed * weight + bias).to(hidden.dtype)


def norm_gradient(
    gradient: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, root: Tensor, addend: Tensor | None
) -> Tensor:
    """Return the gradient of x, (T, d), from the gradient of the norm's output, whose further columns are ignored.

    With n = x root and g = weight * dy, the result is dx = (g - n mean(g n)) root. For LayerNorm, n is
    (x - mean(x)) root, and the mean of dx is subtracted. `addend` (T, d) is added, the gradient of x from its other
    uses.
    """
    gradient = gradient[:, : hidden.shape[1]]
    found = _norm_gradient(upcast(gradient) * weight, _centred(hidden, bias) * root, root, bias).to(hidden.dtype)
    return found if addend is None else addend + found


def _norm_gradient(
    weighted: Tensor, normed: Tensor, root: Tensor, bias: Tensor | None, mean: Tensor | None = None
) -> Tensor:
    mean = (weighted * normed).mean(-1, keepdim=True) if mean is None else mean
    found = (weighted - normed * mean) * root
    return found if bias is None else found - found.mean(-1, keepdim=True)


def _centred(hidden: Tensor, bias: Tensor | None) -> Tensor:
    wide = upcast(hidden)
    return wide if bias is None else wide - wide.mean(-1, keepdim=True)


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """Return act(gate) * up, (T, f), from [gate | up], (T, 2 f). `activation` is an `Activation` of base/shapes.py."""
    gates, up = gate_up.chunk(2, dim=-1)
    return (functional.silu(gates) if activation == "silu" else functional.gelu(gates, approximate="tanh")) * up


def gate_gradient(gradient: Tensor, gate_up: Tensor, activation: str) -> Tensor:
    """Return the gradient of [g | u], (T, 2 f), from the gradient of `gate`'s result, (T, f).

    With s = sigmoid(z): dg = dy u s (1 + g (1 - s) z'), du = dy g s, both computed in max(fp32, input dtype). For silu,
    z is g. For gelu, z is k (g + c g^3), because (1 + tanh(x)) / 2 = sigmoid(2 x).
    """
    return torch.cat(_gate_gradients(gradient, gate_up, activation), dim=-1)


def _gate_gradients(gradient: Tensor, gate_up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    gates, up = (upcast(part) for part in gate_up.chunk(2, dim=-1))
    wide = upcast(gradient)
    if activation == "silu":
        sigmoid = torch.sigmoid(gates)
        slope = gates * (1 - sigmoid)
    else:
        squared = gates * gates
        sigmoid = torch.sigmoid(_GELU_SCALE * gates * (1 + _GELU_CUBIC * squared))
        slope = gates * (1 - sigmoid) * (_GELU_SCALE * (1 + 3 * _GELU_CUBIC * squared))
    return (wide * up * sigmoid * (1 + slope)).to(gate_up.dtype), (wide * gates * sigmoid).to(gate_up.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, num_rotated: int, interleaved: bool) -> Tensor:
    """Return heads (T, n, head_dim) as a new tensor in which the first `num_rotated` heads are rotated.

    In these heads the two halves (x1, x2) of the first m elements become (x1 cos - x2 sin, x2 cos + x1 sin). If they
    are `interleaved`, x1 are the elements with even indices and x2 those with odd indices. cos and sin have the shape
    (T, 1, m / 2). The elements after the first m do not change.
    """
    return torch.cat((_rotated(heads[:, :num_rotated], cos, sin, interleaved), heads[:, num_rotated:]), dim=1)


def rotate_gradient(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return the gradient of the input heads of `rotate`, (T, n, head_dim).

    `query`, `key` and `value` are gradients of the output heads, each (T, heads, head_dim). Values are not rotated.
    """
    turned = (_rotated(heads, cos, -sin, interleaved) for heads in (query, key))
    return torch.cat((*turned, value), dim=1)


def rotate_normed(heads: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Apply an RMS norm to the first m heads, then `rotate` them. `weight` (m, head_dim) has one row per head.

    Returns:
        all heads (T, n, head_dim), and the root of each norm, (T, m, 1) in the dtype of `upcast`; see `normalise`.
    """
    root = torch.rsqrt(upcast(heads[:, : len(weight)]).square().mean(-1, keepdim=True) + eps)
    return rotate_with_root(heads, cos, sin, root, weight), root


def rotate_with_root(heads: Tensor, cos: Tensor, sin: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    """Return the same heads as `rotate_normed`, from norm roots that are already known."""
    count = len(weight)
    normed = apply_norm(heads[:, :count], weight, None, root)
    return torch.cat((_rotated(normed, cos, sin), heads[:, count:]), dim=1)


def square_means(heads: Tensor, num: int, num_kv: int) -> Tensor:
    """Return the mean of x^2 over the first `num` heads and over the next `num_kv`, (T, 2), in `upcast`'s dtype."""
    return _means(upcast(heads[:, : num + num_kv]).square(), num)


def product_means(query: Tensor, key: Tensor, rotated: Tensor) -> Tensor:
    """Return the means of g n over all query heads and over all key heads, (T, 2) in the dtype of `upcast`.

    The gradient of a norm over all heads needs these means. g and n are as in `norm_gradient`. g n is computed as a
    head in `rotated` times its gradient in `query` or `key`.
    """
    gradient = upcast(torch.cat((query, key), dim=1))
    return _means(gradient * rotated[:, : gradient.shape[1]], query.shape[1])


def _means(numbers: Tensor, num: int) -> Tensor:
    return torch.stack((numbers[:, :num].mean((1, 2)), numbers[:, num:].mean((1, 2))), dim=1)


def rotate_normed_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotated: Tensor,
    root: Tensor,
    mean: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor,
) -> Tensor:
    """Return the gradient of the input heads of `rotate_normed`, (T, n, head_dim).

    The product x root is not saved. It is computed from the rotated head, which is rotated back and divided by the
    weight. The rotation can change the length of a vector, because cos and sin are rounded or scaled. So the head is
    also divided by cos^2 + sin^2.

    Args:
        query, key, value: the gradients of the output heads, each (T, heads, head_dim).
        rotated, root: the results of `rotate_normed`.
        mean: the mean of g n (see `norm_gradient`), (T, m, 1), from `product_means`; None: each head has its own norm.
    """
    weighted = upcast(torch.cat((_rotated(query, cos, -sin), _rotated(key, cos, -sin)), dim=1)) * weight
    wide_cos, wide_sin = upcast(cos), upcast(sin)
    squared = wide_cos.square() + wide_sin.square()
    normed = _rotated(upcast(rotated[:, : len(weight)]), wide_cos / squared, -wide_sin / squared) / weight
    return torch.cat((_norm_gradient(weighted, normed, root, None, mean).to(value.dtype), value), dim=1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = heads.split((half, half, heads.shape[-1] - 2 * half), dim=-1)
    if interleaved:
        first, second = heads[..., : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    turned: tuple[Tensor, ...] = (first * cos - second * sin, second * cos + first * sin)
    if interleaved:
        turned = (torch.stack(turned, dim=-1).flatten(-2),)
    return torch.cat(turned if rest.shape[-1] == 0 else (*turned, rest), dim=-1)


def exp_scores_(scores: Tensor, mask: Tensor, weights: Tensor, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """Write exp(scores + mask - largest), the numerators of the softmax, to `weights`, and return their sums.

    Args:
        scores: (c, n, m, keys), in the dtype of `upcast`.
        mask: (c, 1, m, keys), 0 or -inf in any dtype; every row has at least one 0.
        weights: a tensor with the shape of the scores, in any dtype, for the numerators.
        cap: scores s are first replaced by cap tanh(s / cap); None if they are not.

    Returns:
        (log of the sum of exp(score), sum of the weights), each (c, n, m, 1).
    """
    seen = soft_capped(scores, cap) + mask
    top = seen.amax(-1, keepdim=True)
    numerators = (seen - top).exp()
    total = numerators.sum(-1, keepdim=True)
    weights.copy_(numerators)
    return top + total.log(), total


def score_gradient_(
    scores: Tensor,
    mask: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    grad_weights: Tensor,
    weights: Tensor,
    cap: float | None = None,
) -> None:
    """Write the softmax p = exp(score + mask - log_sums) to `weights`, and compute the gradient of the scores.

    This gradient is p (grad_weights - deltas), multiplied by 1 - tanh^2(score / cap) if scores are capped.

    Args:
        scores, mask, cap: as in `exp_scores_`.
        log_sums: (c, n, m, 1), the first result of `exp_scores_`.
        deltas: (c, n, m, 1), the sum over keys of p * grad_weights.
        grad_weights: (c, n, m, keys), the gradient of p; replaced by the gradient of the scores.
        weights: a tensor with the shape of `grad_weights`.
    """
    capped = soft_capped(scores, cap)
    probability = (capped + mask - log_sums).exp()
    weights.copy_(probability)
    grad_weights.copy_(times_slope(probability * (upcast(grad_weights) - deltas), capped, cap))


def soft_capped(numbers: Tensor, cap: float | None) -> Tensor:
    """Return cap tanh(x / cap), or x if there is no cap."""
    return numbers if cap is None else cap * torch.tanh(numbers / cap)


def times_slope(gradient: Tensor, capped: Tensor, cap: float | None) -> Tensor:
    """Return the gradient of x, 1 - tanh^2(x / cap) times the gradient of `capped`, the result of `soft_capped`."""
    return gradient if cap is None else gradient * (1 - (capped / cap).square())


def row_log_sums(logits: Tensor, cap: float | None) -> Tensor:
    """Return the log of the sum of exp(capped logit) of each row, (n,) in the dtype of `upcast`, for logits (n, V)."""
    if cap is None:
        return torch.logsumexp(upcast(logits), dim=-1)
    top = soft_capped(upcast(logits.amax(-1, keepdim=True)), cap)  # a compiler would write capped rows to memory
    return (top + (soft_capped(upcast(logits), cap) - top).exp().sum(-1, keepdim=True).log())[:, 0]


def exp_logits_(logits: Tensor, total: Tensor, cap: float | None) -> None:
    """Replace logits (n, V) in place with p = exp(logit - total). `total` is (n,), in the dtype of `upcast`.

    With a cap, the logit is capped, and p is multiplied by the derivative of the capped logit, 1 - tanh^2(x / cap).
    """
    capped = soft_capped(upcast(logits), cap)
    logits.copy_(times_slope((capped - total[:, None]).exp(), capped, cap))


def round_rows(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the first columns of rows, (n, width), as fp8 numbers, and the scale of each row, (n,) fp32."""
    rows = rows[:, :width]
    return quantise_rows(rows, row_maxima(rows) / LARGEST_LEVEL["fp8"], "fp8")


def round_scaled_rows(rows: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return `round_rows` of rows * factors, computed in fp32 or wider; factors are (1, width) fp32."""
    return round_rows(upcast(rows) * factors, rows.shape[1])


def normalise_rounded(
    hidden: Tensor, addend: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, keeps: bool
) -> tuple[Tensor | None, ...]:
    """Return the sum and the root of `add_and_normalise`, the normalised rows if `keeps`, and `round_rows` of them."""
    total, normed, root = add_and_normalise(hidden, addend, weight, bias, eps, None)
    assert normed is not None
    return total, root, *_rounded(normed, None, keeps)


def gate_rounded(gate_up: Tensor, keeps: bool, activation: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return `gate`, or None unless `keeps`, and `round_rows` of it."""
    return _rounded(gate(gate_up, activation), None, keeps)


def gate_gradient_rounded(
    gradient: Tensor, gate_up: Tensor, factors: Tensor, keeps: bool, activation: str
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return `gate_gradient`, or None unless `keeps`, and `round_scaled_rows` of it; factors are (1, 2 f) fp32."""
    if keeps:
        return _rounded(gate_gradient(gradient, gate_up, activation), factors, keeps)
    # The halves are joined last. A compiler would write joined values to memory, and read them to round them.
    halves = _in_own_dtype(*_gate_gradients(gradient, gate_up, activation))
    wide = [upcast(half) * by for half, by in zip(halves, factors.chunk(2, dim=-1), strict=True)]
    maxima = torch.maximum(row_maxima(wide[0]), row_maxima(wide[1]))
    (gates, scales), (up, _) = (quantise_rows(half, maxima / LARGEST_LEVEL["fp8"], "fp8") for half in wide)
    return None, torch.stack((gates, up), dim=1).flatten(1), scales


def _rounded(values: Tensor, factors: Tensor | None, keeps: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    (values,) = _in_own_dtype(values)
    rounded = round_rows(values, values.shape[1]) if factors is None else round_scaled_rows(values, factors)
    return (values if keeps else None, *rounded)


def _in_own_dtype(*results: Tensor) -> tuple[Tensor, ...]:
    """Return 16-bit results as if one kernel had computed them, and another reads them.

    Within a kernel, compilers leave out the rounding to 16 bits. On a GPU an operation on the bits keeps it. On a CPU
    that operation would not be vectorised, and the compiled code has two parts instead.
    """
    if torch.compiler.is_compiling() and results[0].itemsize == 2:
        if results[0].is_cuda:
            return tuple([(result.view(torch.int16) & -1).view(result.dtype) for result in results])
        torch._dynamo.graph_break()
    return results


def transpose_(matrix: Tensor, transposed: Tensor) -> None:
    """Write `matrix`, (rows, width), to `transposed`, (width, rows)."""
    transposed.copy_(matrix.t())


def dequantise_rows_(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    """Write codes * scales to `out`, of 16 or 32 bits, from int8 or fp8 codes (n, width) and scales (n, 1) fp32."""
    out.copy_(codes).mul_(scales)  # computed in fp32, as the codes are exact in 16 bits


def dequantise_blocks_(packed: Tensor, scales: Tensor, levels: Tensor, block: int, out: Tensor) -> None:
    """Write the values of packed codes to `out`, (n, width); see `dequantise_blocks`. `levels` are (16,) fp32."""
    out.copy_(dequantise_blocks(packed, scales, levels, out.shape[1], block))


@dataclass(frozen=True)
class Kernels:
    """The functions of this module that layers call, uncompiled or compiled."""

    normalise: Callable[..., tuple[Tensor, Tensor]] = normalise
    add_and_normalise: Callable[..., Any] = add_and_normalise
    apply_norm: Callable[..., Tensor] = apply_norm
    norm_gradient: Callable[..., Tensor] = norm_gradient
    gate: Callable[[Tensor, str], Tensor] = gate
    gate_gradient: Callable[[Tensor, Tensor, str], Tensor] = gate_gradient
    rotate: Callable[[Tensor, Tensor, Tensor, int, bool], Tensor] = rotate
    rotate_gradient: Callable[..., Tensor] = rotate_gradient
    rotate_normed: Callable[..., tuple[Tensor, Tensor]] = rotate_normed
    rotate_normed_gradient: Callable[..., Tensor] = rotate_normed_gradient
    rotate_with_root: Callable[..., Tensor] = rotate_with_root
    square_means: Callable[[Tensor, int, int], Tensor] = square_means
    product_means: Callable[[Tensor, Tensor, Tensor], Tensor] = product_means
    exp_scores_: Callable[..., tuple[Tensor, Tensor]] = exp_scores_
    score_gradient_: Callable[..., None] = score_gradient_
    row_log_sums: Callable[[Tensor, float | None], Tensor] = row_log_sums
    exp_logits_: Callable[[Tensor, Tensor, float | None], None] = exp_logits_
    round_rows: Callable[[Tensor, int], tuple[Tensor, Tensor]] = round_rows
    round_scaled_rows: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = round_scaled_rows
    normalise_rounded: Callable[..., Any] = normalise_rounded
    gate_rounded: Callable[..., Any] = gate_rounded
    gate_gradient_rounded: Callable[..., Any] = gate_gradient_rounded
    transpose_: Callable[[Tensor, Tensor], None] = transpose_
    dequantise_rows_: Callable[[Tensor, Tensor, Tensor], None] = dequantise_rows_
    dequantise_blocks_: Callable[[Tensor, Tensor, Tensor, int, Tensor], None] = dequantise_blocks_

    def compiled(self, *, static_widths: bool = False) -> Kernels:
        """Return these kernels, wrapped in torch.compile. Each kernel is compiled at its first call.

        Args:
            static_widths: if False, one graph is used for all sizes. If True, every size is a constant in a graph,
                except the number of rows if the first call goes through `marking`. GPU kernels are then estimated to be
                1.5 to 2.5 times as fast, because they access 16 bytes at a time and need no division by sizes. Each
                width is compiled separately.
        """
        # On a CPU the compiler reads a table of levels one element at a time.
        names = [own.name for own in fields(self) if static_widths or own.name != "dequantise_blocks_"]
        compiled = {
            name: torch.compile(
                getattr(self, name), dynamic=not static_widths, options=_SEARCHED.get(name) if static_widths else None
            )
            for name in names
        }
        return replace(self.by_rows(in_parts), **compiled)

    def by_rows(self, change: Callable[[Callable[..., Any], list[bool]], Callable[..., Any]]) -> Kernels:
        """Return these kernels, changed by `in_parts` or `marking`, which also get the result of `has_rows`.

        The two excluded kernels process tiles of attention, whose first dimension is not rows.
        """
        names = [field.name for field in fields(self) if field.name not in ("exp_scores_", "score_gradient_")]
        plain = Kernels()
        return replace(self, **{name: change(getattr(self, name), has_rows(getattr(plain, name))) for name in names})


def has_rows(function: Callable[..., Any]) -> list[bool]:
    """Return, for each argument of a kernel, whether it is a tensor whose first dimension is the rows."""
    parameters = inspect.signature(function).parameters.values()
    return [p.annotation.startswith("Tensor") and p.name not in _WITHOUT_ROWS for p in parameters]


def in_parts(kernel: Callable[..., Any], has_rows: list[bool]) -> Callable[..., Any]:
    """Return the uncompiled kernel with a limit on the size of its temporaries, if it has rows."""

    @wraps(kernel)
    def limited(*arguments: Any) -> Any:
        at_once = NUMBERS_AT_ONCE if arguments[0].is_cuda else HOST_NUMBERS_AT_ONCE.get(kernel.__name__)
        return kernel(*arguments) if at_once is None else run_in_parts(kernel, arguments, has_rows, at_once)

    return limited if any(has_rows) else kernel


def marking(kernel: Callable[..., Any], has_rows: list[bool]) -> Callable[..., Any]:
    """Return a kernel for the first call, which tells torch.compile that the number of rows will vary."""

    def marked(*arguments: Any) -> Any:
        for argument, mine in zip(arguments, has_rows, strict=True):
            if mine and argument is not None:
                torch._dynamo.mark_dynamic(argument, 0)
        return kernel(*arguments)

    return marked


EAGER = Kernels().by_rows(in_parts)
