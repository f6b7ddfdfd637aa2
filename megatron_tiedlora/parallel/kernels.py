"""The parts of the model that go number by number or row by row, as pure functions that can be compiled.

What a layer does between its products costs memory traffic, not arithmetic: run operation by operation, each of these
reads and writes its tensors several times; compiled, once. `Kernels` are handed to the layers when they are built, as
they stand here or compiled; the code is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional


def upcast(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in max(fp32, its own dtype): the precision of norms, softmax and loss."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """(..., n) -> (T, n), which autograd does not see.

    What kernels get has as many dimensions always, and is no view (a detached one is not): each form is compiled anew.
    """
    return tensor.reshape(-1, tensor.shape[-1]).detach()


def normalise(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm of rows (T, d): (weight * x * root, root), root = 1 / sqrt(mean(x^2) + eps), (T, 1) `upcast`."""
    root = torch.rsqrt(upcast(hidden).square().mean(-1, keepdim=True) + eps)
    return apply_norm(hidden, weight, root), root


def apply_norm(hidden: torch.Tensor, weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """weight * x * root; rounded before the weight is applied, as in transformers, unless a compiler leaves it wide."""
    return weight * (upcast(hidden) * root).to(hidden.dtype)


def norm_gradient(
    gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, root: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, (T, d), from that of the norm's output.

    With n = x root and g = weight * dy it is dx = (g - n mean(g n)) root.
    """
    normed = upcast(hidden) * root
    weighted = upcast(gradient) * weight
    return ((weighted - normed * (weighted * normed).mean(-1, keepdim=True)) * root).to(hidden.dtype)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, (T, f), from [gate | up], (T, 2 f)."""
    opening, up = gate_up.chunk(2, dim=-1)
    return functional.silu(opening) * up


def gate_gradient_(gradient: torch.Tensor, gate_up: torch.Tensor, found: torch.Tensor) -> None:
    """The gradient of [g | u], (T, 2 f), from that of `gate`, (T, f), into `found`, like `gate_up`.

    With s = sigmoid(g): dg = dy u s (1 + g (1 - s)), du = dy g s; inside in max(fp32, input dtype).
    """
    opening, up = (upcast(part) for part in gate_up.chunk(2, dim=-1))
    wide, chance = upcast(gradient), torch.sigmoid(opening)
    found.copy_(torch.cat((wide * up * chance * (1 + opening * (1 - chance)), wide * opening * chance), dim=-1))


def rotate_(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads (T, n, head_dim) in place, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) over the halves of each.

    cos and sin (T, 1, head_dim / 2); with -sin, back.
    """
    first, second = heads.chunk(2, dim=-1)
    heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))


def open_scores_(
    scores: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax of (scores + mask) over the last dimension, without its division.

    Args:
        scores: (c, n, m, keys), `upcast`.
        mask: (c, 1, m, keys), 0 or -inf in any dtype, no row all -inf.
        weights: like the scores in any dtype, gets exp(score - largest).

    Returns:
        (log of the sum of exp(score), sum of the weights), each (c, n, m, 1).
    """
    seen = scores + mask
    top = seen.amax(-1, keepdim=True)
    opened = (seen - top).exp()
    total = opened.sum(-1, keepdim=True)
    weights.copy_(opened)
    return top + total.log(), total


def score_gradient_(
    scores: torch.Tensor,
    mask: torch.Tensor,
    log_sums: torch.Tensor,
    shares: torch.Tensor,
    of_weights: torch.Tensor,
    weights: torch.Tensor,
) -> None:
    """Softmax p = exp(score + mask - log_sums) into `weights`, and p (of_weights - shares), its gradient, in place.

    Args:
        scores, mask: as in `open_scores_`.
        log_sums: (c, n, m, 1), its first result.
        shares: (c, n, m, 1), sum over keys of p * of_weights.
        of_weights: (c, n, m, keys), gradient of p; replaced by that of scores.
        weights: as `of_weights`.
    """
    chance = (scores + mask - log_sums).exp()
    weights.copy_(chance)
    of_weights.copy_(chance * (upcast(of_weights) - shares))


def row_log_sums(logits: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp(logit) of each row, (n,) `upcast`, from (n, V)."""
    return torch.logsumexp(upcast(logits), dim=-1)


def open_logits_(logits: torch.Tensor, total: torch.Tensor) -> None:
    """exp(logit - total) in place of logits (n, V); total (n,), `upcast`."""
    logits.copy_((upcast(logits) - total[:, None]).exp())


@dataclass(frozen=True)
class Kernels:
    """The functions of this module that layers call, each as it stands or compiled."""

    normalise: Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]] = normalise
    apply_norm: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = apply_norm
    norm_gradient: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] = norm_gradient
    gate: Callable[[torch.Tensor], torch.Tensor] = gate
    gate_gradient_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] = gate_gradient_
    rotate_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] = rotate_
    open_scores_: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = (
        open_scores_
    )
    score_gradient_: Callable[..., None] = score_gradient_
    row_log_sums: Callable[[torch.Tensor], torch.Tensor] = row_log_sums
    open_logits_: Callable[[torch.Tensor, torch.Tensor], None] = open_logits_

    def compiled(self) -> Kernels:
        """The same by torch.compile, one graph for all sizes. Each compiles when it is first called."""
        return Kernels(**{field.name: _compiled(getattr(self, field.name)) for field in fields(self)})


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True)
    return compiled


EAGER = Kernels()
